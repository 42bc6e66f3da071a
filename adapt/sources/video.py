"""A video file as a camera, through PyAV (extra "video"); times are the file's own plus those of its
pictures.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from adapt.sources.base import Captured, SourceError

__all__ = ["frames_of_video"]


def frames_of_video(path: Path, camera: str) -> Iterator[Captured]:
    """Frames of its first video stream.  What is damaged ends it, with a line on standard error.

    Raises SourceError: PyAV is not installed, or this is no video.
    """
    try:
        import av
    except ImportError as error:
        raise SourceError("video files need PyAV: pip install 'roadworthy[video]'") from error
    try:
        container = av.open(str(path))
    except (OSError, ValueError) as error:  # av's errors are both
        raise SourceError(f"video {path} cannot be opened ({_line(error)}): is it a video?") from error
    if not container.streams.video:
        container.close()
        raise SourceError(f"video {path} has no video stream")
    return _read(container, path, camera)


def _read(container: object, path: Path, camera: str) -> Iterator[Captured]:
    begin = path.stat().st_mtime
    count = 0
    with container:  # type: ignore[attr-defined]
        try:
            stream = container.streams.video[0]  # type: ignore[attr-defined]
            rate = float(stream.average_rate or 25.0)
            for picture in container.decode(stream):  # type: ignore[attr-defined]
                at = picture.time if picture.time is not None else count / rate
                count += 1
                yield Captured(np.ascontiguousarray(picture.to_ndarray(format="rgb24")), begin + at, camera)
        except (OSError, ValueError) as error:
            print(f"video {path} ends after {count} frames: {_line(error)}", file=sys.stderr)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
