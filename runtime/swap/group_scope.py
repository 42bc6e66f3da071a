"""The scope of a frame group: its members flip at one instant, and its record decides what a restart loads.

Implements `runtime.swap.scope.SwapScope` for the controllers of the members.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import Refused
from runtime.events import Event, State
from runtime.serving.frame_group import FrameGroup, Generation
from runtime.swap.controller import SwapController
from runtime.swap.group_record import GroupRecord, live_generation, previous_generation
from runtime.swap.publisher import GroupEventPublisher
from runtime.swap.scope import Participant


class GroupScope:
    """controllers: of the members that are in the repository.  starting: True while the group starts; no
    generation is recorded then.  submitted: returns the members of every unfinished submission.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[str],
        record: GroupRecord,
        publisher: GroupEventPublisher,
        submitted: Callable[[], list[dict[str, int]]],
    ) -> None:
        self.name = name
        self.state_lock = threading.RLock()
        self.flip_lock = threading.RLock()
        self.swap_lock = threading.Lock()
        self.host = FrameGroup(name, members, self.flip_lock)
        self.controllers: dict[str, SwapController] = {}
        self.starting = False
        self._record = record
        self._publisher = publisher
        self._submitted = submitted
        self._next: tuple[Generation, Generation | None] | None = None
        self._back = False
        self._replaced: Generation | None = None
        self._last = 0  # the highest number that a generation ever had

    @property
    def members(self) -> tuple[str, ...]:
        return self.host.names

    def join(self, controller: SwapController) -> None:
        """Adds a member, which may appear in the repository after the start."""
        with self.state_lock:
            self.controllers[controller.model] = controller
            self.host.join(controller.host)

    # -- SwapScope -------------------------------------------------------------------

    def record(
        self, lives: Mapping[str, int], *, back: bool = False, best_effort: bool = False
    ) -> dict[str, Any]:
        """Records the generation that these versions make of the live one: the previous one, the same, or a
        new one.  Raises Refused("record", …).
        """
        now, before = self.host.generation, self.host.before
        members = {**(now.members if now is not None else {}), **self.live_versions(), **lives}
        if back and before is not None:  # a member that is absent comes back later, as it was
            absent = [name for name in before.members if name not in self.controllers]
            members |= {name: before.members[name] for name in absent}
        self._back = back
        if self.starting or (set(members) != set(self.members) and len(lives) < 2):
            self._next = None  # the generation is known when all members are loaded
            return {}
        if now is not None and now.members == members:
            self._next = (now, before)
        elif back and before is not None and before.members == members:
            self._next = (before, None)
        else:
            self._next = (self.new_generation(members), None if back else now)
        generation, previous = self._next
        if generation != now:
            try:
                if now is None:  # at a start, member records without a group outweigh the group's record
                    for controller in self.controllers.values():
                        controller.record.write_scope({"group": self.name})
                self.write(generation, previous)
            except Refused:
                if not best_effort:
                    self._next = None
                raise
        return {"group": self.name, "generation": generation.number}

    @property
    def recorded(self) -> bool:
        return self._next is not None

    def flipped(self) -> None:
        self._replaced = self.host.generation
        if self._next is not None:
            self.host.flip(*self._next)
            self._next = None

    def publish_events(self, check: str, reason: str) -> None:
        replaced, now = self._replaced, self.host.generation
        if now is None or now == replaced:
            return
        members = {"members": dict(now.members)}
        if self._back and replaced is not None:
            detail = {"live": now.number, **members}
            event = Event(self.name, replaced.number, State.ROLLED_BACK, check, reason, detail)
            self._publisher.publish(event)
            reason = f"rolled back from generation {replaced.number}"
        self._publisher.publish(Event(self.name, now.number, State.LIVE, "", reason, members))

    def rollback_set(self, participant: Participant) -> Sequence[Participant]:
        """Members promoted together are rolled back together; a member promoted alone goes back alone."""
        changed = self.changed()
        models = [controller.model for controller in changed]
        return [each.participant for each in changed] if participant.model in models else [participant]

    def referenced_versions(self, model: str) -> set[int]:
        """Returns the model's versions in the live generation, in the one before, and in submissions."""
        with self.state_lock:
            state = self._record.read()
            found = [self.host.generation, self.host.before]
            found += [live_generation(state), previous_generation(state)]
            named = [each.members for each in found if each is not None]
            return {members[model] for members in (*named, *self._submitted()) if model in members}

    # -- generations -----------------------------------------------------------------

    def changed(self) -> list[SwapController]:
        """Returns the members in which the live generation differs from the one before.

        A member whose directory is gone is left out: it must not keep the others from a rollback.
        """
        now, before = self.host.generation, self.host.before
        if now is None or before is None:
            return []
        present = [name for name in self.members if name in self.controllers]
        changed = [name for name in present if now.members.get(name) != before.members.get(name)]
        return [self.controllers[name] for name in changed]

    def live_versions(self) -> dict[str, int]:
        """Returns the live version of each member that has one."""
        lives = {name: controller.host.live for name, controller in self.controllers.items()}
        return {name: slot.version for name, slot in lives.items() if slot is not None}

    def new_generation(self, members: Mapping[str, int]) -> Generation:
        """Returns a generation with the next number.  The caller holds the state lock."""
        self._last += 1
        return Generation(self._last, members)

    def count_from(self, last: int) -> None:
        """Numbers the next generation `last` + 1."""
        self._last = last

    def write(self, live: Generation, previous: Generation | None) -> None:
        """Records the live generation of the group.  Raises Refused("record", …)."""
        self._record.write_flip(live, previous, self._last, self.host.unloaded)
