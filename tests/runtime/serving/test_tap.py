"""The tap gives what was answered, loses its oldest when it is slow, and never delays an answer."""

from __future__ import annotations

import dataclasses
import time
import types

import numpy as np
import pytest

from runtime.client import Client, Rejected
from runtime.config import TapConfig
from runtime.serving.tap import Observation, TapSubscription
from tests.runtime import builders as b
from tests.waits import until


def test_a_subscriber_gets_the_frames_and_their_answers(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    rng = np.random.default_rng(0)
    pairs = [b.blocks(rng) for _ in range(5)]
    begun = time.time()
    with (
        Client(server.target) as client,
        client.frames("road") as front,
        client.frames("road", source="rear") as rear,
    ):
        for index, (frame, labels) in enumerate(pairs):
            answer = client.infer("road", frame, source="rear" if index == 3 else "front")
            assert (answer.labels == labels).all()
        for index, (frame, labels) in enumerate(pairs):
            seen = next(front)
            assert (seen.frame == frame).all()
            assert (seen.labels == labels).all()
            assert seen.confidence.shape == labels.shape
            assert (seen.model, seen.version, seen.dropped) == ("road", 1, 0)
            assert seen.source == ("rear" if index == 3 else "front")
            assert begun <= seen.time <= time.time()
        assert (next(rear).frame == pairs[3][0]).all()
        client.infer("road", pairs[0][0], outputs=("labels",))
        assert next(front).confidence is None


def test_a_slow_subscriber_loses_its_oldest_and_delays_nobody(repository, quick, serve):
    """gRPC's own buffers take some messages; the bounded queue behind them is what loses frames."""
    model = b.segmentation(*b.nearest_weights(), (256, 256))
    b.publish(repository, model=model, size=(256, 256), answers=golden_large())
    server = serve(dataclasses.replace(quick, tap=TapConfig(queue=2)))
    frame, _ = b.blocks(np.random.default_rng(0), (256, 256))
    with Client(server.target) as client, Client(server.target) as other, other.frames("road") as tap:
        client.infer("road", frame)
        assert next(tap).dropped == 0
        for _ in range(60):  # a subscriber that delayed them would end the test here
            client.infer("road", frame)
        assert server.service.tap.subscriptions[0].dropped > 0
        for _ in range(40):
            seen = next(tap)
            if seen.dropped:
                break
        assert seen.dropped > 0


def golden_large():
    """Expected answers by hand: blocks of pure colours are their own labels."""
    rng = np.random.default_rng(7)
    frames, labels = zip(*(b.blocks(rng, (256, 256)) for _ in range(2)), strict=True)
    return {
        "frames": np.stack(frames),
        "labels": np.stack(labels),
        "confidence": np.full((2, 256, 256), 253, np.uint8),
    }


@pytest.mark.parametrize(("offered", "wanted", "kept"), [(100, 20, 20), (7, 5, 5), (10, 30, 10), (30, 0, 30)])
def test_the_rate_is_kept(monkeypatch, offered, wanted, kept):
    """Ten seconds of a camera, by a clock of our own."""
    now = [1000.0]
    monkeypatch.setattr("runtime.serving.tap.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    tap = TapSubscription("road", "", max_fps=wanted, limit=10_000)
    blank = np.zeros((1, 2, 2, 3), np.uint8)
    for _ in range(10 * offered):
        tap.offer(Observation("road", 1, "", blank, {"labels": blank[..., 0]}, 0.0))
        now[0] += 1 / offered
    assert len(tap._queue) == pytest.approx(10 * kept, abs=2)


def test_limits(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, tap=TapConfig(subscribers=1)))
    with Client(server.target) as client:
        with pytest.raises(Rejected, match="unknown model"):
            client.frames("nope")
        with pytest.raises(Rejected, match="max_fps"):
            client.frames("road", max_fps=-1)
        with client.frames("road"), pytest.raises(Rejected, match="subscribers already"):
            client.frames("road")
        until(lambda: not server.service.tap.subscriptions)  # the first one's place is free again
        client.frames("road").close()


def test_a_subscriber_sees_the_end_of_the_server(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    with Client(server.target) as client:
        tap = client.frames("road")
        server.stop()
        assert list(tap) == []


def test_streams_are_limited(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, streams=2))
    with Client(server.target) as client, client.watch(), client.watch():
        with pytest.raises(Rejected, match="2 streams are open"):
            client.watch()
        assert client.status()["models"]["road"]["ready"]
