"""The fused loops of ``cbst``, compiled by Numba: each reads the softmax map once, row by row.

Same arithmetic and same tie rule as the NumPy and torch forms in ``cbst`` (no fast-math), so the same
bits.  Importing this module raises ImportError where Numba is missing.
"""

from __future__ import annotations

import numba
import numpy as np

EMPTY = np.zeros((0, 0, 0), np.float32)
EMPTY_MASK = np.zeros((0, 0), np.bool_)


@numba.njit(cache=True, nogil=True)
def in_range(p: np.ndarray, top: float) -> bool:
    """True where every value is a number in 0..top."""
    flat = p.reshape(p.size)
    bad = 0
    for i in range(flat.size):
        value = flat[i]
        bad += not (value >= np.float32(0.0) and value <= top)
    return bad == 0


@numba.njit(cache=True, nogil=True)
def collect(
    p: np.ndarray, prior: np.ndarray, allowed: np.ndarray, valid: np.ndarray, counts: np.ndarray
) -> None:
    classes, height, width = p.shape
    bins = counts.shape[1]
    scale = np.float32(bins)
    best = np.empty(width, np.float32)
    index = np.empty(width, np.int32)
    for y in range(height):
        for x in range(width):
            best[x] = np.float32(-1.0)
            index[x] = -1
        for c in range(classes):
            if not allowed[c]:
                continue
            row = p[c, y]
            if prior.size:
                q = prior[c, y]
                for x in range(width):
                    value = np.float32(row[x] * q[x])
                    take = value > best[x]
                    best[x] = value if take else best[x]
                    index[x] = c if take else index[x]
            else:
                for x in range(width):
                    value = row[x]
                    take = value > best[x]
                    best[x] = value if take else best[x]
                    index[x] = c if take else index[x]
        for x in range(width):
            if index[x] < 0:
                continue
            if valid.size and not valid[y, x]:
                continue
            b = np.int64(best[x] * scale)
            if b > bins - 1:
                b = bins - 1
            counts[index[x], b] += 1


@numba.njit(cache=True, nogil=True)
def label(p: np.ndarray, lam: np.ndarray, prior: np.ndarray, allowed: np.ndarray, out: np.ndarray) -> None:
    classes, height, width = p.shape
    best = np.empty(width, np.float32)
    index = np.empty(width, np.int32)
    one = np.float32(1.0)
    for y in range(height):
        for x in range(width):
            best[x] = np.float32(0.0)
            index[x] = 255
        for c in range(classes):
            if not allowed[c]:
                continue
            row = p[c, y]
            divisor = lam[c]
            if prior.size:
                q = prior[c, y]
                for x in range(width):
                    ratio = np.float32(np.float32(row[x] * q[x]) / divisor)
                    take = ratio > best[x]
                    best[x] = ratio if take else best[x]
                    index[x] = c if take else index[x]
            else:
                for x in range(width):
                    ratio = np.float32(row[x] / divisor)
                    take = ratio > best[x]
                    best[x] = ratio if take else best[x]
                    index[x] = c if take else index[x]
        for x in range(width):
            out[y, x] = index[x] if best[x] >= one else 255


@numba.njit(cache=True, nogil=True)
def count(labels: np.ndarray, confidence: np.ndarray, counts: np.ndarray) -> None:
    """Add an engine's own answer: labels uint8 [H,W] (255 is skipped), confidence uint16 [H,W] in 1/65536."""
    flat_labels = labels.reshape(labels.size)
    flat = confidence.reshape(confidence.size)
    classes = counts.shape[0]
    for i in range(flat.size):
        c = flat_labels[i]
        if c < classes:
            counts[c, flat[i]] += 1


@numba.njit(cache=True, nogil=True)
def soften(
    p: np.ndarray, lam: np.ndarray, alpha: float, allowed: np.ndarray, keep: int, out: np.ndarray
) -> None:
    """LRENT's labels ŷ_c ∝ (p_c/λ_c)^{1/α}, the `keep` largest of a pixel; see `lrent.compact_labels`."""
    classes, height, width = p.shape
    floor = np.exp(-16.0 * alpha)  # a ratio under that share of the best weighs under 2e-7 of it
    power = 1.0 / alpha
    ratio = np.empty((width, classes), np.float64)
    highest = np.empty(width, np.float64)
    for y in range(height):
        highest[:] = 0.0
        for c in range(classes):  # plane by plane: a map is stored so
            row, divisor = p[c, y], lam[c]
            for x in range(width):
                r = np.float64(row[x]) / divisor if allowed[c] else 0.0
                ratio[x, c] = r
                highest[x] = max(highest[x], r)
        for x in range(width):
            best, of = highest[x], ratio[x]
            # The best class alone at most C times over: too little for any label.
            if best <= 0.0 or np.log(best) * power + np.log(float(classes)) <= 0.0:
                continue
            total = 0.0
            for c in range(classes):
                r = of[c] / best
                of[c] = r**power if r > floor else 0.0
                total += of[c]
            if np.log(best) * power + np.log(total) <= 0.0:
                continue
            for k in range(keep):
                top = -1
                for c in range(classes):
                    if of[c] > 0.0 and (top < 0 or of[c] > of[top]):
                        top = c
                if top < 0:
                    break
                weight = np.rint(255.0 * of[top] / total)
                if weight < 1.0:
                    break
                out[y, x, k] = top
                out[y, x, keep + k] = np.uint8(weight)
                of[top] = 0.0
