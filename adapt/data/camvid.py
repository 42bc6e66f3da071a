"""CamVid in the 11-class, 480×360 form most papers use: driving frames by sequence, by day and at dusk.

Layout expected under the root:

    images/NAME.jpg (or .png)      labels/NAME.png     LIST.txt: one NAME a line

Labels: 0 sky 1 building 2 pole 3 road 4 sidewalk 5 tree 6 sign 7 fence 8 car 9 pedestrian 10 bicyclist,
255 void.  A frame without a label file is unlabelled, which is what adaptation wants.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from adapt.data.base import DataError, read_frame
from adapt.data.reading import Problem, Reading

__all__ = ["CLASSES", "CamVid"]

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "sidewalk",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)

_LAYOUT = "expected images/NAME.jpg, labels/NAME.png and {list}.txt (one NAME a line) under the root"


class CamVid:
    """The frames a list names.

    Args:
        root: the folder with images/, labels/ and the lists.
        list_name: the list without ".txt", such as "day_train".
        labels: False reads no label even where there is one (adaptation must not see them).
        reading: how labels are read; if it collects, missing images are noted in `problems`.

    Raises:
        DataError: root, list or a listed image is missing.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        list_name: str,
        *,
        labels: bool = True,
        reading: Reading | None = None,
    ) -> None:
        self.root, self.list_name, self.labels = Path(root), list_name, labels
        self.reading = reading or Reading()
        self.problems: list[Problem] = []
        layout = _LAYOUT.format(list=list_name)
        self.hint = f"half unpacked? {layout}"
        if not self.root.is_dir():
            raise DataError(f"CamVid: there is no folder {self.root}; {layout}")
        listing = self.root / f"{list_name}.txt"
        if not listing.is_file():
            found = ", ".join(sorted(p.stem for p in self.root.glob("*.txt"))) or "none"
            raise DataError(f"CamVid: there is no list {listing} (found: {found}); {layout}")
        try:
            self.names = listing.read_text(encoding="utf-8").split()
        except UnicodeDecodeError:
            raise DataError(f"CamVid: the list {listing} is no UTF-8 text; {layout}") from None
        if not self.names:
            raise DataError(f"CamVid: the list {listing} is empty; {layout}")
        places = {name: self._image(name) for name in self.names}
        missing = [name for name, path in places.items() if path is None]
        if missing and not self.reading.collect:
            raise DataError(f"CamVid: {self.root}/images has no {missing[0]}.jpg or .png: {self.hint}")
        self.problems += [(name, "images/ has no such .jpg or .png") for name in missing]
        self.names = [name for name in self.names if places[name] is not None]
        self.images = [path for name in self.names if (path := places[name]) is not None]

    def _image(self, name: str) -> Path | None:
        for suffix in (".jpg", ".png"):
            path = self.root / "images" / f"{name}{suffix}"
            if path.is_file():
                return path
        return None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        frame = read_frame(self.images[i])
        path = self.root / "labels" / f"{self.names[i]}.png"
        if not self.labels or not path.is_file():
            return frame, None
        label = self.reading.label(path)
        if label.shape != frame.shape[:2]:
            raise DataError(
                f"CamVid: {path} is {label.shape}, its frame {frame.shape[:2]}: two versions mixed?"
            )
        return frame, label

    def name(self, i: int) -> str:
        return self.names[i]
