"""SHADOWING: a candidate runs on a sample of live frames, off the answer path.

No client gets its answers; they are compared with the live version's answers on the same frames.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from runtime.checks import task as checks_task
from runtime.checks.task import Stats, Task
from runtime.config import ServerConfig
from runtime.errors import Refused
from runtime.serving.slot import Slot
from runtime.serving.tap import Observation, Sampler
from runtime.swap.candidate import Candidate
from runtime.swap.verify import Verifier, timed


class Shadow:
    """`stopping` is set when the server stops; a shadow then ends at its next frame."""

    def __init__(self, verifier: Verifier, config: ServerConfig, stopping: threading.Event) -> None:
        self.host = verifier.host
        self._verifier = verifier
        self._config = config
        self._stopping = stopping

    def configure(self, config: ServerConfig) -> None:
        self._config = config

    def run(self, candidate: Candidate) -> dict[str, Any]:
        """Runs a sample of live frames through the candidate.  Raises Refused; returns what it saw."""
        task = candidate.task
        if task is None:
            return {"frames": 0, "note": "not shadowed: outputs are not those of the graph contract"}
        if not self._config.shadow.enabled:
            return self._golden_decides(candidate, task, task.names, "shadowing is switched off")
        sample = _Sample(self._config, candidate, task)
        self._collect(sample)
        few = [name for name in task.names if sample.frames(name) < self._config.shadow.min_frames]
        report: dict[str, Any] = {}
        if few:  # of no live answers, or of requests that name only some of the outputs
            seen, limit = max(sample.frames(name) for name in few), self._config.shadow.timeout
            why = f"only {seen} live frames in {limit:.0f} s" if seen else "no live traffic"
            if len(few) < len(task.names):
                why = f"{', '.join(few)}: {why}"
            report = self._golden_decides(candidate, task, few, why)
        if len(few) < len(task.names):
            live = self.host.live
            known = self._verifier.goldens.get(live.version) if live is not None else None
            report |= sample.judge([n for n in task.names if n not in few], known.cost_ms if known else 0.0)
        return report

    def _collect(self, sample: _Sample) -> None:
        limits = self._config.shadow
        sampler = Sampler(limit=2)
        self.host.observe(sampler)
        begun = time.monotonic()
        try:
            while sample.count < limits.frames and (left := begun + limits.timeout - time.monotonic()) > 0:
                if self._stopping.is_set():
                    raise Refused("stopping", "the server is shutting down; submit again")
                idle = limits.idle_timeout if not sample.count else max(limits.idle_timeout, 1.0)
                observation = sampler.get(min(left, idle))
                if observation is None:
                    if not sample.count:
                        break
                    continue
                started = time.monotonic()
                sample.add(observation)
                # Leave the cores to the answers: rest in proportion to the work.
                self._stopping.wait((time.monotonic() - started) * (1.0 / limits.duty - 1.0))
        finally:
            self.host.unobserve(sampler)
            sample.seconds = time.monotonic() - begun

    def _golden_decides(self, candidate: Candidate, task: Task, parts: list[str], why: str) -> dict[str, Any]:
        """The same judgement on the golden frames, which are of the source domain."""
        note = f"{why}: decided by the golden frames alone"
        live = self.host.live
        if live is None or live.task is None:
            return {"frames": 0, "note": note}
        report = {"frames": 0, "note": note}
        comparison, mine, other = self._golden(candidate, task, live, parts)
        report |= task.report(comparison, mine, other)
        if reason := task.disagrees(comparison, mine, other, self._config.shadow):
            raise Refused("shadow-agreement", f"on the golden frames ({why}): {reason}", report)
        return report

    def _golden(
        self, candidate: Candidate, task: Task, live: Slot, parts: list[str]
    ) -> tuple[dict[str, Any], Stats, Stats]:
        """(comparison, the candidate's stats, the live version's) on the golden frames, of these parts."""
        known, own = self._verifier.reference_golden(live, candidate), candidate.golden
        limits = self._config.shadow
        compared = [task.compare(known.answers[k], own.answers[k], limits) for k in candidate.frames]
        stats = [[golden.stats[key] for key in candidate.frames] for golden in (own, known)]
        of = (checks_task.total(each) for each in (compared, *stats))
        comparison, mine, other = ({n: v for n, v in each.items() if n in parts} for each in of)
        return comparison, mine, other


class _Sample:
    """What a candidate and the live version said of the same live frames."""

    def __init__(self, config: ServerConfig, candidate: Candidate, task: Task) -> None:
        self.count = 0
        self.seconds = 0.0
        self._config = config
        self._candidate = candidate
        self._task = task
        self._names = task.required_outputs(candidate.engine.spec)
        self._frames: dict[str, int] = {}
        self._mine: Stats = {}
        self._theirs: Stats = {}
        self._comparison: dict[str, Any] = {}
        self._costs: list[float] = []

    def frames(self, part: str) -> int:
        return self._frames.get(part, 0)

    def add(self, observation: Observation) -> None:
        """Runs one live frame through the candidate.  Raises Refused("shadow-finite", …)."""
        task = self._task
        frame = np.ascontiguousarray(observation.frame[:1])
        answer, cost = timed(self._candidate.engine, {"frame": frame}, self._names)
        live = {name: value[:1] for name, value in observation.outputs.items()}
        mine, theirs = task.summarize(answer), task.summarize(live)
        self.count += 1
        self._costs.append(cost)
        if reason := task.not_finite(mine, answer, theirs):
            raise Refused("shadow-finite", f"on live frame {self.count}: {reason}")
        for name in theirs:
            self._frames[name] = self.frames(name) + 1
        self._mine = checks_task.total([self._mine, {name: mine[name] for name in theirs}])
        self._theirs = checks_task.total([self._theirs, theirs])
        compared = task.compare(live, answer, self._config.shadow)
        self._comparison = checks_task.total([self._comparison, compared])

    def judge(self, parts: list[str], live_cost_ms: float) -> dict[str, Any]:
        """The report; raises Refused by the name of the check."""
        task, guards, limits = self._task, self._config.guard, self._config.shadow
        mine, theirs, comparison = (
            {name: value for name, value in each.items() if name in parts}
            for each in (self._mine, self._theirs, self._comparison)
        )
        cost = float(np.median(self._costs))
        report: dict[str, Any] = {
            "frames": self.count,
            "seconds": round(self.seconds, 3),
            **task.report(comparison, mine, theirs),
            "cost_ms": round(cost, 3),
        }
        if reason := task.collapsed(mine, theirs, guards, limits.max_vanished):
            raise Refused("shadow-collapse", reason, report)
        if reason := task.disagrees(comparison, mine, theirs, limits):
            raise Refused("shadow-agreement", reason, report)
        limit = limits.max_latency_ratio * live_cost_ms + guards.latency_slack_ms
        if live_cost_ms > 0 and cost > limit:
            took = f"the live version took {live_cost_ms:.1f}"
            reason = f"{cost:.1f} ms a live frame, {took} (limit {limit:.1f})"
            raise Refused("shadow-latency", reason, report)
        return report
