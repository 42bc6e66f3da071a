"""Files in memory that live no longer than their user.

A file without a name is gone with the process that has it open, however that ends.  Where the system has
none, a directory in /dev/shm takes its place, and what a kill leaves of it is swept at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from runtime.client.shm_segments import PREFIX as LANE

log = logging.getLogger("roadworthy.scratch")
_DIRECTORY = "/dev/shm"
_PREFIX = "roadworthy-"
_OURS = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")  # as tempfile names directories
_AGE = 60.0  # seconds after which what nobody has locked has no owner: making and locking takes a moment


@contextlib.contextmanager
def nameless() -> Iterator[str]:
    """The path of an empty file in memory for this process; it is gone at the end.  Raises OSError."""
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
        yield str(folder / "optimised.onnx")


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Locked as long as it is used."""
    where = _DIRECTORY if os.access(_DIRECTORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=where) as folder:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield Path(folder)
        finally:
            os.close(descriptor)


def sweep(directory: str = _DIRECTORY) -> list[str]:
    """Removes what killed servers and clients of this user left in /dev/shm: directories of optimised models
    and lanes that nobody has locked.  Returns their names.
    """
    gone = []
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):  # gone meanwhile, or not ours
                if _left(f"{directory}/{name}", name):
                    gone.append(name)
    return gone


def _left(path: str, name: str) -> bool:
    status = os.lstat(path)
    if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _AGE:
        return False
    folder = bool(_OURS.fullmatch(name)) and stat.S_ISDIR(status.st_mode)
    if folder and set(os.listdir(path)) - {"optimised.onnx"}:
        return False
    if not folder and not (name.startswith(LANE) and stat.S_ISREG(status.st_mode)):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: it has an owner
        shutil.rmtree(path) if folder else os.unlink(path)
        return True
    finally:
        os.close(descriptor)
