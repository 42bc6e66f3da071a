"""Responds to a change of domain: returns to a version that was adapted to it, or asks for a refresh.

`DomainResponder` stands between the loop and `adapt.loop.domain_memory.DomainPolicy`.  It is shown every
frame that was kept, knows what answers now, returns to an earlier version through the server's guarded swap,
and gives the loop the frames of a refresh, which is then a round as any other.  WORKDIR/roads.npz stores the
known domains; WORKDIR/roads.jsonl records each return to a version, when and why.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Protocol

import numpy as np

from adapt.frames.store import StoredFrame, StoreError
from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.domain_memory import RELEASED, Action, DomainPolicy, FeatureProbe, FeatureStats
from adapt.loop.outcome import Decision, Submission
from adapt.loop.state import LoopState
from adapt.loop.trigger import Start
from adapt.round import RoundConfig, RoundResult
from adapt.sources import Captured
from networks.pack import Pack

__all__ = ["DomainResponder", "Frames", "Versions", "refresh_config"]

FEWEST_FRAMES = 4  # of a round
HELD = ("frozen", "pinned", "stopping")  # checks that reject any version: not the fault of this one


def refresh_config(config: RoundConfig) -> RoundConfig:
    """Return the settings of a round that only refreshes batch statistics; all else is as in `config`.

    adabn_keep 0.3: statistics of a handful of frames are noisy, and the released ones are the prior
    (Schneider et al., NeurIPS 2020).  Measured on roads that change (docs/results/continual.md): to choose
    between 0 and 0.5 on the two or three frames that are held out is worse than 0.3 always.  The gate
    compares it with the parent.

    limits.views: a dozen frames of one street are too few to tell what is stuck to the picture from what the
    street is made of (97 of 168 honest rounds were refused for that).  The training round that follows checks
    it.
    """
    limits = replace(config.limits, views=3 * config.limits.views)
    return replace(
        config, portions=(), adabn=True, adabn_keep=(0.3,), holdout=max(config.holdout, 0.34), limits=limits
    )


class Frames(Protocol):
    """The frames that a response may use (`adapt.loop.frame_pool.FramePool`)."""

    def unused(self) -> list[StoredFrame]:
        """Return the frames that no round has used."""

    def remaining_frames(self) -> list[StoredFrame]:
        """Return the frames of the round that just ended.  Raises StoreError."""

    def pictures(self, rows: Sequence[StoredFrame]) -> Sequence[np.ndarray]:
        """Return frames uint8 [H,W,3]; reading one may raise StoreError."""


class Versions(Protocol):
    """The versions of the served model (`adapt.loop.submitter.Submitter`)."""

    def answering_version(self) -> int | None:
        """Return the version that answers now; 0 = the released pack, None = one of another adapter."""

    def go_back(self, version: int) -> Submission:
        """Submit an earlier version; 0 = the released pack."""


class DomainResponder:
    """Responds for one loop.

    Args:
        blocked_reason: returns why no refresh is permitted now, or "".
        report: reports a phase to the server, as `adapt.loop.reporter.Reporter.report`.

    Raises:
        ValueError: the network has no feature statistics that could be measured.
    """

    def __init__(
        self,
        pack: Pack,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        *,
        frames: Frames,
        versions: Versions,
        blocked_reason: Callable[[], str],
        report: Callable[..., None],
    ) -> None:
        self.policy = DomainPolicy(
            FeatureProbe(pack, config.road.layers), config.road, state.workdir / "roads.npz"
        )
        self._config, self._tools, self._state = config, tools, state
        self._frames, self._versions = frames, versions
        self._blocked_reason, self._report = blocked_reason, report
        self._action: tuple[Action, str] | None = None  # what to do next, and the camera that asked for it
        self._keep_choice = False  # someone else chose what answers in this domain: it is not replaced

    # ------------------------------------------------------------------------------------------- watching
    def observe(self, captured: Captured) -> None:
        """Check with a frame that was kept whether the live version was adapted to this domain."""
        live = self._versions.answering_version()
        if live is None:
            return
        before, going = (self._state.get(key) for key in ("answers", "going"))
        if before is not None and live not in (before, going):
            # A watch window or an operator took the version away.  The loop does not return to it by itself,
            # and does not replace their choice before the domain changes.
            self.policy.forget(int(before))
            self.policy.start_again()
            self._keep_choice = True
        if live != RELEASED and live not in self.policy.versions():
            self._keep_choice = True  # its domain was lost: learn this one for it
        if before != live:
            self._state.update(answers=live)
        camera = self._config.camera_of(captured.source)
        action = self.policy.offer(captured.frame, live, camera)
        if action is None or not action.sure:
            return
        keep_choice, self._keep_choice = self._keep_choice, False  # for this domain, not for the next one
        if action.kind == "stay":
            return
        if keep_choice:
            self.policy.learn(live, self.policy.recent_stats(camera), camera)
        elif action.kind == "back" or self._config.respond == "refresh":
            self._action = action, camera

    # ------------------------------------------------------------------------------------------- responding
    def due(self) -> Start:
        """Do what is due: return to a version at once, or return the refresh that starts now."""
        if self._action is None:
            return Start("", [])
        (action, camera), self._action = self._action, None
        config = self._config
        rows = [row for row in self._frames.unused() if config.mix or row.source == camera]
        rows = rows[-config.road.frames * config.road.agree :]
        if action.kind == "back":
            self._go_back(action, camera, rows, self.policy.recent_stats(camera))
            return Start("", [])
        blocked = self._blocked_reason()
        if blocked or len(rows) < FEWEST_FRAMES:
            if blocked:
                self._report("waiting", note=f"refresh: {blocked}", paused=blocked)
            return Start("", [])
        self._start_domain(camera, rows)
        return Start(f"road: {action.why}", rows)

    def _start_domain(self, camera: str, rows: list[StoredFrame]) -> None:
        """Let later rounds learn from frames of this domain alone."""
        if rows:
            since = {**(self._state.get("road_since") or {}), camera: rows[0].id}
            self._state.update(road_since=since)

    def _go_back(self, action: Action, camera: str, rows: list[StoredFrame], stats: FeatureStats) -> None:
        """Return to an earlier version, through the same guarded swap as a new one."""
        version = action.version
        self._tools.log(f"back to {f'version {version}' if version else 'the released pack'}: {action.why}")
        self._report("submit", note=action.why, force=True)
        self._state.update(going=version)  # a loop that is killed now knows this as its own doing
        submission = self._versions.go_back(version)
        outcome = submission.outcome
        self._record(
            {
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "version": version,
                "why": action.why,
                "state": outcome.decision.value,
                "reason": outcome.reason,
            }
        )
        if outcome.decision is Decision.LIVE:
            self._start_domain(camera, rows)
            self._state.update(answers=version)
        elif outcome.decision is Decision.REJECTED:
            self._tools.log(f"the server keeps what is live: {outcome.reason}")
            if not submission.events or submission.events[-1]["check"] not in HELD:
                self.policy.forget(version)
                self.policy.learn(self._state.answering, stats, camera)
        self.policy.start_again()
        self._report("collect", force=True)

    def _record(self, line: dict[str, Any]) -> None:
        file = self._state.workdir / "roads.jsonl"
        with contextlib.suppress(OSError), open(file, "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    # ------------------------------------------------------------------------------------------- learning
    def learn(self, decision: Decision, result: RoundResult | None, version: int) -> None:
        """Learn from the round that ended which version answers the domain of its frames from now on.

        version: what the round submitted, or 0.
        """
        if result is None:
            return
        try:
            rows = self._frames.remaining_frames()
            stats = self.policy.probe.measure_all(self._frames.pictures(rows)) if rows else None
        except StoreError:  # its frames are gone, or the whole store is
            return
        if stats is None:
            return
        camera = self._config.camera_of(rows[0].source)
        live = self._state.answering
        if decision is Decision.LIVE:
            self.policy.learn(version, stats, camera)
            self._state.update(answers=version)
        elif self._state.is_refresh:
            refused = decision is Decision.REFUSED
            failed = result.report.get("gate", {}).get("failed", ()) if refused else ()
            answer = self.policy.refreshed(None, failed, live, stats, camera)
            if answer != live:
                action = Action("back", answer, "its own statistics are the best here")
                self._go_back(action, camera, [], stats)

    def forget(self, versions: Sequence[int]) -> None:
        """Forget the domains of versions that the server deleted."""
        for version in versions:
            self.policy.forget(version)
