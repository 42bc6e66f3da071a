"""Round state that survives a crash: `state.json`, and the seconds that each kind of work took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapt.files import write_json

__all__ = ["RoundState"]


class RoundState:
    """The state of a round in its folder.

    Attributes:
        stages: one record per finished stage, by the stage's name; can be written as JSON.
        report: the report of a finished round, else None.
        resumed: how often the round was opened again; 0 for a round that ran through.
        seconds: time spent per kind of work, over all processes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = ""
        self.stages: dict[str, dict[str, Any]] = {}
        self.report: dict[str, Any] | None = None
        self.resumed = -1
        self.seconds: dict[str, float] = {}

    @property
    def file(self) -> Path:
        return self.folder / "state.json"

    def read(self, identity: str) -> bool:
        """Take over what `state.json` holds of the round `identity`.

        Returns:
            False if there is no such file, if it cannot be read, or if it is of another round.
        """
        self.identity = identity
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            if content["identity"] != identity or not isinstance(content["stages"], dict):
                return False
            resumed, seconds = int(content.get("resumed", -1)), dict(content.get("seconds", {}))
        except (OSError, ValueError, KeyError, TypeError):
            return False
        self.stages, self.report = content["stages"], content.get("report")
        self.resumed, self.seconds = resumed, seconds
        return True

    def save(self) -> None:
        """Write `state.json`, durably."""
        content: dict[str, Any] = {
            "identity": self.identity,
            "stages": self.stages,
            "resumed": self.resumed,
            "seconds": {key: round(value, 3) for key, value in self.seconds.items()},
        }
        if self.report is not None:
            content["report"] = self.report
        write_json(self.file, content)

    @contextmanager
    def timed(self, key: str) -> Iterator[None]:
        """Add the seconds of the body to those of `key`, also if the body raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[key] = self.seconds.get(key, 0.0) + time.monotonic() - start
