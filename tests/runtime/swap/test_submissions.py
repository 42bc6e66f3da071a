"""The queue of submissions: joined, in order, bounded, and closed during shutdown."""

from __future__ import annotations

import threading

import pytest

from runtime.errors import ServiceError
from runtime.events import Event, State
from runtime.swap.submissions import Submission, SubmissionQueue
from tests.waits import PATIENCE, until


class Gate:
    """Runs submissions one by one; each waits until the gate is open, and then becomes live."""

    def __init__(self, max_pending: int = 2) -> None:
        self.open = threading.Event()
        self.stopped = False
        self.ran: list[int] = []
        self.lock = threading.RLock()
        self.queue: SubmissionQueue[Submission] = SubmissionQueue(
            "road",
            "of 'road'",
            self.lock,
            stopped=lambda: self.stopped,
            max_pending=lambda: max_pending,
            run=self.run,
        )

    def run(self, submission: Submission) -> None:
        assert self.open.wait(PATIENCE)
        self.ran.append(submission.version)
        submission.put(Event("road", submission.version, State.LIVE))

    def submit(self, version: int, shadow: bool = True) -> Submission:
        return self.queue.submit(Submission("road", version, shadow))


def test_submissions_run_in_order_and_the_thread_ends_with_the_last():
    gate = Gate()
    first = gate.submit(1)
    until(lambda: gate.queue.current is first)
    others = [gate.submit(2), gate.submit(3)]
    with gate.lock:
        assert gate.queue.unfinished() == [first, *others]
    gate.open.set()
    assert [each.result().version for each in (first, *others)] == [1, 2, 3]
    assert gate.ran == [1, 2, 3]
    until(lambda: gate.queue.current is None)
    assert gate.submit(4).result().version == 4  # on a new thread


def test_what_is_under_way_is_joined_and_not_repeated():
    gate = Gate()
    first = gate.submit(1)
    until(lambda: gate.queue.current is first)
    second = gate.submit(2)
    assert gate.submit(1) is first
    assert gate.submit(2) is second
    assert gate.submit(2, shadow=False) is not second
    gate.open.set()
    assert second.result().state == "LIVE"


def test_a_full_queue_and_a_shutdown_refuse_but_still_join():
    gate = Gate(max_pending=1)
    first = gate.submit(1)
    until(lambda: gate.queue.current is first)
    second = gate.submit(2)
    with pytest.raises(
        ServiceError, match="1 submissions of 'road' wait already; submit again later"
    ) as full:
        gate.submit(3)
    assert full.value.reason == "queue-full"
    gate.stopped = True
    with pytest.raises(ServiceError, match="shutting down") as stopped:
        gate.submit(3)
    assert stopped.value.reason == "draining"
    assert gate.submit(2) is second
    gate.open.set()
    assert second.result().version == 2
