"""What a person, a map or another program knows of a frame without its dense label, and the facts' rules.

A mark is one fact.  A `Marks` holds those of one frame and cannot hold a contradiction; a `WeakLabels` holds
the frames of one road.  Files are read in `adapt.weak.readers`; what a round does with marks is in
`adapt.labels.weak`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from adapt.weak import geometry
from common.files import write_json

__all__ = [
    "HUMAN",
    "IGNORE_LABEL",
    "MOST_MARKS",
    "MOST_SIDE",
    "Box",
    "Marks",
    "Point",
    "Polygon",
    "Scribble",
    "WeakError",
    "WeakLabels",
    "meaning",
]

SCHEMA = 1
IGNORE_LABEL = "?"
HUMAN = "human"
MOST_SIDE = 16384  # pixels of a frame's side
MOST_PIXELS = 1 << 26  # of a frame
MOST_MARKS = 100_000  # of a frame; a LiDAR sweep projects about 30 000 points
MOST_BOXES = 10_000  # of a frame
MOST_CORNERS = 200_000  # of one line or polygon
MOST_COVERED = 1 << 28  # pixels that the polygons of a frame may span in all
MOST_FRAMES = 100_000  # of a file


class WeakError(ValueError):
    """Marks that have no right reading.  One line: frame, mark, reason and remedy.

    The text may quote a file that came from elsewhere: what a terminal would obey is shown as "?".
    """

    def __init__(self, text: str) -> None:
        line = " ".join(text.split())
        super().__init__("".join(c if c.isprintable() else "?" for c in line))


@dataclass(frozen=True)
class Point:
    """A pixel and its label: a class, "!c" (not c), "a|b" (one of them) or "?" (ignore)."""

    x: int
    y: int
    label: str
    source: str = ""  # "" = the frame's
    score: float | None = None  # None = the frame's


@dataclass(frozen=True)
class Scribble:
    """A line through pixels, `width` pixels wide, all of one label."""

    label: str
    line: tuple[tuple[int, int], ...]
    width: float = 3
    source: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Box:
    """A tight half-open box x0 <= x < x1, y0 <= y < y1 round one thing of a class."""

    x0: float
    y0: float
    x1: float
    y1: float
    label: str
    source: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Polygon:
    """Everything inside (non-zero rule) has the label; "?" = no label inside."""

    label: str
    polygon: tuple[tuple[float, float], ...]
    source: str = ""
    score: float | None = None


Mark = Point | Scribble | Box | Polygon


@lru_cache(maxsize=4096)
def meaning(label: str, classes: tuple[str, ...]) -> frozenset[int] | None:
    """The classes that a label leaves possible, as indices; None for "?".

    Raises:
        WeakError: it names a class that is not in `classes`, or leaves none.
    """
    if label == IGNORE_LABEL:
        return None
    if label in classes:  # a class may itself be called "a|b"
        return frozenset([classes.index(label)])
    names = label.removeprefix("!").split("|")
    unknown = [n for n in names if n not in classes]
    if unknown:
        raise WeakError(f"class {unknown[0]!r} is not one of {', '.join(classes)}; map it with --map OLD=NEW")
    named = frozenset(classes.index(n) for n in names)
    left = frozenset(range(len(classes))) - named if label.startswith("!") else named
    if not left:
        raise WeakError(f"label {label!r} leaves no class; name fewer classes after the !")
    return left


def _clash(a: frozenset[int] | None, b: frozenset[int] | None) -> bool:
    return (a is None) != (b is None) or (a is not None and b is not None and not a & b)


def _finite(*values: Any) -> bool:
    return all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 and math.isfinite(v)
        for v in values
    )


@dataclass(frozen=True)
class Marks:
    """The marks of one frame.

    Attributes:
        classes: the names that labels use, in the order of the network's classes.
        size: (width, height) in pixels of the frame that coordinates are in.
        present, absent: classes that are, and are not, in the frame; others are unknown.
        complete: every class that is not in `present` is absent.
        points, scribbles, boxes, coarse: the marks, in the order in which they were made.
        all_boxes: classes that have no pixel outside their boxes.
        source: "human", "human:NAME", "map", "detector:NAME", "lidar", or another word.
        score: trust 0..1 of what no person marked; None = not told.
        tag_sources: (class, source) of a tag that has another source than the frame.
        seconds: time that a person spent on the frame, None = not known.

    Raises:
        WeakError: a mark outside the frame, of an unknown class, or one that another contradicts.
    """

    classes: tuple[str, ...]
    size: tuple[int, int]
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()
    scribbles: tuple[Scribble, ...] = ()
    boxes: tuple[Box, ...] = ()
    coarse: tuple[Polygon, ...] = ()
    complete: bool = False
    all_boxes: tuple[str, ...] = ()
    source: str = HUMAN
    score: float | None = None
    tag_sources: tuple[tuple[str, str], ...] = ()
    seconds: float | None = None
    frame: str = field(default="", compare=False)  # for messages
    checked: bool = field(default=True, compare=False, repr=False)  # look for contradictions

    def __post_init__(self) -> None:
        try:
            self._check_frame()
            self._check_tags()
            self._check_places()
            clash = self._contradiction() if self.checked else None
            if clash is not None:
                raise WeakError(f"{clash}; delete one of them")
        except WeakError as error:
            raise WeakError(f"frame {self.frame or '(unnamed)'}: {error}") from None

    # ------------------------------------------------------------------------------------- checking
    def _check_frame(self) -> None:
        width, height = self.size
        whole = all(isinstance(v, int) and not isinstance(v, bool) for v in self.size)
        if not whole or not (1 <= width <= MOST_SIDE and 1 <= height <= MOST_SIDE):
            raise WeakError(f"size {width}x{height} is no picture's; give width and height, 1 to {MOST_SIDE}")
        if width * height > MOST_PIXELS:
            raise WeakError(f"{width}x{height} are over {MOST_PIXELS} pixels; scale frame and marks down")
        if len(self.marks()) > MOST_MARKS:
            raise WeakError(f"{len(self.marks())} marks are too many; give at most {MOST_MARKS} per frame")
        if len(self.boxes) > MOST_BOXES:
            raise WeakError(f"{len(self.boxes)} boxes are too many; give at most {MOST_BOXES} per frame")
        for what, score, source in [
            ("the frame", self.score, self.source),
            *((_named(m), m.score, m.source) for m in self.marks()),
        ]:
            if score is not None and not (_finite(score) and 0 <= score <= 1):
                raise WeakError(f"score {score!r} of {what} is not in 0..1; give a probability")
            if not isinstance(source, str) or len(source) > 200:
                raise WeakError(f"source of {what} is no short text; write human:NAME or detector:NAME")
        if not self.source:
            raise WeakError("source is empty; write human, map, lidar or detector:NAME")
        if self.seconds is not None and not (_finite(self.seconds) and self.seconds >= 0):
            raise WeakError(f"seconds {self.seconds!r} are no time; give a number from 0 on")

    def _check_tags(self) -> None:
        for word, tags in (("present", self.present), ("absent", self.absent), ("all_boxes", self.all_boxes)):
            for tag in tags:
                if tag not in self.classes:
                    raise WeakError(
                        f"{word} names class {tag!r}, not one of {', '.join(self.classes)}; "
                        "map it with --map OLD=NEW"
                    )
            if len(set(tags)) < len(tags):
                raise WeakError(f"{word} names {Counter(tags).most_common(1)[0][0]!r} twice; name it once")
        both = [t for t in self.present if t in self.absent]
        if both:
            raise WeakError(f"class {both[0]!r} is both present and absent; delete one of the tags")
        if self.complete and not self.present:
            raise WeakError("complete without a present class leaves no class; list what is present")
        if self.allowed() == []:
            raise WeakError("every class is absent; delete an absent tag")

    def _check_places(self) -> None:
        width, height = self.size
        spanned = 0.0
        for mark in self.marks():
            who = _named(mark)
            try:
                possible = meaning(mark.label, self.classes)
            except WeakError as error:
                raise WeakError(f"{who}: {error}") from None
            if isinstance(mark, Point):
                self._inside([(mark.x, mark.y)], who, pixels=True)
            elif isinstance(mark, Scribble):
                if not 1 <= len(mark.line) <= MOST_CORNERS:
                    raise WeakError(f"{who} has {len(mark.line)} points; give 1 to {MOST_CORNERS}")
                if not (_finite(mark.width) and 0 < mark.width <= 200):
                    raise WeakError(f"{who} is {mark.width!r} wide; give more than 0 and at most 200 pixels")
                self._inside(mark.line, who, pixels=True)
            elif isinstance(mark, Polygon):
                if not 3 <= len(mark.polygon) <= MOST_CORNERS:
                    raise WeakError(f"{who} has {len(mark.polygon)} corners; give 3 to {MOST_CORNERS}")
                self._inside(mark.polygon, who, pixels=False)
                xs, ys = zip(*mark.polygon, strict=True)
                spanned += (max(xs) - min(xs) + 1) * (max(ys) - min(ys) + 1)
            else:
                self._check_box(mark, who, width, height, possible)
        if spanned > MOST_COVERED:
            raise WeakError(f"polygons span {spanned:.0f} pixels in all, over {MOST_COVERED}; give fewer")

    def _inside(self, places: Sequence[tuple[float, float]], who: str, *, pixels: bool) -> None:
        width, height = self.size
        for x, y in places:
            if not _finite(x, y):
                raise WeakError(f"{who} has a coordinate that is no number; give pixels")
            if pixels and not (isinstance(x, int) and isinstance(y, int)):
                raise WeakError(f"{who} is between pixels; give whole coordinates")
            outside = (
                not (0 <= x < width and 0 <= y < height)
                if pixels
                else not (0 <= x <= width and 0 <= y <= height)
            )
            if outside:
                raise WeakError(
                    f"{who} reaches ({x:g}, {y:g}), outside {width}x{height}; move it inside, or give the "
                    "size that coordinates are in"
                )

    def _check_box(
        self, box: Box, who: str, width: int, height: int, possible: frozenset[int] | None
    ) -> None:
        at = (box.x0, box.y0, box.x1, box.y1)
        if possible is None or len(possible) != 1:
            raise WeakError(f"{who} is not of one class; give a box one class")
        if not _finite(*at):
            raise WeakError(f"{who} has a coordinate that is no number; give pixels")
        if box.x1 <= box.x0 or box.y1 <= box.y0:
            raise WeakError(
                f"{who} ends before it begins; give x0, y0, x1, y1 (these look like x, y, width, height)"
            )
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height:
            raise WeakError(
                f"{who} reaches outside {width}x{height}; clip it, or give half-open corners counted from 0"
            )

    def _contradiction(self) -> str | None:
        """Two facts that cannot both hold, in words; None where there are none."""
        allowed = self.allowed()
        may = None if allowed is None else frozenset(allowed)
        for m in self.marks():
            told = meaning(m.label, self.classes)
            if may is not None and told is not None and not told & may:
                return f"{_named(m)} shows a class that is absent ({self._of(m)})"
        shape = (self.size[1], self.size[0])
        owner: np.ndarray | None = None
        if self.coarse:
            owner = np.full(shape, -1, np.int32)
        for k, mark in enumerate(self.coarse):
            assert owner is not None
            rows, columns, covered = geometry.polygon(mark.polygon, shape)
            told = meaning(mark.label, self.classes)
            seen = owner[rows, columns]
            for other in np.unique(seen[covered & (seen >= 0)]).tolist():
                if _clash(told, meaning(self.coarse[other].label, self.classes)):
                    b = self.coarse[other]
                    return f"{_named(mark)} ({self._of(mark)}) covers {_named(b)} ({self._of(b)})"
            seen[covered] = k
        at: dict[tuple[int, int], list[Point]] = {}
        boxed = self._all_boxes()
        for p in self.points:
            told = meaning(p.label, self.classes)
            for other_point in at.get((p.x, p.y), ()):
                if _clash(told, meaning(other_point.label, self.classes)):
                    named = f"{_named(other_point)} ({self._of(other_point)})"
                    return f"{_named(p)} ({self._of(p)}) lies on {named}"
            if owner is not None and owner[p.y, p.x] >= 0:
                b = self.coarse[int(owner[p.y, p.x])]
                if _clash(told, meaning(b.label, self.classes)):
                    return f"{_named(p)} ({self._of(p)}) lies in {_named(b)} ({self._of(b)})"
            if told is not None:
                out = self._outside(p, told, boxed)
                if out is not None:
                    return out
            known = at.setdefault((p.x, p.y), [])
            if len(known) < 64:  # the same fact again adds nothing to compare with
                known.append(p)
        return None

    def _all_boxes(self) -> dict[str, np.ndarray]:
        """float64 [n,4] of the boxes of each class of `all_boxes`."""
        found: dict[str, list[tuple[float, ...]]] = {name: [] for name in self.all_boxes}
        for b in self.boxes:
            if b.label in found:
                found[b.label].append((b.x0, b.y0, b.x1, b.y1))
        return {name: np.array(at, np.float64).reshape(-1, 4) for name, at in found.items()}

    def _outside(self, p: Point, told: frozenset[int], boxed: Mapping[str, np.ndarray]) -> str | None:
        if len(told) != 1:
            return None
        name = self.classes[next(iter(told))]
        if name not in boxed:
            return None
        x0, y0, x1, y1 = boxed[name].T
        x, y = p.x + 0.5, p.y + 0.5
        inside = bool(((x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)).any())
        return None if inside else f"{_named(p)} lies outside every box of {name}, which all_boxes lists"

    def _of(self, mark: Mark) -> str:
        return mark.source or self.source

    # --------------------------------------------------------------------------------------- asking
    def marks(self) -> tuple[Mark, ...]:
        """Every mark that has a place."""
        return (*self.points, *self.scribbles, *self.boxes, *self.coarse)

    def allowed(self) -> list[int] | None:
        """Indices of the classes that tags leave possible; None where tags exclude none."""
        if self.complete:
            return [i for i, c in enumerate(self.classes) if c in self.present]
        if not self.absent:
            return None
        return [i for i, c in enumerate(self.classes) if c not in self.absent]

    def empty(self) -> bool:
        """True where nothing is marked."""
        return not (self.present or self.absent or self.complete or self.all_boxes or self.marks())

    def counts(self) -> Counter[tuple[str, str]]:
        """How many marks there are by (kind, source)."""
        told = dict(self.tag_sources)
        found: Counter[tuple[str, str]] = Counter()
        for tag in (*self.present, *self.absent):
            found["tags", told.get(tag, self.source)] += 1
        for kind in ("points", "scribbles", "boxes", "coarse"):
            for mark in getattr(self, kind):
                found[kind, self._of(mark)] += 1
        return found

    def trusted(self, threshold: float = 0.5) -> Marks:
        """Without what is not sure enough: a person's marks stay; of a map only absences stay; of any other
        source what has a score of at least `threshold` stays (a missing score counts as 0).
        """
        told = dict(self.tag_sources)

        def sure(source: str, score: float | None) -> bool:
            if _is_human(source):
                return True
            return not _is_map(source) and (score or 0.0) >= threshold

        def kept(marks: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(m for m in marks if sure(self._of(m), self.score if m.score is None else m.score))

        present = tuple(c for c in self.present if sure(told.get(c, self.source), self.score))
        absent = tuple(
            c
            for c in self.absent
            if _is_map(told.get(c, self.source)) or sure(told.get(c, self.source), self.score)
        )
        boxes = kept(self.boxes)
        whole = sure(self.source, self.score)
        dropped = {b.label for b in self.boxes} - {b.label for b in boxes}
        stays = tuple(c for c in self.all_boxes if whole and c not in dropped)
        return replace(
            self,
            present=present,
            absent=absent,
            points=kept(self.points),
            scribbles=kept(self.scribbles),
            boxes=boxes,
            coarse=kept(self.coarse),
            complete=self.complete and whole and bool(present),
            all_boxes=stays,
        )

    # ------------------------------------------------------------------------------------- changing
    def scaled(self, size: tuple[int, int]) -> Marks:
        """The same facts for a frame of `size` = (width, height) pixels.

        A pixel goes to the pixel that holds its centre.  Where two points of different classes fall on one
        pixel, both go: the smaller frame cannot tell them apart.
        """
        if tuple(size) == self.size:
            return self
        width, height = size
        sx, sy = width / self.size[0], height / self.size[1]

        def pixel(x: int, y: int) -> tuple[int, int]:
            return min(width - 1, int((x + 0.5) * sx)), min(height - 1, int((y + 0.5) * sy))

        def place(x: float, y: float) -> tuple[float, float]:
            return min(width, x * sx), min(height, y * sy)

        points = [replace(p, x=pixel(p.x, p.y)[0], y=pixel(p.x, p.y)[1]) for p in self.points]
        told: dict[tuple[int, int], set[frozenset[int] | None]] = {}
        for p in points:
            told.setdefault((p.x, p.y), set()).add(meaning(p.label, self.classes))
        clear = {
            at for at, all_told in told.items() if not any(_clash(a, b) for a in all_told for b in all_told)
        }
        boxes = tuple(
            replace(
                b,
                x0=min(b.x0 * sx, width),
                y0=min(b.y0 * sy, height),
                x1=min(b.x1 * sx, width),
                y1=min(b.y1 * sy, height),
            )
            for b in self.boxes
        )
        coarse = tuple(replace(c, polygon=tuple(place(*p) for p in c.polygon)) for c in self.coarse)
        moved = replace(
            self,
            size=(width, height),
            points=(),
            boxes=boxes,
            coarse=coarse,
            checked=False,  # borders that met in one frame may overlap by a pixel in the other
            scribbles=tuple(
                replace(s, line=tuple(pixel(*p) for p in s.line), width=max(s.width * (sx + sy) / 2, 0.5))
                for s in self.scribbles
            ),
        )
        return replace(moved, points=tuple(p for p in points if (p.x, p.y) in clear))

    def merge(self, other: Marks, prefer: str | None = None) -> Marks:
        """Both frames' facts.  `prefer` = "human": where two contradict, what no person made goes.

        Raises:
            WeakError: they contradict each other; the line names frame, mark and both sources.
        """
        if other.classes != self.classes:
            raise WeakError(f"frame {self.frame}: the two files have other classes; give both one order")
        if other.size != self.size:
            raise WeakError(
                f"frame {self.frame}: size {self.size[0]}x{self.size[1]} in one file, "
                f"{other.size[0]}x{other.size[1]} in the other; scale one of them"
            )
        a, b = self._explicit(), other._explicit()
        if prefer not in (None, HUMAN):
            raise WeakError(f"prefer {prefer!r} is unknown; choose human")
        if prefer and _is_human(self.source) != _is_human(other.source):
            person, program = (a, b) if _is_human(self.source) else (b, a)
            program = _without_clashes(person, program)
            a, b = (person, program) if _is_human(self.source) else (program, person)
        told = {**dict(b.tag_sources), **dict(a.tag_sources)}
        clash = [c for c in a.present if c in b.absent] + [c for c in a.absent if c in b.present]
        if clash:
            here, there = dict(a.tag_sources)[clash[0]], dict(b.tag_sources)[clash[0]]
            raise WeakError(
                f"frame {self.frame}: tag {clash[0]!r} is present by one source and absent by the other "
                f"({here}, {there}); delete one, or give --prefer human"
            )
        if a.seconds is None and b.seconds is None:
            seconds = None
        else:
            seconds = (a.seconds or 0) + (b.seconds or 0)
        try:
            return Marks(
                self.classes,
                self.size,
                _union(a.present, b.present),
                _union(a.absent, b.absent),
                _union(a.points, b.points),
                _union(a.scribbles, b.scribbles),
                _union(a.boxes, b.boxes),
                _union(a.coarse, b.coarse),
                a.complete or b.complete,
                _union(a.all_boxes, b.all_boxes),
                self.source,
                self.score,
                tuple((c, s) for c, s in told.items() if s != self.source),
                seconds,
                self.frame,
            )
        except WeakError as error:
            raise WeakError(f"{error}, or give --prefer human") from None

    def _explicit(self) -> Marks:
        """Every mark and tag with its own source and score."""

        def own(marks: Iterable[Any]) -> tuple[Any, ...]:
            return tuple(
                replace(m, source=self._of(m), score=self.score if m.score is None else m.score)
                for m in marks
            )

        told = dict(self.tag_sources)
        return replace(
            self,
            points=own(self.points),
            scribbles=own(self.scribbles),
            boxes=own(self.boxes),
            coarse=own(self.coarse),
            tag_sources=tuple((c, told.get(c, self.source)) for c in (*self.present, *self.absent)),
        )

    def plain(self) -> dict[str, Any]:
        """As JSON, without what is empty."""

        def more(mark: Mark) -> dict[str, Any]:
            return {k: v for k, v in (("source", mark.source), ("score", mark.score)) if v not in ("", None)}

        def row(values: list[Any], mark: Mark) -> list[Any]:
            return [*values, more(mark)] if more(mark) else values

        out: dict[str, Any] = {"width": self.size[0], "height": self.size[1]}
        out["present"], out["absent"] = list(self.present), list(self.absent)
        out["complete"] = self.complete
        out["points"] = [row([p.x, p.y, p.label], p) for p in self.points]
        out["scribbles"] = [
            {"label": s.label, "line": [list(p) for p in s.line], "width": s.width, **more(s)}
            for s in self.scribbles
        ]
        out["boxes"] = [row([b.x0, b.y0, b.x1, b.y1, b.label], b) for b in self.boxes]
        out["all_boxes"] = list(self.all_boxes)
        out["coarse"] = [
            {"label": c.label, "polygon": [list(p) for p in c.polygon], **more(c)} for c in self.coarse
        ]
        out["tag_sources"] = dict(self.tag_sources)
        out = {k: v for k, v in out.items() if v or k in ("width", "height")}
        out["source"] = self.source
        if self.score is not None:
            out["score"] = self.score
        if self.seconds is not None:
            out["seconds"] = self.seconds
        return out


def _is_human(source: str) -> bool:
    return source == HUMAN or source.startswith(HUMAN + ":")


def _is_map(source: str) -> bool:
    return source == "map" or source.startswith("map:")


def _union(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys((*a, *b)))


def _named(mark: Mark) -> str:
    if isinstance(mark, Point):
        return f"point ({mark.x}, {mark.y}, {mark.label!r})"
    if isinstance(mark, Box):
        return f"box ({mark.x0}, {mark.y0}, {mark.x1}, {mark.y1}, {mark.label!r})"
    if isinstance(mark, Scribble):
        return f"scribble of {mark.label!r} from {mark.line[0] if mark.line else ()}"
    return f"polygon of {mark.label!r} from {mark.polygon[0] if mark.polygon else ()}"


def _without_clashes(person: Marks, program: Marks) -> Marks:
    """What of a program's marks a person's do not contradict."""
    present = tuple(c for c in program.present if c not in person.absent)
    if person.complete:
        present = tuple(c for c in present if c in person.present)
    shown = _shown(person)
    absent = tuple(c for c in program.absent if c not in person.present and c not in shown)
    whole = program.complete and bool(present) and shown <= set(present)
    may = person.allowed()
    shape = (person.size[1], person.size[0])
    owner = np.full(shape, -1, np.int32) if person.coarse else None
    for k, mark in enumerate(person.coarse):
        assert owner is not None
        rows, columns, covered = geometry.polygon(mark.polygon, shape)
        owner[rows, columns][covered] = k
    at: dict[tuple[int, int], list[frozenset[int] | None]] = {}
    for p in person.points:
        at.setdefault((p.x, p.y), []).append(meaning(p.label, person.classes))

    boxed = person._all_boxes()

    def fits(mark: Mark) -> bool:
        told = meaning(mark.label, person.classes)
        if told is not None and may is not None and not told & set(may):
            return False
        if isinstance(mark, Point):
            if any(_clash(told, other) for other in at.get((mark.x, mark.y), ())):
                return False
            if told is not None and person._outside(mark, told, boxed):
                return False
            k = -1 if owner is None else int(owner[mark.y, mark.x])
            return k < 0 or not _clash(told, meaning(person.coarse[k].label, person.classes))
        if isinstance(mark, Polygon):
            rows, columns, covered = geometry.polygon(mark.polygon, shape)
            under = set() if owner is None else set(np.unique(owner[rows, columns][covered]).tolist()) - {-1}
            if any(_clash(told, meaning(person.coarse[k].label, person.classes)) for k in under):
                return False
            return not any(
                rows.start <= y < rows.stop
                and columns.start <= x < columns.stop
                and covered[y - rows.start, x - columns.start]
                and any(_clash(told, o) for o in others)
                for (x, y), others in at.items()
            )
        return True

    boxes = tuple(b for b in program.boxes if fits(b))
    lone = {
        p.label
        for p in person.points
        if not any(
            b.label == p.label and b.x0 <= p.x + 0.5 < b.x1 and b.y0 <= p.y + 0.5 < b.y1
            for b in (*boxes, *person.boxes)
        )
    }
    return replace(
        program,
        present=present,
        absent=absent,
        complete=whole,
        boxes=boxes,
        points=tuple(p for p in program.points if fits(p)),
        scribbles=tuple(s for s in program.scribbles if fits(s)),
        coarse=tuple(c for c in program.coarse if fits(c)),
        all_boxes=tuple(c for c in program.all_boxes if c not in lone),
        tag_sources=tuple((c, s) for c, s in program.tag_sources if c in (*present, *absent)),
    )


def _shown(marks: Marks) -> set[str]:
    """Classes that a mark of one class shows, or a tag."""
    return {m.label for m in marks.marks() if m.label in marks.classes} | set(marks.present)


@dataclass(frozen=True)
class WeakLabels:
    """The marks of a road: key → Marks.  A key is a file stem, "sha256:…" of its pixels, or "id:N"."""

    classes: tuple[str, ...]
    frames: Mapping[str, Marks] = field(default_factory=dict)
    made: str = ""  # who made the file, for people

    def merge(self, other: WeakLabels, prefer: str | None = None) -> WeakLabels:
        """Both files' facts; see `Marks.merge`."""
        if other.classes != self.classes:
            raise WeakError("the two files of marks have other classes; read both with the pack's")
        out = dict(self.frames)
        for key, marks in other.frames.items():
            out[key] = out[key].merge(marks, prefer) if key in out else marks
        return WeakLabels(self.classes, out, self.made)

    def of(self, keys: Sequence[str | Collection[str]], *, every: bool = False) -> list[Marks | None]:
        """For each frame its marks or None.  A frame has one key or several that are all its names.

        Raises:
            WeakError: a key names two frames, two keys name one frame, or, with `every`, a key names none.
        """
        found: list[Marks | None] = []
        used: dict[str, int] = {}
        for i, names in enumerate(keys):
            mine = [k for k in ([names] if isinstance(names, str) else names) if k in self.frames]
            if len(mine) > 1:
                raise WeakError(
                    f"frame {mine[0]} has marks under {mine[1]}, too; keep one of the two entries"
                )
            if mine and mine[0] in used:
                raise WeakError(
                    f"frame {mine[0]} of the marks is two frames (numbers {used[mine[0]]} and {i}); "
                    "name it by sha256:…"
                )
            if mine:
                used[mine[0]] = i
            found.append(self.frames[mine[0]] if mine else None)
        if every:
            names_of_all = {k for n in keys for k in ([n] if isinstance(n, str) else n)}
            for key in self.frames:
                if key not in used:
                    cut = Path(key).stem
                    hint = f"write {cut!r} without the ending" if cut != key and cut in names_of_all else ""
                    raise WeakError(
                        f"frame {key} of the marks is none of the frames; {hint or 'correct or delete it'}"
                    )
        return found

    def check_sizes(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Raise WeakError where a frame's (width, height) in pixels is not what its marks say."""
        for key, marks in self.frames.items():
            real = sizes.get(key)
            if real is None or real == marks.size:
                continue
            turned = " (turned by its EXIF tag?)" if real == marks.size[::-1] else ""
            raise WeakError(
                f"frame {key}: marks are for {marks.size[0]}x{marks.size[1]}, the picture has "
                f"{real[0]}x{real[1]}{turned}; scale the marks or name the right picture"
            )

    def scaled(self, size: tuple[int, int]) -> WeakLabels:
        """The same facts for frames of size (width, height)."""
        return replace(self, frames={k: m.scaled(size) for k, m in self.frames.items()})

    def trusted(self, threshold: float = 0.5) -> WeakLabels:
        """Of each frame what is sure enough; see `Marks.trusted`."""
        return replace(self, frames={k: m.trusted(threshold) for k, m in self.frames.items()})

    def counts(self) -> dict[str, Any]:
        """For a manifest: frames, seconds, and marks by kind and by source.  No place, no picture."""
        kinds: Counter[str] = Counter()
        sources: Counter[str] = Counter()
        for marks in self.frames.values():
            for (kind, source), n in marks.counts().items():
                kinds[kind] += n
                sources[source.split(":")[0]] += n
        seconds = [m.seconds for m in self.frames.values() if m.seconds is not None]
        return {
            "frames": sum(not m.empty() for m in self.frames.values()),
            "kinds": dict(sorted(kinds.items())),
            "sources": dict(sorted(sources.items())),
            "seconds": round(sum(seconds), 3) if seconds else None,
        }

    def plain(self) -> dict[str, Any]:
        """As the JSON of weak.json, schema 1."""
        head: dict[str, Any] = {"schema": SCHEMA, "classes": list(self.classes)}
        if self.made:
            head["made"] = self.made
        return {**head, "frames": {k: m.plain() for k, m in self.frames.items()}}

    def digest(self) -> str:
        """SHA-256 of all facts, whatever the order of frames in the file."""
        content = self.plain()
        content.pop("made", None)
        return hashlib.sha256(
            json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
        ).hexdigest()

    def write(self, path: str | Path) -> None:
        """Replace `path` by these marks, whole or not at all."""
        write_json(Path(path), self.plain(), allow_nan=False)
