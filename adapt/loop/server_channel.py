"""The adapter's channel to the server: reports go out, commands come in, over one connection that reconnects.

A thread keeps `Client.adapter` open.  While the server takes no report, newer parts replace older ones, so
reporting never blocks and a server that is away costs nothing.  Commands wait in a queue until the loop
polls.  Knows neither rounds nor frames.
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

__all__ = ["Command", "ControlChannel", "NullChannel"]

COMMANDS = ("start_round", "cancel_round", "set_collection")


@dataclass(frozen=True)
class Command:
    """kind: "start_round" (values: reason), "cancel_round" or "set_collection" (values: on)."""

    id: int
    kind: str
    values: dict[str, Any] = field(default_factory=dict)


class NullChannel:
    """No-op channel: no commands, reports are dropped.

    replaced: why another adapter has taken this one's place at the server, one line; "" if none has.
    listening: True if reports reach a server.
    """

    replaced = ""
    listening = False

    def open(self) -> None: ...

    def poll(self) -> list[Command]:
        return []

    def answer(self, command: Command, accepted: bool, reason: str = "") -> None: ...

    def report(self, **parts: Any) -> None: ...

    def close(self) -> None: ...


class ControlChannel(NullChannel):
    """A channel that is connected from `open` to `close`.

    Args:
        client: a `runtime.client.Client`.
        name: of this adapter; the same after a restart.
        interval: least seconds between two reports; answers to commands are sent at once.
    """

    listening = True

    def __init__(self, client: Any, model: str, name: str, *, interval: float = 1.0) -> None:
        self._client, self._model, self._name, self._interval = client, model, name, interval
        self._changed = threading.Condition()
        self._parts: dict[str, Any] = {}  # the latest of every part: a new connection starts with them
        self._unsent: dict[str, Any] = {}
        self._results: deque[dict[str, Any]] = deque(maxlen=32)
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._seen: deque[int] = deque(maxlen=256)
        self._closed = self._closing = False
        self._stream: Any = None
        self._thread: threading.Thread | None = None
        self.replaced = ""

    # -- the loop's side --------------------------------------------------------------------------------
    def open(self) -> None:
        """Connect, and connect again whenever the connection is lost."""
        self._thread = threading.Thread(target=self._run, name="adapter-line", daemon=True)
        self._thread.start()

    def poll(self) -> list[Command]:
        """Return the commands that came since the last call; never waits."""
        commands = []
        while True:
            try:
                commands.append(self._commands.get_nowait())
            except queue.Empty:
                return commands

    def answer(self, command: Command, accepted: bool, reason: str = "") -> None:
        with self._changed:
            self._results.append({"id": command.id, "accepted": accepted, "reason": reason[:500]})
            self._changed.notify_all()

    def report(self, **parts: Any) -> None:
        """Send parts of an AdapterReport, nested dictionaries.  Each replaces the part of the same name."""
        with self._changed:
            self._parts.update(parts)
            self._unsent.update(parts)
            self._changed.notify_all()

    def close(self) -> None:
        """Disconnect.  The latest report is sent first if the server takes it within a second."""
        if self._thread is None:
            return
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stream is None or not (self._unsent or self._results), 1.0)
        if self._stream is not None:
            time.sleep(0.1)  # gRPC has the report now and needs a moment to send it
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
            began = time.monotonic()
            try:
                self._connected()
            except Exception as error:  # the server is away, too old, or refuses: the loop goes on without it
                code = getattr(error, "code", "")
                code = code() if callable(code) else code
                if getattr(code, "name", code) in ("ABORTED", "ALREADY_EXISTS"):
                    self.replaced = str(getattr(error, "reason", error))
                    if getattr(code, "name", code) == "ABORTED":
                        return
            if time.monotonic() - began > 10:
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
            for message in stream:
                self.replaced = ""
                number = int(message.get("id", 0))
                for kind in COMMANDS:
                    if message.get(kind) is not None and number not in self._seen:
                        self._seen.append(number)
                        self._commands.put(Command(number, kind, dict(message[kind])))
        finally:
            ended.set()
            with self._changed:
                self._stream = None
                self._changed.notify_all()
            stream.close()

    def _reports(self, ended: threading.Event) -> Iterator[dict[str, Any]]:
        """Yield the reports to send; runs in a thread of gRPC."""
        with self._changed:
            self._seen.clear()  # command numbers start again with each connection
            self._unsent.clear()
            first = {"model": self._model, "name": self._name, "pid": os.getpid(), **self._parts}
        yield {**first, "time": time.time()}
        due = time.monotonic() + self._interval
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closed or ended.is_set() or bool(self._results) or bool(self._unsent), 5.0
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
                parts, self._unsent = self._unsent, {}
            due = time.monotonic() + self._interval
            for result in results or [None]:
                message = {**parts, "time": time.time()}
                if result is not None:
                    message["result"] = result
                parts = {}
                yield message
