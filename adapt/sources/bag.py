"""A recording in MCAP (also a ROS 2 bag in MCAP) as cameras, through `mcap` and `mcap-ros2-support` (extra
"ros").

sensor_msgs/msg/Image (rgb8, bgr8, rgba8, bgra8, mono8) and sensor_msgs/msg/CompressedImage (JPEG, PNG).
Every image topic is a camera of its own, called after the topic.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from adapt.data.base import BROKEN
from adapt.sources.base import Captured, SourceError, camera_name
from networks.images import to_rgb

__all__ = ["frames_of_bag"]

IMAGE = ("sensor_msgs/msg/Image", "sensor_msgs/Image")
COMPRESSED = ("sensor_msgs/msg/CompressedImage", "sensor_msgs/CompressedImage")
CHANNELS = {"rgb8": 3, "bgr8": 3, "rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1, "8UC3": 3}


def frames_of_bag(files: Sequence[Path], camera: str = "", topic: str = "") -> Iterator[Captured]:
    """Frames of the recording's image topics, in order of their log time; only of `topic` where one is given.

    camera: the name of the one camera, or "" = after the topics.

    Raises:
        SourceError: the libraries are not installed, this is no MCAP file, it holds no (such) image topic, or
        several
            topics are to be one camera.
    """
    try:
        from mcap.reader import make_reader
        from mcap_ros2.decoder import DecoderFactory
    except ImportError as error:
        raise SourceError(f"recordings need {error.name}: pip install 'roadworthy[ros]'") from error
    topics: set[str] = set()
    for file in files:
        try:
            with open(file, "rb") as stream:
                summary = make_reader(stream).get_summary()
        except (
            Exception
        ) as error:  # mcap's own errors, struct's, OSError: whatever a damaged file brings about
            raise SourceError(
                f"recording {file} cannot be read ({_line(error)}): is it complete MCAP?"
            ) from error
        if summary is None:
            raise SourceError(f"recording {file} has no summary: mend it with `mcap recover`")
        for channel in summary.channels.values():
            schema = summary.schemas.get(channel.schema_id)
            if schema is not None and schema.name in (*IMAGE, *COMPRESSED):
                topics.add(channel.topic)
    if topic:
        if topic not in topics:
            raise SourceError(f"recording {files[0]} has no image topic {topic!r}: it has {_listed(topics)}")
        topics = {topic}
    if not topics:
        raise SourceError(f"recording {files[0]} holds no sensor_msgs Image or CompressedImage topic")
    if camera and len(topics) > 1:
        raise SourceError(
            f"recording {files[0]} has {_listed(topics)}: choose one with PATH#TOPIC to call it {camera}"
        )
    return _read(files, sorted(topics), camera, make_reader, DecoderFactory)


def _read(
    files: Sequence[Path], topics: list[str], camera: str, reader: Any, factory: Any
) -> Iterator[Captured]:
    for file in files:
        count = 0
        try:
            with open(file, "rb") as stream:
                decoded = reader(stream, decoder_factories=[factory()]).iter_decoded_messages(topics=topics)
                for schema, channel, message, content in decoded:
                    frame = _picture(schema.name, content)
                    if frame is None:
                        continue
                    count += 1
                    name = camera or camera_name(channel.topic)
                    yield Captured(frame, message.log_time / 1e9, name)
        except SourceError:
            raise
        except Exception as error:  # see above
            print(f"recording {file} ends after {count} frames: {_line(error)}", file=sys.stderr)


def _picture(kind: str, message: Any) -> np.ndarray | None:
    """uint8 [H,W,3] RGB, or None for one that cannot be read."""
    data = bytes(message.data)
    if kind in COMPRESSED:
        try:
            with Image.open(io.BytesIO(data)) as image:
                return np.asarray(to_rgb(image))
        except BROKEN:
            return None
    channels = CHANNELS.get(message.encoding)
    height, width, step = int(message.height), int(message.width), int(message.step)
    if channels is None:
        raise SourceError(f"images in {message.encoding!r} are not read: {', '.join(CHANNELS)} are")
    if height < 1 or width < 1 or step < width * channels or len(data) < height * step:
        return None
    rows = np.frombuffer(data, np.uint8, height * step).reshape(height, step)[:, : width * channels]
    pixels = rows.reshape(height, width, channels)
    if channels == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    pixels = pixels[..., :3]
    return np.ascontiguousarray(
        pixels[..., ::-1] if message.encoding in ("bgr8", "bgra8", "8UC3") else pixels
    )


def _listed(topics: set[str]) -> str:
    return ", ".join(sorted(topics)) or "none"


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
