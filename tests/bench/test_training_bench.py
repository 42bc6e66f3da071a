"""bench.training measures what it says: rows in turns, bytes that fall with the cut, JSON as last line."""

from __future__ import annotations

import json

import torch

from bench import training


def test_a_small_run_ends_with_its_json(capsys, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(training, "labelling", lambda *a: {"hard_ms": 1.0, "soft_ms": 2.0})
    told = ["--size", "32x64", "--batch", "1+1", "--rounds", "1", "--rows", "MRKLD,memory", "--points", "2"]
    assert training.main(told) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert [row["row"] for row in found["rows"]] == [
        "plain PyTorch, cross-entropy",
        "preset default",
        "MRKLD",
        "half the memory",
    ]
    assert all(row["ms"] > 0 for row in found["rows"])
    whole, last, norms = found["cuts"]
    assert last["bytes"] < whole["bytes"]
    assert whole["saved_measured"] == whole["saved"]
    assert last["saved_measured"] < norms["saved_measured"] < whole["saved_measured"]
    assert "bytes of training" in text


def test_a_device_that_is_not_there_is_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training.main(["--device", "cuda"]) == 1
    assert "no CUDA device" in capsys.readouterr().err
