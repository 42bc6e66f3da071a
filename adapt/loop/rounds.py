"""The two rounds of the loop: the segmentation's, and that of the edges which follow it.

Knows which frames and packs a round gets, and what is left of a round whose frames are gone; the method is in
`adapt.round`.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from adapt.data.base import DataError, resize_frame
from adapt.frames.store import StoredFrame, StoreError
from adapt.loop.config import EdgeMember, LoopConfig, LoopTools
from adapt.loop.domain_response import refresh_config
from adapt.loop.errors import one_line
from adapt.loop.frame_pool import FramePool
from adapt.loop.outcome import Decision, RoundStopped
from adapt.loop.sessions import Sessions
from adapt.loop.state import LoopState, Phase
from adapt.round import RoundResult, adapt
from common.files import read_json
from networks.pack import Pack, PackError, load_pack

__all__ = ["Rounds", "failed_checks"]


def failed_checks(report: dict[str, Any]) -> str:
    """Return "check: reason; ..." of the gate's checks that a round failed."""
    failed = [check for check in report["gate"]["checks"] if not check["passed"]]
    return "; ".join(f"{check['name']}: {check['reason']}" for check in failed)


class Rounds:
    """Rounds from one released pack.  edges: the member whose edges follow, or None."""

    def __init__(
        self,
        pack: Pack,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        *,
        pool: FramePool,
        sessions: Sessions,
        edges: EdgeMember | None = None,
    ) -> None:
        self._pack, self._config, self._tools, self._state = pack, config, tools, state
        self._pool, self._sessions, self._edges = pool, sessions, edges

    def adapt_segmentation(self) -> RoundResult:
        """Return the result of the segmentation's round.

        Raises RoundStopped, Paused (see `Sessions.run`), and what a round raises.
        """
        state = self._state
        with contextlib.suppress(StoreError):
            # The round may have finished before its frames went.
            lost = len(self._pool.remaining_frames()) < len(state.frame_ids)
            if lost and (finished := _finished_round(state.folder)) is not None:
                return finished
        config = refresh_config(self._config.round) if state.is_refresh else self._config.round

        def work(rows: list[StoredFrame]) -> RoundResult:
            return adapt(
                self._pack,
                self._pool.pictures(rows),
                config=config,
                out=state.folder,
                progress=self._sessions.on_progress,
            )

        return self._sessions.run(f"round {state.round}", state.folder, self._frames_or_restart, work)

    def _frames_or_restart(self, *, readable: bool = False) -> list[StoredFrame]:
        """Return the round's remaining frames; if some are missing, the round starts again with these."""
        rows, state = self._pool.remaining_frames(readable=readable), self._state
        if len(rows) < len(state.frame_ids):
            # A round whose frames were evicted, deleted or damaged cannot be continued to the same result.
            folder = state.folder
            if (folder / "state.json").is_file():
                os.replace(folder, folder.with_name(f"{folder.name}.lost-{int(time.time())}"))
            state.enter(Phase.ROUND, frames=[row.id for row in rows])
        return rows

    def adapt_edges(self, segmentation: RoundResult) -> Any:
        """Return the result of the edges' round on the same frames, or None if no edges may go live.

        The state stores "accepted", or why the edges stay as they are.  Raises RoundStopped if a command
        cancelled the round, and Paused.
        """
        if self._edges is None or self._state.is_refresh:  # a refresh is of the segmentation alone
            return None
        from adapt.round.edges import EdgeRoundError

        made, refusal = None, ""
        try:
            made = self._edge_sessions(self._edges, segmentation)
        except EdgeRoundError as error:
            refusal = f"declined: {error}"
        except RoundStopped as stop:
            if stop.outcome.decision is Decision.CANCELLED:
                raise
            refusal = f"failed: {stop.outcome.reason}"
        except (DataError, RuntimeError, ValueError, MemoryError, OSError) as error:
            refusal = f"failed: {one_line(error)}"
        if made is not None and (not made.accepted or made.pack is None):
            refusal = f"refused by their gate: {failed_checks(made.report)}"
        self._state.update(edges=refusal or "accepted")
        if refusal:
            self._tools.log(f"edges {refusal}; the segmentation goes on alone")
            return None
        return made

    def _edge_sessions(self, member: EdgeMember, segmentation: RoundResult) -> Any:
        from adapt.round.edges import adapt_edges

        # If both heads are of one network, its edges are adapted on the encoder that was just adapted.
        pack: Any = segmentation.pack if member.pack.sha256 == self._pack.sha256 else member.pack
        folder = self._state.folder / "edges"

        def work(rows: list[StoredFrame]) -> Any:
            return adapt_edges(
                pack,
                [resize_frame(frame, pack.spec.size) for frame in self._pool.pictures(rows)],
                config=member.config,
                out=folder,
                progress=self._sessions.on_progress,
            )

        name = f"edges of round {self._state.round}"
        return self._sessions.run(name, folder, self._pool.remaining_frames, work)


def _finished_round(folder: Path) -> RoundResult | None:
    """Return the result of the round in `folder` if it finished."""
    try:
        report = read_json(folder / "state.json")["report"]
        made = load_pack(folder / "pack") if report["accepted"] else None
        return RoundResult(made, bool(report["accepted"]), report)
    except (OSError, ValueError, KeyError, TypeError, PackError):
        return None
