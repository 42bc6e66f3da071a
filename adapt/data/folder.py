"""A plain folder of pictures, with labels or without: the set anyone can make.

PATH/*.png|jpg                       frames alone, or
PATH/frames/*.png|jpg  PATH/labels/NAME.png    (images/ is understood too)
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from adapt.data.base import DataError, read_frame, read_label

__all__ = ["Folder"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class Folder:
    """Frames in name order; the label of NAME.jpg is labels/NAME.png where that exists (labels=False: none).

    Raises:
        DataError: no such folder, no picture in it, or a label whose picture is missing.
    """

    def __init__(self, path: str | os.PathLike[str], *, labels: bool = True) -> None:
        self.root, self.labels = Path(path), labels
        if not self.root.is_dir():
            raise DataError(
                f"there is no folder {self.root}; expected pictures in it, or frames/ and labels/"
            )
        frames = next((self.root / d for d in ("frames", "images") if (self.root / d).is_dir()), self.root)
        self.images = sorted(p for p in frames.iterdir() if p.suffix.lower() in _SUFFIXES)
        if not self.images:
            raise DataError(f"{frames} holds no picture ({', '.join(sorted(_SUFFIXES))})")
        stems = [p.stem for p in self.images]
        if len(set(stems)) != len(stems):
            twice = next(s for s in stems if stems.count(s) > 1)
            raise DataError(f"{frames} has two pictures called {twice}: their label would be the same file")
        known = set(stems)
        found = sorted((self.root / "labels").glob("*.png")) if labels else []
        alone = [p.name for p in found if p.stem not in known]
        if alone:
            raise DataError(
                f"{self.root}/labels has {len(alone)} labels without a picture, first {alone[0]}: "
                "half unpacked? expected frames/NAME.png|jpg and labels/NAME.png"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        frame = read_frame(self.images[i])
        path = self.root / "labels" / f"{self.images[i].stem}.png"
        if not self.labels or not path.is_file():
            return frame, None
        label = read_label(path)
        if label.shape != frame.shape[:2]:
            raise DataError(f"{path} is {label.shape}, its frame {frame.shape[:2]}: resize one of them")
        return frame, label

    def name(self, i: int) -> str:
        return self.images[i].stem
