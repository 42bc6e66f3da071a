"""One round of adaptation: frames in, a judged model pack out."""

from __future__ import annotations

from adapt.round.config import RoundConfig
from adapt.round.outcome import RoundError, RoundPaused, RoundResult
from adapt.round.segmentation import SegmentationRound, adapt

__all__ = [
    "RoundConfig",
    "RoundError",
    "RoundPaused",
    "RoundResult",
    "SegmentationRound",
    "adapt",
]
