"""Detects hung inference runs and frees their permits.

A thread that is inside an engine cannot be stopped.  The remedies: inside the watch window the version is
rolled back (`runtime/swap/watch.py` reads `Slot.hung`); a run of a version that is no longer live
loses its permit, so that the live one answers; and while every permit is held by such runs, requests are
refused instead of waiting, the model is not ready, and health says so.

Knows served models and their runs; the caller decides where reports go.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from runtime.serving.scheduler import Job
from runtime.serving.served_model import ServedModel
from runtime.serving.slot import Slot

log = logging.getLogger("roadworthy.hangs")
Tell = Callable[[str, int, str], None]  # model, version, what happened


class HungRunDetector(threading.Thread):
    """Checks every run in progress; a run that takes longer than `limit` seconds is hung.

    Only time in which this thread has seen the run counts: a process that was stopped, or a machine that was
    suspended, has not hung.
    """

    def __init__(self, hosts: Callable[[], Iterable[ServedModel]], limit: float, tell: Tell) -> None:
        super().__init__(name="hangs", daemon=True)
        self._hosts = hosts
        self._limit = limit
        self._interval = min(1.0, limit / 10)
        self._tell = tell
        self._ended = threading.Event()
        self._seen: dict[tuple[int, int], float] = {}  # a run -> seconds; not the run: it holds a frame
        self._lost: dict[str, list[tuple[Job, Slot]]] = {}  # runs without a permit, until they end

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self._interval):
            now = time.monotonic()
            passed, last = min(now - last, 2 * self._interval), now
            try:
                self.look(passed)
            except Exception:
                log.exception("looking for runs that hang")

    def look(self, passed: float) -> None:
        """Checks all runs once, `passed` seconds after the last check."""
        seen: dict[tuple[int, int], float] = {}
        for host in self._hosts():
            late: list[tuple[Job, Slot]] = []
            for job, slot in host.runs():
                key = (id(job), job.arrived)
                seen[key] = self._seen.get(key, -passed) + passed
                if seen[key] >= self._limit:
                    late.append((job, slot))
            self._judge(host, late)
        self._seen = seen

    def _judge(self, host: ServedModel, late: list[tuple[Job, Slot]]) -> None:
        lost = [(job, slot) for job, slot in self._lost.pop(host.name, []) if not job.done]
        hung = {slot for _, slot in (*late, *lost)}
        for slot in hung | set(host.loaded()):
            if slot.hung != (slot in hung):
                slot.hung = slot in hung
                what = f"a run has not ended after {self._limit:g} s" if slot.hung else "it runs again"
                self._tell(host.name, slot.version, what)
        live = host.live
        for job, slot in late:
            if slot is not live and host.give_up(job):
                lost.append((job, slot))
        if lost:
            self._lost[host.name] = lost
        host.hold_back(sum(slot is live for _, slot in late), self._limit)
