"""The adapter's line to the server: what it reports, and the commands it gets, over one connection that comes
back.

A thread keeps `Client.adapter` open.  Reports are merged while nobody takes them (the newest of each part
counts), so reporting never blocks and a server that is away costs nothing.  Commands wait in a short queue
until the loop asks. Knows neither rounds nor frames.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Command", "Remote", "Silent"]


@dataclass(frozen=True)
class Command:
    """kind: "start_round" (values: reason), "cancel_round" or "set_collection" (values: on)."""

    id: int
    kind: str
    values: dict[str, Any] = field(default_factory=dict)


class Silent:
    """Nobody listens and nobody commands."""

    replaced = ""

    def poll(self) -> list[Command]:
        return []

    def answer(self, command: Command, accepted: bool, reason: str = "") -> None: ...

    def report(self, **parts: Any) -> None: ...

    def close(self) -> None: ...


class Remote(Silent):
    """Open until `close`.

    Args:
        client: a `runtime.client.Client`.
        name: of this adapter, the same after it was started again.
        interval: seconds at least between two reports; answers to commands go at once.
    """

    def __init__(self, client: Any, model: str, name: str, *, interval: float = 1.0) -> None:
        self._client, self._model, self._name, self._interval = client, model, name, interval
        self._changed = threading.Condition()
        self._parts: dict[str, Any] = {}  # the latest of everything: what a new connection says first
        self._fresh: dict[str, Any] = {}  # not sent yet
        self._results: deque[dict[str, Any]] = deque(maxlen=32)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._seen: deque[int] = deque(maxlen=256)
        self._closed = self._closing = False
        self._stream: Any = None
        self.replaced = ""  # why this adapter must not connect again
        self._thread = threading.Thread(target=self._run, name="adapter-line", daemon=True)
        self._thread.start()

    # -- the loop's side --------------------------------------------------------------------------------
    def poll(self) -> list[Command]:
        """Commands that came since; never waits."""
        found = []
        while True:
            try:
                found.append(self._commands.get_nowait())
            except queue.Empty:
                return found

    def answer(self, command: Command, accepted: bool, reason: str = "") -> None:
        with self._changed:
            self._results.append({"id": command.id, "accepted": accepted, "reason": reason[:500]})
            self._changed.notify_all()

    def report(self, **parts: Any) -> None:
        """Parts of an AdapterReport, nested dictionaries; replaces what was said of them before."""
        with self._changed:
            self._parts.update(parts)
            self._fresh.update(parts)
            self._changed.notify_all()

    def close(self) -> None:
        """What was reported last is sent first, where the server takes it within a second."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stream is None or not (self._fresh or self._results), 1.0)
        if self._stream is not None:
            time.sleep(0.1)  # gRPC has it, and puts it on the wire
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            stream = self._stream
        if stream is not None:
            stream.close()
        self._thread.join(5.0)

    # -- the thread -------------------------------------------------------------------------------------
    def _run(self) -> None:
        pause = 0.5
        while not self._closed:
            begun = time.monotonic()
            try:
                self._connected()
            except (
                Exception
            ) as error:  # the server is away, too old, or refuses: perception does not depend on it
                code = getattr(error, "code", "")
                code = code() if callable(code) else code
                if getattr(code, "name", code) in ("ABORTED", "ALREADY_EXISTS"):
                    self.replaced = str(getattr(error, "reason", error))
                    if getattr(code, "name", code) == "ABORTED":
                        return
            if time.monotonic() - begun > 10:
                pause = 0.5
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause)
            pause = min(2 * pause, 15.0)

    def _connected(self) -> None:
        ended = threading.Event()
        stream = self._client.adapter(self._reports(ended))
        with self._changed:
            self._stream = stream
            if self._closed:
                stream.close()
        try:
            for told in stream:
                self.replaced = ""
                for kind in ("start_round", "cancel_round", "set_collection"):
                    if kind in told and told[kind] is not None and int(told.get("id", 0)) not in self._seen:
                        number = int(told.get("id", 0))
                        self._seen.append(number)
                        self._commands.put(Command(number, kind, dict(told[kind])))
        finally:
            ended.set()
            with self._changed:
                self._stream = None
                self._changed.notify_all()
            stream.close()

    def _reports(self, ended: threading.Event) -> Iterator[dict[str, Any]]:
        """What goes out; runs in a thread of gRPC's."""
        with self._changed:
            self._seen.clear()  # numbers are the connection's
            self._fresh.clear()
            first = {"model": self._model, "name": self._name, "pid": os.getpid(), **self._parts}
        yield {**first, "time": time.time()}
        due = time.monotonic() + self._interval
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or ended.is_set() or bool(self._results) or bool(self._fresh), 5.0
                )
                if self._closed or ended.is_set():
                    return
                results, self._results = self._results, deque(maxlen=32)
                if not results and not self._closing and time.monotonic() < due:
                    self._changed.wait_for(
                        lambda: self._closed or self._closing or ended.is_set() or bool(self._results),
                        due - time.monotonic(),
                    )
                    continue
                parts, self._fresh = self._fresh, {}
            due = time.monotonic() + self._interval
            for result in results or [None]:
                told = {**parts, "time": time.time()}
                if result is not None:
                    told["result"] = result
                parts = {}
                yield told
