"""Opens the source that fits a path."""

from __future__ import annotations

from pathlib import Path

from adapt.sources.base import FileSource, SourceError, camera_name

__all__ = ["open_source"]

VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".ts", ".mpg", ".mpeg", ".h264", ".hevc")


def open_source(text: str, *, max_fps: float = 0.0, skip: int = 0) -> FileSource:
    """``[CAMERA=]PATH``: a folder of pictures, a video, or a recording.

    A recording takes ``PATH#TOPIC`` where it holds several cameras' topics.  Without a name the camera is
    called after the file (and the topic).

    Raises:
        SourceError: there is no such path, nobody reads its kind, or the library that does is not installed.
    """
    name, equals, rest = text.partition("=")
    if not equals or "/" in name or Path(text).exists():
        name, rest = "", text
    topic = ""
    path = Path(rest)
    if not path.exists() and "#" in rest:
        rest, _, topic = rest.rpartition("#")
        path = Path(rest)
    if not path.exists():
        raise SourceError(f"source {rest!r} is not there: give a folder, a video or a recording")
    camera = name or camera_name(path.stem)
    if path.is_dir() and any(path.glob("*.mcap")):
        from adapt.sources.bag import frames_of_bag

        return FileSource(
            path, frames_of_bag(sorted(path.glob("*.mcap")), name, topic), max_fps=max_fps, skip=skip
        )
    if path.is_dir():
        from adapt.sources.folder import frames_of_folder

        return FileSource(path, frames_of_folder(path, camera), skip=skip)
    if path.suffix.lower() == ".mcap":
        from adapt.sources.bag import frames_of_bag

        return FileSource(path, frames_of_bag([path], name, topic), max_fps=max_fps, skip=skip)
    if path.suffix.lower() in VIDEOS:
        from adapt.sources.video import frames_of_video

        return FileSource(path, frames_of_video(path, camera), max_fps=max_fps, skip=skip)
    if path.suffix.lower() == ".db3":
        raise SourceError(
            f"source {path} is a ROS 2 bag in SQLite: convert it with `ros2 bag convert` to MCAP"
        )
    raise SourceError(
        f"source {path}: nobody reads {path.suffix or 'such'} files; give a folder, a video or .mcap"
    )
