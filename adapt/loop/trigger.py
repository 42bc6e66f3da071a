"""Decides when a round starts, and with which frames: enough new ones, drift, a schedule or a command.

Knows the frames and the server's drift monitor; knows nothing of the vehicle or the budget.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from adapt.frames.store import StoredFrame
from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.frame_pool import FramePool
from adapt.loop.state import LoopState

__all__ = ["Start", "Trigger"]

DRIFT_POLL_SECONDS = 5.0


class Start(NamedTuple):
    """Why a round starts now ("" = it does not), and its frames (else the most there are)."""

    reason: str
    rows: list[StoredFrame]


class Trigger:
    """Decides by what `config.on` names.

    client: a `runtime.client.Client`, asked for drift.  manual: the reason of the command that waits, or "".
    """

    def __init__(
        self, client: Any, config: LoopConfig, tools: LoopTools, state: LoopState, pool: FramePool
    ) -> None:
        self.manual = ""
        self._client, self._config, self._tools = client, config, tools
        self._state, self._pool = state, pool
        self._drift_read_at = -float("inf")
        self._drifting: dict[str, float] = {}  # camera -> since when, in seconds since the epoch
        self._latest_frame_at = tools.clock()

    def restart_patience(self) -> None:
        """A new view came, or collecting begins."""
        self._latest_frame_at = self._tools.clock()

    @property
    def required_frames(self) -> int:
        """Fewest frames that a round would start with now."""
        config = self._config
        return config.enough if config.patience or self.manual else config.frames

    def decide(self, *, finished: bool) -> Start:
        """Return what starts a round now.  finished: no further frame will come."""
        config = self._config
        groups = self._pool.unused_by_camera()
        most = groups[0]
        if self._is_resting() and not self.manual:
            return Start("", most)
        if self.manual and len(most) >= config.enough:
            return Start(f"command: {self.manual}", most[-config.frames :])
        if "drift" in config.on and (rows := self._drifted(groups)):
            return Start("drift", rows)
        if "frames" in config.on:
            if len(most) >= config.frames:
                return Start("frames", most[-config.frames :])
            if (finished or self._patience_expired()) and len(most) >= config.enough:
                return Start("frames", most)
        if "schedule" in config.on and len(most) >= config.enough and self._is_scheduled():
            return Start("schedule", most[-config.frames :])
        return Start("", most)

    def _is_resting(self) -> bool:
        now = time.time()
        since_last = now - self._state.finished
        return 0 <= since_last < self._config.rest  # a clock that jumped back does not add to the rest

    def _patience_expired(self) -> bool:
        patience = self._config.patience
        return bool(patience) and self._tools.clock() - self._latest_frame_at > patience

    def _drifted(self, groups: list[list[StoredFrame]]) -> list[StoredFrame]:
        """Return the frames that were taken since a camera drifts, if they suffice for a round."""
        config = self._config
        self._poll_drift()
        for source, since in self._drifting.items():
            rows = [
                row
                for group in groups
                for row in group
                if (row.source == source or config.mix) and row.time >= since
            ]
            if len(rows) >= min(config.frames, max(config.enough, 4)) and (
                len(rows) >= config.frames or self._patience_expired()
            ):
                return rows[-config.frames :]
        return []

    def _is_scheduled(self) -> bool:
        if not self._state.finished:  # the first round comes after the first `every`
            self._state.update(finished=time.time())
            return False
        return time.time() - self._state.finished >= self._config.every

    def _poll_drift(self) -> None:
        now = self._tools.clock()
        if now - self._drift_read_at < DRIFT_POLL_SECONDS:
            return
        self._drift_read_at = now
        try:
            answer = self._client.drift(self._config.model)
        except Exception:  # the server is away: what it reported before holds until it is back
            return
        self._drifting = {
            str(source["source"]): float(source["since"])
            for source in answer.get("sources", ())
            if source.get("state") == "drifting"
        }
