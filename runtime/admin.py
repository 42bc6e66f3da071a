"""What an operator can do with models: submit, roll back, pin, freeze, prune, and read their status.

The answers to requests are in `runtime/service.py`.  Knows plain Python values; knows no protobuf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.errors import Code, Refused, ServiceError
from runtime.events import Event
from runtime.model_registry import ModelRegistry
from runtime.repository.repository import Repository
from runtime.serving.counters import RequestCounters
from runtime.serving.memory_budget import MemoryBudget
from runtime.swap.controller import SwapController
from runtime.swap.flags import OperatorFlags, change_all
from runtime.swap.group_controller import GroupController, GroupSubmission
from runtime.swap.submissions import Submission


@dataclass(frozen=True)
class ModelStatus:
    """live, previous, candidate: version numbers, 0 = none.  memory_bytes: of all loaded versions."""

    model: str
    ready: bool
    reason: str
    live: int
    previous: int
    pinned: bool
    frozen: bool
    frozen_reason: str
    candidate: int
    candidate_state: str
    watching: bool
    memory_bytes: int
    account: RequestCounters


class Admin:
    """`draining` returns True while the server shuts down: nothing is submitted then."""

    def __init__(
        self,
        models: ModelRegistry,
        repository: Repository,
        ledger: MemoryBudget,
        draining: Callable[[], bool],
    ) -> None:
        self._models = models
        self._repository = repository
        self._ledger = ledger
        self._draining = draining

    def status(self, model: str = "") -> list[ModelStatus]:
        """Returns the status of one model, of the members of one group, or of all models ("")."""
        controllers = self._models.controllers()
        if (group := self._models.groups().get(model)) is not None:
            controllers = {n: c for n, c in controllers.items() if n in group.members}
        elif model:
            controllers = {model: self._models.controller(model)}
        return [_status(controller, self._ledger) for _, controller in sorted(controllers.items())]

    def submit(self, model: str, version: int, *, shadow: bool = True) -> Submission:
        """Queues a version for the guarded swap.  Raises ServiceError."""
        if self._draining():
            raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
        if version < 1:
            raise ServiceError(Code.INVALID_ARGUMENT, f"version {version}: versions count from 1", "invalid")
        return self._models.controller(model).submit(version, shadow=shadow)

    def submit_group(self, group: str, members: Mapping[str, int], *, shadow: bool = True) -> GroupSubmission:
        """Submits versions of some or all members, to become live together or not at all.

        Raises ServiceError.
        """
        if self._draining():
            raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
        controller = self._models.group(group)
        for model in members:
            if model in controller.members:
                self._models.controller(model)  # it may have been published since the start
        return controller.submit(members, shadow=shadow)

    def rollback(self, model: str) -> Event:
        """Makes the warm previous version live again.  Raises ServiceError."""
        return self._models.controller(model).rollback()

    def reset(self, model: str) -> Submission:
        """Submits the newest version of a released pack: one that no round of adaptation made and that was
        neither rejected nor rolled back.  It is not shadowed.  Raises ServiceError if there is none.
        """
        excluded = self._models.controller(model).retention.excluded_versions()
        for number in reversed(self._repository.versions(model)):
            try:
                adapted = bool(self._repository.manifest(model, number).get("adaptation"))
            except Refused:
                continue
            if not adapted and number not in excluded:
                return self.submit(model, number, shadow=False)
        message = (
            f"'{model}' has no version built of a released pack that was not refused or rolled back; "
            "build one with export.build, or promote one by its number"
        )
        raise ServiceError(Code.FAILED_PRECONDITION, message, "state")

    def prune(self, model: str, keep: int = 0) -> list[int]:
        """Deletes old versions that rounds of adaptation made (`Retention.prune`); returns their numbers.

        keep: 0 = as configured.  Raises ServiceError.
        """
        keep = keep or self._models.config.keep_versions
        if keep < 1:
            message = f"to keep {keep} versions: say how many, at least 1 (or set keep_versions)"
            raise ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
        try:
            return self._models.controller(model).retention.prune(keep)
        except OSError as error:
            message = f"versions of '{model}' cannot be deleted: {error.strerror or error}"
            raise ServiceError(Code.INTERNAL, message, "record") from error

    def freeze(self, model: str, reason: str) -> None:
        """Forbids flips of one model, of one group, or of all models ("").  Raises ServiceError."""
        if (group := self._models.groups().get(model)) is not None:
            group.freeze(reason)
        else:
            change_all(self._chosen_flags(model), lambda flags: flags.freeze(reason))

    def unfreeze(self, model: str) -> None:
        if (group := self._models.groups().get(model)) is not None:
            group.unfreeze()
        else:
            change_all(self._chosen_flags(model), OperatorFlags.unfreeze)

    def pin(self, model: str, version: int) -> None:
        """Pins the live version, of a group the live generation.  Raises ServiceError."""
        self._flags_of(model).pin(version)

    def unpin(self, model: str) -> None:
        self._flags_of(model).unpin()

    def _flags_of(self, model: str) -> OperatorFlags | GroupController:
        group = self._models.groups().get(model)
        return group if group is not None else self._models.controller(model).flags

    def _chosen_flags(self, model: str) -> Sequence[OperatorFlags]:
        chosen = [self._models.controller(model)] if model else self._models.controllers().values()
        return [controller.flags for controller in chosen]

    def versions(self, model: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns ([version, state, reason, manifest of each version], history).

        A version that cannot be read is listed with the reason.  A group has no versions, but a history.
        """
        self._flags_of(model)
        history = self._repository.history(model)
        last = {e.get("version"): e for e in history if e.get("state") != "NOTE"}
        result = []
        for number in self._repository.versions(model):
            entry = last.get(number, {})
            info = {"version": number, "state": entry.get("state", ""), "reason": entry.get("reason", "")}
            try:
                info["manifest"] = self._repository.manifest(model, number)
            except Refused as refusal:
                info |= {"manifest": {}, "reason": str(refusal)}
            result.append(info)
        return result, history


def _status(controller: SwapController, ledger: MemoryBudget) -> ModelStatus:
    host = controller.host
    live, previous, submission = host.live, host.previous, controller.queue.current
    return ModelStatus(
        model=host.name,
        ready=live is not None and not host.stuck,
        reason=host.stuck if live is not None else host.reason,
        live=live.version if live is not None else 0,
        previous=previous.version if previous is not None else 0,
        pinned=controller.flags.pinned,
        frozen=controller.flags.frozen,
        frozen_reason=controller.flags.frozen_reason,
        candidate=submission.version if submission is not None else 0,
        candidate_state=submission.state if submission is not None else "",
        watching=controller.participant.watching,
        memory_bytes=sum(ledger.need(slot.engine.memory_bytes) for slot in host.loaded()),
        account=host.account,
    )
