"""Marks as a person might make them, from a dense label: for tests and benches.

A program's clicks have no person's errors and no person's choice of where: `source` says so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from adapt.weak.marks import Box, Marks, Point, Polygon, Scribble, WeakError

__all__ = ["KINDS", "simulate"]

KINDS = ("tags", "points", "scribbles", "boxes", "coarse", "corrections")
SMALLEST = 12  # pixels of a region that is marked
SOURCE = "simulated"
IGNORE = 255


def simulate(
    label: np.ndarray,
    kinds: Collection[str],
    *,
    seed: int,
    boxes_of: Sequence[str] = (),
    classes: Sequence[str] | None = None,
    answer: np.ndarray | None = None,
    most: int = 10,
    erode: int = 3,
    frame: str = "",
) -> Marks:
    """The marks of one frame.

    Args:
        label: true classes, uint8 [H,W], 255 = unknown.
        kinds: some of `KINDS`.  points: one per class, in the inner half of one of its regions.
            corrections: a click in the middle of each of the `most` largest regions where `answer` is wrong.
            boxes: connected regions of the classes `boxes_of`; coarse: each region less `erode` pixels.
        seed: of the places; the same seed gives the same marks.
        classes: names; None = "0", "1", …

    Raises:
        WeakError: unknown kind or class, or corrections without an answer.
    """
    from scipy import ndimage

    label = np.asarray(label)
    count = int(label[label != IGNORE].max(initial=0)) + 1
    names = tuple(map(str, range(count))) if classes is None else tuple(classes)
    wrong = [k for k in kinds if k not in KINDS]
    if wrong:
        raise WeakError(f"kind {wrong[0]!r} is unknown; choose from {', '.join(KINDS)}")
    if count > len(names):
        raise WeakError(f"label {count - 1} has no name in {len(names)} classes; give the label's classes")
    unknown = [c for c in boxes_of if c not in names]
    if unknown:
        raise WeakError(f"boxes of {unknown[0]!r}: not one of {', '.join(names)}; choose one of them")
    if "corrections" in kinds and (answer is None or np.shape(answer) != label.shape):
        raise WeakError("corrections need the network's answer of the label's size; give answer=")
    rng = np.random.default_rng([0xC11C, seed])
    here = [c for c in range(count) if (label == c).sum() >= SMALLEST]
    points: list[Point] = []
    scribbles: list[Scribble] = []
    boxes: list[Box] = []
    coarse: list[Polygon] = []
    for c in here:
        regions, n = ndimage.label(label == c)
        areas = np.bincount(regions.reshape(-1), minlength=n + 1)
        large = np.flatnonzero(areas >= SMALLEST)
        large = large[large > 0]
        if not len(large):
            continue
        if "points" in kinds:
            r = int(rng.choice(large, p=areas[large] / areas[large].sum()))
            points.append(Point(*_inner(regions == r, rng), names[c]))
        if "scribbles" in kinds:
            r = int(large[areas[large].argmax()])
            scribbles.append(Scribble(names[c], _stroke(regions == r), 3))
        if "boxes" in kinds and names[c] in boxes_of:
            for r in large.tolist():
                ys, xs = np.nonzero(regions == r)
                boxes.append(
                    Box(int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1, names[c])
                )
        if "coarse" in kinds:
            inner = ndimage.binary_erosion(label == c, iterations=erode) if erode else label == c
            parts, n = ndimage.label(inner)
            from adapt.weak.geometry import rectangles

            for r in range(1, n + 1):
                if (parts == r).sum() >= SMALLEST:
                    coarse.append(Polygon(names[c], tuple(rectangles(parts == r))))
    if "corrections" in kinds:
        assert answer is not None
        points += [
            p
            for p in _corrections(label, np.asarray(answer), names, most, rng)
            if (p.x, p.y) not in {(q.x, q.y) for q in points}
        ]
    shown = {int(c) for c in np.unique(label) if c != IGNORE}
    tagged = "tags" in kinds
    return Marks(
        names,
        (label.shape[1], label.shape[0]),
        tuple(names[c] for c in here) if tagged else (),
        tuple(n for c, n in enumerate(names) if c not in shown) if tagged and (label != IGNORE).any() else (),
        tuple(points),
        tuple(scribbles),
        tuple(boxes),
        tuple(coarse),
        source=SOURCE,
        score=1.0,
        frame=frame,
    )


def _inner(region: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """A random pixel of a region's half that is farther from its border."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    at = np.flatnonzero(region & (depth >= np.median(depth[region])))
    y, x = divmod(int(rng.choice(at)), region.shape[1])
    return x, y


def _stroke(region: np.ndarray) -> tuple[tuple[int, int], ...]:
    """A line from left to right along the middle of a region's longest column runs; inside the region."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
    y, x = divmod(int(depth.argmax()), region.shape[1])
    row = region[y]
    left = right = x
    while left > 0 and row[left - 1]:
        left -= 1
    while right + 1 < len(row) and row[right + 1]:
        right += 1
    inset = min(2, (right - left) // 2)
    return ((left + inset, y), (right - inset, y))


def _corrections(
    label: np.ndarray, answer: np.ndarray, names: tuple[str, ...], most: int, rng: np.random.Generator
) -> list[Point]:
    from scipy import ndimage

    found = []
    for c in np.unique(label[(label != answer) & (label != IGNORE)]).tolist():
        regions, n = ndimage.label((label == c) & (answer != c))
        areas = np.bincount(regions.reshape(-1), minlength=n + 1)
        found += [(int(areas[r]), c, regions == r) for r in range(1, n + 1) if areas[r] >= SMALLEST]
    found.sort(key=lambda f: -f[0])
    points = []
    for _, c, region in found[:most]:
        depth = ndimage.distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        y, x = divmod(int(depth.argmax()), region.shape[1])
        points.append(Point(x, y, names[c]))
    return points
