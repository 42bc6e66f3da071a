"""Settings and status of the drift monitor.  Knows nothing of how drift is found."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class DriftConfig:
    """Settings of the monitor; the table `[drift]` of the server's configuration.

    enabled            False: no answer is processed
    max_fps            answers per second and source that are processed
    learn              processed answers of a source that make its baseline
    block              answers averaged into one point of the test
    false_alarm_hours  mean time between false alarms of one source, at max_fps (slower sources: longer)
    shift              smallest change worth an alarm, in long-run deviations of a block
    votes              families of shares, edges and temporal that must agree; confidence alone suffices
    min_interval       seconds between two alarms of a source
    tolerance          distance of the shares from the version's reference that is drift at once (of the
                       class-confidence 0.4 times that)
    max_sources        sources watched; a new one takes the place of one silent for `forget` seconds, or is
                       ignored
    forget             seconds
    queue              answers that may wait to be processed; more are dropped and counted
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
class SignalStatus:
    """value: the latest point.  reference, deviation: baseline μ and σ.  statistic: CUSUM, the larger side.
    threshold: h.  alarmed: this signal is away from its baseline.  alarms: count so far.  frames: number
    tested.
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
    """state: "learning", "in-domain" or "drifting".  since: seconds since the epoch.  frames: number
    processed.
    """

    source: str
    state: str
    since: float
    frames: int
    alarms: int
    reason: str
    signals: tuple[SignalStatus, ...]


@dataclass(frozen=True)
class DriftStatus:
    """state: the worst state of any source ("drifting" > "in-domain" > "learning").  compared: True if
    there is a version's reference, not the first frames alone.  dropped: answers that found the queue full.
    ignored: answers of sources beyond max_sources.  failed: answers that could not be read.
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
