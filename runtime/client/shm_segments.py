"""The client's side of shared memory: segments through which a frame goes to the server and its answer back.

One request at a time uses a segment.  Its file is unlinked as soon as the server has opened it, so that a
killed client leaves no file.  The client locks it as long as it lives; the server sees by the lock that a
segment has lost its owner (`runtime/shared_memory/segments.py`) and frees its memory.

Knows neither gRPC nor how a segment is registered with the server: `SegmentPool` stores the free segments of
one client.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading

from runtime.shared_memory import segments
from runtime.tensors import Array


class ShmSegment:
    """`size` bytes that both sides see.  Its file has a name until `unlink`."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.name = segments.new_name()
        self._path = f"{segments.DIRECTORY}/{self.name}"
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            segments.own(self._descriptor)
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
        """Copies a contiguous array into the segment."""
        self.memory[offset : offset + array.nbytes] = array.reshape(-1).view("u1").data

    def take(self, offset: int, size: int) -> bytes:
        """A copy: the segment is used again."""
        return self.memory[offset : offset + size]

    def close(self) -> None:
        """Our side of it.  The server's stays until it is unregistered, or found without an owner."""
        if self._descriptor >= 0:
            self.memory.close()
            os.close(self._descriptor)
            self._descriptor = -1


class SegmentPool:
    """The segments of one client, kept for the next request.  May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[ShmSegment] = []
        self._closed = False

    def borrow(self, size: int) -> tuple[ShmSegment | None, ShmSegment | None]:
        """(a free segment of at least `size` bytes for the caller alone, a smaller one that is to be ended):
        one of them or neither.
        """
        with self._lock:
            for index, segment in enumerate(self._free):
                if segment.size >= size:
                    return self._free.pop(index), None
            return None, self._free.pop() if self._free else None

    def give_back(self, segment: ShmSegment) -> bool:
        """False when the client has been closed meanwhile: the caller ends the segment."""
        with self._lock:
            if not self._closed:
                self._free.append(segment)
            return not self._closed

    def close(self) -> list[ShmSegment]:
        """The segments that are free now, to be ended by the caller; the others come to an end as they come
        back.
        """
        with self._lock:
            self._closed = True
            free, self._free = self._free, []
        return free
