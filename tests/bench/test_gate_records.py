"""Records of rounds are judged by the gate as it is now, and called what their labels say."""

from __future__ import annotations

import json

import numpy as np
import pytest

import networks
from bench import gate_records as bench
from networks.pack import write_pack
from tests.adapt.conftest import CLASSES, toy_scene, toy_spec

SHARE = [0.4, 0.3, 0.2, 0.1]


def measures(**changes):
    return {
        "share": SHARE,
        "confidence": 0.8,
        "flip": 0.85,
        "variety": 3.5,
        "information": 0.9,
        "source": 0.6,
        "translated": 0.5,
        **changes,
    }


@pytest.fixture
def folder(tmp_path):
    """A seed's folder as bench.ordering leaves it: two rounds, one of two stages."""
    network = networks.create("roadnet", classes=CLASSES, width=8)
    replay = [(*toy_scene(i), "train" if i < 4 else "holdout") for i in range(6)]
    (tmp_path / "seed0" / "results").mkdir(parents=True)
    folder = tmp_path / "seed0"
    pack = write_pack(folder / "source", toy_spec(), network.state_dict(), replay=replay)

    def result(name, **told):
        (folder / "results" / f"{name}.json").write_text(json.dumps(told))

    def round_(name, stages, **more):
        (folder / "rounds" / name).mkdir(parents=True)
        report = {
            "parent": pack.sha256,
            "chosen": "train-1",
            "distance": 0.02,
            "parent_measures": measures(),
            "reference_measures": measures(),
            "stages": stages,
            **more,
        }
        (folder / "rounds" / name / "report.json").write_text(json.dumps(report))

    result("source", miou=0.40)
    result("adabn", miou=0.45)
    round_(
        "cbst",
        {
            "train-1": {"measures": measures(), "failed": ["layout"]},
            "train-2": {"measures": measures(translated=0.4)},
        },
    )
    result("cbst", stages={"train-1": 0.50, "train-2": 0.30})
    round_("st", {"train-1": {"measures": measures(), "failed": ["agreement"]}})
    result("st", stages={"train-1": 0.42})
    round_("of another pack", {"train-1": {"measures": measures()}}, parent="f" * 64)
    result("of another pack", stages={"train-1": 0.42})
    return tmp_path


def test_every_stage_is_judged_with_the_limits_of_today(folder, capsys):
    rows = {(r["round"], r["stage"]): r for r in bench.judged(folder / "seed0", "toy")}
    assert set(rows) == {("cbst", "train-1"), ("cbst", "train-2"), ("st", "train-1")}
    first, second, st = rows["cbst", "train-1"], rows["cbst", "train-2"], rows["st", "train-1"]
    assert (first["truth"], first["failed"], first["failed_then"]) == ("good", [], ["layout"])
    assert second["truth"] == "bad"
    assert set(second["failed"]) == {"source-translated", "parent-translated"}
    assert (st["truth"], st["failed"]) == ("needless", ["agreement"])
    assert bench.main([str(folder)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["shifts"][folder.name]
    assert (found["good_passed"], found["bad_refused"], found["needless_refused"]) == (1, 1, 1)
    assert bench.main([str(folder / "seed0")]) == 1  # no seed below it


def test_shares_of_the_source_are_those_of_its_training_labels(folder):
    from networks.pack import load_pack

    _, share = bench.source_of(load_pack(folder / "seed0" / "source"))
    labels = np.concatenate([toy_scene(i)[1].ravel() for i in range(4)])
    np.testing.assert_allclose(share, np.bincount(labels, minlength=CLASSES) / labels.size)
