"""`python -m bench.int8` on a tiny pack: a row for each variant, then one JSON object as the last line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from bench import int8 as bench
from networks.pack import write_pack
from tests.export.conftest import SIZE, describe, street_like, weights


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    spec = describe()
    label = np.zeros(SIZE, np.uint8)
    replay = [(frame, label, "train") for frame in street_like(4)]
    path = tmp_path_factory.mktemp("packs") / "tiny"
    write_pack(path, spec, weights(spec), golden=street_like(1), replay=replay)
    return path


def test_prints_a_row_for_each_variant_and_ends_with_one_json_object(pack, capsys):
    assert bench.main([str(pack), "--frames", "2", "--rounds", "2"]) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert rows["fp32"]["agreement"] == rows["fp32"]["speed"] == 1.0
    assert {"recipe", "tensorrt encoding", "every operator", "frames at random 2"} <= set(rows)
    assert all(0.5 < row["agreement"] <= 1 and row["cpu_ms"] > 0 for row in rows.values())


def test_too_few_frames_are_one_line_and_exit_1(pack, capsys):
    assert bench.main([str(pack), "--frames", "4"]) == 1
    error = capsys.readouterr().err
    assert "has 4 training frames and 1 golden ones; give it more than 4" in error
    assert error.count("\n") == 1
