"""Files that are there whole or not at all, whenever a process is killed.  Knows nothing of content."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

__all__ = ["MOST_BYTES", "read_json", "write_json"]

MOST_BYTES = 64 << 20  # of a record; the largest that is written holds a few MB


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """The content of a JSON record.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is no plain file, larger than `most` bytes, no UTF-8 JSON, nested too deep, holds a
            number that is too long, or half of a character (a lone surrogate).
    """
    # Not blocking: opening a pipe that nothing writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("it is no plain file")
        if about.st_size > most:
            raise ValueError(f"it has {about.st_size} bytes, at most {most} are read")
        content = file.read(most + 1)
    try:
        found = json.loads(content.decode("utf-8"))
        if b"\\u" in content:  # only an escape can hold half of a character
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a character") from None
    return found


def write_json(path: Path, content: Any, *, allow_nan: bool = True) -> None:
    """Replace `path` by `content` as JSON, atomically and durably.

    Raises ValueError for NaN or infinity where `allow_nan` is False; `path` is then as it was.
    """
    text = json.dumps(content, indent=1, allow_nan=allow_nan) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # a full disk keeps the old content and no half of the new
        temporary.unlink(missing_ok=True)
        raise
