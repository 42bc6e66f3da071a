"""The on-device loop: collect → decide → round → build → submit → report, as long as the vehicle lives.

    collect   frames of a source pass the rules into the frame store
    respond   the road changed (`adapt.loop.domain_response`): back to the version that knows this one, or
              new batch statistics at once, from a dozen frames, through the round, build and swap below
    decide    enough new frames, drift, a schedule or a command; the vehicle allows it and the budget lasts
    round     `adapt.round`, in pieces: paused when the vehicle drives off or the budget is spent, resumed to
              the same result; between the pieces the server's latency decides about pauses
    build     `export.build`;   submit   the guarded swap of the server (with the edges: as a frame group)

Killed at any moment it continues where it was when it is started again: every step writes down what it is
about to do, each step can be repeated, and the server keeps answering with what it has in any case.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from adapt.data.base import resize_frame
from adapt.files import read_json, write_json
from adapt.frames.selection import Rules
from adapt.frames.store import FrameStore, StoredFrame, StoreError, confidence_summary
from adapt.loop.budget import Budget, EnergyMeter, Meter
from adapt.loop.domain_memory import RoadConfig
from adapt.loop.domain_response import RESPONSES, Responder, refresh_config
from adapt.loop.process_priority import Starvation, gpu_background
from adapt.loop.server_channel import Command, Silent
from adapt.loop.throttle import Throttle
from adapt.loop.vehicle import Conditions, Vehicle
from adapt.loop.waiting import Waiting
from adapt.loop.waiting import words as waiting_words
from adapt.round import RoundConfig, RoundError, RoundPaused, RoundResult, adapt
from adapt.sources import Captured, Source, SourceError
from adapt.sources.live import LiveSource

__all__ = ["EdgeMember", "Loop", "LoopConfig", "LoopError", "Paused", "build_version"]

TRIGGERS = ("frames", "drift", "schedule", "command")
STUCK = 3  # sessions without a step forward after which a budget is said to be too small
LOOK = 2.0  # seconds between two looks at vehicle, budget and memory during a round
DRIFT_POLL = 5.0


class LoopError(Exception):
    """The loop cannot go on.  One line: thing, reason, remedy."""


class Paused(Exception):
    """With `once`: the round waits for the vehicle or for a new budget; the same command again goes on with
    it.
    """


class _Cancelled(RoundPaused):
    """By command."""


@dataclass(frozen=True)
class EdgeMember:
    """A pack of edges that follows the segmentation's rounds: adapted on the same frames, submitted with it.

    pack: a joint pack as `adapt.round.edges` takes it.  model: its name in the repository.  group: the frame
    group.
    """

    pack: Any
    model: str
    group: str
    config: Any = None


@dataclass(frozen=True)
class LoopConfig:
    """What the loop is told.

    frames: how many new frames make a round.  max_fps: sampling rate asked from the tap.  source: only frames
    of this camera ("" = all).  mix: a round may take frames of several cameras.  wait: seconds without a
    frame after which the loop gives up, 0 = never.  max_bytes: bound of the frame store.  near: hash distance
    of near-duplicates (of `rules`, where those are given).  key: file that seals the store's pictures.
    patience: seconds without a new view after which a round begins with what there is, if that is `enough`
    frames, 0 = never.
    on: what begins a round, of TRIGGERS.  every: seconds between rounds on schedule.  rest: seconds at least
    between two rounds.  conditions: what the vehicle must say.  budget: what may be spent.  gpu_fraction: of
    CUDA memory.
    swap_timeout: seconds a submitted version may take to be decided.  retry: seconds after a round that
    failed.
    respond: to a change of road, of RESPONSES: not at all; by going back to the version that knows the road;
    or, where none does, by new batch statistics as well.  road: when it counts as another one.
    refresh_driving: batch statistics may be refreshed whatever the vehicle says (the budget still holds).
    keep_versions: engine versions that rounds made and that stay in the repository, 0 = all; what is live,
    the one before, pinned or released stays in any case.
    """

    model: str
    frames: int = 60
    max_fps: float = 5.0
    source: str = ""
    mix: bool = False
    wait: float = 0.0
    max_bytes: int = 2_000_000_000
    near: int = 4
    rules: Rules | None = None
    key: Path | None = None
    patience: float = 0.0
    enough: int = 8
    on: tuple[str, ...] = ("frames", "command")
    every: float = 86_400.0
    rest: float = 0.0
    conditions: Conditions = field(default_factory=Conditions)
    budget: Budget = field(default_factory=Budget)
    gpu_fraction: float | None = None
    swap_timeout: float = 600.0
    retry: float = 60.0
    respond: str = "off"
    road: RoadConfig = field(default_factory=RoadConfig)
    refresh_driving: bool = False
    keep_versions: int = 0
    round: RoundConfig = field(default_factory=RoundConfig)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.on) - set(TRIGGERS))
        if unknown or not self.on:
            raise LoopError(f"rounds on {', '.join(unknown) or 'nothing'}: choose of {', '.join(TRIGGERS)}")
        if self.respond not in RESPONSES:
            raise LoopError(f"respond {self.respond!r}: choose one of {', '.join(RESPONSES)}")
        if self.keep_versions < 0:
            raise LoopError(f"keep_versions {self.keep_versions}: a number of versions, 0 = all")
        if self.frames < 1 or self.every <= 0 or self.rest < 0:
            raise LoopError("frames is 1 or more, every above 0, rest 0 or more")


class Loop:
    """The loop's steps; `client` is a `runtime.client.Client` or anything with its `frames` and `submit`.

    Args:
        build: (pack, repository, model, adaptation, gate) -> version; by default `export.build.build`.
        source: where frames come from; the tap of the live service where it is not given.
        imports: paths given with --from, in whose place `sources` are read (see `feed`).
        remote: the line to the server (`adapt.loop.server_channel`), or nothing.
        vehicle: says whether the vehicle can spare anything.
        throttle: called after each piece of work.
        once: raise Paused instead of waiting longer than the budget can last.
        quiet: do not say now and then what is waited for.

    Raises:
        LoopError: another adapter works in `workdir`, or it belongs to another pack.
    """

    def __init__(
        self,
        client: Any,
        pack: Any,
        repository: Path,
        workdir: Path,
        config: LoopConfig,
        *,
        progress: Callable[..., None],
        build: Callable[..., int] | None = None,
        say: Callable[[str], None] | None = None,
        source: Source | None = None,
        imports: Callable[[dict[str, int]], Sequence[tuple[str, Any]]] | None = None,
        remote: Silent | None = None,
        vehicle: Vehicle | None = None,
        throttle: Throttle | None = None,
        edges: EdgeMember | None = None,
        energy: EnergyMeter | None = None,
        once: bool = False,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.client, self.pack, self.repository, self.workdir = client, pack, repository, workdir
        self.config, self.bars, self.edges, self.is_once = config, progress, edges, once
        self.build = build or build_version
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.remote = remote or Silent()
        self.vehicle, self.throttle, self.clock, self.sleep = vehicle, throttle, clock, sleep
        workdir.mkdir(parents=True, exist_ok=True)
        self._lock = _only_one(workdir)
        self.rules = config.rules or Rules(near=config.near)
        try:
            self.state = self._read()
            self.meter = Meter(config.budget, workdir / "budget.json", energy=energy)
            self.store = self._open_store()
        except BaseException:
            os.close(self._lock)
            raise
        self.source = source or LiveSource(
            client, config.model, max_fps=config.max_fps, source=config.source, wait=config.wait
        )
        self.imports = imports
        self.waiting = None if quiet else Waiting(self.say, clock)
        self.collecting = bool(self.state.get("collecting", True))
        self.trigger = ""
        self.seen = self.lost = 0
        self.refused: dict[str, int] = {}
        self._asked = ""
        self._looked = self._told = self._drift_at = -float("inf")
        self._drifting: dict[str, float] = {}  # source -> since when (seconds since the epoch)
        self._fresh = clock()
        self._phase = self._stage = ""
        self._new: list[StoredFrame] = []
        self._rows_at: float | None = None  # when they were read; None = to be read
        self.responder = self._open_responder()
        self.starvation = Starvation()

    # -------------------------------------------------------------------------------------------- state
    def _read(self) -> dict[str, Any]:
        file = self.workdir / "loop.json"
        fresh = {
            "schema": 1,
            "pack": self.pack.sha256,
            "round": 1,
            "phase": "collect",
            "used_up_to": 0,
            "used": {},
        }
        try:
            state = read_json(file)
            _check_state(state)
        except FileNotFoundError:
            return fresh
        except (ValueError, KeyError, OSError) as error:
            raise LoopError(f"{file} is damaged ({_line(error)}): move it away to start afresh") from error
        if state.get("pack") != self.pack.sha256:
            raise LoopError(
                f"{self.workdir} belongs to pack {state.get('pack', '')[:12]}, not {self.pack.sha256[:12]}: "
                "give another --workdir"
            )
        return dict(state)

    def keep(self, **more: Any) -> None:
        self.state = {**self.state, **more}
        write_json(self.workdir / "loop.json", self.state)

    def _go(self, phase: str, **more: Any) -> None:
        self.keep(phase=phase, since=datetime.now(UTC).isoformat(timespec="seconds"), **more)

    @property
    def folder(self) -> Path:
        return self.workdir / f"round-{self.state['round']:04d}"

    def close(self) -> None:
        """Let go of the source, the store and the folder."""
        self.source.close()
        self.store.close()
        os.close(self._lock)

    # -------------------------------------------------------------------------------------------- the road
    def _open_responder(self) -> Responder | None:
        if self.config.respond == "off" or self.imports is not None:
            return None
        try:
            return Responder(self)
        except ValueError as error:
            self.say(f"no response to a change of road: {error}")
            return None

    @property
    def _refreshing(self) -> bool:
        return bool(self.state.get("kind") == "refresh")

    # -------------------------------------------------------------------------------------------- store
    def _open_store(self) -> FrameStore:
        path = self.workdir / "frames"

        def opened() -> FrameStore:
            return FrameStore(path, max_bytes=self.config.max_bytes, rules=self.rules, key=self.config.key)

        try:
            return opened()
        except StoreError as error:
            cause = error.__cause__
            damaged = isinstance(
                cause,
                sqlite3.DatabaseError
                | ValueError
                | TypeError
                | LookupError
                | AttributeError
                | RecursionError,
            )
            if not damaged or isinstance(cause, sqlite3.OperationalError):  # a full disk, a wrong key
                raise
            # A damaged index must not end adaptation for good: what there was is set aside, not deleted.
            aside = path.with_name(f"frames.damaged-{int(time.time())}-{os.getpid()}")
            os.replace(path, aside)
            self.say(f"{error}; it was moved to {aside.name}, an empty one is begun")
            return opened()

    def _keep_frame(self, captured: Captured) -> bool:
        """Into the store, if the rules let it; True where it was kept."""
        classes = len(self.pack.spec.classes)
        self.seen += 1
        self.lost = max(self.lost, captured.dropped)
        summary: dict[str, Any] = {}
        if captured.labels is not None and captured.confidence is not None:
            summary = confidence_summary(captured.labels, captured.confidence, classes)
        try:
            kept = self.store.add(
                captured.frame, source=captured.source[:200], model=captured.model, version=captured.version,
                summary=summary, at=captured.time, place=captured.place, collect=captured.collect,
            )  # fmt: skip
        except StoreError as error:
            self._refuse("store")
            if self.refused["store"] % 100 == 1:
                self.say(str(error))
            self._mend_store()
            return False
        except ValueError as error:
            self._refuse("unreadable")
            if self.refused["unreadable"] == 1:
                self.say(f"a frame of {captured.source!r} is left out: {error}")
            return False
        self._rows_at = None if kept.id is not None else self._rows_at
        if kept.id is None:
            self._refuse(kept.rule or "rules")
        elif self.responder is not None:
            self.responder.see(captured)
        return kept.id is not None

    def _mend_store(self) -> None:
        """Open it again, or an empty one where it was removed or is damaged; a full disk is waited for."""
        self._rows_at = None
        with contextlib.suppress(StoreError):
            fresh = self._open_store()
            self.store.close()
            self.store = fresh

    def _refuse(self, rule: str) -> None:
        self.refused[rule] = self.refused.get(rule, 0) + 1

    # -------------------------------------------------------------------------------------------- steps
    def once(self) -> dict[str, Any]:
        """One round from wherever the state is; gives the report (also written to round-NNNN/loop.json).

        Raises Paused (with `once`), LoopError, and what a round raises; without `once` a round that fails is
        reported as FAILED and the loop goes on with new frames.
        """
        if self.state["phase"] == "collect":
            self._collect()
        try:
            return self._from_round()
        except (
            RoundError, StoreError, RuntimeError, ValueError, FloatingPointError, MemoryError, OSError,
        ) as error:  # fmt: skip
            if self.is_once:
                raise
            self.say(f"round {self.state['round']} failed: {_line(error)}")
            report = self._end("FAILED", None, reason=_line(error))
            self._wait(self.config.retry)
            return report

    def _from_round(self) -> dict[str, Any]:
        result = self._round()
        if isinstance(result, str):
            state, _, reason = result.partition(": ")
            return self._end(state, None, reason=reason)
        if not result.accepted or result.pack is None:
            return self._end("REFUSED", result, reason=self._why(result))
        if self.state["phase"] == "round":
            edges = self._edges_round(result)
            if isinstance(edges, str):
                state, _, reason = edges.partition(": ")
                return self._end(state, None, reason=reason)
            started = time.monotonic()
            self.report("build")
            version = self._build(result.pack, self.config.model, _adaptation(result), result.report["gate"])
            members = {self.config.model: version}
            if edges is not None and self.edges is not None:
                report = {"kind": "edges", "with": result.report["round"]}
                gate = edges.report["gate"]
                members[self.edges.model] = self._build(edges.pack, self.edges.model, report, gate)
            spent = round(time.monotonic() - started, 2)
            self._go("submit", version=version, members=members, build_seconds=spent)
        return self._submit(result)

    # -------------------------------------------------------------------------------------------- collecting
    def _collect(self) -> None:
        """Until a round is to begin: its frames are chosen and written down."""
        self._fresh = self.clock()
        self._import()
        if self.waiting is not None:
            self.waiting.begin()
        while True:
            waits = ""
            kind = "refresh"
            trigger, rows = self.responder.due() if self.responder is not None else ("", [])
            if trigger:
                break
            kind = "train"
            trigger, rows = self._decide()
            if trigger:
                waits = self.forbidden()
                if not waits:
                    break
                self.report("waiting", note=waits, budget={"paused": waits})
                if self.is_once and self.meter.exceeded():
                    raise Paused(waits)
            self._say_waiting(len(rows), waits)
            self._pump(0.2)
            if self.source.finished and not trigger:
                found = f"the sources are at their end with {len(rows)} frames kept"
                raise LoopError(f"{found}, {self._wanted()} are wanted: give more, or a smaller --frames")
        self.trigger = trigger
        self.bars("collect", len(rows), len(rows))
        self._go("round", frames=[row.id for row in rows], trigger=trigger, kind=kind, marker="", stuck=0)
        self._asked = ""

    def _say_waiting(self, kept: int, held: str) -> None:
        if self.waiting is None or self.source.finished:
            return
        refused = {rule: count for rule, count in self.refused.items() if count}
        reason = getattr(self.source, "reason", "")
        if not self.collecting:
            reason = "collection is switched off"
        self.waiting(
            waiting_words(
                self.config.model, seen=self.seen, kept=kept, wanted=self._wanted(), refused=refused,
                starts=self.config.on, held=held, reason=reason,
            )
        )  # fmt: skip

    def _wanted(self) -> int:
        return self.config.enough if self.config.patience or self._asked else self.config.frames

    def _pump(self, timeout: float) -> None:
        """Take what the source has, for so many seconds at most; hear commands; report."""
        self._hear(running=False)
        if self.source.finished:
            self.sleep(timeout)
            return
        try:
            captured = self.source.get(timeout)
        except SourceError as error:
            raise LoopError(str(error)) from error
        if captured is not None and not self.collecting:
            self._refuse("switched-off")
        elif captured is not None and self._keep_frame(captured):
            self._fresh = self.clock()
            rows = self.unused()
            self.bars("collect", min(len(rows), self.config.frames), self.config.frames, dropped=self.lost)
        self.report("collect")

    def _import(self) -> None:
        """Everything of the files given with --from, once; a kill in between costs no frame twice."""
        if self.imports is None:
            return
        done: dict[str, int] = dict(self.state.get("imported", {}))
        for name, source in self.imports(done):
            try:
                while (captured := source.get(0.0)) is not None:
                    self._keep_frame(captured)
                    if source.read % 16 == 0:  # fewer than the store compares with: none comes twice
                        done[name] = source.read
                        self.keep(imported=done)
                        self.bars(f"read {Path(name).name}", source.read, source.read)
                    self._hear(running=False)
            finally:
                source.close()
            done[name] = source.read
            self.keep(imported=done)
        self.imports = None

    def unused(self) -> list[StoredFrame]:
        """Frames no round has used, oldest first; read again when one was kept, and every few seconds."""
        now = self.clock()
        if self._rows_at is None or now - self._rows_at > LOOK:
            used = self.state.get("used") or {}
            base = 0 if "used" in self.state else self.state["used_up_to"]
            try:
                rows = self.store.rows(source=self.config.source or None)
            except StoreError as error:
                self.say(str(error))
                self._mend_store()
                rows = []
            self._new = [row for row in rows if row.id > used.get(row.source, base)]
            self._rows_at = now
        if self.responder is None:
            return self._new
        return [row for row in self._new if not self.responder.is_past(row)]

    def _candidates(self) -> list[list[StoredFrame]]:
        """New frames, by camera unless cameras may mix; most frames first."""
        rows = self.unused()
        if self.config.mix:
            return [rows]
        by: dict[str, list[StoredFrame]] = {}
        for row in rows:
            by.setdefault(row.source, []).append(row)
        return sorted(by.values(), key=len, reverse=True) or [[]]

    def _decide(self) -> tuple[str, list[StoredFrame]]:
        """(what begins a round now, its frames); ("", the most there are) where nothing does."""
        config = self.config
        groups = self._candidates()
        most = groups[0]
        if time.time() - float(self.state.get("finished", 0.0)) < config.rest and not self._asked:
            ended = float(self.state.get("finished", 0.0))
            if ended <= time.time():  # a clock that jumped back does not add to the rest
                return "", most
        if self._asked and len(most) >= config.enough:
            return f"command: {self._asked}", most[-config.frames :]
        if "drift" in config.on:
            self._ask_drift()
            for source, since in self._drifting.items():
                rows = [
                    r for g in groups for r in g if (r.source == source or config.mix) and r.time >= since
                ]
                if len(rows) >= min(config.frames, max(config.enough, 4)) and (
                    len(rows) >= config.frames or self._stale()
                ):
                    return "drift", rows[-config.frames :]
        if "frames" in config.on:
            if len(most) >= config.frames:
                return "frames", most[-config.frames :]
            if (
                (self._stale() or self.source.finished)
                and len(most) >= config.enough
                and (config.patience or self.source.finished)
            ):
                return "frames", most
        if "schedule" in config.on and len(most) >= config.enough:
            began = float(self.state.get("finished", 0.0))
            if not began:  # the first one after the first `every`
                self.keep(finished=time.time())
            elif time.time() - began >= config.every:
                return "schedule", most[-config.frames :]
        return "", most

    def _stale(self) -> bool:
        return bool(self.config.patience) and self.clock() - self._fresh > self.config.patience

    def _ask_drift(self) -> None:
        now = self.clock()
        if now - self._drift_at < DRIFT_POLL:
            return
        self._drift_at = now
        try:
            said = self.client.drift(self.config.model)
        except Exception:  # the server is away; it says so when it is back
            return
        self._drifting = {
            str(s["source"]): float(s["since"])
            for s in said.get("sources", ())
            if s.get("state") == "drifting"
        }

    # -------------------------------------------------------------------------------------------- permission
    def forbidden(self, *, refresh: bool = False) -> str:
        """Why no work may be done now; "" where it may."""
        if refresh and self.config.refresh_driving:
            return self.meter.exceeded()
        return self.config.conditions.refuses(self.vehicle) or self.meter.exceeded()

    def _piece(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """What a round tells after each piece of work; may end it with RoundPaused."""
        self.bars(stage, done, total, **numbers)
        if "loss" in numbers:
            self.meter.step()
        self._hear(running=True)
        now = self.clock()
        if now - self._looked >= LOOK or "loss" in numbers:
            self._looked = now
            why = self.forbidden(refresh=self._refreshing) or self.meter.memory_exceeded()
            if why and done < total:
                raise RoundPaused(why)
        if warning := self.starvation():
            self.say(f"round {self.state['round']}, {stage} {done} of {total}: {warning}")
        self.report("round", stage=stage, done=done, total=total, numbers=numbers, note=warning)
        if self.throttle is not None:
            self.meter.rested(self.throttle())

    def _hear(self, *, running: bool) -> None:
        if self.remote.replaced and self.remote.replaced != self.state.get("replaced_said"):
            self.say(self.remote.replaced)
            self.state["replaced_said"] = self.remote.replaced
        for command in self.remote.poll():
            self._obey(command, running)

    def _obey(self, command: Command, running: bool) -> None:
        if command.kind == "set_collection":
            self.collecting = bool(command.values.get("on", False))
            self.keep(collecting=self.collecting)
            self.remote.answer(command, True)
            self.report(self._phase or "collect", force=True)
        elif command.kind == "start_round":
            most = max((len(rows) for rows in self._candidates()), default=0)
            if running or self.state["phase"] != "collect":
                self.remote.answer(command, False, f"round {self.state['round']} is under way")
            elif "command" not in self.config.on:
                self.remote.answer(command, False, "this adapter begins no round on command (--on)")
            elif most < self.config.enough:
                few = f"{most} new frames of one camera, {self.config.enough} are needed"
                self.remote.answer(command, False, few)
            else:
                self._asked = str(command.values.get("reason", "")) or "no reason given"
                waits = self.forbidden(refresh=self._refreshing)
                self.remote.answer(command, True, f"it waits: {waits}" if waits else "")
        elif command.kind == "cancel_round":
            if self.state["phase"] != "round":
                self.remote.answer(command, False, f"no round is running (phase {self.state['phase']})")
            else:
                self.remote.answer(command, True)
                self.keep(cancelled=True)
                raise _Cancelled("cancelled by command")
        else:
            self.remote.answer(command, False, f"this adapter does not know {command.kind!r}")

    # -------------------------------------------------------------------------------------------- the round
    def left(self, *, readable: bool = False) -> list[StoredFrame]:
        """Of the round's frames those that are there; with `readable` those whose pictures can be read."""
        ids = set(self.state["frames"])
        rows = [row for row in self.store.rows() if row.id in ids]
        return [row for row in rows if self._is_readable(row)] if readable else rows

    def _rows(self, *, readable: bool = False) -> list[StoredFrame]:
        """`left`; where they are not all of them, the round begins anew with these."""
        rows = self.left(readable=readable)
        if len(rows) < len(self.state["frames"]):
            # The frames were evicted, deleted or damaged; the round that used them cannot be repeated.
            if (self.folder / "state.json").is_file():
                os.replace(self.folder, self.folder.with_name(f"{self.folder.name}.lost-{int(time.time())}"))
            self._go("round", frames=[row.id for row in rows])
        return rows

    def _is_readable(self, row: StoredFrame) -> bool:
        try:
            self.store.read(row)
        except StoreError:
            return False
        return True

    def _round(self) -> RoundResult | str:
        """The round's result, after as many sessions as it takes; or "CANCELLED: …", "FAILED: …"."""
        with contextlib.suppress(StoreError):
            # Frames went: the round may have come to its end before they did.
            lost = len(self.left()) < len(self.state["frames"])
            if lost and (done := _finished(self.folder)) is not None:
                return done
        config = refresh_config(self.config.round) if self._refreshing else self.config.round
        made: RoundResult | str = self._sessions(
            f"round {self.state['round']}", self.folder, self._rows,
            lambda rows: adapt(
                self.pack, self.store.frames(rows), config=config, out=self.folder, progress=self._piece
            ),
        )  # fmt: skip
        return made

    def _sessions(
        self, name: str, folder: Path, found: Callable[..., list[StoredFrame]],
        work: Callable[[list[StoredFrame]], Any],
    ) -> Any:  # fmt: skip
        """What `work` gives, after as many sessions as it takes; or "CANCELLED: …", "FAILED: …".

        found: the frames to work on, with `readable` those that can be read.
        """
        while True:
            if self.state.get("cancelled"):
                return "CANCELLED: by command"
            waits = ""
            try:
                self._allowed()
                rows = found()
                self.store.pinned = {row.id for row in rows}
                self.say(f"{name}: {len(rows)} frames, {folder}")
                self.meter.start()
                self._looked = self.clock()
                if self.throttle is not None:
                    self.throttle.begin()
                with gpu_background(self.config.gpu_fraction):
                    return work(rows)
            except _Cancelled:
                continue
            except RoundPaused as pause:
                waits = str(pause)
            except StoreError as error:  # a picture was removed while the round read it
                self._mend_store()
                found = partial(found, readable=True)  # a damaged one stays damaged
                if len(found()) < 4:
                    return f"FAILED: {error}"
            finally:
                self.store.pinned = ()
                self.meter.stop()
            if waits:
                self.say(f"{name} paused: {waits}")
                if self._is_stuck(waits, folder):
                    return f"FAILED: {waits}, {STUCK} times at the same place; raise that limit, or ask less"

    def _is_stuck(self, why: str, folder: Path) -> bool:
        """A budget under what the next piece takes would pause for ever."""
        marker = ""
        if why.startswith(("budget", "memory")):
            parts = [folder / "checkpoint.pt", *sorted(folder.glob("checkpoint.pt.labels/*.npz"))]
            steps = [p.stat().st_mtime_ns for p in parts if p.is_file()]
            try:
                stages = sorted(read_json(folder / "state.json")["stages"])
            except (OSError, ValueError, KeyError, TypeError):
                stages = []
            marker = json.dumps([folder.name, stages, steps[:1], len(steps)])
        same = bool(marker) and marker == self.state.get("marker")
        self.keep(marker=marker, stuck=self.state.get("stuck", 0) + 1 if same else 0)
        return bool(self.state["stuck"] >= STUCK - 1)

    def _allowed(self) -> None:
        """Wait until the vehicle and the budget allow work, with an ear for commands; no frame is taken."""
        while waits := self.forbidden(refresh=self._refreshing):
            self.report("paused", note=waits, budget={"paused": waits})
            if self.is_once and self.meter.exceeded():
                raise Paused(f"round {self.state['round']}: {waits}")
            self._hear_while(1.0)
        self.report("round", force=True)

    def _hear_while(self, seconds: float) -> None:
        """Wait, with an ear for commands."""
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            self._hear(running=True)
            self.sleep(min(left, 0.25))

    def _wait(self, seconds: float) -> None:
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            self._hear(running=False)
            self.sleep(min(left, 0.25))

    def _edges_round(self, result: RoundResult) -> Any:
        """The edges on the same frames, in sessions as the round's: the result; None where none may go live;
        or "CANCELLED: …".
        """
        if self.edges is None or self._refreshing:  # a refresh is of the segmentation alone
            return None
        from adapt.data.base import DataError
        from adapt.round.edges import EdgeRoundError, adapt_edges

        member = self.edges
        # One network under both heads: its edges are adapted on the encoder that was.
        pack: Any = result.pack if member.pack.sha256 == self.pack.sha256 else member.pack
        said, made = "", None
        try:
            made = self._sessions(
                f"edges of round {self.state['round']}", self.folder / "edges", self.left,
                lambda rows: adapt_edges(
                    pack, [resize_frame(frame, pack.spec.size) for frame in self.store.frames(rows)],
                    config=member.config, out=self.folder / "edges", progress=self._piece,
                ),
            )  # fmt: skip
        except EdgeRoundError as error:
            said = f"declined: {error}"
        except (DataError, RuntimeError, ValueError, MemoryError, OSError) as error:
            said = f"failed: {_line(error)}"
        if isinstance(made, str):
            if made.startswith("CANCELLED"):
                return made
            said = f"failed: {made.partition(': ')[2]}"
        elif made is not None and (not made.accepted or made.pack is None):
            failed = [f"{c['name']}: {c['reason']}" for c in made.report["gate"]["checks"] if not c["passed"]]
            said = f"refused by their gate: {'; '.join(failed)}"
        self.keep(edges=said or "accepted")
        if said:
            self.say(f"edges {said}; the segmentation goes on alone")
            return None
        return made

    def _build(self, pack: Any, model: str, adaptation: dict[str, Any], gate: dict[str, Any]) -> int:
        """A version for this pack: an earlier one, if the loop was killed after publishing it."""
        from runtime.repository.repository import Repository

        repository = Repository(self.repository)
        for version in sorted(_versions(repository, model), reverse=True):
            try:
                manifest = repository.manifest(model, version)
            except Exception:  # a damaged version is none of ours
                continue
            if manifest.get("pack", {}).get("sha256") == pack.sha256:
                return int(version)
        self.bars("build", 0, 1)
        version = self.build(pack, self.repository, model, adaptation, gate)
        self.bars("build", 1, 1)
        return version

    def _submit(self, result: RoundResult) -> dict[str, Any]:
        version = int(self.state["version"])
        members = {str(k): int(v) for k, v in self.state.get("members", {}).items()}
        started = time.monotonic()
        events: list[dict[str, Any]] = []
        state, reason = "UNKNOWN", "the server ended the stream without a decision"
        self.report("submit", force=True)
        while state == "UNKNOWN" and time.monotonic() < started + self.config.swap_timeout:
            decided = self._decided(version)
            if decided is not None:
                state, reason = decided
                break
            if self.edges is not None and len(members) > 1:
                said, decision, words = self.follow(
                    partial(self.client.submit_group, self.edges.group, members)
                )
            else:
                said, decision, words = self.follow(partial(self.client.submit, self.config.model, version))
            events, reason = events + said, words
            if decision != "UNKNOWN":
                state = decision
                break
            self.say(f"submit: {words}; trying again")  # the server comes back, or the time runs out
            self.sleep(1.0)
            self._hear(running=True)
        return self._end(
            state, result, reason=reason, version=version, members=members, events=events,
            swap_seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip

    def follow(self, submit: Callable[[], Any]) -> tuple[list[dict[str, Any]], str, str]:
        """(events, "LIVE", "REJECTED" or "UNKNOWN", why) of one submission, said as they come."""
        import grpc

        from runtime.client import Rejected

        events: list[dict[str, Any]] = []
        try:
            for event in submit():
                events.append({k: getattr(event, k) for k in ("time", "state", "check", "reason")})
                words = " ".join(part for part in (event.check, event.reason) if part)
                self.say(f"version {getattr(event, 'version', '')}: {event.state} {words}".rstrip())
                ours = getattr(event, "model", self.config.model) == self.config.model
                if event.state == "REJECTED" or (event.state == "LIVE" and ours):
                    return events, event.state, words
        except Rejected as error:
            return events, "UNKNOWN" if error.code == "UNAVAILABLE" else "REJECTED", error.reason
        except grpc.RpcError as error:  # the server went away
            return events, "UNKNOWN", _details(error)
        return events, "UNKNOWN", "the server ended the stream without a decision"

    def _decided(self, version: int) -> tuple[str, str] | None:
        """What became of a version that was submitted before the loop was killed."""
        from runtime.repository.repository import Repository

        repository = Repository(self.repository)
        live = repository.live(self.config.model) or {}
        if live.get("live") == version:
            return "LIVE", "was live already"
        for line in reversed(list(repository.history(self.config.model))):
            if line.get("version") == version and line.get("state") in ("REJECTED", "ROLLED_BACK"):
                return "REJECTED", f"{line.get('check', '')} {line.get('reason', '')}".strip()
        return None

    @staticmethod
    def _why(result: RoundResult) -> str:
        failed = [c for c in result.report["gate"]["checks"] if not c["passed"]]
        return "; ".join(f"{c['name']}: {c['reason']}" for c in failed) or "refused"

    def _prune(self, number: int) -> None:
        """Of rounds before the last two only the records stay: what decided, report, pictures.  The weights
        are in the engine version, and labels can be made again from the frames.
        """
        for folder in self.workdir.glob("round-*"):
            digits = folder.name.partition("-")[2].partition(".")[0]
            if not digits.isdigit() or int(digits) >= number - 1:
                continue
            for part in (
                *folder.glob("**/labels-*"),
                *folder.glob("**/pack"),
                *folder.glob("**/*.pt.labels"),
            ):
                shutil.rmtree(part, ignore_errors=True)
            for part in (*folder.glob("**/*.pt"), *folder.glob("**/state.json")):
                part.unlink(missing_ok=True)

    def _retire(self, models: Collection[str]) -> None:
        """Have the server delete old versions; it knows which of them are still wanted."""
        if not self.config.keep_versions:
            return
        for model in models:
            try:
                gone = self.client.prune(model, self.config.keep_versions)["deleted"]
            except Exception as error:  # an older server, one without the right, or away: the next round asks
                self.say(f"old versions of {model} stay: {_details(error)}")
                return
            if gone and self.responder is not None and model == self.config.model:
                for version in gone:
                    self.responder.response.forget(version)

    def _html(self) -> None:
        """The report for people; a round does not fail because its report could not be written."""
        from adapt.report.round import write

        try:
            self.say(f"report of round {self.state['round']}: {write(self.folder)}")
        except Exception as error:
            self.say(f"no report of round {self.state['round']}: {type(error).__name__}: {error}")

    def _end(self, state: str, result: RoundResult | None, **more: Any) -> dict[str, Any]:
        number = self.state["round"]
        report = {
            "model": self.config.model,
            "round": number,
            "state": state,
            "trigger": self.state.get("trigger", ""),
            "kind": self.state.get("kind", "train"),
            "parent": self.pack.sha256,
            "pack": str(result.pack.path) if result and result.pack else "",
            "frames": len(self.state["frames"]),
            "build_seconds": self.state.get("build_seconds", 0.0),
            "spent": self.meter.spent(),
            **({"edges": self.state["edges"]} if "edges" in self.state else {}),
            **more,
            "adaptation": result.report if result else {},
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "loop.json", report)
        if result:
            self._html()
        self._prune(number)
        if state == "CANCELLED":  # what it held of the frames is of no use to anybody
            for part in (*self.folder.glob("**/labels-*"), *self.folder.glob("**/*.pt.labels")):
                shutil.rmtree(part, ignore_errors=True)
            for part in self.folder.glob("**/checkpoint.pt"):
                part.unlink(missing_ok=True)
        refreshing = self._refreshing
        if state == "LIVE":
            self._retire(more.get("members") or {self.config.model: 0})
        if self.responder is not None:
            self.responder.learn(state, result, int(more.get("version", 0)), refreshing)
        used = dict(self.state.get("used") or {})
        # What refreshed the statistics is still news to the round that follows.
        ids = set() if refreshing else set(self.state["frames"])
        with contextlib.suppress(StoreError):  # a store that is gone holds no frame to use twice
            for row in self.store.rows():
                if row.id in ids:
                    used[row.source] = max(used.get(row.source, 0), row.id)
        lasting = {"schema", "pack", "imported", "collecting", "road_since", "answers"}
        if refreshing:  # rest and schedule count from rounds of training
            lasting |= {"finished"}
        kept = {k: v for k, v in self.state.items() if k in lasting}
        self.state = {
            "finished": 0.0 if refreshing else time.time(), **kept, "round": number + 1, "used": used,
            "last": state, "used_up_to": max(ids, default=int(self.state.get("used_up_to", 0))),
        }  # fmt: skip
        self._rows_at = None
        self._go("collect")
        self.remote.report(
            last={
                "round": number, "state": state, "reason": str(more.get("reason", ""))[:500],
                "version": int(more.get("version", 0)), "finished": time.time(),
            }
        )  # fmt: skip
        self.report("collect", force=True)
        return report

    # -------------------------------------------------------------------------------------------- reporting
    def report(
        self, phase: str, *, stage: str = "", done: int = 0, total: int = 0,
        numbers: dict[str, float] | None = None, note: str = "", budget: dict[str, Any] | None = None,
        force: bool = False,
    ) -> None:  # fmt: skip
        now = self.clock()
        changed = (phase, stage) != (self._phase, self._stage)
        if not (force or changed) and now - self._told < 1.0:
            return
        self._told, self._phase, self._stage = now, phase, stage
        limit = self.config.budget
        spent = self.meter.spent()
        parts: dict[str, Any] = {
            "phase": phase,
            "note": note,
            "collection": {
                "on": self.collecting, "seen": self.seen, "limit_bytes": self.config.max_bytes,
                "refused": dict(self.refused), "dropped": self.lost + sum(self.refused.values()),
                **self._held(),
            },
            "budget": {
                "seconds": spent["seconds"], "seconds_limit": limit.seconds or 0.0, "paused": "",
                "memory_bytes": int(spent["memory"]), "memory_limit_bytes": limit.memory or 0,
                "joules": spent.get("joules", 0.0), "joules_limit": limit.joules or 0.0, **(budget or {}),
            },
        }  # fmt: skip
        if phase == "collect":
            parts["progress"] = min(1.0, len(self.unused()) / self.config.frames)
        if stage:
            parts["round"] = {
                "round": self.state["round"], "stage": stage, "step": done, "of": total,
                "trigger": str(self.state.get("trigger", "")), "progress": done / total if total else 0.0,
            }  # fmt: skip
            if numbers and "loss" in numbers:
                parts["round"]["loss"] = float(numbers["loss"])
            parts["progress"] = done / total if total else 0.0
            parts.update(self._health())
        self.remote.report(**parts)

    def _held(self) -> dict[str, int]:
        try:
            return {"kept": len(self.store), "bytes": self.store.bytes()}
        except sqlite3.Error:  # damaged, or closed while its disk is full: the next frame mends it or says so
            return {}

    def _health(self) -> dict[str, Any]:
        """Of the latest labelling, from what the round has written down."""
        if isinstance(self.remote, Silent) and type(self.remote) is Silent:
            return {}
        try:
            stages = read_json(self.folder / "state.json")["stages"]
            latest = stages[max(key for key in stages if key.startswith("label-"))]
            names = self.pack.spec.classes
            return {
                "pseudo_labels": {
                    "round": self.state["round"], "frames": len(self.state["frames"]),
                    "labelled": latest["labelled"],
                    "classes": [
                        {
                            "name": name, "predicted": latest["predicted_share"][c],
                            "labelled": latest["share"][c], "threshold": latest["lambda"][c],
                        }
                        for c, name in enumerate(names)
                    ],
                }
            }  # fmt: skip
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return {}


def _check_state(state: Any) -> None:
    """Raise ValueError unless `loop.json` holds what the loop writes: its numbers name folders and frames."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63

    if not isinstance(state, dict) or not whole(state["round"]) or state["round"] > 1_000_000_000:
        raise ValueError("not a state")
    if state["phase"] not in ("collect", "round", "submit"):
        raise ValueError("it names no phase of the loop")
    for key in ("used_up_to", "version", "stuck"):
        if not whole(state.get(key, 0)):
            raise ValueError(f"{key} is no number that the loop writes")
    if not isinstance(state.get("pack", ""), str):
        raise ValueError("pack is no text")
    needed = {"collect": (), "round": ("frames",), "submit": ("frames", "version")}[state["phase"]]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"it lacks {missing[0]}")
    if "used" not in state and "used_up_to" not in state:
        raise ValueError("it lacks used")
    for key in ("answers", "going"):
        value = state.get(key)
        if value is not None and (not isinstance(value, int) or not -(1 << 31) <= value < 1 << 63):
            raise ValueError(f"{key} is no version")
    for key in ("used", "imported", "members", "road_since"):
        table = state.get(key) or {}
        if not isinstance(table, dict) or not all(map(whole, table.values())):
            raise ValueError(f"{key} is no table of numbers")
    frames = state.get("frames", [])
    if not isinstance(frames, list) or not all(map(whole, frames)):
        raise ValueError("frames is no list of numbers")
    finished = state.get("finished", 0.0)
    if not isinstance(finished, int | float) or not math.isfinite(finished):
        raise ValueError("finished is no time")


def _finished(folder: Path) -> RoundResult | None:
    """The round in a folder, where it came to its end."""
    from networks.pack.pack import PackError, load_pack

    try:
        report = read_json(folder / "state.json")["report"]
        made = load_pack(folder / "pack") if report["accepted"] else None
        return RoundResult(made, bool(report["accepted"]), report)
    except (OSError, ValueError, KeyError, TypeError, PackError):
        return None


def _only_one(workdir: Path) -> int:
    handle = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        remedy = "end that one, or give another --workdir"
        raise LoopError(f"{workdir} is in use by another adapter: {remedy}") from error
    return handle


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:500]


def _details(error: Any) -> str:
    code = error.code().name if hasattr(error, "code") and error.code() else type(error).__name__
    return f"{code}: {error.details() if hasattr(error, 'details') else error}"


def _versions(repository: Any, model: str) -> list[int]:
    return list(repository.versions(model)) if model in repository.models() else []


def _adaptation(result: RoundResult) -> dict[str, Any]:
    """What the engine's manifest says of the round."""
    report = result.report
    keys = ("round", "chosen", "source_free", "frames", "config", "stages", "distance", "torch", "threads")
    return {
        **{key: report[key] for key in keys if key in report},
        "measures": {k: report[f"{k}_measures"] for k in ("parent", "reference", "candidate")},
    }


def build_version(
    pack: Any, repository: Path, model: str, adaptation: dict[str, Any], gate: dict[str, Any]
) -> int:
    """`export.build.build`, and the number of the version it made.

    The version has the task and the edge thresholds of the model's newest one: a joint pack may be served as
    its edges alone.  Raises RoundError where it cannot be built: that ends the round, not the loop.
    """
    from export.build import Options, build
    from export.errors import ExportError
    from runtime.repository.repository import Repository

    told: dict[str, Any] = {}
    served = Repository(repository)
    for number in sorted(_versions(served, model), reverse=True):
        with contextlib.suppress(Exception):  # a damaged version tells nothing
            manifest = served.manifest(model, number)
            told = {"task": manifest["task"], "edge_thresholds": manifest.get("edge_thresholds")}
            break
    try:
        options = Options(**told)
        return int(
            build(pack, repository, model=model, adaptation=adaptation, gate=gate, options=options).version
        )
    except ExportError as error:
        raise RoundError(str(error)) from error
