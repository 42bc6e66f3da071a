"""Named settings of a round: ``--preset NAME`` of adapt.run, ``preset(NAME, **changes)`` in Python.

default      the recipe of docs/results/real-domain-shift.md: batch statistics, plain CBST, replay
cbst         the paper's own: statistics fixed, constant rate, each training goes on from the last
modern       what came after: mean teacher, rare-class sampling on replay and pseudo-labels, ClassMix, strong
             augmentation, warm-up, mirrored labelling.  Without the MRKLD and the frozen batch statistics of
             its sources: they lost on every seed.  `--set mic=1` adds masked consistency
source-free  for a pack without replay: one portion, statistics of the target kept fixed, and nine tenths
             of the parent's weights in the result (docs/results/ordering.md: the student alone loses)

Which is the default, and by which figures: docs/adaptation.md.
"""

from __future__ import annotations

from typing import Any

from adapt.labels.cbst import self_paced
from adapt.round.config import RoundConfig
from adapt.round.outcome import RoundError

__all__ = ["PRESETS", "preset"]

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "cbst": {
        "adabn": False,
        "bn": "frozen",
        "schedule": "constant",
        "rate": 5e-5,
        "from_parent": False,
        "portions": self_paced(0.2, 0.05, 0.5, 3),
        "scale": (0.7, 1.3),
    },
    "modern": {
        "ema": 0.99,
        "rare": 0.1,
        "rare_target": 0.1,
        "classmix": 0.5,
        "brightness": 1.5,
        "colour": 0.1,
        "blur": 0.5,
        "schedule": "warm",
        "label_flip": True,
    },
    "source-free": {"portions": (0.2,), "source_free": True, "bn": "frozen", "keep_parent": 0.9},
}


def preset(name: str, **changes: Any) -> RoundConfig:
    """The settings of a preset with changes on top.  Raises RoundError for an unknown name."""
    if name not in PRESETS:
        raise RoundError(f"preset {name!r}: choose one of {', '.join(PRESETS)}")
    return RoundConfig(**{**PRESETS[name], **changes})
