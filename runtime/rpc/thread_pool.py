"""The threads that answer calls: what gRPC asks of a ThreadPoolExecutor, and nothing else.

The standard one makes a Future with a condition of its own for every call, and takes four
locks written in Python on the way; here it is a queue and one lock.  Knows nothing of gRPC
but that it submits calls that raise nothing and wants to be told when each is done.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent import futures
from typing import Any

log = logging.getLogger("roadworthy.pool")


class Done:
    """One submitted call."""

    __slots__ = ("_callback", "_lock", "_over")

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._over = False
        self._callback: Callable[[Any], object] | None = None

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Calls it when the call is over, or now.  One callback a call."""
        with self._lock:
            if not self._over:
                self._callback = callback
                return
        callback(self)

    def finish(self) -> None:
        with self._lock:
            self._over = True
            callback = self._callback
        if callback is not None:
            callback(self)


class RpcThreadPool(futures.ThreadPoolExecutor):
    """At most `limit` threads, made when one is needed and none is free.

    A ThreadPoolExecutor by name alone: gRPC takes no other class for the threads of one method.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...], Done] | None] = (
            queue.SimpleQueue()
        )
        self._free = 0  # threads that wait, less the calls that are on their way to one
        self._made = 0
        self._ended = False
        self._load = 0

    @property
    def load(self) -> int:
        """Calls that were submitted and are not over."""
        return self._load

    def submit(self, function: Callable[..., object], /, *arguments: Any) -> Done:  # type: ignore[override]
        """Raises RuntimeError after `shutdown`."""
        done = Done(self._lock)
        with self._lock:
            if self._ended:
                raise RuntimeError("the pool has been shut down")
            self._load += 1
            start = self._free <= 0 and self._made < self._limit
            if start:
                self._made += 1
                number = self._made
            else:
                self._free -= 1
        self._calls.put((function, arguments, done))
        if start:
            self._start(number)
        return done

    def _start(self, number: int) -> None:
        try:
            threading.Thread(target=self._work, name=f"{self._name}_{number}", daemon=True).start()
        except RuntimeError as error:  # the system gives no more: the call waits for a thread there is
            log.error("no thread for a call, %d there are: %s", number - 1, error)
            with self._lock:
                self._made -= 1
                self._free -= 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Threads end after what they have; nothing is waited for: a call that hangs must not hold a stop."""
        with self._lock:
            self._ended = True
            threads = self._made
        for _ in range(threads):
            self._calls.put(None)

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            if call is None:
                return
            function, arguments, done = call
            try:
                function(*arguments)
            except BaseException:
                log.exception("a call")
            finally:
                with self._lock:
                    self._load -= 1
                done.finish()
            # A thread that waits must not keep the last request alive.
            del call, function, arguments, done
            with self._lock:
                self._free += 1
