"""Label Studio JSON: results in per cent of original_width and original_height."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from adapt.weak.marks import WeakError, WeakLabels
from adapt.weak.readers.bounded import number, read_document
from adapt.weak.readers.collect import Frame, Sheet

__all__ = ["looks_like", "read_label_studio"]


def looks_like(found: Any) -> bool:
    return (
        isinstance(found, list)
        and bool(found)
        and all(isinstance(t, dict) and "data" in t and "annotations" in t for t in found)
    )


def read_label_studio(path: Path, classes: Sequence[str], rename: Mapping[str, str] | None) -> WeakLabels:
    found = read_document(path)
    if not looks_like(found):
        raise WeakError(f"marks {path}: it is no Label Studio export; export JSON (not JSON-MIN)")
    sheet = Sheet(path, classes, rename)
    for task in found:
        file = _file(task.get("data"))
        kept = [a for a in task["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
        if len(kept) > 1:
            raise WeakError(f"frame {file}: {len(kept)} people annotated it; keep one annotation")
        results = [r for a in kept for r in a.get("result") or () if isinstance(r, dict)]
        sized = next((r for r in results if r.get("original_width")), None)
        if sized is None:
            continue  # nothing with a place, and no size to hold tags in
        frame = sheet.frame(file, sized.get("original_width"), sized.get("original_height"))
        for result in results:
            _result(frame, result)
    return sheet.labels()


def _file(data: Any) -> str:
    """The file name in a task: a path, a URL, or local storage's ?d=PATH."""
    values = [v for v in data.values() if isinstance(v, str)] if isinstance(data, dict) else []
    text = (data.get("image") if isinstance(data, dict) else None) or (values[0] if len(values) == 1 else "")
    if not isinstance(text, str):
        return ""
    parts = urlsplit(text)
    return (parse_qs(parts.query).get("d") or [unquote(parts.path)])[0]


def _result(frame: Frame, result: dict[str, Any]) -> None:
    kind, value = result.get("type"), result.get("value")
    if not isinstance(value, dict):
        return  # a relation between regions
    who = f"{frame.who}, {kind} {str(result.get('id', ''))[:20]}"
    if number(result.get("image_rotation", 0), who) != 0:
        raise WeakError(f"{who}: the picture was rotated; label it as it is")
    if number(value.get("rotation", 0), who) != 0:
        raise WeakError(f"{who}: it is rotated; draw it upright or as a polygon")
    sizes = (result.get("original_width"), result.get("original_height"))
    if any(sizes) and frame.size != sizes:
        raise WeakError(f"{who}: size {sizes} differs from the frame's {frame.size}; export it again")
    sx, sy = frame.size[0] / 100, frame.size[1] / 100

    def place(x: Any, y: Any) -> tuple[float, float]:
        return round(number(x, who) * sx, 6), round(number(y, who) * sy, 6)

    if kind == "choices":
        for name in _labels(value, "choices", who):
            frame.tag(name)
        return
    if kind not in ("keypointlabels", "rectanglelabels", "polygonlabels"):
        raise WeakError(f"{who}: {kind} cannot be read; use keypoints, rectangles, polygons or choices")
    for label in _labels(value, str(kind), who):
        if kind == "keypointlabels":
            frame.point(label, *place(value.get("x"), value.get("y")))
        elif kind == "rectanglelabels":
            x, y, w, h = (number(value.get(k), who) for k in ("x", "y", "width", "height"))
            frame.box(label, *place(x, y), *place(x + w, y + h))
        else:
            points = value.get("points")
            if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
                raise WeakError(f"{who}: its points are no pairs x, y; draw it again")
            frame.polygon(label, [place(*p) for p in points])


def _labels(value: dict[str, Any], word: str, who: str) -> list[str]:
    names = value.get(word)
    if not isinstance(names, list) or len(names) == 0 or (word != "choices" and len(names) > 1):
        raise WeakError(f"{who}: it has not one label; give it one class")
    return names
