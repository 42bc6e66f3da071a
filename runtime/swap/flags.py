"""The flags by which an operator holds a model: pinned to its live version, or frozen against flips.

Knows live.json; knows nothing of how a version is checked.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import Code, Refused, ServiceError
from runtime.swap.context import SwapContext
from runtime.swap.live_record import LiveRecord

log = logging.getLogger("roadworthy.swap")


class OperatorFlags:
    """The flags of one model.  A flag that cannot be recorded does not hold."""

    def __init__(self, context: SwapContext, record: LiveRecord) -> None:
        self.model = context.model
        self._context = context
        self._record = record
        self._lock = context.scope.state_lock
        self._changed = threading.Condition(self._lock)
        state = record.read()[0]
        self.pinned = bool(state.get("pinned"))
        self.frozen = bool(state.get("frozen"))
        self.frozen_reason = str(state.get("frozen_reason", ""))

    @property
    def values(self) -> dict[str, Any]:
        """The flags as live.json stores them."""
        return {"pinned": self.pinned, "frozen": self.frozen, "frozen_reason": self.frozen_reason}

    def pin(self, version: int) -> None:
        """Pins the live version (0 or its number).  Raises ServiceError for any other: promote it first."""
        self._context.repository.check_writable()
        with self._lock:
            live = self._context.host.live
            if live is None or version not in (0, live.version):
                now = "nothing is" if live is None else f"version {live.version} is"
                message = f"version {version} of '{self.model}' is not live ({now}); promote it, then pin"
                raise ServiceError(Code.FAILED_PRECONDITION, message, "state")
            self._set("pinned", pinned=True)

    def unpin(self) -> None:
        self._context.repository.check_writable()
        with self._lock:
            self._set("unpinned", pinned=False)

    def freeze(self, reason: str) -> None:
        """Forbids flips to other versions.  A rollback to the previous version stays possible: it is the
        safe direction.
        """
        self._context.repository.check_writable()
        with self._lock:
            self._set(f"frozen: {reason}" if reason else "frozen", frozen=True, frozen_reason=reason)

    def unfreeze(self) -> None:
        self._context.repository.check_writable()
        with self._lock:
            self._set("unfrozen", frozen=False, frozen_reason="")

    def restore(self, values: Mapping[str, Any], reason: str) -> None:
        """Sets all flags.  Raises ServiceError(INTERNAL) if they cannot be recorded."""
        with self._lock:
            self._set(reason, **values)

    def _set(self, reason: str, **changes: Any) -> None:
        values = {**self.values, **changes}
        live, previous = self._context.host.live, self._context.host.previous
        try:
            state = dict(self._record.read()[0])
            state |= {
                "live": live.version if live else state.get("live"),
                "previous": previous.version if previous else state.get("previous"),
            }
            self._record.write({**state, **values})
        except (Refused, OSError) as error:
            message = f"'{self.model}' stays as it was: {error}; make room or mend it, and ask again"
            raise ServiceError(Code.INTERNAL, message, "record") from error
        self.pinned, self.frozen = values["pinned"], values["frozen"]
        self.frozen_reason = values["frozen_reason"]
        # If live.json is lost, the flags are read back from this line of the history.
        self._context.publisher.note(live.version if live else 0, "", reason, values)
        self._changed.notify_all()

    def wake(self) -> None:
        """Wakes what waits in `wait_unfrozen`: the server stops.  The caller holds the state lock."""
        self._changed.notify_all()

    def wait_unfrozen(self, version: int) -> None:
        """Waits up to swap.freeze_wait seconds for an unfreeze.  Raises Refused if the version may not
        flip.
        """
        wait = self._context.config.swap.freeze_wait
        with self._lock:
            if self.frozen and wait > 0:
                self._changed.wait_for(lambda: not self.frozen or self._context.stopping.is_set(), wait)
            self.check_flip(version)

    def check_flip(self, version: int) -> None:
        """Raises Refused if the server stops, or if the flags forbid that the version becomes live."""
        with self._lock:
            if self._context.stopping.is_set():
                raise Refused("stopping", "the server is shutting down; submit again")
            if self.frozen:
                why = f" ({self.frozen_reason})" if self.frozen_reason else ""
                raise Refused("frozen", f"flips of '{self.model}' are frozen{why}; unfreeze and submit again")
            live = self._context.host.live
            if self.pinned and live is not None and live.version != version:
                raise Refused(
                    "pinned", f"'{self.model}' is pinned to version {live.version}; unpin and submit again"
                )


def change_all(models: Sequence[OperatorFlags], change: Callable[[OperatorFlags], None]) -> None:
    """Applies the same change to all models, or to none: if one cannot be recorded, those before it are
    restored.  Raises what `change` raises.
    """
    done: list[tuple[OperatorFlags, dict[str, Any]]] = []
    try:
        for flags in models:
            values = flags.values
            change(flags)
            done.append((flags, values))
    except ServiceError as error:
        for flags, values in reversed(done):
            try:
                flags.restore(values, "taken back: another model could not be recorded")
            except ServiceError as failure:
                error.add_note(str(failure))
                log.error("%s: %s", flags.model, failure)
        raise
