"""Runs a round in sessions: paused if work is not permitted, and continued to the same result.

Knows neither what a round computes nor what becomes of its result.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from adapt.frames.store import StoredFrame, StoreError
from adapt.loop.commands import Commands, RoundCancelled
from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.errors import Paused
from adapt.loop.frame_pool import FramePool
from adapt.loop.outcome import Decision, Outcome, RoundStopped
from adapt.loop.permit import Permit
from adapt.loop.process_priority import CpuStarvationMonitor, gpu_background
from adapt.loop.reporter import Reporter
from adapt.loop.state import LoopState
from adapt.loop.throttle import Throttle
from adapt.round import RoundPaused
from common.files import read_json

__all__ = ["Sessions"]

Result = TypeVar("Result")

STUCK = 3  # sessions without a step forward after which a limit is reported as too small
FEWEST_FRAMES = 4  # of a round that lost some


class Sessions:
    """Sessions of one loop's rounds.

    Args:
        throttle: called after each piece of work; it sleeps as long as serving needs.
    """

    def __init__(
        self,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        *,
        pool: FramePool,
        permit: Permit,
        commands: Commands,
        reporter: Reporter,
        throttle: Throttle | None = None,
    ) -> None:
        self._config, self._tools, self._state, self._pool = config, tools, state, pool
        self._permit, self._commands, self._reporter = permit, commands, reporter
        self._throttle = throttle
        self._starvation = CpuStarvationMonitor()

    def run(
        self,
        name: str,
        folder: Path,
        frames: Callable[..., list[StoredFrame]],
        work: Callable[[list[StoredFrame]], Result],
    ) -> Result:
        """Return what `work` returns, after as many sessions as it takes.

        Args:
            name: of the work, for the log.
            folder: where the work keeps its state.
            frames: returns the frames to work on; with `readable` only those that can be decoded.

        Raises:
            RoundStopped: a command cancelled the round, its frames are gone, or a limit never suffices.
            Paused: with `once`, the budget is spent.
        """
        while True:
            if self._state.get("cancelled"):
                raise RoundStopped(Outcome(Decision.CANCELLED, "by command"))
            try:
                return self._one_session(name, folder, frames, work)
            except RoundCancelled:
                continue
            except RoundPaused as pause:
                self._tools.log(f"{name} paused: {pause}")
                if self._is_stuck(str(pause), folder):
                    reason = f"{pause}, {STUCK} times at the same place; raise that limit, or ask less"
                    raise RoundStopped(Outcome(Decision.FAILED, reason)) from pause
            except StoreError as error:  # a picture was removed while the round read it
                self._pool.reopen()
                frames = partial(frames, readable=True)  # a damaged one stays damaged
                if len(frames()) < FEWEST_FRAMES:
                    raise RoundStopped(Outcome(Decision.FAILED, str(error))) from error

    def _one_session(
        self,
        name: str,
        folder: Path,
        frames: Callable[..., list[StoredFrame]],
        work: Callable[[list[StoredFrame]], Result],
    ) -> Result:
        try:
            self._wait_until_permitted()
            rows = frames()
            self._pool.pin(rows)
            self._tools.log(f"{name}: {len(rows)} frames, {folder}")
            self._permit.begin()
            if self._throttle is not None:
                self._throttle.begin()
            with gpu_background(self._config.gpu_fraction):
                return work(rows)
        finally:
            self._pool.pin(())
            self._permit.end()

    def on_progress(self, stage: str, done: int, total: int, **numbers: float) -> None:
        """Take notice of a piece of work that a round did.

        numbers: of the piece; "loss" marks a training step.

        Raises RoundPaused if work is not permitted any more, or a command cancelled the round.
        """
        self._tools.progress(stage, done, total, **numbers)
        is_step = "loss" in numbers
        if is_step:
            self._permit.meter.step()
        self._commands.poll(running=True)
        self._permit.check(after_step=is_step, is_last=done >= total)
        if warning := self._starvation():
            self._tools.log(f"round {self._state.round}, {stage} {done} of {total}: {warning}")
        self._reporter.report("round", stage=stage, done=done, total=total, numbers=numbers, note=warning)
        if self._throttle is not None:
            self._permit.meter.rested(self._throttle())

    def _wait_until_permitted(self) -> None:
        """Wait until vehicle and budget permit work, and answer commands meanwhile; no frame is collected."""
        while reason := self._permit.blocked_reason():
            self._reporter.report("paused", note=reason, paused=reason)
            if self._tools.once and self._permit.is_budget_spent():
                raise Paused(f"round {self._state.round}: {reason}")
            self._commands.wait_polling(1.0, running=True)
        self._reporter.report("round", force=True)

    def _is_stuck(self, reason: str, folder: Path) -> bool:
        """Return True if a limit is under what the next piece takes: the round would pause for ever."""
        marker = _progress_marker(folder) if reason.startswith(("budget", "memory")) else ""
        same = bool(marker) and marker == self._state.get("marker")
        stuck = self._state.get("stuck", 0) + 1 if same else 0
        self._state.update(marker=marker, stuck=stuck)
        return bool(stuck >= STUCK - 1)


def _progress_marker(folder: Path) -> str:
    """Return a text that changes if the work in `folder` made a step forward."""
    parts = [folder / "checkpoint.pt", *sorted(folder.glob("checkpoint.pt.labels/*.npz"))]
    steps = [part.stat().st_mtime_ns for part in parts if part.is_file()]
    try:
        stages = sorted(read_json(folder / "state.json")["stages"])
    except (OSError, ValueError, KeyError, TypeError):
        stages = []
    return json.dumps([folder.name, stages, steps[:1], len(steps)])
