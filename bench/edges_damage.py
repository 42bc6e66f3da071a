"""Labels damaged as annotators damage them: pushed smoothly, simplified to polygons, drawn too wide.

Each function takes a class map uint8 [H,W] and returns a damaged copy.  255 is a label like any other here.
The amounts are pixels.  ``damaged`` applies all three, as ``bench.edges_order`` does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import find_objects, gaussian_filter, grey_dilation, map_coordinates
from scipy.ndimage import label as components

__all__ = ["damaged", "outline", "pushed", "simplified", "simplified_line", "widened"]

#: Moore's neighbours of a pixel, clockwise from the left one: (dy, dx).
AROUND = ((0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1))


def pushed(
    label: NDArray[np.uint8], rng: np.random.Generator, most: float = 4.0, smooth: float = 20.0
) -> NDArray[np.uint8]:
    """A class map whose pixels come from up to ``most`` pixels away; ``smooth``: the field's σ in pixels."""
    if most <= 0:
        return label.copy()
    move = np.stack([gaussian_filter(rng.normal(size=label.shape), smooth) for _ in range(2)])
    move *= most / np.hypot(*move).max()
    grid = np.mgrid[: label.shape[0], : label.shape[1]]
    return np.asarray(map_coordinates(label, grid + move, order=0, mode="nearest"))


def outline(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """The outer border pixels (y, x) of a mask's first component, in order (Moore's tracing).

    The list is empty for an empty mask.  It ends where the tracing meets its first step again.
    """
    ys, xs = np.nonzero(mask)
    if not ys.size:
        return []
    height, width = mask.shape
    start = (int(ys[0]), int(xs[0]))  # row-major first: nothing lies to its left
    line, at, back = [start], start, 0
    for _ in range(4 * ys.size + 8):
        for turn in range(1, 9):
            k = (back + turn) % 8
            y, x = at[0] + AROUND[k][0], at[1] + AROUND[k][1]
            if 0 <= y < height and 0 <= x < width and mask[y, x]:
                break
        else:
            return line  # a single pixel
        if at == start and len(line) > 1 and (y, x) == line[1]:
            return line[:-1]
        # The search at the next pixel starts from the neighbour examined just before this one was found.
        before = (at[0] + AROUND[(k - 1) % 8][0], at[1] + AROUND[(k - 1) % 8][1])
        at = (y, x)
        line.append(at)
        back = AROUND.index((before[0] - y, before[1] - x))
    return line


def simplified_line(points: NDArray[np.float64], tolerance: float) -> NDArray[np.float64]:
    """Douglas and Peucker (1973): the corners of an open line [n,2] that keep it within ``tolerance``."""
    if len(points) < 3:
        return points
    keep = np.zeros(len(points), bool)
    keep[[0, -1]] = True
    waiting = [(0, len(points) - 1)]
    while waiting:
        first, last = waiting.pop()
        if last - first < 2:
            continue
        way, between = points[last] - points[first], points[first + 1 : last] - points[first]
        length = float(np.hypot(*way))
        if length:
            away = np.abs(way[0] * between[:, 1] - way[1] * between[:, 0]) / length
        else:
            away = np.hypot(*between.T)
        worst = int(away.argmax())
        if away[worst] > tolerance:
            middle = first + 1 + worst
            keep[middle] = True
            waiting += [(first, middle), (middle, last)]
    return points[keep]


def simplified(label: NDArray[np.uint8], tolerance: float, least: int = 6) -> NDArray[np.uint8]:
    """A class map redrawn as polygons whose sides lie within ``tolerance`` pixels of each region's outline.

    Large regions are drawn first, so that what lies in their holes is drawn over them.  Regions of fewer than
    ``least`` pixels keep their pixels.
    """
    if tolerance <= 0:
        return label.copy()
    height, width = label.shape
    parts = []
    for value in np.unique(label).tolist():
        numbered, _ = components(label == value, np.ones((3, 3)))
        for i, box in enumerate(find_objects(numbered), 1):
            mask = numbered[box] == i
            parts.append((int(mask.sum()), value, box, mask))
    drawn = Image.fromarray(label.copy())
    pen = ImageDraw.Draw(drawn)
    for size, value, (rows, columns), mask in sorted(parts, key=lambda p: -p[0]):
        corner = np.array([rows.start, columns.start])
        if size < least:
            for y, x in np.argwhere(mask) + corner:
                pen.point((int(x), int(y)), fill=value)
            continue
        line = np.array(outline(np.asarray(mask)), np.float64) + corner
        # A closed line: cut at the point farthest from its start, and simplify both halves.
        far = int(np.hypot(*(line - line[0]).T).argmax())
        halves = (line[: far + 1], np.concatenate([line[far:], line[:1]]))
        corners = np.concatenate([simplified_line(half, tolerance)[:-1] for half in halves])
        # What touches the frame's border stays there.
        y = np.clip(corners[:, 0], 0, height - 1)
        x = np.clip(corners[:, 1], 0, width - 1)
        if len(corners) > 2:
            pen.polygon([(float(a), float(b)) for a, b in zip(x, y, strict=True)], fill=value, outline=value)
    return np.asarray(drawn)


def widened(label: NDArray[np.uint8], classes: tuple[int, ...], by: int) -> NDArray[np.uint8]:
    """A class map in which regions of ``classes`` grow by ``by`` pixels; later classes cover earlier ones."""
    out = label.copy()
    if by <= 0:
        return out
    for value in classes:
        grown = grey_dilation((label == value).astype(np.uint8), (2 * by + 1, 2 * by + 1))
        out[grown > 0] = value
    return out


def damaged(
    label: NDArray[np.uint8], rng: np.random.Generator, most: float, objects: tuple[int, ...]
) -> NDArray[np.uint8]:
    """Pushed by at most ``most`` pixels, simplified within an eighth of that, objects drawn a pixel wide of
    their border from 4 pixels on."""
    return widened(simplified(pushed(label, rng, most), most / 8), objects, int(most >= 4))
