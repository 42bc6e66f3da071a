"""Marks as judges: how many clicked pixels a network answers right, and whether a candidate may lose some.

A click is one label of one pixel, so a share of right answers has a binomial error.  Both networks answer the
same clicks; only those that they answer differently say which is better (McNemar, *Psychometrika*, 1947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapt.gate.limits import Check
from adapt.weak.marks import Marks, meaning

__all__ = ["ALPHA", "Clicks", "check_clicked", "clicked_right", "wilson"]

#: Chance at which a candidate that is as good as its parent is refused: one round of a hundred.
ALPHA = 0.01


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


def check_clicked(parent: Clicks, candidate: Clicks, *, alpha: float = ALPHA) -> Check:
    """The gate's check "clicked": refuse a candidate that is wrong more often by more than chance.

    Of the n clicks that exactly one of the two answers right, a candidate as good as its parent wins
    Binomial(n, ½).  It is refused where so few wins, or fewer, have a chance below `alpha`.  The value is the
    number of those clicks that the candidate loses, the limit the most that it may.

    Raises ValueError where the two did not answer the same clicks.
    """
    from scipy.stats import binom

    if len(parent.right) != len(candidate.right) or not np.array_equal(parent.truth, candidate.truth):
        raise ValueError("parent and candidate answered other clicks: give both the same marks")
    lost = int((parent.right & ~candidate.right).sum())
    won = int((~parent.right & candidate.right).sum())
    n = lost + won
    # The most losses m with P(losses >= m) >= alpha; without a difference, none is too many.
    limit = int(binom.isf(alpha, n, 0.5)) if n else 0
    while limit < n and binom.sf(limit, n, 0.5) >= alpha:
        limit += 1
    passed = lost <= limit
    total = len(parent.right)
    words = (
        f"{int(candidate.right.sum())} of {total} clicked pixels right, the parent "
        f"{int(parent.right.sum())}; "
        f"of {n} that one of them answers right, the candidate loses {lost}, at most {limit} by chance"
        if total
        else "no clicked pixels in the hold-out"
    )
    return Check("clicked", float(lost), float(limit), passed, words)


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
