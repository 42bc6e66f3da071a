"""The parity report on answers whose difference is known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from export.errors import ExportError
from export.parity import Thresholds, compare, judge, near_edges

CLASSES = ("road", "sky")


def scene():
    labels = np.zeros((1, 10, 20), np.uint8)
    labels[:, :, 10:] = 1
    return labels, np.full((1, 10, 20), 200, np.uint8)


def test_pixels_near_an_edge_are_those_within_two():
    labels, _ = scene()
    near = near_edges(labels)
    # Columns 9 and 10 touch the edge; 8 and 11 are one further.
    assert near[0].all(0).nonzero()[0].tolist() == [8, 9, 10, 11]
    assert not near_edges(np.zeros((2, 5, 5), np.uint8)).any()


def test_a_corner_is_near_in_both_directions():
    labels = np.zeros((1, 9, 9), np.uint8)
    labels[0, 4, 4] = 1
    by_hand = np.zeros((9, 9), bool)
    plus = [(4, 4), (3, 4), (5, 4), (4, 3), (4, 5)]
    for y, x in plus:
        by_hand[y - 1 : y + 2, x - 1 : x + 2] = True
    assert np.array_equal(near_edges(labels)[0], by_hand)


def test_equal_answers_are_perfect():
    labels, sure = scene()
    report = judge(compare(labels, sure, labels, sure, CLASSES), Thresholds())
    assert report["passed"]
    assert (report["agreement"], report["boundary_agreement"], report["confidence_max"]) == (1.0, 1.0, 0)
    assert report["classes"]["road"] == {"pixels": 100, "agreement": 1.0, "confidence_mean": 0.0}


def test_known_differences_are_counted():
    labels, sure = scene()
    other, less = labels.copy(), sure.copy()
    other[0, :5, 9] = 1  # five road pixels at the edge become sky
    less[0, :, 0] = 190  # ten pixels lose ten
    report = judge(compare(other, less, labels, sure, CLASSES), Thresholds())
    assert report["agreement"] == pytest.approx(195 / 200)
    assert report["boundary_agreement"] == pytest.approx(35 / 40)
    assert report["confidence_mean"] == pytest.approx(0.5)
    assert report["confidence_max"] == 10
    assert report["classes"]["road"]["agreement"] == pytest.approx(0.95)
    assert report["classes"]["sky"]["agreement"] == 1.0
    assert not report["passed"]
    assert len(report["missed"]) == 2


def test_without_edges_the_boundary_is_not_judged():
    labels = np.zeros((1, 4, 4), np.uint8)
    report = judge(compare(labels, labels, labels, labels, CLASSES), Thresholds())
    assert report["boundary_agreement"] is None
    assert report["passed"]
    assert list(report["classes"]) == ["road"]


def test_answers_of_another_shape_are_refused():
    labels, sure = scene()
    with pytest.raises(ExportError, match=r"engine's labels are uint8 \[1, 10, 19\]"):
        compare(labels[:, :, 1:], sure, labels, sure, CLASSES)
