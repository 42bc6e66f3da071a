"""Records of a work folder that are damaged in every way a file can be: one line, at once, bounded memory."""

from __future__ import annotations

import json
import os
import sqlite3

import numpy as np
import pytest

from adapt.frames.store import FrameStore, StoreError
from adapt.loop import Loop, LoopConfig, LoopError
from adapt.loop.budget import Budget, BudgetError, Meter
from adapt.round import RoundConfig, RoundError, adapt
from common.files import read_json


def pipe(path) -> None:
    os.mkfifo(path)


def giant(path) -> None:
    with path.open("wb") as file:
        file.truncate(2 << 30)


def written(text: str | bytes):
    return lambda path: path.write_bytes(text if isinstance(text, bytes) else text.encode())


DAMAGE = {
    "pipe": pipe,
    "giant": giant,
    "folder": lambda path: path.mkdir(),
    "surrogate": written('{"round": 1, "phase": "collect", "source": "\\ud800"}'),
    "long number": written('{"round": ' + "9" * 5000 + "}"),
    "deep": written("[" * 200_000),
    "not UTF-8": written(b"\xff\xfe{}"),
    "half": written('{"round": 1, "pha'),
    "empty": written(""),
}


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_a_damaged_record_is_a_value_or_os_error_of_one_line(tmp_path, kind):
    file = tmp_path / "x.json"
    DAMAGE[kind](file)
    with pytest.raises((ValueError, OSError)) as error:
        read_json(file)
    assert "\n" not in str(error.value).strip()


def test_a_record_is_read_as_it_was_written(tmp_path):
    told = {"a": [1, 2.5, None, "ü\u20ac\U0001f697"], "\\u": "\\ud800 in words"}
    (tmp_path / "x").write_text(json.dumps(told))
    assert read_json(tmp_path / "x") == told
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    with pytest.raises(ValueError, match="at most 4 are read"):
        read_json(tmp_path / "x", limit=4)


def a_loop(pack, work):
    return Loop(None, pack, work / "repo", work / "work", LoopConfig("m"), progress=lambda *a, **k: None)


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_the_loop_says_which_record_is_damaged(toy_pack, tmp_path, kind):
    (tmp_path / "work").mkdir()
    DAMAGE[kind](tmp_path / "work" / "loop.json")
    with pytest.raises(LoopError, match=r"loop\.json is damaged .*move it away") as error:
        a_loop(toy_pack, tmp_path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "change",
    [
        {"round": 10**30},
        {"round": -1},
        {"round": True},
        {"phase": "dance"},
        {"used": {"a": "b"}},
        {"used": [1]},
        {"used_up_to": 1 << 63},
        {"frames": ["x"]},
        {"frames": {"a": 1}},
        {"version": 1.5},
        {"pack": 7},
        {"phase": "round"},
        {"phase": "submit", "frames": []},
        {"answers": "one"},
        {"road_since": {"a": []}},
        {"used": None, "frames": 3},
        {"finished": "now"},
        {"finished": float("inf")},
        {"members": {"m": None}},
    ],
)
def test_a_loop_record_with_values_that_the_loop_never_writes_is_damaged(toy_pack, tmp_path, change):
    (tmp_path / "work").mkdir()
    whole = {"schema": 1, "pack": toy_pack.sha256, "round": 1, "phase": "collect", "used": {}}
    (tmp_path / "work" / "loop.json").write_text(json.dumps(whole))
    a_loop(toy_pack, tmp_path).close()
    (tmp_path / "work" / "loop.json").write_text(json.dumps({**whole, **change}))
    with pytest.raises(LoopError, match="is damaged"):
        a_loop(toy_pack, tmp_path)


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_a_budget_that_cannot_be_read_counts_as_spent(tmp_path, kind):
    DAMAGE[kind](tmp_path / "budget.json")
    with pytest.raises(BudgetError, match="is damaged"):
        Meter(Budget(seconds=5), tmp_path / "budget.json")
    assert "are spent" in Meter(Budget(seconds=5, period=60), tmp_path / "budget.json").exceeded()


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_a_round_whose_state_is_damaged_says_so(toy_pack, dark_frames, tmp_path, kind):
    DAMAGE[kind](tmp_path / "state.json")
    with pytest.raises(RoundError, match=r"state\.json is damaged|holds another round"):
        adapt(toy_pack, dark_frames, config=RoundConfig(portions=()), out=tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "giant", "folder", "not UTF-8"])
def test_an_index_that_is_none_is_refused_and_the_loop_begins_another(toy_pack, tmp_path, kind, capsys):
    store = tmp_path / "work" / "frames"
    store.mkdir(parents=True)
    DAMAGE[kind](store / "index.sqlite")
    with pytest.raises(StoreError, match="cannot be opened"):
        FrameStore(store)
    a_loop(toy_pack, tmp_path).close()
    assert "an empty one is begun" in capsys.readouterr().err


def a_store(path) -> FrameStore:
    store = FrameStore(path, near=0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        store.add(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    return store


def test_an_index_names_no_file_outside_the_store(tmp_path):
    """Nor is any read or deleted."""
    store = a_store(tmp_path / "s")
    outside = tmp_path / "mine.png"
    first = store.rows()[0]
    (tmp_path / "s" / "frames" / first.file).rename(outside)
    with sqlite3.connect(tmp_path / "s" / "index.sqlite") as db:
        db.execute("UPDATE frames SET file='../../mine.png' WHERE id=?", (first.id,))
    with pytest.raises(StoreError, match="none of the store's"):
        store.read(store.rows()[0])
    assert store.delete(ids=[first.id]) == 1
    assert outside.is_file()


@pytest.mark.parametrize("summary", ["[1, 2]", "nonsense", "7", "[" * 100_000])
def test_a_damaged_row_is_a_store_error(tmp_path, summary):
    store = a_store(tmp_path / "s")
    with sqlite3.connect(tmp_path / "s" / "index.sqlite") as db:
        db.execute("UPDATE frames SET summary=?", (summary,))
    if summary[0] != "7" and summary != "[1, 2]":
        with pytest.raises(StoreError, match="damaged row"):
            store.rows()
    store.close()
    with pytest.raises(StoreError, match="cannot be opened"):
        FrameStore(tmp_path / "s")
