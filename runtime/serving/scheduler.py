"""Who runs next: bounded queues in front of an engine.

There are no worker threads.  The thread that brings a request runs it when a permit is
free; otherwise it waits, and whoever finishes hands the permit on before it does
anything else.  Where the plan allows it the runner takes compatible waiting requests
along.  Knows nothing of models, slots or gRPC.
"""

from __future__ import annotations

import _thread
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from runtime.errors import Code, ServiceError
from runtime.serving.queueing import DELAY, BatchingPolicy

_NEW, _QUEUED, _LEADS, _TAKEN, _DONE = range(5)


class Job:
    """One request on its way through.  `execute` fills `result` or `error`.

    deadline   time.monotonic() after which the answer is no longer wanted; None = never
    timeout    seconds it may wait by its own word; 0 = as the plan says
    priority   1 first; 0 = the plan's default
    batch_key  requests of one key may share a run; None = it shares none
    size       items it brings
    label      put before the words of a timeout
    """

    __slots__ = (
        "arrived",
        "batch_key",
        "cancelled",
        "company",
        "deadline",
        "error",
        "expires",
        "label",
        "level",
        "payload",
        "priority",
        "result",
        "size",
        "source",
        "started",
        "state",
        "timeout",
        "wake",
    )

    def __init__(
        self,
        payload: Any,
        *,
        source: str = "",
        deadline: float | None = None,
        timeout: float = 0.0,
        priority: int = 0,
        batch_key: Any = None,
        size: int = 1,
        label: str = "",
    ) -> None:
        self.payload = payload
        self.source = source
        self.deadline = deadline
        self.timeout = timeout
        self.priority = priority
        self.batch_key = batch_key
        self.size = size
        self.label = label
        self.level = 0
        self.expires: float | None = None  # time.monotonic() at which its level's timeout is over
        self.cancelled = False
        self.arrived = time.monotonic_ns()
        self.started = self.arrived
        self.state = _NEW
        self.wake: _thread.LockType | None = None  # held while it waits
        self.result: Any = None
        self.error: BaseException | None = None
        self.company: list[Job] = []  # of one that leads: those that share its run, itself first

    @property
    def done(self) -> bool:
        return self.state == _DONE


class Scheduler:
    """`execute` runs jobs together and may return a function for what can wait until the permit has been
    handed on and the other jobs have their results.
    """

    def __init__(
        self,
        execute: Callable[[list[Job]], Callable[[], None] | None],
        plan: BatchingPolicy,
        concurrency: int,
    ) -> None:
        self._execute = execute
        self._plan = plan
        self._concurrency = concurrency
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._levels: dict[int, deque[Job]] = {}  # in order of priority
        self._delayed: deque[Job] = deque()  # those whose time is over and whose policy is DELAY
        self._waiting = 0
        self._leading: set[Job] = set()  # each has one permit

    @property
    def plan(self) -> BatchingPolicy:
        return self._plan

    def configure(self, plan: BatchingPolicy) -> None:
        """A new plan for the requests that come from now on."""
        with self._lock:
            self._plan = plan

    @property
    def pending(self) -> int:
        """Requests that wait (those that run are not counted)."""
        return self._waiting

    def submit(self, job: Job) -> Any:
        """Runs `job` or has it run; returns its result.

        Raises ServiceError: RESOURCE_EXHAUSTED (queue full), DEADLINE_EXCEEDED, UNAVAILABLE
        (timeout or a newer frame of its source), CANCELLED; or whatever the execution raised.
        """
        with self._lock:
            self._admit(job)
        if job.wake is not None:
            self._wait(job, job.wake)
        if job.state == _LEADS:
            self._lead(job)
        if job.error is not None:
            raise job.error
        return job.result

    def cancel(self, job: Job) -> None:
        """Cancels a job whose caller is gone: a waiting job, or the answer of a running one, is dropped."""
        with self._lock:
            job.cancelled = True
            if job.state == _QUEUED:
                self._remove(job)
                self._finish(job, _cancelled())

    # -- runs that do not come back ---------------------------------------------------

    def runs(self) -> list[Job]:
        """Those in progress, each by the job that leads it."""
        with self._lock:
            return list(self._leading)

    def give_up(self, job: Job, error: Callable[[], ServiceError]) -> bool:
        """Hands on the permit of a run that has not ended; who shares it is refused with `error()`.  Its own
        thread stays where it is.  False when the run has ended.
        """
        with self._lock:
            if not self._hand_on(job):
                return False
            for each in job.company[1:]:
                self._finish(each, error())
            return True

    def refuse_waiting(self, error: Callable[[], ServiceError]) -> None:
        with self._lock:
            for job in self._queued():
                self._remove(job)
                self._finish(job, error())

    # -- the queue; all of it under the lock -----------------------------------------

    def _admit(self, job: Job) -> None:
        if job.cancelled:
            raise _cancelled()
        if len(self._leading) < self._concurrency and not self._waiting:
            self._leading.add(job)
            job.state = _LEADS
            return
        plan = self._plan
        job.level = plan.level(job.priority)
        policy = plan.policy_of(job.level)
        if plan.latest and job.source:
            self._replace(job.source)
        level = self._levels.get(job.level)
        if self._waiting >= plan.limit:
            raise _full(plan.limit, "raise queue.limit")
        if level is not None and 0 < policy.max_queue_size <= len(level):
            raise _full(policy.max_queue_size, "raise max_queue_size in config.pbtxt")
        seconds = policy.timeout(job.timeout)
        if seconds > 0:
            job.expires = time.monotonic() + seconds
        if level is None:
            self._levels[job.level] = level = deque()
            self._levels = dict(sorted(self._levels.items()))
        job.wake = _thread.allocate_lock()
        job.wake.acquire()
        job.state = _QUEUED
        level.append(job)
        self._waiting += 1
        if plan.max_batch > 1:
            self._arrival.notify_all()

    def _replace(self, source: str) -> None:
        for waiting in self._queued():
            if waiting.source == source:
                self._remove(waiting)
                message = f"a newer frame of source '{source}' has arrived; a late frame is worse than none"
                self._finish(waiting, ServiceError(Code.UNAVAILABLE, message, "stale"))
                return

    def _queued(self) -> Iterator[Job]:
        """Everything that waits, in the order in which it would run; a copy, so that it may be removed."""
        for level in (*self._levels.values(), self._delayed):
            yield from tuple(level)

    def _remove(self, job: Job) -> None:
        level = self._levels.get(job.level)
        (level if level is not None and job in level else self._delayed).remove(job)
        self._waiting -= 1

    def _next(self) -> Job | None:
        """Takes the job that runs next out of the queue; those whose time is over are dealt with."""
        if not self._waiting:
            return None
        now = time.monotonic()
        for job in self._queued():
            if job.deadline is not None and job.deadline <= now:
                self._remove(job)
                self._finish(job, _late())
            elif job.expires is not None and job.expires <= now:
                self._expire(job)
            else:
                self._remove(job)
                return job
        return self._next()  # what is left was delayed just now

    def _expire(self, job: Job) -> None:
        self._remove(job)
        job.expires = None
        if self._plan.policy_of(job.level).timeout_action == DELAY:
            self._delayed.append(job)
            self._waiting += 1
        else:
            self._finish(
                job, ServiceError(Code.UNAVAILABLE, f"{job.label}Request timeout expired", "timeout")
            )

    def _hand_on(self, job: Job) -> bool:
        """Hands the permit of `job` to the next job; returns False if it has no permit any more."""
        if job not in self._leading:
            return False
        self._leading.remove(job)
        following = self._next()
        if following is not None:
            self._leading.add(following)
            following.state = _LEADS
            assert following.wake is not None
            following.wake.release()
        return True

    @staticmethod
    def _finish(job: Job, error: BaseException | None) -> None:
        job.error = error
        job.state = _DONE
        if job.wake is not None:
            job.wake.release()

    # -- the calling thread ----------------------------------------------------------

    def _wait(self, job: Job, wake: _thread.LockType) -> None:
        """Until the job is done, taken along, or leads."""
        while True:
            # Read once: whoever hands a permit on may end `expires` meanwhile.
            ends = [one for one in (job.deadline, job.expires) if one is not None]
            if not ends:
                break
            left = min(max(0.0, min(ends) - time.monotonic()), threading.TIMEOUT_MAX)
            if wake.acquire(timeout=left):
                return
            with self._lock:
                if job.state != _QUEUED:
                    break  # taken in the last moment: its runner finishes it
                now = time.monotonic()
                if job.deadline is not None and job.deadline <= now:
                    self._remove(job)
                    self._finish(job, _late())
                elif job.expires is not None and job.expires <= now:
                    self._expire(job)
        wake.acquire()

    def _lead(self, job: Job) -> None:
        job.company = jobs = [job]
        after: Callable[[], None] | None = None
        try:
            if job.batch_key is not None and self._plan.max_batch > 1:
                self._gather(jobs)
            now = time.monotonic_ns()
            for each in jobs:
                each.started = now
            after = self._execute(jobs)
        except BaseException as error:
            for each in jobs:
                each.error = each.error or error
        with self._lock:
            told = not self._hand_on(job)  # it was given up, and the others know
            job.state = _DONE
            job.company = []  # it is in there itself, and would outlive its caller
            for each in jobs[1:]:
                if not told:
                    each.state = _DONE
                    if each.wake is not None:
                        each.wake.release()
        if after is not None:
            after()

    def _gather(self, jobs: list[Job]) -> None:
        """Adds waiting jobs of the same key until a preferred size is reached, waiting at most the plan's
        delay for it; then as many as fit."""
        first = jobs[0]
        until = time.monotonic() + self._plan.delay
        with self._lock:
            while True:
                plan = self._plan
                company: list[Job] = []
                room = plan.max_batch - first.size
                for waiting in self._queued():
                    if waiting.batch_key == first.batch_key and waiting.size <= room:
                        company.append(waiting)
                        room -= waiting.size
                count = plan.share([each.size for each in (first, *company)])
                left = until - time.monotonic()
                if count == 0 and left > 0:
                    self._arrival.wait(left)
                    continue
                for each in company[: count - 1] if count else company:
                    self._remove(each)
                    each.state = _TAKEN
                    jobs.append(each)
                return


def _late() -> ServiceError:  # one each: an exception keeps the traceback of every thread that raised it
    return ServiceError(Code.DEADLINE_EXCEEDED, "Deadline Exceeded", "deadline")


def _cancelled() -> ServiceError:
    return ServiceError(Code.CANCELLED, "the client cancelled the request", "cancelled")


def _full(limit: int, remedy: str) -> ServiceError:
    message = f"Exceeds maximum queue size: {limit} requests are waiting; send fewer or {remedy}"
    return ServiceError(Code.RESOURCE_EXHAUSTED, message, "queue-full")
