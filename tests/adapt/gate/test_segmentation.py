"""The gate's single decisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from adapt.gate import segmentation
from tests.adapt.conftest import toy_spec

LIMITS = segmentation.Limits()


def measures(**changes) -> segmentation.Measures:
    rng = np.random.default_rng(0)
    base = {
        "share": np.array([0.5, 0.3, 0.15, 0.05]), "confidence": 0.8, "flip": 0.85, "variety": 3.1,
        "information": 0.9, "source": 0.6, "labels": [rng.integers(0, 4, (8, 8)).astype(np.uint8)],
    }  # fmt: skip
    return segmentation.Measures(**{**base, **changes})


def failed(candidate: segmentation.Measures, **more) -> list[str]:
    checks = segmentation.decide(
        candidate, measures(), measures(), more.pop("moved", 0.02), toy_spec(), LIMITS, **more
    )
    return [c.name for c in checks if not c.passed]


def test_shares_may_be_others_than_the_sources_and_not_drift_further_away():
    """KL(source ‖ share) by hand; a third of a class lost is no class that vanished."""
    source = np.array([0.4, 0.3, 0.1, 0.2])
    before = measures()  # shares .5 .3 .15 .05
    assert failed(before, source_share=source) == []
    worse = np.array([0.55, 0.31, 0.12, 0.02])
    rise = float((source * np.log(before.share / worse)).sum())
    assert 0.12 < rise < 0.2
    assert failed(measures(share=worse), source_share=source) == ["source-shares"]
    assert failed(measures(share=source), source_share=source) == []
    assert failed(measures(share=worse)) == []


def test_a_good_candidate_passes_everything():
    assert failed(measures(source=0.61, flip=0.9)) == []


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"source": 0.5}, "source-holdout"),
        ({"share": np.array([0.55, 0.3, 0.145, 0.005])}, "class-vanished"),
        ({"variety": 1.2}, "variety"),
        ({"share": np.array([0.97, 0.01, 0.01, 0.01])}, "one-class"),
        ({"flip": 0.75}, "flip-consistency"),
        ({"labels": [np.full((8, 8), 3, np.uint8)]}, "agreement"),
        ({"confidence": float("nan")}, "finite"),
    ],
)
def test_each_fault_is_named(changes, check):
    assert check in failed(measures(**changes))


def test_statistics_that_contradict_themselves_lose_to_the_parent():
    """Batch statistics of something that is no road: the reference itself is the fault."""
    lost = measures(flip=0.7)
    checks = segmentation.decide(lost, lost, measures(), 0.0, toy_spec(), LIMITS)
    assert [c.name for c in checks if not c.passed] == ["flip-parent"]


def test_distance_and_classes_the_source_hardly_has():
    assert failed(measures(), moved=0.8) == ["distance"]
    gone = measures(share=np.array([0.55, 0.3, 0.15, 0.0]))
    assert failed(gone) == ["class-vanished"]
    assert failed(gone, source_share=np.array([0.5, 0.3, 0.2, 0.0])) == []


def test_distance_is_relative_and_blind_to_statistics():
    before = {"w": torch.tensor([3.0, 4.0]), "bn.running_mean": torch.zeros(2), "n": torch.tensor(3)}
    after = {"w": torch.tensor([3.0, 4.5]), "bn.running_mean": torch.ones(2) * 99, "n": torch.tensor(9)}
    assert segmentation.distance(after, before) == pytest.approx(0.1)


def test_a_collapsed_network_agrees_with_itself_and_is_still_the_worse_one():
    """One class everywhere: the mirrored answer is the same, and variety gives it away."""
    collapsed = measures(flip=1.0, variety=1.0)
    assert not segmentation.better(collapsed, measures(), LIMITS)
    assert segmentation.better(measures(), collapsed, LIMITS)
    assert segmentation.better(measures(flip=0.86), measures(), LIMITS)
    assert not segmentation.better(measures(flip=0.84), measures(), LIMITS)


def test_measures_of_a_network_that_sees_nothing_but_the_mirror():
    """Left half class 0, right half class 1 whatever is shown: the mirrored answer disagrees everywhere."""

    class Halves(nn.Module):
        size_multiple = 1

        def forward(self, x):
            out = torch.zeros(x.shape[0], 4, *x.shape[2:])
            out[:, 0, :, : x.shape[3] // 2] = 9
            out[:, 1, :, x.shape[3] // 2 :] = 9
            return out

    found = segmentation.measure(Halves(), toy_spec(), [np.zeros((32, 64, 3), np.uint8)] * 3)
    np.testing.assert_allclose(found.share, [0.5, 0.5, 0, 0])
    assert found.flip == 0.0
    assert found.variety == pytest.approx(2.0)
    assert found.information == pytest.approx(np.log(2), abs=0.02)
    with pytest.raises(ValueError, match="no target frame"):
        segmentation.measure(Halves(), toy_spec(), [])


def test_looking_at_the_frames_first():
    rng = np.random.default_rng(0)
    road = [rng.integers(0, 255, (16, 16, 3)).astype(np.uint8) for _ in range(6)]
    assert all(c.passed for c in segmentation.look(road, LIMITS))
    assert declined([road[0]] * 6) == ["frames-motion"]
    assert declined([f // 64 for f in road]) == ["frames-contrast"]


def declined(frames: list[np.ndarray]) -> list[str]:
    return [c.name for c in segmentation.look(frames, LIMITS) if not c.passed]


def test_a_translated_frame_has_the_colours_of_the_other_and_its_own_shapes():
    rng = np.random.default_rng(0)
    frame = np.full((32, 64, 3), 60, np.uint8)
    frame[8:24, 20:44] = 200
    style = np.clip(rng.normal((90, 40, 20), 9, (32, 64, 3)), 0, 255).astype(np.uint8)
    out = segmentation.translated(frame, style)
    np.testing.assert_allclose(out.mean((0, 1)), style.mean((0, 1)), atol=2)
    inside = out[8:24, 20:44].mean() - out[0:6].mean()
    assert inside > 10  # what was brighter still is
    np.testing.assert_allclose(segmentation.translated(frame, frame).astype(int), frame, atol=1)
    with pytest.raises(ValueError, match="cannot take the colours"):
        segmentation.translated(frame, style[:16])


def test_steadiness_counts_only_what_looks_the_same():
    frame = np.full((20, 20, 3), 100, np.uint8)
    after = frame.copy()
    after[:, 12:] = 200  # a car drove in; its pixels do not count
    ours, theirs = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    theirs[:, 12:] = 1
    assert segmentation.steadiness([frame], [ours], [after], [theirs], LIMITS) == 1.0
    theirs[:10] = 2
    found = segmentation.steadiness([frame], [ours], [after], [theirs], LIMITS)
    assert found == pytest.approx(0.5, abs=0.05)
    assert np.isnan(segmentation.steadiness([frame], [ours], [255 - frame], [theirs], LIMITS))
    assert np.isnan(segmentation.steadiness([frame], [ours], [None], [None], LIMITS))


@pytest.mark.parametrize(
    ("candidate", "reference", "check"),
    [
        ({"teacher": 0.5}, {}, "teacher"),
        ({"temporal": 0.8}, {"temporal": 0.9}, "temporal"),
        ({"translated": 0.5}, {"translated": 0.6}, "source-translated"),
        ({"labelled": 0.55}, {"labelled": 0.6}, "labelled-holdout"),
        ({"calibration": 0.3}, {"calibration": 0.05}, "calibration"),
        ({"confidence": 0.99}, {"confidence": 0.6}, "confidence"),
    ],
)
def test_each_further_fault_is_named(candidate, reference, check):
    before = measures(**reference)
    checks = segmentation.decide(
        measures(**{**reference, **candidate}), before, before, 0.02, toy_spec(), LIMITS
    )
    # Here the reference is the parent, so that a fall in the target's colours is one against both.
    both = ["source-translated", "parent-translated"] if check == "source-translated" else [check]
    assert [c.name for c in checks if not c.passed] == both


def test_harmless_steps_may_not_add_up():
    fine = segmentation.cumulative(measures(source=0.57), 0.6, 0.3, LIMITS)
    assert all(c.passed for c in fine)
    far = segmentation.cumulative(measures(source=0.5), 0.6, 0.9, LIMITS)
    assert [c.name for c in far if not c.passed] == ["total-distance", "total-source-holdout"]
    assert [c.name for c in segmentation.cumulative(measures(), float("nan"), 0.1, LIMITS)] == [
        "total-distance"
    ]
