"""How a frame group comes from one generation to the next.

Its members are verified and shadowed one after the other, as always; then all of them flip under one lock, or
none.  The group's own live.json is written first, by one rename, and decides after a kill which generation a
new start brings up; the members' say to which generation they belong.  Knows swap controllers and the
repository.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.config import ServerConfig
from runtime.errors import Code, Refused, ServiceError
from runtime.events import Bus, Event, State
from runtime.repository.records import number as _number
from runtime.repository.repository import Repository
from runtime.serving.frame_group import FrameGroup, Generation
from runtime.serving.slot import Slot
from runtime.swap.controller import Prepared, SwapController, commit, roll_back, steer
from runtime.swap.submissions import Ticket
from runtime.swap.verify import Candidate

log = logging.getLogger("roadworthy.groups")


@dataclass(frozen=True)
class GroupStatus:
    group: str
    ready: bool
    reason: str
    generation: int  # 0 = none
    previous: int  # what a rollback goes back to; 0 = none
    members: dict[str, tuple[int, int]]  # model -> (live, previous), 0 = none
    candidate: str
    candidate_state: str
    watching: bool


class GroupTicket(Ticket):
    """Of a submission to a group; `members`: what was submitted."""

    def __init__(self, group: str, members: Mapping[str, int], shadow: bool) -> None:
        super().__init__(group, 0, shadow)
        self.members = dict(members)

    def __str__(self) -> str:
        return ", ".join(f"{model} {version}" for model, version in self.members.items())


class GroupController:
    """The ties of the members' controllers (`runtime/swap/scope.py`), and what can be asked of the group."""

    def __init__(
        self, name: str, members: list[str], repository: Repository, config: ServerConfig, bus: Bus
    ) -> None:
        self.name = name
        self.control = threading.RLock()
        self.slots = threading.RLock()
        self.turn = threading.Lock()
        self.host = FrameGroup(name, members, self.slots)
        self._repository = repository
        self._config = config
        self._bus = bus
        self._controllers: dict[str, SwapController] = {}
        self._starting = False
        self._next: tuple[Generation, Generation | None] | None = None
        self._back = False
        self._was: Generation | None = None
        self._last = 0  # the highest number ever given
        self._pending: deque[GroupTicket] = deque()
        self._current: GroupTicket | None = None
        self._worker: threading.Thread | None = None
        self._stopping = False
        self._published: list[Event] = []  # the last two

    @property
    def members(self) -> tuple[str, ...]:
        return self.host.names

    def join(self, controller: SwapController) -> None:
        """A member is there (it may come after the start)."""
        with self.control:
            self._controllers[controller.model] = controller
            self.host.join(controller.host)

    def configure(self, config: ServerConfig) -> None:
        self._config = config

    # -- what the members' controllers ask (runtime/swap/scope.py) -------------------------------

    def record(
        self, lives: Mapping[str, int], *, back: bool = False, anyway: bool = False
    ) -> dict[str, Any]:
        """The generation that these versions make of the live one: the one before, the same, or a new one.
        Its record is what a start goes by.  Raises Refused("record", …).
        """
        now, before = self.host.generation, self.host.before
        members = {**(now.members if now is not None else {}), **self._lives(), **lives}
        if back and before is not None:  # also of a member that is not there: it comes back as it was
            gone = [name for name in before.members if name not in self._controllers]
            members |= {name: before.members[name] for name in gone}
        self._back = back
        if self._starting or (set(members) != set(self.members) and len(lives) < 2):
            self._next = None  # which generation it is, is known when all are up
            return {}
        if now is not None and now.members == members:
            self._next = (now, before)
        elif back and before is not None and before.members == members:
            self._next = (before, None)
        else:
            self._last += 1
            self._next = (Generation(self._last, members), None if back else now)
        generation, previous = self._next
        if generation != now:
            try:
                if now is None:  # members' records that say of no group would outweigh this one at a start
                    for controller in self._controllers.values():
                        controller.record_ties({"group": self.name})
                self._write(generation, previous)
            except Refused:
                if not anyway:
                    self._next = None
                raise
        return {"group": self.name, "generation": generation.number}

    @property
    def recorded(self) -> bool:
        return self._next is not None

    def flipped(self) -> None:
        self._was = self.host.generation
        if self._next is not None:
            self.host.flip(*self._next)
            self._next = None

    def announce(self, check: str, reason: str) -> None:
        was, now = self._was, self.host.generation
        if now is None or now == was:
            return
        members = {"members": dict(now.members)}
        if self._back and was is not None:
            detail = {"live": now.number, **members}
            self._publish(Event(self.name, was.number, State.ROLLED_BACK, check, reason, detail))
            reason = f"rolled back from generation {was.number}"
        self._publish(Event(self.name, now.number, State.LIVE, "", reason, members))

    def together(self, controller: SwapController) -> list[SwapController]:
        """A member that became live with others goes back with them; one that flipped alone goes alone."""
        changed = self._changed()
        return [self._controllers[name] for name in changed] if controller.model in changed else [controller]

    def referred(self, model: str) -> set[int]:
        """Of the live generation, the one before, and what is submitted to the group."""
        with self.control:
            state = self._state()
            found = [self.host.generation, self.host.before, _generation(state, "live", "members")]
            found.append(_generation(state, "previous", "previous_members"))
            named = [each.members for each in (*found, self._current, *self._pending) if each is not None]
            return {members[model] for members in named if model in members}

    def _changed(self) -> list[str]:
        """The members in which the live generation differs from the one before; one whose directory is gone
        has nothing to change back, and must not keep the others from it.
        """
        now, before = self.host.generation, self.host.before
        if now is None or before is None:
            return []
        there = [name for name in self.members if name in self._controllers]
        return [name for name in there if now.members.get(name) != before.members.get(name)]

    def _lives(self) -> dict[str, int]:
        lives = {name: c.host.live for name, c in self._controllers.items()}
        return {name: slot.version for name, slot in lives.items() if slot is not None}

    # -- start -----------------------------------------------------------------------------

    def start(self) -> None:
        """Brings up one generation: the last live one, else the one before; where neither passes as a whole,
        each member by itself, which makes a new one.
        """
        state = self._state()
        self.host.unloaded = bool(state.get("unloaded"))
        used = (_number(line.get("version")) for line in self._repository.history(self.name))
        self._last = max(_number(state.get("last")), _number(state.get("live")), *used, 0)
        current = _generation(state, "live", "members")
        previous = _generation(state, "previous", "previous_members")
        with self.control:
            self._starting = True
        before: Generation | None = None
        try:
            wanted = [self._wanted(current), previous] if current is not None else []
            for generation in wanted:
                if generation is not None and self._bring_up(generation, previous):
                    before = previous if generation is not previous else None
                    break
            else:
                for controller in self._controllers.values():
                    controller.start()
        finally:
            with self.control:
                self._starting = False
        self._settle(current, previous, before)

    def _state(self) -> dict[str, Any]:
        """The group's record; from its history where live.json is lost."""
        state = self._repository.live(self.name) or {}
        if _generation(state, "live", "members") is not None:
            return state
        lines = [e for e in self._repository.history(self.name) if e.get("state") == State.LIVE.value]
        found: dict[str, Any] = {}
        for line in lines:
            detail = line.get("detail")
            if isinstance(detail, dict) and isinstance(detail.get("members"), dict):
                found = {"live": line.get("version"), "members": detail["members"]}
        return found | {key: state[key] for key in ("unloaded", "last") if key in state}

    def _wanted(self, recorded: Generation) -> Generation:
        """The recorded generation, but for members that flipped while they were in no group: their live.json
        has another version and does not say to which generation it belongs.
        """
        members = {name: version for name, version in recorded.members.items() if name in self.members}
        for name, controller in self._controllers.items():
            state, whole = controller.recorded()
            live = _number(state.get("live"))
            if live and (name not in members or (whole and state.get("group") != self.name)):
                members[name] = live
        return recorded if members == recorded.members else Generation(0, members)

    def _bring_up(self, generation: Generation, previous: Generation | None) -> bool:
        """All members in their version of it, or none; those that are unloaded stay so."""
        ready: list[tuple[SwapController, Candidate, Slot]] = []
        later: list[SwapController] = []  # in no generation yet
        for name, controller in self._controllers.items():
            if controller.leave_unloaded(controller.recorded()[0]):
                continue
            if name not in generation.members:
                later.append(controller)
                continue
            try:
                ready.append((controller, *controller.bring_up(generation.members[name])))
            except Refused as refusal:
                log.warning("%s: generation %s: %s: %s", self.name, generation.number, name, refusal)
                for _, candidate, slot in ready:
                    slot.retire()
                    candidate.reservation.release()
                return False
        for controller, candidate, slot in ready:
            before = previous.members.get(controller.model) if previous is not None else None
            before = before if before != slot.version else None
            controller.begin(candidate, slot, f"generation {generation.number} of '{self.name}'", before)
        for controller in later:
            controller.start()
        return True

    def _settle(
        self, current: Generation | None, previous: Generation | None, before: Generation | None
    ) -> None:
        """The number of what was brought up, in every record."""
        with self.control:
            lives = self._lives()
            if set(lives) != set(self.members):
                # Not whole: what is there may still become the recorded generation when a member is loaded.
                with self.slots:
                    self.host.flip(current, before)
                return
            known = [g for g in (current, previous) if g is not None and g.number > 0 and g.members == lives]
            if known:
                generation = known[0]
            else:
                self._last += 1
                generation = Generation(self._last, lives)
            with self.slots:
                self.host.flip(generation, before)
            try:
                if generation != current:
                    self._write(generation, before)
                for controller in self._controllers.values():
                    controller.record_ties({"group": self.name, "generation": generation.number})
            except Refused as refusal:  # a medium that cannot be written can still be served
                log.warning("%s generation %s is not recorded: %s", self.name, generation.number, refusal)
            if generation != current:
                first = "first generation" if current is None else "the recorded one did not pass"
                self._emit(State.LIVE, generation, reason=first)

    # -- what a person may ask -------------------------------------------------------------

    def submit(self, members: Mapping[str, int], *, shadow: bool = True) -> GroupTicket:
        """Queues versions of some or all members, to become live together or not at all.

        Raises ServiceError: INVALID_ARGUMENT for none, for a model that is no member, for a version below 1;
        RESOURCE_EXHAUSTED when too many wait.
        """
        self._repository.check_writable()
        if not members:
            raise _invalid(f"no member of '{self.name}' is named; members: {', '.join(self.members)}")
        for model, version in members.items():
            if model not in self.members:
                raise _invalid(
                    f"'{model[:80]}' is not a member of '{self.name}'; members: {', '.join(self.members)}"
                )
            if version < 1:
                raise _invalid(f"version {version} of '{model}': versions count from 1")
            if model not in self._controllers:
                raise ServiceError(
                    Code.NOT_FOUND,
                    f"'{model}' is not in the repository; publish a version first",
                    "unknown-model",
                )
        with self.control:
            for ticket in (self._current, *self._pending):
                if ticket is not None and ticket.members == dict(members) and ticket.shadow == shadow:
                    return ticket
            if self._stopping:
                raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
            if len(self._pending) >= self._config.swap.max_pending:
                raise ServiceError(
                    Code.RESOURCE_EXHAUSTED,
                    f"{len(self._pending)} submissions to '{self.name}' wait already; submit again later",
                    "queue-full",
                )
            ticket = GroupTicket(self.name, members, shadow)
            self._pending.append(ticket)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"swap-{self.name}", daemon=True)
                self._worker.start()
            return ticket

    def rollback(self, reason: str = "on an operator's word") -> list[Event]:
        """Every member back to the generation before; the last event is the group's.  Raises ServiceError."""
        self._repository.check_writable()
        with self.control:
            changed = [self._controllers[name] for name in self._changed()]
            if not changed:
                raise ServiceError(
                    Code.FAILED_PRECONDITION,
                    f"'{self.name}' has no previous generation to go back to; submit one",
                    "state",
                )
            events = list(roll_back(changed, self, "", reason, {"group": self.name}).values())
            return [*events, *self._published]

    def freeze(self, reason: str) -> None:
        """Every member: see SwapController.freeze."""
        with self.control:
            steer([*self._controllers.values()], lambda controller: controller.freeze(reason))

    def unfreeze(self) -> None:
        with self.control:
            steer([*self._controllers.values()], SwapController.unfreeze)

    def pin(self, generation: int = 0) -> None:
        """Fixes the live generation (0 or its number): every member.  Raises ServiceError for another."""
        with self.control:
            live = self.host.live
            if live is None or generation not in (0, live.version):
                now = f"generation {live.version} is" if live is not None else "none is"
                raise ServiceError(
                    Code.FAILED_PRECONDITION,
                    f"generation {generation} of '{self.name}' is not live ({now}); submit it, then pin",
                    "state",
                )
            steer([*self._controllers.values()], lambda controller: controller.pin(0))

    def unpin(self) -> None:
        with self.control:
            steer([*self._controllers.values()], SwapController.unpin)

    def unload(self) -> None:
        """The group stops answering under its name, also after a new start, until it is loaded again; its
        members go on (Triton: without unload_dependents).  Raises Refused("record", …).
        """
        self._set_unloaded(True)

    def reload(self) -> None:
        self._set_unloaded(False)

    def _set_unloaded(self, unloaded: bool) -> None:
        self._repository.check_writable()
        with self.control:
            state = {key: value for key, value in self._state().items() if key != "unloaded"}
            self._save(state | ({"unloaded": True} if unloaded else {}))
            with self.slots:
                self.host.unloaded = unloaded

    def stop(self) -> None:
        """No further swaps; the members' controllers end the one that is under way."""
        with self.control:
            self._stopping = True

    def status(self) -> GroupStatus:
        with self.slots:
            generation, ticket, reason = self.host.generation, self._current, self.host.reason
            before = next(iter(self.host.loaded()[1:]), None)  # none is left where a member's was given up
            members = dict.fromkeys(self.members, (0, 0))
            for name, c in self._controllers.items():
                members[name] = (_version(c.host.live), _version(c.host.previous))
            return GroupStatus(
                group=self.name,
                ready=not (reason or self.host.stuck),
                reason=reason or self.host.stuck,
                generation=generation.number if generation is not None and not reason else 0,
                previous=before.version if before is not None else 0,
                members=members,
                candidate=str(ticket) if ticket is not None else "",
                candidate_state=ticket.state if ticket is not None else "",
                watching=any(c.watching for c in self._controllers.values()),
            )

    # -- the swap --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self.control:
                if not self._pending:
                    self._current = self._worker = None
                    return
                self._current = ticket = self._pending.popleft()
            self._swap(ticket)
            for controller in tuple(self._controllers.values()):
                controller.keep_newest()

    def _swap(self, ticket: GroupTicket) -> None:
        begun = time.monotonic()
        prepared: list[Prepared] = []
        self._tell(ticket, State.SUBMITTED, 0, detail={"members": ticket.members})
        try:
            with self.turn:
                for model, version in ticket.members.items():
                    self._prepare(ticket, model, version, prepared)
                with self.control:
                    if prepared:
                        commit(prepared, self)
                    self._went_live(ticket, begun, "" if prepared else "is live already")
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("swap of group %s", self.name)
                error = Refused("internal", f"{type(error).__name__}: {error}")
            for each in prepared:  # the one that was refused has said so itself
                why = Refused("group", f"refused with another member: {error.reason}")
                each.controller.reject(each.ticket, each, why)
            self._tell(ticket, State.REJECTED, 0, error.check, error.reason, {**error.detail})

    def _went_live(self, ticket: GroupTicket, begun: float, reason: str) -> None:
        """The last event of a ticket; history has it from `announce`, where anything has changed."""
        live = self.host.generation
        number, members = (live.number, dict(live.members)) if live is not None else (0, self._lives())
        detail = {"members": members, "seconds": round(time.monotonic() - begun, 4)}
        ticket.put(Event(self.name, number, State.LIVE, "", reason, detail))

    def _prepare(self, ticket: GroupTicket, model: str, version: int, prepared: list[Prepared]) -> None:
        """One member up to its flip; its events go to the group's ticket too.  Raises Refused."""
        controller = self._controllers[model]
        own = _MemberTicket(ticket, model, version)
        try:
            ready = controller.prepare(own)
        except Refused as refusal:
            controller.reject(own, None, refusal)
            raise _of(model, refusal, version) from refusal
        except Exception as error:
            controller.reject(own, None, Refused("internal", f"{type(error).__name__}: {error}"))
            raise
        if ready is not None:
            prepared.append(ready)

    def _tell(
        self,
        ticket: GroupTicket,
        state: State,
        number: int,
        check: str = "",
        reason: str = "",
        detail: dict[str, Any] | None = None,
    ) -> None:
        ticket.put(self._publish(Event(self.name, number, state, check, reason, detail or {})))

    # -- records ---------------------------------------------------------------------------

    def _write(self, live: Generation, previous: Generation | None) -> None:
        state = {
            "live": live.number,
            "members": dict(live.members),
            "previous": previous.number if previous is not None else None,
            "previous_members": dict(previous.members) if previous is not None else None,
            "last": self._last,
            "time": time.time(),
        }
        self._save(state | ({"unloaded": True} if self.host.unloaded else {}))

    def _save(self, state: dict[str, Any]) -> None:
        try:
            self._repository.home(self.name)
            self._repository.set_live(self.name, state)
        except OSError as error:
            raise Refused(
                "record", f"live.json of '{self.name}' cannot be written: {error.strerror or error}"
            ) from error

    def _emit(self, state: State, generation: Generation, reason: str) -> None:
        detail = {"members": dict(generation.members)}
        self._publish(Event(self.name, generation.number, state, "", reason, detail))

    def _publish(self, event: Event) -> Event:
        try:
            self._repository.home(self.name)
            self._repository.append_history(self.name, event.line())
        except OSError as error:
            log.error("history of %s: %s", self.name, error)
        said = (event.model, event.version, event.state.value, event.reason)
        log.info("group %s %s %s %s", *said, extra=event.fields())
        self._bus.publish(event)
        self._published = [*self._published[-1:], event]
        return event


class _MemberTicket(Ticket):
    """A member's part of a submission to its group."""

    def __init__(self, whole: GroupTicket, model: str, version: int) -> None:
        super().__init__(model, version, whole.shadow)
        self._whole = whole

    def put(self, event: Event) -> None:
        super().put(event)
        self._whole.put(event)


def _of(model: str, refusal: Refused, version: int | None = None) -> Refused:
    which = f"member '{model}'" + (f" version {version}" if version is not None else "")
    return Refused(refusal.check, f"{which}: {refusal.reason}", {"member": model, **refusal.detail})


def _generation(state: Mapping[str, Any], number: str, members: str) -> Generation | None:
    """From a record; None where it says nothing that can be used."""
    count, versions = _number(state.get(number)), state.get(members)
    if not count or not isinstance(versions, dict) or not all(_number(v) for v in versions.values()):
        return None
    return Generation(count, {str(name): int(version) for name, version in versions.items()})


def _version(slot: Slot | None) -> int:
    return slot.version if slot is not None else 0


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
