"""One round of adaptation: frames in, a judged model pack out."""

from __future__ import annotations

from adapt.round.segmentation import RoundConfig, RoundError, RoundPaused, RoundResult, adapt

__all__ = [
    "RoundConfig",
    "RoundError",
    "RoundPaused",
    "RoundResult",
    "adapt",
]
