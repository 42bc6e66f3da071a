"""What every reader of another program's file needs: names, sizes, clipping and one entry per frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath, PureWindowsPath
from typing import Any

import numpy as np

from adapt.weak import geometry
from adapt.weak.marks import (
    MOST_FRAMES,
    MOST_PIXELS,
    MOST_SIDE,
    Box,
    Marks,
    Point,
    Polygon,
    Scribble,
    WeakError,
    WeakLabels,
)
from adapt.weak.readers.bounded import number

__all__ = ["Frame", "Names", "Sheet", "stem"]


def stem(name: str) -> str:
    """The key of a picture's file name, with either kind of slash."""
    plain = PureWindowsPath(name).name if "\\" in name else PurePath(name).name
    return PurePath(plain).stem


class Names:
    """Class names of a file, brought to the network's by `rename`.

    Raises:
        WeakError: `rename` names a class that the network does not have.
    """

    def __init__(self, classes: Sequence[str], rename: Mapping[str, str] | None) -> None:
        self.classes, self.rename = tuple(classes), dict(rename or {})
        if len(set(self.classes)) < len(self.classes) or not self.classes:
            raise WeakError("the network's classes are empty or hold a name twice; give each class one name")
        for old, new in self.rename.items():
            if new not in self.classes:
                raise WeakError(
                    f"--map {old}={new}: {new!r} is not one of {', '.join(self.classes)}; map to one of them"
                )

    def __call__(self, label: Any, who: str) -> str:
        """The network's name of a label of the file; "!", "|" and "?" stay."""
        if not isinstance(label, str) or not label or len(label) > 1000:
            raise WeakError(f"{who}: label {str(label)[:40]!r} is no class name; name one of the classes")
        if label == "?" or self.rename.get(label, label) in self.classes:
            return self.rename.get(label, label)
        bang = "!" if label.startswith("!") else ""
        parts = [self.rename.get(n, n) for n in label.removeprefix("!").split("|")]
        unknown = [n for n in parts if n not in self.classes]
        if unknown:
            raise WeakError(
                f"{who}: class {unknown[0][:60]!r} is not one of {', '.join(self.classes)}; "
                f"map it with --map {unknown[0][:60]}=NEW"
            )
        return bang + "|".join(parts)


@dataclass
class Frame:
    """One frame while a file is read.  Coordinates are in pixels of the picture, from 0, continuous."""

    key: str
    size: tuple[int, int]
    names: Names
    source: str = "human"
    parts: dict[str, list[Any]] = field(default_factory=dict)
    tags: dict[str, bool] = field(default_factory=dict)

    @property
    def who(self) -> str:
        return f"frame {self.key}"

    def tag(self, label: Any, present: bool = True) -> None:
        name = self.names(label, f"{self.who}, tag")
        if self.tags.get(name, present) != present:
            raise WeakError(f"{self.who}: tag {name!r} is both present and absent; delete one of them")
        self.tags[name] = present

    def point(self, label: Any, x: Any, y: Any, *, score: float | None = None) -> None:
        name = self.names(label, f"{self.who}, point")
        at = self._pixel(x, y, f"{self.who}, point of {name}")
        self.parts.setdefault("points", []).append(Point(*at, name, score=score))

    def line(self, label: Any, places: Sequence[Sequence[Any]], width: float = 3) -> None:
        name = self.names(label, f"{self.who}, line")
        who = f"{self.who}, line of {name}"
        way = tuple(self._pixel(*_pair(p, who), who) for p in places)
        self.parts.setdefault("scribbles", []).append(Scribble(name, way, width))

    def box(self, label: Any, x0: Any, y0: Any, x1: Any, y1: Any, *, score: float | None = None) -> None:
        name = self.names(label, f"{self.who}, box")
        who = f"{self.who}, box of {name}"
        at = [number(v, who) for v in (x0, y0, x1, y1)]
        self.parts.setdefault("boxes", []).append(
            Box(_plain(at[0]), _plain(at[1]), _plain(at[2]), _plain(at[3]), name, score=score)
        )

    def polygon(self, label: Any, places: Sequence[Sequence[Any]]) -> None:
        name = self.names(label, f"{self.who}, polygon")
        who = f"{self.who}, polygon of {name}"
        corners = []
        for place in places:
            x, y = (number(v, who) for v in _pair(place, who))
            corners.append((_plain(x), _plain(y)))
        self.parts.setdefault("coarse", []).append(Polygon(name, tuple(corners)))

    def mask(self, label: Any, mask: np.ndarray, left: int = 0, top: int = 0) -> None:
        """bool [h,w] whose first pixel is (left, top)."""
        way = geometry.rectangles(mask)
        if way:
            self.polygon(label, [(x + left, y + top) for x, y in way])

    def _pixel(self, x: Any, y: Any, who: str) -> tuple[int, int]:
        """The pixel that holds a place; the far border of the picture belongs to the last pixel."""
        fx, fy = number(x, who), number(y, who)
        width, height = self.size
        px = width - 1 if fx == width else int(np.floor(fx))
        py = height - 1 if fy == height else int(np.floor(fy))
        return px, py

    def marks(self) -> Marks:
        def found(kind: str) -> tuple[Any, ...]:
            return tuple(self.parts.get(kind, ()))

        return Marks(
            self.names.classes,
            self.size,
            tuple(c for c, yes in self.tags.items() if yes),
            tuple(c for c, yes in self.tags.items() if not yes),
            found("points"),
            found("scribbles"),
            found("boxes"),
            found("coarse"),
            source=self.source,
            frame=self.key,
        )


class Sheet:
    """The frames of one file: each picture once, by the stem of its name."""

    def __init__(self, path: Any, classes: Sequence[str], rename: Mapping[str, str] | None) -> None:
        self.path, self.names = path, Names(classes, rename)
        self.frames: dict[str, Frame] = {}
        self._files: dict[str, str] = {}

    def frame(self, file: Any, width: Any, height: Any, *, source: str = "human") -> Frame:
        """A new frame.

        Raises:
            WeakError: no name, no size, or the stem is another picture's already.
        """
        if not isinstance(file, str) or not stem(file):
            raise WeakError(f"marks {self.path}: a picture has no file name; export it again")
        key = stem(file)
        if key in self.frames:
            other = self._files[key]
            raise WeakError(
                f"marks {self.path}: frame {key} is there twice ({other} and {file}); "
                "rename one of the pictures"
            )
        if len(self.frames) >= MOST_FRAMES:
            raise WeakError(f"marks {self.path}: over {MOST_FRAMES} frames; split the file")
        size = self.size(width, height, f"frame {key}")
        self._files[key] = file
        self.frames[key] = Frame(key, size, self.names, source)
        return self.frames[key]

    @staticmethod
    def size(width: Any, height: Any, who: str) -> tuple[int, int]:
        if width in (None, "") or height in (None, ""):
            raise WeakError(f"{who}: it has no picture size; export it with width and height")
        w, h = number(width, who), number(height, who)
        if w != int(w) or h != int(h) or not (1 <= w <= MOST_SIDE and 1 <= h <= MOST_SIDE):
            raise WeakError(f"{who}: size {w:g}x{h:g} is no picture's; give 1 to {MOST_SIDE} pixels")
        if w * h > MOST_PIXELS:
            raise WeakError(f"{who}: {w:g}x{h:g} are over {MOST_PIXELS} pixels; scale frame and marks down")
        return int(w), int(h)

    def labels(self) -> WeakLabels:
        return WeakLabels(self.names.classes, {k: f.marks() for k, f in self.frames.items()})


def _pair(place: Any, who: str) -> tuple[Any, Any]:
    if not isinstance(place, (list, tuple)) or len(place) != 2:
        raise WeakError(f"{who}: {str(place)[:40]!r} is no pair x, y; export it again")
    return place[0], place[1]


def _plain(v: float) -> float:
    return int(v) if v == int(v) else v
