"""A thread of low priority for whatever must not delay an answer."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from runtime.errors import Unjudged

T = TypeVar("T")


def lower(nice: int) -> None:
    """Lowers the priority of the calling thread (on Linux it is per thread); never raises it."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))


class LowPriority:
    """A thread of low priority that runs one task after the other.

    An unprivileged thread can lower its priority but never raise it again, so there is a new
    one for each swap.  One that hangs is left behind: it cannot be killed, and it is a daemon.
    """

    def __init__(self, nice: int) -> None:
        self._nice = nice
        self._task: Callable[[], None] | None = None
        self._wake = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="candidate", daemon=True)

    def __enter__(self) -> LowPriority:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._task = None
        self._wake.release()

    def call(self, function: Callable[[], T], timeout: float) -> T:
        """Runs `function` there.  Raises what it raises, or Refused("load", …) after `timeout` seconds."""
        done = threading.Event()
        result: list[T] = []
        errors: list[BaseException] = []

        def task() -> None:
            try:
                result.append(function())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._task = task
        self._wake.release()
        if not done.wait(timeout):
            raise Unjudged(  # by a machine that is busy as well as by an engine that hangs
                "load", f"the candidate did not finish within {timeout:.0f} s (engine.load_timeout)"
            )
        if errors:
            raise errors[0]
        return result[0]

    def _run(self) -> None:
        lower(self._nice)
        while True:
            self._wake.acquire()
            task, self._task = self._task, None
            if task is None:
                return
            task()
