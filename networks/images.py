"""Pictures from other programs as arrays: one reader, which refuses damaged, endless and huge files.

Knows files and arrays; nothing of packs or frames' meaning.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.text import one_line

#: Pixels of a picture or frame at most: 8192x8192.  A few bytes of PNG can promise any number.
MOST_PIXELS = 1 << 26
_ORIENTATION = 0x0112  # EXIF's tag, and what undoes each of its values (EXIF 2.32, 4.6.4 A)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: What Pillow raises for damaged files, by format.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """A file that is no picture one could use; the message is one line."""


def upright(image: Image.Image) -> Image.Image:
    """Decode a picture and turn it as its EXIF orientation asks.  Raises what Pillow raises."""
    image.load()  # a cut-off file raises here, whatever its mode
    with contextlib.suppress(Exception):  # EXIF that is absent or damaged asks for nothing
        image = image.transpose(_TURNS[image.getexif()[_ORIENTATION]])
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in mode RGB, 8 bits a channel, the way up that its EXIF orientation asks for.

    Grey values of 16 bits are scaled by their depth: 65535 becomes 255.  Transparency is dropped.

    Raises ValueError for depths whose white is not known (32-bit integers, floating point), and for 16-bit
    grey without a value over 4095: those are 10 or 12 bits in a file of 16, and would come out as black.
    """
    form = image.format
    image = upright(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and form == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        most = int(values.max(initial=0))
        if 0 < most < 4096:
            raise ValueError(
                f"16-bit grey whose largest value is {most} of 65535: scale its values to 16 bits first"
            )
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no known white: convert it to 8 or 16 bits a channel")
    return image.convert("RGB")


def read_image(file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a picture as uint8 [H,W,3] RGB, resized to (height, width) `size` if given.  Raises ImageError."""
    try:
        if not file.is_file():
            raise ValueError("it is no plain file")
        # Pillow warns of large pictures and goes on; here they are refused.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(file)
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {MOST_PIXELS} are read")
            rgb = to_rgb(image)
    except _BROKEN as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if unknown else one_line(error)
        raise ImageError(f"{str(file)!r} cannot be read as an image: {reason}") from error
    if size is not None and rgb.size != (size[1], size[0]):
        rgb = rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(rgb)
