"""The guarded swap: how a version comes to be live, and how it stops being live.

    SUBMITTED -> VERIFIED -> SHADOWING -> LIVE -> (RETIRED | ROLLED_BACK)   or REJECTED(check, reason)

One controller a model, one swap at a time.  Everything heavy runs on a thread of low
priority, off the answer path; the flip itself is one reference.  Knows the repository,
the host and the guard; knows no gRPC.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from runtime import engines, guard
from runtime.config import ServerConfig
from runtime.engines import Engine
from runtime.errors import Code, Refused, ServiceError
from runtime.events import TERMINAL, Bus, Event, State
from runtime.host import ModelHost
from runtime.memory import Ledger
from runtime.repository import Repository
from runtime.signing import check_signature
from runtime.slot import Slot
from runtime.tap import Observation
from runtime.tensors import Array, TensorSpec

log = logging.getLogger("roadworthy.swap")
T = TypeVar("T")
GOLDEN_FRAMES = 4  # of those a version brings; more would only make swaps slower


@dataclass
class Golden:
    """What a version answered on its golden frames, kept with its slot as the reference for the next one."""

    labels: dict[str, Array] = field(default_factory=dict)  # hash of the frame -> labels
    looks: dict[str, guard.Look] = field(default_factory=dict)
    cost_ms: float = 0.0  # of one frame on one thread of low priority: comparable between candidates


@dataclass
class Candidate:
    version: int
    engine: Engine
    manifest: dict[str, Any]
    golden: Golden
    frames: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest.get("classes") or ())


class Ticket:
    """The events of one submission, for any number of followers.  Following is reading; leaving stops nothing."""

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
        self._ledger = ledger
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._pending: deque[Ticket] = deque()
        self._current: Ticket | None = None
        self._worker: threading.Thread | None = None
        self._golden: dict[int, Golden] = {}
        self._watch: _Watch | None = None
        self._stopping = False
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
            if self._stopping:
                raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
            if len(self._pending) >= self._config.swap.max_pending:
                message = f"{len(self._pending)} submissions of '{self.model}' wait already; submit again later"
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
        """Forbids flips to other versions.  A rollback to the previous one stays possible: it is the safe direction."""
        with self._lock:
            self._set(frozen=True, frozen_reason=reason, reason=f"frozen: {reason}" if reason else "frozen")

    def unfreeze(self) -> None:
        with self._lock:
            self._set(frozen=False, frozen_reason="", reason="unfrozen")

    def stop(self) -> None:
        """No further swaps; one that is under way is abandoned at its next step."""
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
            watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()

    # -- start ----------------------------------------------------------------------

    def start(self) -> None:
        """Brings up the last live version; the one before it, or the newest that passes, when it is refused.

        Never raises for a bad version: the model is then not ready, and says why.
        """
        state = self._repository.live(self.model) or {}
        wanted = [number for number in (state.get("live"), state.get("previous")) if isinstance(number, int) and number > 0]
        if state.get("unloaded"):
            self.host.reason = "unloaded"
            return
        tried: list[str] = []
        rejected = {entry.get("version") for entry in self._repository.history(self.model) if entry.get("state") in _OUT}
        newest = [number for number in reversed(self._repository.versions(self.model)) if number not in rejected]
        for number in dict.fromkeys(wanted + newest):
            try:
                candidate = self._verify(number, reference=None)
                slot = self._slot(candidate)
            except Refused as refusal:
                tried.append(f"version {number}: {refusal}")
                self._emit(Event(self.model, number, State.REJECTED, refusal.check, refusal.reason, refusal.detail))
                continue
            self.host.flip(slot)
            self._golden[number] = candidate.golden
            if state.get("live") != number:
                self._record(number, None)
                self._emit(Event(self.model, number, State.LIVE, reason="; ".join(tried) or "first version"))
            self._warm_previous(state, number)
            return
        self.host.reason = "; ".join(tried) or "no version in the repository"

    def _warm_previous(self, state: dict[str, Any], live: int) -> None:
        """After a restart the rollback target is loaded again, in the background, if it still passes."""
        number = state.get("previous")
        if not isinstance(number, int) or number in (0, live) or self._config.guard.memory_policy == "resource":
            return

        def warm() -> None:
            try:
                with LowPriority(self._config.engine.nice) as low:
                    candidate = low.call(lambda: self._verify(number, reference=None), self._config.engine.load_timeout)
                slot = self._slot(candidate)
            except Refused as refusal:
                self._note(number, refusal.check, f"not kept warm: {refusal.reason}")
                return
            with self._lock:
                now = self.host.live
                if now is None or now.version != live or self.host.previous is not None or self._stopping:
                    slot.retire()
                    return
                self._golden[number] = candidate.golden
                self.host.keep_warm(slot)

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
                    lambda: self._verify(ticket.version, reference=live), self._config.engine.load_timeout
                )
                verified = time.monotonic()
                detail = {"seconds": round(verified - begun, 4), **candidate.report}
                self._emit(Event(self.model, ticket.version, State.VERIFIED, detail=detail, reason="; ".join(candidate.notes)), ticket)
                shadow: dict[str, Any] = {}
                if live is not None and ticket.shadow:
                    self._emit(Event(self.model, ticket.version, State.SHADOWING), ticket)
                    limit = self._config.shadow.timeout + self._config.engine.load_timeout
                    shadow = low.call(lambda: self._shadow(_sure(candidate)), limit)
            shadowed = time.monotonic()
            slot = self._slot(candidate)
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
            self._emit(Event(self.model, ticket.version, State.LIVE, reason=str(shadow.get("note", "")), detail=detail), ticket)
        except Refused as refusal:
            self._reject(ticket, candidate, slot, refusal)
        except Exception as error:
            log.exception("swap of %s version %s", self.model, ticket.version)
            self._reject(ticket, candidate, slot, Refused("internal", f"{type(error).__name__}: {error}"))

    def _reject(self, ticket: Ticket, candidate: Candidate | None, slot: Slot | None, refusal: Refused) -> None:
        if slot is not None and slot is not self.host.live:
            slot.retire()
        if candidate is not None and (slot is None or slot.engine is not candidate.engine):
            candidate.engine.close()
        event = Event(self.model, ticket.version, State.REJECTED, refusal.check, refusal.reason, refusal.detail)
        self._emit(event, ticket)

    def _may_flip(self, version: int, *, wait: bool) -> None:
        with self._lock:
            if wait and self._frozen:
                self._changed.wait_for(lambda: not self._frozen or self._stopping, self._config.swap.freeze_wait)
            if self._stopping:
                raise Refused("stopping", "the server is shutting down; submit again")
            if self._frozen:
                why = f" ({self._frozen_reason})" if self._frozen_reason else ""
                raise Refused("frozen", f"flips of '{self.model}' are frozen{why}; unfreeze and submit again")
            live = self.host.live
            if self._pinned and live is not None and live.version != version:
                raise Refused("pinned", f"'{self.model}' is pinned to version {live.version}; unpin and submit again")

    # -- VERIFIED -------------------------------------------------------------------

    def _verify(self, version: int, *, reference: Slot | None) -> Candidate:
        """Every check of VERIFIED, in the order of docs/architecture.md.  Raises Refused."""
        manifest, files = self._repository.read(self.model, version)
        check_signature(self._repository.directory(self.model, version), manifest, self._config.security.trusted_keys)
        described = manifest["engine"]
        model = files[described.get("file", "model.onnx")]
        _same_promise(manifest, reference)
        need = self._ledger.reserve(self.host, len(model))
        try:
            kind, precision = str(described.get("kind", "onnxruntime")), str(described.get("precision", "fp32"))
            engine = engines.load(model, kind, precision, self._config.engine, candidate=True)
        finally:
            self._ledger.release(need)
        candidate = Candidate(version, engine, manifest, Golden())
        try:
            _contract(candidate, reference)
            if engine.spec.segmentation:
                expected = self._golden_frames(files, candidate)
                self._look_at_golden(candidate, expected)
                self._compare_golden(candidate, reference)
            else:
                candidate.notes.append(
                    "outputs are not those of the graph contract: golden, collapse and agreement were not checked"
                )
                _run_blind(candidate)
            self._latency(candidate, reference)
        except BaseException:
            engine.close()
            raise
        candidate.report |= {"cost_ms": round(candidate.golden.cost_ms, 3), "golden_frames": len(candidate.frames)}
        return candidate

    def _golden_frames(self, files: dict[str, bytes], candidate: Candidate) -> dict[str, tuple[Array, Array]]:
        """{hash of the frame: (expected labels, expected confidence)}; fills candidate.frames."""
        if "golden.npz" not in files:
            if self._config.guard.require_golden:
                raise Refused("golden", "the version brings no golden.npz to be compared on; build it with export.build")
            candidate.notes.append("no golden.npz: parity was not checked")
            frame = np.random.default_rng(0).integers(0, 256, _concrete(candidate.engine.spec.inputs[0]), np.uint8)
            candidate.frames[_hash(frame)] = frame
            return {}
        try:
            with np.load(io.BytesIO(files["golden.npz"]), allow_pickle=False) as archive:
                frames, labels, confidence = archive["frames"], archive["labels"], archive["confidence"]
        except Exception as error:
            raise Refused("golden", f"golden.npz cannot be read: {error}") from error
        _, height, width, _ = candidate.engine.spec.inputs[0].shape
        fits = frames.dtype == labels.dtype == confidence.dtype == np.uint8 and frames.ndim == 4 and len(frames) > 0
        fits = fits and frames.shape[3] == 3 and labels.shape == confidence.shape == frames.shape[:3]
        if not fits or height not in (-1, frames.shape[1]) or width not in (-1, frames.shape[2]):
            raise Refused("golden", f"golden.npz holds frames {frames.shape} that this engine does not take")
        expected = {}
        for frame, label, sure in list(zip(frames, labels, confidence, strict=True))[:GOLDEN_FRAMES]:
            key = _hash(frame)
            candidate.frames[key] = frame[None]
            expected[key] = (label, sure)
        return expected

    def _look_at_golden(self, candidate: Candidate, expected: dict[str, tuple[Array, Array]]) -> None:
        names = [name for name in ("labels", "confidence", "probabilities") if candidate.engine.spec.output(name)]
        classes = _class_count(candidate.manifest)
        costs: list[float] = []
        agreements: list[float] = []
        differences: list[float] = []
        for key, frame in candidate.frames.items():
            answer, cost = _timed(candidate.engine, {"frame": frame}, names)
            costs.append(cost)
            seen = guard.look(answer["labels"], answer["confidence"], classes)
            if reason := guard.not_finite(seen, answer.get("probabilities")):
                raise Refused("finite", reason)
            if int(answer["labels"].max(initial=0)) >= classes:
                raise Refused("contract", f"label {int(answer['labels'].max())} is beyond the {classes} classes")
            candidate.golden.labels[key] = answer["labels"]
            candidate.golden.looks[key] = seen
            if key in expected:
                label, sure = expected[key]
                agreements.append(float((answer["labels"][0] == label).mean()))
                differences.append(float(np.abs(answer["confidence"][0].astype(np.int16) - sure).mean()))
        if len(costs) == 1:  # the first run of an engine is not typical
            costs.append(_timed(candidate.engine, {"frame": next(iter(candidate.frames.values()))}, names)[1])
        candidate.golden.cost_ms = min(costs)
        if agreements:
            agreement, difference = float(np.mean(agreements)), float(np.mean(differences))
            candidate.report |= {"golden_agreement": round(agreement, 6), "golden_confidence": round(difference, 3)}
            limits = self._config.guard
            if agreement < limits.min_golden_agreement:
                reason = f"labels equal the manifest's on {agreement:.2%} of the golden pixels, the limit is {limits.min_golden_agreement:.2%}"
                raise Refused("golden", reason)
            if difference > limits.max_golden_confidence:
                reason = f"confidence differs from the manifest's by {difference:.1f} of 255 on average, the limit is {limits.max_golden_confidence}"
                raise Refused("golden", reason)

    def _compare_golden(self, candidate: Candidate, reference: Slot | None) -> None:
        seen = _sum(list(candidate.golden.looks.values()))
        other = None
        if reference is not None and reference.engine.spec.segmentation:
            golden = self._reference_golden(reference, candidate)
            other = _sum([golden.looks[key] for key in candidate.frames])
        limits = self._config.guard
        if reason := guard.collapsed(seen, other, limits, candidate.classes, limits.max_vanished):
            raise Refused("collapse", reason)

    def _reference_golden(self, reference: Slot, candidate: Candidate) -> Golden:
        """The live version's answers on the candidate's golden frames; computed where they are not those it came with."""
        golden = self._golden.setdefault(reference.version, Golden())
        classes = _class_count(reference.manifest)
        for key, frame in candidate.frames.items():
            if key not in golden.looks:
                answer = _held(reference, {"frame": frame}, ["labels", "confidence"])
                golden.labels[key] = answer["labels"]
                golden.looks[key] = guard.look(answer["labels"], answer["confidence"], classes)
        return golden

    def _latency(self, candidate: Candidate, reference: Slot | None) -> None:
        known = self._golden.get(reference.version) if reference is not None else None
        if known is None or known.cost_ms <= 0:
            return
        limits = self._config.guard
        limit = limits.max_latency_ratio * known.cost_ms + limits.latency_slack_ms
        if candidate.golden.cost_ms > limit:
            raise Refused(
                "latency",
                f"{candidate.golden.cost_ms:.1f} ms a frame, the live version took {known.cost_ms:.1f} (limit {limit:.1f})",
            )

    # -- SHADOWING ------------------------------------------------------------------

    def _shadow(self, candidate: Candidate) -> dict[str, Any]:
        """Runs a sample of live frames through the candidate.  Raises Refused; returns what it saw."""
        limits, spec = self._config.shadow, candidate.engine.spec
        if not spec.segmentation:
            return {"frames": 0, "note": "not shadowed: outputs are not those of the graph contract"}
        if not limits.enabled:
            return self._golden_decides(candidate, "shadowing is switched off")
        sampler = _Sampler(limit=2)
        self.host.observe(sampler)
        names = [name for name in ("labels", "confidence", "probabilities") if spec.output(name)]
        classes = _class_count(candidate.manifest)
        comparison = guard.Comparison(np.zeros((classes, classes), np.int64))
        seen: list[guard.Look] = []
        theirs: list[guard.Look] = []
        with_confidence = True
        costs: list[float] = []
        begun = time.monotonic()
        try:
            while len(seen) < limits.frames and (left := begun + limits.timeout - time.monotonic()) > 0:
                if self._stopping:
                    raise Refused("stopping", "the server is shutting down; submit again")
                idle = limits.idle_timeout if not seen else max(limits.idle_timeout, 1.0)
                observation = sampler.get(min(left, idle))
                if observation is None:
                    if not seen:
                        break
                    continue
                started = time.monotonic()
                answer, cost = _timed(candidate.engine, {"frame": np.ascontiguousarray(observation.frame[:1])}, names)
                costs.append(cost)
                mine = guard.look(answer["labels"], answer["confidence"], classes)
                if reason := guard.not_finite(mine, answer.get("probabilities")):
                    raise Refused("shadow-finite", f"on live frame {len(seen) + 1}: {reason}")
                sure = observation.confidence
                with_confidence = with_confidence and sure is not None
                seen.append(mine)
                theirs.append(guard.look(observation.labels[:1], sure[:1] if sure is not None else None, classes))
                comparison += guard.compare(observation.labels[:1], answer["labels"], classes)
                # Leave the cores to the answers: rest in proportion to the work.
                self._rest((time.monotonic() - started) * (1.0 / limits.duty - 1.0))
        finally:
            self.host.unobserve(sampler)
        if len(seen) < limits.min_frames:
            why = "no live traffic" if not seen else f"only {len(seen)} live frames in {limits.timeout:.0f} s"
            return self._golden_decides(candidate, why)
        mine, other = _sum(seen), _sum(theirs)
        report = {
            "frames": len(seen),
            "seconds": round(time.monotonic() - begun, 3),
            "agreement": round(comparison.agreement, 4),
            "kappa": round(comparison.kappa, 4),
            "speckle": [round(other.speckle, 4), round(mine.speckle, 4)],
            "confidence": [round(other.mean_confidence, 1), round(mine.mean_confidence, 1)],
            "shares": [[round(float(x), 4) for x in other.shares], [round(float(x), 4) for x in mine.shares]],
            "cost_ms": round(float(np.median(costs)), 3),
        }
        guards = self._config.guard
        if reason := guard.collapsed(mine, other, guards, candidate.classes, limits.max_vanished):
            raise Refused("shadow-collapse", reason, report)
        if reason := guard.disagrees(comparison, mine, other, limits, confidence=with_confidence):
            raise Refused("shadow-agreement", reason, report)
        live = self.host.live
        known = self._golden.get(live.version) if live is not None else None
        if known is not None and known.cost_ms > 0:
            limit = limits.max_latency_ratio * known.cost_ms + guards.latency_slack_ms
            if report["cost_ms"] > limit:
                reason = f"{report['cost_ms']:.1f} ms a live frame, the live version took {known.cost_ms:.1f} (limit {limit:.1f})"
                raise Refused("shadow-latency", reason, report)
        return report

    def _golden_decides(self, candidate: Candidate, why: str) -> dict[str, Any]:
        """The same judgement on the golden frames, which are of the source domain."""
        note = f"{why}: decided by the golden frames alone"
        live = self.host.live
        if live is None or not live.engine.spec.segmentation:
            return {"frames": 0, "note": note}
        golden = self._reference_golden(live, candidate)
        classes = _class_count(candidate.manifest)
        comparison = guard.Comparison(np.zeros((classes, classes), np.int64))
        for key in candidate.frames:
            comparison += guard.compare(golden.labels[key], candidate.golden.labels[key], classes)
        mine = _sum([candidate.golden.looks[key] for key in candidate.frames])
        other = _sum([golden.looks[key] for key in candidate.frames])
        report = {
            "frames": 0,
            "note": note,
            "agreement": round(comparison.agreement, 4),
            "kappa": round(comparison.kappa, 4),
        }
        if reason := guard.disagrees(comparison, mine, other, self._config.shadow):
            raise Refused("shadow-agreement", f"on the golden frames ({why}): {reason}", report)
        return report

    def _rest(self, seconds: float) -> None:
        with self._lock:
            self._changed.wait_for(lambda: self._stopping, max(0.0, seconds))

    # -- LIVE -----------------------------------------------------------------------

    def _slot(self, candidate: Candidate) -> Slot:
        """The candidate with the live thread budget, run once.  On a thread of normal priority."""
        try:
            engine = candidate.engine.promoted()
            if engine is candidate.engine:
                return Slot(candidate.version, engine, candidate.manifest)
            try:
                if candidate.frames and engine.spec.segmentation:
                    key, frame = next(iter(candidate.frames.items()))
                    answer = engine.run({"frame": frame}, ["labels", "confidence"])
                    same = float((answer["labels"] == candidate.golden.labels[key]).mean())
                    if same < 0.999:
                        raise Refused("golden", f"with all threads the engine gives other labels on {1 - same:.2%} of the pixels")
                budget = self._config.guard.latency_budget_ms
                if budget > 0 and candidate.frames:
                    took = _wall(engine, {"frame": next(iter(candidate.frames.values()))}, ["labels", "confidence"])
                    if took > budget:
                        raise Refused("latency", f"{took:.1f} ms a frame, the budget is {budget:.1f}")
            except BaseException:
                engine.close()
                raise
        except Refused:
            raise
        except Exception as error:
            raise Refused("load", f"the engine cannot be loaded with all threads: {error}") from error
        candidate.engine.close()
        return Slot(candidate.version, engine, candidate.manifest)

    def _flip(self, version: int, slot: Slot, candidate: Candidate) -> float:
        """Durable first, then visible: a kill between the two restarts with the new version, which has passed."""
        self._may_flip(version, wait=self._config.swap.freeze_wait > 0)
        with self._lock:
            if self._frozen or self._stopping:  # between the wait and the lock
                raise Refused("frozen", f"flips of '{self.model}' are frozen; unfreeze and submit again")
            live = self.host.live
            self._record(version, live.version if live is not None else None)
            before = _Baseline.of(live, self._watch)
            if self._watch is not None:
                self._watch.stop()
            self._golden[version] = candidate.golden
            begun = time.perf_counter()
            displaced = self.host.flip(slot)
            flip_ms = (time.perf_counter() - begun) * 1e3
            if displaced is not None:
                self._emit(Event(self.model, displaced.version, State.RETIRED, reason="two versions behind"))
            self._golden = {s.version: self._golden.get(s.version, Golden()) for s in self.host.loaded()}
            self._watch = None
            if self._config.watch.seconds > 0 and live is not None:
                self._watch = _Watch(self, slot, before)
                self._watch.start()
        return round(flip_ms, 4)

    def _roll_back(self, check: str, reason: str, detail: dict[str, Any]) -> Event:
        previous = self.host.previous
        if previous is None:
            self.host.flip_back()  # raises with the right words
        assert previous is not None
        self._record(previous.version, None)
        if self._watch is not None and threading.current_thread() is not self._watch:
            self._watch.stop()
        self._watch = None
        now, bad = self.host.flip_back()
        event = Event(self.model, bad.version, State.ROLLED_BACK, check, reason, {**detail, "live": now.version})
        self._emit(event)
        self._emit(Event(self.model, now.version, State.LIVE, reason=f"rolled back from version {bad.version}"))
        return event

    def roll_back_watched(self, slot: Slot, check: str, reason: str, detail: dict[str, Any]) -> None:
        """What the watch window calls.  A pinned version stays, and says so."""
        with self._lock:
            if self.host.live is not slot or self._stopping:
                return
            if self._pinned:
                self._note(slot.version, check, f"would have been rolled back but is pinned: {reason}")
            elif self.host.previous is None:
                self._note(slot.version, check, f"would have been rolled back but nothing is kept warm: {reason}")
            else:
                try:
                    self._roll_back(check, reason, detail)
                except OSError as error:
                    # Better a record that lags than a bad version that answers.
                    now, bad = self.host.flip_back()
                    self._emit(Event(self.model, bad.version, State.ROLLED_BACK, check, f"{reason} (not recorded: {error})", {"live": now.version}))

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
        state |= {"live": live.version if live else state.get("live"), "previous": previous.version if previous else state.get("previous")}
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
        log.info("%s version %s %s %s %s", event.model, event.version, event.state.value, event.check, event.reason)
        self._bus.publish(event)
        if ticket is not None:
            ticket.put(event)


_OUT = (State.REJECTED.value, State.ROLLED_BACK.value)


class LowPriority:
    """A thread of low priority that runs one task after the other.

    An unprivileged thread can lower its priority but never raise it again, so there is a new
    one for each swap.  One that hangs is left behind: it cannot be killed, and it is a daemon.
    """

    def __init__(self, nice: int) -> None:
        self._nice = nice
        self._task: Callable[[], None] | None = None
        self._wake = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="candidate", daemon=True)

    def __enter__(self) -> LowPriority:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._task = None
        self._wake.release()

    def call(self, function: Callable[[], T], timeout: float) -> T:
        """Runs `function` there.  Raises what it raises, or Refused("load", …) after `timeout` seconds."""
        done = threading.Event()
        result: list[T] = []
        errors: list[BaseException] = []

        def task() -> None:
            try:
                result.append(function())
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        self._task = task
        self._wake.release()
        if not done.wait(timeout):
            raise Refused("load", f"the candidate did not finish within {timeout:.0f} s (engine.load_timeout)")
        if errors:
            raise errors[0]
        return result[0]

    def _run(self) -> None:
        thread = threading.get_native_id()
        nice = max(self._nice, os.getpriority(os.PRIO_PROCESS, thread))
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        while True:
            self._wake.acquire()
            task, self._task = self._task, None
            if task is None:
                return
            task()


class _Sampler:
    """Takes what it has room for and never waits: the shadow's view of the live frames."""

    def __init__(self, limit: int) -> None:
        self._queue: deque[Observation] = deque()
        self._limit = limit
        self._changed = threading.Condition()

    def __call__(self, observation: Observation) -> None:
        if len(self._queue) < self._limit:
            with self._changed:
                self._queue.append(observation)
                self._changed.notify()

    def get(self, timeout: float) -> Observation | None:
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue), timeout)
            return self._queue.popleft() if self._queue else None


@dataclass(frozen=True)
class _Baseline:
    """How the version before the flip behaved."""

    run_ms: float
    confidence: float  # 0 = not known

    @classmethod
    def of(cls, slot: Slot | None, watch: _Watch | None) -> _Baseline:
        runs = list(slot.run_ms) if slot is not None else []
        confidence = watch.confidence if watch is not None and watch.slot is slot else 0.0
        return cls(float(np.median(runs)) if len(runs) >= 5 else 0.0, confidence)


class _Watch(threading.Thread):
    """The watch window: looks at a few answers a second and rolls back on what it sees."""

    def __init__(self, controller: SwapController, slot: Slot, before: _Baseline) -> None:
        super().__init__(name=f"watch-{controller.model}", daemon=True)
        self.slot = slot
        self.confidence = 0.0
        self._controller = controller
        self._before = before
        self._sampler = _Sampler(limit=1)
        self._ended = threading.Event()

    def stop(self) -> None:
        self._ended.set()

    def run(self) -> None:
        host = self._controller.host
        host.observe(self._sampler)
        try:
            self._watch()
        except Exception:
            log.exception("watch window of %s version %s", host.name, self.slot.version)
        finally:
            host.unobserve(self._sampler)

    def _watch(self) -> None:
        config = self._controller._config
        limits, classes = config.watch, _class_count(self.slot.manifest)
        statistics = self._controller.host.statistics_of(self.slot.version)
        start = statistics.snapshot()
        until = time.monotonic() + limits.seconds
        looked = bad = 0
        worst = ""
        sums: list[float] = []
        while not self._ended.is_set() and time.monotonic() < until:
            observation = self._sampler.get(0.25)
            if observation is not None and observation.version == self.slot.version:
                seen = guard.look(observation.labels, observation.confidence, classes)
                looked += 1
                reason = guard.not_finite(seen, None) or guard.collapsed(seen, None, config.guard, self.slot.classes, 0.0)
                if reason is not None and not self._previous_no_better(observation, classes):
                    bad += 1
                    worst = reason
                if observation.confidence is not None:
                    sums.append(seen.mean_confidence)
                    self.confidence = float(np.mean(sums[-50:]))
            verdict = self._verdict(start, statistics.snapshot(), looked, bad, worst, len(sums))
            if verdict is not None:
                detail = {"looked_at": looked, "bad": bad}
                self._controller.roll_back_watched(self.slot, *verdict, detail)
                return
            self._ended.wait(1.0 / limits.max_fps)

    def _previous_no_better(self, observation: Observation, classes: int) -> bool:
        """A covered camera gives one class with any version; rolling back would not help."""
        previous = self._controller.host.previous
        if previous is None:
            return False
        try:
            answer = _held(previous, {"frame": observation.frame}, ["labels", "confidence"])
        except Exception:
            return False
        seen = guard.look(answer["labels"], answer["confidence"], classes)
        limits = self._controller._config.guard
        return bool(guard.not_finite(seen, None) or guard.collapsed(seen, None, limits, self.slot.classes, 0.0))

    def _verdict(
        self, start: Any, now: Any, looked: int, bad: int, worst: str, with_confidence: int
    ) -> tuple[str, str] | None:
        limits, before = self._controller._config.watch, self._before
        failed = self.slot.failures
        total = failed + now.success - start.success
        if failed >= limits.min_frames and failed > limits.max_error_share * total:
            return "watch-errors", f"the engine failed {failed} of {total} requests"
        if looked >= limits.min_frames and bad > limits.max_bad_share * looked:
            return "watch-collapse", f"{bad} of {looked} answers: {worst}"
        runs = list(self.slot.run_ms)
        if before.run_ms > 0 and len(runs) >= max(20, limits.min_frames):
            limit = limits.max_latency_ratio * before.run_ms + self._controller._config.guard.latency_slack_ms
            if (median := float(np.median(runs))) > limit:
                return "watch-latency", f"{median:.1f} ms a run, {before.run_ms:.1f} before the flip (limit {limit:.1f})"
        if before.confidence > 0 and with_confidence >= limits.min_frames:
            least = limits.min_confidence * before.confidence
            if self.confidence < least:
                return "watch-confidence", f"mean confidence {self.confidence:.0f} of 255, {before.confidence:.0f} before the flip"
        return None


# -- helpers ------------------------------------------------------------------------


def _same_promise(manifest: dict[str, Any], reference: Slot | None) -> None:
    """What the manifest says must equal what the live one's says: clients depend on it."""
    if reference is None:
        return
    for key in ("task", "classes"):
        if (manifest.get(key) or None) != (reference.manifest.get(key) or None):
            raise Refused("contract", f"{key} {manifest.get(key)!r}, the live version has {reference.manifest.get(key)!r}"[:400])


def _contract(candidate: Candidate, reference: Slot | None) -> None:
    """The engine's tensors against the manifest and against the live engine's."""
    spec, manifest = candidate.engine.spec, candidate.manifest
    task = manifest.get("task")
    if task == "segmentation" and not spec.segmentation:
        raise Refused("contract", "the tensors are not those of a segmentation graph: frame uint8 [N,H,W,3] -> labels, confidence uint8 [N,H,W]")
    if spec.segmentation:
        classes = _class_count(manifest)
        if classes == 0:
            raise Refused("contract", "the manifest of a segmentation engine names no classes")
        _, height, width, _ = spec.inputs[0].shape
        size = manifest.get("input") or {}
        for name, want, got in (("height", size.get("height"), height), ("width", size.get("width"), width)):
            if want is not None and got not in (-1, want):
                raise Refused("contract", f"the engine takes {name} {got}, the manifest says {want}")
        probabilities = spec.output("probabilities")
        if probabilities is not None and len(probabilities.shape) == 4 and probabilities.shape[1] not in (-1, classes):
            raise Refused("contract", f"the engine has {probabilities.shape[1]} classes, the manifest names {classes}")
    if reference is None:
        return
    live = reference.engine.spec
    for name, mine, theirs in (("inputs", spec.inputs, live.inputs), ("outputs", spec.outputs, live.outputs)):
        if (got := _described(mine)) != (want := _described(theirs)):
            raise Refused("contract", f"{name} {', '.join(got)}; the live version has {', '.join(want)}")


def _described(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return sorted(f"{t.name} {t.datatype} {list(t.shape)}" for t in tensors)


def _run_blind(candidate: Candidate) -> None:
    """A foreign network on numbers that mean nothing: it must run, and not turn them into NaN."""
    spec = candidate.engine.spec
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = _concrete(tensor)
        if tensor.datatype in ("FP16", "FP32", "FP64"):
            from runtime.tensors import DTYPES

            inputs[tensor.name] = rng.random(shape).astype(DTYPES[tensor.datatype])
        elif tensor.datatype == "BYTES":
            inputs[tensor.name] = np.full(shape, "", dtype=np.object_)
        else:
            from runtime.tensors import DTYPES

            inputs[tensor.name] = np.zeros(shape, DTYPES[tensor.datatype])
    names = [tensor.name for tensor in spec.outputs]
    costs = []
    for _ in range(2):
        answer, cost = _timed(candidate.engine, inputs, names)
        costs.append(cost)
    for name, value in answer.items():
        if value.dtype.kind == "f" and not bool(np.isfinite(value).all()):
            raise Refused("finite", f"output '{name}' is NaN or infinite for finite inputs")
    candidate.golden.cost_ms = min(costs)


def _timed(engine: Engine, inputs: dict[str, Array], names: list[str]) -> tuple[dict[str, Array], float]:
    """(outputs, ms).  CPU time of the one thread where the engine computes on it: wall time on a busy
    machine at low priority says nothing about the engine."""
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        answer = engine.run(inputs, names)
    except Exception as error:
        raise Refused("load", f"the engine loads but does not run: {' '.join(str(error).split())[:300]}") from error
    spent = time.thread_time() - cpu if engine.spec.device == "cpu" else time.perf_counter() - wall
    return answer, spent * 1e3


def _wall(engine: Engine, inputs: dict[str, Array], names: list[str]) -> float:
    """Best of three, ms."""
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        engine.run(inputs, names)
        best = min(best, (time.perf_counter() - begun) * 1e3)
    return best


def _held(slot: Slot, inputs: dict[str, Array], names: list[str]) -> dict[str, Array]:
    if not slot.hold():
        raise Refused("superseded", f"version {slot.version} stopped being live during the checks; submit again")
    try:
        return slot.engine.run(inputs, names)
    finally:
        slot.release()


def _concrete(tensor: TensorSpec) -> tuple[int, ...]:
    """A shape with the free dimensions filled: 1 for the batch, 64 for the sides of a frame."""
    frame = tensor.datatype == "UINT8" and len(tensor.shape) == 4
    return tuple(size if size >= 0 else (64 if frame and axis in (1, 2) else 1) for axis, size in enumerate(tensor.shape))


def _class_count(manifest: dict[str, Any]) -> int:
    return len(manifest.get("classes") or ())


def _hash(frame: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()


def _sum(looks: list[guard.Look]) -> guard.Look:
    total = looks[0]
    for other in looks[1:]:
        total = total + other
    return total


def _sure(candidate: Candidate | None) -> Candidate:
    assert candidate is not None
    return candidate
