"""The soak counts every frame once, whatever happens to the server, and starts again what was killed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from bench import soak
from tests.waits import PATIENCE, until


class Server:
    """A client whose server dies now and then."""

    asked = 0

    def __init__(self, address):
        pass

    def infer(self, model, frame, **_):
        from runtime.client import Rejected

        Server.asked += 1
        if Server.asked % 5 == 0:
            raise Rejected("killed", "UNAVAILABLE")
        if frame.max() == 7:
            raise Rejected("queue full", "RESOURCE_EXHAUSTED")
        return SimpleNamespace(version=3, labels=np.zeros(frame.shape[:2], np.uint8))

    def close(self):
        pass


def test_sent_is_answered_and_rejected(monkeypatch):
    import runtime.client

    Server.asked = 0
    monkeypatch.setattr(runtime.client, "Client", Server)
    frames = np.zeros((30, 4, 6, 3), np.uint8)
    frames[::10] = 7
    camera = soak.Camera("nowhere", frames, rate=300.0)
    camera.start()
    camera.join(PATIENCE)
    account = camera.account
    assert account["sent"] == 30
    assert account["rejected"] == 3
    assert account["answered"] == 27
    assert account["lost"] == 0
    assert account["attempts"] == Server.asked > 30
    assert sorted(camera.answers) == [i for i in range(30) if i % 10]
    assert len(camera.lines) == 30


def test_a_killed_process_is_started_again(tmp_path):
    child = soak.Child("sleeper", ["timeit", "-n", "1", "-s", "import time", "time.sleep(600)"], tmp_path)
    child.ensure()
    first = child.child
    child.ensure()
    assert child.child is first
    until(child.rss)
    child.kill()
    assert child.rss() == 0
    child.ensure()
    assert (child.starts, child.kills, child.ends) == (2, 1, [-9])
    assert child.stop() == -15
    assert sys.executable


def test_bytes_below_a_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    (tmp_path / "c").write_bytes(b"123")
    assert soak.size_of(tmp_path) == 8


def test_the_road_changes_every_phase():
    frames, labels, domains = soak.render(seconds=12.0, rate=2.0, phase=4.0, seed=0)
    assert len(frames) == len(labels) == len(domains) == 24
    assert domains[0] == "day"
    assert list(dict.fromkeys(domains)) == list(soak.DOMAINS[:3])


def test_the_curve_is_drawn():
    found = {
        "phase": 30.0,
        "killed": [(12.0, "server")],
        "curve": {"served": [0.5, float("nan"), 0.4], "frozen": [0.3] * 3, "labelled bound": [0.6] * 3},
    }
    svg = soak.draw(found)
    assert svg.count("<polyline") == 3
    assert "✕ s" in svg


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_short_soak_keeps_every_promise(tmp_path):
    out = str(tmp_path / "soak")
    command = ["--minutes", "2.75", "--phase", "30", "--kill-every", "22", "--first-kill", "25"]
    assert soak.main([*command, "--out", out, "--pack", str(tmp_path / "pack")]) == 0
