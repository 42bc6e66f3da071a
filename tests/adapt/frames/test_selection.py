"""Which frames are kept: every rule by itself, quota, reservoir, places, sealing, and the command."""

from __future__ import annotations

import json
import sqlite3
import time

import numpy as np
import pytest

from adapt.frames.__main__ import main, moment
from adapt.frames.encryption import Seal, SealError, new_key
from adapt.frames.selection import Candidate, Rules, Tally, metres, select
from adapt.frames.store import FrameStore, StoreError
from tests.adapt.frames.test_store import scene

BITS = np.zeros(64, bool)
OTHER = np.ones(64, bool)


def verdict(rules: Rules, *, last=None, recent=(), tally=None, **known):
    frame = Candidate(known.pop("time", 100.0), known.pop("bits", BITS), **known)
    return select(frame, recent, last, tally or Tally(), rules)


def test_every_rule_has_its_word():
    score = {"share": [0.5, 0.5], "score": 0.5}
    assert verdict(Rules()).keep
    assert verdict(Rules(), collect=False).rule == "opted-out"
    assert verdict(Rules(opt_in=True)).rule == "opted-out"
    assert verdict(Rules(opt_in=True), collect=True).keep
    assert verdict(Rules(), recent=[OTHER, BITS]).rule == "near-duplicate"
    assert verdict(Rules(near=-1), recent=[BITS]).keep
    assert verdict(Rules(low=0.6), summary=score).rule == "hopeless"
    assert verdict(Rules(high=0.4), summary=score).rule == "nothing-new"
    assert verdict(Rules(low=0.4, high=0.6), summary=score).keep
    assert verdict(Rules(low=0.6)).keep, "a frame without an answer has no score"


def test_time_and_travel():
    here, there = (48.0, 11.0), (48.0, 11.0 + 30 / 74_625)  # 30 m to the east at this latitude
    assert metres(here, there) == pytest.approx(30, rel=0.01)
    assert metres((0.0, 0.0), (0.0, 180.0)) == pytest.approx(np.pi * 6_371_008.8)
    both = Rules(seconds=5, metres=20)
    assert verdict(both, last=(97.0, here), place=here).rule == "too-soon"
    assert verdict(both, last=(97.0, here), place=there).keep, "it has travelled"
    assert verdict(both, last=(90.0, here), place=here).keep, "it has waited"
    assert verdict(both, last=(97.0, None), place=here).rule == "too-soon", "no place: time alone"
    assert verdict(both, last=(1e9, here), place=None).keep, "the clock jumped back"
    only = Rules(metres=20)
    assert verdict(only, last=(0.0, here), place=here).rule == "too-soon"
    assert verdict(only, last=(99.0, None), place=here).keep


def test_rare_classes_pass_the_score_up_to_their_quota():
    tally = Tally()
    for _ in range(30):
        tally.add({"share": [0.999, 0.001]}, False)
    rules = Rules(high=0.5, quota=0.1)
    frame = {"share": [0.9, 0.1], "score": 0.9}
    found = verdict(rules, summary=frame, tally=tally)
    assert (found.keep, found.rare, found.why) == (True, True, "shows rare class 1")
    tally.rare = 3
    assert verdict(rules, summary=frame, tally=tally).rule == "nothing-new"
    assert (
        verdict(rules, summary={"share": [0.999, 0.001], "score": 0.9}, tally=Tally()).rule == "nothing-new"
    )


@pytest.mark.parametrize("wrong", [{"evict": "newest"}, {"low": 0.9, "high": 0.1}, {"age": 0}, {"near": -2}])
def test_rules_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        Rules(**wrong)


def test_a_reservoir_is_a_sample_of_everything_that_came(tmp_path):
    """Every frame has the same chance to be there at the end: the mean of their numbers is that of all."""
    size = len(FrameStore(tmp_path / "one")._encode(scene(0)))
    means = []
    for seed in range(4):
        rules = Rules(evict="reservoir", near=-1)
        with FrameStore(tmp_path / str(seed), max_bytes=int(size * 10.5), rules=rules) as store:
            for i in range(40):
                store.add(scene(1000 * seed + i), at=float(i))
                assert store.bytes() <= store.max_bytes
            means.append(np.mean([row.time for row in store.rows()]))
    assert 12 < np.mean(means) < 27  # oldest-first would leave 34.5, first-come 4.5


def test_a_round_keeps_its_frames(tmp_path):
    size = len(FrameStore(tmp_path / "one")._encode(scene(0)))
    with FrameStore(tmp_path / "a", max_bytes=int(size * 3.5)) as store:
        for i in range(3):
            store.add(scene(i), at=float(i))
        store.pinned = {1, 2}
        for i in range(3, 8):
            store.add(scene(i), at=float(i))
        assert {1, 2} <= {row.id for row in store.rows()}


def test_a_store_of_the_first_schema_is_taken_over(tmp_path):
    with FrameStore(tmp_path) as store:
        store.add(scene(0), source="front", at=5.0)
    database = sqlite3.connect(tmp_path / "index.sqlite")
    with database:
        for column in ("latitude", "longitude", "rare"):
            database.execute(f"ALTER TABLE frames DROP COLUMN {column}")
        database.execute("UPDATE meta SET value='1' WHERE key='schema'")
    database.close()
    with FrameStore(tmp_path) as store:
        (row,) = store.rows()
        assert (row.source, row.place, row.rare) == ("front", None, False)
        store.add(scene(1), place=(1.0, 2.0))
        assert store.rows()[-1].place == (1.0, 2.0)


def test_places_that_are_none(tmp_path):
    with FrameStore(tmp_path) as store:
        for i, place in enumerate([(91.0, 0.0), (0.0, 181.0), (float("nan"), 0.0)]):
            store.add(scene(i), place=place)
        assert [row.place for row in store.rows()] == [None] * 3


# ------------------------------------------------------------------------------------------------ sealing
def test_sealed_pictures_are_read_with_the_key_alone(tmp_path):
    new_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    with FrameStore(tmp_path / "s", key=tmp_path / "key") as store:
        store.add(scene(0))
        (row,) = store.rows()
        np.testing.assert_array_equal(store.read(row), scene(0))
        content = (store.path / "frames" / row.file).read_bytes()
        assert b"PNG" not in content
    with FrameStore(tmp_path / "s") as store, pytest.raises(StoreError, match="give the key"):
        store.read(row)
    new_key(tmp_path / "other")
    with (
        FrameStore(tmp_path / "s", key=tmp_path / "other") as store,
        pytest.raises(StoreError, match="another key"),
    ):
        store.read(row)
    seal = Seal(tmp_path / "key")
    with pytest.raises(SealError, match="altered"):
        seal.open(content[:-1] + bytes([content[-1] ^ 1]), row.file)
    with pytest.raises(SealError, match="altered"):
        seal.open(content, "ab/other.png.aes")
    with pytest.raises(SealError, match="cannot be made"):
        new_key(tmp_path / "key")
    (tmp_path / "short").write_text("secret")
    with pytest.raises(StoreError, match="64 hexadecimal"):
        FrameStore(tmp_path / "s", key=tmp_path / "short")


# ------------------------------------------------------------------------------------------------ the command
def test_the_command(tmp_path, capsys):
    store_path = tmp_path / "store"
    with FrameStore(store_path) as store:
        for i in range(6):
            store.add(
                scene(i),
                source="front" if i < 4 else "rear",
                at=1e9 + i,
                summary={"score": 0.5},
                place=(48.0 + i, 11.0) if i < 5 else None,
            )
    base = [str(store_path)]
    assert main([*base, "list"]) == 0
    said = capsys.readouterr()
    assert said.out.count("\n") == 6
    assert "2001-09-09T01:46:40" in said.out
    assert "front 4, rear 2" in said.err
    assert main(["--json", *base, "list", "--source", "rear"]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == [5, 6]
    assert main([*base, "show", "2", "--out", str(tmp_path / "2.png")]) == 0
    assert (tmp_path / "2.png").is_file()
    assert main([*base, "export", str(tmp_path / "out"), "--before", str(1e9 + 2)]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000001.png", "000002.png", "index.json"]
    capsys.readouterr()
    assert main([*base, "purge", "--around", "50,11", "--within", "1000"]) == 0
    assert capsys.readouterr().out == "1 frames deleted\n"
    assert main([*base, "delete", "1"]) == 0
    assert main([*base, "delete", "1"]) == 1
    assert "holds no frame 1" in capsys.readouterr().err
    assert main([*base, "purge", "--before", str(1e9 + 2)]) == 0
    with FrameStore(store_path) as store:
        assert [row.id for row in store.rows()] == [4, 5, 6]
    with pytest.raises(SystemExit) as usage:
        main([*base, "purge"])
    assert usage.value.code == 2
    assert main([*base, "purge", "--all"]) == 0
    assert len(list((store_path / "frames").rglob("*.png"))) == 0
    assert main([str(tmp_path / "nowhere"), "list"]) == 1
    assert not (tmp_path / "nowhere").exists()
    assert main(["-", "keygen", str(tmp_path / "k")]) == 0
    assert len((tmp_path / "k").read_text().strip()) == 64


def test_what_is_purged_is_not_left_in_the_database(tmp_path):
    with FrameStore(tmp_path) as store:
        store.add(scene(0), source="a-very-private-street", at=5.0)
        store.delete(before=6.0)
    files = [p for p in tmp_path.iterdir() if p.is_file()]
    assert not any(b"a-very-private-street" in file.read_bytes() for file in files)


def test_moments():
    assert moment("2h", now=10_000.0) == 2800.0
    assert moment("1970-01-02") == 86_400.0
    assert moment("12.5") == 12.5
    for wrong in ("yesterday", "nan", "inf"):
        with pytest.raises(ValueError):
            moment(wrong)
    assert moment("0s") <= time.time()
