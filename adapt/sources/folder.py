"""A folder of pictures (PNG, JPEG …) as a camera: in order of their names, at the times of their files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from adapt.data.base import DataError, read_frame
from adapt.sources.base import Captured, SourceError

__all__ = ["frames_of_folder"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def frames_of_folder(path: Path, camera: str) -> Iterator[Captured]:
    """Frames of its pictures; one that cannot be read is named on standard error and left out.

    Raises SourceError where there is no picture.
    """
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.is_file())
    if not files:
        raise SourceError(f"folder {path} holds no picture ({', '.join(PICTURES)})")
    return _read(files, camera)


def _read(files: list[Path], camera: str) -> Iterator[Captured]:
    for file in files:
        try:
            frame = read_frame(file)
            captured = Captured(frame, file.stat().st_mtime, camera)
        except (DataError, OSError) as error:
            print(f"picture {file} is left out: {' '.join(str(error).split())[:200]}", file=sys.stderr)
            continue
        yield captured
