"""Which pixels a mark covers.  Pixel (x, y) is the unit square whose centre is (x + ½, y + ½).

Every function writes into the window of the picture that the mark touches, so that a small mark in a large
frame costs little.  Knows neither classes nor files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["Window", "box_window", "disc", "line", "polygon", "rectangles"]

#: Rows and columns of the picture, and bool [h,w]: which of their pixels are covered.
Window = tuple[slice, slice, np.ndarray]


def _window(x0: float, y0: float, x1: float, y1: float, shape: tuple[int, int]) -> tuple[slice, slice]:
    height, width = shape
    left, top = max(0, int(np.floor(x0))), max(0, int(np.floor(y0)))
    right, bottom = min(width, int(np.ceil(x1))), min(height, int(np.ceil(y1)))
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def box_window(x0: float, y0: float, x1: float, y1: float, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns whose pixel centres lie in the half-open box x0 <= x < x1, y0 <= y < y1."""
    height, width = shape
    top, bottom = (int(np.clip(np.ceil(v - 0.5), 0, height)) for v in (y0, y1))
    left, right = (int(np.clip(np.ceil(v - 0.5), 0, width)) for v in (x0, x1))
    return slice(top, bottom), slice(left, right)


def disc(x: int, y: int, radius: float, shape: tuple[int, int]) -> tuple[slice, slice, np.ndarray]:
    """Rows, columns and the squared distance float64 [h,w] of their pixels from pixel (x, y).

    A pixel belongs to the disc if its squared distance is at most radius².
    """
    reach = int(np.floor(radius))
    rows, columns = _window(x - reach, y - reach, x + reach + 1, y + reach + 1, shape)
    dy = np.arange(rows.start, rows.stop, dtype=np.float64)[:, None] - y
    dx = np.arange(columns.start, columns.stop, dtype=np.float64)[None] - x
    return rows, columns, dy * dy + dx * dx


def line(points: Sequence[tuple[int, int]], width: float, shape: tuple[int, int]) -> Window:
    """The pixels at most width/2 from the line through pixels `points`, and the points themselves."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    reach = width / 2
    rows, columns = _window(min(xs) - reach, min(ys) - reach, max(xs) + reach + 1, max(ys) + reach + 1, shape)
    covered = np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
    limit = max(0.5, reach) ** 2  # a line without width still covers the pixels that it passes
    pairs = list(pairwise(points)) or [(points[0], points[0])]
    for a, b in pairs:
        r, c = _window(
            min(a[0], b[0]) - reach - 1,
            min(a[1], b[1]) - reach - 1,
            max(a[0], b[0]) + reach + 2,
            max(a[1], b[1]) + reach + 2,
            shape,
        )
        r = slice(max(r.start, rows.start), min(r.stop, rows.stop))
        c = slice(max(c.start, columns.start), min(c.stop, columns.stop))
        y = np.arange(r.start, r.stop, dtype=np.float64)[:, None] - a[1]
        x = np.arange(c.start, c.stop, dtype=np.float64)[None] - a[0]
        dx, dy = float(b[0] - a[0]), float(b[1] - a[1])
        length = dx * dx + dy * dy
        t = np.clip((x * dx + y * dy) / length, 0.0, 1.0) if length else np.zeros(np.broadcast(x, y).shape)
        near = (x - t * dx) ** 2 + (y - t * dy) ** 2 <= limit
        covered[
            r.start - rows.start : r.stop - rows.start, c.start - columns.start : c.stop - columns.start
        ] |= near
    return rows, columns, covered


def polygon(points: Sequence[tuple[float, float]], shape: tuple[int, int]) -> Window:
    """The pixels whose centre a polygon encloses by the non-zero rule, which fills a crossing polygon too."""
    corners = np.asarray(points, np.float64)
    rows, columns = _window(
        corners[:, 0].min(), corners[:, 1].min(), corners[:, 0].max(), corners[:, 1].max(), shape
    )
    height, width = rows.stop - rows.start, columns.stop - columns.start
    winding = np.zeros((height, width + 1), np.int32)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        turn = 1
        if ay > by:  # one direction for both, so that two edges that cancel meet at the same x
            ax, ay, bx, by, turn = bx, by, ax, ay, -1
        first = int(np.clip(np.ceil(ay - 0.5), rows.start, rows.stop))
        last = int(np.clip(np.ceil(by - 0.5), rows.start, rows.stop))
        if last <= first:
            continue
        y = np.arange(first, last)
        x = ax + (y + 0.5 - ay) * ((bx - ax) / (by - ay))
        at = np.clip(np.ceil(x - 0.5), columns.start, columns.stop).astype(np.int64) - columns.start
        np.add.at(winding, (y - rows.start, at), turn)
    return rows, columns, np.cumsum(winding, axis=1)[:, :width] != 0


def rectangles(mask: np.ndarray) -> list[tuple[float, float]]:
    """One polygon that encloses exactly the true pixels of bool [H,W], by the non-zero rule.

    It goes round one rectangle after the other and comes back to its first corner after each; the ways there
    and back cancel.  An empty mask gives an empty list.
    """
    found: list[tuple[int, int, int, int]] = []
    open_runs: dict[tuple[int, int], int] = {}
    for y in range(mask.shape[0] + 1):
        runs: set[tuple[int, int]] = set()
        if y < mask.shape[0]:
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[y].astype(np.int8), [0]])))
            runs = {(int(a), int(b)) for a, b in edges.reshape(-1, 2)}
        for run in [r for r in open_runs if r not in runs]:
            found.append((run[0], open_runs.pop(run), run[1], y))
        for run in runs:
            open_runs.setdefault(run, y)
    way: list[tuple[float, float]] = []
    for x0, y0, x1, y1 in sorted(found, key=lambda r: (r[1], r[0])):
        way += [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        if len(found) > 1:
            way += [(x0, y0), way[0]]
    return [(float(x), float(y)) for x, y in way]
