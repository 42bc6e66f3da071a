"""Confusion and calibration against definitions written out, and as things that add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adapt.evaluate.segmentation import Calibration, Confusion
from adapt.evaluate.tables import markdown


def iou_by_sets(truth: np.ndarray, prediction: np.ndarray, c: int) -> float:
    scored = truth != 255
    a, b = (truth == c) & scored, (prediction == c) & scored
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else float("nan")


LABELS = hnp.arrays(np.uint8, (6, 7), elements=st.sampled_from([0, 1, 2, 3, 255]))
PREDICTIONS = hnp.arrays(np.uint8, (6, 7), elements=st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(LABELS, PREDICTIONS)
def test_iou_is_intersection_over_union(truth, prediction):
    score = Confusion(4).add(truth, prediction)
    np.testing.assert_allclose(score.iou(), [iou_by_sets(truth, prediction, c) for c in range(4)])
    scored = truth != 255
    if scored.any():
        assert score.accuracy() == pytest.approx((truth == prediction)[scored].mean())


@settings(max_examples=30, deadline=None)
@given(LABELS, PREDICTIONS, LABELS, PREDICTIONS)
def test_scores_of_parts_add_up_to_the_score_of_the_whole(t1, p1, t2, p2):
    parts = Confusion(4).add(t1, p1).merge(Confusion(4).add(t2, p2))
    whole = Confusion(4).add(np.stack([t1, t2]), np.stack([p1, p2]))
    np.testing.assert_array_equal(parts.matrix, whole.matrix)


def test_two_ways_to_average():
    truth = np.array([[0, 0, 1, 1]], np.uint8)
    prediction = np.array([[0, 0, 1, 2]], np.uint8)
    score = Confusion(4).add(truth, prediction)
    assert score.miou() == pytest.approx((1 + 0.5) / 2)
    assert score.miou(present=False) == pytest.approx((1 + 0.5 + 0) / 3)
    assert np.isnan(score.iou()[3])
    assert np.isnan(Confusion(4).miou())


def test_a_pixel_without_prediction_is_a_miss_of_its_class_only():
    score = Confusion(2).add(np.array([0, 0, 1], np.uint8), np.array([0, 255, 1], np.uint8))
    np.testing.assert_allclose(score.iou(), [0.5, 1.0])


def test_bad_input_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="resize the prediction"):
        Confusion(3).add(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match="map the labels"):
        Confusion(3).add(np.array([7], np.uint8), np.array([0], np.uint8))
    with pytest.raises(ValueError, match="prediction is class 7"):
        Confusion(3).add(np.array([0], np.uint8), np.array([7], np.uint8))
    with pytest.raises(ValueError, match="cannot merge"):
        Confusion(3).merge(Confusion(4))


def test_calibration_of_an_honest_and_of_a_boasting_network():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.3, 1.0, 200_000)
    right = rng.random(p.size) < p
    truth, prediction = np.zeros(p.size, np.uint8), (~right).astype(np.uint8)
    assert Calibration().add(truth, prediction, p).ece() < 0.01
    assert Calibration().add(truth, prediction, np.ones_like(p)).ece() == pytest.approx(1 - right.mean())
    served = (p * 255).astype(np.uint8)
    assert Calibration().add(truth, prediction, served).ece() < 0.01


def test_calibrations_add_up():
    rng = np.random.default_rng(1)
    t, y = rng.integers(0, 3, (2, 100)).astype(np.uint8)
    p = rng.random(100)
    whole = Calibration().add(t, y, p)
    parts = Calibration().add(t[:40], y[:40], p[:40]).merge(Calibration().add(t[40:], y[40:], p[40:]))
    assert parts.ece() == pytest.approx(whole.ece())
    assert sum(b["share"] for b in whole.curve()) == pytest.approx(1.0)


def test_the_table_shows_the_change():
    before = {"iou": {"road": 0.5, "car": None}, "miou": 0.5, "ece": 0.1}
    after = {"iou": {"road": 0.75, "car": 0.2}, "miou": 0.475, "ece": 0.05}
    table = markdown([("before", before), ("after", after)])
    assert "| road | 50.0 | 75.0 (+25.0) |" in table
    assert "| car | – | 20.0 |" in table
    assert "| **mean IoU** | 50.0 | 47.5 (-2.5) |" in table


GOOD = np.array([[0, 1], [2, 3]], np.uint8)


@pytest.mark.parametrize(
    ("truth", "prediction", "words"),
    [
        (GOOD, np.full((2, 2), 4, np.uint8), "a prediction is class 4"),  # the next one is no "no label"
        (GOOD, np.full((2, 2), -1), "a prediction is class -1"),
        (np.full((2, 2), 4, np.uint8), GOOD, "the truth holds class 4"),
        (np.full((2, 2), -1, np.int8), GOOD, "the truth holds class -1"),
        (GOOD + 0.5, GOOD, "give class indices"),
        (GOOD, np.full((2, 2), np.nan), "give class indices"),
        (GOOD.astype(complex), GOOD, "give class indices"),
    ],
)
def test_what_is_no_class_is_refused_and_counts_nothing(truth, prediction, words):
    score = Confusion(4)
    with pytest.raises(ValueError, match=words):
        score.add(truth, prediction)
    assert not score.matrix.any()


def test_a_frame_of_nothing_but_void_counts_nothing():
    score = Confusion(4).add(np.full((3, 3), 255, np.uint8), np.zeros((3, 3), np.uint8))
    assert not score.matrix.any()
    assert np.isnan(score.miou())
    assert np.isnan(score.iou()).all()
    assert np.isnan(score.accuracy())


@pytest.mark.parametrize("confidence", [np.nan, -0.5, 1.5, np.inf, 200])
def test_confidences_that_are_none_are_refused(confidence):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        Calibration().add(GOOD, GOOD, np.full(GOOD.shape, confidence))
    with pytest.raises(ValueError, match="bins"):
        Calibration(0)


@pytest.mark.parametrize("other", [5, None, Calibration()])
def test_only_its_own_kind_is_merged(other):
    with pytest.raises(ValueError, match="cannot merge a"):
        Confusion(4).merge(other)
    with pytest.raises(ValueError, match="cannot merge a"):
        Calibration().merge(Confusion(4))
