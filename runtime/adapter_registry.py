"""The adapters that are connected: what they say, and the commands that go to them.

One adapter a model.  A report is a dictionary of plain values (the edge converts and bounds it); of each
part the latest is kept.  Watchers read the latest state when they come to it, so that neither an adapter
that reports too often nor a watcher that is slow takes memory.  Commands wait in a short queue and are
answered by the adapter's own words.  Knows no gRPC.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from runtime.errors import Code, ServiceError

COMMANDS = 8  # that may wait for one adapter, sent or not
LIMIT = 64  # adapters connected at the same time
REASON = 500  # characters of a reason, in either direction
INTERVAL = 1.0  # seconds between reports that adapters are asked for
RATE, BURST = 20.0, 40.0  # reports a second that are read from one adapter; others wait in its connection
OUTCOMES = ("LIVE", "REJECTED", "REFUSED", "CANCELLED", "FAILED")
WATCH = 0.1  # seconds at least between two reports to one watcher


@dataclass(eq=False)
class Command:
    """`kind`: "start_round", "cancel_round" or "set_collection".  Answered when `accepted` is not None."""

    id: int
    kind: str
    values: dict[str, Any]
    time: float
    accepted: bool | None = None
    reason: str = ""


@dataclass(eq=False)
class Adapter:
    """One connection.  Its fields change under the lock of `Adapters`."""

    model: str
    name: str
    pid: int
    peer: str
    connected: float = field(default_factory=time.time)
    disconnected: float = 0.0
    reason: str = ""  # why it is no longer connected
    replaced: bool = False
    reported: float = 0.0
    reports: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    commands: dict[int, Command] = field(default_factory=dict)  # not answered yet
    outbox: deque[Command] = field(default_factory=deque)  # of those, not sent yet


@dataclass(frozen=True)
class AdapterState:
    """A snapshot of one connection; times are seconds since the epoch, disconnected 0.0 while it is there."""

    name: str
    pid: int
    peer: str
    connected: float
    disconnected: float
    reported: float
    reports: int
    report: dict[str, Any]
    commands_waiting: int
    reason: str


class Adapters:
    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._connected: dict[str, Adapter] = {}
        self._last: dict[str, AdapterState] = {}
        self._ids = itertools.count(1)
        self._finished: Counter[tuple[str, str]] = Counter()  # (model, state of the outcome)
        self._closed = False

    # -- the adapter's side ----------------------------------------------------------

    def register(self, model: str, name: str, pid: int, peer: str) -> Adapter:
        """Raises ServiceError: ALREADY_EXISTS while another one adapts the model."""
        adapter = Adapter(model, name, pid, peer)
        with self._changed:
            if self._closed:
                raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
            there = self._connected.get(model)
            if there is not None and there.name != name:
                message = (
                    f"'{model}' is adapted by '{there.name}' (process {there.pid}) already; stop that one"
                )
                raise ServiceError(Code.ALREADY_EXISTS, message, "adapter")
            if there is None and len(self._connected) >= LIMIT:
                message = f"{LIMIT} adapters are connected; stop one"
                raise ServiceError(Code.RESOURCE_EXHAUSTED, message, "adapter")
            if there is not None:
                there.replaced = True
                self._gone(there, "replaced by a new connection of the same name")
            self._connected[model] = adapter
            self._changed.notify_all()
        return adapter

    def report(self, adapter: Adapter, report: dict[str, Any]) -> None:
        """Takes a report part by part: what it does not mention stays as it was, except that a new `phase`
        takes the place of the old one's progress, round and note as well.
        """
        with self._changed:
            adapter.reported = time.time()
            adapter.reports += 1
            result = report.pop("result", None)
            if result is not None:
                command = adapter.commands.pop(result.get("id", 0), None)
                if command is not None:
                    command.accepted = bool(result.get("accepted", False))
                    command.reason = str(result.get("reason", ""))[:REASON]
                    if command in adapter.outbox:
                        adapter.outbox.remove(command)
            kept = adapter.report
            last = report.get("last")
            if last is not None and last != kept.get("last") and last.get("state") in OUTCOMES:
                known = (self._last[adapter.model].report if adapter.model in self._last else {}).get("last")
                if "last" in kept or last != known:  # not what an earlier connection has told already
                    self._finished[adapter.model, last["state"]] += 1
            if "phase" in report:
                kept = {key: value for key, value in kept.items() if key not in ("progress", "round", "note")}
            adapter.report = {**kept, **report}
            self._changed.notify_all()

    def unregister(self, adapter: Adapter, reason: str) -> None:
        with self._changed:
            self._gone(adapter, reason)

    def _gone(self, adapter: Adapter, reason: str) -> None:
        if adapter.disconnected:
            return
        adapter.disconnected, adapter.reason = time.time(), reason
        for command in adapter.commands.values():
            command.accepted, command.reason = False, f"the adapter went away: {reason}"
        adapter.commands.clear()
        adapter.outbox.clear()
        if self._connected.get(adapter.model) is adapter:
            del self._connected[adapter.model]
            self._last[adapter.model] = _state(adapter)
        self._changed.notify_all()

    def outgoing(self, adapter: Adapter, alive: Callable[[], bool]) -> Iterator[Command]:
        """The commands for an adapter, until it is gone."""
        while alive():
            with self._changed:
                self._changed.wait_for(lambda: bool(adapter.outbox) or bool(adapter.disconnected), 1.0)
                if adapter.disconnected:
                    return
                if not adapter.outbox:
                    continue
                command = adapter.outbox.popleft()
            yield command

    # -- the operator's side ---------------------------------------------------------

    def command(
        self, model: str, kind: str, values: dict[str, Any], *, wait: float, alive: Callable[[], bool]
    ) -> Command:
        """Sends a command and waits for the adapter's answer, at most `wait` seconds.

        Raises ServiceError: FAILED_PRECONDITION without an adapter or when it refuses, RESOURCE_EXHAUSTED
        when too many commands wait.
        """
        until = time.monotonic() + wait
        with self._changed:
            adapter = self._connected.get(model)
            if adapter is None:
                message = (
                    f"no adapter of '{model}' is connected; start one: python -m adapt.run --model {model} …"
                )
                raise ServiceError(Code.FAILED_PRECONDITION, message, "no-adapter")
            if len(adapter.commands) >= COMMANDS:
                message = f"{COMMANDS} commands wait for the adapter '{adapter.name}' already; try later"
                raise ServiceError(Code.RESOURCE_EXHAUSTED, message, "queue-full")
            command = Command(next(self._ids), kind, values, time.time())
            adapter.commands[command.id] = command
            adapter.outbox.append(command)
            self._changed.notify_all()
        # `alive` is gRPC's: not under the lock.
        while command.accepted is None and alive() and (left := until - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait_for(lambda: command.accepted is not None, min(left, 0.5))
        if command.accepted is False:
            why = command.reason or "no reason given"
            message = f"the adapter '{adapter.name}' of '{model}' refuses: {why}"
            raise ServiceError(Code.FAILED_PRECONDITION, message, "adapter")
        return command

    def connected(self, model: str) -> AdapterState | None:
        with self._changed:
            adapter = self._connected.get(model)
            return None if adapter is None else _state(adapter)

    def last(self, model: str) -> AdapterState | None:
        """The one that went away last."""
        with self._changed:
            return self._last.get(model)

    def finished(self) -> dict[tuple[str, str], int]:
        """Rounds that came to an end since the server was started: {(model, outcome): count}."""
        with self._changed:
            return dict(self._finished)

    def watch(self, model: str, alive: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """The merged report of the model's adapter: at once where there is one, then whenever it has changed.

        Goes on over connections that end and begin.  Ends with the server.
        """
        seen: tuple[Any, int] = (None, -1)

        def news() -> Adapter | None:
            adapter = self._connected.get(model)
            if adapter is not None and adapter.reports and (adapter, adapter.reports) != seen:
                return adapter
            return None

        while alive():
            with self._changed:
                self._changed.wait_for(lambda: self._closed or news() is not None, 1.0)
                if self._closed:
                    return
                adapter = news()
                if adapter is None:
                    continue
                seen = (adapter, adapter.reports)
                report = adapter.report
            yield report
            time.sleep(WATCH)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for adapter in list(self._connected.values()):
                self._gone(adapter, "the server is shutting down")
            self._changed.notify_all()


class Pace:
    """A token bucket: `wait()` sleeps when called more than `rate` times a second after `burst` calls."""

    def __init__(self, rate: float = RATE, burst: float = BURST) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at = burst, time.monotonic()

    def wait(self) -> None:
        now = time.monotonic()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - 1.0
        self._at = now
        if self._left < 0:
            time.sleep(-self._left / self._rate)


def _state(adapter: Adapter) -> AdapterState:
    return AdapterState(
        adapter.name,
        adapter.pid,
        adapter.peer,
        adapter.connected,
        adapter.disconnected,
        adapter.reported,
        adapter.reports,
        adapter.report,
        len(adapter.commands),
        adapter.reason,
    )
