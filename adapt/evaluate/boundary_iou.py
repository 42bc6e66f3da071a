"""Boundary IoU of class maps: IoU of the bands along the inner borders of truth and prediction.

Source: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021.  The
band of a mask is its pixels within ``width`` pixels of a pixel outside it, by erosion with a 3x3 square, as
the published code measures distance; what is outside the image counts as outside the mask.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

__all__ = ["BoundaryIoU", "band", "band_width"]

IGNORE = 255


def band_width(shape: tuple[int, int], ratio: float) -> int:
    """``ratio`` of the diagonal of [H,W] in whole pixels, at least 1."""
    return max(1, round(ratio * math.hypot(*shape)))


def band(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """Pixels of a mask within ``width`` pixels of its border: bool [H,W]."""
    return np.asarray(mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=width))


class BoundaryIoU:
    """Streaming, mergeable counts: int64 [C], pixels in both bands and in either.

    classes: C; ratio: the band's width as a fraction of the diagonal (.02 as published; .0035 is 2 pixels at
    480x360).  A pixel whose truth is 255 is not counted, and it is no border: it takes the class of the
    prediction in both maps, so that neither band follows it.
    """

    def __init__(self, classes: int, ratio: float = 0.02) -> None:
        if not 1 <= classes < IGNORE:
            raise ValueError(f"{classes} classes: expected 1..254")
        if not 0 < ratio <= 1:
            raise ValueError(f"boundary IoU: the band is {ratio} of the diagonal; give over 0 and at most 1")
        self.classes, self.ratio = classes, float(ratio)
        self.both, self.either = np.zeros(classes, np.int64), np.zeros(classes, np.int64)

    def add(self, truth: Any, prediction: Any) -> BoundaryIoU:
        """Count one frame: integer maps [H,W]; returns self.  Raises ValueError on other shapes or dtypes."""
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        for what, array in (("truth", truth), ("prediction", prediction)):
            if array.ndim != 2 or array.dtype.kind not in "iu":
                raise ValueError(f"the {what} is {array.dtype} {list(array.shape)}: give class indices [H,W]")
        if truth.shape != prediction.shape:
            raise ValueError(
                f"truth has shape {truth.shape}, prediction {prediction.shape}: resize the prediction"
            )
        known = truth != IGNORE
        filled = np.where(known, truth, prediction)
        width = band_width((truth.shape[0], truth.shape[1]), self.ratio)
        for c in range(self.classes):
            t, y = filled == c, prediction == c
            if t.any() or y.any():
                a, b = band(t, width) & known, band(y, width) & known
                self.both[c] += int((a & b).sum())
                self.either[c] += int((a | b).sum())
        return self

    def merge(self, other: BoundaryIoU) -> BoundaryIoU:
        """Add another one's counts; returns self.  Raises ValueError for another kind."""
        if not isinstance(other, BoundaryIoU) or (other.classes, other.ratio) != (self.classes, self.ratio):
            raise ValueError("cannot merge: expected a BoundaryIoU of the same classes and band")
        self.both += other.both
        self.either += other.either
        return self

    def iou(self) -> NDArray[np.float64]:
        """float64 [C] in 0..1; NaN for a class that neither map holds."""
        return np.where(self.either > 0, self.both / np.maximum(self.either, 1), np.nan)

    def mean(self) -> float:
        """Mean over the classes that have a value; NaN if none has."""
        values = self.iou()[self.either > 0]
        return float(values.mean()) if values.size else math.nan
