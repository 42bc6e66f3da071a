"""The account (accepted = answered + rejected(reason)) and the statistics of a version.

Plain counters behind locks; a snapshot is always consistent with itself.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

SIZES = 1024  # of runs that are counted apart


@dataclass(frozen=True)
class RequestCountersSnapshot:
    """accepted == answered + sum(rejected.values()) + in_flight, always."""

    accepted: int
    answered: int
    rejected: dict[str, int]
    in_flight: int


class RequestCounters:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._accepted = 0
        self._answered = 0
        self._rejected: Counter[str] = Counter()
        self._idle = threading.Condition(self._lock)
        self._awaited = 0  # callers of wait_idle: nobody else need be woken

    def accept(self) -> None:
        with self._lock:
            self._accepted += 1

    def answer(self) -> None:
        with self._lock:
            self._answered += 1
            if self._awaited:
                self._idle.notify_all()

    def reject(self, reason: str) -> None:
        with self._lock:
            self._rejected[reason] += 1
            if self._awaited:
                self._idle.notify_all()

    def snapshot(self) -> RequestCountersSnapshot:
        with self._lock:
            return RequestCountersSnapshot(
                self._accepted, self._answered, dict(self._rejected), self._in_flight()
            )

    def wait_idle(self, timeout: float) -> bool:
        """Waits until nothing is in flight."""
        with self._lock:
            self._awaited += 1
            try:
                return self._idle.wait_for(lambda: self._in_flight() == 0, timeout)
            finally:
                self._awaited -= 1

    def _in_flight(self) -> int:
        return self._accepted - self._answered - self._rejected.total()


@dataclass
class Durations:
    """Nanoseconds spent in the stages of one request."""

    queue: int = 0
    compute_input: int = 0
    compute_infer: int = 0
    compute_output: int = 0

    def __iadd__(self, other: Durations) -> Durations:
        self.queue += other.queue
        self.compute_input += other.compute_input
        self.compute_infer += other.compute_infer
        self.compute_output += other.compute_output
        return self


@dataclass
class StatisticsSnapshot:
    success: int = 0
    success_ns: int = 0
    fail: int = 0
    fail_ns: int = 0
    inferences: int = 0
    executions: int = 0
    last_inference_ms: int = 0
    stages: Durations = field(default_factory=Durations)
    batches: dict[int, tuple[int, int, int, int]] = field(
        default_factory=dict
    )  # size -> count, input, infer, output ns


class Statistics:
    """Triton's per-version statistics.  One lock, so that all counts of a snapshot agree
    (perf_analyzer aborts when they do not)."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = StatisticsSnapshot()

    def succeeded(self, total_ns: int, stages: Durations, batch: int) -> None:
        """One answered request; `batch` is its first dimension where the model has one, else 1."""
        with self._lock:
            now = self._now
            now.success += 1
            now.success_ns += total_ns
            now.inferences += batch
            now.last_inference_ms = time.time_ns() // 1_000_000
            now.stages += stages

    def executed(self, batch: int, stages: Durations) -> None:
        """One run of the engine, for however many requests."""
        with self._lock:
            self._now.executions += 1
            if batch not in self._now.batches and len(self._now.batches) >= SIZES:
                return  # sizes are the clients' choice
            count, first, second, third = self._now.batches.get(batch, (0, 0, 0, 0))
            self._now.batches[batch] = (
                count + 1,
                first + stages.compute_input,
                second + stages.compute_infer,
                third + stages.compute_output,
            )

    def failed(self, total_ns: int) -> None:
        with self._lock:
            self._now.fail += 1
            self._now.fail_ns += total_ns

    def snapshot(self) -> StatisticsSnapshot:
        with self._lock:
            now = self._now
            stages = Durations(**vars(now.stages))
            return StatisticsSnapshot(**{**vars(now), "stages": stages, "batches": dict(now.batches)})
