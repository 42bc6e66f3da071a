"""The on-device loop: against a server that is played, and (slow) against the real one with kill -9."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from adapt.round import RoundConfig
from adapt.run import Loop, LoopConfig, LoopError, main
from tests.adapt.conftest import toy_scene
from tests.waits import PATIENCE, until

QUICK = RoundConfig(portions=(0.4,), steps=4, source=2, target=2, checkpoint_every=2, rate=1e-3)
LABELS = np.zeros((32, 64), np.uint8)


@dataclass
class Played:
    """A client that sees dark bands and answers a submission as told."""

    verdict: str = "LIVE"
    fail_first: int = 0
    submitted: list[int] = field(default_factory=list)
    dropped_streams: int = 0

    def frames(self, model: str, *, max_fps: float, source: str):
        import grpc

        def stream():
            for i in range(40):
                if self.dropped_streams and i == 3:
                    self.dropped_streams -= 1
                    error = grpc.RpcError()
                    error.code = lambda: grpc.StatusCode.UNAVAILABLE
                    error.details = lambda: "gone"
                    raise error
                yield SimpleNamespace(
                    time=float(i),
                    source="front",
                    model=model,
                    version=1,
                    frame=toy_scene(200 + i, dark=True)[0],
                    labels=LABELS,
                    confidence=LABELS + 200,
                    dropped=0,
                )

        return stream()

    def submit(self, model: str, version: int):
        import grpc

        if self.fail_first:
            self.fail_first -= 1
            error = grpc.RpcError()
            error.code = lambda: grpc.StatusCode.UNAVAILABLE
            error.details = lambda: "gone"
            raise error
        self.submitted.append(version)
        for state in ("SUBMITTED", "VERIFIED", self.verdict):
            yield SimpleNamespace(
                time=0.0, state=state, check="golden" if state == "REJECTED" else "", reason="", detail={}
            )


def loop(client, pack, tmp_path: Path, *, build=None, clock=time.monotonic, **changes) -> Loop:
    config = LoopConfig(**{"model": "road", "frames": 14, "near": 0, "round": QUICK, **changes})
    return Loop(
        client,
        pack,
        tmp_path / "repo",
        tmp_path / "work",
        config,
        progress=lambda *a, **k: None,
        build=build or (lambda *a: 2),
        say=lambda text: None,
        clock=clock,
    )


def test_collects_adapts_builds_submits_and_reports(toy_pack, tmp_path):
    client = Played(dropped_streams=1, fail_first=1)
    built = []

    def build(pack, repository, model, adaptation, gate):
        built.append((pack.spec.parent, model, adaptation["chosen"], gate["passed"]))
        return 7

    report = loop(client, toy_pack, tmp_path, build=build).once()
    assert report["state"] == "LIVE"
    assert report["version"] == 7
    assert client.submitted == [7]
    assert built == [(toy_pack.sha256, "road", report["adaptation"]["chosen"], True)]
    assert [e["state"] for e in report["events"]] == ["SUBMITTED", "VERIFIED", "LIVE"]
    assert json.loads((tmp_path / "work" / "round-0001" / "loop.json").read_text()) == report
    state = json.loads((tmp_path / "work" / "loop.json").read_text())
    assert (state["round"], state["phase"], state["last"]) == (2, "collect", "LIVE")
    assert state["used_up_to"] == 14


def test_a_rejection_by_the_server_is_reported_with_its_check(toy_pack, tmp_path):
    report = loop(Played("REJECTED"), toy_pack, tmp_path).once()
    assert report["state"] == "REJECTED"
    assert report["reason"] == "golden"


def test_a_round_the_gate_refuses_is_never_built(toy_pack, tmp_path):
    def build(*_):
        raise AssertionError("must not be called")

    bad = RoundConfig(**{**vars(QUICK), "adabn": False, "rate": 3.0, "schedule": "constant", "steps": 12})
    client = Played()
    report = loop(client, toy_pack, tmp_path, build=build, round=bad).once()
    assert report["state"] == "REFUSED"
    assert report["reason"]
    assert client.submitted == []


@pytest.mark.parametrize("where", ["build", "submit"])
def test_stopped_in_between_it_goes_on_where_it_was(toy_pack, tmp_path, where):
    """The same frames, the same weights, no second collection."""

    class Killed(BaseException):
        pass

    def build(*_):
        raise Killed

    class Broken(Played):
        def submit(self, model, version):
            raise Killed

    first = loop(Broken(), toy_pack, tmp_path, build=build if where == "build" else None)
    with pytest.raises(Killed):
        first.once()
    frames = first.state["frames"]
    first.close()

    class Silent(Played):
        def frames(self, model, *, max_fps, source):
            raise AssertionError("must not collect again")

    second = loop(Silent(), toy_pack, tmp_path)
    assert second.state["phase"] == ("round" if where == "build" else "submit")
    report = second.once()
    assert report["state"] == "LIVE"
    assert report["frames"] == len(frames)


def test_with_patience_a_round_begins_with_fewer(toy_pack, tmp_path):
    now = [0.0]

    class Still(Played):
        def frames(self, model, *, max_fps, source):
            first = list(super().frames(model, max_fps=max_fps, source=source))[:9]
            yield from first
            until(lambda: len(still.store) == 9)
            while True:
                now[0] += 0.1
                time.sleep(0.02)
                yield first[-1]

    told = {"frames": 30, "patience": 0.3, "near": 2}
    still = loop(Still(), toy_pack, tmp_path, clock=lambda: now[0], **told)
    assert still.once()["frames"] == 9


def test_a_workdir_of_another_pack_is_refused(toy_pack, toy_pack_without_replay, tmp_path):
    first = loop(Played(), toy_pack, tmp_path)
    first.once()
    with pytest.raises(LoopError, match="in use by another adapter"):
        loop(Played(), toy_pack, tmp_path)
    first.close()
    with pytest.raises(LoopError, match="belongs to pack"):
        loop(Played(), toy_pack_without_replay, tmp_path)
    (tmp_path / "work" / "loop.json").write_text("{")
    with pytest.raises(LoopError, match="is damaged"):
        loop(Played(), toy_pack, tmp_path)


def test_a_missing_pack_ends_with_one_line(capsys, tmp_path):
    arguments = ["--server", "127.0.0.1:1", "--model", "m", "--pack", str(tmp_path / "no"), "--nice", "0"]
    assert main([*arguments, "--repository", str(tmp_path), "--workdir", str(tmp_path / "w"), "--once"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_repository_or_server_is_said_at_once_and_not_after_an_hour(
    toy_pack, capsys, tmp_path, monkeypatch
):
    from adapt.loop import startup
    from runtime.repository.repository import Repository

    monkeypatch.setattr(startup, "FIRST_CONTACT", 0.3)
    base = ["--server", "127.0.0.1:1", "--pack", str(toy_pack.path), "--workdir", str(tmp_path / "w")]
    base += ["--model", "road", "--nice", "0", "--once", "--quiet"]
    assert main([*base, "--repository", str(tmp_path / "none")]) == 1
    assert "holds no version of 'road'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    home = Repository(tmp_path / "repo")
    staged = home.stage("road")
    (staged / "model.onnx").write_bytes(b"engine")
    home.publish("road", staged, {})
    assert main([*base, "--repository", str(home.path)]) == 1
    said = capsys.readouterr().err
    assert "server '127.0.0.1:1' did not answer" in said
    assert said.count("\n") == 1
    edges = ["--edge-pack", str(toy_pack.path), "--edge-model", "edges", "--group", "both"]
    assert main([*base, "--repository", str(home.path), *edges]) == 1
    assert "is roadnet, which has no edge head" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- with the real server
class Service:
    """runtime.serve in its own process."""

    def __init__(self, repository: Path, log: Path) -> None:
        self.log = open(log, "w+")  # noqa: SIM115
        config = log.with_suffix(".toml")
        config.write_text("[guard]\nlatency_slack_ms = 1e9\n")  # the same network on a machine that is busy
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "runtime.serve",
                "--repository",
                str(repository),
                "--port",
                "0",
                "--metrics-port",
                "0",
                "--config",
                str(config),
            ],
            stderr=self.log,
            stdout=subprocess.DEVNULL,
        )
        found = lambda: [w[5:] for w in log.read_text().split() if w.startswith("grpc=")]  # noqa: E731
        until(lambda: found() or self.process.poll() is not None)
        assert found(), log.read_text()
        self.address = found()[0]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        self.log.close()


@pytest.mark.slow
def test_the_adapter_killed_at_any_phase_ends_with_one_live_version(toy_pack, tmp_path):
    """kill -9 in collection and in training: started again it finishes, and perception never stops."""
    from export.build import build
    from runtime.client import Client
    from runtime.repository.repository import Repository

    repository = tmp_path / "repo"
    build(toy_pack, repository, model="road")
    service = Service(repository, tmp_path / "serve.log")
    stop, seen, failures = threading.Event(), [], []

    index = tmp_path / "work" / "frames" / "index.sqlite"

    def kept() -> int:
        try:
            with closing(sqlite3.connect(f"file:{index}?mode=ro", uri=True)) as db:
                return int(db.execute("SELECT count(*) FROM frames").fetchone()[0])
        except sqlite3.Error:
            return 0

    def car() -> None:
        """Shows a scene until it is kept: the round has the same frames on every machine."""
        with Client(service.address) as client:
            while not stop.is_set():
                try:
                    frame = toy_scene(200 + min(kept(), 13), dark=True)[0]
                    seen.append(client.infer("road", frame, source="front").version)
                except Exception as error:
                    failures.append(error)
                stop.wait(0.05)

    thread = threading.Thread(target=car)
    thread.start()
    command = [
        sys.executable,
        "-m",
        "adapt.run",
        "--server",
        service.address,
        "--model",
        "road",
        "--pack",
        str(toy_pack.path),
        "--repository",
        str(repository),
        "--workdir",
        str(tmp_path / "work"),
        "--frames",
        "14",
        "--near",
        "0",
        "--max-fps",
        "50",
        "--portions",
        ".3,.5",
        "--steps",
        "40",
        "--batch",
        "2+2",
        "--once",
        "--json",
        "--nice",
        "0",
        "--set",
        "checkpoint_every=5",
        "--set",
        "force=true",  # what the gate says of the toy on these frames is not asked here
    ]
    try:
        # a frame is kept; a step of the first portion is; the whole first portion is
        for sign in ("frames/index.sqlite", "round-0001/**/checkpoint.pt", "round-0001/**/*[!t].pt"):
            with open(tmp_path / "adapt.log", "w") as log:
                child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
            until(
                lambda: any((tmp_path / "work").glob(sign)) or child.poll() is not None,  # noqa: B023
                5 * PATIENCE,
            )
            assert child.poll() is None, (sign, (tmp_path / "adapt.log").read_text())
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        done = subprocess.run(command, capture_output=True, text=True, timeout=5 * PATIENCE)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout.strip().splitlines()[-1])
        assert report["state"] == "LIVE"
        live = Repository(repository).live("road")
        assert live["live"] == report["version"]
        until(lambda: seen[-1] == report["version"])
    finally:
        stop.set()
        thread.join()
        service.close()
    assert not failures
    assert seen[-1] == report["version"]
    assert set(seen) == {1, report["version"]}
