"""Morphological thinning of binary maps, pixel for pixel MATLAB's ``bwmorph(b, 'thin', inf)``.

The boundary benchmarks thin a prediction at each of 99 thresholds, so this is their inner loop.  It knows
nothing of images, classes or thresholds.

Source: Guo and Hall, "Parallel thinning with two-subiteration algorithms", CACM 1989 (algorithm A1), which
is what ``bwmorph`` documents.  Pixels outside the map are background.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from adapt.labels.errors import EdgeError

__all__ = ["REMOVABLE", "thin", "thin_kernel"]


def _removable() -> NDArray[np.uint8]:
    """Removable(neighbourhood) in both subiterations: uint8 [256], bit 0 the first, bit 1 the second.

    Neighbour i is bit i of the index: 0 east, 1 north-east, 2 north, … anticlockwise.
    """
    table = np.zeros(256, np.uint8)
    for code in range(256):
        x = [(code >> i) & 1 for i in range(8)]
        crossings = sum(1 for i in (0, 2, 4, 6) if not x[i] and (x[i + 1] or x[(i + 2) % 8]))
        first = (x[7] | x[0]) + (x[1] | x[2]) + (x[3] | x[4]) + (x[5] | x[6])
        second = (x[0] | x[1]) + (x[2] | x[3]) + (x[4] | x[5]) + (x[6] | x[7])
        if crossings != 1 or not 2 <= min(first, second) <= 3:
            continue
        if not ((x[1] or x[2] or not x[7]) and x[0]):
            table[code] |= 1
        if not ((x[5] or x[6] or not x[3]) and x[4]):
            table[code] |= 2
    return table


REMOVABLE = _removable()


@numba.njit(cache=True, nogil=True)
def thin_kernel(flat, width, pixels, count, removable):  # type: ignore[no-untyped-def]
    """Thin in place; return how many of ``pixels`` survive (they are moved to its front, order kept).

    flat: uint8, a row-major map of 0 and 1 with a border of zeros; width: its padded row length;
    pixels: int32, ``pixels[:count]`` the indices of the ones.

    A pixel's fate in a subiteration depends on its neighbourhood alone, so after its first look a pixel is
    looked at again only when a neighbour went: ``due`` holds, for each subiteration, who must be looked at.
    """
    due = np.empty((2, count), np.int32)
    n_due = np.zeros(2, np.int64)
    removed = np.empty(count, np.int32)
    east, north_east, north, north_west = 1, 1 - width, -width, -width - 1
    # flat: bit 0 the pixel, bit 1 due in the first subiteration, bit 2 due in the second.
    for p in range(count):
        i = pixels[p]
        flat[i] = 7
        due[0, p] = i
        due[1, p] = i
    n_due[:] = count
    while n_due[0] + n_due[1] > 0:
        for turn in range(2):
            bit = 1 << turn
            keep = np.uint8(7 ^ (bit << 1))
            n_removed = 0
            for d in range(n_due[turn]):
                i = due[turn, d]
                flat[i] &= keep
                if flat[i] & 1:
                    code = (
                        (flat[i + east] & 1)
                        | ((flat[i + north_east] & 1) << 1)
                        | ((flat[i + north] & 1) << 2)
                        | ((flat[i + north_west] & 1) << 3)
                        | ((flat[i - east] & 1) << 4)
                        | ((flat[i - north_east] & 1) << 5)
                        | ((flat[i - north] & 1) << 6)
                        | ((flat[i - north_west] & 1) << 7)
                    )
                    if removable[code] & bit:
                        removed[n_removed] = i
                        n_removed += 1
            n_due[turn] = 0
            for r in range(n_removed):
                flat[removed[r]] &= 6
            for r in range(n_removed):
                i = removed[r]
                for row in range(-1, 2):
                    for j in range(i + row * width - 1, i + row * width + 2):
                        state = flat[j]
                        if state & 1:
                            if not state & 2:
                                due[0, n_due[0]] = j
                                n_due[0] += 1
                            if not state & 4:
                                due[1, n_due[1]] = j
                                n_due[1] += 1
                            flat[j] = 7
    n = 0
    for p in range(count):
        i = pixels[p]
        if flat[i]:
            pixels[n] = i
            n += 1
    return n


def thin(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The one-pixel-wide skeleton of a map: bool [H,W] -> bool [H,W], idempotent, a subset of ``mask``.

    Equal to ``bwmorph(mask, 'thin', inf)``.  Raises EdgeError for anything that is not a bool [H,W].
    """
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise EdgeError(
            f"thin: the map is {mask.dtype} {list(mask.shape)}, a bool [H,W] is needed; threshold it first"
        )
    padded = np.pad(mask, 1).astype(np.uint8)
    flat = padded.reshape(-1)
    pixels = np.flatnonzero(flat).astype(np.int32)
    thin_kernel(flat, padded.shape[1], pixels, pixels.size, REMOVABLE)
    return np.asarray(padded[1:-1, 1:-1] != 0)
