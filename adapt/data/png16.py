"""16-bit PNG with several channels, which Pillow reduces to 8 bit: read as they are (PNG specification)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from networks.images import MOST_PIXELS

__all__ = ["read_png16"]

_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}


def read_png16(path: Path) -> np.ndarray:
    """uint16 [H,W,channels] of a non-interlaced 16-bit PNG.  Raises ValueError for any other."""
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("no PNG")
    position, packed, header = 8, bytearray(), None
    while position + 8 <= len(data):
        (length,), kind = (
            struct.unpack(">I", data[position : position + 4]),
            data[position + 4 : position + 8],
        )
        body = data[position + 8 : position + 8 + length]
        if kind == b"IHDR":
            header = struct.unpack(">IIBBBBB", body)
        elif kind == b"IDAT":
            packed += body
        position += 12 + length
    if header is None:
        raise ValueError("no header")
    width, height, depth, colour, _, _, interlace = header
    if depth != 16 or colour not in _CHANNELS or interlace:
        raise ValueError(f"{depth} bit, colour type {colour}: only plain 16-bit PNG")
    channels = _CHANNELS[colour]
    stride = width * channels * 2
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels, at most {MOST_PIXELS} are read")
    try:
        wanted = height * (stride + 1)  # and no more: a few bytes may unpack to any number
        raw = np.frombuffer(zlib.decompressobj().decompress(bytes(packed), wanted + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from error
    if raw.size != height * (stride + 1):
        raise ValueError("truncated")
    rows = raw.reshape(height, stride + 1)
    out = np.zeros((height, stride), np.uint8)
    before = np.zeros(stride, np.int32)
    step = channels * 2
    for y in range(height):
        before = _unfilter(int(rows[y, 0]), rows[y, 1:].astype(np.int32), before, step)
        out[y] = before
    return np.asarray(out.reshape(height, width, channels, 2).view(">u2")[..., 0], np.uint16)


def _unfilter(kind: int, line: np.ndarray, above: np.ndarray, step: int) -> np.ndarray:
    if kind == 0:
        return line
    if kind == 2:
        return np.asarray((line + above) & 255)
    out = line.copy()
    if kind == 1:
        columns = out.reshape(-1, step)
        return np.asarray(np.cumsum(columns, axis=0) & 255).reshape(-1)
    for i in range(len(out)):
        left = out[i - step] if i >= step else 0
        if kind == 3:
            guess = (left + above[i]) // 2
        else:
            corner = above[i - step] if i >= step else 0
            p = left + above[i] - corner
            near = (abs(p - left), abs(p - above[i]), abs(p - corner))
            guess = (left, above[i], corner)[near.index(min(near))]
        out[i] = (out[i] + guess) & 255
    return out
