"""Watches the answers of one model for drift, from a thread of its own.

Knows the fields of an observation; knows nothing of the server.  Memory is bounded: at most `max_sources`
sources, a fixed number of floats each; names are cut.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.drift.config import DriftConfig, DriftStatus, SourceStatus
from runtime.drift.detector import SourceDrift
from runtime.drift.signals import GRID, Array, measure, reference_statistics

NAME = 64  # characters of a source's name that are stored


@dataclass
class _Source:
    drift: SourceDrift
    due: float = 0.0
    seen: float = 0.0
    previous: tuple[float, Array] | None = None


@dataclass
class _Queued:
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
    int32 [N,H,W] if there are any), uses the first frame of a batch, never blocks and never raises.

    Args:
        classes: their number, or their names.
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
        self._lock = threading.Lock()  # of the queue and the dictionary: never held during work
        self._changed = threading.Condition(self._lock)
        self._testing = threading.Lock()  # of the sources' tests: the thread and `status`
        self._queue: deque[_Queued] = deque()
        self._sources: dict[str, _Source] = {}
        self._generation = 0
        self._reason, self._since = "started", time.time()
        self._alarms = 0
        self._closed = False
        self._busy = False
        self._thread: threading.Thread | None = None

    # -- the answer path -----------------------------------------------------------------
    def offer(self, observation: Any) -> None:
        """Queues an answer if it is due; costs the caller a few microseconds."""
        if not self.config.enabled or self._closed:
            return
        try:
            source = str(observation.source)[:NAME]
            now = self._clock()
            with self._lock:
                source_state = self._sources.get(source) or self._new(source, now)
                if source_state is None:
                    self.ignored += 1
                    return
                source_state.seen = now
                due = now >= source_state.due - 1e-6
                # `temporal` needs the labels of the frame just before a processed one.
                if not due and now < source_state.due - 0.6 / self.config.max_fps:
                    return
                if len(self._queue) >= self.config.queue:
                    self.dropped += 1
                    return
                if due:
                    # on a grid, so that 5 of 7 frames a second are not made 3.5
                    source_state.due = max(source_state.due + 1.0 / self.config.max_fps, now)
                self._queue.append(
                    _Queued(
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

    def _new(self, source: str, now: float) -> _Source | None:
        """Adds a source, if there is room or one has been silent for long.  The caller holds the lock."""
        if len(self._sources) >= self.config.max_sources:
            oldest = min(self._sources, key=lambda name: self._sources[name].seen)
            if now - self._sources[oldest].seen < self.config.forget:
                return None
            del self._sources[oldest]
        source_state = _Source(SourceDrift(source, self._classes, self.config, self._reference), now, now)
        self._sources[source] = source_state
        return source_state

    # -- the thread ----------------------------------------------------------------------
    def _work(self) -> None:
        while True:
            with self._lock:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._queue) or self._closed)
                if self._closed:
                    return
                queued = self._queue.popleft()
                source_state = self._sources.get(queued.source)
                self._busy = True
                if source_state is None or queued.generation != self._generation:
                    continue
            try:
                changed = self._process(queued, source_state)
            except Exception:  # an answer of an unusual shape must not end the monitor
                self.failed += 1
                continue
            if changed is not None and self._on_change is not None:
                try:
                    self._on_change(changed)
                except Exception:
                    self.failed += 1

    def _process(self, queued: _Queued, source_state: _Source) -> SourceStatus | None:
        def first(array: Array | None) -> Array | None:
            return None if array is None else np.asarray(array)[0]

        labels = first(queued.labels)
        if queued.only_grid:
            if labels is not None:
                stride = max(1, max(labels.shape) // GRID)
                source_state.previous = (queued.at, labels[::stride, ::stride].copy())
            return None
        sample = measure(labels, first(queued.confidence), self._classes, edge_bits=first(queued.edge_bits))
        temporal = None
        if source_state.previous is not None and sample.grid is not None:
            at, grid = source_state.previous
            if queued.at - at <= 1.0 / self.config.max_fps and grid.shape == sample.grid.shape and grid.size:
                temporal = float((grid == sample.grid).mean())
        if sample.grid is not None:
            source_state.previous = (queued.at, sample.grid)
        with self._testing:
            if queued.generation != self._generation:
                return None
            before = source_state.drift.alarms
            changed = source_state.drift.add(sample, temporal, queued.at)
            self._alarms += source_state.drift.alarms - before
            return source_state.drift.status() if changed else None

    # -- others ---------------------------------------------------------------------------
    def reset(self, reason: str, *, reference: Mapping[str, Array] | None = None) -> None:
        """Discards every baseline, because another version is live.  `reference` is the new version's."""
        with self._lock:
            self._generation += 1
            self._reference = reference
            self._queue.clear()
            self._sources.clear()
            self._reason, self._since = reason, time.time()

    def status(self) -> DriftStatus:
        """Returns a snapshot; cheap."""
        with self._lock:
            source_state = list(self._sources.values())
        with self._testing:
            sources = tuple(each.drift.status() for each in source_state)
            state, since, reason = "learning", self._since, self._reason
            for wanted in ("drifting", "in-domain"):
                matching = [s for s in sources if s.state == wanted]
                if matching:
                    first = min(matching, key=lambda s: s.since)
                    state, since, reason = wanted, first.since, first.reason or reason
                    break
            compared = any(part is not None for part in reference_statistics(self._reference, self._classes))
            return DriftStatus(
                self.model,
                state,
                since,
                reason,
                compared,
                sum(s.frames for s in sources),
                self._alarms,
                self.dropped,
                self.ignored,
                self.failed,
                self.config.false_alarm_hours,
                sources,
            )

    def drain(self, timeout: float = 10.0) -> bool:
        """Waits until everything offered has been processed; returns False after `timeout` seconds."""
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
