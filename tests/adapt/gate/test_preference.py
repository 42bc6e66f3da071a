"""Which batch statistics the label-free measures prefer."""

from __future__ import annotations

import numpy as np

from adapt.gate.limits import Limits
from adapt.gate.measures import (
    Measures,
)
from adapt.gate.preference import prefer_by_class_shares, prefer_by_flip_consistency
from tests.adapt.gate.test_segmentation import measures as gate_measures

LIMITS = Limits()


def measures(share: list[float], *, flip: float = 0.8, variety: float = 3.0) -> Measures:
    return Measures(np.array(share), confidence=0.8, flip=flip, variety=variety, information=1.0)


def test_shares_near_the_source_win_over_confident_agreement() -> None:
    source = np.array([0.4, 0.4, 0.2])
    sky_lost = measures([0.6, 0.4, 0.0], flip=0.9)
    sky_found = measures([0.45, 0.4, 0.15], flip=0.85)
    assert prefer_by_class_shares(sky_found, sky_lost, source, Limits())
    assert not prefer_by_class_shares(sky_lost, sky_found, source, Limits())
    assert not prefer_by_flip_consistency(sky_found, sky_lost, Limits())


def test_a_collapse_never_wins() -> None:
    source = np.array([0.9, 0.05, 0.05])
    collapsed = measures([0.9, 0.05, 0.05], variety=1.0)
    assert not prefer_by_class_shares(collapsed, measures([0.4, 0.3, 0.3]), source, Limits())


def test_a_collapsed_network_agrees_with_itself_and_is_still_the_worse_one():
    """One class everywhere: the mirrored answer is the same, and variety gives it away."""
    collapsed = gate_measures(flip=1.0, variety=1.0)
    assert not prefer_by_flip_consistency(collapsed, gate_measures(), LIMITS)
    assert prefer_by_flip_consistency(gate_measures(), collapsed, LIMITS)
    assert prefer_by_flip_consistency(gate_measures(flip=0.86), gate_measures(), LIMITS)
    assert not prefer_by_flip_consistency(gate_measures(flip=0.84), gate_measures(), LIMITS)
