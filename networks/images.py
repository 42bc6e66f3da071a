"""Pictures from elsewhere as arrays: one reader, which refuses what is damaged, endless or absurdly large.

Knows files and arrays; nothing of packs or frames' meaning.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

#: Pixels of a picture or frame at most: 8192x8192.  A few bytes of PNG can promise any number.
MOST_PIXELS = 1 << 26
#: What Pillow raises for damaged files, by format.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class ImageError(ValueError):
    """A file that is no picture one could use; the message is one line."""


def read_image(file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 [H,W,3] RGB, enlarged or reduced to (height, width) `size` if given.  Raises: ImageError."""
    try:
        if not file.is_file():
            raise ValueError("it is no plain file")
        # Pillow warns of large pictures and goes on; here they are refused.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(file)
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels, at most {MOST_PIXELS} are read")
            rgb = image.convert("RGB")
    except _BROKEN as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if unknown else " ".join(str(error).split())
        raise ImageError(f"{str(file)!r} cannot be read as an image: {reason}") from error
    if size is not None and rgb.size != (size[1], size[0]):
        rgb = rgb.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(rgb)
