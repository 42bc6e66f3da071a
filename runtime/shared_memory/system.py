"""System shared memory: named regions that a client registers, and tensors in them.

A region is mapped once, and a tensor is copied out of it or into it: what runs and what
observers keep is a snapshot that the client cannot change under them.  A client that
shortens the file, or has written more than its file system can hold, gets an error: the
size is checked before each copy, and a page that goes missing during the copy is caught by
`runtime/shared_memory/sigbus.py`.  Where that cannot be, regions are read and written through their
descriptor, which is slower and cannot fault.  A region that is unregistered while requests
hold it stays until the last of them is answered.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.errors import Code, ServiceError
from runtime.shared_memory import segments
from runtime.shared_memory.sigbus import GUARD
from runtime.tensors import Array

_2_64 = 1 << 64
LIMIT = 1024  # regions; each holds two descriptors (mmap duplicates its own)


@dataclass(frozen=True)
class ShmRef:
    """Where a tensor lies: as a request names it, not yet checked."""

    region: str
    offset: int
    byte_size: int


class Memory:
    """A named piece of a client's memory, counted by the requests that use it.  What it is made of is told by
    `kind` and done by the subclass: read, write and _close.
    """

    kind = ""

    def __init__(self, name: str, byte_size: int) -> None:
        self.name = name
        self.byte_size = byte_size
        self._lock = threading.Lock()
        self._held = 0
        self._gone = False

    def check(self, place: ShmRef) -> None:
        """Raises ServiceError unless the whole place is inside.  Python's integers do not overflow."""
        if not 0 <= place.offset < self.byte_size:
            raise _invalid(f"Invalid offset for shared memory region: '{self.name}'")
        if place.byte_size <= 0 or place.offset + place.byte_size > self.byte_size:
            raise _invalid(f"Invalid offset + byte size for shared memory region: '{self.name}'")

    def read(self, place: ShmRef) -> Array:
        """A copy of the place, uint8 [byte_size]."""
        raise NotImplementedError

    def write(self, place: ShmRef, content: bytes | memoryview) -> None:
        """Writes `content` at the start of the place, which must be large enough."""
        raise NotImplementedError

    def ownerless(self) -> bool:
        return False

    def hold(self) -> bool:
        with self._lock:
            if self._gone:
                return False
            self._held += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._held -= 1
            close = self._gone and self._held == 0
        if close:
            self._close()

    def remove(self) -> None:
        """No new holders; closes with the last one."""
        with self._lock:
            if self._gone:
                return
            self._gone = True
            close = self._held == 0
        if close:
            self._close()

    def _close(self) -> None:
        raise NotImplementedError


class Region(Memory):
    """`byte_size` bytes of the shared-memory object `key`, from `offset` on.  Owns the descriptor."""

    kind = "system"

    def __init__(
        self, name: str, key: str, offset: int, byte_size: int, descriptor: int, *, mapped: bool = False
    ) -> None:
        super().__init__(name, byte_size)
        self.key = key
        self.offset = offset
        self._descriptor = descriptor
        self._mapping = _Mapping(descriptor, offset, byte_size) if mapped else None

    def read(self, place: ShmRef) -> Array:
        self.check(place)
        self._check_size(place.offset + place.byte_size)
        content = np.empty(place.byte_size, np.uint8)
        if self._mapping is not None:
            whole = self._mapping.copy(content, self._mapping.bytes(place.offset, place.byte_size))
        else:
            got = os.preadv(self._descriptor, [content.data], self.offset + place.offset)
            whole = got == place.byte_size
        if not whole:
            raise self._shortened()
        return content

    def write(self, place: ShmRef, content: bytes | memoryview) -> None:
        self.check(place)
        size = len(content)
        if size == 0:  # an empty batch has an empty answer
            return
        self._check_size(place.offset + size)
        if self._mapping is not None:
            source = np.frombuffer(content, np.uint8)
            whole = self._mapping.copy(self._mapping.bytes(place.offset, size), source)
        else:
            try:
                whole = os.pwrite(self._descriptor, content, self.offset + place.offset) == size
            except OSError:  # the file system is full
                whole = False
        if not whole:
            raise self._shortened()

    def _check_size(self, end: int) -> None:
        if os.fstat(self._descriptor).st_size < self.offset + end:
            raise self._shortened()

    def _shortened(self) -> ServiceError:
        return _invalid(
            f"shared memory region '{self.name}' has been shortened since it was registered, or its file "
            "system is full; register it again"
        )

    def ownerless(self) -> bool:
        """True if this is a segment of our own client whose process is gone."""
        if not segments.is_segment(self.key.removeprefix("/")):
            return False
        with self._lock:
            return not self._gone and segments.is_abandoned(self._descriptor)

    def _close(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
        os.close(self._descriptor)


class _Mapping:
    """A mapping that survives the end of its file: see `runtime/shared_memory/sigbus.py`."""

    def __init__(self, descriptor: int, offset: int, size: int) -> None:
        self._memory = mmap.mmap(descriptor, size, offset=offset)
        self._view: Array | None = np.frombuffer(self._memory, np.uint8)
        self._watched = GUARD.watch(self._view.ctypes.data, size)

    def bytes(self, offset: int, size: int) -> Array:
        assert self._view is not None
        return self._view[offset : offset + size]

    def copy(self, target: Array, source: Array) -> bool:
        """False when a page of either was missing, now or before: what lies there is not the client's."""
        np.copyto(target, source)
        return not self._watched.torn

    def close(self) -> None:
        GUARD.forget(self._watched)
        self._view = None
        self._memory.close()


class ShmRegistry:
    """The registered regions, with Triton's codes and words.

    `allowed`: whether clients may register any.  `prefix`: what the names of system regions begin with.
    """

    def __init__(self, *, allowed: bool = True, prefix: str = "") -> None:
        self.allowed = allowed
        self._prefix = prefix.removeprefix("/")
        self._lock = threading.Lock()
        self._regions: dict[str, Memory] = {}

    @staticmethod
    def mapped() -> bool:
        """Whether regions are mapped here, rather than read through their descriptors."""
        return GUARD.install()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Raises ServiceError."""
        self._permit("system")
        if not key.removeprefix("/").startswith(self._prefix):
            message = (
                f"shared memory region '{name}': the server takes objects alone whose name begins with "
                f"'{self._prefix}' (shared_memory.prefix)"
            )
            raise ServiceError(Code.PERMISSION_DENIED, message, "shared-memory")
        self._sweep()
        with self._lock:
            self._new(name)
            if any(isinstance(region, Region) and region.key == key for region in self._regions.values()):
                raise ServiceError(Code.INTERNAL, f"Invalid shared memory region: '{key}'", "shared-memory")
            self._room()
            descriptor = _open(key)
            try:
                _check(name, offset, byte_size, os.fstat(descriptor).st_size)
                region = Region(name, key, offset, byte_size, descriptor, mapped=self.mapped())
            except BaseException as error:
                os.close(descriptor)
                if isinstance(error, OSError | ValueError):  # shortened since, or no address space left
                    raise _invalid(
                        f"failed to register shared memory region '{name}': invalid args"
                    ) from error
                raise
            self._regions[name] = region

    def add(self, name: str, make: Callable[[], Memory]) -> None:
        """Registers what `make` makes, of another kind than `register`'s.  Raises ServiceError."""
        self._permit("cuda")
        with self._lock:
            self._new(name)
            self._room()
        region = make()  # takes its time: requests look for their regions meanwhile
        try:
            with self._lock:
                self._new(name)
                self._room()
                self._regions[name] = region
        except ServiceError:
            region.remove()
            raise

    def _permit(self, kind: str) -> None:
        if not self.allowed:
            message = (
                f"{kind} shared memory of clients is switched off; send tensors in the message, or start the "
                "server with --allow-client-shm on"
            )
            raise ServiceError(Code.UNAVAILABLE, message, "shared-memory")

    def _new(self, name: str) -> None:
        if name in self._regions:
            message = f"shared memory region '{name}' already in manager"
            raise ServiceError(Code.ALREADY_EXISTS, message, "shared-memory")

    def _room(self) -> None:
        if len(self._regions) >= LIMIT:
            message = f"{LIMIT} shared memory regions are registered; unregister one"
            raise ServiceError(Code.RESOURCE_EXHAUSTED, message, "shared-memory")

    def _sweep(self) -> None:
        """Clients that were killed have left lanes: their memory is given back when the next one comes."""
        with self._lock:
            lost = [region for region in self._regions.values() if region.ownerless()]
        for region in lost:
            self.unregister(region.name)

    def unregister(self, name: str, kind: str = "system") -> None:
        """ "" = all of that kind.  An unknown region is no error, as with Triton."""
        with self._lock:
            names = [name] if name else list(self._regions)
            mine = [one for one in names if one in self._regions and self._regions[one].kind == kind]
            gone = [self._regions.pop(one) for one in mine]
        for region in gone:
            region.remove()

    def status(self, name: str, kind: str = "system") -> list[Any]:
        """Those of a kind; "" = all."""
        with self._lock:
            regions = [region for region in self._regions.values() if region.kind == kind]
        found = [region for region in regions if name in ("", region.name)]
        if name and not found:
            message = f"Unable to find {kind} shared memory region: '{name}'"
            raise ServiceError(Code.NOT_FOUND, message, "shared-memory")
        return found

    def close(self) -> None:
        """Gives every region back, when the server ends."""
        for kind in ("system", "cuda"):
            self.unregister("", kind)

    def hold(self, place: ShmRef) -> Memory:
        """The region of a place, checked and held; release it."""
        with self._lock:
            region = self._regions.get(place.region)
            if region is None or not region.hold():
                message = f"Unable to find shared memory region: '{place.region}'"
                raise ServiceError(Code.NOT_FOUND, message, "shared-memory")
        try:
            region.check(place)
        except ServiceError:
            region.release()
            raise
        return region


def _open(key: str) -> int:
    """A descriptor of a POSIX shared-memory object; the key cannot leave the directory they live in."""
    name = key.removeprefix("/")
    failure = ServiceError(Code.INTERNAL, f"Unable to open shared memory region: '{key}'", "shared-memory")
    if not name or "/" in name or "\0" in name or name in (".", "..") or len(name) > 255:
        raise failure
    try:
        descriptor = os.open(
            f"{segments.DIRECTORY}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        )
    except OSError:
        raise failure from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise failure
    return descriptor


def _check(name: str, offset: int, byte_size: int, size: int) -> None:
    """What mmap would have refused is refused in its words, so that the codes are Triton's."""
    prefix = f"failed to register shared memory region '{name}': "
    if offset + byte_size >= _2_64:
        raise _invalid(f"{prefix}unable to process address spaceValue too large for defined data type")
    if offset + byte_size > size:
        raise _invalid(f"{prefix}invalid args")
    if byte_size == 0 or offset % mmap.PAGESIZE:
        raise _invalid(f"{prefix}unable to process address spaceInvalid argument")


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "shared-memory")
