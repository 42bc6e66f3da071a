"""The bench of the paper's rows: what it tells a round, how it judges labels, what its tables say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adapt.evaluate.segmentation import Confusion
from adapt.round import RoundConfig
from bench import ordering
from bench.ordering import Shift, main, settings, table


def shift(**told) -> Shift:
    return Shift(
        "toy", None, [], [], [], ("pole",), ("road", "pole"), {"steps": 7, "scale": (1.0, 1.0), **told}
    )


def test_rows_differ_in_what_their_name_says_and_in_nothing_else():
    st, cbst, sp, mst = (settings(shift(), v, 3) for v in ("st", "cbst", "cbst-sp", "cbst-sp-mst"))
    changed = {
        name: {k for k in RoundConfig.__dataclass_fields__ if getattr(row, k) != getattr(cbst, k)}
        for name, row in (("st", st), ("sp", sp), ("mst", mst))
    }
    assert changed == {"st": {"policy"}, "sp": {"prior"}, "mst": {"prior", "label_flip", "label_scales"}}
    assert (cbst.seed, cbst.steps, cbst.force) == (3, 7, True)


def test_what_is_compared_is_pinned_against_changed_defaults():
    left = set(RoundConfig.__dataclass_fields__) - set(ordering.PLAIN)
    assert left <= {
        "steps",
        "source",
        "target",
        "crop",
        "scale",
        "seed",
        "limits",  # the shift's
        "threads",
        "device",
        "infer_batch",
        "checkpoint_every",
        "judge",  # do not change what is learnt
        "replay_limit",
        "source_holdout",
        "ignore_bottom",
        "ignore_border",
        "golden",
    }


def test_changes_are_json_and_reach_the_round():
    config = settings(shift(), 'plain+source_free=true+policy="st"+portions=[0.1, 0.2]', 0)
    assert (config.source_free, config.policy, config.portions) == (True, "st", (0.1, 0.2))
    assert settings(shift(), "preset:source-free", 0).source_free is True


def test_precision_and_recall_of_labels_by_hand():
    truth = np.array([0, 0, 0, 0, 1, 1], np.uint8)
    labels = np.array([0, 0, 255, 1, 1, 255], np.uint8)
    found = ordering._quality(Confusion(2).add(truth, labels), ("road", "pole"))
    assert found["labelled"] == pytest.approx(4 / 6)
    assert found["right"] == pytest.approx(3 / 4)
    assert found["precision"] == {"road": 1.0, "pole": 0.5}
    assert found["recall"] == {"road": 0.5, "pole": 0.5}


def test_the_table_has_mean_and_deviation_of_the_seeds():
    def result(road: float, pole: float) -> dict:
        return {"miou": (road + pole) / 2, "iou": {"road": road, "pole": pole}}

    text = table(
        {"cbst": {0: result(0.8, 0.2), 1: result(0.8, 0.4)}, "source": {0: result(0.5, 0.1)}}, ("pole",)
    )
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows[0] == "| source only | 30.0 | 10.0 | 10.0 | 50.0 | 1 |"
    assert rows[1] == "| CBST | 55.0 ± 7.1 | 30.0 ± 14.1 | 30.0 ± 14.1 | 80.0 ± 0.0 | 2 |"


def test_shares_of_the_parents_weights_in_a_table():
    found = {s: {"near": {"statistics alone": 0.5, "0.75": 0.5 + 0.02 * s}} for s in (0, 1)}
    lines = ordering.near_table(found).splitlines()
    assert lines[2:] == [
        "| seed 0 | 50.0 | 50.0 |",
        "| seed 1 | 50.0 | 52.0 |",
        "| **mean** | 50.0 ± 0.0 | 51.0 ± 1.4 |",
    ]


def test_an_unknown_row_and_an_empty_cache_end_with_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ordering, "open_shift", lambda *_: shift())
    for more, words in ((("--variant", "best"), "is unknown"), (("--table",), "holds no result")):
        assert main(["--shift", "street:dusk", "--seed", "0", "--out", str(tmp_path), *more]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    kept = tmp_path / "street-dusk" / "seed0" / "results"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "source.json").write_text(
        json.dumps(
            {"variant": "source", "seed": 0, "rare": ["pole"], "miou": 0.3, "iou": {"road": 0.5, "pole": 0.1}}
        )
    )
    assert main(["--shift", "street:dusk", "--out", str(tmp_path), "--table"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["miou"] == {"source": {"0": 0.3}}


def test_an_option_is_compared_with_the_same_round_without_it_seed_by_seed():
    base = "plain+portions=[0.35]+steps=60"
    found = {
        base: {0: {"miou": 0.5}, 1: {"miou": 0.6}},
        f"{base}+ema=0.99": {0: {"miou": 0.51}, 1: {"miou": 0.63}, 2: {"miou": 0.9}},  # 2 has no partner
        "cbst": {0: {"miou": 0.7}},
        "plain+source_free=true": {0: {"miou": 0.4}},
    }
    lines = ordering.options_table(found).splitlines()
    assert lines[0] == f"| against `{base}` (55.0 ± 7.1) | Δ mIoU | each seed |"
    assert lines[2:] == ["| `ema=0.99` | 2.0 ± 1.4 | +1.0, +3.0 |"]
    assert ordering.options_table({"cbst": {0: {"miou": 0.7}}}) == ""
