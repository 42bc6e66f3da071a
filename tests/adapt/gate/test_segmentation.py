"""The gate's single decisions."""

from __future__ import annotations

import numpy as np
import pytest

from adapt.gate.limits import Limits
from adapt.gate.measures import Measures
from adapt.gate.segmentation import cumulative, decide
from tests.adapt.conftest import toy_spec

LIMITS = Limits()


def measures(**changes) -> Measures:
    rng = np.random.default_rng(0)
    base = {
        "share": np.array([0.5, 0.3, 0.15, 0.05]),
        "confidence": 0.8,
        "flip": 0.85,
        "variety": 3.1,
        "information": 0.9,
        "source": 0.6,
        "labels": [rng.integers(0, 4, (8, 8)).astype(np.uint8)],
    }
    return Measures(**{**base, **changes})


def failed(candidate: Measures, **more) -> list[str]:
    checks = decide(candidate, measures(), measures(), more.pop("moved", 0.02), toy_spec(), LIMITS, **more)
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
    checks = decide(lost, lost, measures(), 0.0, toy_spec(), LIMITS)
    assert [c.name for c in checks if not c.passed] == ["flip-parent"]


def test_distance_and_classes_the_source_hardly_has():
    assert failed(measures(), moved=0.8) == ["distance"]
    gone = measures(share=np.array([0.55, 0.3, 0.15, 0.0]))
    assert failed(gone) == ["class-vanished"]
    assert failed(gone, source_share=np.array([0.5, 0.3, 0.2, 0.0])) == []


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
    checks = decide(measures(**{**reference, **candidate}), before, before, 0.02, toy_spec(), LIMITS)
    # Here the reference is the parent, so that a fall in the target's colours is one against both.
    both = ["source-translated", "parent-translated"] if check == "source-translated" else [check]
    assert [c.name for c in checks if not c.passed] == both


def test_harmless_steps_may_not_add_up():
    fine = cumulative(measures(source=0.57), 0.6, 0.3, LIMITS)
    assert all(c.passed for c in fine)
    far = cumulative(measures(source=0.5), 0.6, 0.9, LIMITS)
    assert [c.name for c in far if not c.passed] == ["total-distance", "total-source-holdout"]
    assert [c.name for c in cumulative(measures(), float("nan"), 0.1, LIMITS)] == ["total-distance"]
