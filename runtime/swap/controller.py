"""The guarded swap of one model: how a version becomes live, and how it stops being live.

    SUBMITTED -> VERIFIED -> SHADOWING -> LIVE -> (RETIRED | ROLLED_BACK)   or REJECTED(check, reason)

One controller per model, one swap at a time.  Everything heavy runs on a thread of low priority, off the
answer path; the flip itself replaces one reference per model of the scope.  The parts: `startup` (the first
version), `flags` (pin, freeze), `retention` (which versions stay), `participant` and `transaction` (the
flip).  Knows the repository, the served model and the checks; knows no gRPC.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from runtime.config import ServerConfig
from runtime.errors import Refused, Unjudged, of_the_machine
from runtime.events import Bus, Event, State
from runtime.process.priority import LowPriority
from runtime.repository.repository import Repository
from runtime.serving.memory_budget import MemoryBudget
from runtime.serving.served_model import UNLOADED, ServedModel
from runtime.serving.slot import Slot
from runtime.swap.candidate import Candidate
from runtime.swap.context import SwapContext
from runtime.swap.flags import OperatorFlags
from runtime.swap.live_record import LiveRecord
from runtime.swap.participant import ModelParticipant, PreparedSwap
from runtime.swap.publisher import EventPublisher
from runtime.swap.retention import Retention
from runtime.swap.scope import SwapScope
from runtime.swap.shadow import Shadow
from runtime.swap.startup import Startup, remedy
from runtime.swap.submissions import Submission, SubmissionQueue
from runtime.swap.transaction import commit, roll_back
from runtime.swap.verify import Verifier

log = logging.getLogger("roadworthy.swap")


class SwapController:
    """The swaps of `host`.  `scope`: what flips together with it; the host uses the scope's flip lock."""

    def __init__(
        self,
        host: ServedModel,
        repository: Repository,
        config: ServerConfig,
        bus: Bus,
        ledger: MemoryBudget,
        scope: SwapScope,
    ) -> None:
        self.host = host
        self.model = host.name
        self.scope = scope
        self.verifier = Verifier(host, repository, config, ledger)
        publisher = EventPublisher(self.model, repository, bus)
        self._context = context = SwapContext(host, repository, config, scope, self.verifier, publisher)
        self._lock = scope.state_lock
        self._shadow = Shadow(self.verifier, config, context.stopping)
        self.queue: SubmissionQueue[Submission] = SubmissionQueue(
            self.model,
            f"of '{self.model}'",
            self._lock,
            stopped=context.stopping.is_set,
            max_pending=lambda: context.config.swap.max_pending,
            run=self._run,
        )
        self.record = LiveRecord(self.model, repository)
        self.flags = OperatorFlags(context, self.record)
        self.retention = Retention(
            context, self.record, lambda: {each.version for each in self.queue.unfinished()}
        )
        self.startup = Startup(context, self.record, self.flags, self.retention)
        self.participant = ModelParticipant(context, self.record, self.flags, self._roll_back_watched)

    # -- operators -------------------------------------------------------------------

    def submit(self, version: int, *, shadow: bool = True) -> Submission:
        """Queues a version for the guarded swap.  A version that is already under way is joined, not
        repeated.

        Raises ServiceError: UNAVAILABLE during shutdown, RESOURCE_EXHAUSTED if too many wait.
        """
        self._context.repository.check_writable()
        return self.queue.submit(Submission(self.model, version, shadow))

    def rollback(self, reason: str = "on an operator's word") -> Event:
        """Makes the warm previous version live again, by one reference, and those of the rollback set.

        Raises ServiceError.
        """
        self._context.repository.check_writable()
        with self._lock:
            together = self.scope.rollback_set(self.participant)
            return roll_back(together, self.scope, "", reason, {})[self.model]

    def unload(self) -> None:
        """Stops serving the model until it is loaded again, also after a restart."""
        self._context.repository.check_writable()
        with self._lock:
            self.record.write_unloaded(True)
            self.participant.end_watch()
            self.host.unload(UNLOADED)

    def reload(self) -> None:
        """Serves the model again after `unload`, with the version that was live."""
        self._context.repository.check_writable()
        with self._lock:
            self.record.write_unloaded(False)
        self.startup.run()

    def configure(self, config: ServerConfig) -> None:
        """Replaces the limits for the next swap; one that is under way may see either."""
        self._context.config = config
        self.verifier.configure(config)
        self._shadow.configure(config)

    def stop(self) -> None:
        """Starts no further swap; one that is under way is abandoned at its next step."""
        with self._lock:
            self._context.stopping.set()
            self.flags.wake()
            self.participant.end_watch()

    def note(self, version: int, check: str, reason: str, detail: dict[str, Any] | None = None) -> None:
        """Publishes something that an operator should know and that changes no version's state."""
        self._context.publisher.note(version, check, reason, detail)

    # -- the swap --------------------------------------------------------------------

    def _run(self, submission: Submission) -> None:
        self._swap(submission)
        self.retention.prune_configured()

    def _swap(self, submission: Submission) -> None:
        prepared: PreparedSwap | None = None
        try:
            with self.scope.swap_lock:
                prepared = self.prepare(submission)
                if prepared is not None:
                    commit([prepared], self.scope)
        except Refused as refusal:
            self.reject(submission, prepared, refusal)
        except Exception as error:
            if of_the_machine(error):
                self.reject(submission, prepared, Unjudged("internal", remedy(error)))
                return
            log.exception("swap of %s version %s", self.model, submission.version)
            self.reject(submission, prepared, Refused("internal", f"{type(error).__name__}: {error}"))

    def prepare(self, submission: Submission) -> PreparedSwap | None:
        """Runs every check of a version, from SUBMITTED to the slot that would be live.

        Returns None if the version is live already.  The caller holds the swap lock.  Raises Refused.
        """
        config, version = self._context.config, submission.version
        begun = time.monotonic()
        self._publish(submission, State.SUBMITTED)
        live = self.host.live
        if live is not None and live.version == version:
            self._publish(submission, State.LIVE, reason="is live already")
            return None
        self.flags.wait_unfrozen(version)
        candidate: Candidate | None = None
        shadow: dict[str, Any] = {}
        try:
            with LowPriority(config.engine.nice) as low:
                verified_candidate = candidate = low.call(
                    lambda: self.verifier.verify(version, reference=live), config.engine.load_timeout
                )
                verified = time.monotonic()
                detail = {"seconds": round(verified - begun, 4), **candidate.report}
                notes = "; ".join(candidate.notes)
                self._publish(submission, State.VERIFIED, reason=notes, detail=detail)
                if live is not None and submission.shadow:
                    self._publish(submission, State.SHADOWING)
                    limit = self._context.config.shadow.timeout + self._context.config.engine.load_timeout
                    shadow = low.call(lambda: self._shadow.run(verified_candidate), limit)
            shadowed = time.monotonic()
            slot = self.verifier.slot(candidate)
        except BaseException:
            if candidate is not None:
                candidate.close()
            raise
        seconds = {"begun": begun, "verified": verified, "shadowed": shadowed}
        return PreparedSwap(self.participant, submission, candidate, slot, live, shadow, seconds)

    def reject(self, submission: Submission, prepared: PreparedSwap | None, refusal: Refused) -> None:
        """Publishes REJECTED; closes the engine of a prepared version."""
        if prepared is not None and prepared.slot is not self.host.live:
            prepared.slot.retire()
            prepared.candidate.reservation.release()
        self._publish(submission, State.REJECTED, refusal.check, refusal.reason, refusal.detail)

    def _publish(
        self,
        submission: Submission,
        state: State,
        check: str = "",
        reason: str = "",
        detail: dict[str, Any] | None = None,
    ) -> None:
        event = Event(self.model, submission.version, state, check, reason, detail or {})
        self._context.publisher.publish(event, submission)

    def _roll_back_watched(self, slot: Slot, check: str, reason: str, detail: dict[str, Any]) -> None:
        """Called by the watch window.  A pinned version stays live, and a note reports the fault."""
        with self._lock:
            if self.host.live is not slot or self._context.stopping.is_set():
                return
            together = self.scope.rollback_set(self.participant)
            for each in together:
                if each.pinned or each.host.previous is None:
                    why = "is pinned" if each.pinned else "nothing is kept warm"
                    why = why if each is self.participant else f"'{each.model}': {why}"
                    self.note(slot.version, check, f"would have been rolled back but {why}: {reason}")
                    return
            roll_back(together, self.scope, check, reason, detail)
