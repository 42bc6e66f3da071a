"""The guarded swap: how a version comes to be live, and how it stops being live.

    SUBMITTED -> VERIFIED -> SHADOWING -> LIVE -> (RETIRED | ROLLED_BACK)   or REJECTED(check, reason)

One controller a model, one swap at a time.  Everything heavy runs on a thread of low
priority, off the answer path; the flip itself is one reference.  Knows the repository,
the host and the guard; knows no gRPC.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from runtime.config import ServerConfig
from runtime.errors import Code, Refused, ServiceError
from runtime.events import TERMINAL, Bus, Event, State
from runtime.host import ModelHost
from runtime.memory import Ledger
from runtime.priority import LowPriority
from runtime.repository import Repository
from runtime.shadow import Shadow
from runtime.slot import Slot
from runtime.verify import Candidate, Golden, Verifier
from runtime.watch import Baseline, Watch

log = logging.getLogger("roadworthy.swap")


class Ticket:
    """The events of one submission, for any number of followers.  Following is reading; leaving stops
    nothing.
    """

    def __init__(self, model: str, version: int, shadow: bool) -> None:
        self.model = model
        self.version = version
        self.shadow = shadow
        self._events: list[Event] = []
        self._changed = threading.Condition()

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def follow(self, alive: Callable[[], bool] = lambda: True) -> Iterator[Event]:
        """Every event from the first on, until LIVE or REJECTED (or until `alive()` is False)."""
        index = 0
        while alive():
            with self._changed:
                if not self._changed.wait_for(lambda: len(self._events) > index, 0.5):  # noqa: B023
                    continue
                event = self._events[index]
            index += 1
            yield event
            if event.state in TERMINAL:
                return

    def result(self) -> Event:
        """Waits for the last event."""
        *_, last = self.follow()
        return last

    @property
    def state(self) -> str:
        with self._changed:
            return self._events[-1].state.value if self._events else ""


class SwapController:
    def __init__(
        self, host: ModelHost, repository: Repository, config: ServerConfig, bus: Bus, ledger: Ledger
    ) -> None:
        self.host = host
        self.model = host.name
        self._repository = repository
        self._config = config
        self._bus = bus
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._pending: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._worker: threading.Thread | None = None
        self._verifier = Verifier(host, repository, config, ledger)
        self._stop = threading.Event()
        self._shadow = Shadow(self._verifier, config, self._stop)
        self._watch: Watch | None = None
        state = repository.live(self.model) or {}
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
        """Back to the warm previous version, by one reference.  Raises ServiceError."""
        with self._lock:
            if self._pinned:
                message = f"'{self.model}' is pinned; unpin it first"
                raise ServiceError(Code.FAILED_PRECONDITION, message, "state")
            return self._roll_back("", reason, {})

    def pin(self, version: int) -> None:
        """Fixes the live version (0 or its number).  Raises ServiceError for any other: promote it first."""
        with self._lock:
            live = self.host.live
            if live is None or version not in (0, live.version):
                now = "nothing is" if live is None else f"version {live.version} is"
                message = f"version {version} of '{self.model}' is not live ({now}); promote it, then pin"
                raise ServiceError(Code.FAILED_PRECONDITION, message, "state")
            self._set(pinned=True, reason="pinned")

    def unpin(self) -> None:
        with self._lock:
            self._set(pinned=False, reason="unpinned")

    def freeze(self, reason: str) -> None:
        """Forbids flips to other versions.  A rollback to the previous one stays possible: it is the safe
        direction.
        """
        with self._lock:
            self._set(frozen=True, frozen_reason=reason, reason=f"frozen: {reason}" if reason else "frozen")

    def unfreeze(self) -> None:
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

    def start(self) -> None:
        """Brings up the last live version; the one before it, or the newest that passes, when it is refused.

        Never raises for a bad version: the model is then not ready, and says why.
        """
        recorded = self._repository.live(self.model)
        state = self._repository.last_live(self.model) if recorded is None else recorded
        wanted = [
            number
            for number in (state.get("live"), state.get("previous"))
            if isinstance(number, int) and number > 0
        ]
        if state.get("unloaded"):
            self.host.reason = "unloaded"
            return
        tried: list[str] = []
        rejected = {
            entry.get("version")
            for entry in self._repository.history(self.model)
            if entry.get("state") in _OUT
        }
        newest = [
            number for number in reversed(self._repository.versions(self.model)) if number not in rejected
        ]
        for number in dict.fromkeys(wanted + newest):
            try:
                candidate, slot = self._bring_up(number)
            except Refused as refusal:
                tried.append(f"version {number}: {refusal}")
                self._emit(
                    Event(self.model, number, State.REJECTED, refusal.check, refusal.reason, refusal.detail)
                )
                continue
            self.host.flip(slot)
            candidate.reservation.release()
            self._verifier.goldens[number] = candidate.golden
            if recorded is None or state.get("live") != number:
                first = "live.json was lost; from the history" if state else "first version"
                previous = state.get("previous") if state.get("live") == number else None
                try:
                    self._record(number, previous)
                except Refused as refusal:  # a medium that cannot be written can still be served
                    log.warning("%s version %s is live but not recorded: %s", self.model, number, refusal)
                self._emit(Event(self.model, number, State.LIVE, reason="; ".join(tried) or first))
            self._warm_previous(state, number)
            return
        self.host.reason = "; ".join(tried) or "no version in the repository"

    def _bring_up(self, number: int) -> tuple[Candidate, Slot]:
        """A version of the repository with every check that needs no live version.  Raises Refused."""
        candidate = self._verifier.verify(number, reference=None)
        try:
            return candidate, self._verifier.slot(candidate)
        except BaseException:
            candidate.close()
            raise

    def _warm_previous(self, state: dict[str, Any], live: int) -> None:
        """After a restart the rollback target is loaded again, in the background, if it still passes."""
        number = state.get("previous")
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
                self._note(number, refusal.check, f"not kept warm: {refusal.reason}")
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

    def _swap(self, ticket: Ticket) -> None:
        begun = time.monotonic()
        candidate: Candidate | None = None
        slot: Slot | None = None
        try:
            self._emit(Event(self.model, ticket.version, State.SUBMITTED), ticket)
            live = self.host.live
            if live is not None and live.version == ticket.version:
                self._emit(Event(self.model, ticket.version, State.LIVE, reason="is live already"), ticket)
                return
            self._may_flip(ticket.version, wait=self._config.swap.freeze_wait > 0)
            with LowPriority(self._config.engine.nice) as low:
                candidate = low.call(
                    lambda: self._verifier.verify(ticket.version, reference=live),
                    self._config.engine.load_timeout,
                )
                verified = time.monotonic()
                detail = {"seconds": round(verified - begun, 4), **candidate.report}
                self._emit(
                    Event(
                        self.model,
                        ticket.version,
                        State.VERIFIED,
                        detail=detail,
                        reason="; ".join(candidate.notes),
                    ),
                    ticket,
                )
                shadow: dict[str, Any] = {}
                if live is not None and ticket.shadow:
                    self._emit(Event(self.model, ticket.version, State.SHADOWING), ticket)
                    limit = self._config.shadow.timeout + self._config.engine.load_timeout
                    shadow = low.call(lambda: self._shadow.run(_sure(candidate)), limit)
            shadowed = time.monotonic()
            slot = self._verifier.slot(candidate)
            flip_ms = self._flip(ticket.version, slot, candidate)
            now = time.monotonic()
            detail = {
                "flip_ms": flip_ms,
                "seconds": round(now - begun, 4),
                "verify_seconds": round(verified - begun, 4),
                "shadow_seconds": round(shadowed - verified, 4),
                "promote_seconds": round(now - shadowed, 4),
                "previous": live.version if live is not None else 0,
            }
            if ticket.shadow and live is not None:
                detail["shadow"] = shadow
            self._emit(
                Event(
                    self.model, ticket.version, State.LIVE, reason=str(shadow.get("note", "")), detail=detail
                ),
                ticket,
            )
        except Refused as refusal:
            self._reject(ticket, candidate, slot, refusal)
        except Exception as error:
            log.exception("swap of %s version %s", self.model, ticket.version)
            self._reject(ticket, candidate, slot, Refused("internal", f"{type(error).__name__}: {error}"))

    def _reject(
        self, ticket: Ticket, candidate: Candidate | None, slot: Slot | None, refusal: Refused
    ) -> None:
        if slot is not None and slot is not self.host.live:
            slot.retire()
        if candidate is not None:
            candidate.close()
        event = Event(
            self.model, ticket.version, State.REJECTED, refusal.check, refusal.reason, refusal.detail
        )
        self._emit(event, ticket)

    def _may_flip(self, version: int, *, wait: bool) -> None:
        with self._lock:
            if wait and self._frozen:
                self._changed.wait_for(
                    lambda: not self._frozen or self._stop.is_set(), self._config.swap.freeze_wait
                )
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

    # -- LIVE -----------------------------------------------------------------------

    def _flip(self, version: int, slot: Slot, candidate: Candidate) -> float:
        """Durable first, then visible: a kill between the two restarts with the new version, which has
        passed.
        """
        self._may_flip(version, wait=self._config.swap.freeze_wait > 0)
        with self._lock:
            if self._frozen or self._stop.is_set():  # between the wait and the lock
                raise Refused("frozen", f"flips of '{self.model}' are frozen; unfreeze and submit again")
            live = self.host.live
            self._record(version, live.version if live is not None else None)
            before = Baseline.of(live, self._watch)
            if self._watch is not None:
                self._watch.stop()
            self._verifier.goldens[version] = candidate.golden
            begun = time.perf_counter()
            displaced = self.host.flip(slot)
            candidate.reservation.release()  # counted by its slot from here on
            flip_ms = (time.perf_counter() - begun) * 1e3
            if displaced is not None:
                self._emit(Event(self.model, displaced.version, State.RETIRED, reason="two versions behind"))
            self._verifier.goldens = {
                s.version: self._verifier.goldens.get(s.version, Golden()) for s in self.host.loaded()
            }
            self._watch = None
            if self._config.watch.seconds > 0 and live is not None:
                self._watch = Watch(self.host, slot, before, self._config, self.roll_back_watched)
                self._watch.start()
        return round(flip_ms, 4)

    def _roll_back(self, check: str, reason: str, detail: dict[str, Any]) -> Event:
        previous = self.host.previous
        if previous is None:
            self.host.flip_back()  # raises with the right words
        assert previous is not None
        try:
            self._record(previous.version, None)
        except Refused as refusal:
            # A full disk: better a record that lags than a bad version that answers.
            reason = f"{reason} (not recorded: {refusal.reason})"
        if self._watch is not None and threading.current_thread() is not self._watch:
            self._watch.stop()
        self._watch = None
        now, bad = self.host.flip_back()
        detail = {**detail, "live": now.version}
        event = Event(self.model, bad.version, State.ROLLED_BACK, check, reason, detail)
        self._emit(event)
        self._emit(
            Event(self.model, now.version, State.LIVE, reason=f"rolled back from version {bad.version}")
        )
        return event

    def roll_back_watched(self, slot: Slot, check: str, reason: str, detail: dict[str, Any]) -> None:
        """What the watch window calls.  A pinned version stays, and says so."""
        with self._lock:
            if self.host.live is not slot or self._stop.is_set():
                return
            if self._pinned:
                self._note(slot.version, check, f"would have been rolled back but is pinned: {reason}")
            elif self.host.previous is None:
                self._note(
                    slot.version, check, f"would have been rolled back but nothing is kept warm: {reason}"
                )
            else:
                self._roll_back(check, reason, detail)

    # -- records --------------------------------------------------------------------

    def unload(self) -> None:
        """Stops serving the model until it is loaded again."""
        with self._lock:
            if self._watch is not None:
                self._watch.stop()
                self._watch = None
            self.host.unload("unloaded")
            state = self._repository.live(self.model) or {}
            self._write({**state, "unloaded": True})

    def reload(self) -> None:
        """Serves the model again after `unload`, with the version that was live."""
        with self._lock:
            state = self._repository.live(self.model) or {}
            self._write({key: value for key, value in state.items() if key != "unloaded"})
        self.start()

    def newest(self) -> int | None:
        """The highest version that has been neither rejected nor rolled back."""
        out = {e.get("version") for e in self._repository.history(self.model) if e.get("state") in _OUT}
        return max((n for n in self._repository.versions(self.model) if n not in out), default=None)

    def _record(self, live: int, previous: int | None) -> None:
        self._write(
            {
                "live": live,
                "previous": previous,
                "pinned": self._pinned,
                "frozen": self._frozen,
                "frozen_reason": self._frozen_reason,
                "time": time.time(),
            }
        )

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self._repository.set_live(self.model, state)
        except OSError as error:
            raise Refused("record", f"live.json cannot be written: {error.strerror or error}") from error

    def _set(self, *, reason: str, **changes: Any) -> None:
        for key, value in changes.items():
            setattr(self, f"_{key}", value)
        live, previous = self.host.live, self.host.previous
        state = self._repository.live(self.model) or {}
        state |= {
            "live": live.version if live else state.get("live"),
            "previous": previous.version if previous else state.get("previous"),
        }
        state |= {"pinned": self._pinned, "frozen": self._frozen, "frozen_reason": self._frozen_reason}
        try:
            self._write(state)
        except Refused as refusal:
            raise ServiceError(Code.INTERNAL, str(refusal), "record") from refusal
        self._note(live.version if live else 0, "", reason)
        self._changed.notify_all()

    def _note(self, version: int, check: str, reason: str) -> None:
        self._emit(Event(self.model, version, State.NOTE, check, reason))

    def _emit(self, event: Event, ticket: Ticket | None = None) -> None:
        try:
            self._repository.append_history(self.model, event.line())
        except OSError as error:  # a full disk must not stop a rollback
            log.error("history of %s: %s", self.model, error)
        log.info(
            "%s version %s %s %s %s", event.model, event.version, event.state.value, event.check, event.reason
        )
        self._bus.publish(event)
        if ticket is not None:
            ticket.put(event)


_OUT = (State.REJECTED.value, State.ROLLED_BACK.value)


def _sure(candidate: Candidate | None) -> Candidate:
    assert candidate is not None
    return candidate
