"""Versions that are too slow: by a clock of our own, or by a factor that no machine makes up for."""

from __future__ import annotations

import dataclasses

import pytest

from runtime.client import Client
from runtime.config import GuardConfig, ShadowConfig, WatchConfig
from runtime.swap.watch import Baseline, Watch
from tests.runtime import builders as b
from tests.runtime.costs import Costs
from tests.runtime.swap.test_controller import Stream
from tests.waits import PATIENCE

W, B = b.nearest_weights()


def submit(server, model, version):
    with Client(server.target) as client:
        *_, last = client.submit(model, version)
        assert client.status()["models"][model]["live"] == (version if last.state == "LIVE" else 1)
    return last


def limited(config, slack=3.0):
    """The limits as they are in a vehicle: 2.5 times the live version's time and `slack` milliseconds."""
    return dataclasses.replace(config, guard=GuardConfig(max_latency_ratio=2.5, latency_slack_ms=slack))


@pytest.mark.parametrize(
    ("live", "candidate", "refused"),
    [
        (1.0, 5.4, False),  # 2.5 x 1 ms and 3 ms
        (1.0, 5.6, True),
        (40.0, 102.9, False),
        (40.0, 103.1, True),
        (0.01, 3.0, False),  # engines of a fast machine: the slack decides alone
        (0.01, 3.1, True),
    ],
)
def test_the_limit_is_a_multiple_of_what_the_live_version_took(
    repository, quick, serve, monkeypatch, live, candidate, refused
):
    Costs(monkeypatch, live, candidate)
    b.publish(repository)
    server = serve(limited(quick))
    last = submit(server, "road", b.publish(repository))
    assert (last.state, last.check) == (("REJECTED", "latency") if refused else ("LIVE", ""))
    if refused:
        assert f"{candidate:.1f} ms a frame, the live version took {live:.1f}" in last.reason


def test_a_busy_machine_makes_no_version_slow(repository, quick, serve, monkeypatch):
    """Ten seconds of waiting for the processor are no cost of the engine."""
    costs = Costs(monkeypatch, 1.0, 1.0)
    b.publish(repository)
    server = serve(limited(quick))
    costs.waiting = 10_000.0
    assert submit(server, "road", b.publish(repository)).state == "LIVE"
    assert costs.wall > 10.0


@pytest.mark.parametrize(("cost", "refused"), [(5.9, False), (6.1, True)])
def test_a_version_that_is_slow_on_live_frames_alone(repository, driving, serve, monkeypatch, cost, refused):
    Costs(monkeypatch, 1.0, [1.0, 1.0, cost])  # two golden frames, then live ones
    b.publish(repository)
    shadow = dataclasses.replace(driving.shadow, max_latency_ratio=3.0)
    server = serve(dataclasses.replace(limited(driving), shadow=shadow))
    with Stream(server.target) as camera:
        last = submit(server, "road", b.publish(repository))
    assert (last.state, last.check) == (("REJECTED", "shadow-latency") if refused else ("LIVE", ""))
    assert not camera.failed


def test_twenty_times_as_slow_on_any_machine(repository, quick, serve):
    """Real engines and the real clock.  Without slack the ratio decides, and no noise is that large."""
    b.publish(repository)
    b.publish_edges(repository)
    server = serve(dataclasses.replace(limited(quick, slack=0.0), shadow=ShadowConfig(enabled=False)))
    for model, slow in (
        ("road", lambda: b.publish(repository, model=b.segmentation(W, B, depth=16, width=256))),
        ("edges", lambda: b.publish_edges(repository, model=b.edges(W, B, depth=60), answers=b.good_edges())),
    ):
        last = submit(server, model, slow())
        assert (last.state, last.check) == ("REJECTED", "latency"), last


@pytest.mark.parametrize(("runs", "ends"), [([7.1] * 20, True), ([6.9] * 20, False), ([90.0] * 19, False)])
def test_a_version_that_became_slow_in_its_watch_window(repository, quick, serve, runs, ends):
    """The median of twenty runs against four times the median before the flip, and 3 ms."""
    b.publish(repository)
    server = serve(quick)
    host = server.service.models.host("road")
    host.live.cpu_ms.extend(runs)
    back = []
    window = WatchConfig(seconds=PATIENCE if ends else 0.05, max_latency_ratio=4.0)
    config = dataclasses.replace(limited(quick), watch=window)
    Watch(host, host.live, Baseline(1.0, 0.0), config, lambda *what: back.append(what)).run()
    assert [check for _, check, *_ in back] == (["watch-latency"] if ends else [])
