"""The guarded swap of a frame group: from one generation to the next.

The members are verified and shadowed one after the other, as always; then all of them flip under one lock, or
none.  The group's own live.json is written first, by one rename.  The parts: `group_scope` (flip and
rollback), `group_startup` (the first generation), `group_record` (live.json).  Knows the members' controllers
and the repository.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.config import ServerConfig
from runtime.errors import Code, Refused, ServiceError
from runtime.events import Bus, Event, State
from runtime.repository.repository import Repository
from runtime.serving.slot import Slot
from runtime.swap.flags import OperatorFlags, change_all
from runtime.swap.group_record import GroupRecord
from runtime.swap.group_scope import GroupScope
from runtime.swap.group_startup import GroupStartup
from runtime.swap.participant import PreparedSwap
from runtime.swap.publisher import GroupEventPublisher
from runtime.swap.submissions import Submission, SubmissionQueue
from runtime.swap.transaction import commit, roll_back

log = logging.getLogger("roadworthy.groups")


@dataclass(frozen=True)
class GroupStatus:
    """generation, previous: 0 = none; `previous` is what a rollback makes live.  members: model -> (live,
    previous), 0 = none.
    """

    group: str
    ready: bool
    reason: str
    generation: int
    previous: int
    members: dict[str, tuple[int, int]]
    candidate: str
    candidate_state: str
    watching: bool


class GroupSubmission(Submission):
    """A submission to a group; `members`: the version per model that was submitted."""

    def __init__(self, group: str, members: Mapping[str, int], shadow: bool) -> None:
        super().__init__(group, 0, shadow)
        self.members = dict(members)

    def matches(self, other: Submission) -> bool:
        same = isinstance(other, GroupSubmission) and self.members == other.members
        return same and self.shadow == other.shadow

    def __str__(self) -> str:
        return ", ".join(f"{model} {version}" for model, version in self.members.items())


class GroupController:
    """The swaps of one group.  `scope`: what the members' controllers share."""

    def __init__(
        self, name: str, members: list[str], repository: Repository, config: ServerConfig, bus: Bus
    ) -> None:
        self.name = name
        self._repository = repository
        self._config = config
        self._stopping = False
        self._record = GroupRecord(name, repository)
        self._publisher = GroupEventPublisher(name, repository, bus)
        self.scope = GroupScope(name, members, self._record, self._publisher, self._submitted)
        self.host = self.scope.host
        self.queue: SubmissionQueue[GroupSubmission] = SubmissionQueue(
            name,
            f"to '{name}'",
            self.scope.state_lock,
            stopped=lambda: self._stopping,
            max_pending=lambda: self._config.swap.max_pending,
            run=self._run,
        )
        self._startup = GroupStartup(self.scope, self._record, self._publisher)

    @property
    def members(self) -> tuple[str, ...]:
        return self.host.names

    def start(self) -> None:
        """Loads the last live generation, or the best that passes."""
        self._startup.run()

    def configure(self, config: ServerConfig) -> None:
        self._config = config

    # -- operators -------------------------------------------------------------------

    def submit(self, members: Mapping[str, int], *, shadow: bool = True) -> GroupSubmission:
        """Queues versions of some or all members, to become live together or not at all.

        Raises ServiceError: INVALID_ARGUMENT if there is no member, a model that is no member, or a version
        below 1; NOT_FOUND if a member is not in the repository; RESOURCE_EXHAUSTED if too many wait.
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
            if model not in self.scope.controllers:
                raise ServiceError(
                    Code.NOT_FOUND,
                    f"'{model}' is not in the repository; publish a version first",
                    "unknown-model",
                )
        return self.queue.submit(GroupSubmission(self.name, members, shadow))

    def rollback(self, reason: str = "on an operator's word") -> list[Event]:
        """Makes the previous generation live again, in every member.

        Returns the events of the members, then those of the group.  Raises ServiceError.
        """
        self._repository.check_writable()
        with self.scope.state_lock:
            changed = [controller.participant for controller in self.scope.changed()]
            if not changed:
                raise ServiceError(
                    Code.FAILED_PRECONDITION,
                    f"'{self.name}' has no previous generation to go back to; submit one",
                    "state",
                )
            events = roll_back(changed, self.scope, "", reason, {"group": self.name})
            return [*events.values(), *self._publisher.latest]

    def freeze(self, reason: str) -> None:
        """Freezes every member: see `OperatorFlags.freeze`."""
        with self.scope.state_lock:
            change_all(self._flags(), lambda flags: flags.freeze(reason))

    def unfreeze(self) -> None:
        with self.scope.state_lock:
            change_all(self._flags(), OperatorFlags.unfreeze)

    def pin(self, generation: int = 0) -> None:
        """Pins the live generation (0 or its number), that is every member.

        Raises ServiceError for another generation.
        """
        with self.scope.state_lock:
            live = self.host.live
            if live is None or generation not in (0, live.version):
                now = f"generation {live.version} is" if live is not None else "none is"
                raise ServiceError(
                    Code.FAILED_PRECONDITION,
                    f"generation {generation} of '{self.name}' is not live ({now}); submit it, then pin",
                    "state",
                )
            change_all(self._flags(), lambda flags: flags.pin(0))

    def unpin(self) -> None:
        with self.scope.state_lock:
            change_all(self._flags(), OperatorFlags.unpin)

    def unload(self) -> None:
        """Stops answering under the group's name, also after a restart, until it is loaded again; its
        members go on (Triton: without unload_dependents).  Raises Refused("record", …).
        """
        self._set_unloaded(True)

    def reload(self) -> None:
        """Answers under the group's name again.  Raises Refused("record", …)."""
        self._set_unloaded(False)

    def _set_unloaded(self, unloaded: bool) -> None:
        self._repository.check_writable()
        with self.scope.state_lock:
            self._record.write_unloaded(unloaded)
            with self.scope.flip_lock:
                self.host.unloaded = unloaded

    def stop(self) -> None:
        """Starts no further swap; the members' controllers end the one that is under way."""
        with self.scope.state_lock:
            self._stopping = True

    def status(self) -> GroupStatus:
        with self.scope.flip_lock:
            generation, submission, reason = self.host.generation, self.queue.current, self.host.reason
            # None if the warm version of a member was given up.
            before = next(iter(self.host.loaded()[1:]), None)
            members = dict.fromkeys(self.members, (0, 0))
            for name, c in self.scope.controllers.items():
                members[name] = (_version(c.host.live), _version(c.host.previous))
            return GroupStatus(
                group=self.name,
                ready=not (reason or self.host.stuck),
                reason=reason or self.host.stuck,
                generation=generation.number if generation is not None and not reason else 0,
                previous=before.version if before is not None else 0,
                members=members,
                candidate=str(submission) if submission is not None else "",
                candidate_state=submission.state if submission is not None else "",
                watching=any(c.participant.watching for c in self.scope.controllers.values()),
            )

    def _flags(self) -> list[OperatorFlags]:
        return [controller.flags for controller in self.scope.controllers.values()]

    def _submitted(self) -> list[dict[str, int]]:
        return [submission.members for submission in self.queue.unfinished()]

    # -- the swap --------------------------------------------------------------------

    def _run(self, submission: GroupSubmission) -> None:
        self._swap(submission)
        for controller in tuple(self.scope.controllers.values()):
            controller.retention.prune_configured()

    def _swap(self, submission: GroupSubmission) -> None:
        begun = time.monotonic()
        prepared: list[PreparedSwap] = []
        self._publish(submission, State.SUBMITTED, detail={"members": submission.members})
        try:
            with self.scope.swap_lock:
                for model, version in submission.members.items():
                    self._prepare(submission, model, version, prepared)
                with self.scope.state_lock:
                    if prepared:
                        commit(prepared, self.scope)
                    self._finish(submission, begun, "" if prepared else "is live already")
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("swap of group %s", self.name)
                error = Refused("internal", f"{type(error).__name__}: {error}")
            for each in prepared:  # the refused member has published its own event
                why = Refused("group", f"refused with another member: {error.reason}")
                self.scope.controllers[each.model].reject(each.submission, each, why)
            self._publish(submission, State.REJECTED, error.check, error.reason, {**error.detail})

    def _finish(self, submission: GroupSubmission, begun: float, reason: str) -> None:
        """Ends a submission with LIVE.  The scope has published what changed, so history has it already."""
        live, members = self.host.generation, self.scope.live_versions()
        number = 0
        if live is not None:
            number, members = live.number, dict(live.members)
        detail = {"members": members, "seconds": round(time.monotonic() - begun, 4)}
        submission.put(Event(self.name, number, State.LIVE, "", reason, detail))

    def _prepare(
        self, submission: GroupSubmission, model: str, version: int, prepared: list[PreparedSwap]
    ) -> None:
        """Runs one member's checks up to its flip; its events go to the group's submission too.

        Raises Refused.
        """
        controller = self.scope.controllers[model]
        own = _MemberSubmission(submission, model, version)
        try:
            ready = controller.prepare(own)
        except Refused as refusal:
            controller.reject(own, None, refusal)
            raise _of_member(model, version, refusal) from refusal
        except Exception as error:
            controller.reject(own, None, Refused("internal", f"{type(error).__name__}: {error}"))
            raise
        if ready is not None:
            prepared.append(ready)

    def _publish(
        self,
        submission: GroupSubmission,
        state: State,
        check: str = "",
        reason: str = "",
        detail: dict[str, Any] | None = None,
    ) -> None:
        self._publisher.publish(Event(self.name, 0, state, check, reason, detail or {}), submission)


class _MemberSubmission(Submission):
    """A member's part of a submission to its group."""

    def __init__(self, group: GroupSubmission, model: str, version: int) -> None:
        super().__init__(model, version, group.shadow)
        self._group = group

    def put(self, event: Event) -> None:
        super().put(event)
        self._group.put(event)


def _of_member(model: str, version: int, refusal: Refused) -> Refused:
    reason = f"member '{model}' version {version}: {refusal.reason}"
    return Refused(refusal.check, reason, {"member": model, **refusal.detail})


def _version(slot: Slot | None) -> int:
    return slot.version if slot is not None else 0


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
