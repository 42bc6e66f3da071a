"""Pictures from elsewhere: read as they are, or refused in one line, at once."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from networks.images import ImageError, read_image


def png(width, height):
    """A few bytes that promise width x height pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_pixels_are_the_files(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(frame).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), frame)
    assert np.array_equal(read_image(tmp_path / "a.png", (6, 8)), frame)
    assert read_image(tmp_path / "a.png", (12, 4)).shape == (12, 4, 3)
    Image.fromarray(frame[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(frame[..., :1], 3, 2))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no known format"),
        (b"nonsense", "no known format"),
        (png(60000, 60000), "could be decompression bomb"),  # Pillow's own limit
        (png(12000, 12000), "12000x12000 pixels, at most"),  # Pillow only warns
        (png(64, 64), "truncated"),
        (png(64, 64)[:40], "cannot be read as an image"),
        (png(64, 64)[:45] + b"junk" * 9, "broken PNG|truncated|cannot be read"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(ImageError, match="no plain file"):
            read_image(tmp_path / name)
