"""Who runs next: a bounded queue in front of an engine.

There are no worker threads.  The thread that brings a request runs it when a permit is
free; otherwise it waits, and whoever finishes hands the permit on.  With
`max_batch` > 1 the runner takes compatible waiting requests along.  Knows nothing of
models, slots or gRPC.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from runtime.config import QueueConfig
from runtime.errors import Code, ServiceError

_NEW, _QUEUED, _LEADS, _TAKEN, _DONE = range(5)


class Job:
    """One request on its way through.  `execute` fills `result` or `error`."""

    __slots__ = (
        "arrived",
        "batch_key",
        "cancelled",
        "deadline",
        "error",
        "payload",
        "rejection",
        "result",
        "size",
        "source",
        "started",
        "state",
        "wake",
    )

    def __init__(
        self,
        payload: Any,
        *,
        source: str = "",
        deadline: float | None = None,
        batch_key: Any = None,
        size: int = 1,
    ) -> None:
        self.payload = payload
        self.source = source
        self.deadline = deadline  # time.monotonic()
        self.rejection = ServiceError(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", "deadline")
        self.batch_key = batch_key  # None: never shares a run
        self.size = size
        self.cancelled = False
        self.arrived = time.monotonic_ns()
        self.started = self.arrived
        self.state = _NEW
        self.wake: threading.Event | None = None
        self.result: Any = None
        self.error: BaseException | None = None


class Scheduler:
    def __init__(self, execute: Callable[[list[Job]], None], config: QueueConfig, concurrency: int) -> None:
        self._execute = execute
        self._config = config
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._queue: deque[Job] = deque()
        self._running = 0

    @property
    def pending(self) -> int:
        """Requests that wait (those that run are not counted)."""
        return len(self._queue)

    def submit(self, job: Job) -> Any:
        """Runs `job` or has it run; returns its result.

        Raises ServiceError: RESOURCE_EXHAUSTED (queue full), DEADLINE_EXCEEDED, UNAVAILABLE
        (timeout or a newer frame of its source), CANCELLED; or whatever the execution raised.
        """
        with self._lock:
            self._admit(job)
        if job.wake is not None:
            self._wait(job)
        if job.state == _LEADS:
            self._lead(job)
        if job.error is not None:
            raise job.error
        return job.result

    def cancel(self, job: Job) -> None:
        """The caller is gone: a waiting job is dropped, a running one finishes for nobody."""
        with self._lock:
            job.cancelled = True
            if job.state == _QUEUED:
                self._queue.remove(job)
                self._finish(
                    job, ServiceError(Code.CANCELLED, "the client cancelled the request", "cancelled")
                )

    def _admit(self, job: Job) -> None:
        if job.cancelled:
            raise ServiceError(Code.CANCELLED, "the client cancelled the request", "cancelled")
        if self._running < self._concurrency and not self._queue:
            self._running += 1
            job.state = _LEADS
            return
        if self._config.policy == "latest" and job.source:
            for waiting in self._queue:
                if waiting.source == job.source:
                    self._queue.remove(waiting)
                    message = (
                        f"a newer frame of source '{job.source}' has arrived; a late frame is worse than none"
                    )
                    self._finish(waiting, ServiceError(Code.UNAVAILABLE, message, "stale"))
                    break
        if len(self._queue) >= self._config.limit:
            message = (
                f"Exceeds maximum queue size: {self._config.limit} requests are "
                f"waiting; send fewer or raise queue.limit"
            )
            raise ServiceError(Code.RESOURCE_EXHAUSTED, message, "queue-full")
        job.wake = threading.Event()
        job.state = _QUEUED
        self._queue.append(job)
        self._arrival.notify_all()

    def _wait(self, job: Job) -> None:
        assert job.wake is not None
        timeout = None
        if job.deadline is not None:
            timeout = min(max(0.0, job.deadline - time.monotonic()), threading.TIMEOUT_MAX)
        if job.wake.wait(timeout):
            return
        with self._lock:
            if job.state == _QUEUED:
                self._queue.remove(job)
                self._finish(job, job.rejection)
                return
        job.wake.wait()  # taken in the last moment: its runner finishes it

    def _lead(self, job: Job) -> None:
        jobs = [job]
        try:
            if job.batch_key is not None and self._config.max_batch > 1:
                self._gather(jobs)
            now = time.monotonic_ns()
            for each in jobs:
                each.started = now
            self._execute(jobs)
        except BaseException as error:
            for each in jobs:
                each.error = each.error or error
        finally:
            with self._lock:
                self._hand_on()
                for each in jobs:
                    self._finish(each, each.error)

    def _gather(self, jobs: list[Job]) -> None:
        """Adds waiting jobs of the same key, up to max_batch in all, waiting at most batch_delay for them."""
        first = jobs[0]
        size = first.size
        until = time.monotonic() + self._config.batch_delay
        with self._lock:
            while True:
                for waiting in list(self._queue):
                    if waiting.batch_key == first.batch_key and size + waiting.size <= self._config.max_batch:
                        self._queue.remove(waiting)
                        waiting.state = _TAKEN
                        jobs.append(waiting)
                        size += waiting.size
                left = until - time.monotonic()
                if size >= self._config.max_batch or left <= 0:
                    return
                self._arrival.wait(left)

    def _hand_on(self) -> None:
        while self._queue:
            job = self._queue.popleft()
            if job.deadline is not None and job.deadline <= time.monotonic():
                self._finish(job, job.rejection)
                continue
            job.state = _LEADS
            assert job.wake is not None
            job.wake.set()
            return
        self._running -= 1

    @staticmethod
    def _finish(job: Job, error: BaseException | None) -> None:
        job.error = error
        job.state = _DONE
        if job.wake is not None:
            job.wake.set()
