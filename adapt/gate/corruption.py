"""What a single picture shows of a stream that broke on the way: half decoded, torn, in stripes.

Uses one picture and the one before it; knows no drive, no network and no file.
"""

from __future__ import annotations

import numpy as np

from adapt.gate.limits import Limits

__all__ = ["damaged"]


def damaged(frame: np.ndarray, before: np.ndarray | None, limits: Limits) -> str:
    """What is wrong with a single picture, in words; "" if nothing is.

    Half decoded: rows of one colour from some row down to the bottom, which no sensor delivers (black and
    white are left out: night and glare do).  Torn: rows equal those of the frame before to the bit while
    others do not.  In stripes: rows of one colour with picture above them (an even sky has none), or rows
    that have nothing to do with their neighbours over most of the width, as when parts of a stream are lost.
    """
    row = frame.reshape(frame.shape[0], -1, 3)
    plain = (row.max(1).astype(np.int16) - row.min(1)).max(-1) <= 2
    level = row.mean((1, 2))
    bottom = plain & (level > 8) & (level < 247)
    rows = len(plain) if bottom.all() else int(np.argmin(bottom[::-1]))
    if rows >= limits.damaged_rows * len(plain):
        return f"the lowest {100 * rows / len(plain):.0f}% of a picture are one colour: half decoded?"
    under = int(np.argmin(plain)) if not plain.all() else len(plain)  # what is plain from the top down is sky
    if (share := float(bottom[under:].sum() / len(plain))) >= limits.plain_rows:
        return f"{100 * share:.0f}% of a picture's rows are of one colour: parts of it lost?"
    if (jumps := _jumps(frame)) >= limits.jumps:
        return f"{jumps} rows of a picture have nothing to do with the next: parts of it lost?"
    if before is not None and before.shape == frame.shape:
        busy = row.max((1, 2)).astype(np.int16) - row.min((1, 2)) > 8
        equal = (frame == before).all((1, 2)) & busy
        if limits.damaged_rows <= equal.sum() / max(int(busy.sum()), 1) <= 1 - limits.damaged_rows:
            return f"{100 * equal.mean():.0f}% of a picture's rows are the last picture's: torn?"
    return ""


def _jumps(frame: np.ndarray, ratio: float = 3.0) -> int:
    """Borders between rows where most of the columns jump, `ratio` times more than at the borders beside and
    than at the picture's middle one.  An edge of a street is wide in rows or short in columns.
    """
    luma = frame.astype(np.int16).sum(-1) / 3
    step = np.median(np.abs(np.diff(luma, axis=0)), axis=1)
    if len(step) < 8:
        return 0
    beside = np.maximum(np.roll(step, 1), np.roll(step, -1))
    sharp = step / np.maximum(beside, np.median(step) + 1.0) > ratio
    return int(sharp[2:-2].sum())
