"""What is measured of a network without target labels, against numbers by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from adapt.gate.limits import Limits
from adapt.gate.measures import (
    measure,
    share_distance,
    temporal_consistency,
    translated,
    weight_distance,
)
from tests.adapt.conftest import toy_spec

LIMITS = Limits()


def test_distance_of_shares_is_the_kullback_leibler_divergence() -> None:
    from scipy.stats import entropy

    source, share = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert share_distance(share, source) == pytest.approx(entropy(source, share))
    assert share_distance(source, source) == pytest.approx(0.0)
    # A class the source lacks does not count; one that vanished counts much, and is finite.
    assert np.isfinite(share_distance(np.array([1.0, 0.0, 0.0]), np.array([0.5, 0.5, 0.0])))


def test_distance_is_relative_and_blind_to_statistics():
    before = {"w": torch.tensor([3.0, 4.0]), "bn.running_mean": torch.zeros(2), "n": torch.tensor(3)}
    after = {"w": torch.tensor([3.0, 4.5]), "bn.running_mean": torch.ones(2) * 99, "n": torch.tensor(9)}
    assert weight_distance(after, before) == pytest.approx(0.1)


def test_measures_of_a_network_that_sees_nothing_but_the_mirror():
    """Left half class 0, right half class 1 whatever is shown: the mirrored answer disagrees everywhere."""

    class Halves(nn.Module):
        size_multiple = 1

        def forward(self, x):
            out = torch.zeros(x.shape[0], 4, *x.shape[2:])
            out[:, 0, :, : x.shape[3] // 2] = 9
            out[:, 1, :, x.shape[3] // 2 :] = 9
            return out

    found = measure(Halves(), toy_spec(), [np.zeros((32, 64, 3), np.uint8)] * 3)
    np.testing.assert_allclose(found.share, [0.5, 0.5, 0, 0])
    assert found.flip == 0.0
    assert found.variety == pytest.approx(2.0)
    assert found.information == pytest.approx(np.log(2), abs=0.02)
    with pytest.raises(ValueError, match="no target frame"):
        measure(Halves(), toy_spec(), [])


def test_a_translated_frame_has_the_colours_of_the_other_and_its_own_shapes():
    rng = np.random.default_rng(0)
    frame = np.full((32, 64, 3), 60, np.uint8)
    frame[8:24, 20:44] = 200
    style = np.clip(rng.normal((90, 40, 20), 9, (32, 64, 3)), 0, 255).astype(np.uint8)
    out = translated(frame, style)
    np.testing.assert_allclose(out.mean((0, 1)), style.mean((0, 1)), atol=2)
    inside = out[8:24, 20:44].mean() - out[0:6].mean()
    assert inside > 10  # what was brighter still is
    np.testing.assert_allclose(translated(frame, frame).astype(int), frame, atol=1)
    with pytest.raises(ValueError, match="cannot take the colours"):
        translated(frame, style[:16])


def test_steadiness_counts_only_what_looks_the_same():
    frame = np.full((20, 20, 3), 100, np.uint8)
    after = frame.copy()
    after[:, 12:] = 200  # a car drove in; its pixels do not count
    ours, theirs = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    theirs[:, 12:] = 1
    assert temporal_consistency([frame], [ours], [after], [theirs], LIMITS) == 1.0
    theirs[:10] = 2
    found = temporal_consistency([frame], [ours], [after], [theirs], LIMITS)
    assert found == pytest.approx(0.5, abs=0.05)
    assert np.isnan(temporal_consistency([frame], [ours], [255 - frame], [theirs], LIMITS))
    assert np.isnan(temporal_consistency([frame], [ours], [None], [None], LIMITS))
