"""What a round knows of itself between two kills: `state.json`, and the seconds each kind of work took.

Shared by the rounds of segmentation (`adapt.round`) and of edges (`adapt.round.edges`); knows neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import write_json

__all__ = ["Record"]


class Record:
    """Base of a round that keeps its state under `out`."""

    out: Path
    state: dict[str, Any]
    seconds: dict[str, float]

    def _save(self) -> None:
        self.state["seconds"] = {k: round(v, 3) for k, v in self.seconds.items()}
        write_json(self.out / "state.json", self.state)

    def _timed(self, key: str, work: Callable[[], Any]) -> Any:
        """What `work` gives; its seconds are added to `key`'s, also where it raises."""
        start = time.monotonic()
        try:
            return work()
        finally:
            self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - start
