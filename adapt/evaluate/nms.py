"""Non-maximum suppression of a boundary map, as detectors without sharp ridges are scored (HED and after).

The direction across an edge comes from second derivatives of the map, smoothed by a triangle filter; a pixel
stays if its value times a multiplier is at least the value one to ``radius`` pixels to both sides.  The
published direction is the arctangent of a ratio that is tan² of the true angle: it is right along the axes
and the diagonals and up to 12.5 degrees off between them.  It stays so here, because figures depend on it.
Source: Dollár and Zitnick, "Fast Edge Detection Using Structured Forests", PAMI 2015, section 3.4, and the
constants HED's, PiDiNet's and TEED's authors publish with their figures: radius 1, border 5, multiplier 1.01.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import convolve1d

from adapt.labels.errors import EdgeError

__all__ = ["across", "nms"]

SMOOTH = 4  # radius of the triangle filter before the derivatives


def across(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction across the edge: float [H,W] -> radians in [0, π), x to the right, y down."""
    line = np.concatenate([np.arange(1, SMOOTH + 2), np.arange(SMOOTH, 0, -1)]) / (SMOOTH + 1) ** 2
    smooth = convolve1d(convolve1d(p, line, 0, mode="reflect"), line, 1, mode="reflect")
    dy, dx = np.gradient(smooth)
    dxy, dxx = np.gradient(dx)
    dyy = np.gradient(dy, axis=0)
    turn = np.where(dxy > 0, -1.0, 1.0)  # an edge along an axis has none: either sign is right
    return np.asarray(np.mod(np.arctan(dyy * turn / (dxx + 1e-5)), math.pi))


@numba.njit(cache=True, nogil=True)
def _at(p, y, x):  # type: ignore[no-untyped-def]
    """Bilinear value of a map, held at its borders."""
    height, width = p.shape
    y, x = min(max(y, 0.0), height - 1.001), min(max(x, 0.0), width - 1.001)
    j, i = int(y), int(x)
    v, u = y - j, x - i
    return (
        p[j, i] * (1 - v) * (1 - u)
        + p[j, i + 1] * (1 - v) * u
        + p[j + 1, i] * v * (1 - u)
        + p[j + 1, i + 1] * v * u
    )


@numba.njit(cache=True, nogil=True)
def _suppress(p, angle, radius, multiplier, out):  # type: ignore[no-untyped-def]
    height, width = p.shape
    for y in range(height):
        for x in range(width):
            value = p[y, x]
            if value == 0:
                continue
            c, s = math.cos(angle[y, x]), math.sin(angle[y, x])
            stays = True
            for d in range(1, radius + 1):
                if value * multiplier < _at(p, y + d * s, x + d * c) or value * multiplier < _at(
                    p, y - d * s, x - d * c
                ):
                    stays = False
                    break
            if stays:
                out[y, x] = value


def nms(
    probability: NDArray[Any], *, radius: int = 1, border: int = 5, multiplier: float = 1.01
) -> NDArray[np.float64]:
    """The map with everything but its ridges set to 0: uint8 (v/255) or float [H,W] in 0..1 -> float64.

    radius: pixels to both sides that a ridge tops; border: pixels at each side of the image over which values
    are faded towards 0, because derivatives are wrong there; multiplier: how far a pixel may lie under its
    neighbours, as a factor.  Raises EdgeError for other maps and for values out of range.
    """
    p = np.asarray(probability)
    if p.dtype == np.uint8:
        p = p / 255.0
    if p.ndim != 2 or min(p.shape, default=0) < 3 or not np.issubdtype(p.dtype, np.floating):
        raise EdgeError(
            f"nms: the map is {p.dtype} {list(p.shape)}; uint8 or float [H,W] of 3x3 at least is needed"
        )
    if not np.isfinite(p).all():
        raise EdgeError("nms: the map holds NaN or infinity; mend the network first")
    if radius < 1 or border < 0 or not (math.isfinite(multiplier) and multiplier > 0):
        raise EdgeError(
            f"nms: radius {radius}, border {border}, multiplier {multiplier}: a radius of at least 1, a "
            "border of at least 0 and a multiplier over 0 are needed"
        )
    p = p.astype(np.float64)
    out = np.zeros_like(p)
    _suppress(p, across(p), radius, multiplier, out)
    for axis, side in enumerate(p.shape):
        fade = np.minimum(np.minimum(np.arange(side), np.arange(side)[::-1]) / max(border, 1), 1.0)
        if border:
            out *= fade[:, None] if axis == 0 else fade[None]
    return out
