"""Events of the guarded swap, and the bus that carries them to watchers.

A slow watcher loses its oldest events; it never delays a swap.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from runtime.observability import logs


class State(StrEnum):
    SUBMITTED = "SUBMITTED"
    VERIFIED = "VERIFIED"
    SHADOWING = "SHADOWING"
    LIVE = "LIVE"
    RETIRED = "RETIRED"
    ROLLED_BACK = "ROLLED_BACK"
    REJECTED = "REJECTED"
    NOTE = "NOTE"  # something a person should know; the version's state does not change


TERMINAL = (State.LIVE, State.REJECTED)


@dataclass(frozen=True)
class Event:
    """One transition of one version."""

    model: str
    version: int
    state: State
    check: str = ""
    reason: str = ""
    detail: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)

    def fields(self) -> dict[str, Any]:
        """What a structured log says of it."""
        return logs.fields(
            model=self.model,
            version=self.version,
            state=self.state.value,
            check=self.check,
            reason=self.reason,
        )

    def line(self) -> dict[str, Any]:
        """The line of history.jsonl."""
        return {
            "time": self.time,
            "version": self.version,
            "state": self.state.value,
            "check": self.check,
            "reason": self.reason,
            "detail": self.detail,
        }


class Subscription:
    """A bounded queue of events."""

    def __init__(self, model: str, limit: int) -> None:
        self.model = model
        self._events: deque[Event] = deque(maxlen=limit)
        self._changed = threading.Condition()
        self._closed = False

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def __iter__(self) -> Iterator[Event]:
        while (event := self.get()) is not None:
            yield event

    def get(self, timeout: float | None = None) -> Event | None:
        """The next event; None when closed and empty, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._events) or self._closed, timeout)
            return self._events.popleft() if self._events else None


class Bus:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._subscriptions: list[Subscription] = []

    def publish(self, event: Event) -> None:
        with self._lock:
            subscriptions = list(self._subscriptions)
        for subscription in subscriptions:
            if subscription.model in ("", event.model):
                subscription.put(event)

    def subscribe(self, model: str = "", limit: int = 1024) -> Subscription:
        subscription = Subscription(model, limit)
        with self._lock:
            self._subscriptions.append(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
        subscription.close()

    def close(self) -> None:
        with self._lock:
            subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            subscription.close()
