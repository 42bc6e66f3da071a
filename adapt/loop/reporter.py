"""Reports to the server what the loop is doing, at most once a second unless the phase changes.

Knows the fields of an AdapterReport; decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from adapt.loop.budget import Meter
from adapt.loop.collector import Collector
from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.frame_pool import FramePool
from adapt.loop.outcome import Outcome
from adapt.loop.server_channel import NullChannel
from adapt.loop.state import LoopState
from common.files import read_json

__all__ = ["Reporter"]

REPORT_SECONDS = 1.0  # least time between two reports of the same phase and stage


class Reporter:
    """Reports of one loop.

    Args:
        classes: names of the model's classes.

    phase, stage: what the latest report was about; "" before the first.
    """

    def __init__(
        self,
        channel: NullChannel,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        *,
        collector: Collector,
        pool: FramePool,
        meter: Meter,
        classes: Sequence[str],
    ) -> None:
        self.phase = self.stage = ""
        self._channel, self._config, self._tools, self._state = channel, config, tools, state
        self._collector, self._pool, self._meter, self._classes = collector, pool, meter, classes
        self._reported_at = -float("inf")

    def report(
        self,
        phase: str,
        *,
        stage: str = "",
        done: int = 0,
        total: int = 0,
        numbers: dict[str, float] | None = None,
        note: str = "",
        paused: str = "",
        force: bool = False,
    ) -> None:
        """Send a report if it is due.

        stage, done, total, numbers: progress of the round that runs.  note: one line.  paused: why no work is
        done.  force: send it now.
        """
        now = self._tools.clock()
        changed = (phase, stage) != (self.phase, self.stage)
        if not (force or changed) and now - self._reported_at < REPORT_SECONDS:
            return
        self._reported_at, self.phase, self.stage = now, phase, stage
        parts: dict[str, Any] = {
            "phase": phase,
            "note": note,
            "collection": self._collection(),
            "budget": self._budget(paused),
        }
        if phase == "collect":
            parts["progress"] = min(1.0, len(self._pool.unused()) / self._config.frames)
        if stage:
            progress = done / total if total else 0.0
            parts["round"] = {
                "round": self._state.round,
                "stage": stage,
                "step": done,
                "of": total,
                "trigger": str(self._state.get("trigger", "")),
                "progress": progress,
            }
            if numbers and "loss" in numbers:
                parts["round"]["loss"] = float(numbers["loss"])
            parts["progress"] = progress
            parts.update(self._pseudo_labels())
        self._channel.report(**parts)

    def report_end(self, number: int, outcome: Outcome, version: int) -> None:
        """Report how round `number` ended.  version: the one that was submitted, or 0."""
        self._channel.report(
            last={
                "round": number,
                "state": outcome.decision.value,
                "reason": outcome.reason[:500],
                "version": version,
                "finished": time.time(),
            }
        )
        self.report("collect", force=True)

    def _collection(self) -> dict[str, Any]:
        collector = self._collector
        return {
            "on": self._state.is_collecting,
            "seen": collector.seen,
            "limit_bytes": self._config.max_bytes,
            "refused": dict(collector.refused),
            "dropped": collector.lost + sum(collector.refused.values()),
            **self._pool.size(),
        }

    def _budget(self, paused: str) -> dict[str, Any]:
        limit, spent = self._config.budget, self._meter.spent()
        return {
            "seconds": spent["seconds"],
            "seconds_limit": limit.seconds or 0.0,
            "paused": paused,
            "memory_bytes": int(spent["memory"]),
            "memory_limit_bytes": limit.memory or 0,
            "joules": spent.get("joules", 0.0),
            "joules_limit": limit.joules or 0.0,
        }

    def _pseudo_labels(self) -> dict[str, Any]:
        """Return the shares and thresholds of the latest labelling, from the record of the round."""
        if not self._channel.listening:
            return {}
        try:
            stages = read_json(self._state.folder / "state.json")["stages"]
            latest = stages[max(key for key in stages if key.startswith("label-"))]
            classes = [
                {
                    "name": name,
                    "predicted": latest["predicted_share"][c],
                    "labelled": latest["share"][c],
                    "threshold": latest["lambda"][c],
                }
                for c, name in enumerate(self._classes)
            ]
            return {
                "pseudo_labels": {
                    "round": self._state.round,
                    "frames": len(self._state.frame_ids),
                    "labelled": latest["labelled"],
                    "classes": classes,
                }
            }
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return {}
