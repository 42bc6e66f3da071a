"""The name and the lock of the segments that our own client makes in /dev/shm.

The client locks a segment as long as it lives.  A segment without a lock has lost its owner, and any process
may delete it.  Knows files only, so that the client needs nothing else of the server's package.
"""

from __future__ import annotations

import fcntl
import os
import uuid

DIRECTORY = "/dev/shm"
PREFIX = "roadworthy-lane-"


def new_name() -> str:
    """Returns a name for a new segment of this process."""
    return f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex}"


def is_segment(name: str) -> bool:
    """True if a file of that name in /dev/shm is a segment of our client."""
    return name.startswith(PREFIX)


def own(descriptor: int) -> None:
    """Locks a segment for its owner, until the descriptor is closed.  Raises OSError."""
    fcntl.flock(descriptor, fcntl.LOCK_SH)


def is_abandoned(descriptor: int) -> bool:
    """True if no process owns the segment."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True
