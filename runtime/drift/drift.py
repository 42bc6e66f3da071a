"""Is the road still the one this network knows?  Cheap signals of its answers under a sequential test.

    answers → (per source) a few signals a frame → means of `block` frames → CUSUM against a baseline → alarm

Signals of a segmentation answer, all computed on a sub-sampled grid:

    confidence         mean max softmax, less what the mixture of classes explains         (both directions)
    class-confidence   W₁ between the frame's and the baseline's histogram of each class, mean           (up)
    shares             Jensen-Shannon distance of the class shares to the baseline's                     (up)
    entropy            entropy of the class shares, in nats                                (both directions)
    edges              share of neighbouring pixels with different labels                  (both directions)
    temporal           share of pixels labelled as in the frame just before                            (down)

and of an answer of edges: `edge-density`, `edge-shares` (the same two of the class bits).

**The test.**  Page's CUSUM (*Biometrika* 1954; Page-Hinkley is the same recursion on raw values) of
z = (block mean − μ)/σ with allowance k = shift/2: S ← max(0, S + z − k), alarm at S ≥ h.  h comes from the
mean time between false alarms that is asked for, by Siegmund's approximation ARL₀ = (e^{2kb} − 2kb − 1)/2k²,
b = h + 1.166 (Siegmund, *Sequential Analysis*, 1985), with the rate shared out evenly over all one-sided
tests of a source (union bound).  Frames of a video are correlated, so σ is the long-run deviation: of block
means, inflated by √((1+φ)/(1−φ)) for their first autocorrelation φ, and taken at the upper end of its
confidence interval, because it comes from few blocks.  The rate so stated holds for a domain whose scenes
vary as they did in the learning window; a window shorter than the variety of the road alarms more often
(measured: docs/results/drift.md).

**The baseline** is learnt from the first `learn` frames of each source.  Where the version brings a reference
(share float64 [C], confidence int64 [C,256]) the distances are taken to that reference, and a source whose
learning window is already further from it than `tolerance` is drifting from the start.

After an alarm the reverse test (is the mean back on the baseline's side of the middle?) ends it: hysteresis.
Between two alarms of a source lie at least `min_interval` seconds.

Knows numpy and the fields of an observation; neither the server nor a clock other than the caller's.  Memory
is bounded: at most `max_sources` sources, a fixed number of floats each; names are cut.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "DriftConfig",
    "DriftMonitor",
    "DriftStatus",
    "Sample",
    "SignalStatus",
    "SourceDrift",
    "SourceStatus",
    "arl",
    "measure",
    "threshold",
]

Array = npt.NDArray[Any]
BINS = 32  # of a confidence histogram: 8 levels of the byte each
LEVELS = (np.arange(BINS) + 0.5) / BINS  # confidence of a bin
GRID = 160  # pixels of the longer side that are looked at
NAME = 64  # characters of a source's name that are kept
CLIP = 4.0  # of a block's z: one odd block is no drift
FAMILY = {
    "confidence": "confidence", "class-confidence": "confidence", "shares": "shares", "entropy": "shares",
    "edges": "edges", "temporal": "temporal", "edge-density": "edges", "edge-shares": "shares",
}  # fmt: skip
# (up, down): the directions that count.  A distance cannot drift towards nought, and a car that stands
# agrees with itself.
SIDES = {
    "confidence": (True, True), "class-confidence": (True, False), "shares": (True, False),
    "entropy": (True, True), "edges": (True, True), "temporal": (False, True),
    "edge-density": (True, True), "edge-shares": (True, False),
}  # fmt: skip
# Of the tolerance: W₁ is 0.04 by day and 0.15 at dusk on CamVid (docs/results/drift.md).
SCALE = {"shares": 1.0, "edge-shares": 1.0, "class-confidence": 0.4}
# Deviations below these are of no practical interest: a camera that saw one quiet street has a tiny σ.
FLOOR = {
    "confidence": 0.01, "class-confidence": 0.01, "shares": 0.02, "entropy": 0.05, "edges": 0.004,
    "temporal": 0.01, "edge-density": 0.004, "edge-shares": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class DriftConfig:
    """What the monitor is told; the table `[drift]` of the server's configuration.

    enabled            False: nothing is looked at
    max_fps            answers of a source looked at per second
    learn              looked-at answers of a source that make its baseline
    block              answers averaged into one point of the test
    false_alarm_hours  mean time between false alarms of one source, at max_fps (slower sources: longer)
    shift              smallest change worth an alarm, in long-run deviations of a block
    votes              families of shares, edges and temporal that must agree; confidence speaks for itself
    min_interval       seconds between two alarms of a source
    tolerance          distance of the shares from the version's reference that is drift at once (of the
                       class-confidence 0.4 times that)
    max_sources        sources watched; a new one takes the place of one silent for `forget` seconds, or is
                       ignored
    forget             seconds
    queue              answers that may wait to be looked at; more are dropped and counted
    """

    enabled: bool = True
    max_fps: float = 2.0
    learn: int = 120
    block: int = 4
    false_alarm_hours: float = 24.0
    shift: float = 1.0
    votes: int = 2
    min_interval: float = 60.0
    tolerance: float = 0.25
    max_sources: int = 16
    forget: float = 300.0
    queue: int = 16

    def __post_init__(self) -> None:
        for key, low in (("learn", 8), ("block", 1), ("votes", 1), ("max_sources", 1), ("queue", 1)):
            if getattr(self, key) < low:
                raise ValueError(f"drift.{key} = {getattr(self, key)}: must be at least {low}")
        for key in ("max_fps", "false_alarm_hours", "shift", "tolerance"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"drift.{key} = {value}: must be above 0")
        for key in ("min_interval", "forget"):
            value = getattr(self, key)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"drift.{key} = {value}: must be 0 or above")
        if self.learn < 4 * self.block:
            raise ValueError(f"drift.learn = {self.learn}: must be at least four blocks of {self.block}")


@dataclass(frozen=True)
class Sample:
    """One answer, summarised.

    histogram float64 [C,BINS]: of the confidence of each class, together 1 (all of it in the last bin where
    the answer has no confidence).  scalars: what needs no baseline.  grid uint8 [h,w] or None: labels to
    compare the next frame's with.
    """

    histogram: Array
    scalars: dict[str, float]
    grid: Array | None


@dataclass(frozen=True)
class SignalStatus:
    """value: the latest point.  reference, deviation: baseline μ and σ.  statistic: CUSUM, the larger side.
    threshold: h.  alarmed: this signal is away from its baseline.  alarms: how often it
    went.  frames: it was tested on.
    """

    name: str
    value: float
    reference: float
    deviation: float
    statistic: float
    threshold: float
    alarmed: bool
    alarms: int
    frames: int


@dataclass(frozen=True)
class SourceStatus:
    """state: "learning", "in-domain" or "drifting".  since: seconds since the epoch.  frames: looked at."""

    source: str
    state: str
    since: float
    frames: int
    alarms: int
    reason: str
    signals: tuple[SignalStatus, ...]


@dataclass(frozen=True)
class DriftStatus:
    """state: the worst of the sources' ("drifting" > "in-domain" > "learning").  compared: with a version's
    reference, not with the first frames alone.  dropped: answers that found the queue full; ignored: answers
    of sources beyond the bound; failed: answers that could not be read.
    """

    model: str
    state: str
    since: float
    reason: str
    compared: bool
    frames: int
    alarms: int
    dropped: int
    ignored: int
    failed: int
    false_alarm_hours: float
    sources: tuple[SourceStatus, ...] = ()


# ---------------------------------------------------------------------------------------------- the rate
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
    phi = min(
        max(phi + (1 + 4 * phi) / n, 0.0), 0.9
    )  # the estimate of a short series is biased towards nought
    freedom = max((n - 1) * (1 - phi) / (1 + phi), 2.0)
    # 30 % quantile of χ² by Wilson and Hilferty, PNAS 1931
    low = freedom * max(1 - 2 / (9 * freedom) - 0.5244 * math.sqrt(2 / (9 * freedom)), 0.05) ** 3
    return math.sqrt(variance * (1 + phi) / (1 - phi) * freedom / low)


# ---------------------------------------------------------------------------------------------- signals
def measure(
    labels: Array | None, confidence: Array | None, classes: int, *, edge_bits: Array | None = None
) -> Sample:
    """Summarise one answer.

    Args:
        labels: uint8 [H,W], or None for an answer of edges alone.
        confidence: uint8 [H,W], or None where it was not asked for.
        edge_bits: int32 [H,W], bit k: class k.

    Raises ValueError for shapes that do not fit.
    """
    scalars: dict[str, float] = {}
    histogram = np.zeros((classes, BINS))
    grid = None
    if labels is not None:
        if labels.ndim != 2 or (confidence is not None and confidence.shape != labels.shape):
            raise ValueError(f"labels of shape {labels.shape}: wanted [H,W], and the confidence alike")
        stride = max(1, max(labels.shape) // GRID)
        grid = labels[::stride, ::stride]
        known = grid < classes
        index = grid[known].astype(np.int64) * BINS
        if confidence is not None:
            sure = confidence[::stride, ::stride][known]
            index += sure >> 3
            scalars["confidence"] = float(sure.mean()) / 255.0 if sure.size else 0.0
        else:
            index += BINS - 1
        counts = np.bincount(index, minlength=classes * BINS).astype(np.float64)
        histogram = counts.reshape(classes, BINS) / max(float(counts.sum()), 1.0)
        share = histogram.sum(1)
        shown = share[share > 0]
        scalars["entropy"] = float(-(shown * np.log(shown)).sum())
        # At full resolution along one axis each: a coarse grid would count textures as edges.
        rows, columns = labels[::stride], labels[:, ::stride]
        different = np.count_nonzero(rows[:, 1:] != rows[:, :-1]) + np.count_nonzero(
            columns[1:] != columns[:-1]
        )
        scalars["edges"] = different / max(rows[:, 1:].size + columns[1:].size, 1)
    if edge_bits is not None:
        stride = max(1, max(edge_bits.shape) // (4 * GRID))
        bits = edge_bits[::stride, ::stride]
        scalars["edge-density"] = float(np.count_nonzero(bits)) / max(bits.size, 1)
        if labels is None:
            per_class = np.array(
                [np.count_nonzero(bits & np.int32(1 << k)) for k in range(min(classes, 31))], float
            )
            histogram[: len(per_class), -1] = per_class / max(per_class.sum(), 1.0)
    return Sample(histogram, scalars, None if grid is None else grid.copy())


def js_distance(p: Array, q: Array) -> float:
    """Jensen-Shannon distance of two distributions float64 [C], 0..1 (square root of the divergence in
    bits).
    """
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        a = np.where(p > 0, p * np.log2(p / middle), 0.0).sum()
        b = np.where(q > 0, q * np.log2(q / middle), 0.0).sum()
    return math.sqrt(max(float(a + b) / 2, 0.0))


def wasserstein(histogram: Array, base: Array, least: float = 0.002) -> float:
    """W₁ between the confidence histograms of a class, 0..1, mean over classes weighted by the frame's
    shares.

    Classes without a share of `least` on both sides are left out.
    """
    ours, theirs = histogram.sum(1), base.sum(1)
    both = (ours >= least) & (theirs >= least)
    if not both.any():
        return 0.0
    a = np.cumsum(histogram[both] / ours[both, None], axis=1)
    b = np.cumsum(base[both] / theirs[both, None], axis=1)
    return float(np.average(np.abs(a - b).mean(1), weights=ours[both]))


def composition(histogram: Array, base: Array) -> float:
    """By how much the mean confidence differs because of what is in the picture: Σ_c (share_c − base
    share_c)·m_c.

    m_c: mean confidence of class c in `base`.  A street with many thin things is less sure and has not
    drifted.
    """
    theirs = base.sum(1)
    mean = (base @ LEVELS) / np.maximum(theirs, 1e-12)
    known = theirs > 0
    return float(((histogram.sum(1) - theirs)[known] * (mean[known] - float(base.sum(0) @ LEVELS))).sum())


def _reference(reference: Mapping[str, Array] | None, classes: int) -> tuple[Array | None, Array | None]:
    """(share [C], histogram [C,BINS]) of a version's reference.npz; None for what it lacks or has in another
    shape.
    """
    share = histogram = None
    if reference:
        told = np.asarray(reference["confidence"], np.float64) if "confidence" in reference else None
        if told is not None and told.shape == (classes, 256) and np.isfinite(told).all() and told.sum() > 0:
            histogram = told.reshape(classes, BINS, 256 // BINS).sum(2) / told.sum()
            share = histogram.sum(1)
        told = np.asarray(reference["share"], np.float64) if "share" in reference else None
        if told is not None and told.shape == (classes,) and np.isfinite(told).all() and told.sum() > 0:
            share = told / told.sum()
    return share, histogram


# ---------------------------------------------------------------------------------------------- one signal
class _Signal:
    """The test of one signal.  Points go in, `alarmed` comes out."""

    def __init__(self, name: str, learned: Array, k: float, h: float, frames: int) -> None:
        self.name, self.k, self.h = name, k, h
        self.up_counts, self.down_counts = SIDES[name]
        self.mean = float(learned.mean())
        self.deviation = max(long_run_deviation(learned), FLOOR[name], 1e-9)
        # The mean is known to ±σ/√n only; an error of that size must not add up to an alarm.
        self.slack = 1.0 / math.sqrt(len(learned))
        self.up = self.down = self.back = 0.0
        self.run = 0  # points since the sum that alarmed was nought
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
            self.name, round(self.value, 5), round(self.mean, 5), round(self.deviation, 5),
            round(max(self.up, self.down), 3), round(self.h, 3), self.alarmed, self.alarms, self.frames,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- one source
class SourceDrift:
    """Baseline and tests of one camera; samples go in one after the other.  Not safe for several threads."""

    def __init__(
        self, source: str, classes: int, config: DriftConfig, reference: Mapping[str, Array] | None = None
    ) -> None:
        self.source, self.classes, self.config = source, classes, config
        self.share, self.histogram = _reference(reference, classes)
        self.state, self.reason = "learning", ""
        self.since = time.time()
        self.frames = self.alarms = 0
        self.signals: dict[str, _Signal] = {}
        self.away: list[
            str
        ] = []  # distances from the version's reference beyond tolerance, at the end of learning
        self._learning: list[Sample] = []
        self._block: list[dict[str, float]] = []
        self._last_alarm = -math.inf

    def add(self, sample: Sample, temporal: float | None, at: float) -> bool:
        """Take one answer in; True where the state changed.

        temporal: share of the grid labelled as in the frame just before, or None where that is not known.
        at: seconds on any clock that only goes forward.
        """
        self.frames += 1
        if temporal is not None:
            sample.scalars["temporal"] = temporal
        if self.state == "learning":
            if temporal is not None and temporal > 0.998 and len(self._learning) > 1:
                return False  # standing, or the same picture again: no news about how this road varies
            self._learning.append(sample)
            return len(self._learning) >= self.config.learn and self._learnt(at)
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

    def _learnt(self, at: float) -> bool:
        config = self.config
        pooled = np.mean([sample.histogram for sample in self._learning], axis=0)
        sure = all("confidence" in sample.scalars for sample in self._learning)
        if self.share is not None:
            self._away("shares", js_distance(pooled.sum(1), self.share))
        if self.histogram is not None and sure:
            self._away("class-confidence", wasserstein(pooled, self.histogram))
        self.share = pooled.sum(1) if self.share is None else self.share
        self.histogram = pooled if self.histogram is None and sure else self.histogram
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
            self.signals[name] = _Signal(name, learned, config.shift / 2, h, len(series))
        self.state, self.since = "in-domain", time.time()
        self._decide(at)
        return True

    def _away(self, name: str, distance: float) -> None:
        tolerance = self.config.tolerance * SCALE[name]
        if distance > tolerance:
            words = f"from the version's reference (tolerance {tolerance:g})"
            self.away.append(f"{name} {distance:.2f} {words}")

    def _decide(self, at: float) -> bool:
        families = {FAMILY[name] for name, signal in self.signals.items() if signal.alarmed}
        wanted = min(self.config.votes, len({FAMILY[name] for name in self.signals}) or 1)
        # What the road is made of changes from street to street; how sure the network is of it should not.
        drifting = bool(self.away) or "confidence" in families or len(families) >= wanted
        if self.state == "drifting":
            if families or self.away:  # it takes all of them to be back
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
            self.source, self.state, self.since, self.frames, self.alarms, self.reason,
            tuple(signal.status() for signal in self.signals.values()),
        )  # fmt: skip


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = {name for row in rows for name in row}
    return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}


# ---------------------------------------------------------------------------------------------- the monitor
@dataclass
class _Watched:
    drift: SourceDrift
    due: float = 0.0
    seen: float = 0.0
    previous: tuple[float, Array] | None = None


@dataclass
class _Taken:
    source: str
    labels: Array | None
    confidence: Array | None
    edge_bits: Array | None
    at: float
    generation: int
    only_grid: bool


class DriftMonitor:
    """Watches one model's answers from a thread of its own.

    `offer` takes an observation (model, version, source, labels uint8 [N,H,W], confidence or None; edge_bits
    int32 [N,H,W] where there are any), looks at the first frame of a batch, never blocks and never raises.

    Args:
        classes: how many, or their names.
        reference: a version's reference.npz, or None.
        on_change: called from the monitor's thread with the SourceStatus whenever a source changes its state.
    """

    def __init__(
        self,
        model: str,
        classes: int | Sequence[str],
        reference: Mapping[str, Array] | None = None,
        config: DriftConfig | None = None,
        *,
        on_change: Callable[[SourceStatus], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model
        self.config = config or DriftConfig()
        self.dropped = self.ignored = self.failed = 0
        self._classes = max(1, classes if isinstance(classes, int) else len(classes))
        self._reference, self._on_change, self._clock = reference, on_change, clock
        self._lock = threading.Lock()  # of the queue and the dictionary: never held for work
        self._changed = threading.Condition(self._lock)
        self._testing = threading.Lock()  # of the sources' tests: the thread and `status`
        self._queue: deque[_Taken] = deque()
        self._sources: dict[str, _Watched] = {}
        self._generation = 0
        self._reason, self._since = "started", time.time()
        self._alarms = 0
        self._closed = False
        self._busy = False
        self._thread: threading.Thread | None = None

    # -- the answer path -----------------------------------------------------------------
    def offer(self, observation: Any) -> None:
        """Take note of an answer, or not; costs the caller a few microseconds."""
        if not self.config.enabled or self._closed:
            return
        try:
            source = str(observation.source)[:NAME]
            now = self._clock()
            with self._lock:
                watched = self._sources.get(source) or self._new(source, now)
                if watched is None:
                    self.ignored += 1
                    return
                watched.seen = now
                due = now >= watched.due - 1e-6
                # The frame just before a looked-at one is kept as a grid of labels for `temporal`.
                if not due and now < watched.due - 0.6 / self.config.max_fps:
                    return
                if len(self._queue) >= self.config.queue:
                    self.dropped += 1
                    return
                if due:
                    # on a grid, so that 5 of 7 frames a second are not made 3.5
                    watched.due = max(watched.due + 1.0 / self.config.max_fps, now)
                self._queue.append(
                    _Taken(
                        source,
                        getattr(observation, "labels", None),
                        getattr(observation, "confidence", None),
                        getattr(observation, "edge_bits", None),
                        now,
                        self._generation,
                        not due,
                    )
                )
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._work, name=f"drift-{self.model}", daemon=True
                    )
                    self._thread.start()
                self._changed.notify()
        except Exception:
            self.failed += 1

    __call__ = offer

    def _new(self, source: str, now: float) -> _Watched | None:
        """Room for a new source: free, or that of the one silent for longest.  Called with the lock."""
        if len(self._sources) >= self.config.max_sources:
            oldest = min(self._sources, key=lambda name: self._sources[name].seen)
            if now - self._sources[oldest].seen < self.config.forget:
                return None
            del self._sources[oldest]
        watched = _Watched(SourceDrift(source, self._classes, self.config, self._reference), now, now)
        self._sources[source] = watched
        return watched

    # -- the thread ----------------------------------------------------------------------
    def _work(self) -> None:
        while True:
            with self._lock:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._queue) or self._closed)
                if self._closed:
                    return
                taken = self._queue.popleft()
                watched = self._sources.get(taken.source)
                self._busy = True
                if watched is None or taken.generation != self._generation:
                    continue
            try:
                changed = self._look(taken, watched)
            except Exception:  # an answer of an odd shape: counted, and the monitor goes on
                self.failed += 1
                continue
            if changed is not None and self._on_change is not None:
                try:
                    self._on_change(changed)
                except Exception:
                    self.failed += 1

    def _look(self, taken: _Taken, watched: _Watched) -> SourceStatus | None:
        def first(array: Array | None) -> Array | None:
            return None if array is None else np.asarray(array)[0]

        labels = first(taken.labels)
        if taken.only_grid:
            if labels is not None:
                stride = max(1, max(labels.shape) // GRID)
                watched.previous = (taken.at, labels[::stride, ::stride].copy())
            return None
        sample = measure(labels, first(taken.confidence), self._classes, edge_bits=first(taken.edge_bits))
        temporal = None
        if watched.previous is not None and sample.grid is not None:
            at, grid = watched.previous
            if taken.at - at <= 1.0 / self.config.max_fps and grid.shape == sample.grid.shape and grid.size:
                temporal = float((grid == sample.grid).mean())
        if sample.grid is not None:
            watched.previous = (taken.at, sample.grid)
        with self._testing:
            if taken.generation != self._generation:
                return None
            before = watched.drift.alarms
            changed = watched.drift.add(sample, temporal, taken.at)
            self._alarms += watched.drift.alarms - before
            return watched.drift.status() if changed else None

    # -- others ---------------------------------------------------------------------------
    def reset(self, reason: str, *, reference: Mapping[str, Array] | None = None) -> None:
        """Forget every baseline: another version is live.  `reference` is the new version's."""
        with self._lock:
            self._generation += 1
            self._reference = reference
            self._queue.clear()
            self._sources.clear()
            self._reason, self._since = reason, time.time()

    def status(self) -> DriftStatus:
        """A snapshot; cheap."""
        with self._lock:
            watched = list(self._sources.values())
        with self._testing:
            sources = tuple(each.drift.status() for each in watched)
            state, since, reason = "learning", self._since, self._reason
            for wanted in ("drifting", "in-domain"):
                these = [s for s in sources if s.state == wanted]
                if these:
                    first = min(these, key=lambda s: s.since)
                    state, since, reason = wanted, first.since, first.reason or reason
                    break
            compared = any(part is not None for part in _reference(self._reference, self._classes))
            return DriftStatus(
                self.model, state, since, reason, compared, sum(s.frames for s in sources), self._alarms,
                self.dropped, self.ignored, self.failed, self.config.false_alarm_hours, sources,
            )  # fmt: skip

    def drain(self, timeout: float = 10.0) -> bool:
        """Wait until everything offered has been looked at; False after `timeout` seconds."""
        with self._lock:
            return self._changed.wait_for(lambda: not self._queue and not self._busy, timeout)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(5.0)
