from __future__ import annotations

import ast
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest

from adapt.data.street import scenes
from bench.demo import run, streets, train_pack, vehicle
from networks.labels import STREET
from networks.pack import load_pack
from runtime.client import Answer, Rejected
from tests.waits import PATIENCE, until

DEMO = Path(run.__file__).parent


def test_only_the_scoring_can_reach_target_labels() -> None:
    """``streets.heldout`` and ``streets.truth`` are named nowhere else; the vehicle does not know streets."""
    for file in DEMO.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {n.name for n in ast.walk(tree) if isinstance(n, ast.alias)}
        if file.name == "statistics_choice.py":  # a measurement of its own; the demo does not import it
            continue
        assert "statistics_choice" not in names
        if file.name not in ("scoring.py", "streets.py"):
            assert not names & {"heldout", "truth"} - (
                {"heldout"} if file.name in ("__main__.py", "run.py") else set()
            ), file
        if file.name in ("__main__.py", "run.py"):
            # There `heldout` is a number among the settings.
            for n in ast.walk(tree):
                if isinstance(n, ast.Attribute) and n.attr == "heldout":
                    assert isinstance(n.value, ast.Name)
                    assert n.value.id in ("settings", "a", "default")
        if file.name == "vehicle.py":
            assert not any("street" in name or name.startswith("adapt") for name in names), file


def test_the_scoring_is_made_after_vehicle_and_adapter_have_ended() -> None:
    body = (DEMO / "run.py").read_text(encoding="utf-8")
    assert body.index("stop(vehicle)") < body.index("exam = Exam(")
    assert body.index("= adapt_once(") < body.index("exam = Exam(")


def test_no_street_has_two_uses() -> None:
    used = [
        set(
            range(
                streets.STREAM_SEED + streets.ROOM * k,
                streets.STREAM_SEED + streets.ROOM * k + streets.DRIVES,
            )
        )
        for k in range(50)
    ]
    used += [
        set(range(streets.HELDOUT_SEED + streets.ROOM * k, streets.HELDOUT_SEED + streets.ROOM * k + 200))
        for k in range(50)
    ]
    used += [set(range(first, first + 10_000)) for first in (train_pack.TRAIN_SEED, train_pack.HOLDOUT_SEED)]
    used += [set(range(train_pack.REPLAY_SEED, train_pack.REPLAY_SEED + 60_000))]
    assert sum(map(len, used)) == len(set().union(*used))


def test_the_vehicle_sees_the_frames_of_a_drive() -> None:
    frames = streets.stream(3, "fog", drives=2, frames=2)
    labels = streets.truth(3, "fog", drives=2, frames=2)
    assert frames.shape == (4, *scenes.SIZE, 3)
    frame, label = scenes.render(streets.STREAM_SEED + 3 * streets.ROOM + 1, "fog")
    np.testing.assert_array_equal(frames[2], frame)
    np.testing.assert_array_equal(labels[2], label)


sent_all = threading.Event()


class Server:
    """Answers, refuses and fails in turn."""

    def __init__(self, target: str) -> None:
        self.asked = 0
        self.lock = threading.Lock()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def infer(self, model: str, frame: np.ndarray, **told: Any) -> Answer:
        with self.lock:
            self.asked += 1
            turn = self.asked % 5
        if turn == 3:
            raise Rejected("the queue is full", "RESOURCE_EXHAUSTED")
        if turn == 4:
            raise _Gone
        if turn == 0:
            assert sent_all.wait(PATIENCE)
        confidence = np.full(frame.shape[:2], 51, np.uint8)
        return Answer(7, frame[..., 0], confidence, {}, {})


class _Gone(grpc.RpcError):
    @staticmethod
    def code() -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE


def test_the_vehicle_accounts_for_every_frame_and_waits_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second:
        """One second of a clock of our own; then the camera is told to stop, and what waits is answered."""

        now = 0.0

        def is_set(self) -> bool:
            return self.now >= 1.0

        def wait(self, seconds: float) -> bool:
            self.now += seconds
            if self.is_set():
                sent_all.set()
            return self.is_set()

    monkeypatch.setattr(vehicle, "Client", Server)
    stop = Second()
    clock = SimpleNamespace(monotonic=lambda: stop.now, time=lambda: 1e9 + stop.now)
    monkeypatch.setattr(vehicle, "time", clock)
    sent_all.clear()
    account = vehicle.drive("x", "m", np.zeros((3, 4, 4, 3), np.uint8), 50.0, tmp_path / "log", stop)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert account["sent"] == len(lines) == account["answered"] + account["rejected"] + account["failed"]
    # Open loop: fifty a second for one second, although every fifth answer comes after all were sent.
    assert account["sent"] == 50
    assert {line["outcome"] for line in lines} == {"answered", "rejected", "failed"}
    answered = [line for line in lines if line["outcome"] == "answered"]
    assert {line["version"] for line in answered} == {7}
    assert {line["confidence"] for line in answered} == {0.2}
    assert all(line["ms"] >= 1000 * (line["done"] - line["sent"]) - 1 for line in lines)
    assert sorted(line["index"] for line in lines) == list(range(account["sent"]))


def request(due: float, ms: float, version: int = 1, outcome: str = "answered") -> dict[str, Any]:
    return {
        "due": due,
        "done": due + ms / 1000,
        "ms": ms,
        "version": version,
        "outcome": outcome,
        "confidence": 0.5,
    }


def event(at: float, state: str, version: int = 2) -> dict[str, Any]:
    return {"time": at, "state": state, "version": version, "check": "", "reason": "", "detail": {}}


def test_latencies_belong_to_their_phase() -> None:
    requests = [
        request(100 + i / 10, 10.0 if i < 100 else 30.0 if i < 130 else 20.0, 1 if i < 120 else 2)
        for i in range(200)
    ]
    events = [
        event(99, "LIVE", 1),
        event(110, "SUBMITTED"),
        event(111, "VERIFIED"),
        event(112, "LIVE"),
        event(112, "NOTE"),
    ]
    found = run.timings(requests, events, 102.0, 112.5)
    numbers = found["numbers"]
    assert numbers["swap_seconds"] == 2.0
    assert numbers["versions_seen"] == [1, 2]
    assert numbers["p99_ms_before"] == 10.0
    assert numbers["p50_ms_during"] == 30.0
    assert numbers["p99_ms_after"] == 20.0
    assert found["phases"]["during"] == [10.0, 13.0]
    assert found["phases"]["after"][1] == pytest.approx(19.9)
    assert [e["state"] for e in found["events"]] == ["LIVE", "SUBMITTED", "VERIFIED", "LIVE"]


def test_a_swap_that_was_refused_has_no_time_and_one_version() -> None:
    requests = [request(100 + i / 10, 10.0) for i in range(100)]
    requests[3] = request(100.3, 1.0, 0, "rejected")
    found = run.timings(requests, [event(104, "SUBMITTED"), event(105, "REJECTED")], 101.0, 105.5)
    assert found["numbers"]["swap_seconds"] is None
    assert found["numbers"]["versions_seen"] == [1]
    assert found["numbers"]["requests_before"] == 9


def test_a_round_that_never_came_to_a_submission_leaves_the_swap_empty() -> None:
    found = run.timings([request(100 + i / 10, 10.0) for i in range(100)], [], 101.0, 105.5)
    assert found["numbers"]["swap_seconds"] is None
    assert found["numbers"]["requests_adapting"] > 40


def test_a_child_that_fails_is_named_and_ended(tmp_path: Path) -> None:
    with run.process("thing", ["json.tool", "--no-such-option"], tmp_path) as child:
        child.wait(PATIENCE)
        with pytest.raises(run.DemoError, match=r"did not start: .*no-such-option"):
            run.wait_ready(child, tmp_path / "thing.err")
    with run.process("sleeper", ["http.server", "0"], tmp_path) as child:
        assert child.poll() is None
    assert child.poll() is not None


def test_an_absent_pack_is_one_line_and_status_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "bench.demo",
            "--pack",
            str(tmp_path / "none"),
            "--out",
            str(tmp_path / "out"),
        ],
        cwd=run.ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("demo: pack ")
    assert done.stderr.count("\n") == 1


def test_the_shipped_pack_is_whole_and_small() -> None:
    pack = load_pack(run.PACK)
    assert pack.spec.classes == STREET.classes
    assert pack.spec.parent == ""
    assert len(pack.replay("train")) >= 32
    assert len(pack.replay("holdout")) >= 16
    assert len(pack.golden()) >= 4
    assert sum(f.stat().st_size for f in run.PACK.rglob("*") if f.is_file()) < 8_000_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_demo_that_is_stopped_ends_its_children(tmp_path: Path, number: int) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-m", "bench.demo", "--out", str(tmp_path), "--frames", "90"],
        cwd=run.ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell's background job has it
    )
    log = tmp_path / "seed-0" / "vehicle.jsonl"
    until(lambda: (log.is_file() and log.stat().st_size) or demo.poll() is not None, 10 * PATIENCE)
    assert demo.poll() is None
    demo.send_signal(number)
    said = demo.communicate(timeout=PATIENCE)[1]
    assert demo.returncode == 1
    assert "interrupted" in said.splitlines()[-1]
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in left


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_whole_job_in_small(tmp_path: Path) -> None:
    settings = run.Settings(
        before=2.0,
        after=3.0,
        frames=24,
        steps=12,
        heldout=10,
        drives=8,
        along=10,
        patience=600.0,
        portions="0.4",
    )
    record = run.run_seed(7, tmp_path, settings, lambda *_, **__: None)
    assert record["swapped"]
    assert record["versions_seen"] == [1, 2]
    assert record["failed"] == 0
    assert record["sent"] == record["answered"] + record["rejected"]
    assert record["miou_source"] > record["miou_before"] + 0.10
    assert record["miou_after"] > record["miou_before"]
    again = run.run_seed(7, tmp_path, settings, lambda *_, **__: None)  # over the remains of the first
    assert again["miou_before"] == record["miou_before"]
