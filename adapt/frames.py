"""The frame store: what the road looked like, in a bounded folder that survives a kill at any moment.

    DIR/index.sqlite      one row a frame: time, source, model, version, hash, confidence summary, why kept
    DIR/frames/ab/….png   the pictures, lossless (JPEG noise would become part of the domain)

A picture is written under a temporary name, fsynced and renamed before its row is committed, so a row
always has its file; files without a row (killed in between) are swept at the next open.  Nothing here
knows networks or the service.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["FrameStore", "Kept", "StoreError", "StoredFrame", "confidence_summary"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS frames (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time REAL NOT NULL, source TEXT NOT NULL, model TEXT NOT NULL, version INTEGER NOT NULL,
    file TEXT NOT NULL UNIQUE, bytes INTEGER NOT NULL, height INTEGER NOT NULL, width INTEGER NOT NULL,
    phash TEXT NOT NULL, summary TEXT NOT NULL, why TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS frames_by_source ON frames (source, id);
"""


class StoreError(Exception):
    """The frame store cannot be used.  One line: thing, reason, remedy."""


@dataclass(frozen=True)
class StoredFrame:
    """One row: everything known about a kept frame but its pixels."""

    id: int
    time: float
    source: str
    model: str
    version: int
    file: str
    bytes: int
    height: int
    width: int
    phash: str
    summary: dict[str, Any]
    why: str


@dataclass(frozen=True)
class Kept:
    """The answer to `add`: the row's id, or None with the rule that left the frame out."""

    id: int | None
    why: str
    evicted: int = 0


@dataclass
class _Recent:
    """Hashes a new frame of a source is compared with."""

    hashes: list[np.ndarray] = field(default_factory=list)


def confidence_summary(labels: np.ndarray, confidence: np.ndarray, classes: int) -> dict[str, Any]:
    """Per-class share and mean confidence of one answer, and their class-balanced score.

    labels, confidence: uint8 [H,W] as served.  Returns share [C], confidence [C] (0..1, 0 where the class
    does not appear) and score = mean over the classes that appear of their mean confidence: the published
    frame selection of CRST.
    """
    flat = labels.reshape(-1)
    count = np.bincount(flat, minlength=classes)[:classes]
    total = np.bincount(flat, weights=confidence.reshape(-1).astype(np.float64), minlength=classes)[:classes]
    mean = np.where(count > 0, total / np.maximum(count, 1) / 255.0, 0.0)
    seen = count > 0
    return {
        "share": [round(float(v), 5) for v in count / max(int(count.sum()), 1)],
        "confidence": [round(float(v), 4) for v in mean],
        "score": round(float(mean[seen].mean()), 4) if seen.any() else 0.0,
    }


class FrameStore:
    """Frames kept for adaptation, at most `max_bytes` of pictures; the oldest go first.

    Args:
        path: the folder; made if missing.
        max_bytes: bound on the picture files together.
        near: largest Hamming distance (of 64 bits of perceptual hash) at which two frames count as the same.
        compare: with how many of the latest frames of its source a new one is compared.
        max_age: seconds after which a frame is dropped, or None.

    Safe for several threads of one process; one process at a time writes (a second waits for SQLite's lock).

    Raises:
        StoreError: the folder cannot be used or holds another schema.
    """

    SCHEMA = "1"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 2_000_000_000,
        near: int = 4,
        compare: int = 64,
        max_age: float | None = None,
    ) -> None:
        if max_bytes <= 0:
            raise StoreError(f"frame store: max_bytes is {max_bytes}; give the number of bytes it may fill")
        self.path = Path(path)
        self.max_bytes, self.near, self.compare, self.max_age = max_bytes, near, compare, max_age
        self._lock = threading.RLock()
        self._recent: dict[str, _Recent] = {}
        try:
            (self.path / "frames").mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path / "index.sqlite", timeout=30, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self._db:
                self._db.executescript(_SCHEMA)
                self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (self.SCHEMA,))
            row = self._db.execute("SELECT value FROM meta WHERE key='schema'").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"frame store {self.path} cannot be opened ({error}); move it away") from error
        if row[0] != self.SCHEMA:
            self._db.close()
            raise StoreError(
                f"frame store {self.path} has schema {row[0]}, this is {self.SCHEMA}; move it away"
            )
        self.sweep()

    # ------------------------------------------------------------------------------------ keeping order
    def __enter__(self) -> FrameStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the index.  Not needed for safety."""
        with self._lock:
            self._db.close()

    def sweep(self) -> int:
        """Make files and rows agree after a crash: either without the other goes.  Returns how many."""
        with self._lock:
            rows = {file: id_ for id_, file in self._db.execute("SELECT id, file FROM frames")}
            swept = 0
            present = set()
            for file in (self.path / "frames").rglob("*"):
                if file.is_dir():
                    continue
                name = file.relative_to(self.path / "frames").as_posix()
                if name in rows:
                    present.add(name)
                else:
                    file.unlink(missing_ok=True)
                    swept += 1
            lost = [id_ for file, id_ in rows.items() if file not in present]
            if lost:
                with self._db:
                    self._db.executemany("DELETE FROM frames WHERE id=?", [(i,) for i in lost])
            return swept + len(lost)

    # ------------------------------------------------------------------------------------------ adding
    def add(
        self,
        frame: np.ndarray,
        *,
        source: str = "",
        model: str = "",
        version: int = 0,
        summary: dict[str, Any] | None = None,
        why: str = "new view",
        at: float | None = None,
    ) -> Kept:
        """Keep a frame unless it is nearly one that is there.

        Args:
            frame: uint8 [H,W,3] RGB.
            summary: what `confidence_summary` gives, or any JSON-able dictionary.
            why: the reason it is kept, in words a person reads later.

        Raises:
            ValueError: not a uint8 [H,W,3] frame, or larger than the whole store may be.
        """
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame is uint8 [H,W,3], this is {frame.dtype} {list(frame.shape)}")
        bits = _phash(frame)
        with self._lock:
            recent = self._recent_hashes(source)
            for other in reversed(recent.hashes):
                distance = int(np.count_nonzero(bits != other))
                if distance <= self.near:
                    return Kept(None, f"near-duplicate (hash distance {distance} <= {self.near})")
            now = time.time() if at is None else at
            name, size = self._write(frame)
            if size > self.max_bytes:
                (self.path / "frames" / name).unlink()
                raise ValueError(
                    f"one frame of {size} bytes exceeds the store's {self.max_bytes}: raise max_bytes"
                )
            evicted = self._make_room(size, now)
            with self._db:
                cursor = self._db.execute(
                    "INSERT INTO frames"
                    " (time, source, model, version, file, bytes, height, width, phash, summary, why)"
                    " VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                    (now, source, model, int(version), name, size, frame.shape[0], frame.shape[1],
                     _hex(bits), json.dumps(summary or {}), why),
                )  # fmt: skip
            recent.hashes.append(bits)
            del recent.hashes[: -self.compare]
            return Kept(cursor.lastrowid, why, evicted)

    def _recent_hashes(self, source: str) -> _Recent:
        if source not in self._recent:
            rows = self._db.execute(
                "SELECT phash FROM frames WHERE source=? ORDER BY id DESC LIMIT ?", (source, self.compare)
            ).fetchall()
            self._recent[source] = _Recent([_bits(row[0]) for row in reversed(rows)])
        return self._recent[source]

    def _write(self, frame: np.ndarray) -> tuple[str, int]:
        key = uuid.uuid4().hex
        name = f"{key[:2]}/{key}.png"
        path = self.path / "frames" / name
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            Image.fromarray(frame).save(file, "PNG", compress_level=1)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, path)
        return name, size

    def _make_room(self, size: int, now: float) -> int:
        """Drop what is too old, then the oldest, until `size` more bytes fit.  Returns how many went."""
        gone: list[tuple[int, str]] = []
        if self.max_age is not None:
            gone += self._db.execute(
                "SELECT id, file FROM frames WHERE time<?", (now - self.max_age,)
            ).fetchall()
        total = self.bytes() - sum(
            self._db.execute("SELECT bytes FROM frames WHERE id=?", (i,)).fetchone()[0] for i, _ in gone
        )
        old = {i for i, _ in gone}
        if total + size > self.max_bytes:
            for id_, file, length in self._db.execute("SELECT id, file, bytes FROM frames ORDER BY time, id"):
                if total + size <= self.max_bytes:
                    break
                if id_ not in old:
                    gone.append((id_, file))
                    total -= length
        self._drop(gone)
        return len(gone)

    def _drop(self, rows: Sequence[tuple[int, str]]) -> None:
        with self._db:
            self._db.executemany("DELETE FROM frames WHERE id=?", [(i,) for i, _ in rows])
        for _, file in rows:
            (self.path / "frames" / file).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------ asking
    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT COUNT(*) FROM frames").fetchone()[0])

    def bytes(self) -> int:
        """Bytes of the pictures kept."""
        with self._lock:
            return int(self._db.execute("SELECT COALESCE(SUM(bytes),0) FROM frames").fetchone()[0])

    def rows(
        self, *, source: str | None = None, since: float | None = None, limit: int | None = None
    ) -> list[StoredFrame]:
        """Rows in order of arrival; with `limit` the latest that many."""
        where, values = ["1"], []
        if source is not None:
            where.append("source=?")
            values.append(source)
        if since is not None:
            where.append("time>=?")
            values.append(since)  # type: ignore[arg-type]
        query = (
            "SELECT id,time,source,model,version,file,bytes,height,width,phash,summary,why FROM frames"
            f" WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?"
        )
        with self._lock:
            found = self._db.execute(query, (*values, -1 if limit is None else limit)).fetchall()
        names = [item.name for item in fields(StoredFrame)]
        return [
            StoredFrame(**{**dict(zip(names, row, strict=True)), "summary": json.loads(row[10])})
            for row in reversed(found)
        ]

    def read(self, row: StoredFrame) -> np.ndarray:
        """The frame, uint8 [H,W,3].  Raises StoreError where its file is gone or damaged."""
        path = self.path / "frames" / row.file
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except OSError as error:
            raise StoreError(
                f"frame {row.id} of {self.path} cannot be read ({error}); run sweep()"
            ) from error

    def frames(self, rows: Sequence[StoredFrame] | None = None) -> StoredFrames:
        """A read-only sequence of frames, as `adapt.round.adapt` takes it."""
        return StoredFrames(self, self.rows() if rows is None else rows)

    def delete(
        self, *, ids: Sequence[int] | None = None, source: str | None = None, before: float | None = None
    ) -> int:
        """Delete rows with their pictures: by id, by source, by time; given several, all must hold.

        Raises ValueError where nothing is given, so that an empty filter cannot empty the store.
        """
        if ids is None and source is None and before is None:
            raise ValueError("delete: give ids, source or before")
        chosen = [
            (row.id, row.file)
            for row in self.rows(source=source)
            if (ids is None or row.id in set(ids)) and (before is None or row.time < before)
        ]
        with self._lock:
            self._drop(chosen)
            self._recent.clear()
        return len(chosen)


class StoredFrames(Sequence[np.ndarray]):
    """Frames of a store, read from disk one at a time."""

    def __init__(self, store: FrameStore, rows: Sequence[StoredFrame]) -> None:
        self.store, self.rows = store, list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return StoredFrames(self.store, self.rows[i])
        return self.store.read(self.rows[i])

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.store.read(row) for row in self.rows)


def _phash(frame: np.ndarray) -> np.ndarray:
    """bool [64]: perceptual hash (DCT of a 32×32 grey picture): noise and a little light change nothing."""
    import imagehash

    return np.asarray(imagehash.phash(Image.fromarray(frame)).hash).reshape(-1)


def _hex(bits: np.ndarray) -> str:
    return np.packbits(bits).tobytes().hex()


def _bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(bool)
