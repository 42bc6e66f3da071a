"""MATLAB's ``imresize`` for scores (bicubic, antialiased) and for label maps (nearest): the benchmark's
phases.

Common libraries differ from both: cubic kernels with another coefficient or no antialiasing, and nearest
neighbours of another phase (MATLAB's halving keeps the odd pixels, counted from 0).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["resize_bicubic", "resize_nearest"]


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _taps(size: int, target: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each output position: source indices (mirrored at the borders) and weights, [target, taps]."""
    scale = target / size
    stretch = min(scale, 1.0)  # a shrinking kernel widens: antialiasing
    width = 4.0 / stretch
    centre = (np.arange(target) + 0.5) / scale - 0.5
    left = np.floor(centre - width / 2)
    index = left[:, None] + np.arange(math.ceil(width) + 2)
    weights = stretch * _cubic(stretch * (centre[:, None] - index))
    weights /= weights.sum(1, keepdims=True)
    mirror = np.concatenate([np.arange(size), np.arange(size)[::-1]])
    return mirror[np.mod(index, 2 * size).astype(np.int64)], weights


def resize_bicubic(image: NDArray[np.floating], shape: tuple[int, int]) -> NDArray[np.float64]:
    """``imresize(image, shape)``: float [H,W] -> float64 of ``shape``; the map itself if the size is
    equal."""
    out = np.asarray(image, np.float64)
    # MATLAB resizes first along the dimension that shrinks most.
    for axis in np.argsort([shape[0] / out.shape[0], shape[1] / out.shape[1]], kind="stable").tolist():
        if out.shape[axis] == shape[axis]:
            continue
        index, weights = _taps(out.shape[axis], shape[axis])
        total = None
        for tap in range(index.shape[1]):
            weight = weights[:, tap, None] if axis == 0 else weights[None, :, tap]
            part = np.take(out, index[:, tap], axis) * weight
            total = part if total is None else total + part
        assert total is not None
        out = total
    return out


def resize_nearest(labels: NDArray[np.generic], shape: tuple[int, int]) -> NDArray[np.generic]:
    """``imresize(labels, shape, 'nearest')``: any dtype [H,W] -> the same dtype of ``shape``."""
    # 1-based position u = (i - 1/2) size/target + 1/2; the box [-1/2, 1/2) takes floor(u + 1/2).
    rows, columns = (
        np.clip(np.floor((np.arange(target) + 0.5) * size / target), 0, size - 1).astype(np.int64)
        for size, target in zip(labels.shape, shape, strict=True)
    )
    return np.asarray(labels[np.ix_(rows, columns)])
