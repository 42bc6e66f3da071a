"""Deletes what killed servers and clients of this user left in /dev/shm."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import time

from runtime.engines.scratch import DIRECTORY, MODEL, is_scratch_directory
from runtime.shared_memory.segments import is_segment

_AGE = 60.0  # seconds; a younger file may belong to an owner that has not locked it yet


def sweep(directory: str = DIRECTORY) -> list[str]:
    """Deletes directories of optimised models and client segments that no process has locked.

    Returns their names.  Never raises OSError.
    """
    deleted = []
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):  # deleted by another process, or of another user
                if _delete_abandoned(f"{directory}/{name}", name):
                    deleted.append(name)
    return deleted


def _delete_abandoned(path: str, name: str) -> bool:
    status = os.lstat(path)
    if status.st_uid != os.geteuid() or time.time() - status.st_mtime < _AGE:
        return False
    folder = is_scratch_directory(name) and stat.S_ISDIR(status.st_mode)
    if folder and set(os.listdir(path)) - {MODEL}:
        return False
    if not folder and not (is_segment(name) and stat.S_ISREG(status.st_mode)):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises OSError if it has an owner
        shutil.rmtree(path) if folder else os.unlink(path)
        return True
    finally:
        os.close(descriptor)
