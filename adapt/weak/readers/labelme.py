"""LabelMe 5: one JSON file per picture, or a folder of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt.weak.marks import WeakError, WeakLabels
from adapt.weak.readers.bounded import read_document
from adapt.weak.readers.collect import Frame, Sheet

__all__ = ["looks_like", "read_labelme"]


def looks_like(found: Any) -> bool:
    return isinstance(found, dict) and "shapes" in found and "imagePath" in found


def read_labelme(
    paths: Sequence[Path], classes: Sequence[str], rename: Mapping[str, str] | None
) -> WeakLabels:
    sheet = Sheet(paths[0].parent if len(paths) > 1 else paths[0], classes, rename)
    for path in paths:
        found = read_document(path)
        if not looks_like(found):
            raise WeakError(f"marks {path}: it is no LabelMe file; give one with shapes and imagePath")
        frame = sheet.frame(found["imagePath"], found.get("imageWidth"), found.get("imageHeight"))
        flags = found.get("flags") or {}
        if not isinstance(flags, dict) or not isinstance(found["shapes"], list):
            raise WeakError(f"{frame.who}: flags or shapes have another form; save it with LabelMe 5")
        for name, on in flags.items():
            if on:  # a flag that is off was perhaps never asked
                frame.tag(name)
        for shape in found["shapes"]:
            _shape(frame, shape)
    return sheet.labels()


def _shape(frame: Frame, shape: Any) -> None:
    if not isinstance(shape, dict) or not isinstance(shape.get("points"), list):
        raise WeakError(f"{frame.who}: a shape has no points; save it with LabelMe 5")
    kind, label, places = shape.get("shape_type", "polygon"), shape.get("label"), shape["points"]
    who = f"{frame.who}, {kind} of {label}"
    if not places or not all(isinstance(p, list) and len(p) == 2 for p in places):
        raise WeakError(f"{who}: its points are no pairs x, y; draw it again")
    if kind in ("point", "points"):
        for x, y in places:
            frame.point(label, x, y)
    elif kind in ("line", "linestrip"):
        frame.line(label, places)
    elif kind == "polygon":
        frame.polygon(label, places)
    elif kind == "rectangle" and len(places) in (2, 4):
        try:
            xs, ys = ([float(p[k]) for p in places] for k in (0, 1))
        except (TypeError, ValueError):
            raise WeakError(f"{who}: its corners are no numbers; draw it again") from None
        frame.box(label, min(xs), min(ys), max(xs), max(ys))  # drawn from any corner
    else:
        raise WeakError(f"{who}: a {kind} is no mark; draw a point, line, rectangle or polygon")
