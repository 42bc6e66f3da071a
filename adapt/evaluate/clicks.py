"""Clicked pixels that a network answers right, and the interval of their share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapt.weak.marks import Marks, meaning

__all__ = ["Clicks", "clicked_right", "wilson"]


@dataclass(frozen=True)
class Clicks:
    """right: bool [N], in the order of frames and points: whether the class answered is one the click allows.

    truth: int64 [N], the class where a click names one, else −1.
    """

    right: np.ndarray
    truth: np.ndarray

    @property
    def share(self) -> float:
        """Part of the clicks answered right; NaN without clicks."""
        return float(self.right.mean()) if len(self.right) else math.nan


def clicked_right(answers: Sequence[np.ndarray], marks: Sequence[Marks | None]) -> Clicks:
    """Compare answers uint8 [H,W] with the clicked pixels of their frames.

    "?" judges nothing.  Marks for another size are scaled to the answer's.

    Raises ValueError where the numbers of answers and marks differ.
    """
    right, truth = [], []
    for answer, mark in zip(answers, marks, strict=True):
        if mark is None:
            continue
        for point in mark.scaled((answer.shape[1], answer.shape[0])).points:
            told = meaning(point.label, mark.classes)
            if told is not None:
                right.append(int(answer[point.y, point.x]) in told)
                truth.append(next(iter(told)) if len(told) == 1 else -1)
    return Clicks(np.array(right, bool), np.array(truth, np.int64))


def wilson(right: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, *JASA*, 1927); (0, 1) where total is 0.

    Raises ValueError unless 0 <= right <= total.
    """
    from scipy.stats import binomtest

    if not 0 <= right <= total:
        raise ValueError(f"{right} right of {total}: right is 0 to the total")
    if not total:
        return 0.0, 1.0
    found = binomtest(right, total).proportion_ci(confidence, "wilson")
    return float(found.low), float(found.high)
