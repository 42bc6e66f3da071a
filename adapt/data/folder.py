"""A plain folder of pictures, with labels or without: the set anyone can make.

PATH/*.png|jpg                       frames alone, or
PATH/frames/*.png|jpg  PATH/labels/NAME.png    (images/ is understood too)
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from adapt.data.base import DataError, read_frame
from adapt.data.reading import Problem, Reading

__all__ = ["Folder"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class Folder:
    """Frames in name order; the label of NAME.jpg is labels/NAME.png if that exists (labels=False: none).

    Suffixes may be written in capitals; files whose name begins with a dot are no part of the set.

    Raises:
        DataError: no such folder, no picture in it, a label whose picture is missing, or a label that is no
            PNG.  If `reading` collects, the last two are noted in `problems`.
    """

    hint = "half unpacked? expected frames/NAME.png|jpg and labels/NAME.png"

    def __init__(
        self, path: str | os.PathLike[str], *, labels: bool = True, reading: Reading | None = None
    ) -> None:
        self.root, self.labels, self.reading = Path(path), labels, reading or Reading()
        self.problems: list[Problem] = []
        if not self.root.is_dir():
            raise DataError(
                f"there is no folder {self.root}; expected pictures in it, or frames/ and labels/"
            )
        frames = next((self.root / d for d in ("frames", "images") if (self.root / d).is_dir()), self.root)
        self.images = _pictures(frames)
        if not self.images:
            raise DataError(f"{frames} holds no picture ({', '.join(sorted(_SUFFIXES))})")
        stems = [p.stem for p in self.images]
        twice = _twice(stems)
        if twice is not None:
            raise DataError(f"{frames} has two pictures called {twice}: their label would be the same file")
        self._label: dict[str, Path] = {}
        if labels and (self.root / "labels").is_dir():
            self._find_labels(set(stems))

    def _find_labels(self, known: set[str]) -> None:
        found = _pictures(self.root / "labels")
        pngs = [p for p in found if p.suffix.lower() == ".png"]
        twice = _twice([p.stem for p in pngs])
        if twice is not None:
            raise DataError(f"{self.root}/labels has two labels called {twice}: take one of them away")
        self._label = {p.stem: p for p in pngs}
        alone = [p for p in pngs if p.stem not in known]
        lossy = [p for p in found if p.stem not in self._label]
        if not self.reading.collect and alone:
            raise DataError(
                f"{self.root}/labels has {len(alone)} labels without a picture, first {alone[0].name}: "
                f"{self.hint}"
            )
        if not self.reading.collect and lossy:
            raise DataError(f"{lossy[0]} is no PNG: a label is a PNG of class indices")
        self.problems += [(p.stem, f"label {p.name} has no picture") for p in alone]
        self.problems += [(p.stem, f"label {p.name} is no PNG") for p in lossy]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        frame = read_frame(self.images[i])
        path = self._label.get(self.images[i].stem)
        if path is None:
            return frame, None
        label = self.reading.label(path)
        if label.shape != frame.shape[:2]:
            raise DataError(f"{path} is {label.shape}, its frame {frame.shape[:2]}: resize one of them")
        return frame, label

    def name(self, i: int) -> str:
        return self.images[i].stem


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES and p.name[0] != ".")


def _twice(stems: list[str]) -> str | None:
    seen: set[str] = set()
    return next((stem for stem in stems if stem in seen or seen.add(stem)), None)  # type: ignore[func-returns-value]
