from __future__ import annotations

import numpy as np
import pytest

from adapt import gate
from adapt.round import RoundConfig, RoundError


def measures(share: list[float], *, flip: float = 0.8, variety: float = 3.0) -> gate.Measures:
    return gate.Measures(np.array(share), confidence=0.8, flip=flip, variety=variety, information=1.0)


def test_distance_of_shares_is_the_kullback_leibler_divergence() -> None:
    from scipy.stats import entropy

    source, share = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert gate.share_distance(share, source) == pytest.approx(entropy(source, share))
    assert gate.share_distance(source, source) == pytest.approx(0.0)
    # A class the source lacks does not count; one that vanished counts much, and is finite.
    assert np.isfinite(gate.share_distance(np.array([1.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0])))


def test_shares_near_the_source_win_over_confident_agreement() -> None:
    source = np.array([0.4, 0.4, 0.2])
    sky_lost = measures([0.6, 0.4, 0.0], flip=0.9)
    sky_found = measures([0.45, 0.4, 0.15], flip=0.85)
    assert gate.nearer(sky_found, sky_lost, source, gate.Limits())
    assert not gate.nearer(sky_lost, sky_found, source, gate.Limits())
    assert not gate.better(sky_found, sky_lost, gate.Limits())


def test_a_collapse_never_wins() -> None:
    source = np.array([0.9, 0.05, 0.05])
    collapsed = measures([0.9, 0.05, 0.05], variety=1.0)
    assert not gate.nearer(collapsed, measures([0.4, 0.3, 0.3]), source, gate.Limits())


def test_an_unknown_way_to_choose_is_refused() -> None:
    with pytest.raises(RoundError, match="adabn_by 'luck': choose mirror, shares or translated"):
        RoundConfig(adabn_by="luck")
