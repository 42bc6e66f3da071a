"""A mapping whose file another process shortens must not end this process.

Touching a page beyond the end of a mapped file, or writing one for which the file system
has no room left, is SIGBUS, and SIGBUS ends a process.  `Guard` maps an empty page of our
own over a page that is missing, so that the copy that touched it goes on, and remembers
that it happened.  The signal is synchronous: it comes to the thread that copies, at the
instruction that copies, never inside the allocator or the interpreter; so the handler may
be Python (through ctypes).  Only mappings that were given to `watch` are mended; for any
other address the handler that was there before is put back and the fault repeats.
Linux on x86-64 and AArch64; elsewhere `install` says False.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import signal
import sys
import threading
from typing import Any

_SA_SIGINFO, _SA_NODEFER = 4, 0x40000000
_PROT, _FLAGS = 0x1 | 0x2, 0x2 | 0x10 | 0x20  # read, write; private, fixed, anonymous
_ADDRESS = 16  # of si_addr in siginfo_t where pointers have 8 bytes


class _Action(ctypes.Structure):
    """struct sigaction of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class Watched:
    """One mapping: its addresses, and whether a page of it had to be replaced."""

    def __init__(self, begin: int, size: int) -> None:
        self.begin = begin
        self.end = begin + size
        self.torn = False


class Guard:
    """The handler of this process.  One object a process: `install` and `watch` of `GUARD`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: tuple[Watched, ...] = ()
        self._installed: bool | None = None
        self._before = _Action()
        self._libc: Any = None
        self._callback: Any = None  # must outlive the process's last fault

    def install(self) -> bool:
        """Sets the handler, once.  False where this system's structures are not known."""
        with self._lock:
            if self._installed is None:
                self._installed = self._set()
            return self._installed

    def watch(self, begin: int, size: int) -> Watched:
        """From now on missing pages of [begin, begin + size) are replaced.  `forget` it before unmapping."""
        watched = Watched(begin, size)
        with self._lock:
            # Two mappings never share an address: what was watched here is unmapped, by whoever lost it.
            others = (other for other in self._watched if other.end <= begin or watched.end <= other.begin)
            self._watched = (*others, watched)
        return watched

    def forget(self, watched: Watched) -> None:
        with self._lock:
            self._watched = tuple(other for other in self._watched if other is not watched)

    def _set(self) -> bool:
        known = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
        if not known or ctypes.sizeof(ctypes.c_void_p) != 8:
            return False
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = (
            *(ctypes.c_void_p, ctypes.c_size_t),
            *(ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long),
        )
        self._libc = libc
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._callback = kind(self._handle)
        action = _Action()
        action.handler = ctypes.cast(self._callback, ctypes.c_void_p).value
        # On the stack of the thread that copies: alternate stacks are too small for Python.
        action.flags = _SA_SIGINFO | _SA_NODEFER
        result: int = libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), ctypes.byref(self._before))
        return result == 0

    def _handle(self, _number: int, information: int, _context: int) -> None:
        address = ctypes.c_uint64.from_address(information + _ADDRESS).value
        for watched in self._watched:  # no lock: the tuple is replaced whole
            if watched.begin <= address < watched.end:
                watched.torn = True
                # All of the rest at once: a file that was cut short lacks it all.
                page = address - address % mmap.PAGESIZE
                size = -(-(watched.end - page) // mmap.PAGESIZE) * mmap.PAGESIZE
                if self._libc.mmap(page, size, _PROT, _FLAGS, -1, 0) == page:
                    return
        self._libc.sigaction(int(signal.SIGBUS), ctypes.byref(self._before), None)


GUARD = Guard()
