"""Throttles work by the server's own latency: serving comes first.

The throttle reads the server's counters after each piece of work (an optimiser step, a labelled frame) and
after each pause: how many requests it answered meanwhile and how long they took, waiting included.  If
requests during work take more than `slow` times as long as those during pauses, the share of time that is
worked falls; if not, it rises.  The share never falls under `least`, so that a round ends, and a pause never
exceeds `longest`.  Without requests, or if the server does not answer, the share stays as it is.

Knows neither training nor gRPC: a function returns the counters.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Counters", "Throttle", "ThrottleConfig"]

Counters = tuple[int, float]  # answered requests, seconds they took together


@dataclass(frozen=True)
class ThrottleConfig:
    """How work gives way.  Raises ValueError for values that cannot be.

    slow      ratio of the latency during work to that during pauses above which less is worked, above 1
    least     smallest share of time that is worked, above 0 to 1
    requests  answers of each kind before a decision
    every     seconds of work after which a pause measures the latency without work in any case
    longest   seconds of one pause
    """

    slow: float = 1.15
    least: float = 0.1
    requests: int = 20
    every: float = 10.0
    longest: float = 20.0

    def __post_init__(self) -> None:
        if not (
            self.slow > 1 and 0 < self.least <= 1 and self.requests >= 1 and self.every > 0 < self.longest
        ):
            raise ValueError(f"{self}: slow > 1, 0 < least <= 1, requests >= 1, every and longest above 0")


@dataclass
class _Side:
    """Latency of answers during work, or during pauses; old ones fade."""

    count: float = 0.0
    seconds: float = 0.0

    def add(self, count: int, seconds: float) -> None:
        self.count += count
        self.seconds += seconds

    def fade(self) -> None:
        self.count, self.seconds = self.count / 2, self.seconds / 2

    @property
    def mean(self) -> float:
        return self.seconds / self.count if self.count else 0.0


@dataclass
class Throttle:
    """Call it after each piece of work: it sleeps as long as serving needs.

    Args:
        counters: returns the server's (answered requests, seconds they took together), or None if unknown.
            An exception counts as None.

    share: of the time that is worked, `least` to 1.  slept: seconds of all pauses.  ratio: latest latency
    during work over that during pauses; 0 before the first.
    """

    counters: Callable[[], Counters | None]
    config: ThrottleConfig = field(default_factory=ThrottleConfig)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.share = 1.0
        self.slept = 0.0
        self.ratio = 0.0
        self._busy, self._idle = _Side(), _Side()
        self._worked = 0.0
        self._began = self.clock()
        self._before = self._read()

    def _read(self) -> Counters | None:
        try:
            return self.counters()
        except Exception:  # the server is away: nothing is known
            return None

    def begin(self) -> None:
        """Start counting work now: what came before was neither work nor a pause."""
        self._began, self._before = self.clock(), self._read()

    def __call__(self) -> float:
        """Sleep after a piece of work, and return the seconds slept."""
        now = self.clock()
        worked = now - self._began
        self._worked += worked
        needed = worked * (1.0 / self.share - 1.0)
        if self._worked >= self.config.every:  # measure the latency without work, a tenth of the time
            needed = max(needed, self._worked / 10)
            self._worked = 0.0
        needed = min(needed, self.config.longest)
        if needed <= 0.0:
            if worked >= 0.25:  # shorter windows would cost more than they reveal
                self._count(self._busy)
                self._began = self.clock()
            return 0.0
        self._count(self._busy)
        self.sleep(needed)
        self._count(self._idle)
        self._decide()
        self._began = self.clock()
        self.slept += needed
        return needed

    def _count(self, side: _Side) -> None:
        """Add what was answered since the counters were read last."""
        after = self._read()
        before, self._before = self._before, after
        if (
            before is None or after is None or after[0] < before[0]
        ):  # the server is away, or was started again
            return
        side.add(after[0] - before[0], after[1] - before[1])

    def _decide(self) -> None:
        config = self.config
        if min(self._busy.count, self._idle.count) < config.requests or self._idle.mean <= 0:
            return
        self.ratio = self._busy.mean / self._idle.mean
        if self.ratio > config.slow:
            self.share = max(config.least, 0.7 * self.share)
        elif self.ratio < 1 + (config.slow - 1) / 2:
            self.share = min(1.0, 1.3 * self.share)
        self._busy.fade()
        self._idle.fade()
