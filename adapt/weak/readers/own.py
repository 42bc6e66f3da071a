"""weak.json, schema 1: this project's own file of marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapt.weak.marks import MOST_FRAMES, SCHEMA, Box, Marks, Point, Polygon, Scribble, WeakError, WeakLabels
from adapt.weak.readers.bounded import read_document
from adapt.weak.readers.collect import Names, Sheet

__all__ = ["looks_like", "parse", "read_own"]

_FRAME = {
    "width",
    "height",
    "present",
    "absent",
    "complete",
    "points",
    "scribbles",
    "boxes",
    "all_boxes",
    "coarse",
    "source",
    "score",
    "seconds",
    "tag_sources",
}


def looks_like(found: Any) -> bool:
    return isinstance(found, dict) and "schema" in found and "frames" in found


def read_own(path: Path, classes: Sequence[str], rename: Mapping[str, str] | None) -> WeakLabels:
    return parse(read_document(path), path, classes, rename)


def parse(found: Any, path: Any, classes: Sequence[str], rename: Mapping[str, str] | None) -> WeakLabels:
    """The marks of weak.json's content; raises WeakError."""
    if not looks_like(found):
        raise WeakError(f"marks {path}: it is no weak.json; give an object with schema, classes and frames")
    if found["schema"] != SCHEMA or isinstance(found["schema"], bool):
        raise WeakError(f"marks {path}: schema {found['schema']!r}; this version reads {SCHEMA}")
    names = Names(classes, rename)
    listed = found.get("classes")
    if not isinstance(listed, list) or not all(isinstance(c, str) for c in listed):
        raise WeakError(f"marks {path}: classes is no list of names; list the classes that labels use")
    if len(set(listed)) < len(listed):
        twice = next(c for c in listed if listed.count(c) > 1)
        raise WeakError(f"marks {path}: class {twice!r} is listed twice; list it once")
    for c in listed:
        names(c, f"marks {path}, classes")
    frames = found["frames"]
    if not isinstance(frames, dict) or len(frames) > MOST_FRAMES:
        raise WeakError(f"marks {path}: frames is no object of at most {MOST_FRAMES} frames; export it again")
    out = {}
    for key, entry in frames.items():
        out[key] = _frame(key, entry, names)
    made = found.get("made", "")
    return WeakLabels(names.classes, out, made if isinstance(made, str) else "")


def _frame(key: str, entry: Any, names: Names) -> Marks:
    who = f"frame {key}"
    if not key or not isinstance(entry, dict):
        raise WeakError(f"{who}: it is no object of marks; write one object per frame")
    strange = sorted(set(entry) - _FRAME)
    if strange:
        raise WeakError(f"{who}: {strange[0]!r} is no kind of marks; choose from {', '.join(sorted(_FRAME))}")
    size = Sheet.size(entry.get("width"), entry.get("height"), who)
    if not isinstance(entry.get("complete", False), bool):
        raise WeakError(f"{who}: complete is neither true nor false; write one of them")

    def tags(word: str) -> tuple[str, ...]:
        return tuple(names(c, f"{who}, {word}") for c in _list(entry.get(word, []), f"{who}, {word}"))

    told = entry.get("tag_sources", {})
    if not isinstance(told, dict) or not all(isinstance(v, str) for v in told.values()):
        raise WeakError(f"{who}: tag_sources is no object of class and source; delete it or correct it")
    points = []
    for row in _list(entry.get("points", []), f"{who}, points"):
        (x, y, label), more = _row(row, 3, f"{who}, point {str(row)[:60]}")
        points.append(Point(_whole(x), _whole(y), names(label, f"{who}, point"), **more))
    boxes = []
    for row in _list(entry.get("boxes", []), f"{who}, boxes"):
        (x0, y0, x1, y1, label), more = _row(row, 5, f"{who}, box {str(row)[:60]}")
        boxes.append(Box(x0, y0, x1, y1, names(label, f"{who}, box"), **more))
    scribbles = []
    for row in _list(entry.get("scribbles", []), f"{who}, scribbles"):
        label, way, more = _shape(row, "line", f"{who}, scribble", {"width"})
        width = row.get("width", 3)
        line = tuple((_whole(x), _whole(y)) for x, y in way)
        scribbles.append(Scribble(names(label, f"{who}, scribble"), line, width, **more))
    coarse = []
    for row in _list(entry.get("coarse", []), f"{who}, coarse"):
        label, way, more = _shape(row, "polygon", f"{who}, polygon", set())
        coarse.append(Polygon(names(label, f"{who}, polygon"), tuple(way), **more))
    return Marks(
        names.classes,
        size,
        tags("present"),
        tags("absent"),
        tuple(points),
        tuple(scribbles),
        tuple(boxes),
        tuple(coarse),
        entry.get("complete", False),
        tags("all_boxes"),
        entry.get("source", "human"),
        entry.get("score"),
        tuple((names(c, f"{who}, tag_sources"), s) for c, s in told.items()),
        entry.get("seconds"),
        key,
    )


def _list(value: Any, who: str) -> list[Any]:
    if not isinstance(value, list):
        raise WeakError(f"{who}: {str(value)[:40]!r} is no list; write a list")
    return value


def _whole(v: Any) -> Any:
    """A whole number written as 3.0 is 3; the rest is left for `Marks` to refuse."""
    return int(v) if isinstance(v, float) and abs(v) < 1e9 and v == int(v) else v


def _more(found: Any, who: str) -> dict[str, Any]:
    if not isinstance(found, dict) or set(found) - {"source", "score"}:
        raise WeakError(f"{who}: what follows the label is no source and score; give those or nothing")
    if not isinstance(found.get("source", ""), str):
        raise WeakError(f"{who}: source is no text; write human:NAME or detector:NAME")
    return {k: v for k, v in found.items() if v is not None}


def _row(row: Any, length: int, who: str) -> tuple[list[Any], dict[str, Any]]:
    if not isinstance(row, list) or len(row) not in (length, length + 1):
        raise WeakError(f"{who}: it has not {length} values; give coordinates and label")
    return row[:length], _more(row[length], who) if len(row) > length else {}


def _shape(row: Any, way: str, who: str, also: set[str]) -> tuple[Any, list[tuple[Any, Any]], dict[str, Any]]:
    if not isinstance(row, dict) or set(row) - {"label", way, "source", "score"} - also:
        raise WeakError(f"{who} {str(row)[:60]}: it is no object of label and {way}; write both")
    places = _list(row.get(way), f"{who}, {way}")
    if not all(isinstance(p, list) and len(p) == 2 for p in places):
        raise WeakError(f"{who} of {str(row.get('label'))[:40]}: {way} is no list of pairs x, y; write pairs")
    more = _more({k: row[k] for k in ("source", "score") if k in row}, who)
    return row.get("label"), [(p[0], p[1]) for p in places], more
