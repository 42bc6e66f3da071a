"""Files that are there whole or not at all, whenever a process is killed.  Knows nothing of content."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_json"]


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
