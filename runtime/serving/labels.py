"""The labels of a model's outputs: the files that config.pbtxt names as `label_filename`.

A file belongs to the model, not to a version, and publishing replaces it; it is read again when it has
changed.  Knows files only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from runtime.repository import records

log = logging.getLogger("roadworthy.batching")
_LIMIT = 4 << 20  # bytes of a file of labels


class Labels:
    """`files`: {output: path below `home`}."""

    def __init__(self, home: Path, files: Mapping[str, str]) -> None:
        self._home = home
        self._files = {name: file for name, file in files.items() if file}
        self._read: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}

    def of(self, output: str) -> tuple[str, ...]:
        """A label for each index, one a line of the file; () where there is none, or it cannot be used."""
        file = self._files.get(output)
        if file is None:
            return ()
        try:
            status = os.stat(self._home / file)
            seen: tuple[int, ...] = (status.st_ino, status.st_size, status.st_mtime_ns)
        except (OSError, ValueError):
            seen = ()
        known = self._read.get(file)
        if known is None or known[0] != seen:
            known = self._read[file] = (seen, self._lines(file))
        return known[1]

    def _lines(self, file: str) -> tuple[str, ...]:
        path = PurePosixPath(file)
        try:
            if path.is_absolute() or ".." in path.parts:
                raise OSError("it is outside the model's directory")
            text = records.read(self._home / path, _LIMIT).decode(errors="replace")
        except (OSError, ValueError) as error:
            log.warning("%s: labels are not used: %s", self._home / file, error)
            return ()
        return tuple(text.splitlines())
