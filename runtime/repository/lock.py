"""One server for one repository: two would overwrite each other's live.json.

A lock on the directory itself: no file is left behind, a read-only medium can be locked, and a server that is
killed lets go of it.  Knows directories only; publishing does not need the lock.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import weakref
from pathlib import Path

from runtime.errors import ConfigError

log = logging.getLogger("roadworthy.repository")


class RepositoryLock:
    """Holds the lock until `release`, or until it is forgotten."""

    def __init__(self, descriptor: int) -> None:
        self._end = weakref.finalize(self, os.close, descriptor)

    @classmethod
    def acquire(cls, path: Path) -> RepositoryLock:
        """Raises ConfigError (thing, reason, remedy) when another server has it."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(descriptor)
                raise ConfigError(
                    f"repository {str(path)!r} is served by another server{holder}; stop that one, "
                    "or look at what is live with --read-only"
                ) from None
            # A file system without locks (some network mounts): better served than refused.
            log.warning("%s cannot be locked (%s); see that no second server uses it", path, error.strerror)
        return cls(descriptor)

    def release(self) -> None:
        self._end()


def _holder(descriptor: int) -> str:
    """ " (process N)" where the kernel says who holds the lock."""
    status = os.fstat(descriptor)
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if len(words) > 5 and words[1] == "FLOCK" and words[5] == wanted:
                return f" (process {words[4]})"
    except OSError:
        pass
    return ""
