"""The judgements of edges against SciPy's dilation, counts by hand, and the cases that they exist for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime.checks.edges import EdgeChecks, EdgeComparison, EdgeStats, Parity, class_counts, dilate
from runtime.config import GuardConfig, ShadowConfig

NAMES = ("road", "car", "tree", "sky")
CHECKS = EdgeChecks(NAMES, (0.5,) * 4)
FIELDS = hnp.arrays(np.int32, (2, 9, 11), elements=st.integers(0, 15))
WIDE = hnp.arrays(np.int32, (1, 3, 5), elements=st.integers(0, 2**31 - 1))


def planes(bits, classes=4):
    return ((bits[:, None] >> np.arange(classes)[:, None, None]) & 1).astype(bool)


@given(WIDE, st.integers(1, 31))
def test_counts_of_all_classes_at_once(bits, classes):
    assert class_counts(bits, classes).tolist() == planes(bits, classes).sum((0, 2, 3)).tolist()
    seen = EdgeStats.of(bits, None, classes)
    assert seen.stray == int((bits >= 2**classes).sum())
    assert seen.some == int((bits != 0).sum())


def test_the_sign_is_a_bit_beyond_any_class():
    assert EdgeStats.of(np.array([[[-1, 5]]], np.int32), None, 31).stray == 1


@settings(deadline=None)  # SciPy is slow to come
@given(FIELDS, st.integers(1, 12))
def test_dilation_is_scipys(bits, radius):
    from scipy.ndimage import binary_dilation

    box = np.ones((2 * radius + 1, 2 * radius + 1), bool)
    wanted = np.array([[binary_dilation(p, box) for p in frame] for frame in planes(bits)])
    assert (planes(dilate(bits, radius)) == wanted).all()


@given(FIELDS, FIELDS)
def test_looks_parities_and_comparisons_add(one, two):
    edges = planes(one).astype(np.uint8) * 200
    both, halves = (
        EdgeStats.of(one, edges, 4),
        [EdgeStats.of(one[i : i + 1], edges[i : i + 1], 4) for i in (0, 1)],
    )
    assert (halves[0] + halves[1]).counts.tolist() == both.counts.tolist()
    assert (halves[0] + halves[1]).strength == both.strength
    parity = Parity.of(one, edges, two, edges, 4)
    on = [planes(x) for x in (one, two)]
    either = (on[0] | on[1]).sum()
    assert parity.overlap == pytest.approx((on[0] & on[1]).sum() / either if either else 1.0)
    assert parity.bits_equal == pytest.approx((one == two).mean())
    whole = EdgeComparison.of(one, two, 4, 0.1)
    parts = EdgeComparison.of(one[:1], two[:1], 4, 0.1) + EdgeComparison.of(one[1:], two[1:], 4, 0.1)
    assert parts.cross.tolist() == whole.cross.tolist()


@given(FIELDS)
def test_cross_counts_are_those_of_the_planes(bits):
    other = np.roll(bits, 1, 1)
    near = planes(dilate(other, 1))
    live = planes(bits)
    wanted = [[int((live[:, j] & near[:, k]).sum()) for k in range(4)] for j in range(4)]
    assert EdgeComparison.of(bits, other, 4, 0.05).cross.tolist() == wanted


def test_nan_is_seen_where_nothing_is_above_zero():
    blank = np.zeros((1, 4, 4), np.int32)
    dead, faint = (np.full((1, 4, 4, 4), v, np.uint8) for v in (0, 1))
    assert "NaN" in CHECKS.not_finite(EdgeStats.of(blank, dead, 4), {}, None)
    assert CHECKS.not_finite(EdgeStats.of(blank, faint, 4), {}, None) is None
    assert (
        CHECKS.not_finite(EdgeStats.of(blank, dead, 4), {}, EdgeStats.of(blank, dead, 4)) is None
    )  # so says the live one
    assert CHECKS.not_finite(EdgeStats.of(blank, None, 4), {}, None) is None  # not asked for


def shares(*values):
    bits = np.zeros((1, 10, 100), np.int32)
    for k, value in enumerate(values):
        bits.reshape(-1)[: round(value * 1000)] |= 1 << k
    return EdgeStats.of(bits, None, 4)


def test_collapse():
    limits = GuardConfig()
    usual = shares(0.1, 0.05, 0.08, 0.0005)

    def judge(seen, reference=None, gone=0.0):
        return CHECKS.collapsed(seen, reference, limits, gone)

    assert judge(usual) is None
    assert judge(usual, usual) is None
    assert "not one edge" in judge(shares())
    assert "the live version has them on 10.00%" in judge(shares(), usual)
    assert judge(shares(), shares()) is None  # a covered camera
    assert "'car'" in judge(shares(0.1, 0.7, 0.1))
    assert judge(shares(0.1, 0.7, 0.1), shares(0.1, 0.8, 0.1)) is None
    assert "1 of 3 classes have vanished: 'tree'" in judge(shares(0.1, 0.05), usual)
    assert judge(shares(0.1, 0.05), usual, 0.4) is None
    assert judge(shares(0.1, 0.05, 0.08), usual) is None  # one that was hardly there may go


class TestAgreement:
    """What a good adapted edge network looks like beside what rubbish looks like."""

    rng = np.random.default_rng(3)

    def truth(self):
        from tests.runtime.builders import edges_of

        labels = self.rng.integers(0, 4, (6, 12)).repeat(32, 0).repeat(32, 1)
        return edges_of(labels.astype(np.uint8))[None]

    def judge(self, live, candidate):
        usual = EdgeStats.of(live, None, 4)  # edges are judged by the comparison alone
        return CHECKS.disagrees(
            EdgeComparison.of(live, candidate, 4, ShadowConfig().edge_tolerance), usual, usual, ShadowConfig()
        )

    def worse(self, truth, missed, invented):
        """A live version that misses blocks of the edges and sees some where there are none."""
        gone = self.rng.random((6, 12)).repeat(32, 0).repeat(32, 1)[None] < missed
        false = self.rng.random(truth.shape) < invented
        return np.where(gone, 0, truth) | np.where(false, 1 << self.rng.integers(0, 4), 0).astype(np.int32)

    @pytest.mark.parametrize(("missed", "invented"), [(0, 0), (0.3, 0), (0.8, 0), (0.5, 0.02), (0, 0.05)])
    def test_a_right_candidate_passes_whatever_the_live_version_misses_or_invents(self, missed, invented):
        truth = self.truth()
        live = self.worse(truth, missed, invented)
        assert self.judge(live, truth) is None
        assert self.judge(truth, live) is None

    def test_a_pixel_beside_is_the_same_edge(self):
        truth = self.truth()
        assert self.judge(truth, np.roll(truth, (1, 1), (1, 2))) is None

    def test_edges_somewhere_else_are_not(self):
        truth = self.truth()
        assert "beyond chance" in self.judge(truth, np.roll(truth, (12, 12), (1, 2)))

    def test_noise_of_the_same_density_is_not(self):
        truth = self.truth()
        noise = self.rng.permutation(truth.reshape(-1)).reshape(truth.shape)
        assert "beyond chance" in self.judge(truth, noise)

    def test_edges_everywhere_are_not(self):
        truth = self.truth()
        assert "beyond chance" in self.judge(truth, np.full_like(truth, 15))

    def test_classes_that_changed_places_are_not(self):
        truth = self.truth()
        turned = ((truth << 1) | (truth >> 3)) & 15
        assert "mixed up" in self.judge(truth, turned)

    def test_two_classes_that_changed_places_among_four_may(self):
        """Half of what is seen is still called what it was: the golden frames and the gate judge that."""
        truth = self.truth()
        swapped = (truth & 12) | ((truth & 1) << 1) | ((truth & 2) >> 1)
        assert self.judge(truth, swapped) is None

    def test_where_the_live_version_sees_none_there_is_nothing_to_agree_with(self):
        assert self.judge(np.zeros_like(self.truth()), self.truth()) is None
