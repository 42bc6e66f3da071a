"""The flip and the rollback of one model or of several: all of them at one instant, or none.

Lock order: `state_lock` before `flip_lock`.  Records are written before the flip.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import Code, Refused, ServiceError
from runtime.events import Event
from runtime.serving.served_model import ServedModel
from runtime.swap.participant import PreparedSwap
from runtime.swap.scope import Participant, SwapScope


def commit(prepared: Sequence[PreparedSwap], scope: SwapScope) -> None:
    """Makes all of them live at one instant.

    Durable first, then visible: if the server is killed between the two, it restarts with the new versions,
    which have passed.  Raises Refused, and then nothing has changed.
    """
    for each in prepared:
        each.participant.flags.wait_unfrozen(each.version)
    with scope.state_lock:
        for each in prepared:  # the flags may have changed between the wait and the lock
            each.participant.flags.check_flip(each.version)
        extra = scope.record({each.model: each.version for each in prepared})
        for each in prepared:
            each.participant.record_flip(each.version, extra, required=not scope.recorded)
        before = [each.participant.baseline() for each in prepared]
        begun = time.perf_counter()
        with scope.flip_lock:
            displaced = [each.participant.host.flip(each.slot) for each in prepared]
            scope.flipped()
        flip_ms = round((time.perf_counter() - begun) * 1e3, 4)
        for each, baseline, old in zip(prepared, before, displaced, strict=True):
            each.participant.on_live(each, baseline, old, flip_ms)
        scope.publish_events("", "")


def roll_back(
    participants: Sequence[Participant],
    scope: SwapScope,
    check: str,
    reason: str,
    detail: Mapping[str, Any],
) -> dict[str, Event]:
    """Takes all of them back to their warm versions at one instant; returns the event of each, by model.

    The caller holds the state lock.  Raises ServiceError if one is pinned or has no warm previous version,
    and then nothing has changed.  A full disk does not stop a rollback: a record that lags is better than a
    bad version that answers.
    """
    for each in participants:
        if each.pinned:
            message = f"'{each.model}' is pinned; unpin it first"
            raise ServiceError(Code.FAILED_PRECONDITION, message, "state")
    claimed: list[ServedModel] = []  # from here to the flip no candidate gets the memory of these
    try:
        with scope.flip_lock:
            lives = {}
            for each in participants:
                lives[each.model] = each.host.reserve_previous().version
                claimed.append(each.host)
        try:
            extra = scope.record(lives, back=True, best_effort=True)
            for each in participants:
                each.record_back(lives[each.model], extra)
        except Refused as refusal:
            reason = f"{reason} (not recorded: {refusal.reason})"
        for each in participants:
            each.end_watch()
        with scope.flip_lock:
            pairs = [each.host.flip_back() for each in participants]
            scope.flipped()
    finally:
        for host in claimed:
            host.release_previous()
    events = {
        each.model: each.on_rolled_back(now, bad, check, reason, detail)
        for each, (now, bad) in zip(participants, pairs, strict=True)
    }
    scope.publish_events(check, reason)
    return events
