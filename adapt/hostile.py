"""Are these frames of a road at all?  A covered lens, a stuck camera, a patch that never moves, a screen, two
cameras under one name, damaged pictures, a strobe: a round that would learn from them is declined, with the
reason, before any work is done.

Looks at pixels alone: no network, no label, no file.  Every limit stands in `adapt.limits.Limits`.  What a
camera could really have seen (another country, a flooded street) is none of this module's business: that is
the domain shift adaptation is there for, and the gate judges what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from adapt.limits import Check, Limits

__all__ = ["look"]


def look(
    frames: Sequence[np.ndarray], limits: Limits, *, sizes: Sequence[tuple[int, ...]] = ()
) -> list[Check]:
    """All looks at the frames of a round.

    Args:
        frames: uint8 [H,W,3] each, in order of time.
    """
    small = [f[::4, ::4].astype(np.float32).mean(-1) for f in frames]
    flat = float(np.mean([x.std() < limits.contrast for x in small]))
    still = float(np.mean([np.abs(a - b).mean() < limits.motion for a, b in pairwise(small)] or [0]))
    return [
        Check(
            "frames-contrast", round(flat, 5), limits.bad_frames, flat <= limits.bad_frames,
            f"{100 * flat:.0f}% of the frames show nothing (luma deviation under {limits.contrast:g})",
        ),
        Check(
            "frames-motion", round(still, 5), limits.bad_frames, still <= limits.bad_frames,
            f"{100 * still:.0f}% of the frames repeat the one before: is the camera stuck?",
        ),
    ]  # fmt: skip
