"""What weak marks say of a frame's labels: hard constraints on pseudo-labels.  Pure NumPy, no network.

The order, from the least to the most certain, later over earlier:

    tags        a pixel of an absent class loses its label
    boxes       a class of all_boxes loses its label outside its boxes; in a box, the best half by p(class)
                gets the class, large boxes first
    polygons    their pixels get the class
    exclusions  "!c" takes label c away; "?" takes any label away
    scribbles   the pixels of the line get the class: anchored
    points      the pixels of a disc get the class of the nearest point: anchored
    present     a class that has no pixel gets the few best of the region where it is the argmax

"a|b" is the one of them with the larger p, pixel by pixel.  A disc or line never enters a polygon of another
class.  Pixels of boxes and polygons are labels like any other; anchored ones are those that a person, or a
source that is trusted, has named one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt.weak import geometry
from adapt.weak.marks import Marks, meaning

__all__ = ["allowed_of", "anchor_pixels", "constrain"]

IGNORE = 255
PRESENT_SHARE = 5e-4  # of the frame, for a class that is present and has no label


def allowed_of(marks: Marks | None, classes: Sequence[str]) -> list[int] | None:
    """Indices of the classes that may be in the frame, as `allowed` of `pseudo_labels` takes them.

    Returns None where the marks exclude none.  Raises ValueError where the marks are of other classes.
    """
    if marks is None:
        return None
    if marks.classes != tuple(classes):
        raise ValueError(f"marks of {list(marks.classes)} for {list(classes)}: read them with these classes")
    return marks.allowed()


def anchor_pixels(marks: Marks | None, shape: tuple[int, int], *, radius: float = 3) -> np.ndarray:
    """bool [H,W]: the pixels that `constrain` anchors; λ_c does not count them."""
    anchored = np.zeros(shape, bool)
    if marks is None or not (marks.points or marks.scribbles):
        return anchored
    dummy = np.zeros((len(marks.classes), *shape), np.float32)
    return constrain(np.full(shape, IGNORE, np.uint8), dummy, marks, radius=radius, present_share=0)[1]


def constrain(
    labels: np.ndarray,
    p: Any,
    marks: Marks | None,
    *,
    radius: float = 3,
    box_share: float = 0.5,
    present_share: float = PRESENT_SHARE,
) -> tuple[np.ndarray, np.ndarray]:
    """Pseudo-labels that agree with the marks.

    Args:
        labels: uint8 [H,W], 255 = no label; stays as it is.
        p: softmax [C,H,W], NumPy array or torch tensor.
        marks: of this frame at this size (`Marks.scaled`), or None.
        radius: pixels of a point's disc.
        box_share: part of a box's pixels that get its class, 0..1.
        present_share: part of the frame that a present class without a label gets, at least one pixel; 0 =
            none.

    Returns:
        (labels uint8 [H,W], anchored bool [H,W]).

    Raises:
        ValueError: shapes that differ, or numbers out of range.
    """
    out = np.array(labels, dtype=np.uint8)
    anchored = np.zeros(out.shape, bool)
    if marks is None:
        return out, anchored
    _check(out, p, marks, radius, box_share, present_share)
    p = p.detach().cpu().numpy() if hasattr(p, "detach") else np.asarray(p)
    allowed = marks.allowed()
    if allowed is not None:
        table = np.full(256, IGNORE, np.uint8)
        table[allowed] = allowed
        out = table[out]
    fixed = np.zeros(out.shape, bool)  # what a mark with a place has decided
    _boxes(out, p, marks, box_share, fixed)
    held = _polygons(out, p, marks, allowed)
    fixed |= held
    strokes = [(s.label, geometry.line(s.line, s.width, out.shape)) for s in marks.scribbles]
    _exclude(out, marks, strokes, radius, fixed)
    for label, (rows, columns, covered) in strokes:
        possible = _choices(label, marks, allowed)
        if possible:
            _anchor(out, anchored, held, p, possible, rows, columns, covered)
    _points(out, anchored, held, p, marks, allowed, radius)
    if present_share:
        _present(out, p, marks, fixed | anchored, present_share)
    return out, anchored


def _check(
    labels: np.ndarray, p: Any, marks: Marks, radius: float, box_share: float, present_share: float
) -> None:
    height, width = labels.shape
    if tuple(p.shape) != (len(marks.classes), height, width):
        raise ValueError(
            f"map of shape {tuple(p.shape)}: expected {(len(marks.classes), height, width)}, one per class"
        )
    if marks.size != (width, height):
        raise ValueError(
            f"marks are for {marks.size[0]}x{marks.size[1]}, labels have {width}x{height}: scale the marks"
        )
    if not (0 <= radius <= 1000 and 0 <= box_share <= 1 and 0 <= present_share <= 1):
        raise ValueError(
            f"radius {radius}, box_share {box_share}, present_share {present_share}: "
            "radius is 0 to 1000, shares are 0..1"
        )


def _choices(label: str, marks: Marks, allowed: list[int] | None) -> list[int]:
    """The classes that a positive label leaves, sorted; [] for "?" and "!c"."""
    told = meaning(label, marks.classes)
    if told is None or (label.startswith("!") and label not in marks.classes):
        return []
    return sorted(told if allowed is None else told & set(allowed))


def _excluded(label: str, marks: Marks) -> list[int]:
    """The classes that a label takes away: all for "?", those named for "!a|b", none otherwise."""
    told = meaning(label, marks.classes)
    if told is None:
        return list(range(len(marks.classes)))
    if label.startswith("!") and label not in marks.classes:
        return [c for c in range(len(marks.classes)) if c not in told]
    return []


def _best(p: np.ndarray, possible: list[int], rows: slice, columns: slice) -> np.ndarray:
    """uint8 [h,w]: the one of `possible` with the largest p; the first of equals."""
    if len(possible) == 1:
        return np.full((rows.stop - rows.start, columns.stop - columns.start), possible[0], np.uint8)
    best: np.ndarray = np.asarray(possible, np.uint8)[p[possible, rows, columns].argmax(0)]
    return best


def _boxes(out: np.ndarray, p: np.ndarray, marks: Marks, share: float, fixed: np.ndarray) -> None:
    windows = [
        (marks.classes.index(b.label), *geometry.box_window(b.x0, b.y0, b.x1, b.y1, out.shape))
        for b in marks.boxes
    ]
    for name in marks.all_boxes:
        c = marks.classes.index(name)
        outside = np.ones(out.shape, bool)
        for k, rows, columns in windows:
            if k == c:
                outside[rows, columns] = False
        out[outside & (out == c)] = IGNORE
    sizes = [(r.stop - r.start) * (k.stop - k.start) for _, r, k in windows]
    for i in sorted(range(len(windows)), key=lambda i: -sizes[i]):
        c, rows, columns = windows[i]
        n = int(np.floor(share * sizes[i]))
        if n:
            inside = out[rows, columns]
            take = _largest(p[c, rows, columns].reshape(-1), n).reshape(inside.shape)
            inside[take] = c
            fixed[rows, columns] |= take


def _largest(values: np.ndarray, n: int) -> np.ndarray:
    """bool: the n largest; of equals, those that come first."""
    take = np.zeros(values.size, bool)
    if n >= values.size:
        take[:] = True
        return take
    bound = np.partition(values, values.size - n)[values.size - n]
    take[values > bound] = True
    equal = np.flatnonzero(values == bound)
    take[equal[: n - int(take.sum())]] = True
    return take


def _polygons(out: np.ndarray, p: np.ndarray, marks: Marks, allowed: list[int] | None) -> np.ndarray:
    held = np.zeros(out.shape, bool)
    for mark in marks.coarse:
        rows, columns, covered = geometry.polygon(mark.polygon, out.shape)
        inside = out[rows, columns]
        possible = _choices(mark.label, marks, allowed)
        if possible:
            inside[covered] = _best(p, possible, rows, columns)[covered]
            held[rows, columns] |= covered
            continue
        gone = np.isin(inside, _excluded(mark.label, marks)) & covered
        inside[gone] = IGNORE
        if mark.label == "?":
            held[rows, columns] |= covered
    return held


def _exclude(
    out: np.ndarray,
    marks: Marks,
    strokes: list[tuple[str, geometry.Window]],
    radius: float,
    fixed: np.ndarray,
) -> None:
    windows = [(label, window) for label, window in strokes if _excluded(label, marks)]
    for point in marks.points:
        if _excluded(point.label, marks):
            rows, columns, distance = geometry.disc(point.x, point.y, radius, out.shape)
            windows.append((point.label, (rows, columns, distance <= radius * radius)))
    for label, (rows, columns, covered) in windows:
        inside = out[rows, columns]
        inside[covered & np.isin(inside, _excluded(label, marks))] = IGNORE
        fixed[rows, columns] |= covered


def _anchor(
    out: np.ndarray,
    anchored: np.ndarray,
    held: np.ndarray,
    p: np.ndarray,
    possible: list[int],
    rows: slice,
    columns: slice,
    covered: np.ndarray,
) -> None:
    """Give the covered pixels their class, where no polygon says another."""
    best = _best(p, possible, rows, columns)
    inside = out[rows, columns]
    take = covered & (~held[rows, columns] | (inside == best))
    inside[take] = best[take]
    anchored[rows, columns] |= take


def _points(
    out: np.ndarray,
    anchored: np.ndarray,
    held: np.ndarray,
    p: np.ndarray,
    marks: Marks,
    allowed: list[int] | None,
    radius: float,
) -> None:
    nearest = np.full(out.shape, np.inf) if marks.points else np.empty((0, 0))
    for point in marks.points:
        possible = _choices(point.label, marks, allowed)
        if not possible:
            continue
        rows, columns, distance = geometry.disc(point.x, point.y, radius, out.shape)
        near = nearest[rows, columns]
        nearer = (distance <= radius * radius) & (distance < near)
        near[nearer] = distance[nearer]
        _anchor(out, anchored, held, p, possible, rows, columns, nearer)


def _present(out: np.ndarray, p: np.ndarray, marks: Marks, fixed: np.ndarray, share: float) -> None:
    """A present class without a label gets its best pixels; where the argmax is another class, none."""
    missing = [c for c in map(marks.classes.index, marks.present) if not (out == c).any()]
    if not missing:
        return
    n = max(1, int(np.floor(share * out.size)))
    answer = p.argmax(0)
    for c in missing:
        free = (answer == c) & ~fixed
        if marks.classes[c] in marks.all_boxes:
            inside = np.zeros(out.shape, bool)
            for b in marks.boxes:
                if b.label == marks.classes[c]:
                    inside[geometry.box_window(b.x0, b.y0, b.x1, b.y1, out.shape)] = True
            free &= inside
        at = np.flatnonzero(free)
        if len(at):
            out.reshape(-1)[at[_largest(p[c].reshape(-1)[at], n)]] = c
