"""The judgements against counts that can be checked by hand, and against the cases they exist for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtime.checks.segmentation import AnswerStats, Comparison, SegmentationChecks
from runtime.config import GuardConfig, ShadowConfig

NAMES = ("road", "car", "tree", "sky")
CHECKS = SegmentationChecks(NAMES)


def frame(*rows):
    return np.array(rows, np.uint8)[None]


def test_a_look_counts_what_is_there():
    labels = frame([0, 0, 1], [3, 3, 255])
    confidence = frame([255, 100, 10], [64, 63, 62])
    seen = AnswerStats.of(labels, confidence, 4)
    assert seen.counts.tolist() == [2, 1, 0, 2]
    assert seen.pixels == 6
    assert seen.shares.tolist() == pytest.approx([2 / 6, 1 / 6, 0, 2 / 6])
    assert seen.mean_confidence == pytest.approx((255 + 100 + 10 + 64 + 63 + 62) / 6)
    assert seen.impossible == 1  # 255/4 is 63; one below it is left to rounding
    assert (seen.edges, seen.pairs) == (2, 4)


@given(hnp.arrays(np.uint8, (2, 4, 5), elements=st.integers(0, 3)), hnp.arrays(np.uint8, (2, 4, 5)))
def test_looks_add(labels, confidence):
    both = AnswerStats.of(labels, confidence, 4)
    halves = AnswerStats.of(labels[:1], confidence[:1], 4) + AnswerStats.of(labels[1:], confidence[1:], 4)
    assert both.counts.tolist() == halves.counts.tolist()
    assert vars(both) | {"counts": 0} == vars(halves) | {"counts": 0}


@given(
    hnp.arrays(np.uint8, (1, 6, 6), elements=st.integers(0, 3)),
    hnp.arrays(np.uint8, (1, 6, 6), elements=st.integers(0, 3)),
)
def test_agreement_and_kappa_are_the_textbooks(live, candidate):
    seen = Comparison.of(live, candidate, 4)
    assert seen.agreement == pytest.approx((live == candidate).mean())
    p, q = (np.bincount(x.reshape(-1), minlength=4) / x.size for x in (live, candidate))
    chance = float((p * q).sum())
    if chance < 1:
        assert seen.kappa == pytest.approx(((live == candidate).mean() - chance) / (1 - chance))


def test_nan_is_seen_in_the_probabilities_and_in_the_confidence_alone():
    good = AnswerStats.of(frame([0, 1]), frame([200, 200]), 4)
    assert CHECKS.not_finite(good, {"probabilities": np.array([0.5, 0.5])}, None) is None
    assert "NaN" in CHECKS.not_finite(good, {"probabilities": np.array([0.5, np.nan])}, None)
    assert "NaN" in CHECKS.not_finite(good, {"probabilities": np.array([0.5, np.inf])}, None)
    assert "no finite logits" in CHECKS.not_finite(AnswerStats.of(frame([0, 0]), frame([0, 0]), 4), {}, None)


def shares(*values):
    labels = np.repeat(np.arange(len(values)), [int(v * 1000) for v in values]).astype(np.uint8)
    return AnswerStats.of(labels[None, None], np.full_like(labels, 200)[None, None], 4)


def test_collapse():
    limits = GuardConfig()
    even = shares(0.4, 0.3, 0.2, 0.1)
    assert CHECKS.collapsed(even, None, limits, 0.0) is None
    assert "'road' takes 99" in CHECKS.collapsed(shares(0.99, 0.01), None, limits, 0.0)
    assert "'road' takes" in CHECKS.collapsed(shares(0.99, 0.01), even, limits, 1.0)
    assert CHECKS.collapsed(shares(0.99, 0.01), shares(0.99, 0.01), limits, 0.0) is None
    assert "'sky'" in CHECKS.collapsed(shares(0.5, 0.3, 0.2, 0.0), even, limits, 0.0)
    assert CHECKS.collapsed(shares(0.5, 0.3, 0.2, 0.0), even, limits, 0.3) is None
    # a class that the reference hardly shows may go
    assert CHECKS.collapsed(shares(0.6, 0.4), shares(0.6, 0.36, 0.04), limits, 0.0) is None


class TestAgreement:
    """What a good adapted model looks like beside what rubbish looks like."""

    rng = np.random.default_rng(3)
    truth = rng.integers(0, 4, (8, 8)).repeat(16, 0).repeat(16, 1).astype(np.uint8)[None]

    def judge(self, live, candidate, confidence=180):
        limits = ShadowConfig()
        sure = np.full(live.shape, 160, np.uint8)
        mine, theirs = (
            AnswerStats.of(candidate, np.full_like(sure, confidence), 4),
            AnswerStats.of(live, sure, 4),
        )
        return CHECKS.disagrees(Comparison.of(live, candidate, 4), mine, theirs, limits)

    def wrong_here(self, share):
        """A live version that calls a part of the blocks something else, as one does in a foreign domain."""
        other = (self.truth + 1) % 4
        blocks = self.rng.random((8, 8)).repeat(16, 0).repeat(16, 1)[None] < share
        return np.where(blocks, other, self.truth).astype(np.uint8)

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6])
    def test_a_right_candidate_passes_even_where_the_live_version_is_mostly_wrong(self, share):
        assert self.judge(self.wrong_here(share), self.truth) is None

    def test_permuted_classes_do_not(self):
        assert self.judge(self.wrong_here(0.1), (self.truth + 2) % 4) is not None

    def test_noise_does_not(self):
        noise = self.rng.integers(0, 4, self.truth.shape).astype(np.uint8)
        assert self.judge(self.wrong_here(0.1), noise) is not None

    def test_a_speckled_one_does_not(self):
        noise = self.rng.integers(0, 4, self.truth.shape).astype(np.uint8)
        speckled = np.where(self.rng.random(self.truth.shape) < 0.4, noise, self.truth)
        assert "speckled" in self.judge(self.truth, speckled)

    def test_one_that_is_unsure_of_everything_does_not(self):
        assert "confidence" in self.judge(self.truth, self.truth, confidence=70)
