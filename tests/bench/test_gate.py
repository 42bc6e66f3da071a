"""The bench of the gate spoils what it says it spoils, and calls bad what labels call bad."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adapt.gate.segmentation import Limits
from bench import gate as bench
from tests.adapt.conftest import toy_spec


def a_record(**changes):
    share = [0.5, 0.3, 0.15, 0.05]
    measures = {
        "share": share, "confidence": 0.8, "flip": 0.85, "variety": 3.1, "information": 0.9, "source": 0.6,
    }  # fmt: skip
    stage = {"miou": 0.5, "source": 0.6, "measures": measures, "moved": 0.02, "agree": 0.9, "extra": {}}
    record = {
        "key": "good/dusk/0", "kind": "good", "seed": 0, "before": 0.4, "source_before": 0.6, "looked": [],
        "parent": measures, "source_share": share, "statistics": {**stage, "miou": 0.48}, "train-1": stage,
    }  # fmt: skip
    return {**record, **changes}


def test_there_are_enough_rounds_and_no_two_alike():
    cases = bench.cases()
    assert len(cases) >= 60
    assert len({c.key for c in cases}) == len(cases)
    kinds = {c.kind for c in cases}
    assert kinds >= set(bench.RELABEL)
    assert sum(c.kind.startswith("collapsed") for c in cases) >= 12


def test_bad_is_what_labels_call_bad():
    assert bench.truth(a_record()) == "good"
    stage = a_record()["train-1"]
    assert bench.truth(a_record(**{"train-1": {**stage, "miou": 0.38}})) == "bad"
    assert bench.truth(a_record(**{"train-1": {**stage, "source": 0.5}})) == "bad"
    assert bench.truth(a_record(**{"train-1": {**stage, "miou": 0.46}})) == "needless"
    broken = a_record()
    del broken["train-1"]
    assert bench.truth(broken) == "bad"


def test_the_verdict_is_the_gates_with_the_limits_given():
    record = a_record()
    assert all(c.passed for c in bench.verdict(record, Limits(), toy_spec()))
    stage = {**record["train-1"], "agree": 0.2}
    changed = {**record, "train-1": stage}
    failed = [c.name for c in bench.verdict(changed, Limits(), toy_spec()) if not c.passed]
    assert failed == ["agreement"]
    assert all(c.passed for c in bench.verdict(changed, Limits(agreement=0.1), toy_spec()))


@pytest.mark.parametrize("name", bench.RELABEL)
def test_every_hand_on_the_labels_changes_them_and_keeps_what_was_ignored(name):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 12, bench.SIZE).astype(np.uint8)
    out = bench.RELABEL[name](y, 1)
    assert out.shape == y.shape
    assert out.dtype == np.uint8
    assert (out != y).mean() > 0.05
    if name in ("label-flipped", "collapsed-softly"):
        y[:5] = 255
        assert (bench.RELABEL[name](y, 1)[:5] == 255).all()
    if name == "collapsed-one-class":
        assert len(np.unique(out)) == 1
    if name == "label-flipped":
        assert (out != y).all() or (y == 255).any()


def test_rubbish_is_no_road_and_moves():
    frames = bench.rubbish(3, 4)
    assert all(f.shape == (*bench.SIZE, 3) for f in frames)
    assert np.abs(frames[0].astype(int) - frames[1]).mean() > 5


def test_ranks_agree_with_themselves():
    assert bench.rank_correlation([1, 2, 3, 4], [2, 4, 6, 9]) == pytest.approx(1.0)
    assert math.isclose(bench.rank_correlation([1, 2, 3], [3, 2, 1]), -1.0)
