"""Drift: the stated false-alarm rate against simulation, hysteresis, the reference, hostile sources."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from runtime.drift import DriftConfig, DriftMonitor, SourceDrift, arl, detector, measure, signals, threshold
from tests.waits import PATIENCE

QUICK = DriftConfig(learn=64, block=4, false_alarm_hours=1.0, max_fps=10.0, min_interval=0.0, votes=1)


def run_lengths(
    h: float, k: float, runs: int, limit: int, rng: np.random.Generator, phi: float = 0.0
) -> float:
    """Mean run length of one-sided CUSUMs on AR(1) noise of long-run deviation 1; the textbook recursion."""
    scale = np.sqrt(1 - phi**2) * np.sqrt((1 - phi) / (1 + phi))
    x = rng.standard_normal(runs) * np.sqrt((1 - phi) / (1 + phi))
    s, length, alive = np.zeros(runs), np.full(runs, limit), np.ones(runs, bool)
    for step in range(1, limit + 1):
        x = phi * x + scale * rng.standard_normal(runs)
        s = np.maximum(0.0, s + x - k)
        now = alive & (s >= h)
        length[now] = step
        alive &= ~now
        if not alive.any():
            break
    return float(length.mean())


@pytest.mark.parametrize("k", [0.25, 0.5, 1.0])
def test_the_threshold_gives_the_rate_that_was_asked_for(k):
    h = threshold(500.0, k)
    assert arl(h, k) == pytest.approx(500.0, rel=1e-6)
    assert run_lengths(h, k, 3000, 6000, np.random.default_rng(0)) == pytest.approx(500.0, rel=0.1)


def test_a_published_run_length():
    """k = 0.5, h = 5: ARL₀ 930 (exact one-sided value 930.9 in Hawkins and Olwell's tables); h = 4: 335."""
    assert arl(5.0, 0.5) == pytest.approx(930.9, rel=0.02)
    assert arl(4.0, 0.5) == pytest.approx(335.4, rel=0.02)


def test_correlated_noise_of_the_same_long_run_deviation_alarms_no_more_often():
    h = threshold(300.0, 0.5)
    assert run_lengths(h, 0.5, 1500, 5000, np.random.default_rng(1), phi=0.6) > 300.0


def test_the_long_run_deviation_is_not_put_too_low():
    """AR(1) of deviation 1 and φ = .6 has the long-run deviation 2; what ignores φ says 1."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(300):
        x = np.empty(60)
        x[0] = rng.standard_normal()
        for i in range(1, 60):
            x[i] = 0.6 * x[i - 1] + 0.8 * rng.standard_normal()
        found.append(detector.long_run_deviation(x))
    assert 2.0 < np.median(found) < 3.0
    assert np.mean(np.array(found) < 0.7 * 2.0) < 0.1
    steady = [detector.long_run_deviation(rng.standard_normal(60)) for _ in range(300)]
    assert 1.0 < np.median(steady) < 1.3


def test_a_busier_street_is_no_less_sure():
    """Thin things are never sure: more of them lowers the mean confidence, and that is no drift."""
    base = np.zeros((2, signals.BINS))
    base[0, -1], base[1, 16] = 0.9, 0.1
    busy = np.zeros((2, signals.BINS))
    busy[0, -1], busy[1, 16] = 0.6, 0.4
    raw = float((busy.sum(0) - base.sum(0)) @ signals.LEVELS)
    assert raw < -0.1
    assert raw - signals.composition(busy, base) == pytest.approx(0.0, abs=1e-9)
    assert signals.wasserstein(busy, base) == pytest.approx(0.0)


# ---------------------------------------------------------------------------------------------- signals
def test_signals_are_what_they_say():
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    confidence = np.full((40, 60), 255, np.uint8)
    confidence[:, 30:] = 0
    sample = measure(labels, confidence, 3)
    assert sample.histogram.sum() == pytest.approx(1.0)
    assert sample.histogram[0, -1] == pytest.approx(0.5)
    assert sample.histogram[1, 0] == pytest.approx(0.5)
    assert sample.scalars["confidence"] == pytest.approx(0.5)
    assert sample.scalars["entropy"] == pytest.approx(np.log(2))
    assert sample.scalars["edges"] == pytest.approx(40 / (40 * 59 + 39 * 60))
    bits = np.zeros((40, 60), np.int32)
    bits[0] = 1 << 30
    assert measure(None, None, 31, edge_bits=bits).scalars["edge-density"] == pytest.approx(1 / 40)


def test_distances_against_scipy():
    spatial = pytest.importorskip("scipy.spatial.distance")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(7)), rng.dirichlet(np.ones(7))
    assert signals.js_distance(p, q) == pytest.approx(spatial.jensenshannon(p, q, base=2))
    a, b = rng.random((1, signals.BINS)), rng.random((1, signals.BINS))
    levels = np.arange(signals.BINS) / signals.BINS
    wanted = stats.wasserstein_distance(levels, levels, a[0], b[0])
    assert signals.wasserstein(a / a.sum(), b / b.sum()) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("labels", "confidence"),
    [(np.zeros(5, np.uint8), None), (np.zeros((4, 5), np.uint8), np.zeros((4, 4), np.uint8))],
)
def test_answers_of_an_odd_shape_are_refused(labels, confidence):
    with pytest.raises(ValueError, match="wanted"):
        measure(labels, confidence, 3)


# ---------------------------------------------------------------------------------------------- a source
def answer(rng: np.random.Generator, sure: float = 0.9, road: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """A road below a sky whose line and confidence vary from frame to frame."""
    labels = np.zeros((60, 80), np.uint8)
    labels[int(60 * np.clip(1 - road + 0.03 * rng.standard_normal(), 0.1, 0.95)) :] = 1
    level = np.clip(sure + 0.02 * rng.standard_normal(), 0, 1)
    confidence = np.clip(255 * (level + 0.05 * rng.standard_normal((60, 80))), 0, 255).astype(np.uint8)
    return labels, confidence


def feed(source: SourceDrift, rng, count: int, start: float = 0.0, **how) -> int | None:
    """The number of answers after which the state first changed, or None."""
    first = None
    for i in range(count):
        if source.add(measure(*answer(rng, **how), 2), None, start + i) and first is None:
            first = i + 1
    return first


def test_it_learns_stays_quiet_alarms_and_comes_back():
    rng = np.random.default_rng(4)
    source = SourceDrift("front", 2, QUICK)
    assert feed(source, rng, 64) == 64
    assert source.state == "in-domain"
    assert feed(source, rng, 2000) is None
    delay = feed(source, rng, 200, sure=0.8)
    assert source.state == "drifting"
    assert source.alarms == 1
    assert delay is not None
    assert delay <= 32
    assert "confidence" in source.reason
    assert feed(source, rng, 400) is not None
    assert source.state == "in-domain"
    assert source.alarms == 1
    assert feed(source, rng, 1000) is None


def test_another_street_is_no_drift_and_less_confidence_is():
    rng = np.random.default_rng(5)
    config = DriftConfig(**{**vars(QUICK), "votes": 3})
    one = SourceDrift("front", 2, config)
    feed(one, rng, 64)
    assert feed(one, rng, 400, road=0.3) is None
    assert "shares" in {s.name for s in one.status().signals if s.alarmed}
    assert feed(one, rng, 200, sure=0.8, road=0.3) is not None
    assert one.state == "drifting"
    assert "confidence" in one.reason


def test_two_alarms_are_kept_apart():
    rng = np.random.default_rng(6)
    source = SourceDrift("front", 2, DriftConfig(**{**vars(QUICK), "min_interval": 1e4}))
    feed(source, rng, 64)
    feed(source, rng, 100, start=100, sure=0.8)
    feed(source, rng, 400, start=200)
    assert (source.state, source.alarms) == ("in-domain", 1)
    feed(source, rng, 100, start=700, sure=0.8)
    assert (source.state, source.alarms) == ("in-domain", 1)
    feed(source, rng, 100, start=20000, sure=0.8)
    assert (source.state, source.alarms) == ("drifting", 2)


def test_far_from_the_versions_reference_from_the_start():
    rng = np.random.default_rng(7)
    reference = {"share": np.array([0.05, 0.95]), "confidence": np.zeros((2, 256), np.int64)}
    reference["confidence"][:, 250] = (50, 950)
    source = SourceDrift("front", 2, QUICK, reference)
    feed(source, rng, 64)
    assert source.state == "drifting"
    assert "reference" in source.reason
    sure = {"confidence": np.zeros((2, 256), np.int64)}
    sure["confidence"][:, 230] = (400, 600)
    for seen, state in ((0.9, "in-domain"), (0.6, "drifting")):
        source = SourceDrift("front", 2, QUICK, sure)
        feed(source, rng, 64, sure=seen)
        assert source.state == state
    near = {"share": np.array([0.4, 0.6])}
    source = SourceDrift("front", 2, QUICK, near)
    feed(source, rng, 64)
    assert source.state == "in-domain"


@pytest.mark.parametrize(
    "reference",
    [
        {"share": np.array([np.nan, 1.0])},
        {"share": np.ones(5)},
        {"confidence": np.zeros((2, 256))},
        {"x": np.ones(2)},
    ],
)
def test_a_reference_of_rubbish_is_as_none(reference):
    rng = np.random.default_rng(8)
    source = SourceDrift("front", 2, QUICK, reference)
    feed(source, rng, 64)
    assert source.state == "in-domain"


def test_a_standing_car_teaches_nothing():
    source = SourceDrift("front", 2, QUICK)
    sample = measure(*answer(np.random.default_rng(9)), 2)
    for i in range(500):
        source.add(sample, 1.0, float(i))
    assert source.state == "learning"


# ---------------------------------------------------------------------------------------------- the monitor
def observation(rng, source="front", **how):
    labels, confidence = answer(rng, **how)
    return SimpleNamespace(source=source, labels=labels[None], confidence=confidence[None])


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(monitor: DriftMonitor, clock: Clock, rng, count: int, **how) -> None:
    for _ in range(count):
        clock.now += 0.05
        monitor.offer(observation(rng, **how))
        clock.now += 0.05
        monitor.offer(observation(rng, **how))
        assert monitor.drain(PATIENCE)


def test_a_monitor_from_learning_to_an_alarm_to_a_new_version():
    clock, rng, changes = Clock(), np.random.default_rng(10), []
    with_events = DriftMonitor("road", ("sky", "road"), None, QUICK, on_change=changes.append, clock=clock)
    assert with_events.status().state == "learning"
    drive(with_events, clock, rng, 110)  # a frame just like the one before teaches nothing
    assert with_events.status().state == "in-domain"
    drive(with_events, clock, rng, 60, sure=0.75)
    status = with_events.status()
    assert (status.state, status.alarms, status.compared) == ("drifting", 1, False)
    assert [c.state for c in changes] == ["in-domain", "drifting"]
    assert {s.name for s in status.sources[0].signals} >= {"confidence", "shares", "edges", "temporal"}
    assert all(s.frames >= 64 and s.threshold > 1 for s in status.sources[0].signals)
    with_events.reset("version 2 is live", reference={"share": np.array([0.4, 0.6])})
    status = with_events.status()
    assert (status.state, status.reason, status.alarms) == ("learning", "version 2 is live", 1)
    assert status.compared
    assert status.sources == ()
    with_events.close()
    with_events.offer(observation(rng))


def test_the_rate_is_bounded_and_a_full_queue_drops():
    clock, rng = Clock(), np.random.default_rng(11)
    monitor = DriftMonitor("road", 2, None, DriftConfig(queue=2, max_fps=2.0), clock=clock)
    for _ in range(100):  # one second at 100 frames a second
        clock.now += 0.01
        monitor.offer(observation(rng))
        assert monitor.drain(PATIENCE)
    assert monitor.status().frames <= 3
    held = threading.Event()
    slow = DriftMonitor("road", 2, None, DriftConfig(queue=2, max_fps=1e6), clock=clock)
    slow._process = lambda *_: held.wait(PATIENCE)  # type: ignore[method-assign, assignment]
    for _ in range(50):  # an offer that waited for a look would wait for ever
        clock.now += 0.01
        slow.offer(observation(rng))
    assert slow.dropped >= 40
    assert not held.is_set()
    held.set()
    slow.close()
    monitor.close()


def test_names_without_end_neither_fill_memory_nor_shut_cameras_out():
    clock, rng = Clock(), np.random.default_rng(12)
    monitor = DriftMonitor("road", 2, None, DriftConfig(max_sources=3, forget=60.0), clock=clock)
    for i in range(200):
        clock.now += 0.001
        monitor.offer(observation(rng, source=f"{'x' * 5000}{i}"))  # alike in what is kept of it
        monitor.offer(observation(rng, source=f"{i}{'y' * 5000}"))
    assert monitor.drain(PATIENCE)
    status = monitor.status()
    assert len(status.sources) == 3
    assert status.ignored == 198
    assert all(len(s.source) <= 64 for s in status.sources)
    clock.now += 61
    monitor.offer(observation(rng, source="front"))
    monitor.drain(PATIENCE)
    assert "front" in {s.source for s in monitor.status().sources}
    monitor.close()


def test_odd_observations_are_counted_and_survived():
    clock, rng = Clock(), np.random.default_rng(13)
    monitor = DriftMonitor("road", 2, None, QUICK, clock=clock)
    for odd in (
        SimpleNamespace(source="a", labels=None, confidence=None),
        SimpleNamespace(source="a", labels=np.zeros((0, 4, 4), np.uint8), confidence=None),
        SimpleNamespace(source="a", labels=np.zeros((1, 0, 0), np.uint8), confidence=None),
        SimpleNamespace(source="a", labels=np.full((1, 8, 8), 255, np.uint8), confidence=None),
        SimpleNamespace(labels=1),
        None,
    ):
        clock.now += 1
        monitor.offer(odd)
    assert monitor.drain(PATIENCE)
    clock.now += 1
    monitor.offer(observation(rng))
    assert monitor.drain(PATIENCE)
    assert monitor.status().failed >= 2
    assert monitor.status().sources[0].state == "learning"
    monitor.close()


@pytest.mark.parametrize(
    "wrong",
    [{"learn": 2}, {"block": 0}, {"max_fps": 0.0}, {"false_alarm_hours": float("nan")}, {"learn": 12}],
)
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=r"drift\."):
        DriftConfig(**wrong)
