"""The guarded swap: how a version comes to be live, and how it stops being live.

    SUBMITTED -> VERIFIED -> SHADOWING -> LIVE -> (RETIRED | ROLLED_BACK)   or REJECTED(check, reason)

One controller a model, one swap at a time.  Everything heavy runs on a thread of low
priority, off the answer path; the flip itself is one reference, or one for each model that
is tied to it.  Knows the repository, the host and the guard; knows no gRPC.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.config import ServerConfig
from runtime.errors import Code, Refused, ServiceError, Unjudged, of_the_machine
from runtime.events import Bus, Event, State
from runtime.process.priority import LowPriority
from runtime.repository.repository import Repository
from runtime.serving.memory_budget import Ledger
from runtime.serving.served_model import UNLOADED, ModelHost
from runtime.serving.slot import Slot
from runtime.swap.scope import Ties
from runtime.swap.shadow import Shadow
from runtime.swap.submissions import Ticket
from runtime.swap.verify import Candidate, Golden, Verifier
from runtime.swap.watch import Baseline, Watch

log = logging.getLogger("roadworthy.swap")


@dataclass
class Prepared:
    """A version that has passed every check and waits for its flip."""

    controller: SwapController
    ticket: Ticket
    candidate: Candidate
    slot: Slot
    live: Slot | None  # what it was compared with
    shadow: dict[str, Any]
    seconds: dict[str, float]

    @property
    def version(self) -> int:
        return self.slot.version


class SwapController:
    """`ties`: whether the model flips with others (`runtime/swap/scope.py`); those of `host`."""

    def __init__(
        self,
        host: ModelHost,
        repository: Repository,
        config: ServerConfig,
        bus: Bus,
        ledger: Ledger,
        ties: Ties,
    ) -> None:
        self.host = host
        self.ties = ties
        self.model = host.name
        self._repository = repository
        self._config = config
        self._bus = bus
        self._lock = ties.control
        self._changed = threading.Condition(self._lock)
        self._pending: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._worker: threading.Thread | None = None
        self._verifier = Verifier(host, repository, config, ledger)
        self._stop = threading.Event()
        self._shadow = Shadow(self._verifier, config, self._stop)
        self._watch: Watch | None = None
        state = self.recorded()[0]
        self._pinned = bool(state.get("pinned"))
        self._frozen = bool(state.get("frozen"))
        self._frozen_reason = str(state.get("frozen_reason", ""))

    # -- what a person may ask -------------------------------------------------------

    @property
    def pinned(self) -> bool:
        return self._pinned

    @property
    def frozen(self) -> bool:
        return self._frozen

    @property
    def frozen_reason(self) -> str:
        return self._frozen_reason

    @property
    def watching(self) -> bool:
        watch = self._watch
        return watch is not None and watch.is_alive()

    @property
    def current(self) -> Ticket | None:
        return self._current

    def submit(self, version: int, *, shadow: bool = True) -> Ticket:
        """Queues a version for the guarded swap; a version that is already under way is joined, not repeated.

        Raises ServiceError(RESOURCE_EXHAUSTED) when too many wait.
        """
        self._repository.check_writable()
        with self._lock:
            for ticket in (self._current, *self._pending):
                if ticket is not None and ticket.version == version and ticket.shadow == shadow:
                    return ticket
            if self._stop.is_set():
                raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
            if len(self._pending) >= self._config.swap.max_pending:
                message = (
                    f"{len(self._pending)} submissions of '{self.model}' wait already; submit again later"
                )
                raise ServiceError(Code.RESOURCE_EXHAUSTED, message, "queue-full")
            ticket = Ticket(self.model, version, shadow)
            self._pending.append(ticket)
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name=f"swap-{self.model}", daemon=True)
                self._worker.start()
            return ticket

    def rollback(self, reason: str = "on an operator's word") -> Event:
        """Back to the warm previous version, by one reference; with it go those that it is tied to.

        Raises ServiceError.
        """
        self._repository.check_writable()
        with self._lock:
            return roll_back(self.ties.together(self), self.ties, "", reason, {})[self.model]

    def pin(self, version: int) -> None:
        """Fixes the live version (0 or its number).  Raises ServiceError for any other: promote it first."""
        self._repository.check_writable()
        with self._lock:
            live = self.host.live
            if live is None or version not in (0, live.version):
                now = "nothing is" if live is None else f"version {live.version} is"
                message = f"version {version} of '{self.model}' is not live ({now}); promote it, then pin"
                raise ServiceError(Code.FAILED_PRECONDITION, message, "state")
            self._set(pinned=True, reason="pinned")

    def unpin(self) -> None:
        self._repository.check_writable()
        with self._lock:
            self._set(pinned=False, reason="unpinned")

    def freeze(self, reason: str) -> None:
        """Forbids flips to other versions.  A rollback to the previous one stays possible: it is the safe
        direction.
        """
        self._repository.check_writable()
        with self._lock:
            self._set(frozen=True, frozen_reason=reason, reason=f"frozen: {reason}" if reason else "frozen")

    def unfreeze(self) -> None:
        self._repository.check_writable()
        with self._lock:
            self._set(frozen=False, frozen_reason="", reason="unfrozen")

    def configure(self, config: ServerConfig) -> None:
        """New limits for the next swap; one that is under way may see either."""
        self._config = config
        self._verifier.configure(config)
        self._shadow.configure(config)

    def stop(self) -> None:
        """No further swaps; one that is under way is abandoned at its next step."""
        with self._lock:
            self._stop.set()
            self._changed.notify_all()
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    # -- start ----------------------------------------------------------------------

    def recorded(self) -> tuple[dict[str, Any], bool]:
        """(what was live when the server last ran, whether it is from live.json and not from the history)."""
        state = self._repository.live(self.model) or {}
        if state.get("live"):
            return state, True
        state.pop("previous", None)
        return {**self._repository.last_live(self.model), **state}, False

    def start(self) -> None:
        """Brings up the last live version; the one before it, or the newest that passes, when it is refused.

        Never raises for a bad version: the model is then not ready, and says why.
        """
        state = self.recorded()[0]
        if self.leave_unloaded(state):
            return
        wanted = [n for n in (state.get("live"), state.get("previous")) if n]
        out = self.out()
        newest = [n for n in reversed(self._repository.versions(self.model)) if n not in out]
        tried: list[str] = []
        judged = True
        for number in dict.fromkeys(wanted + newest):
            try:
                candidate, slot = self.bring_up(number)
            except Refused as refusal:
                tried.append(f"version {number}: {refusal}")
                judged = judged and _is_verdict(refusal)
                continue
            self.begin(candidate, slot, "; ".join(tried), record=judged)
            return
        none = "no version in the repository"
        if self._repository.versions(self.model):
            none = "every version was refused or rolled back, see `versions`; submit one to try it again"
        self.host.reason = "; ".join(tried) or none

    def leave_unloaded(self, state: dict[str, Any]) -> bool:
        if not state.get("unloaded"):
            return False
        self.host.reason = UNLOADED
        recorded = (state.get("live"), state.get("previous"))
        self.host.unloaded = tuple(n for n in recorded if n)
        return True

    def begin(
        self,
        candidate: Candidate,
        slot: Slot,
        why: str = "",
        before: int | None = None,
        *,
        record: bool = True,
    ) -> None:
        """Serves a version that was brought up.  `why` it is not the one that was live; `before`: the one to
        go back to, where live.json does not know it.  `record`: False where it stands in for one that this
        start could not judge, and that the next start shall try first.
        """
        state, whole = self.recorded()
        number = slot.version
        previous = state.get("previous") if state.get("live") == number else before
        with self._lock:
            extra: dict[str, Any] = {}
            with contextlib.suppress(Refused):  # a medium that cannot be written can still be served
                extra = self.ties.record({self.model: number}, anyway=True)
            with self.ties.slots:
                displaced = self.host.flip(slot)
                self.ties.flipped()
            if displaced is not None:
                displaced.retire()
            candidate.reservation.release()
            self._verifier.goldens[number] = candidate.golden
            if not whole or state.get("live") != number:
                lost = "live.json was lost; from the history"
                why = why or (lost if state.get("live") else "first version")
                try:
                    if record:
                        self._record(number, previous, extra)
                except Refused as refusal:
                    log.warning("%s version %s is live but not recorded: %s", self.model, number, refusal)
                self._emit(Event(self.model, number, State.LIVE, reason=why))
            elif self._spoken_against(number):
                self._emit(Event(self.model, number, State.LIVE, reason=why or "passes at this start"))
            self.ties.announce("", why)
        self._warm_previous(previous, number)

    def bring_up(self, number: int) -> tuple[Candidate, Slot]:
        """A version of the repository with every check that needs no live version.  Raises Refused, and says
        so in the history: as a verdict only of what is the version's own fault, whoever serves it.
        """
        try:
            return self._checked(number)
        except Refused as refusal:
            if _is_verdict(refusal):
                state, reason, detail = State.REJECTED, refusal.reason, refusal.detail
            else:
                state, reason = State.NOTE, f"not served at this start: {refusal.reason}"
                detail = {**refusal.detail, "judged": False}
            self._emit(Event(self.model, number, state, refusal.check, reason, detail))
            raise

    def _checked(self, number: int) -> tuple[Candidate, Slot]:
        """With every fault of a version as a refusal: at a start nothing else may end the server."""
        candidate: Candidate | None = None
        try:
            candidate = self._verifier.verify(number, reference=None)
            return candidate, self._verifier.slot(candidate)
        except BaseException as error:
            if candidate is not None:
                candidate.close()
            if isinstance(error, Refused) or not isinstance(error, Exception):
                raise
            if of_the_machine(error):
                raise Unjudged("internal", _said(error)) from error
            log.exception("%s version %s", self.model, number)
            raise Refused("internal", f"{type(error).__name__}: {error}") from error

    def _warm_previous(self, number: Any, live: int) -> None:
        """After a restart the rollback target is loaded again, in the background, if it still passes."""
        if (
            not isinstance(number, int)
            or number in (0, live)
            or self._config.guard.resource_preserving
        ):
            return

        def warm() -> None:
            try:
                with LowPriority(self._config.engine.nice) as low:
                    candidate = low.call(
                        lambda: self._verifier.verify(number, reference=None),
                        self._config.engine.load_timeout,
                    )
                try:
                    slot = self._verifier.slot(candidate)
                except BaseException:
                    candidate.close()
                    raise
            except Refused as refusal:
                self.note(number, refusal.check, f"not kept warm: {refusal.reason}")
                return
            with self._lock:
                now = self.host.live
                if (
                    now is None
                    or now.version != live
                    or self.host.previous is not None
                    or self._stop.is_set()
                ):
                    candidate.close()
                    return
                self._verifier.goldens[number] = candidate.golden
                self.host.keep_warm(slot)
                candidate.reservation.release()

        threading.Thread(target=warm, name=f"warm-{self.model}", daemon=True).start()

    # -- the swap -------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._current = self._worker = None
                    return
                self._current = ticket = self._pending.popleft()
            self._swap(ticket)
            self.keep_newest()

    def _swap(self, ticket: Ticket) -> None:
        prepared: Prepared | None = None
        try:
            with self.ties.turn:
                prepared = self.prepare(ticket)
                if prepared is not None:
                    commit([prepared], self.ties)
        except Refused as refusal:
            self.reject(ticket, prepared, refusal)
        except Exception as error:
            if of_the_machine(error):
                self.reject(ticket, prepared, Unjudged("internal", _said(error)))
                return
            log.exception("swap of %s version %s", self.model, ticket.version)
            self.reject(ticket, prepared, Refused("internal", f"{type(error).__name__}: {error}"))

    def prepare(self, ticket: Ticket) -> Prepared | None:
        """Every check of a version, from SUBMITTED to the slot that would be live; None where it is live
        already.  Under the turn.  Raises Refused.
        """
        begun = time.monotonic()
        self._emit(Event(self.model, ticket.version, State.SUBMITTED), ticket)
        live = self.host.live
        if live is not None and live.version == ticket.version:
            self._emit(Event(self.model, ticket.version, State.LIVE, reason="is live already"), ticket)
            return None
        self.await_thaw(ticket.version)
        candidate: Candidate | None = None
        shadow: dict[str, Any] = {}
        try:
            with LowPriority(self._config.engine.nice) as low:
                candidate = low.call(
                    lambda: self._verifier.verify(ticket.version, reference=live),
                    self._config.engine.load_timeout,
                )
                verified = time.monotonic()
                detail = {"seconds": round(verified - begun, 4), **candidate.report}
                notes = "; ".join(candidate.notes)
                event = Event(self.model, ticket.version, State.VERIFIED, detail=detail, reason=notes)
                self._emit(event, ticket)
                if live is not None and ticket.shadow:
                    self._emit(Event(self.model, ticket.version, State.SHADOWING), ticket)
                    limit = self._config.shadow.timeout + self._config.engine.load_timeout
                    shadow = low.call(lambda: self._shadow.run(_sure(candidate)), limit)
            shadowed = time.monotonic()
            slot = self._verifier.slot(candidate)
        except BaseException:
            if candidate is not None:
                candidate.close()
            raise
        seconds = {"begun": begun, "verified": verified, "shadowed": shadowed}
        return Prepared(self, ticket, candidate, slot, live, shadow, seconds)

    def reject(self, ticket: Ticket, prepared: Prepared | None, refusal: Refused) -> None:
        """The end of a version that will not be live; of a prepared one the engine is given up."""
        if prepared is not None and prepared.slot is not self.host.live:
            prepared.slot.retire()
            prepared.candidate.reservation.release()
        event = Event(
            self.model, ticket.version, State.REJECTED, refusal.check, refusal.reason, refusal.detail
        )
        self._emit(event, ticket)

    def await_thaw(self, version: int) -> None:
        """Waits as long as a candidate may for an unfreeze.  Raises Refused when it may not flip."""
        with self._lock:
            if self._frozen and self._config.swap.freeze_wait > 0:
                self._changed.wait_for(
                    lambda: not self._frozen or self._stop.is_set(), self._config.swap.freeze_wait
                )
            self.check_flip(version)

    def check_flip(self, version: int) -> None:
        with self._lock:
            if self._stop.is_set():
                raise Refused("stopping", "the server is shutting down; submit again")
            if self._frozen:
                why = f" ({self._frozen_reason})" if self._frozen_reason else ""
                raise Refused("frozen", f"flips of '{self.model}' are frozen{why}; unfreeze and submit again")
            live = self.host.live
            if self._pinned and live is not None and live.version != version:
                raise Refused(
                    "pinned", f"'{self.model}' is pinned to version {live.version}; unpin and submit again"
                )

    # -- LIVE: what `commit` and `roll_back` do for each model, under the control lock ---------------

    def record_flip(self, version: int, extra: dict[str, Any], *, required: bool) -> None:
        live = self.host.live
        try:
            self._record(version, live.version if live is not None else None, extra)
        except Refused as refusal:
            if required:
                raise
            self.note(version, refusal.check, refusal.reason)  # the group's record is what counts

    def record_back(self, version: int, extra: dict[str, Any]) -> None:
        self._record(version, None, extra)

    def went_live(self, prepared: Prepared, before: Baseline, displaced: Slot | None, flip_ms: float) -> None:
        """After the flip: the books, the watch window, the event."""
        slot, candidate = prepared.slot, prepared.candidate
        candidate.reservation.release()  # counted by its slot from here on
        if displaced is not None:
            displaced.retire()
            self._emit(Event(self.model, displaced.version, State.RETIRED, reason="two versions behind"))
        self._verifier.goldens[slot.version] = candidate.golden
        self._verifier.goldens = {
            s.version: self._verifier.goldens.get(s.version, Golden()) for s in self.host.loaded()
        }
        self.end_watch()
        if self._config.watch.seconds > 0 and self.host.previous is not None:
            self._watch = Watch(self.host, slot, before, self._config, self.roll_back_watched)
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
        if prepared.ticket.shadow and prepared.live is not None:
            detail["shadow"] = prepared.shadow
        reason = str(prepared.shadow.get("note", ""))
        self._emit(Event(self.model, slot.version, State.LIVE, reason=reason, detail=detail), prepared.ticket)

    def went_back(self, now: Slot, bad: Slot, check: str, reason: str, detail: dict[str, Any]) -> Event:
        bad.retire()
        detail = {**detail, "live": now.version}
        event = Event(self.model, bad.version, State.ROLLED_BACK, check, reason, detail)
        self._emit(event)
        self._emit(
            Event(self.model, now.version, State.LIVE, reason=f"rolled back from version {bad.version}")
        )
        return event

    def baseline(self) -> Baseline:
        """How the live version behaves, for the watch window of the next one."""
        return Baseline.of(self.host.live, self._watch)

    def end_watch(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None and threading.current_thread() is not watch:
            watch.stop()

    def roll_back_watched(self, slot: Slot, check: str, reason: str, detail: dict[str, Any]) -> None:
        """What the watch window calls.  A pinned version stays, and says so."""
        with self._lock:
            if self.host.live is not slot or self._stop.is_set():
                return
            together = self.ties.together(self)
            for each in together:
                if each.pinned or each.host.previous is None:
                    why = "is pinned" if each.pinned else "nothing is kept warm"
                    why = why if each is self else f"'{each.model}': {why}"
                    self.note(slot.version, check, f"would have been rolled back but {why}: {reason}")
                    return
            roll_back(together, self.ties, check, reason, detail)

    # -- records --------------------------------------------------------------------

    def unload(self) -> None:
        """Stops serving the model until it is loaded again, also over a new start."""
        self._repository.check_writable()
        with self._lock:
            self._write({**self.recorded()[0], "unloaded": True})
            self.end_watch()
            self.host.unload(UNLOADED)

    def reload(self) -> None:
        """Serves the model again after `unload`, with the version that was live."""
        self._repository.check_writable()
        with self._lock:
            state = self.recorded()[0]
            self._write({key: value for key, value in state.items() if key != "unloaded"})
        self.start()

    def out(self) -> set[Any]:
        """The versions whose last word is that they were refused by their own fault, or rolled back."""
        out: set[Any] = set()
        for entry in self._repository.history(self.model):
            state, version = entry.get("state"), entry.get("version")
            if not version:
                continue
            judged = (entry.get("detail") or {}).get("judged") is not False
            blamed = state == State.REJECTED.value and judged and entry.get("check") not in _NOT_ITS_FAULT
            if blamed or state == State.ROLLED_BACK.value:
                out.add(version)
            elif state == State.LIVE.value:
                out.discard(version)
        return out

    def _spoken_against(self, version: int) -> bool:
        """Whether the history's last word on a version is another one than that it is live."""
        against = False
        for entry in self._repository.history(self.model):
            if entry.get("version") == version:
                noted = (entry.get("detail") or {}).get("judged") is False
                if noted or entry.get("state") in (State.REJECTED.value, State.ROLLED_BACK.value):
                    against = True
                elif entry.get("state") == State.LIVE.value:
                    against = False
        return against

    def newest(self) -> int | None:
        """The highest version that may be live: see `out`."""
        out = self.out()
        return max((n for n in self._repository.versions(self.model) if n not in out), default=None)

    def keep_newest(self) -> None:
        """Deletes what the configuration says is too many (`keep_versions`).  Never raises: the thread that
        calls it has other swaps to do.
        """
        if self._config.keep_versions > 0 and not self._stop.is_set() and not self._repository.read_only:
            try:
                self.prune(self._config.keep_versions)
            except Exception as error:
                log.error("old versions of %s cannot be deleted: %s", self.model, error)

    def prune(self, keep: int) -> list[int]:
        """Deletes versions that rounds of adaptation made, all but the newest `keep`; returns their numbers.

        What is live, warm, recorded, of a generation of the group, or on its way through a swap stays, and so
        does every version that no round made or whose manifest cannot be read.  Raises OSError.
        """
        self._repository.check_writable()
        gone: dict[int, Path] = {}
        with self._lock:
            wanted = self._wanted()
            adapted = [n for n in self._repository.versions(self.model) if self._adapted(n)]
            try:
                for number in adapted[: max(0, len(adapted) - keep)]:
                    if number not in wanted:
                        gone[number] = self._repository.put_aside(self.model, number)
            except BaseException:  # all of them or none: what was answered is what is there
                for number, path in gone.items():
                    self._repository.put_back(self.model, number, path)
                raise
            for number in gone:
                self.note(number, "pruned", f"deleted: the newest {keep} of {len(adapted)} are kept")
        for path in gone.values():  # out of sight already, and maybe large: not under the lock
            self._repository.remove(path)
        return list(gone)

    def _wanted(self) -> set[int]:
        """Versions that somebody has or may want again.  Under the lock."""
        wanted = {slot.version for slot in self.host.loaded()} | self.ties.referred(self.model)
        wanted |= {ticket.version for ticket in (self._current, *self._pending) if ticket is not None}
        wanted |= set(self.host.unloaded)
        state = self.recorded()[0]
        return wanted | {n for n in (state.get("live"), state.get("previous")) if isinstance(n, int)}

    def _adapted(self, number: int) -> bool:
        try:
            return bool(self._repository.manifest(self.model, number).get("adaptation"))
        except Refused:
            return False

    def _record(self, live: int, previous: int | None, extra: Mapping[str, Any]) -> None:
        self._write(
            {
                "live": live,
                "previous": previous,
                "pinned": self._pinned,
                "frozen": self._frozen,
                "frozen_reason": self._frozen_reason,
                "time": time.time(),
                **extra,
            }
        )

    def record_ties(self, extra: Mapping[str, Any]) -> None:
        """Writes what the ties add to live.json, where it is not there yet.  Raises Refused("record", …)."""
        state = self._repository.live(self.model) or {}
        if state.get("live") and any(state.get(key) != value for key, value in extra.items()):
            self._write({**state, **extra})

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self._repository.set_live(self.model, state)
        except OSError as error:
            raise Refused("record", f"live.json cannot be written: {error.strerror or error}") from error

    @property
    def flags(self) -> dict[str, Any]:
        return {"pinned": self._pinned, "frozen": self._frozen, "frozen_reason": self._frozen_reason}

    def set_flags(self, flags: Mapping[str, Any], reason: str) -> None:
        """Durable first, then true: what cannot be recorded does not hold.  Raises ServiceError(INTERNAL)."""
        with self._lock:
            self._set(reason=reason, **flags)

    def _set(self, *, reason: str, **changes: Any) -> None:
        flags = {**self.flags, **changes}
        live, previous = self.host.live, self.host.previous
        try:
            state = dict(self.recorded()[0])
            state |= {
                "live": live.version if live else state.get("live"),
                "previous": previous.version if previous else state.get("previous"),
            }
            self._write({**state, **flags})
        except (Refused, OSError) as error:
            message = f"'{self.model}' stays as it was: {error}; make room or mend it, and ask again"
            raise ServiceError(Code.INTERNAL, message, "record") from error
        for key, value in flags.items():
            setattr(self, f"_{key}", value)
        self.note(live.version if live else 0, "", reason, flags)  # from here they come back: last_live
        self._changed.notify_all()

    def note(self, version: int, check: str, reason: str, detail: dict[str, Any] | None = None) -> None:
        """Something a person should know, for the history and whoever watches."""
        self._emit(Event(self.model, version, State.NOTE, check, reason, detail or {}))

    def _emit(self, event: Event, ticket: Ticket | None = None) -> None:
        try:
            self._repository.append_history(self.model, event.line())
        except OSError as error:  # a full disk must not stop a rollback
            log.error("history of %s: %s", self.model, error)
        said = (event.model, event.version, event.state.value, event.check, event.reason)
        log.info("%s version %s %s %s %s", *said, extra=event.fields())
        self._bus.publish(event)
        if ticket is not None:
            ticket.put(event)


def steer(controllers: Sequence[SwapController], change: Callable[[SwapController], None]) -> None:
    """The same change for all of them, or for none: where one cannot be recorded, those before it are taken
    back.  Raises what `change` raises.
    """
    done: list[tuple[SwapController, dict[str, Any]]] = []
    try:
        for controller in controllers:
            flags = controller.flags
            change(controller)
            done.append((controller, flags))
    except ServiceError as error:
        for controller, flags in reversed(done):
            try:
                controller.set_flags(flags, "taken back: another model could not be recorded")
            except ServiceError as kept:
                error.add_note(str(kept))
                log.error("%s: %s", controller.model, kept)
        raise


def commit(prepared: Sequence[Prepared], ties: Ties) -> None:
    """Makes all of them live at one instant.

    Durable first, then visible: a kill between the two restarts with the new versions, which have passed.
    Raises Refused, and then nothing has changed.
    """
    for each in prepared:
        each.controller.await_thaw(each.version)
    with ties.control:
        for each in prepared:  # between the wait and the lock
            each.controller.check_flip(each.version)
        extra = ties.record({each.controller.model: each.version for each in prepared})
        for each in prepared:
            each.controller.record_flip(each.version, extra, required=not ties.recorded)
        before = [each.controller.baseline() for each in prepared]
        begun = time.perf_counter()
        with ties.slots:
            displaced = [each.controller.host.flip(each.slot) for each in prepared]
            ties.flipped()
        flip_ms = round((time.perf_counter() - begun) * 1e3, 4)
        for each, baseline, old in zip(prepared, before, displaced, strict=True):
            each.controller.went_live(each, baseline, old, flip_ms)
        ties.announce("", "")


def roll_back(
    controllers: Sequence[SwapController], ties: Ties, check: str, reason: str, detail: dict[str, Any]
) -> dict[str, Event]:
    """All of them back to their warm versions at one instant; the event of each, by model.

    Under the control lock.  Raises ServiceError where one is pinned or has nothing to go back to, and then
    nothing has changed.  A full disk does not stop it: better a record that lags than a bad version that
    answers.
    """
    for each in controllers:
        if each.pinned:
            message = f"'{each.model}' is pinned; unpin it first"
            raise ServiceError(Code.FAILED_PRECONDITION, message, "state")
    claimed: list[ModelHost] = []  # from here to the flip no candidate is given their memory
    try:
        with ties.slots:
            lives = {}
            for each in controllers:
                lives[each.model] = each.host.claim_previous().version
                claimed.append(each.host)
        try:
            extra = ties.record(lives, back=True, anyway=True)
            for each in controllers:
                each.record_back(lives[each.model], extra)
        except Refused as refusal:
            reason = f"{reason} (not recorded: {refusal.reason})"
        for each in controllers:
            each.end_watch()
        with ties.slots:
            pairs = [each.host.flip_back() for each in controllers]
            ties.flipped()
    finally:
        for host in claimed:
            host.unclaim()
    events = {
        each.model: each.went_back(now, bad, check, reason, detail)
        for each, (now, bad) in zip(controllers, pairs, strict=True)
    }
    ties.announce(check, reason)
    return events


_NOT_ITS_FAULT = (
    *("frozen", "pinned", "stopping", "superseded", "record", "internal", "group"),
    *("memory", "signature", "latency", "shadow-latency"),  # limits, keys and speed are the server's
)
#: What a start may say of a version for good: the rest depends on the settings and the machine of that start.
_ITS_OWN = ("manifest", "hash", "contract", "load", "finite")


def _is_verdict(refusal: Refused) -> bool:
    """Whether what a start refuses is refused by the version's own fault."""
    return refusal.check in _ITS_OWN and not isinstance(refusal, Unjudged)


def _said(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "the machine has no memory left for it; give it more, or serve fewer models"
    return f"{error}; mend that and start or submit again"


def _sure(candidate: Candidate | None) -> Candidate:
    assert candidate is not None
    return candidate


__all__ = ["Prepared", "SwapController", "Ticket", "commit", "roll_back"]
