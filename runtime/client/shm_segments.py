"""The client's side of shared memory: lanes through which a frame goes and its answer comes back.

A lane is one region that one request uses at a time.  Its file is unlinked as soon as the server has opened
it, so that a client that is killed leaves no file; and the client holds a lock on it as long as it lives, by
which the server sees that a lane has lost its owner (`runtime/shared_memory/system.py`) and gives its memory back.

Knows neither gRPC nor how a lane is made known to the server: `Pool` keeps the lanes of one client.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import uuid

from runtime.tensors import Array

_DIRECTORY = "/dev/shm"
PREFIX = "roadworthy-lane-"  # of the names of lanes: who finds one unlocked may take it away


class Lane:
    """`size` bytes that both sides see.  Its file has a name until `unlink`."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.name = f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
        self._path = f"{_DIRECTORY}/{self.name}"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)
            os.posix_fallocate(self._descriptor, 0, self.size)  # a full tmpfs says so here, not by SIGBUS
            self.memory = mmap.mmap(self._descriptor, self.size)
        except BaseException:
            self.unlink()
            os.close(self._descriptor)
            raise

    @property
    def key(self) -> str:
        """What the server opens."""
        return f"/{self.name}"

    def unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)

    def put(self, array: Array, offset: int = 0) -> None:
        """Copies a contiguous array into the lane."""
        self.memory[offset : offset + array.nbytes] = array.reshape(-1).view("u1").data

    def take(self, offset: int, size: int) -> bytes:
        """A copy: the lane is used again."""
        return self.memory[offset : offset + size]

    def close(self) -> None:
        """Our side of it.  The server's stays until it is unregistered, or found without an owner."""
        if self._descriptor >= 0:
            self.memory.close()
            os.close(self._descriptor)
            self._descriptor = -1


class Pool:
    """The lanes of one client, kept for the next request.  May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Lane] = []
        self._closed = False

    def borrow(self, size: int) -> tuple[Lane | None, Lane | None]:
        """(a free lane of at least `size` bytes for the caller alone, a smaller one that is to be ended):
        one of them or neither.
        """
        with self._lock:
            for index, lane in enumerate(self._free):
                if lane.size >= size:
                    return self._free.pop(index), None
            return None, self._free.pop() if self._free else None

    def give_back(self, lane: Lane) -> bool:
        """False when the client has been closed meanwhile: the caller ends the lane."""
        with self._lock:
            if not self._closed:
                self._free.append(lane)
            return not self._closed

    def close(self) -> list[Lane]:
        """The lanes that are free now, to be ended by the caller; the others come to an end as they come
        back.
        """
        with self._lock:
            self._closed = True
            lanes, self._free = self._free, []
        return lanes
