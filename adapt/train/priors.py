"""What a pack keeps of its source labels: class shares and the spatial prior q_c(y,x) of CBST-SP.

The paper counts class frequencies at each pixel of the source labels, smooths them with a Gaussian and
normalises each class to sum to one over the pixels.  A common factor does not matter (λ_c scales along), so
the largest value is brought to 1 here, which keeps q·p in 0..1.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

__all__ = ["SpatialPrior", "class_shares", "spatial_prior"]


def class_shares(labels: Iterable[np.ndarray], classes: int) -> np.ndarray:
    """float64 [C], sums to 1: share of labelled pixels of each class."""
    counts = np.zeros(classes, np.int64)
    for y in labels:
        counts += np.bincount(y.reshape(-1), minlength=256)[:classes]
    return np.asarray(counts / max(int(counts.sum()), 1))


class SpatialPrior:
    """Counts labels one at a time for `spatial_prior`, so that they are read once.

    Args:
        classes: number of classes C.
        size: (h, w) the prior is kept at.
    """

    def __init__(self, classes: int, size: tuple[int, int] = (64, 96)) -> None:
        self.total = np.zeros((classes, *size))

    def add(self, y: np.ndarray) -> None:
        """Count a label uint8 [H,W], 255 = ignore, of any size."""
        _, height, width = self.total.shape
        small = np.asarray(Image.fromarray(y).resize((width, height), Image.Resampling.NEAREST))
        for c, plane in enumerate(self.total):
            plane += small == c

    def prior(self, sigma: float = 0.07) -> np.ndarray:
        """q_c(y,x), float16 [C,h,w] in 0..1; sigma as `spatial_prior` has it."""
        width = self.total.shape[2]
        smooth = np.stack([gaussian_filter(plane, sigma * width, mode="nearest") for plane in self.total])
        mass = smooth.sum(axis=(1, 2), keepdims=True)
        prior = np.divide(smooth, mass, out=np.zeros_like(smooth), where=mass > 0)
        return np.asarray(prior / max(prior.max(), 1e-30), np.float16)


def spatial_prior(
    labels: Iterable[np.ndarray], classes: int, size: tuple[int, int] = (64, 96), sigma: float = 0.07
) -> np.ndarray:
    """q_c(y,x), float16 [C,h,w] in 0..1.

    Args:
        labels: uint8 [H,W] each, 255 = ignore; any size.
        size: (h, w) the prior is kept at.
        sigma: of the smoothing, as a share of the width (70 of 1024 pixels in the paper).
    """
    counts = SpatialPrior(classes, size)
    for y in labels:
        counts.add(y)
    return counts.prior(sigma)
