"""The watch window: a few answers a second after a flip, and the judgement that rolls back.

Knows the host and the guard; what to do about a judgement is the caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.checks.task import Stats, Task
from runtime.config import ServerConfig
from runtime.process.priority import lower
from runtime.serving.served_model import ServedModel
from runtime.serving.slot import Slot
from runtime.serving.tap import Observation, Sampler
from runtime.swap.verify import held
from runtime.tensors import Array

log = logging.getLogger("roadworthy.watch")
RollBack = Callable[[Slot, str, str, dict[str, Any]], None]  # slot, check, reason, detail


@dataclass(frozen=True)
class Baseline:
    """How the version before the flip behaved."""

    run_ms: float
    confidence: float  # 0 = not known

    @classmethod
    def of(cls, slot: Slot | None, watch: Watch | None) -> Baseline:
        runs = _costs(slot) if slot is not None else []
        confidence = watch.confidence if watch is not None and watch.slot is slot else 0.0
        return cls(float(np.median(runs)) if len(runs) >= 5 else 0.0, confidence)


def _costs(slot: Slot) -> list[float]:
    """Milliseconds of the last runs.  CPU time where the CPU computes: on a machine that something else has
    made busy, every version's wall time grows, and rolling back would not help."""
    return list(slot.cpu_ms if slot.engine.spec.device == "cpu" else slot.run_ms)


class Watch(threading.Thread):
    """The watch window: judges a few answers per second and rolls back if it finds a fault."""

    def __init__(
        self, host: ServedModel, slot: Slot, before: Baseline, config: ServerConfig, roll_back: RollBack
    ) -> None:
        super().__init__(name=f"watch-{host.name}", daemon=True)
        self.slot = slot
        self.confidence = 0.0
        self._host = host
        self._config = config
        self._roll_back = roll_back
        self._before = before
        self._sampler = Sampler(limit=1)
        self._ended = threading.Event()

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        lower(self._config.engine.nice)
        self._host.observe(self._sampler)
        try:
            self._watch()
        except Exception:
            log.exception("watch window of %s version %s", self._host.name, self.slot.version)
        finally:
            self._host.unobserve(self._sampler)

    def _watch(self) -> None:
        limits, task = self._config.watch, self.slot.task
        statistics = self._host.statistics_of(self.slot.version)
        start = statistics.snapshot()
        until = time.monotonic() + limits.seconds
        looked = bad = failed = blamed = 0
        worst = ""
        sums: list[float] = []
        while not self._ended.is_set() and time.monotonic() < until:
            observation = self._sampler.get(0.25)
            if observation is not None and observation.version == self.slot.version and task is not None:
                stats = task.summarize(observation.outputs)
                looked += 1
                reason = self._fault(task, stats, observation.outputs)
                if reason is not None and not self._previous_no_better(task, observation):
                    bad += 1
                    worst = reason
                if observation.confidence is not None and (sure := task.mean_confidence(stats)) is not None:
                    sums.append(sure)
                    self.confidence = float(np.mean(sums[-50:]))
            if (new := self.slot.failures - failed) > 0:
                failed += new
                blamed += new if self._previous_runs() else 0
            verdict = self._verdict(start, statistics.snapshot(), looked, bad, worst, len(sums), blamed)
            if verdict is not None:
                detail = {"looked_at": looked, "bad": bad}
                self._roll_back(self.slot, *verdict, detail)
                return
            self._ended.wait(1.0 / limits.max_fps)
        while not self._ended.is_set() and self._running_since(until):  # begun in the window, judged after it
            if self.slot.hung:
                self._roll_back(self.slot, *self._hangs(), {"looked_at": looked, "bad": bad})
                return
            self._ended.wait(0.25)

    def _running_since(self, moment: float) -> bool:
        """Whether a run of the version that began before `moment` has not ended."""
        return any(slot is self.slot and job.started < moment * 1e9 for job, slot in self._host.runs())

    def _hangs(self) -> tuple[str, str]:
        return "watch-hang", f"a run has not ended after {self._config.engine.hang:g} s"

    def _fault(self, task: Task, stats: Stats, answer: Mapping[str, Array]) -> str | None:
        """What is wrong with an answer, whatever is on the frame."""
        return task.not_finite(stats, answer) or task.collapsed(stats, None, self._config.guard, 0.0)

    def _previous_no_better(self, task: Task, observation: Observation) -> bool:
        """A covered camera gives one class, or no edge, with any version; rolling back would not help."""
        previous = self._host.previous
        if previous is None or previous.task is None:
            return False
        names = [name for name in task.outputs if name in observation.outputs]
        try:
            answer = held(previous, {"frame": observation.frame}, names)
        except Exception:
            return False
        return self._fault(previous.task, previous.task.summarize(answer), answer) is not None

    def _previous_runs(self) -> bool:
        """Whether the version before runs what this one has just failed: a client that sends what no version
        can run rolls nothing back.
        """
        (given, names), previous = self.slot.failed_on or ({}, ()), self._host.previous
        self.slot.failed_on = None
        if previous is None or not given:
            return True
        try:
            held(previous, given, list(names))
        except Exception:
            return False
        return True

    def _verdict(
        self, start: Any, now: Any, looked: int, bad: int, worst: str, with_confidence: int, failed: int
    ) -> tuple[str, str] | None:
        limits, before = self._config.watch, self._before
        if self.slot.hung:
            return self._hangs()
        total = failed + now.success - start.success
        if failed >= limits.min_frames and failed > limits.max_error_share * total:
            return "watch-errors", f"the engine failed {failed} of {total} requests"
        if looked >= limits.min_frames and bad > limits.max_bad_share * looked:
            return "watch-collapse", f"{bad} of {looked} answers: {worst}"
        runs = _costs(self.slot)
        if before.run_ms > 0 and len(runs) >= max(20, limits.min_frames):
            limit = limits.max_latency_ratio * before.run_ms + self._config.guard.latency_slack_ms
            if (median := float(np.median(runs))) > limit:
                return (
                    "watch-latency",
                    f"{median:.1f} ms a run, {before.run_ms:.1f} before the flip (limit {limit:.1f})",
                )
        if before.confidence > 0 and with_confidence >= limits.min_frames:
            least = limits.min_confidence * before.confidence
            if self.confidence < least:
                return (
                    "watch-confidence",
                    f"mean confidence {self.confidence:.0f} of 255, {before.confidence:.0f} before the flip",
                )
        return None
