"""Which generation a frame group serves when the server starts.

The last live generation comes first, then the one before it; if neither passes complete, each member starts
by itself, which makes a new generation.
"""

from __future__ import annotations

import logging

from runtime.errors import Refused
from runtime.events import Event, State
from runtime.repository.records import number
from runtime.serving.frame_group import Generation
from runtime.serving.slot import Slot
from runtime.swap.candidate import Candidate
from runtime.swap.controller import SwapController
from runtime.swap.group_record import GroupRecord, live_generation, previous_generation
from runtime.swap.group_scope import GroupScope
from runtime.swap.publisher import GroupEventPublisher

log = logging.getLogger("roadworthy.groups")


class GroupStartup:
    """Loads the generation that one group serves first."""

    def __init__(self, scope: GroupScope, record: GroupRecord, publisher: GroupEventPublisher) -> None:
        self._scope = scope
        self._record = record
        self._publisher = publisher

    def run(self) -> None:
        """Loads one generation, or each member by itself."""
        scope = self._scope
        state = self._record.read()
        scope.host.unloaded = bool(state.get("unloaded"))
        scope.count_from(self._record.highest_number(state))
        current, previous = live_generation(state), previous_generation(state)
        with scope.state_lock:
            scope.starting = True
        before: Generation | None = None
        try:
            targets = [self._target(current), previous] if current is not None else []
            for generation in targets:
                if generation is not None and self._load(generation, previous):
                    before = previous if generation is not previous else None
                    break
            else:
                for controller in scope.controllers.values():
                    controller.startup.run()
        finally:
            with scope.state_lock:
                scope.starting = False
        self._settle(current, previous, before)

    def _target(self, recorded: Generation) -> Generation:
        """Returns the recorded generation, changed by the members that flipped while they were in no group:
        their live.json has another version and no generation of this group.
        """
        name = self._scope.name
        members = {
            model: version for model, version in recorded.members.items() if model in self._scope.members
        }
        for model, controller in self._scope.controllers.items():
            state, complete = controller.record.read()
            live = number(state.get("live"))
            if live and (model not in members or (complete and state.get("group") != name)):
                members[model] = live
        return recorded if members == recorded.members else Generation(0, members)

    def _load(self, generation: Generation, previous: Generation | None) -> bool:
        """Loads all members in their version of the generation, or none; unloaded members stay unloaded."""
        name = self._scope.name
        ready: list[tuple[SwapController, Candidate, Slot]] = []
        later: list[SwapController] = []  # in no generation yet
        for model, controller in self._scope.controllers.items():
            startup = controller.startup
            if startup.leave_unloaded(controller.record.read()[0]):
                continue
            if model not in generation.members:
                later.append(controller)
                continue
            try:
                ready.append((controller, *startup.load_verified(generation.members[model])))
            except Refused as refusal:
                log.warning("%s: generation %s: %s: %s", name, generation.number, model, refusal)
                for _, candidate, slot in ready:
                    slot.retire()
                    candidate.reservation.release()
                return False
        for controller, candidate, slot in ready:
            before = previous.members.get(controller.model) if previous is not None else None
            before = before if before != slot.version else None
            why = f"generation {generation.number} of '{name}'"
            controller.startup.serve_initial(candidate, slot, why, before)
        for controller in later:
            controller.startup.run()
        return True

    def _settle(
        self, current: Generation | None, previous: Generation | None, before: Generation | None
    ) -> None:
        """Writes the number of what was loaded to every record."""
        scope = self._scope
        with scope.state_lock:
            lives = scope.live_versions()
            if set(lives) != set(scope.members):
                # Incomplete: it may still become the recorded generation when a member is loaded.
                with scope.flip_lock:
                    scope.host.flip(current, before)
                return
            known = [g for g in (current, previous) if g is not None and g.number > 0 and g.members == lives]
            generation = known[0] if known else scope.new_generation(lives)
            with scope.flip_lock:
                scope.host.flip(generation, before)
            try:
                if generation != current:
                    scope.write(generation, before)
                for controller in scope.controllers.values():
                    controller.record.write_scope({"group": scope.name, "generation": generation.number})
            except Refused as refusal:  # a medium that cannot be written can still be served
                log.warning("%s generation %s is not recorded: %s", scope.name, generation.number, refusal)
            if generation != current:
                first = "first generation" if current is None else "the recorded one did not pass"
                detail = {"members": dict(generation.members)}
                event = Event(scope.name, generation.number, State.LIVE, "", first, detail)
                self._publisher.publish(event)
