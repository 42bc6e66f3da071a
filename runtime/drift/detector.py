"""A sequential test of one source's signals against its baseline.

    answers → (per source) a few signals per frame → means of `block` frames → CUSUM → alarm

**The test.**  Page's CUSUM (*Biometrika* 1954; Page-Hinkley is the same recursion on raw values) of
z = (block mean − μ)/σ with allowance k = shift/2: S ← max(0, S + z − k), alarm at S ≥ h.  h comes from the
configured mean time between false alarms, by Siegmund's approximation ARL₀ = (e^{2kb} − 2kb − 1)/2k²,
b = h + 1.166 (Siegmund, *Sequential Analysis*, 1985), with the rate divided evenly over all one-sided
tests of a source (union bound).  Frames of a video are correlated, so σ is the long-run deviation: of block
means, inflated by √((1+φ)/(1−φ)) for their first autocorrelation φ, and taken at the upper end of its
confidence interval, because it comes from few blocks.  The rate so stated holds for a domain whose scenes
vary as they did in the learning window; a window shorter than the variety of the road alarms more often
(measured: docs/results/drift.md).

**The baseline** is learned from the first `learn` frames of each source.  If the version has a reference
(share float64 [C], confidence int64 [C,256]) the distances are taken to that reference, and a source whose
learning window is already further from it than `tolerance` is drifting from the start.

After an alarm the reverse test (is the mean back on the baseline's side of the middle?) ends it: hysteresis.
Between two alarms of a source lie at least `min_interval` seconds.

Knows the signals, and no clock other than the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np

from runtime.drift.config import DriftConfig, SignalStatus, SourceStatus
from runtime.drift.signals import Array, Sample, composition, js_distance, reference_statistics, wasserstein

CLIP = 4.0  # of a block's z: one odd block is no drift
FAMILY = {
    "confidence": "confidence",
    "class-confidence": "confidence",
    "shares": "shares",
    "entropy": "shares",
    "edges": "edges",
    "temporal": "temporal",
    "edge-density": "edges",
    "edge-shares": "shares",
}
# (up, down): the directions that count.  Distances alarm upwards only, temporal agreement downwards only:
# a standing car agrees with itself.
SIDES = {
    "confidence": (True, True),
    "class-confidence": (True, False),
    "shares": (True, False),
    "entropy": (True, True),
    "edges": (True, True),
    "temporal": (False, True),
    "edge-density": (True, True),
    "edge-shares": (True, False),
}
# Of the tolerance: W₁ is 0.04 by day and 0.15 at dusk on CamVid (docs/results/drift.md).
SCALE = {"shares": 1.0, "edge-shares": 1.0, "class-confidence": 0.4}
# Deviations below these are of no practical interest: a camera that saw one quiet street has a tiny σ.
FLOOR = {
    "confidence": 0.01,
    "class-confidence": 0.01,
    "shares": 0.02,
    "entropy": 0.05,
    "edges": 0.004,
    "temporal": 0.01,
    "edge-density": 0.004,
    "edge-shares": 0.02,
}


def arl(h: float, k: float) -> float:
    """Mean number of points to a false alarm of a one-sided CUSUM on N(0,1): Siegmund's approximation."""
    b = h + 1.166
    return (math.exp(2 * k * b) - 2 * k * b - 1) / (2 * k * k)


def threshold(points: float, k: float) -> float:
    """h whose ARL₀ is `points`; at least 1."""
    low, high = 0.0, 1.0
    while arl(high, k) < points:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if arl(middle, k) < points else (low, middle)
    return max(high, 1.0)


def long_run_deviation(points: Array) -> float:
    """σ of the points float64 [n] as a CUSUM needs it: inflated for autocorrelation, upper end of its
    interval.
    """
    n = len(points)
    centred = points - points.mean()
    variance = float((centred**2).sum()) / max(n - 1, 1)
    if variance <= 0:
        return 0.0
    phi = float((centred[1:] * centred[:-1]).sum() / (centred**2).sum())
    # The estimate of a short series is biased towards zero.
    phi = min(max(phi + (1 + 4 * phi) / n, 0.0), 0.9)
    freedom = max((n - 1) * (1 - phi) / (1 + phi), 2.0)
    # 30 % quantile of χ² by Wilson and Hilferty, PNAS 1931
    low = freedom * max(1 - 2 / (9 * freedom) - 0.5244 * math.sqrt(2 / (9 * freedom)), 0.05) ** 3
    return math.sqrt(variance * (1 + phi) / (1 - phi) * freedom / low)


class SignalTest:
    """The test of one signal: `add` takes a point, `alarmed` is the result."""

    def __init__(self, name: str, learned: Array, k: float, h: float, frames: int) -> None:
        self.name, self.k, self.h = name, k, h
        self.up_counts, self.down_counts = SIDES[name]
        self.mean = float(learned.mean())
        self.deviation = max(long_run_deviation(learned), FLOOR[name], 1e-9)
        # The mean is known to ±σ/√n only; an error of that size must not add up to an alarm.
        self.slack = 1.0 / math.sqrt(len(learned))
        self.up = self.down = self.back = 0.0
        self.run = 0  # points since the larger sum was zero
        self.level = 0.0  # z of the new domain, once alarmed
        self.side = 0
        self.alarms = 0
        self.value = self.mean
        self.frames = frames

    @property
    def alarmed(self) -> bool:
        return self.side != 0

    def add(self, value: float, frames: int) -> None:
        self.value = value
        self.frames += frames
        z = max(-CLIP, min(CLIP, (value - self.mean) / self.deviation))
        if self.side:
            # Between level (drifted) and 0 (baseline): evidence for the latter, on the same scale.
            towards = abs(self.level) / 2 - self.side * z
            self.back = max(0.0, self.back + towards)
            self.level += 0.05 * (z - self.level) if self.side * z > abs(self.level) else 0.0
            if self.back >= self.h / 2:
                self.side, self.up, self.down, self.back = 0, 0.0, 0.0, 0.0
            return
        allowance = self.k + self.slack
        if self.up_counts:
            self.up = max(0.0, self.up + z - allowance)
        if self.down_counts:
            self.down = max(0.0, self.down - z - allowance)
        self.run = self.run + 1 if max(self.up, self.down) > 0 else 0
        if max(self.up, self.down) >= self.h:
            self.side = 1 if self.up >= self.down else -1
            # The sum is run·(level − allowance) on average.
            self.level = self.side * min(max(self.up, self.down) / max(self.run, 1) + allowance, CLIP)
            self.back = 0.0
            self.alarms += 1

    def status(self) -> SignalStatus:
        return SignalStatus(
            self.name,
            round(self.value, 5),
            round(self.mean, 5),
            round(self.deviation, 5),
            round(max(self.up, self.down), 3),
            round(self.h, 3),
            self.alarmed,
            self.alarms,
            self.frames,
        )


class SourceDrift:
    """Baseline and tests of one camera.  `add` must be called in the order of the frames, by one thread."""

    def __init__(
        self, source: str, classes: int, config: DriftConfig, reference: Mapping[str, Array] | None = None
    ) -> None:
        self.source, self.classes, self.config = source, classes, config
        self.share, self.histogram = reference_statistics(reference, classes)
        self.state, self.reason = "learning", ""
        self.since = time.time()
        self.frames = self.alarms = 0
        self.signals: dict[str, SignalTest] = {}
        # Distances from the version's reference beyond tolerance, at the end of learning.
        self.away: list[str] = []
        self._learning: list[Sample] = []
        self._block: list[dict[str, float]] = []
        self._last_alarm = -math.inf

    def add(self, sample: Sample, temporal: float | None, at: float) -> bool:
        """Processes one answer; returns True if the state changed.

        temporal: share of the grid labelled as in the frame just before, or None if that is not known.
        at: seconds on any clock that only goes forward.
        """
        self.frames += 1
        if temporal is not None:
            sample.scalars["temporal"] = temporal
        if self.state == "learning":
            if temporal is not None and temporal > 0.998 and len(self._learning) > 1:
                return False  # standing, or the same picture again: no news about how this road varies
            self._learning.append(sample)
            return len(self._learning) >= self.config.learn and self._finish_learning(at)
        self._block.append(self._values(sample))
        if len(self._block) < self.config.block:
            return False
        point, self._block = _mean(self._block), []
        for name, signal in self.signals.items():
            if name in point:
                signal.add(point[name], self.config.block)
        return self._decide(at)

    def _values(self, sample: Sample) -> dict[str, float]:
        values = dict(sample.scalars)
        name = "shares" if "entropy" in values else "edge-shares"
        assert self.share is not None
        values[name] = js_distance(sample.histogram.sum(1), self.share)
        if "confidence" in values and self.histogram is not None:
            values["class-confidence"] = wasserstein(sample.histogram, self.histogram)
            values["confidence"] -= composition(sample.histogram, self.histogram)
        return values

    def _finish_learning(self, at: float) -> bool:
        config = self.config
        pooled = np.mean([sample.histogram for sample in self._learning], axis=0)
        has_confidence = all("confidence" in sample.scalars for sample in self._learning)
        if self.share is not None:
            self._check_distance("shares", js_distance(pooled.sum(1), self.share))
        if self.histogram is not None and has_confidence:
            self._check_distance("class-confidence", wasserstein(pooled, self.histogram))
        self.share = pooled.sum(1) if self.share is None else self.share
        self.histogram = pooled if self.histogram is None and has_confidence else self.histogram
        rows = [self._values(sample) for sample in self._learning]
        self._learning = []
        names = [n for n in FAMILY if sum(n in row for row in rows) >= max(0.8 * len(rows), 4 * config.block)]
        tests = sum(sum(SIDES[name]) for name in names)
        points = config.false_alarm_hours * 3600 * config.max_fps / config.block
        h = threshold(points * max(tests, 1), config.shift / 2)
        for name in names:
            series = [row[name] for row in rows if name in row]
            blocks = len(series) // config.block
            learned = np.asarray(series[: blocks * config.block]).reshape(blocks, config.block).mean(1)
            self.signals[name] = SignalTest(name, learned, config.shift / 2, h, len(series))
        self.state, self.since = "in-domain", time.time()
        self._decide(at)
        return True

    def _check_distance(self, name: str, distance: float) -> None:
        tolerance = self.config.tolerance * SCALE[name]
        if distance > tolerance:
            what = f"from the version's reference (tolerance {tolerance:g})"
            self.away.append(f"{name} {distance:.2f} {what}")

    def _decide(self, at: float) -> bool:
        families = {FAMILY[name] for name, signal in self.signals.items() if signal.alarmed}
        wanted = min(self.config.votes, len({FAMILY[name] for name in self.signals}) or 1)
        # The composition of the road changes from street to street; the confidence should not.
        drifting = bool(self.away) or "confidence" in families or len(families) >= wanted
        if self.state == "drifting":
            if families or self.away:  # all of them must be back
                return False
            self.state, self.since, self.reason = "in-domain", time.time(), "back on the baseline"
            return True
        if not drifting or at - self._last_alarm < self.config.min_interval:
            return False
        self._last_alarm = at
        self.alarms += 1
        moved = [
            f"{name} {signal.mean:.3f} -> {signal.value:.3f}"
            for name, signal in self.signals.items()
            if signal.alarmed
        ]
        self.state, self.since, self.reason = "drifting", time.time(), "; ".join(self.away + moved)
        return True

    def status(self) -> SourceStatus:
        return SourceStatus(
            self.source,
            self.state,
            self.since,
            self.frames,
            self.alarms,
            self.reason,
            tuple(signal.status() for signal in self.signals.values()),
        )


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for row in rows for name in row}
    return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}
