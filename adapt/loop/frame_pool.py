"""The frame store of WORKDIR as the loop uses it: which frames are new, and which belong to the round.

A store that was removed or damaged while the loop runs is opened again.  Knows neither rounds nor the server.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from adapt.frames.selection import Rules
from adapt.frames.store import FrameStore, Kept, StoredFrame, StoreError, confidence_summary
from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.state import LoopState
from adapt.sources import Captured

__all__ = ["FramePool"]

REREAD_SECONDS = 2.0  # after which the list of new frames is read again
# What a damaged index makes SQLite and the reader of its rows raise.
DAMAGED = (
    sqlite3.DatabaseError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
)


class FramePool:
    """Frames that were kept.

    Args:
        classes: how many classes the model has.
        only_current_domain: leave out of `unused` what was taken before the latest change of domain.

    Raises:
        StoreError: the store cannot be opened.
    """

    def __init__(
        self,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        classes: int,
        *,
        only_current_domain: bool = False,
    ) -> None:
        self.only_current_domain = only_current_domain
        self._config, self._tools, self._state, self._classes = config, tools, state, classes
        self._rules = config.rules or Rules(near=config.near)
        self._unused: list[StoredFrame] = []
        self._read_at: float | None = None  # when `_unused` was read; None = to be read
        self.store = self._open()

    # ------------------------------------------------------------------------------------------- the store
    def _open(self) -> FrameStore:
        path, config = self._state.workdir / "frames", self._config

        def opened() -> FrameStore:
            return FrameStore(path, max_bytes=config.max_bytes, rules=self._rules, key=config.key)

        try:
            return opened()
        except StoreError as error:
            cause = error.__cause__
            damaged = isinstance(cause, DAMAGED)
            if not damaged or isinstance(cause, sqlite3.OperationalError):  # a full disk, a wrong key
                raise
            # A damaged index must not end adaptation for good.  The store is moved aside, not deleted.
            aside = path.with_name(f"frames.damaged-{int(time.time())}-{os.getpid()}")
            os.replace(path, aside)
            self._tools.log(f"{error}; it was moved to {aside.name}, an empty one is begun")
            return opened()

    def reopen(self) -> None:
        """Open the store again, or an empty one if it was removed or is damaged.

        A disk that is full leaves the store as it is.
        """
        self.forget_list()
        with contextlib.suppress(StoreError):
            opened = self._open()
            self.store.close()
            self.store = opened

    def close(self) -> None:
        self.store.close()

    def size(self) -> dict[str, int]:
        """Return {"kept": frames, "bytes": their bytes}; {} if the store cannot be read now."""
        try:
            return {"kept": len(self.store), "bytes": self.store.bytes()}
        except (
            sqlite3.Error
        ):  # damaged, or closed while its disk is full: the next frame repairs or reports it
            return {}

    # ------------------------------------------------------------------------------------------ new frames
    def add(self, captured: Captured) -> Kept:
        """Store a frame if the rules allow it.  Raises StoreError, and ValueError for an unreadable frame."""
        summary: dict[str, Any] = {}
        if captured.labels is not None and captured.confidence is not None:
            summary = confidence_summary(captured.labels, captured.confidence, self._classes)
        kept = self.store.add(
            captured.frame,
            source=captured.source[:200],
            model=captured.model,
            version=captured.version,
            summary=summary,
            at=captured.time,
            place=captured.place,
            collect=captured.collect,
        )
        if kept.id is not None:
            self.forget_list()
        return kept

    def forget_list(self) -> None:
        """Read the new frames from the store when they are asked for next."""
        self._read_at = None

    def unused(self) -> list[StoredFrame]:
        """Return the frames that no round has used, oldest first.

        They are read again after a frame was kept, and every few seconds.
        """
        now = self._tools.clock()
        if self._read_at is None or now - self._read_at > REREAD_SECONDS:
            try:
                rows = self.store.rows(source=self._config.source or None)
            except StoreError as error:
                self._tools.log(str(error))
                self.reopen()
                rows = []
            self._unused = [row for row in rows if not self._state.is_used(row.source, row.id)]
            self._read_at = now
        if not self.only_current_domain:
            return self._unused
        return [row for row in self._unused if not self._is_of_past_domain(row)]

    def _is_of_past_domain(self, row: StoredFrame) -> bool:
        since = self._state.get("road_since") or {}
        return bool(row.id < since.get(self._config.camera_of(row.source), 0))

    def unused_by_camera(self) -> list[list[StoredFrame]]:
        """Return the unused frames per camera, the camera with most frames first; never empty.

        If cameras may mix, they count as one.
        """
        rows = self.unused()
        if self._config.mix:
            return [rows]
        by_camera: dict[str, list[StoredFrame]] = {}
        for row in rows:
            by_camera.setdefault(row.source, []).append(row)
        return sorted(by_camera.values(), key=len, reverse=True) or [[]]

    # ---------------------------------------------------------------------------------- the round's frames
    def remaining_frames(self, *, readable: bool = False) -> list[StoredFrame]:
        """Return the round's frames that are still stored; with `readable` only those that can be decoded.

        Raises StoreError.
        """
        ids = set(self._state.frame_ids)
        rows = [row for row in self.store.rows() if row.id in ids]
        return [row for row in rows if self._is_readable(row)] if readable else rows

    def _is_readable(self, row: StoredFrame) -> bool:
        try:
            self.store.read(row)
        except StoreError:
            return False
        return True

    def pictures(self, rows: Sequence[StoredFrame]) -> Sequence[np.ndarray]:
        """Return the frames of `rows`, uint8 [H,W,3] RGB, each decoded when it is asked for."""
        return self.store.frames(rows)

    def pin(self, rows: Iterable[StoredFrame]) -> None:
        """Protect these frames, and no others, from eviction."""
        self.store.pinned = {row.id for row in rows}

    def latest_of(self, ids: Iterable[int]) -> dict[str, int]:
        """Return the newest of these frames per camera; a store that is gone holds no frame to use twice."""
        wanted, latest = set(ids), dict[str, int]()
        with contextlib.suppress(StoreError):
            for row in self.store.rows():
                if row.id in wanted:
                    latest[row.source] = max(latest.get(row.source, 0), row.id)
        return latest
