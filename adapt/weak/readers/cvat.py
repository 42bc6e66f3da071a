"""CVAT for images 1.1: tag, points, polyline, box, polygon and mask elements of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from adapt.weak.marks import MOST_SIDE, WeakError, WeakLabels
from adapt.weak.readers.bounded import Element, number, parse_xml
from adapt.weak.readers.collect import Frame, Sheet
from adapt.weak.readers.masks import from_runs

__all__ = ["read_cvat"]

_IGNORED = {"attribute"}


def read_cvat(path: Path, classes: Sequence[str], rename: Mapping[str, str] | None) -> WeakLabels:
    root = parse_xml(path)
    if root.name != "annotations":
        raise WeakError(f"marks {path}: its root is <{root.name}>; export CVAT for images 1.1")
    if any(root.all("track")):
        raise WeakError(f"marks {path}: it is CVAT for video (tracks); export CVAT for images 1.1")
    sheet = Sheet(path, classes, rename)
    for image in root.all("image"):
        about = image.attributes
        frame = sheet.frame(about.get("name"), about.get("width"), about.get("height"))
        for shape in image.children:
            if shape.name not in _IGNORED:
                _shape(frame, shape)
    return sheet.labels()


def _shape(frame: Frame, shape: Element) -> None:
    about, label = shape.attributes, shape.attributes.get("label")
    who = f"{frame.who}, {shape.name} of {label}"
    if number(about.get("rotation", "0"), who) != 0:
        raise WeakError(
            f"{who}: it is rotated by {about['rotation']} degrees; draw it upright or as a polygon"
        )
    if shape.name == "tag":
        frame.tag(label)
    elif shape.name == "points":
        for x, y in _places(about.get("points", ""), who):
            frame.point(label, x, y)
    elif shape.name == "polyline":
        frame.line(label, _places(about.get("points", ""), who))
    elif shape.name == "polygon":
        frame.polygon(label, _places(about.get("points", ""), who))
    elif shape.name == "box":
        frame.box(label, *(about.get(k) for k in ("xtl", "ytl", "xbr", "ybr")))
    elif shape.name == "mask":
        left, top, width, height = (
            int(number(about.get(k), who)) for k in ("left", "top", "width", "height")
        )
        if (
            not (0 < width <= MOST_SIDE and 0 < height <= MOST_SIDE)
            or width * height > frame.size[0] * frame.size[1]
        ):
            raise WeakError(f"{who}: its mask is {width}x{height}, larger than the picture; export it again")
        counts = [int(number(c, who)) for c in about.get("rle", "").split(",")]
        frame.mask(label, from_runs(counts, width * height, who).reshape(height, width), left, top)
    else:
        raise WeakError(f"{who}: <{shape.name}> is no shape that a mark can be; delete it before the export")


def _places(text: str, who: str) -> list[tuple[float, float]]:
    out = []
    for pair in filter(None, text.split(";")):
        x, comma, y = pair.partition(",")
        if not comma:
            raise WeakError(f"{who}: {pair[:40]!r} is no pair x,y; export it again")
        out.append((number(x, who), number(y, who)))
    if not out:
        raise WeakError(f"{who}: it has no points; delete it before the export")
    return out
