"""What a data set is, and the few things done to any of them: resize, remap, take a part, describe by text.

A data set is a sequence of (frame, label); ``open_dataset("camvid:ROOT:dusk_eval")`` finds one from the
text a command line gives.  No network, no training in here.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image

from networks.images import to_rgb, upright

__all__ = [
    "BROKEN",
    "DataError",
    "Dataset",
    "InMemory",
    "Mapped",
    "Resized",
    "Subset",
    "Unlabelled",
    "digest",
    "iterate",
    "picture",
    "read_frame",
    "read_label",
    "refuse_overlap",
    "resize_frame",
    "resize_label",
]

IGNORE = 255
# What Pillow raises for files that are cut off, are no pictures or claim to be enormous.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataError(Exception):
    """A data set is missing, half unpacked or not what it claims.  One line: thing, reason, remedy.

    remedy: what to do, if many such errors are listed together and it is to be said once.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason}: {remedy}" if remedy else reason)
        self.reason, self.remedy = reason, remedy


@runtime_checkable
class Dataset(Protocol):
    """A sequence of frames, labelled or not."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> tuple[np.ndarray, np.ndarray | None]:
        """(frame uint8 [H,W,3] RGB, label uint8 [H,W] with 255 = ignore, or None where there is none)."""
        ...

    def name(self, i: int) -> str:
        """The frame's name, unique in the set."""
        ...


@contextlib.contextmanager
def picture(path: Path) -> Iterator[Image.Image]:
    """An image file, open.  Raises DataError for what is missing, no plain file, or damaged when it is read.

    A pipe in place of a file would be waited for without end.
    """
    try:
        if not path.is_file():
            if path.exists():
                raise DataError(f"{path} is no plain file: put a picture in its place")
            raise FileNotFoundError
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise DataError(f"{path} is missing: is the set unpacked completely?") from None
    except BROKEN as error:
        raise DataError(f"{path} is no readable image ({error}): unpack the set again") from error


def read_frame(path: Path) -> np.ndarray:
    """uint8 [H,W,3] RGB of an image file, scaled and turned as `networks.images.to_rgb` does.

    Raises DataError.
    """
    with picture(path) as image:
        return np.asarray(to_rgb(image))


def read_label(path: Path) -> np.ndarray:
    """uint8 [H,W] of a single-channel 8-bit (or palette) PNG of class indices.  Raises DataError."""
    with picture(path) as image:
        if image.mode not in ("L", "P"):
            remedy = "; for colours give --palette" if image.mode in ("RGB", "RGBA") else ""
            raise DataError(
                f"{path} has mode {image.mode}", f"a label is one 8-bit channel of class indices{remedy}"
            )
        return np.asarray(upright(image))


def resize_frame(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3] at `size` (H, W), bilinear (with area averaging when shrinking)."""
    if frame.shape[:2] == tuple(size):
        return frame
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W] at `size` (H, W), nearest."""
    if label.shape == tuple(size):
        return label
    return np.asarray(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))


class Resized:
    """Another set with every frame (and label) at one size (H, W)."""

    def __init__(self, dataset: Dataset, size: tuple[int, int], *, labels: bool = True) -> None:
        self.dataset, self.size, self.labels = dataset, (int(size[0]), int(size[1])), labels

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        frame, label = self.dataset[i]
        if label is not None and self.labels:
            label = resize_label(label, self.size)
        return resize_frame(frame, self.size), label

    def name(self, i: int) -> str:
        return self.dataset.name(i)


class Mapped:
    """Another set with its labels looked up in a table uint8 [256] (`networks.labels.mapping`)."""

    def __init__(self, dataset: Dataset, table: np.ndarray) -> None:
        if table.shape != (256,):
            raise DataError(f"a label map has 256 entries, this one {table.shape}")
        self.dataset, self.table = dataset, table.astype(np.uint8)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        frame, label = self.dataset[i]
        return frame, None if label is None else self.table[label]

    def name(self, i: int) -> str:
        return self.dataset.name(i)


class InMemory:
    """Pairs (frame uint8 [H,W,3], label uint8 [H,W]) that are read already, as a data set."""

    def __init__(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.pairs[i]

    def name(self, i: int) -> str:
        return f"number {i}"


class Unlabelled:
    """Another set without its labels."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.dataset[i][0], None

    def name(self, i: int) -> str:
        return self.dataset.name(i)


class Subset:
    """Chosen frames of another set, in the order given."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, [int(i) for i in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.dataset[self.indices[i]]

    def name(self, i: int) -> str:
        return self.dataset.name(self.indices[i])


def iterate(dataset: Dataset) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
    """(name, frame, label) one after the other."""
    for i in range(len(dataset)):
        frame, label = dataset[i]
        yield dataset.name(i), frame, label


def digest(dataset: Dataset, i: int) -> bytes:
    """SHA-256 of frame i's pixels; a set that has noted them (`adapt.data.pairs`) is not read again."""
    noted = getattr(dataset, "digests", None)
    if noted:
        return bytes(noted[i])
    return hashlib.sha256(np.ascontiguousarray(dataset[i][0]).tobytes()).digest()


def refuse_overlap(train: Dataset, evaluation: Dataset) -> None:
    """Adapting on what one is scored on proves nothing: raise DataError where a frame is in both sets.

    Frames are compared by content (after decoding), so that a renamed copy is found.
    """

    held = {digest(evaluation, i): evaluation.name(i) for i in range(len(evaluation))}
    for i in range(len(train)):
        twin = held.get(digest(train, i))
        if twin is not None:
            raise DataError(
                f"frame {train.name(i)} is also the evaluation frame {twin}: take it out of one of the sets"
            )
