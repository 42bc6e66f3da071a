"""bench.export measures what it says, on a network small enough for a test."""

from __future__ import annotations

import json

import pytest

from bench.export import main


@pytest.mark.slow
def test_its_last_line_is_one_json_object(capsys):
    words = ["--networks", "roadnet", "--size", "64x128", "--rounds", "1", "--frames", "1", "--builds", "1"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,), (other,) = found["export"], found["variants"]
    assert (row["network"], row["size"], other["network"]) == ("roadnet", "64x128", "roadnet")
    for key in ("write_s", "build_s", "refit_s", "load_s", "engine_ms", "torch_ms", "int8_ms", "ratio"):
        assert row[key] > 0
    assert other["no_head"] < other["full_softmax"]


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--frames", "0"], ["--networks", "nope"]])
def test_wrong_usage(words):
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
