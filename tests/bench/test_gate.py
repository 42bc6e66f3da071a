"""The bench of the gate spoils what it says it spoils, and calls bad what labels call bad."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import networks
from adapt.data.street import scenes
from adapt.gate.limits import Limits
from bench import continual
from bench import gate as bench
from networks.labels import STREET
from networks.pack import PackSpec, write_pack
from tests.adapt.conftest import toy_spec


def a_record(**changes):
    share = [0.5, 0.3, 0.15, 0.05]
    measures = {
        "share": share,
        "confidence": 0.8,
        "flip": 0.85,
        "variety": 3.1,
        "information": 0.9,
        "source": 0.6,
    }
    stage = {"miou": 0.5, "source": 0.6, "measures": measures, "moved": 0.02, "agree": 0.9, "extra": {}}
    record = {
        "key": "good/dusk/0",
        "kind": "good",
        "seed": 0,
        "before": 0.4,
        "source_before": 0.6,
        "looked": [],
        "parent": measures,
        "source_share": share,
        "statistics": {**stage, "miou": 0.48},
        "train-1": stage,
    }
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


@pytest.fixture(scope="module")
def street_pack(tmp_path_factory):
    """An untrained network of the bench's classes and size, with replay and hold-out."""
    torch.manual_seed(0)
    spec = PackSpec(
        name="street-small",
        version="1.0.0",
        network="roadnet",
        arguments={"width": 8},
        classes=STREET.classes,
        colours=STREET.colours,
        size=bench.SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        training="none",
        licence="Apache-2.0",
    )
    network = networks.create("roadnet", classes=len(spec.classes), width=8)
    pairs = [scenes.render(i, "day", bench.SIZE) for i in range(6)]
    replay = [(*pair, "train" if i < 4 else "holdout") for i, pair in enumerate(pairs)]
    path = tmp_path_factory.mktemp("packs") / "street"
    return write_pack(path, spec, network.state_dict(), replay=replay, golden=np.stack([pairs[0][0]]))


def test_a_case_is_recorded_with_every_candidate_and_its_labels_are_corrupted(
    street_pack, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        bench,
        "exam",
        lambda seed, domain, count=40: [scenes.render(700_000 + i, domain, bench.SIZE) for i in range(6)],
    )
    seen = []
    monkeypatch.setitem(bench.RELABEL, "label-flipped", lambda y, seed: seen.append(seed) or y)
    monkeypatch.setattr(
        bench,
        "road",
        lambda seed, domain: [frame for frame, _ in scenes.drive(600_000, domain, 8, bench.SIZE, step=2.5)],
    )
    case = bench.Case("label-flipped", "dusk", 3, (("steps", 2), ("source", 2), ("target", 2)))
    record = json.loads(json.dumps(bench.run_case(street_pack, case, tmp_path)))
    assert record["key"] == "label-flipped/dusk/3"
    assert {"statistics", "train-1"} <= set(record)
    assert record["train-1"]["moved"] > record["statistics"]["moved"] == 0.0
    assert seen == [3] * 6, "every frame that is learnt from, and no other"
    assert {c["name"] for c in record["looked"]} >= {"frames-contrast", "frames-motion"}
    assert len(record["source_share"]) == 12
    assert not (tmp_path / "work").exists()
    names = {c.name for c in bench.verdict(record, Limits(), street_pack.spec)}
    assert names >= {"agreement", "distance", "source-holdout"}


def test_the_labelled_bound_of_a_changing_road_learns_the_true_labels(street_pack, tmp_path, monkeypatch):
    frames = list(scenes.drive(600_000, "dusk", 8, bench.SIZE, step=2.5))
    truth = {x.tobytes(): y for x, y in frames}
    config = replace(continual.RECIPE, steps=1, source=2, target=2)
    method = continual.Rounds(street_pack, config, tmp_path / "work", truth)
    labels = []
    original = continual.GivenLabels.label
    monkeypatch.setattr(
        continual.GivenLabels, "label", lambda self, task: labels.append(original(self, task)) or labels[-1]
    )
    method._round([x for x, _ in frames], config)
    assert method.log[0]["stages"].keys() >= {"train-1"}
    assert all(any(y is t for t in truth.values()) for y in labels[0].maps)
    assert method.live != continual.RELEASED, "the bound has no gate"
