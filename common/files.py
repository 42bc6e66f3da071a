"""Files that are complete or absent whenever a process is killed, and files read within a bound.

    read_file       the bytes of a plain file of bounded size
    read_json       the content of a JSON record of bounded size
    replace_file    a context manager: write beside the path, then rename over it
    write_bytes, write_json
    sync            make a file or the names in a directory durable

This module knows nothing of what the files contain.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_JSON_BYTES",
    "read_file",
    "read_json",
    "replace_file",
    "sync",
    "sync_tree",
    "write_bytes",
    "write_json",
]

#: Bytes of a file that a person names (configuration, certificate, key, token): a chain has a few thousand.
MAX_FILE_BYTES = 4 << 20
#: Bytes of a JSON record: the largest that the project writes has a few MB.
MAX_JSON_BYTES = 64 << 20


def read_file(path: Path | str, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return the content of a plain file.  Symbolic links are followed.

    Raises:
        OSError: the file cannot be opened; it is a pipe, a socket or a device, from which a reader may wait
            for ever; or it has more than `limit` bytes.  `strerror` and `filename` are set.
    """
    with _open_without_waiting(path) as file:
        mode = os.fstat(file.fileno()).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            what = "a pipe" if stat.S_ISFIFO(mode) else "a device"
            raise OSError(errno.EINVAL, f"is {what}, and a plain file belongs there", str(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"has more than {limit} bytes", str(path))
    return content


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the content of a JSON record.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: the file is not a plain file, has more than `limit` bytes, is not UTF-8 JSON, is nested
            too deep, contains a number that is too long, or contains half of a character (a lone surrogate).
    """
    with _open_without_waiting(path) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no plain file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size} bytes, at most {limit} are read")
        content = file.read(limit + 1)
    try:
        value = json.loads(content.decode("utf-8"))
        if b"\\u" in content:  # only an escape can contain half of a character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character") from None
    return value


def _open_without_waiting(path: Path | str) -> BinaryIO:
    # Opening a pipe that no process writes to waits for ever without O_NONBLOCK.
    return open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


@contextlib.contextmanager
def replace_file(
    path: Path, *, durable: bool = True, durable_name: bool = False, temporary: Path | None = None
) -> Iterator[BinaryIO]:
    """Open a temporary file to write into; at the end of the block, rename it to `path`.

    If the block raises, `path` keeps its old content and the temporary file is removed.

    Args:
        durable: fsync the content before the rename, so that `path` is complete after a power cut too.
        durable_name: fsync the directory after the rename, so that the new content survives a power cut.
        temporary: the file to write first, in the same directory; default: `.NAME.PID.tmp`.
    """
    if temporary is None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable_name:
        sync(path.parent)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Replace `path` by `content` atomically; see `replace_file`.  Raises OSError."""
    with replace_file(path, durable=durable) as file:
        file.write(content)


def write_json(path: Path, content: Any, *, allow_nan: bool = True) -> None:
    """Replace `path` by `content` as JSON, atomically and durably.

    Raises:
        OSError: the file cannot be written.  `path` is unchanged.
        ValueError: `content` contains NaN or infinity and `allow_nan` is False.  `path` is unchanged.
    """
    text = json.dumps(content, indent=1, allow_nan=allow_nan) + "\n"
    write_bytes(path, text.encode("utf-8"))


def sync(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable.  Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder and everything below it durable.  Raises OSError."""
    for entry in [*folder.rglob("*"), folder]:
        sync(entry)
