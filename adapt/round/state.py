"""Round state that survives a crash: `state.json`, and the seconds that each kind of work took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.files import read_json, write_json

__all__ = ["RoundState"]


class RoundState:
    """The state of a round in its folder.

    Attributes:
        stages: one record per finished stage, by the stage's name; can be written as JSON.
        report: the report of a finished round, else None.
        resumed: how often the round was opened again; 0 for a round that ran through.
        seconds: time spent per kind of work, over all processes.
        damage: why `state.json` cannot be used; "" if it is missing or fine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.identity = ""
        self.stages: dict[str, dict[str, Any]] = {}
        self.report: dict[str, Any] | None = None
        self.resumed = -1
        self.seconds: dict[str, float] = {}
        self.damage = ""

    @property
    def file(self) -> Path:
        return self.folder / "state.json"

    def read(self, identity: str) -> bool:
        """Take over what `state.json` holds of the round `identity`.

        Returns:
            False if there is no such file, if it is damaged (`damage` gives the reason), or if it is of
            another round.
        """
        self.identity = identity
        try:
            content = read_json(self.file)
            if not isinstance(content, dict) or not isinstance(content.get("stages", {}), dict):
                raise ValueError("it is no state of a round")
            if not isinstance(content.get("resumed", -1), int):
                raise ValueError("resumed is no number")
            if not isinstance(content.get("seconds", {}), dict):
                raise ValueError("seconds is no table")
        except FileNotFoundError:
            return False
        except (OSError, ValueError) as error:
            self.damage = " ".join(str(error).split())[:200]
            return False
        if content.get("identity") != identity:
            return False
        resumed, seconds = content.get("resumed", -1), content.get("seconds", {})
        self.stages, self.report = content.get("stages", {}), content.get("report")
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
