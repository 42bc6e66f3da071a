"""A submission under way, as those see it who wait for its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from runtime.events import TERMINAL, Event


class Ticket:
    """The events of one submission, for any number of followers.  Following is reading; leaving stops
    nothing.  `model` is what was submitted to: a model, or a group, whose ticket carries its members' events
    too.
    """

    def __init__(self, model: str, version: int, shadow: bool) -> None:
        self.model = model
        self.version = version
        self.shadow = shadow
        self._events: list[Event] = []
        self._changed = threading.Condition()

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def follow(self, alive: Callable[[], bool] = lambda: True) -> Iterator[Event]:
        """Every event from the first on, until `model` is LIVE or REJECTED (or until `alive()` is False)."""
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
        """Waits for the last event."""
        *_, last = self.follow()
        return last

    @property
    def state(self) -> str:
        with self._changed:
            return self._events[-1].state.value if self._events else ""
