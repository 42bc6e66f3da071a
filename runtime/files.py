"""Small files that a person names: configuration, certificates, keys, tokens."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

LARGEST = 4 << 20  # bytes; a chain of certificates has a few thousand


def read(path: Path | str, limit: int = LARGEST) -> bytes:
    """The content of a plain file; symbolic links are followed.

    Raises OSError, with `strerror` and `filename` set, for what cannot be opened, for a pipe, a socket or a
    device (a reader of one may wait for ever), and for a file of more than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            what = "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise OSError(errno.EINVAL, f"is {what}, and a plain file belongs there", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit} bytes", str(path))
    return content
