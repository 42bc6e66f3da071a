"""One model's part in a flip: its record, its watch window and its events.

`runtime/swap/transaction.py` calls a participant under the state lock, in a fixed order.  Knows live.json,
the verifier's golden answers and the watch window; knows nothing of queues.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import Refused
from runtime.events import Event, State
from runtime.serving.served_model import ServedModel
from runtime.serving.slot import Slot
from runtime.swap.candidate import Candidate, Golden
from runtime.swap.context import SwapContext
from runtime.swap.flags import OperatorFlags
from runtime.swap.live_record import LiveRecord
from runtime.swap.submissions import Submission
from runtime.swap.watch import Baseline, RollBack, Watch


@dataclass
class PreparedSwap:
    """A version that has passed every check and waits for its flip.

    live: the version that it was compared with.  shadow: the report of the shadow run.  seconds: the
    monotonic times at which the swap began, was verified and was shadowed.
    """

    participant: ModelParticipant
    submission: Submission
    candidate: Candidate
    slot: Slot
    live: Slot | None
    shadow: dict[str, Any]
    seconds: dict[str, float]

    @property
    def model(self) -> str:
        return self.participant.model

    @property
    def version(self) -> int:
        return self.slot.version


class ModelParticipant:
    """`roll_back`: what the watch window calls if the version behaves badly."""

    def __init__(
        self, context: SwapContext, record: LiveRecord, flags: OperatorFlags, roll_back: RollBack
    ) -> None:
        self.flags = flags
        self._context = context
        self._record = record
        self._roll_back = roll_back
        self._watch: Watch | None = None

    @property
    def model(self) -> str:
        return self._context.model

    @property
    def host(self) -> ServedModel:
        return self._context.host

    @property
    def pinned(self) -> bool:
        return self.flags.pinned

    @property
    def watching(self) -> bool:
        """True while a watch window is open."""
        watch = self._watch
        return watch is not None and watch.is_alive()

    def baseline(self) -> Baseline:
        """Returns how the live version behaves, for the watch window of the next one."""
        return Baseline.of(self.host.live, self._watch)

    def end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and threading.current_thread() is not watch:
            watch.stop()

    def record_flip(self, version: int, extra: Mapping[str, Any], *, required: bool) -> None:
        """Writes to live.json that `version` becomes live.  Raises Refused if that fails and is required."""
        live = self.host.live
        try:
            before = live.version if live is not None else None
            self._record.write_flip(version, before, self.flags.values, extra)
        except Refused as refusal:
            if required:
                raise
            self._context.publisher.note(version, refusal.check, refusal.reason)  # the group's record counts

    def record_back(self, version: int, extra: Mapping[str, Any]) -> None:
        """Writes to live.json that `version` is live again.  Raises Refused("record", …)."""
        self._record.write_flip(version, None, self.flags.values, extra)

    def on_live(
        self, prepared: PreparedSwap, before: Baseline, displaced: Slot | None, flip_ms: float
    ) -> None:
        """After the flip: releases the reservation, retires `displaced`, opens the watch window and
        publishes the event.
        """
        context, slot, candidate = self._context, prepared.slot, prepared.candidate
        candidate.reservation.release()  # from here on the slot's memory is counted
        if displaced is not None:
            displaced.retire()
            event = Event(self.model, displaced.version, State.RETIRED, reason="two versions behind")
            context.publisher.publish(event)
        goldens = context.verifier.goldens
        goldens[slot.version] = candidate.golden
        context.verifier.goldens = {s.version: goldens.get(s.version, Golden()) for s in self.host.loaded()}
        self.end_watch()
        if context.config.watch.seconds > 0 and self.host.previous is not None:
            self._watch = Watch(self.host, slot, before, context.config, self._roll_back)
            self._watch.start()
        now, times = time.monotonic(), prepared.seconds
        detail: dict[str, Any] = {
            "flip_ms": flip_ms,
            "seconds": round(now - times["begun"], 4),
            "verify_seconds": round(times["verified"] - times["begun"], 4),
            "shadow_seconds": round(times["shadowed"] - times["verified"], 4),
            "promote_seconds": round(now - times["shadowed"], 4),
            "previous": prepared.live.version if prepared.live is not None else 0,
        }
        if prepared.submission.shadow and prepared.live is not None:
            detail["shadow"] = prepared.shadow
        reason = str(prepared.shadow.get("note", ""))
        event = Event(self.model, slot.version, State.LIVE, reason=reason, detail=detail)
        context.publisher.publish(event, prepared.submission)

    def on_rolled_back(
        self, now: Slot, bad: Slot, check: str, reason: str, detail: Mapping[str, Any]
    ) -> Event:
        """Retires `bad`; publishes ROLLED_BACK of it and LIVE of `now`.  Returns the first event."""
        bad.retire()
        detail = {**detail, "live": now.version}
        event = Event(self.model, bad.version, State.ROLLED_BACK, check, reason, detail)
        publish = self._context.publisher.publish
        publish(event)
        publish(Event(self.model, now.version, State.LIVE, reason=f"rolled back from version {bad.version}"))
        return event
