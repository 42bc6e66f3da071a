"""Streaming, mergeable scores of a segmentation: confusion matrix (IoU, mIoU, accuracy) and calibration.

Both objects only count, so scores of parts add up to the score of the whole.  255 in the truth is not
scored.  This module knows arrays; it may not know networks or data sets.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["Calibration", "Confusion"]

IGNORE = 255


def _pair(truth: Any, prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    for what, array in (("truth", truth), ("prediction", prediction)):
        if array.dtype.kind not in "iub":  # a rounded probability would be scored as a class
            raise ValueError(f"the {what} is {array.dtype}: give class indices, not scores (argmax first)")
    if truth.shape != prediction.shape:
        raise ValueError(
            f"truth has shape {truth.shape}, prediction {prediction.shape}: resize the prediction"
        )
    return truth.reshape(-1), prediction.reshape(-1)


class Confusion:
    """Counts of (true class, predicted class).

    ``matrix`` int64 [C, C+1]; the last column counts pixels with no prediction (255), so that scoring
    partial pseudo-labels is possible: they count against recall and never for a class.
    """

    def __init__(self, classes: int) -> None:
        if not 1 <= classes < IGNORE:
            raise ValueError(f"{classes} classes: expected 1..254")
        self.classes = classes
        self.matrix = np.zeros((classes, classes + 1), np.int64)

    def add(self, truth: Any, prediction: Any) -> Confusion:
        """Count one frame or batch: integer arrays of equal shape, 255 in `truth` is skipped.

        Raises ValueError on unequal shapes or a class index outside 0..C-1 (255 excepted).
        """
        t, y = _pair(truth, prediction)
        keep = t != IGNORE
        t, y = t[keep].astype(np.int64), y[keep].astype(np.int64)
        for what, found in (("the truth holds", t), ("a prediction is", y[y != IGNORE])):
            odd = found[(found < 0) | (found >= self.classes)]
            if odd.size:
                raise ValueError(f"{what} class {odd[0]}, this score has {self.classes}: map the labels")
        y = np.where(y == IGNORE, self.classes, y)
        columns = self.classes + 1
        self.matrix += np.bincount(t * columns + y, minlength=self.matrix.size).reshape(self.matrix.shape)
        return self

    def merge(self, other: Confusion) -> Confusion:
        """Add another one's counts.  Returns self."""
        if not isinstance(other, Confusion):
            raise ValueError(f"cannot merge a {type(other).__name__}: expected a Confusion")
        if other.classes != self.classes:
            raise ValueError(f"cannot merge scores of {other.classes} and {self.classes} classes")
        self.matrix += other.matrix
        return self

    def iou(self) -> np.ndarray:
        """float64 [C] in 0..1: TP / (TP + FP + FN); NaN for a class neither in the truth nor predicted."""
        hit = self.matrix[:, : self.classes].diagonal().astype(np.float64)
        union = self.matrix.sum(axis=1) + self.matrix[:, : self.classes].sum(axis=0) - hit
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(union > 0, hit / np.maximum(union, 1), np.nan)

    def miou(self, *, present: bool = True) -> float:
        """Mean IoU in 0..1.

        present=True: over the classes the truth holds, so that one stray pixel of a class that is not in
        the scene cannot add a zero to the mean.  present=False: over every class with a union (the
        convention of mmsegmentation).  NaN where nothing was counted.
        """
        iou = self.iou()
        keep = self.matrix.sum(axis=1) > 0 if present else ~np.isnan(iou)
        return float(iou[keep].mean()) if keep.any() else float("nan")

    def accuracy(self) -> float:
        """Share of scored pixels that are right; NaN where nothing was counted."""
        total = self.matrix.sum()
        return float(self.matrix[:, : self.classes].trace() / total) if total else float("nan")

    def shares(self) -> np.ndarray:
        """float64 [C]: share of the truth's pixels that are class c."""
        rows = self.matrix.sum(axis=1)
        return np.asarray(rows / max(int(rows.sum()), 1))


class Calibration:
    """Expected calibration error: do answers of confidence 0.8 come true four times in five?

    ECE = Σ_b n_b/n · |accuracy_b − confidence_b| over equal-width bins (Guo et al., 2017).
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise ValueError(f"{bins} bins: expected 1 or more")
        self.bins = bins
        self.count = np.zeros(bins, np.int64)
        self.right = np.zeros(bins, np.int64)
        self.sure = np.zeros(bins, np.float64)

    def add(self, truth: Any, prediction: Any, confidence: Any) -> Calibration:
        """Count one frame; `confidence` is uint8 (255·p, as served) or float in 0..1, same shape."""
        t, y = _pair(truth, prediction)
        confidence = np.asarray(confidence)
        c = confidence.reshape(-1)
        if c.shape != t.shape:
            raise ValueError(f"confidence has {c.size} values, truth {t.size}")
        # A served byte is truncated, so its confidence lies half a step above on average.
        p = (c.astype(np.float64) + 0.5) / 255.5 if c.dtype == np.uint8 else c.astype(np.float64)
        keep = t != IGNORE
        t, y, p = t[keep], y[keep], p[keep]
        if not ((p >= 0) & (p <= 1 + 1e-4)).all():  # softmax in float32 may round a hair over one
            raise ValueError("a confidence is NaN or outside 0..1: give softmax maxima, or bytes (255·p)")
        index = np.minimum((p * self.bins).astype(np.int64), self.bins - 1)
        self.count += np.bincount(index, minlength=self.bins)
        self.right += np.bincount(index, weights=(t == y), minlength=self.bins).astype(np.int64)
        self.sure += np.bincount(index, weights=p, minlength=self.bins)
        return self

    def merge(self, other: Calibration) -> Calibration:
        """Add another one's counts.  Returns self."""
        if not isinstance(other, Calibration):
            raise ValueError(f"cannot merge a {type(other).__name__}: expected a Calibration")
        if other.bins != self.bins:
            raise ValueError(f"cannot merge calibrations of {other.bins} and {self.bins} bins")
        self.count += other.count
        self.right += other.right
        self.sure += other.sure
        return self

    def ece(self) -> float:
        """0..1; NaN where nothing was counted."""
        n = self.count.sum()
        return float(np.abs(self.right - self.sure).sum() / n) if n else float("nan")

    def curve(self) -> list[dict[str, float]]:
        """One dictionary a filled bin: confidence, accuracy, share."""
        n = max(int(self.count.sum()), 1)
        return [
            {
                "confidence": float(self.sure[b] / self.count[b]),
                "accuracy": float(self.right[b] / self.count[b]),
                "share": float(self.count[b] / n),
            }
            for b in range(self.bins)
            if self.count[b]
        ]
