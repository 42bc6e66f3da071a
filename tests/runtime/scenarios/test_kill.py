"""kill -9 of a real server process, at many moments of a swap: it starts again with the last live version."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from runtime.client import Client, Rejected
from tests.runtime import builders as b
from tests.waits import PATIENCE, until

ROOT = Path(__file__).resolve().parents[3]
CONFIG = """\
drain = 120.0
[engine]
threads = 1
[guard]
latency_slack_ms = 1e9
[shadow]
frames = 2
min_frames = 1
idle_timeout = 0.05
[watch]
seconds = 0.5
"""


class Process:
    """`python -m runtime.serve`, with its standard error read to the end."""

    def __init__(self, repository, *more):
        config = Path(repository.path).parent / "server.toml"
        config.write_text(CONFIG)
        command = [sys.executable, "-m", "runtime.serve", "--repository", str(repository.path)]
        command += ["--port", "0", "--metrics-port", "-1", "--config", str(config), *more]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        weakref.finalize(self, self.process.kill)  # a test that fails leaves none behind
        self.lines = []
        self.target = ""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.match(r"ready grpc=(\S+)", line):
                self.target = found.group(1)
                break
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        assert self.target, "".join(self.lines)

    def _read(self):
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def end(self, number):
        os.kill(self.process.pid, number)
        code = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        self.process.stderr.close()
        return code


def live(repository):
    return (repository.live("road") or {}).get("live")


def test_kill_in_mid_swap(repository):
    """Each round: a server is told to swap, and dies at or shortly after one of the swap's own steps."""
    rng = random.Random(4)
    b.publish(repository)
    answers = b.golden(b.segmentation(*b.nearest_weights()))
    frame, labels = b.blocks(np.random.default_rng(0))
    before = 1
    seen = set()
    for step in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4):  # events that were seen
        server = Process(repository)
        version = b.publish(repository, answers=answers)
        with Client(server.target) as client:
            answer = client.infer("road", frame, timeout=PATIENCE)
            assert answer.version == before, "the last live version is the one that answers after a kill"
            assert (answer.labels == labels).all()
            events = client.submit("road", version)
            states = [next(events).state for _ in range(step)]
            if 0 < step < 4:
                time.sleep(rng.uniform(0.0, 0.05))
            server.end(signal.SIGKILL)
        assert states == ["SUBMITTED", "VERIFIED", "SHADOWING", "LIVE"][:step]
        after = live(repository)
        assert step < 4 or after == version, "LIVE is said when it is so for good"
        assert after in (None, before, version)
        before = after if after is not None else before
        seen.add(after == version)
    assert True in seen
    server = Process(repository)
    with Client(server.target) as client:
        assert client.infer("road", frame, timeout=PATIENCE).version == before
    assert server.end(signal.SIGTERM) == 0


def test_sigterm_drains(repository):
    """What is in flight is answered, what comes later is refused with a reason, health says so first."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    slow = b.segmentation(*b.nearest_weights(), (64, 64), depth=12, width=64)
    b.publish(
        repository,
        model=slow,
        size=(64, 64),
        answers=b.golden(b.segmentation(*b.nearest_weights(), (64, 64)), size=(64, 64)),
    )
    server = Process(repository)
    frame, _ = b.blocks(np.random.default_rng(0), (64, 64))
    ends = []

    def send():
        with Client(server.target) as client:
            try:
                ends.append(client.infer("road", frame, timeout=PATIENCE).version)
            except Rejected as refusal:
                ends.append(refusal.reason)

    with grpc.insecure_channel(server.target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest()
        assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
        statuses = health.Watch(request)
        assert next(statuses).status == health_pb2.HealthCheckResponse.SERVING
        threads = [threading.Thread(target=send) for _ in range(6)]
        with Client(server.target) as client:
            for thread in threads:
                thread.start()
            until(lambda: client.status()["account"]["accepted"] == 6)
        os.kill(server.process.pid, signal.SIGTERM)
        assert next(statuses).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for thread in threads:
            thread.join(PATIENCE)
    assert server.process.wait(PATIENCE) == 0
    server.reader.join(PATIENCE)
    server.process.stderr.close()
    assert ends == [1] * 6


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "--repository is needed"),
        (["--repository", "/proc/none/there"], 1, "does not exist; make one"),
        (["--repository", "README.md"], 1, "is not a directory; make one"),
        (["--repository", "{tmp}", "--port", "99999"], 1, "port = 99999: must be from 0 to 65535"),
        (["--repository", "{tmp}", "--config", "{tmp}/none.toml"], 1, "cannot be read"),
        (["--repository", "{tmp}", "--port", "1", "--host", "256.0.0.1"], 1, "cannot listen"),
        (["--help"], 0, ""),
    ],
)
def test_exit_codes_and_one_line_errors(tmp_path, arguments, code, says):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "runtime.serve", "--log", "error", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert code != 1 or done.stderr.count("\n") == 1, done.stderr


def test_a_second_server_does_not_share_the_port(repository, tmp_path):
    b.publish(repository)
    server = Process(repository)
    port = server.target.rsplit(":", 1)[1]
    other = tmp_path / "other"
    other.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "runtime.serve", "--repository", str(other), "--port", port],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1
    assert "is another server there" in done.stderr.splitlines()[-1]
    assert "add_port" not in done.stderr
    assert server.end(signal.SIGTERM) == 0


def test_one_server_for_one_repository(repository):
    """A second one is refused in one line; kill -9 lets go; reading needs no lock and changes nothing."""
    b.publish(repository)
    frame, _ = b.blocks(np.random.default_rng(0))
    server = Process(repository)
    command = [sys.executable, "-m", "runtime.serve", "--log", "error", "--port", "0", "--repository"]
    done = subprocess.run(
        [*command, str(repository.path)], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"is served by another server (process {server.process.pid}); stop that one" in done.stderr
    before = b.tree(repository.path)
    onlooker = Process(repository, "--read-only")
    with Client(onlooker.target) as client:
        assert client.infer("road", frame, timeout=PATIENCE).version == 1
        for call in (
            lambda: list(client.submit("road", 1)),
            lambda: client.rollback("road"),
            lambda: client.freeze("road", "driving"),
            lambda: client.pin("road"),
        ):
            with pytest.raises(Rejected, match="changes nothing"):
                call()
    assert onlooker.end(signal.SIGTERM) == 0
    assert b.tree(repository.path) == before
    server.end(signal.SIGKILL)
    server = Process(repository)
    assert server.end(signal.SIGTERM) == 0
