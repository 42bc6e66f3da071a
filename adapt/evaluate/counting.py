"""Matched and total boundary pixels at all 99 thresholds of one map: the rows a count table adds up.

Maps arrive as levels (the largest k with probability >= k/100), so everything here is integers.  It knows
nothing of classes, protocols or files.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from adapt.evaluate.matching import Grid, augment_levels, check_pair, match_min_cost
from adapt.labels.thinning import REMOVABLE, thin, thin_kernel

__all__ = ["LEVELS", "count_annotators", "count_raw", "count_thin"]

LEVELS = 99


@numba.njit(cache=True, nogil=True)
def _falling(level, border, stride, levels):  # type: ignore[no-untyped-def]
    """Pixels of a level map by falling level, row-major within one: (int32 padded indices, int64 prefix
    lengths).

    Prefix i holds the pixels with level >= levels - i.
    """
    height, width = level.shape
    ends = np.zeros(levels + 1, np.int64)
    for y in range(height):
        for x in range(width):
            if level[y, x] > 0:
                ends[levels - level[y, x] + 1] += 1
    for i in range(levels):
        ends[i + 1] += ends[i]
    pixels = np.empty(ends[levels], np.int32)
    at = ends[:levels].copy()
    for y in range(height):
        for x in range(width):
            if level[y, x] > 0:
                i = levels - level[y, x]
                pixels[at[i]] = (y + border) * stride + x + border
                at[i] += 1
    return pixels, ends[1:]


@numba.njit(cache=True, nogil=True)
def _thin_levels(pixels, ends, truth, offsets, size, stride, removable):  # type: ignore[no-untyped-def]
    """Thin each prefix and match it with ``truth``: int64 [2, levels], matched and surviving pixels."""
    counts = np.zeros((2, ends.size), np.int64)
    flat = np.zeros(size, np.uint8)
    owner = np.full(size, -2, np.int32)
    seen = np.zeros(size, np.int64)
    search = 1
    one = np.zeros(1, np.int64)
    partner = np.empty(pixels.size, np.int32)
    previous = 0
    for i in range(ends.size):
        n = ends[i]
        if n == previous:
            if i > 0:
                counts[:, i] = counts[:, i - 1]
            continue
        previous = n
        survivors = pixels[:n].copy()
        for p in range(n):
            flat[survivors[p]] = 1
        left = thin_kernel(flat, stride, survivors, n, removable)
        for p in range(left):
            flat[survivors[p]] = 0
        counts[1, i] = left
        if truth.size == 0:
            continue
        for t in range(truth.size):
            owner[truth[t]] = -1
        one[0] = left
        counts[0, i] = augment_levels(
            owner, truth.size, survivors[:left], one, offsets, partner[:left], seen, search
        )[0]
        search += left
    return counts


def _prefixes(level: NDArray[np.uint8], grid: Grid) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    pixels, ends = _falling(level, grid.border, grid.stride, LEVELS)
    return pixels, ends


def count_raw(level: NDArray[np.uint8], truth: NDArray[np.bool_], max_distance: float) -> NDArray[np.int64]:
    """(matched, predicted) pixels of ``level >= k`` for k = 1..99, neither map thinned: int64 [2, 99].

    One incremental matching for all thresholds, because the maps are nested (see ``matching``).
    """
    check_pair(level, truth)
    grid = Grid(truth, max_distance)
    pixels, ends = _prefixes(level, grid)
    counts = np.zeros((2, LEVELS), np.int64)
    counts[1] = ends
    if grid.truth.size and pixels.size:
        counts[0] = augment_levels(
            grid.owners(),
            grid.truth.size,
            pixels,
            ends,
            grid.offsets,
            np.empty(pixels.size, np.int32),
            np.zeros(grid.size, np.int64),
            1,
        )
    return counts[:, ::-1]


def count_thin(level: NDArray[np.uint8], truth: NDArray[np.bool_], max_distance: float) -> NDArray[np.int64]:
    """(matched, predicted) pixels of ``thin(level >= k)`` for k = 1..99: int64 [2, 99].

    ``truth`` is matched as it is: thin it first where the protocol wants that.
    """
    check_pair(level, truth)
    grid = Grid(truth, max_distance)
    pixels, ends = _prefixes(level, grid)
    counts = _thin_levels(pixels, ends, grid.truth, grid.offsets, grid.size, grid.stride, REMOVABLE)
    return np.asarray(counts[:, ::-1])


def count_annotators(
    level: NDArray[np.uint8], truths: NDArray[np.bool_], max_distance: float, *, thinned: bool = True
) -> tuple[NDArray[np.int64], int]:
    """Counts against several annotators, as BSDS has it.

    level: uint8 [H,W] in 0..99; truths: bool [A,H,W].  A predicted pixel is right if any annotator's matching
    takes it, so *which* pixels match counts and the min-cost matching is used.
    Returns (int64 [3, 99]: matched truth pixels over all annotators, right predicted pixels, predicted
    pixels; the truth pixels of all annotators).
    """
    counts = np.zeros((3, LEVELS), np.int64)
    for truth in truths:
        check_pair(level, truth)
    present = np.bincount(level.ravel(), minlength=LEVELS + 1)
    for k in range(LEVELS, 0, -1):
        if present[k] == 0:
            if k < LEVELS:
                counts[:, k - 1] = counts[:, k]
            continue
        mask = level >= k
        if thinned:
            mask = thin(mask)
        right = np.zeros(mask.size, bool)
        for truth in truths:
            predicted, _ = match_min_cost(mask, truth, max_distance)
            counts[0, k - 1] += predicted.size
            right[predicted] = True
        counts[1, k - 1] = int(right.sum())
        counts[2, k - 1] = int(mask.sum())
    return counts, int(truths.sum())
