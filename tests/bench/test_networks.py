"""`python -m bench.networks` on one tiny frame: the table, then one JSON object as the last line."""

from __future__ import annotations

import json

import pytest

from bench import networks as bench


def test_prints_a_table_and_ends_with_one_json_object(capsys):
    assert bench.main(["--networks", "roadnet", "--size", "64x96", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    result = json.loads(lines[-1])
    (row,) = result["rows"]
    assert (row["network"], row["size"], row["rounds"]) == ("roadnet", "64x96", 1)
    assert row["fp32_speed"] == 1.0
    assert all(row[f"{way}_cpu_ms"] > 0 for way in ("torch", "fp32", "int8_onnxruntime", "int8_tensorrt"))
    assert any(line.startswith("| roadnet") for line in lines)
    assert result["machine"]["load_after"] >= 0


def test_a_size_that_is_no_multiple_is_one_line_and_exit_1(capsys):
    assert bench.main(["--networks", "roadnet", "--size", "64x100"]) == 1
    assert "multiples of 32" in capsys.readouterr().err


def test_an_unreadable_size_is_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--size", "large"])
    assert stop.value.code == 2
    assert "'large' is not HxW" in capsys.readouterr().err
