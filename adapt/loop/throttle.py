"""Serving first: work in small pieces, and as many pauses between them as the server's own latency asks for.

After each piece of work (an optimiser step, a frame that was labelled) the server's counters are read: how
many requests it answered meanwhile and how long they took, waiting included.  The same is read after each
pause.  Where requests beside work take more than `slow` times those in pauses, the share of time that is
worked falls; where they do not, it rises.  It never falls under `least`, so that a round ends one day, and a
pause never grows over `longest`. Without requests, or where the server does not answer, nothing is known and
the share stays as it is.

Knows neither training nor gRPC: counters come from a function.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Counters", "Throttle", "ThrottleConfig"]

Counters = tuple[int, float]  # answered requests, seconds they took together


@dataclass(frozen=True)
class ThrottleConfig:
    """slow: latency beside work over latency in pauses from which there is less work.  least: smallest share
    of time that is worked.  requests: answers on each side before anything is decided.  every: seconds of
    work after which there is a pause in any case, to know the latency without work.  longest: seconds of one
    pause.
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
    """Latency of one kind of window; old windows fade."""

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
    """Call it after each piece of work; it sleeps as long as it must.

    Args:
        counters: reads the server's (answered, seconds); None where it does not say.  May raise: that is
        None.
    """

    counters: Callable[[], Counters | None]
    config: ThrottleConfig = field(default_factory=ThrottleConfig)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.share = 1.0
        self.slept = 0.0
        self.ratio = 0.0  # latest: latency beside work over that in pauses
        self._busy, self._idle = _Side(), _Side()
        self._worked = 0.0
        self._begun = self.clock()
        self._before = self._read()

    def _read(self) -> Counters | None:
        try:
            return self.counters()
        except Exception:  # the server is away: it decides nothing
            return None

    def begin(self) -> None:
        """Work begins after something that was neither work nor pause."""
        self._begun, self._before = self.clock(), self._read()

    def __call__(self) -> float:
        """A piece of work is done.  Returns the seconds slept."""
        now = self.clock()
        worked = now - self._begun
        self._worked += worked
        wanted = worked * (1.0 / self.share - 1.0)
        if self._worked >= self.config.every:  # a look at the latency without us: a tenth of the time
            wanted = max(wanted, self._worked / 10)
            self._worked = 0.0
        wanted = min(wanted, self.config.longest)
        if wanted <= 0.0:
            if worked >= 0.25:  # nearer looks would cost more than they tell
                self._count(self._busy)
                self._begun = self.clock()
            return 0.0
        self._count(self._busy)
        self.sleep(wanted)
        self._count(self._idle)
        self._decide()
        self._begun = self.clock()
        self.slept += wanted
        return wanted

    def _count(self, side: _Side) -> None:
        """Book what was answered since the last look."""
        after = self._read()
        before, self._before = self._before, after
        if before is None or after is None or after[0] < before[0]:  # away, or started again
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
