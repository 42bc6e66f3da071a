"""Batching, latest-frame-wins and the rest of the configuration, through the whole server."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from runtime.client import Client, Rejected
from runtime.config import QueueConfig
from runtime.drift import DriftConfig
from tests.runtime import builders as b
from tests.runtime.adapters import Adapter
from tests.runtime.scenarios.test_kill import Process
from tests.waits import PATIENCE, until

DASHBOARD = Path(__file__).resolve().parents[3] / "docs" / "observability" / "grafana.json"


def held(server):
    """Holds the engine until the event is set; returns (event, sizes of the runs)."""
    engine = server.service.models.host("road").live.engine
    gate, run, sizes = threading.Event(), engine.run, []

    def wait(inputs, names):
        assert gate.wait(PATIENCE)
        sizes.append(len(inputs["frame"]))
        return run(inputs, names)

    engine.run = wait
    return gate, sizes


def test_requests_that_wait_share_a_run_and_each_gets_its_own_answer(repository, quick, serve):
    b.publish(repository, model=b.segmentation(*b.nearest_weights(), batch="N"), batch="N")
    server = serve(dataclasses.replace(quick, queue=QueueConfig(max_batch=4)))
    gate, sizes = held(server)
    host = server.service.models.host("road")
    wrong = []

    def send(seed):
        frame, labels = b.blocks(np.random.default_rng(seed))
        with Client(server.target) as client:
            wrong.append(int((client.infer("road", frame).labels != labels).sum()))

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(8)]
    for index, thread in enumerate(threads):
        thread.start()
        until(lambda n=index: server.service.account.snapshot().in_flight == n + 1)
    until(lambda: host.pending == 7)
    gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert wrong == [0] * 8
    assert sizes == [1, 4, 3]
    now = host.statistics_of(1).snapshot()
    assert (now.success, now.executions, now.inferences) == (8, 3, 8)
    assert {size: counts[0] for size, counts in now.batches.items()} == {1: 1, 3: 1, 4: 1}


def test_a_newer_frame_of_the_same_camera_replaces_the_one_that_waits(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, queue=QueueConfig(policy="latest")))
    gate, sizes = held(server)
    host = server.service.models.host("road")
    ends = {}

    def send(name, source):
        with Client(server.target) as client:
            try:
                ends[name] = client.infer("road", np.zeros((*b.SIZE, 3), np.uint8), source=source).version
            except Rejected as refusal:
                ends[name] = refusal.reason

    threads = []
    for count, (name, source) in enumerate(
        [("runs", "front"), ("old", "front"), ("rear", "rear"), ("new", "front")]
    ):
        threads.append(threading.Thread(target=send, args=(name, source)))
        threads[-1].start()
        until(lambda n=count: server.service.account.snapshot().accepted == n + 1)
        until(lambda n=count: host.pending == min(n, 2))
    until(lambda: "old" in ends)
    assert "a newer frame of source 'front' has arrived" in ends["old"]
    gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert {name: ends[name] for name in ("runs", "rear", "new")} == {"runs": 1, "rear": 1, "new": 1}
    assert len(sizes) == 3
    account = server.service.account.snapshot()
    assert (account.accepted, account.answered, account.rejected) == (4, 3, {"stale": 1})


def test_hup_reads_the_limits_again(repository):
    b.publish(repository)
    server = Process(repository)
    config = Path(repository.path).parent / "server.toml"
    bad = b.publish(repository, model=b.segmentation(*b.nearest_weights(), depth=2, width=8))

    def hup(text, says):
        config.write_text(text)
        os.kill(server.process.pid, signal.SIGHUP)
        until(lambda: any(says in line for line in server.lines))

    with Client(server.target) as client:
        hup("[guard]\nmin_golden_agrement = 2.0\n", "did you mean 'min_golden_agreement'")
        hup("port = 1\n[guard]\nmin_golden_agreement = 2.0\n", "need a new start")
        *_, last = client.submit("road", bad)
        assert (last.state, last.check) == ("REJECTED", "golden")
    assert server.end(signal.SIGTERM) == 0


def scrape(server):
    address = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(address, timeout=PATIENCE) as response:
        return response.read().decode()


@pytest.mark.filterwarnings("default")
def test_the_dashboard_asks_for_metrics_that_exist(repository, quick, serve):
    b.publish(repository)
    b.publish(repository, "simple", b.simple(), foreign=True)
    drift = DriftConfig(learn=8, block=2, max_fps=1e6, queue=64)  # no frame is lost
    server = serve(dataclasses.replace(quick, groups={"both": ["road", "simple"]}, drift=drift))
    second = b.publish(repository)
    said = {
        "phase": "round",
        "round": {"round": 1, "progress": 0.5, "loss": 0.5},
        "collection": {"on": True, "kept": 3},
        "pseudo_labels": {"labelled": 0.3, "classes": [{"name": "road", "threshold": 0.9}] * 2},
        "last": {"round": 1, "state": "LIVE"},
    }
    with Client(server.target) as client, Adapter(server.target, **said):
        for _ in range(20):
            client.infer("road", np.zeros((*b.SIZE, 3), np.uint8))
        (monitor, _, _) = server.service.monitors._monitors["road"]
        assert monitor.drain(PATIENCE)
        with pytest.raises(Rejected):
            client.infer("road", np.zeros((3, 3, 3), np.uint8))
        text = scrape(server)
        list(client.submit("road", second))
    samples = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))  # Prometheus refuses a page that says a thing twice
    present = set(re.findall(r"^([a-z_]+)(?:\{| )", text + scrape(server), re.MULTILINE))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"\b(?:nv_inference|roadworthy)_[a-z_]+", target["expr"])
    }
    assert len(asked) >= 15
    assert asked <= present
