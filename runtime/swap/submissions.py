"""Submissions under way, and the queue that runs them one after the other.

`SubmissionQueue` serves both controllers: a model's and a group's.  Knows events; knows nothing of swaps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from runtime.errors import Code, ServiceError
from runtime.events import TERMINAL, Event


class Submission:
    """The events of one submission, for any number of followers.

    Following only reads; a follower that leaves stops nothing.  `model` is what was submitted to: a model, or
    a group.  The submission of a group carries the events of its members too.
    """

    def __init__(self, model: str, version: int, shadow: bool) -> None:
        self.model = model
        self.version = version
        self.shadow = shadow
        self._events: list[Event] = []
        self._changed = threading.Condition()

    def matches(self, other: Submission) -> bool:
        """True if both ask for the same thing: the later one then joins the earlier one."""
        return (self.version, self.shadow) == (other.version, other.shadow)

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def follow(self, alive: Callable[[], bool] = lambda: True) -> Iterator[Event]:
        """Yields every event from the first on, until `model` is LIVE or REJECTED (or `alive()` is False)."""
        index = 0
        while alive():
            with self._changed:
                if not self._changed.wait_for(lambda: len(self._events) > index, 0.5):  # noqa: B023
                    continue
                event = self._events[index]
            index += 1
            yield event
            if event.state in TERMINAL and event.model == self.model:
                return

    def result(self) -> Event:
        """Waits for the last event and returns it."""
        *_, last = self.follow()
        return last

    @property
    def state(self) -> str:
        """The state of the newest event; empty before the first one."""
        with self._changed:
            return self._events[-1].state.value if self._events else ""


S = TypeVar("S", bound=Submission)


class SubmissionQueue(Generic[S]):
    """Runs submissions in order, on one thread that ends when none is left.

    name: names the thread.  addressee: completes "… submissions" in the error of a full queue.
    lock: guards the queue; it may be held by the caller.  stopped, max_pending: read at each `submit`.
    run: called once per submission, without the lock; it must not raise.
    """

    def __init__(
        self,
        name: str,
        addressee: str,
        lock: threading.RLock,
        *,
        stopped: Callable[[], bool],
        max_pending: Callable[[], int],
        run: Callable[[S], None],
    ) -> None:
        self._name = name
        self._addressee = addressee
        self._lock = lock
        self._stopped = stopped
        self._max_pending = max_pending
        self._run = run
        self._pending: deque[S] = deque()
        self._current: S | None = None
        self._worker: threading.Thread | None = None

    @property
    def current(self) -> S | None:
        """The submission that runs now."""
        return self._current

    def unfinished(self) -> list[S]:
        """Returns the submission that runs and those that wait.  The caller holds the lock."""
        running = [self._current] if self._current is not None else []
        return [*running, *self._pending]

    def submit(self, submission: S) -> S:
        """Queues a submission; returns the unfinished one that matches it instead, if there is one.

        Raises ServiceError: UNAVAILABLE during shutdown, RESOURCE_EXHAUSTED if too many wait.
        """
        with self._lock:
            for each in self.unfinished():
                if each.matches(submission):
                    return each
            if self._stopped():
                raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
            if len(self._pending) >= self._max_pending():
                message = (
                    f"{len(self._pending)} submissions {self._addressee} wait already; submit again later"
                )
                raise ServiceError(Code.RESOURCE_EXHAUSTED, message, "queue-full")
            self._pending.append(submission)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"swap-{self._name}", daemon=True)
                self._worker.start()
            return submission

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._current = self._worker = None
                    return
                self._current = submission = self._pending.popleft()
            self._run(submission)
