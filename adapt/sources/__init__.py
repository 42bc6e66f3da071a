"""Where frames come from: the live service, a folder of pictures, a video file, a recording (MCAP, ROS 2
bag).

    Source.get(timeout) -> Captured, or None where none came in time;  Source.finished: none will ever come
    open_source("front=drive.mp4") -> the source that fits the path; its frames are of camera "front"

Every frame names its camera, so that cameras do not mix.  A file that is damaged in the middle gives what
came before.
"""

from __future__ import annotations

from adapt.sources.base import Captured, FileSource, Source, SourceError
from adapt.sources.open import open_source

__all__ = ["Captured", "FileSource", "Source", "SourceError", "open_source"]
