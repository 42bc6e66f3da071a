"""The client's side of shared memory: lanes through which a frame goes and its answer comes back.

A lane is one region that one request uses at a time.  Its file is unlinked as soon as the
server has opened it, so that a client that is killed leaves nothing behind.
"""

from __future__ import annotations

import mmap
import os
import threading
import uuid
from collections.abc import Callable

from runtime.tensors import Array

_DIRECTORY = "/dev/shm"
Register = Callable[[str, str, int], None]  # name, key, bytes
Unregister = Callable[[str], None]


class Lane:
    """`size` bytes that both sides see."""

    def __init__(self, name: str, size: int, memory: mmap.mmap) -> None:
        self.name = name
        self.size = size
        self.memory = memory

    def put(self, array: Array, offset: int = 0) -> None:
        """Copies a contiguous array into the lane."""
        self.memory[offset : offset + array.nbytes] = array.reshape(-1).view("u1").data

    def take(self, offset: int, size: int) -> bytes:
        """A copy: the lane is used again."""
        return self.memory[offset : offset + size]


class Lanes:
    """The lanes of one client, made when they are needed and kept for the next request."""

    def __init__(self, register: Register, unregister: Unregister) -> None:
        self._register = register
        self._unregister = unregister
        self._lock = threading.Lock()
        self._free: list[Lane] = []
        self._made: dict[str, Lane] = {}

    def borrow(self, size: int) -> Lane:
        """A lane of at least `size` bytes for the caller alone; raises OSError or what registering raises."""
        with self._lock:
            for index, lane in enumerate(self._free):
                if lane.size >= size:
                    return self._free.pop(index)
            small = self._free.pop() if self._free else None
        if small is not None:
            self.drop(small)
        lane = _make(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE, self._register)
        with self._lock:
            self._made[lane.name] = lane
        return lane

    def give_back(self, lane: Lane) -> None:
        with self._lock:
            if lane.name in self._made:
                self._free.append(lane)

    def drop(self, lane: Lane) -> None:
        """Ends a lane, on the server too."""
        with self._lock:
            self._made.pop(lane.name, None)
        self._unregister(lane.name)
        lane.memory.close()

    def close(self) -> None:
        with self._lock:
            lanes, self._free = self._free, []
        for lane in lanes:
            self.drop(lane)


def _make(size: int, register: Register) -> Lane:
    name = f"roadworthy-{os.getpid()}-{uuid.uuid4().hex}"
    path = f"{_DIRECTORY}/{name}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, size)  # a full tmpfs says so here, not by SIGBUS later
        memory = mmap.mmap(descriptor, size)
        try:
            register(name, f"/{name}", size)
        except BaseException:
            memory.close()
            raise
        return Lane(name, size, memory)
    finally:
        os.close(descriptor)
        os.unlink(path)
