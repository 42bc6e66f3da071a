"""What every source of frames has: the frame that it delivers, and how frames of files are read in time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

__all__ = ["Captured", "FileSource", "Source", "SourceError", "camera_name"]


class SourceError(Exception):
    """A source cannot be read.  One line: thing, reason, remedy."""


@dataclass(frozen=True)
class Captured:
    """One frame uint8 [H,W,3] RGB and what is known of it.

    time: seconds since the epoch.  labels, confidence: uint8 [H,W] of the answer it got, or None.  place:
    (latitude, longitude) or None.  collect: what its sender allows, None = did not say.  dropped: frames lost
    before it.
    """

    frame: np.ndarray
    time: float
    source: str
    model: str = ""
    version: int = 0
    labels: np.ndarray | None = None
    confidence: np.ndarray | None = None
    place: tuple[float, float] | None = None
    collect: bool | None = None
    dropped: int = 0


class Source(Protocol):
    """Frames, one after the other."""

    finished: bool

    def get(self, timeout: float) -> Captured | None:
        """The next frame, or None where none came within `timeout` seconds.  Raises SourceError."""

    def close(self) -> None: ...


class FileSource:
    """Frames of a file or folder, at most `max_fps` a second of its own time (0 = all), after the first
    `skip`.
    """

    def __init__(
        self, path: Path, frames: Iterator[Captured], *, max_fps: float = 0.0, skip: int = 0
    ) -> None:
        self.path, self.finished, self.read = path, False, 0
        self._frames, self._skip = frames, skip
        self._interval = 1.0 / max_fps if max_fps > 0 else 0.0
        self._due = -float("inf")

    def get(self, timeout: float) -> Captured | None:
        while not self.finished:
            captured = next(self._frames, None)
            if captured is None:
                self.finished = True
                break
            if captured.time < self._due - 10 * self._interval:  # its clock jumped back
                self._due = -float("inf")
            if captured.time < self._due - 0.01 * self._interval:
                continue
            began = self._due > -float("inf")  # then on a grid: 10 of 15 frames a second are not made 7.5
            self._due = max(self._due, captured.time - self._interval) if began else captured.time
            self._due += self._interval
            self.read += 1
            if self.read > self._skip:
                return captured
        return None

    def close(self) -> None:
        close = getattr(self._frames, "close", None)
        if close is not None:
            close()


def camera_name(text: str) -> str:
    """Of a path or topic: what is left of it in a name."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_")[:64] or "file"
