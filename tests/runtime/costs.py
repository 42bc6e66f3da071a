"""Engines whose runs take what a test says: a clock of the test's own behind the checks of a candidate."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable
from typing import Any

import pytest

from runtime import engines
from runtime.swap import verify


class Costs:
    """Gives each engine that is loaded as a candidate the next entry of `queue`.

    An entry is the CPU time of a run, in milliseconds, or one number per run, the last of which repeats.
    `waiting` is added to the wall time of every run, in milliseconds: another process has the processor.
    Engines that answer requests are loaded again, and cost nothing.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *queue: float | Iterable[float]) -> None:
        self.cpu = self.wall = self.waiting = 0.0
        self._queue = list(queue)
        self._load = engines.load
        clock = types.SimpleNamespace(thread_time=lambda: self.cpu, perf_counter=lambda: self.wall)
        monkeypatch.setattr(verify, "time", clock)
        monkeypatch.setattr(engines, "load", self.load)

    def load(self, *arguments: Any, **named: Any) -> Any:
        engine = self._load(*arguments, **named)
        entry = self._queue.pop(0)
        *first, last = [entry] if isinstance(entry, int | float) else entry
        costs, run = itertools.chain(first, itertools.repeat(last)), engine.run

        def timed(*inputs: Any) -> Any:
            cost = next(costs)
            self.cpu += cost / 1e3
            self.wall += (cost + self.waiting) / 1e3
            return run(*inputs)

        engine.run = timed
        return engine
