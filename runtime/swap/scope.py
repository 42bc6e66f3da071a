"""What the flips of a model are tied to: nothing, or a frame group.

A swap controller asks its ties for the locks it works under, tells them what becomes live before it does, and
learns from them which other models go back with it.  `runtime/serving/frame_group.py` has the other kind; neither the
controller nor the host knows of groups.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from runtime.swap.controller import SwapController


class Ties(Protocol):
    """control: guards what a person or a watch window may do.  slots: guards which slots are live; taken for
    a moment only, `control` before `slots`.  turn: held for a whole swap."""

    control: threading.RLock
    slots: threading.RLock
    turn: threading.Lock

    def record(
        self, lives: Mapping[str, int], *, back: bool = False, anyway: bool = False
    ) -> dict[str, Any]:
        """These versions are about to be live (`back`: again).  Makes that durable where the ties keep a
        record of their own, and returns what else belongs into live.json of the models.  Under `control`.

        Raises Refused("record", …); with `anyway` they will be live nevertheless, and `flipped` must follow.
        """
        ...

    def flipped(self) -> None:
        """What `record` announced is live.  Under `slots`."""
        ...

    def announce(self, check: str, reason: str) -> None:
        """Tells whoever watches what `flipped` made of it.  Under `control`."""
        ...

    def together(self, controller: SwapController) -> list[SwapController]:
        """The controllers that go back when this one does, itself among them.  Under `control`."""
        ...

    def referred(self, model: str) -> set[int]:
        """Versions of the model that the ties may want again."""
        ...

    @property
    def recorded(self) -> bool:
        """Whether the last `record` alone decides what a new start brings up, whatever live.json says."""
        ...


class Free:
    """The ties of a model of no group."""

    recorded = False

    def __init__(self) -> None:
        self.control = threading.RLock()
        self.slots = threading.RLock()
        self.turn = threading.Lock()

    def record(
        self, lives: Mapping[str, int], *, back: bool = False, anyway: bool = False
    ) -> dict[str, Any]:
        return {}

    def flipped(self) -> None:
        return

    def announce(self, check: str, reason: str) -> None:
        return

    def together(self, controller: SwapController) -> list[SwapController]:
        return [controller]

    def referred(self, model: str) -> set[int]:
        return set()
