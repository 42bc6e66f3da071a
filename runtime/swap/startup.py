"""What a model serves when the server starts, or when it is loaded again.

The last live version comes first, then the one before it, then the newest that passes.  Knows the verifier
and live.json; knows nothing of submissions.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

from runtime.errors import Refused, Unjudged, of_the_machine
from runtime.events import Event, State
from runtime.process.priority import LowPriority
from runtime.serving.served_model import UNLOADED
from runtime.serving.slot import Slot
from runtime.swap.candidate import Candidate
from runtime.swap.context import SwapContext
from runtime.swap.flags import OperatorFlags
from runtime.swap.live_record import LiveRecord
from runtime.swap.retention import Retention

log = logging.getLogger("roadworthy.swap")

#: Checks by which a start may reject a version for good: the others depend on settings and machine.
_VERDICTS = ("manifest", "hash", "contract", "load", "finite")


class Startup:
    """Loads the version that one model serves first."""

    def __init__(
        self, context: SwapContext, record: LiveRecord, flags: OperatorFlags, retention: Retention
    ) -> None:
        self._context = context
        self._record = record
        self._flags = flags
        self._retention = retention
        self._model = context.model

    def run(self) -> None:
        """Loads the last live version; if it is refused, the previous one, or the newest that passes.

        Never raises for a bad version: the model is then not ready, and its `reason` names the fault.
        """
        context = self._context
        state = self._record.read()[0]
        if self.leave_unloaded(state):
            return
        recorded = [n for n in (state.get("live"), state.get("previous")) if n]
        excluded = self._retention.excluded_versions()
        # A damaged number in live.json must not load a version that was never submitted.
        served = context.repository.last_live(self._model)
        recorded += [n for n in (served.get("live"), served.get("previous")) if n and n not in excluded]
        newest = [n for n in reversed(context.repository.versions(self._model)) if n not in excluded]
        tried: list[str] = []
        judged = True
        for number in dict.fromkeys(recorded + newest):
            try:
                candidate, slot = self.load_verified(number)
            except Refused as refusal:
                tried.append(f"version {number}: {refusal}")
                judged = judged and _is_verdict(refusal)
                continue
            self.serve_initial(candidate, slot, "; ".join(tried), record=judged)
            return
        none = "no version in the repository"
        if context.repository.versions(self._model):
            none = "every version was refused or rolled back, see `versions`; submit one to try it again"
        context.host.reason = "; ".join(tried) or none

    def leave_unloaded(self, state: dict[str, Any]) -> bool:
        """Returns True if the record asks to leave the model unloaded; the model then reports why."""
        if not state.get("unloaded"):
            return False
        host = self._context.host
        host.reason = UNLOADED
        host.unloaded = tuple(n for n in (state.get("live"), state.get("previous")) if n)
        return True

    def load_verified(self, number: int) -> tuple[Candidate, Slot]:
        """Loads a version with every check that needs no live version.

        Raises Refused and publishes why: as REJECTED only for a fault that the version has on any server.
        """
        try:
            return self._verify(number)
        except Refused as refusal:
            if _is_verdict(refusal):
                state, reason, detail = State.REJECTED, refusal.reason, refusal.detail
            else:
                state, reason = State.NOTE, f"not served at this start: {refusal.reason}"
                detail = {**refusal.detail, "judged": False}
            event = Event(self._model, number, state, refusal.check, reason, detail)
            self._context.publisher.publish(event)
            raise

    def _verify(self, number: int) -> tuple[Candidate, Slot]:
        """Turns every fault of a version into Refused: at a start nothing else may end the server."""
        verifier = self._context.verifier
        candidate: Candidate | None = None
        try:
            candidate = verifier.verify(number, reference=None)
            return candidate, verifier.slot(candidate)
        except BaseException as error:
            if candidate is not None:
                candidate.close()
            if isinstance(error, Refused) or not isinstance(error, Exception):
                raise
            if of_the_machine(error):
                raise Unjudged("internal", remedy(error)) from error
            log.exception("%s version %s", self._model, number)
            raise Refused("internal", f"{type(error).__name__}: {error}") from error

    def serve_initial(
        self,
        candidate: Candidate,
        slot: Slot,
        why: str = "",
        before: int | None = None,
        *,
        record: bool = True,
    ) -> None:
        """Makes a loaded version live.

        why: the reason why it is not the one that was live.  before: the version to roll back to, if
        live.json does not contain it.  record: False if it replaces one that this start could not judge;
        the next start then tries that one first again.
        """
        context = self._context
        state, complete = self._record.read()
        number = slot.version
        previous = state.get("previous") if state.get("live") == number else before
        with context.scope.state_lock:
            extra: dict[str, Any] = {}
            with contextlib.suppress(Refused):  # a medium that cannot be written can still be served
                extra = context.scope.record({self._model: number}, best_effort=True)
            with context.scope.flip_lock:
                displaced = context.host.flip(slot)
                context.scope.flipped()
            if displaced is not None:
                displaced.retire()
            candidate.reservation.release()
            context.verifier.goldens[number] = candidate.golden
            if not complete or state.get("live") != number:
                lost = "live.json was lost; from the history"
                why = why or (lost if state.get("live") else "first version")
                try:
                    if record:
                        self._record.write_flip(number, previous, self._flags.values, extra)
                except Refused as refusal:
                    log.warning("%s version %s is live but not recorded: %s", self._model, number, refusal)
                context.publisher.publish(Event(self._model, number, State.LIVE, reason=why))
            elif self._retention.last_entry_is_adverse(number):
                reason = why or "passes at this start"
                context.publisher.publish(Event(self._model, number, State.LIVE, reason=reason))
            context.scope.publish_events("", why)
        self._warm_previous(previous, number)

    def _warm_previous(self, number: Any, live: int) -> None:
        """Loads the rollback target again after a restart, in the background, if it still passes."""
        preserving = self._context.config.guard.resource_preserving
        if not isinstance(number, int) or number in (0, live) or preserving:
            return
        threading.Thread(
            target=self._warm, args=(number, live), name=f"warm-{self._model}", daemon=True
        ).start()

    def _warm(self, number: int, live: int) -> None:
        context, verifier = self._context, self._context.verifier
        try:
            with LowPriority(context.config.engine.nice) as low:
                timeout = context.config.engine.load_timeout
                candidate = low.call(lambda: verifier.verify(number, reference=None), timeout)
            try:
                slot = verifier.slot(candidate)
            except BaseException:
                candidate.close()
                raise
        except Refused as refusal:
            context.publisher.note(number, refusal.check, f"not kept warm: {refusal.reason}")
            return
        with context.scope.state_lock:
            now = context.host.live
            changed = now is None or now.version != live or context.host.previous is not None
            if changed or context.stopping.is_set():
                candidate.close()
                return
            verifier.goldens[number] = candidate.golden
            context.host.keep_warm(slot)
            candidate.reservation.release()


def _is_verdict(refusal: Refused) -> bool:
    """True if a start refuses the version for a fault that it has on any server."""
    return refusal.check in _VERDICTS and not isinstance(refusal, Unjudged)


def remedy(error: Exception) -> str:
    """Returns the reason text for an error of the machine, with what to do about it."""
    if isinstance(error, MemoryError):
        return "the machine has no memory left for it; give it more, or serve fewer models"
    return f"{error}; mend that and start or submit again"
