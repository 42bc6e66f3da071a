"""Readers of the published driving sets, each as its authors unpack it, labels in Cityscapes' 19 trainIds.

    cityscapes:ROOT:SPLIT       acdc:ROOT:CONDITION/SPLIT     darkzurich:ROOT:SPLIT
    gta5:ROOT                   synthia:ROOT                  bdd100k:ROOT:SPLIT

`SETS` says where each keeps its files.  Splits that are published without labels are unlabelled; elsewhere a
missing label means a half unpacked set and is an error that names the layout.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapt.data.base import DataError, picture, read_frame, read_label
from adapt.data.reading import Problem, Reading

__all__ = ["SETS", "Driving", "Layout"]

# Cityscapes' labelIds -> trainIds (its own table of labels); GTA5, ACDC and Dark Zurich use the same ids.
CITYSCAPES_IDS = {
    7: 0,
    8: 1,
    11: 2,
    12: 3,
    13: 4,
    17: 5,
    19: 6,
    20: 7,
    21: 8,
    22: 9,
    23: 10,
    24: 11,
    25: 12,
    26: 13,
    27: 14,
    28: 15,
    31: 16,
    32: 17,
    33: 18,
}
MOST_ID = 34  # GTA5's licence plate
# SYNTHIA (RAND-CITYSCAPES) has no truck, train and terrain in the protocol of 16 classes.
SYNTHIA_IDS = {
    3: 0,
    4: 1,
    2: 2,
    21: 3,
    5: 4,
    7: 5,
    15: 6,
    9: 7,
    6: 8,
    1: 10,
    10: 11,
    17: 12,
    8: 13,
    19: 15,
    12: 17,
    11: 18,
}


@dataclass(frozen=True)
class Layout:
    """Where a set keeps its files.

    frames: glob under the root, {split} filled in.  label: how a frame's relative path becomes its label's,
    as (text, replacement) pairs.  ids: label value -> trainId, None = they are trainIds.  unlabelled: splits
    that are published without labels.
    """

    words: str
    frames: str
    label: tuple[tuple[str, str], ...]
    ids: Mapping[int, int] | None
    needs_split: bool = True
    unlabelled: tuple[str, ...] = ()


SETS: dict[str, Layout] = {
    "cityscapes": Layout(
        "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png",
        "leftImg8bit/{split}/*/*_leftImg8bit.png",
        (("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png")),
        CITYSCAPES_IDS,
        unlabelled=("test",),
    ),
    "acdc": Layout(
        "rgb_anon/CONDITION/SPLIT/*/*_rgb_anon.png and gt/CONDITION/SPLIT/*/*_gt_labelIds.png",
        "rgb_anon/{split}/*/*_rgb_anon.png",
        (("rgb_anon/", "gt/"), ("_rgb_anon.png", "_gt_labelIds.png")),
        CITYSCAPES_IDS,
        unlabelled=("fog/test", "night/test", "rain/test", "snow/test"),
    ),
    "darkzurich": Layout(
        "rgb_anon/SPLIT/night/*/*_rgb_anon.png and gt/SPLIT/night/*/*_gt_labelIds.png",
        "rgb_anon/{split}/night/*/*_rgb_anon.png",
        (("rgb_anon/", "gt/"), ("_rgb_anon.png", "_gt_labelIds.png")),
        CITYSCAPES_IDS,
        unlabelled=("train", "test"),
    ),
    "gta5": Layout(
        "images/*.png and labels/*.png", "images/*.png", (("images/", "labels/"),), CITYSCAPES_IDS, False
    ),
    "synthia": Layout(
        "RGB/*.png and GT/LABELS/*.png (RAND_CITYSCAPES)",
        "RGB/*.png",
        (("RGB/", "GT/LABELS/"),),
        SYNTHIA_IDS,
        False,
    ),
    "bdd100k": Layout(
        "images/10k/SPLIT/*.jpg and labels/sem_seg/masks/SPLIT/*.png",
        "images/10k/{split}/*.jpg",
        (("images/10k/", "labels/sem_seg/masks/"), (".jpg", ".png")),
        None,
        unlabelled=("test",),
    ),
}


class Driving:
    """One of `SETS`.

    Args:
        kind: a key of `SETS`.
        root: the folder it was unpacked to.
        split: "train", "val" …; for ACDC "night/train" and the like; unused by GTA5 and SYNTHIA.
        labels: False reads no label.
        reading: if it collects, frames without label and labels without frame are noted in `problems`.

    Raises:
        DataError: nothing found, or labels missing where the split has them; names the expected layout.
            On reading: sizes that differ, or a value that the set's table of labels does not have.
    """

    def __init__(
        self,
        kind: str,
        root: str | os.PathLike[str],
        split: str = "",
        *,
        labels: bool = True,
        reading: Reading | None = None,
    ) -> None:
        layout = SETS[kind]
        self.kind, self.layout, self.root, self.split, self.labels = kind, layout, Path(root), split, labels
        self.reading = reading or Reading()
        self.problems: list[Problem] = []
        self.values = np.zeros(256, bool)  # label values as published that were read so far
        expected = f"expected {layout.words} under the root"
        self.hint = f"half unpacked? {expected}"
        if layout.needs_split and not split:
            raise DataError(f"{kind}: which split? write {kind}:ROOT:SPLIT; {expected}")
        if not self.root.is_dir():
            raise DataError(f"{kind}: there is no folder {self.root}; {expected}")
        self.images = sorted(self.root.glob(layout.frames.format(split=split)))
        if not self.images:
            raise DataError(
                f"{kind}: no frame {layout.frames.format(split=split)} in {self.root}; {expected}"
            )
        self.labelled = labels and split not in layout.unlabelled
        if self.labelled:
            missing = [path for path in self.images if not self.label_path(path).is_file()]
            if missing and not self.reading.collect:
                raise DataError(
                    f"{kind}: {len(missing)} of {len(self.images)} frames have no label, first "
                    f"{self.label_path(missing[0])}: half unpacked? {expected}"
                )
            self._lone_labels(expected)
            self.problems += [
                (path.stem, f"no label {self.label_path(path).relative_to(self.root)}") for path in missing
            ]
            gone = set(missing)
            self.images = [path for path in self.images if path not in gone]
        self._known = np.ones(256, bool)
        if self.kind != "synthia":  # its table of labels is not closed: converted copies differ
            self._known[19 if layout.ids is None else MOST_ID + 1 :] = False
        self.table = np.full(256, 255, np.uint8)
        self.table[:19] = np.arange(19)
        if layout.ids is not None:
            self.table[:] = 255
            for theirs, ours in layout.ids.items():
                self.table[theirs] = ours

    def _lone_labels(self, expected: str) -> None:
        """Frames come in other archives than labels: one that was not unpacked must not go unnoticed."""
        pattern = self.layout.frames.format(split=self.split)
        for old, new in self.layout.label:
            pattern = pattern.replace(old, new)
        known = {self.label_path(image) for image in self.images}
        alone = [path for path in sorted(self.root.glob(pattern)) if path not in known]
        if alone and not self.reading.collect:
            raise DataError(
                f"{self.kind}: {len(alone)} labels have no frame, first {alone[0]}: half unpacked? {expected}"
            )
        self.problems += [(path.stem, f"no frame for label {path.relative_to(self.root)}") for path in alone]

    def label_path(self, frame: Path) -> Path:
        """Where the label of a frame is."""
        text = frame.relative_to(self.root).as_posix()
        for old, new in self.layout.label:
            text = text.replace(old, new)
        return self.root / text

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray | None]:
        frame = read_frame(self.images[i])
        if not self.labelled:
            return frame, None
        path = self.label_path(self.images[i])
        raw = _first_channel(path) if self.kind == "synthia" else read_label(path)
        if raw.shape != frame.shape[:2]:
            raise DataError(f"{path} is {raw.shape}, its frame {frame.shape[:2]}: two versions mixed?")
        found = np.bincount(raw.reshape(-1), minlength=256) > 0
        strange = np.flatnonzero(found[:255] & ~self._known[:255])
        if strange.size:
            words = "a trainId: those end at 18" if self.layout.ids is None else "an id of this set"
            raise DataError(f"{path} holds {int(strange[0])}, which is not {words}; are these other labels?")
        self.values |= found
        label: np.ndarray = self.table[raw]
        return frame, label

    def doubts(self) -> list[str]:
        """What the label values that were read so far do not look like; a line each."""
        ids = np.flatnonzero(self.values[:255])
        if self.layout.ids is CITYSCAPES_IDS and ids.size and int(ids.max()) <= 18:
            return [
                f"{self.kind}: no label holds an id over 18, so these are trainIds, not labelIds: they are "
                "read wrongly; unpack the set's own labelIds, or give the files as a folder: set"
            ]
        return []

    def name(self, i: int) -> str:
        return self.images[i].stem


def _first_channel(path: Path) -> np.ndarray:
    """SYNTHIA's labels: 16-bit PNG, the class in the first of several channels.

    Pillow reads such a file as 8 bit by its high byte, so the low byte is taken from the raw data here.
    """
    try:
        from adapt.data.png16 import read_png16

        if path.exists() and not path.is_file():
            raise ValueError("it is no plain file")
        return np.asarray(np.minimum(read_png16(path)[..., 0], 255), np.uint8)
    except (OSError, ValueError) as error:
        with picture(path) as image:  # a converted copy in 8 bit is as good
            if image.mode in ("L", "P"):
                return np.asarray(image)
        raise DataError(f"{path} cannot be read ({error}): unpack GT/LABELS again") from error
