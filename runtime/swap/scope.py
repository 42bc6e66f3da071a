"""What flips together with a model: nothing else, or the other members of its frame group.

A swap controller takes its locks from its scope, reports to it which versions are about to become live, and
asks it which models roll back together.  `SingleModelScope` is the scope of a model without a group;
`runtime/swap/group_controller.py` is the other kind.  Knows served models and events; knows no controller.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from runtime.events import Event
from runtime.serving.served_model import ServedModel
from runtime.serving.slot import Slot


class Participant(Protocol):
    """What a rollback needs from each model that it takes back."""

    @property
    def model(self) -> str: ...

    @property
    def host(self) -> ServedModel: ...

    @property
    def pinned(self) -> bool: ...

    def record_back(self, version: int, extra: Mapping[str, Any]) -> None:
        """Writes to live.json that `version` is live again.  Raises Refused("record", …)."""
        ...

    def end_watch(self) -> None:
        """Ends the watch window of the model, if one is open."""
        ...

    def on_rolled_back(
        self, now: Slot, bad: Slot, check: str, reason: str, detail: Mapping[str, Any]
    ) -> Event:
        """Publishes and returns the ROLLED_BACK event of `bad`, after `now` has become live again."""
        ...


class SwapScope(Protocol):
    """The locks and records that one flip shares.

    state_lock: guards what an operator or a watch window may change.  flip_lock: guards which slots are
    live; it is held for a moment only, and `state_lock` is taken before it.  swap_lock: held during a whole
    swap.
    """

    state_lock: threading.RLock
    flip_lock: threading.RLock
    swap_lock: threading.Lock

    def record(
        self, lives: Mapping[str, int], *, back: bool = False, best_effort: bool = False
    ) -> dict[str, Any]:
        """Records which versions are about to become live (`back`: live again).

        Writes the scope's own record, if it has one, and returns the entries that live.json of each model
        gets in addition.  The caller holds `state_lock`.  Raises Refused("record", …); with `best_effort`
        the versions become live nevertheless, and the caller must call `flipped` afterwards.
        """
        ...

    def flipped(self) -> None:
        """Makes the versions of the last `record` the live ones.  The caller holds `flip_lock`."""
        ...

    def publish_events(self, check: str, reason: str) -> None:
        """Publishes what `flipped` changed.  The caller holds `state_lock`."""
        ...

    def rollback_set(self, participant: Participant) -> Sequence[Participant]:
        """Returns every model that rolls back together with this one, and this one.

        The caller holds `state_lock`.
        """
        ...

    def referenced_versions(self, model: str) -> set[int]:
        """Returns the versions of the model that the scope may need again."""
        ...

    @property
    def recorded(self) -> bool:
        """True if the last `record` alone decides what a restart loads, whatever live.json contains."""
        ...


class SingleModelScope:
    """The scope of a model that is in no group."""

    recorded = False

    def __init__(self) -> None:
        self.state_lock = threading.RLock()
        self.flip_lock = threading.RLock()
        self.swap_lock = threading.Lock()

    def record(
        self, lives: Mapping[str, int], *, back: bool = False, best_effort: bool = False
    ) -> dict[str, Any]:
        return {}

    def flipped(self) -> None:
        return

    def publish_events(self, check: str, reason: str) -> None:
        return

    def rollback_set(self, participant: Participant) -> Sequence[Participant]:
        return [participant]

    def referenced_versions(self, model: str) -> set[int]:
        return set()
