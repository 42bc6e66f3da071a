"""Publishes the events of a swap: to the history on disk, the log, the bus and the submission.

Knows the repository and the bus; knows nothing of swaps.
"""

from __future__ import annotations

import logging
from typing import Any

from runtime.events import Bus, Event, State
from runtime.repository.repository import Repository
from runtime.swap.submissions import Submission

log = logging.getLogger("roadworthy.swap")


class EventPublisher:
    """Publishes the events of one model (or group) in the order of its calls."""

    def __init__(self, model: str, repository: Repository, bus: Bus) -> None:
        self._model = model
        self._repository = repository
        self._bus = bus

    def publish(self, event: Event, submission: Submission | None = None) -> Event:
        """Writes the event to history.jsonl and the log, then tells the watchers.  Never raises OSError: a
        full disk must not stop a rollback.
        """
        try:
            self._append(event)
        except OSError as error:
            self._log.error("history of %s: %s", self._model, error)
        self._write_log(event)
        self._bus.publish(event)
        if submission is not None:
            submission.put(event)
        return event

    def note(self, version: int, check: str, reason: str, detail: dict[str, Any] | None = None) -> None:
        """Publishes something that an operator should know and that changes no version's state."""
        self.publish(Event(self._model, version, State.NOTE, check, reason, detail or {}))

    _log = log

    def _append(self, event: Event) -> None:
        self._repository.append_history(self._model, event.line())

    def _write_log(self, event: Event) -> None:
        values = (event.model, event.version, event.state.value, event.check, event.reason)
        self._log.info("%s version %s %s %s %s", *values, extra=event.fields())


class GroupEventPublisher(EventPublisher):
    """Publishes the events of one group, whose directory may not exist before the first event.

    latest: the last two events, oldest first.
    """

    _log = logging.getLogger("roadworthy.groups")

    def __init__(self, group: str, repository: Repository, bus: Bus) -> None:
        super().__init__(group, repository, bus)
        self.latest: list[Event] = []

    def publish(self, event: Event, submission: Submission | None = None) -> Event:
        super().publish(event, submission)
        self.latest = [*self.latest[-1:], event]
        return event

    def _append(self, event: Event) -> None:
        self._repository.ensure_model_dir(self._model)
        super()._append(event)

    def _write_log(self, event: Event) -> None:
        values = (event.model, event.version, event.state.value, event.reason)
        self._log.info("group %s %s %s %s", *values, extra=event.fields())
