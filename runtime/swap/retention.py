"""Which versions of a model may become live, and which old ones are deleted.

Knows the repository and its history; knows nothing of how a version is checked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.errors import Refused
from runtime.events import State
from runtime.swap.context import SwapContext
from runtime.swap.live_record import LiveRecord

log = logging.getLogger("roadworthy.swap")

#: Checks that fail for a reason of the server, of the machine or of an operator, not of the version.
_NOT_ITS_FAULT = (
    *("frozen", "pinned", "stopping", "superseded", "record", "internal", "group"),
    *("memory", "signature", "latency", "shadow-latency"),  # limits, keys and speed are the server's
)


class Retention:
    """The versions of one model.  `submitted` returns those of unfinished submissions."""

    def __init__(self, context: SwapContext, record: LiveRecord, submitted: Callable[[], set[int]]) -> None:
        self._context = context
        self._repository = context.repository
        self._record = record
        self._submitted = submitted
        self._model = context.model

    def excluded_versions(self) -> set[Any]:
        """Returns the versions that are not eligible at start-up: rejected for a fault of their own, or
        rolled back, and not live since.
        """
        excluded: set[Any] = set()
        for entry in self._repository.history(self._model):
            state, version = entry.get("state"), entry.get("version")
            if not version:
                continue
            judged = (entry.get("detail") or {}).get("judged") is not False
            blamed = state == State.REJECTED.value and judged and entry.get("check") not in _NOT_ITS_FAULT
            if blamed or state == State.ROLLED_BACK.value:
                excluded.add(version)
            elif state == State.LIVE.value:
                excluded.discard(version)
        return excluded

    def newest_eligible(self) -> int | None:
        """Returns the highest version that may become live (see `excluded_versions`), or None."""
        excluded = self.excluded_versions()
        return max((n for n in self._repository.versions(self._model) if n not in excluded), default=None)

    def last_entry_is_adverse(self, version: int) -> bool:
        """True if the newest entry of the history on a version is not that it became live."""
        adverse = False
        for entry in self._repository.history(self._model):
            if entry.get("version") == version:
                noted = (entry.get("detail") or {}).get("judged") is False
                if noted or entry.get("state") in (State.REJECTED.value, State.ROLLED_BACK.value):
                    adverse = True
                elif entry.get("state") == State.LIVE.value:
                    adverse = False
        return adverse

    def prune_configured(self) -> None:
        """Deletes old versions as `keep_versions` of the configuration demands.  Never raises: its thread
        has other swaps to run.
        """
        keep = self._context.config.keep_versions
        if keep > 0 and not self._context.stopping.is_set() and not self._repository.read_only:
            try:
                self.prune(keep)
            except Exception as error:
                log.error("old versions of %s cannot be deleted: %s", self._model, error)

    def prune(self, keep: int) -> list[int]:
        """Deletes versions that rounds of adaptation made, except the newest `keep`; returns their numbers.

        Protected versions stay (`_protected`), and so does every version that no round made or whose
        manifest cannot be read.  Raises OSError.
        """
        self._repository.check_writable()
        deleted: dict[int, Path] = {}
        with self._context.scope.state_lock:
            protected = self._protected()
            adapted = [n for n in self._repository.versions(self._model) if self._adapted(n)]
            try:
                for number in adapted[: max(0, len(adapted) - keep)]:
                    if number not in protected:
                        deleted[number] = self._repository.mark_deleted(self._model, number)
            except BaseException:  # all of them or none: the answer equals what is on disk
                for number, path in deleted.items():
                    self._repository.restore_deleted(self._model, number, path)
                raise
            for number in deleted:
                reason = f"deleted: the newest {keep} of {len(adapted)} are kept"
                self._context.publisher.note(number, "pruned", reason)
        for path in deleted.values():  # no longer visible, and maybe large: not under the lock
            self._repository.remove(path)
        return list(deleted)

    def _protected(self) -> set[int]:
        """Returns the versions that must not be pruned: loaded, recorded, submitted, or referenced by a
        generation of the group.  The caller holds the state lock.
        """
        host = self._context.host
        protected = {slot.version for slot in host.loaded()}
        protected |= self._context.scope.referenced_versions(self._model)
        protected |= self._submitted()
        protected |= set(host.unloaded)
        state = self._record.read()[0]
        return protected | {n for n in (state.get("live"), state.get("previous")) if isinstance(n, int)}

    def _adapted(self, number: int) -> bool:
        try:
            return bool(self._repository.manifest(self._model, number).get("adaptation"))
        except Refused:
            return False
