"""Files read within bounds, and files that appear whole or not at all.  Knows nothing of what is in them."""

from __future__ import annotations

import os
from pathlib import Path

from export.errors import ExportError

#: Bytes of an ONNX file at most: what protobuf can hold.
LARGEST_FILE = (2 << 30) - 1


def write_whole(path: Path, content: bytes) -> None:
    """Written beside its place and renamed.  Raises: OSError; nothing is left behind then."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_file(path: Path, what: str = "an ONNX file", largest: int = LARGEST_FILE) -> bytes:
    """The bytes of `what`.  Raises: ExportError for what cannot be one."""
    try:
        if not path.is_file():  # a pipe or device would be read for ever
            raise ExportError(f"{str(path)!r} " + ("is no plain file" if path.exists() else "does not exist"))
        if path.stat().st_size > largest:
            raise ExportError(f"{str(path)!r} has more than {largest >> 20} MiB, too many for {what}")
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
