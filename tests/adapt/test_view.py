"""Recordings for Rerun hold what the rounds and the tap had; read back with Rerun's own reader."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from adapt import view
from adapt.round.pictures import keep_pictures
from common.files import write_json
from tests.waits import PATIENCE


def a_workdir(path):
    folder = path / "round-0001"
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (16, 24, 3), np.uint8) for _ in range(3)]
    labels = [rng.integers(0, 2, (16, 24), np.uint8) for _ in range(3)]
    folder.mkdir(parents=True)
    keep_pictures(folder / "pictures", frames, {"before": labels, "after": labels}, (frames, labels))
    write_json(
        folder / "report.json",
        {
            "classes": ["road", "a sign/post"],
            "colours": [[1, 2, 3], [4, 5, 6]],
            "gate": {"checks": [{"name": "finite", "value": 1.0, "passed": True, "reason": "fine"}]},
            "stages": {"label-1": {"portion": 0.3, "lambda": [0.9, 0.4]}},
        },
    )
    events = [{"time": 10.0, "state": "LIVE", "check": "", "reason": ""}]
    write_json(folder / "loop.json", {"version": 4, "events": events})
    return path


class Told:
    """A recording that keeps what it is told."""

    def __init__(self):
        self.seen: list[tuple] = []

    def __getattr__(self, name):
        return lambda *a, **k: self.seen.append((name, *a))


def test_every_part_of_a_round_is_shown(tmp_path):
    told = Told()
    assert view.rounds(a_workdir(tmp_path), told) == 1
    kinds = {(s[0], s[1]) for s in told.seen if len(s) > 1}
    assert {("frame", "round/0/frame"), ("labels", "round/0/before"), ("labels", "round/2/label")} <= kinds
    assert ("number", "gate/finite") in kinds
    assert ("number", "lambda/a_sign_post") in kinds
    assert ("line", "swap", "version 4: LIVE") in told.seen
    with pytest.raises(view.ViewError, match="no finished round"):
        view.rounds(tmp_path / "empty", told)


class OnDisk(Told):
    """One that leaves a file, as Rerun's does from the first moment."""

    def __init__(self, name, save):
        super().__init__()
        self.rerun = None
        save.write_bytes(b"begun")


def test_a_view_that_fails_leaves_the_recording_that_was_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(view, "Recording", OnDisk)
    save = tmp_path / "r.rrd"
    save.write_bytes(b"yesterday's")
    (tmp_path / "empty").mkdir()
    assert view.main(["rounds", str(tmp_path / "empty"), "--save", str(save)]) == 1
    assert save.read_bytes() == b"yesterday's"
    assert view.main(["rounds", str(tmp_path / "empty"), "--save", str(tmp_path / "no" / "r.rrd")]) == 1
    assert "is no folder" in capsys.readouterr().err
    assert view.main(["rounds", str(a_workdir(tmp_path / "work")), "--save", str(save)]) == 0
    assert save.read_bytes() == b"begun"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "r.rrd", "work"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(view, "_live", interrupted)
    save.unlink()
    assert view.main(["live", "--server", "nobody:1", "--model", "m", "--save", str(save)]) == 0
    assert save.read_bytes() == b"begun"


def test_a_round_that_was_put_aside_is_not_shown(tmp_path):
    a_workdir(tmp_path)
    (tmp_path / "round-0001").rename(tmp_path / "round-0001.lost-17")
    a_workdir(tmp_path)
    assert view.rounds(tmp_path, Told()) == 1


def test_live_frames_with_their_answers(tmp_path):
    told = Told()
    frame = np.zeros((4, 6, 3), np.uint8)
    item = SimpleNamespace(
        frame=frame,
        labels=np.zeros((1, 4, 6), np.uint8),
        confidence=np.full((4, 6), 51, np.uint8),
        time=5.0,
        source="front left",
        version=3,
        edges=None,
    )
    bare = SimpleNamespace(frame=frame, labels=None, confidence=None, time=6.0, source="", version=3)
    assert view.live(iter([item, bare, item]), told, most=2) == 2
    assert ("number", "front_left/mean confidence", 0.2) in told.seen
    assert sum(s[0] == "frame" for s in told.seen) == 2
    assert sum(s[0] == "labels" for s in told.seen) == 1


def test_without_rerun_the_remedy_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert view.main(["rounds", str(tmp_path), "--save", str(tmp_path / "r.rrd")]) == 1
    assert "roadworthy[view]" in capsys.readouterr().err


@pytest.mark.peers
def test_a_recording_is_one_that_rerun_reads(tmp_path, capsys):
    pytest.importorskip("rerun", reason="needs the extra view (rerun-sdk)")
    file = tmp_path / "rounds.rrd"
    assert view.main(["rounds", str(a_workdir(tmp_path / "work")), "--save", str(file)]) == 0
    assert "1 rounds" in capsys.readouterr().out
    import subprocess
    from pathlib import Path

    rerun = Path(sys.executable).parent / "rerun"
    command = [str(rerun), "rrd", "print", "-v", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    for entity in ("/round/0/frame", "/gate/finite", "/lambda/a_sign_post", "/swap", "/version"):
        assert entity in done.stdout
