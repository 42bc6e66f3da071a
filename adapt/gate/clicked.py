"""Marks as judges: whether a candidate may lose some of the clicked pixels.

A click is one label of one pixel, so a share of right answers has a binomial error.  Both networks answer the
same clicks; only those that they answer differently show which is better (McNemar, *Psychometrika*, 1947).
"""

from __future__ import annotations

import numpy as np

from adapt.evaluate.clicks import Clicks
from adapt.gate.checks import Check

__all__ = ["ALPHA", "check_clicked"]

#: Chance at which a candidate that is as good as its parent is refused: one round of a hundred.
ALPHA = 0.01


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
        f"{int(candidate.right.sum())} of {total} clicked pixels right, "
        f"the parent {int(parent.right.sum())}; "
        f"of {n} that one of them answers right, the candidate loses {lost}, at most {limit} by chance"
        if total
        else "no clicked pixels in the hold-out"
    )
    return Check("clicked", float(lost), float(limit), passed, words)
