"""Files in memory that exist no longer than the process that uses them.

A file without a name disappears with the process that has it open, however the process ends.  If the system
offers none, a locked directory in /dev/shm replaces it; `runtime/shared_memory/sweep.py` deletes what a
killed process leaves of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

DIRECTORY = "/dev/shm"
MODEL = "optimised.onnx"  # the only file in a scratch directory
_PREFIX = "roadworthy-"
_PATTERN = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")  # as tempfile names directories


def is_scratch_directory(name: str) -> bool:
    """True if `nameless` gives its directories names like this one."""
    return bool(_PATTERN.fullmatch(name))


@contextlib.contextmanager
def nameless() -> Iterator[str]:
    """Yields the path of an empty file in memory for this process, and deletes it.  Raises OSError."""
    try:
        descriptor = os.memfd_create("roadworthy", os.MFD_CLOEXEC)
    except (AttributeError, OSError):
        descriptor = -1
    try:
        path = f"/proc/self/fd/{descriptor}"
        if descriptor >= 0 and os.access(path, os.W_OK):
            yield path
            return
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    with _directory() as folder:
        yield str(folder / MODEL)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Yields a directory that stays locked as long as it is used."""
    where = DIRECTORY if os.access(DIRECTORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=where) as folder:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(descriptor)
