"""The parity report on answers whose difference is known by construction."""

from __future__ import annotations

import numpy as np
import pytest

from export.errors import ExportError
from export.graph.contract import Contract
from export.parity.parity import Thresholds, compare, edge_f, judge, near_edges

CONTRACT = Contract("segmentation", ("road", "sky"))


def scene():
    labels = np.zeros((1, 10, 20), np.uint8)
    labels[:, :, 10:] = 1
    return labels, np.full((1, 10, 20), 200, np.uint8)


def pair(labels, sure):
    return {"labels": labels, "confidence": sure}


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
    report = judge(compare(pair(labels, sure), pair(labels, sure), CONTRACT), Thresholds())
    assert report["passed"]
    assert (report["agreement"], report["boundary_agreement"], report["confidence_max"]) == (1.0, 1.0, 0)
    assert report["classes"]["road"] == {"pixels": 100, "agreement": 1.0, "confidence_mean": 0.0}


def test_known_differences_are_counted():
    labels, sure = scene()
    other, less = labels.copy(), sure.copy()
    other[0, :5, 9] = 1  # five road pixels at the edge become sky
    less[0, :, 0] = 190  # ten pixels lose ten
    report = judge(compare(pair(other, less), pair(labels, sure), CONTRACT), Thresholds())
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
    report = judge(compare(pair(labels, labels), pair(labels, labels), CONTRACT), Thresholds())
    assert report["boundary_agreement"] is None
    assert report["passed"]
    assert list(report["classes"]) == ["road"]


def test_answers_of_another_shape_are_refused():
    labels, sure = scene()
    with pytest.raises(ExportError, match=r"engine's labels are uint8 \[1, 10, 19\]"):
        compare(pair(labels[:, :, 1:], sure), pair(labels, sure), CONTRACT)


class TestEdges:
    """Two classes on a map of 12x20: class 0 is a vertical line at column 5, class 1 never occurs."""

    contract = Contract("edges", (), ("kerb", "pole"), (0.5, 0.5))

    def answer(self, column, probability=200, stray=()):
        edges = np.zeros((1, 2, 12, 20), np.uint8)
        edges[0, 0, :, column] = probability
        bits = np.zeros((1, 12, 20), np.int32)
        bits[0, :, column] = 1
        for y, x in stray:
            bits[0, y, x] |= 1
        return {"edges": edges, "edge_bits": bits}

    def judged(self, given, truth):
        return judge(compare(given, truth, self.contract), Thresholds())

    def test_equal_answers_are_perfect(self):
        report = self.judged(self.answer(5), self.answer(5))
        assert report["passed"]
        assert (report["edges_max_difference"], report["bits_equal"]) == (0, 1.0)
        assert (report["mf"], report["mf_difference"]) == (1.0, 0.0)
        assert report["edge_classes"] == {"kerb": {"pixels": 12, "max_difference": 0, "f": 1.0}}
        assert "agreement" not in report
        assert set(report["thresholds"]) == {"edges_max", "edges_mean", "bits", "mf"}

    def test_bytes_and_bits_are_counted(self):
        report = self.judged(self.answer(5, 190), self.answer(5))
        assert report["edges_max_difference"] == 10
        assert report["edges_mean_difference"] == pytest.approx(12 * 10 / (2 * 12 * 20))
        assert report["bits_equal"] == 1.0
        assert [text.split()[0] for text in report["missed"]] == ["largest", "mean"]

    def test_a_pixel_off_is_the_same_edge_and_two_are_another(self):
        assert self.judged(self.answer(6), self.answer(5))["mf_difference"] == 0
        report = self.judged(self.answer(7), self.answer(5))
        assert report["mf_difference"] == 1.0
        assert any("MF differs by 1.0000" in text for text in report["missed"])
        assert report["bits_equal"] == pytest.approx(1 - 24 / 240)

    def test_strays_cost_precision_alone(self):
        report = self.judged(self.answer(5, stray=[(y, 15) for y in range(4)]), self.answer(5))
        precision, recall = 12 / 16, 1.0
        assert report["mf"] == pytest.approx(2 * precision * recall / (precision + recall))

    def test_a_class_that_torch_never_shows_has_no_part_in_mf(self):
        given = self.answer(5)
        given["edge_bits"][0, 0, 0] |= 2
        report = self.judged(given, self.answer(5))
        assert report["mf"] == 1.0
        assert report["bits_equal"] < 1
        nothing = self.answer(5)
        nothing["edge_bits"][:] = 0
        assert self.judged(nothing, nothing)["mf_difference"] is None

    def test_the_last_bit_is_as_good_as_the_first(self):
        contract = Contract("edges", (), tuple(f"c{k}" for k in range(31)), (0.5,) * 31)
        bits = np.full((1, 4, 4), 1 << 30, np.int32)
        truth = {"edges": np.zeros((1, 31, 4, 4), np.uint8), "edge_bits": bits}
        assert list(compare(truth, truth, contract)["edge_classes"]) == ["c30"]

    def test_f_of_nothing_found(self):
        line = np.zeros((1, 5, 5), bool)
        line[0, 2] = True
        assert edge_f(np.zeros_like(line), line) == 0.0
        assert edge_f(np.zeros_like(line), np.zeros_like(line)) == 1.0

    def test_a_joint_answer_is_judged_by_both(self):
        labels = np.zeros((1, 12, 20), np.uint8)
        contract = Contract("joint", ("road", "sky"), ("kerb", "pole"), (0.5, 0.5))
        whole = {**pair(labels, labels), **self.answer(5)}
        report = judge(compare(whole, whole, contract), Thresholds())
        assert report["passed"]
        assert report["agreement"] == report["bits_equal"] == 1.0
        moved = {**whole, **self.answer(9)}
        assert not judge(compare(moved, whole, contract), Thresholds())["passed"]
