"""The frame store: what the road looked like, in a bounded folder that survives a kill at any moment.

    DIR/index.sqlite      one row a frame: time, place, source, model, version, hash, confidence summary, why
    kept DIR/frames/ab/….png   the pictures, lossless (JPEG noise would become part of the domain); sealed:
    ….png.aes

A picture is written under a temporary name, fsynced and renamed before its row is committed, so a row always
has its file; files without a row (killed in between) are swept at the next open.  Which frames are kept is
decided by `adapt.frames.selection`.  Nothing here knows networks or the service; nothing leaves the machine.

    python -m adapt.frames DIR list|show|export|delete|purge|keygen …      (adapt/frames/__main__.py)
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapt.data.base import BROKEN
from adapt.frames.encryption import Seal, SealError
from adapt.frames.selection import Candidate, Place, Rules, Tally, confidence_summary, metres, select

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
_ADDED = ("latitude REAL", "longitude REAL", "rare INTEGER NOT NULL DEFAULT 0")  # since schema 1
_COLUMNS = "id,time,source,model,version,file,bytes,height,width,phash,summary,why,latitude,longitude,rare"


PATIENCE = 5.0  # seconds for which another process may hold the index
MOST_OF_A_ROW = 1 << 24  # bytes of a value of the index; a damaged one may claim gigabytes
_NAME = re.compile(r"[0-9a-f]{2}/[0-9a-f]{32}\.png(\.aes)?\Z")  # of a picture, under frames/
LATEST = 1e10  # seconds since the epoch: what is later (the year 2286) was no clock


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
    latitude: float | None = None
    longitude: float | None = None
    rare: bool = False

    @property
    def place(self) -> Place | None:
        """(latitude, longitude) in degrees, or None."""
        return None if self.latitude is None or self.longitude is None else (self.latitude, self.longitude)


@dataclass(frozen=True)
class Kept:
    """The answer to `add`: the row's id, or None with the reason, and the rule's name, that left it out."""

    id: int | None
    why: str
    evicted: int = 0
    rule: str = ""


@dataclass
class _Recent:
    """What a new frame of a source is compared with."""

    hashes: list[np.ndarray] = field(default_factory=list)
    last: tuple[float, Place | None] | None = None


class FrameStore:
    """Frames kept for adaptation, at most `max_bytes` of pictures.

    Args:
        path: the folder; made if missing.
        max_bytes: bound on the picture files together.
        near: largest Hamming distance (of 64 bits of perceptual hash) at which two frames count as the same;
            of `rules`, where those are given.
        compare: with how many of the latest frames of its source a new one is compared.
        max_age: seconds after which a frame is dropped, or None; of `rules`, where those are given.
        rules: which frames are kept, see `adapt.frames.selection`.
        key: file with the key the pictures are sealed with, or None.
        sweep: make files and rows agree; False beside a process that writes: its picture may have no row yet.

    Safe for several threads of one process; one process at a time writes (a second waits for SQLite's lock).

    Raises:
        StoreError: the folder cannot be used, holds another schema, or the key does not fit.
    """

    SCHEMA = "2"

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 2_000_000_000,
        near: int = 4,
        compare: int = 64,
        max_age: float | None = None,
        rules: Rules | None = None,
        key: str | os.PathLike[str] | None = None,
        sweep: bool = True,
    ) -> None:
        if max_bytes <= 0:
            raise StoreError(f"frame store: max_bytes is {max_bytes}; give the number of bytes it may fill")
        self.path = Path(path)
        self.rules = rules or Rules(near=near, age=max_age)
        self.max_bytes, self.compare = max_bytes, compare
        self.pinned: Collection[int] = ()  # rows that a round needs: not evicted
        self._lock = threading.RLock()
        self._recent: dict[str, _Recent] = {}
        try:
            self._seal = Seal(key) if key is not None else None
        except SealError as error:
            raise StoreError(str(error)) from error
        self._tally = Tally()
        try:
            (self.path / "frames").mkdir(parents=True, exist_ok=True)
            index = self.path / "index.sqlite"
            if index.exists() and not index.is_file():
                raise ValueError("its index is no plain file")
            self._db = sqlite3.connect(self.path / "index.sqlite", timeout=PATIENCE, check_same_thread=False)
            try:
                self._open()
                self._index = os.stat(self.path / "index.sqlite")
                if sweep:
                    self.sweep()
                for summary, rare in self._db.execute("SELECT summary, rare FROM frames"):
                    self._tally.add(json.loads(summary), bool(rare))
            except BaseException:
                self._db.close()
                raise
        except (
            OSError,
            sqlite3.Error,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            remedy = _remedy(error, "move it away")
            raise StoreError(f"frame store {self.path} cannot be opened ({error}): {remedy}") from error

    def _open(self) -> None:
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_OF_A_ROW)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute("PRAGMA secure_delete=ON")  # what is deleted is not left in free pages
        with self._db:
            self._db.executescript(_SCHEMA)
            self._db.execute("INSERT OR IGNORE INTO meta VALUES ('schema', ?)", (self.SCHEMA,))
            known = {row[1] for row in self._db.execute("PRAGMA table_info(frames)")}
            for column in _ADDED:
                if column.split()[0] not in known:
                    self._db.execute(f"ALTER TABLE frames ADD COLUMN {column}")
            self._db.execute("UPDATE meta SET value=? WHERE key='schema' AND value='1'", (self.SCHEMA,))
        found = self._db.execute("SELECT value FROM meta WHERE key='schema'").fetchone()[0]
        if found != self.SCHEMA:
            raise StoreError(
                f"frame store {self.path} has schema {found}, this is {self.SCHEMA}; move it away"
            )

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
        place: Place | None = None,
        collect: bool | None = None,
    ) -> Kept:
        """Keep a frame, if the rules let it in.

        Args:
            frame: uint8 [H,W,3] RGB.
            summary: what `confidence_summary` gives, or any JSON-able dictionary.
            why: the reason it is kept, in words a person reads later.
            at: seconds since the epoch; now, where it is not given or cannot be.
            place: (latitude, longitude) in degrees.
            collect: whether whoever sent it allows it to be kept; None = did not say.

        Raises:
            ValueError: not a uint8 [H,W,3] frame, or larger than the whole store may be.
            StoreError: the store was removed or damaged meanwhile, or its disk is full.
        """
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(f"a frame is uint8 [H,W,3], this is {frame.dtype} {list(frame.shape)}")
        now = at if at is not None and 0 <= at < LATEST else time.time()  # NaN is neither
        place = _valid(place)
        with self._lock:
            try:
                self._present()
                told = (source, model, int(version), summary or {}, why, now, place, collect)
                return self._add(frame, _phash(frame), *told)
            except (OSError, sqlite3.Error) as error:
                remedy = _remedy(error, "make room on its disk, or move it away")
                raise StoreError(
                    f"frame store {self.path} cannot take a frame ({error}): {remedy}"
                ) from error

    def _present(self) -> None:
        """SQLite goes on writing into an index that was deleted under it; nobody would ever find that."""
        now = os.stat(self.path / "index.sqlite")
        if (now.st_ino, now.st_dev) != (self._index.st_ino, self._index.st_dev):
            raise FileNotFoundError(2, "its index was replaced")

    def _add(
        self,
        frame: np.ndarray,
        bits: np.ndarray,
        source: str,
        model: str,
        version: int,
        summary: dict[str, Any],
        why: str,
        now: float,
        place: Place | None,
        collect: bool | None,
    ) -> Kept:
        recent = self._recent_hashes(source)
        verdict = select(
            Candidate(now, bits, summary, place, collect), recent.hashes, recent.last, self._tally, self.rules
        )
        if not verdict.keep:
            return Kept(None, verdict.why, rule=verdict.rule)
        content = self._encode(frame)
        if len(content) > self.max_bytes:
            raise ValueError(
                f"one frame of {len(content)} bytes exceeds the store's {self.max_bytes}: raise max_bytes"
            )
        room = self._make_room(len(content), now)
        if room is None:
            return Kept(None, "the store is full and its sample stays as it is", rule="reservoir")
        name = self._write(content)
        reason = why if verdict.why == "new view" else verdict.why
        try:
            with self._db:
                cursor = self._db.execute(
                    "INSERT INTO frames (time, source, model, version, file, bytes, height, width, phash,"
                    " summary, why, latitude, longitude, rare) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                    (
                        now,
                        source,
                        model,
                        version,
                        name,
                        len(content),
                        frame.shape[0],
                        frame.shape[1],
                        _hex(bits),
                        json.dumps(summary),
                        reason,
                        *(place or (None, None)),
                        int(verdict.rare),
                    ),
                )
        except BaseException:
            (self.path / "frames" / name).unlink(missing_ok=True)
            raise
        self._tally.add(summary, verdict.rare)
        recent.hashes.append(bits)
        del recent.hashes[: -self.compare]
        recent.last = (now, place)
        return Kept(cursor.lastrowid, reason, room)

    def _recent_hashes(self, source: str) -> _Recent:
        if source not in self._recent:
            if len(self._recent) >= 64:  # names without end must not fill memory
                self._recent.clear()
            rows = self._db.execute(
                "SELECT phash, time, latitude, longitude FROM frames WHERE source=? ORDER BY id DESC LIMIT ?",
                (source, self.compare),
            ).fetchall()
            last = None
            if rows:
                _, at, latitude, longitude = rows[0]
                last = (at, None if latitude is None else (latitude, longitude))
            self._recent[source] = _Recent([_bits(row[0]) for row in reversed(rows)], last)
        return self._recent[source]

    def _encode(self, frame: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def _write(self, content: bytes) -> str:
        key = uuid.uuid4().hex
        name = f"{key[:2]}/{key}.png"
        if self._seal is not None:
            name += ".aes"
            content = self._seal.seal(content, name)
        path = self.path / "frames" / name
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f"{key}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return name

    def _make_room(self, size: int, now: float) -> int | None:
        """Drop what is too old, then whom `rules.evict` names, until `size` more bytes fit.

        Returns how many went; None where the new one is not to have room (a full reservoir drew against it).
        """
        gone: dict[int, tuple[str, int]] = {}
        if self.rules.age is not None:
            for id_, file, length in self._db.execute(
                "SELECT id, file, bytes FROM frames WHERE time<?", (now - self.rules.age,)
            ):
                gone[id_] = (file, length)
        total = self.bytes() - sum(length for _, length in gone.values())
        full = total + size > self.max_bytes
        if self.rules.evict == "reservoir":
            offered = self._offered()
            here = max(1, self._tally.frames - len(gone))
            rng = np.random.default_rng([0x5E1EC7, offered])
            if full and offered > here and rng.random() >= here / offered:
                self._drop([(id_, file) for id_, (file, _) in gone.items()])
                return None
        if full:
            rows = self._db.execute(
                "SELECT id, file, bytes, rare FROM frames ORDER BY rare, time, id"
                if self.rules.evict == "reservoir"
                else "SELECT id, file, bytes, 0 FROM frames ORDER BY time, id"
            ).fetchall()
            rows = [row for row in rows if row[0] not in gone and row[0] not in self.pinned]
            if self.rules.evict == "reservoir":
                common = [row for row in rows if not row[3]]
                rare = [row for row in rows if row[3]]
                rows = [common[i] for i in rng.permutation(len(common))] + rare
            for id_, file, length, _ in rows:
                if total + size <= self.max_bytes:
                    break
                gone[id_] = (file, length)
                total -= length
            if total + size > self.max_bytes:  # only pinned ones are left
                return None
        self._drop([(id_, file) for id_, (file, _) in gone.items()])
        return len(gone)

    def _offered(self) -> int:
        """Count one more frame that passed the rules, over restarts."""
        with self._db:
            self._db.execute(
                "INSERT INTO meta VALUES ('offered', '1')"
                " ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1"
            )
        return int(self._db.execute("SELECT value FROM meta WHERE key='offered'").fetchone()[0])

    def _drop(self, rows: Sequence[tuple[int, str]]) -> None:
        if not rows:
            return
        for id_, _ in rows:
            found = self._db.execute("SELECT summary, rare FROM frames WHERE id=?", (id_,)).fetchone()
            if found:
                self._tally.add(json.loads(found[0]), bool(found[1]), -1)
        with self._db:
            self._db.executemany("DELETE FROM frames WHERE id=?", [(i,) for i, _ in rows])
        for _, file in rows:
            if not _NAME.match(file):  # an index that was damaged names no file outside the store
                continue
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
        query = f"SELECT {_COLUMNS} FROM frames WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?"
        try:
            with self._lock:
                found = self._db.execute(query, (*values, -1 if limit is None else limit)).fetchall()
        except sqlite3.Error as error:
            raise StoreError(f"frame store {self.path} cannot be read ({error}): move it away") from error
        names = [item.name for item in fields(StoredFrame)]
        try:
            return [
                StoredFrame(
                    **{
                        **dict(zip(names, row, strict=True)),
                        "summary": json.loads(row[10]),
                        "rare": bool(row[14]),
                    }
                )
                for row in reversed(found)
            ]
        except (ValueError, TypeError, RecursionError) as error:
            raise StoreError(f"frame store {self.path} has a damaged row ({error}): move it away") from error

    def read(self, row: StoredFrame) -> np.ndarray:
        """The frame, uint8 [H,W,3].  Raises StoreError where its file is gone or damaged."""
        path = self.path / "frames" / row.file
        try:
            if not _NAME.match(row.file):
                raise ValueError("its name is none of the store's")
            if not path.is_file():
                raise FileNotFoundError(2, "no such file")
            content = path.read_bytes()
            if row.file.endswith(".aes"):
                if self._seal is None:
                    raise SealError("it is sealed: give the key")
                content = self._seal.open(content, row.file)
            with Image.open(io.BytesIO(content)) as image:
                return np.asarray(image.convert("RGB"))
        except (*BROKEN, SealError) as error:
            raise StoreError(
                f"frame {row.id} of {self.path} cannot be read ({error}); run sweep()"
            ) from error

    def frames(self, rows: Sequence[StoredFrame] | None = None) -> StoredFrames:
        """A read-only sequence of frames, as `adapt.round.adapt` takes it."""
        return StoredFrames(self, self.rows() if rows is None else rows)

    def delete(
        self,
        *,
        ids: Sequence[int] | None = None,
        source: str | None = None,
        before: float | None = None,
        after: float | None = None,
        around: tuple[Place, float] | None = None,
    ) -> int:
        """Delete rows with their pictures: by id, source, time, or place (within so many metres around one).

        Given several, all must hold.  Frames without a place are never `around` one.  Raises ValueError where
        nothing is given, so that an empty filter cannot empty the store.
        """
        if ids is None and source is None and before is None and after is None and around is None:
            raise ValueError("delete: give ids, source or before, after or around")
        wanted = None if ids is None else set(ids)
        chosen = [
            (row.id, row.file)
            for row in self.rows(source=source)
            if (wanted is None or row.id in wanted)
            and (before is None or row.time < before)
            and (after is None or row.time >= after)
            and (around is None or (row.place is not None and metres(row.place, around[0]) <= around[1]))
        ]
        try:
            with self._lock:
                self._drop(chosen)
                self._recent.clear()
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the log holds deleted rows, too
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"frame store {self.path}: deleting failed ({error})") from error
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


def _remedy(error: Exception, other: str) -> str:
    held = isinstance(error, sqlite3.OperationalError) and "locked" in str(error)
    return "end the program that holds its index.sqlite" if held else other


def _hex(bits: np.ndarray) -> str:
    return np.packbits(bits).tobytes().hex()


def _bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(bool)


def _valid(place: Place | None) -> Place | None:
    """None for what is no place on earth."""
    if place is None or not all(math.isfinite(v) for v in place):
        return None
    return place if abs(place[0]) <= 90 and abs(place[1]) <= 180 else None
