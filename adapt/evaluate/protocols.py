"""Which classes a published table scores and averages: Cityscapes' 19, SYNTHIA's 16 and 13, CamVid's 11.

A class a protocol does not score is ignored where the truth holds it; an answer of such a class on a scored
pixel is a miss.  Knows label spaces and nothing of networks or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from networks.labels import CITYSCAPES19, SPACES

__all__ = ["PROTOCOLS", "Protocol", "set_space"]

IGNORE = 255
# What SYNTHIA (RAND-CITYSCAPES) does not label, and what its mIoU* of 13 leaves out of the mean as well.
_NOT_IN_SYNTHIA = ("terrain", "truck", "train")
_NOT_IN_THE_MEAN = ("wall", "fence", "pole")


@dataclass(frozen=True)
class Protocol:
    """space: a name in `networks.labels.SPACES`; scored, averaged: classes of it, in its order."""

    words: str
    space: str
    scored: tuple[str, ...]
    averaged: tuple[str, ...]

    def table(self) -> np.ndarray:
        """uint8 [256]: label of the space -> itself where it is scored, 255 elsewhere."""
        table = np.full(256, IGNORE, np.uint8)
        for i, name in enumerate(SPACES[self.space].classes):
            if name in self.scored:
                table[i] = i
        return table


def _synthia(left_out: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(c for c in CITYSCAPES19.classes if c not in left_out)


_SIXTEEN = _synthia(_NOT_IN_SYNTHIA)
_ELEVEN = SPACES["camvid11"].classes
PROTOCOLS: dict[str, Protocol] = {
    "19": Protocol(
        "the 19 classes of Cityscapes", "cityscapes19", CITYSCAPES19.classes, CITYSCAPES19.classes
    ),
    "16": Protocol("SYNTHIA to Cityscapes, 16 classes", "cityscapes19", _SIXTEEN, _SIXTEEN),
    "13": Protocol(
        "SYNTHIA to Cityscapes, mIoU* of 13 classes",
        "cityscapes19",
        _SIXTEEN,
        _synthia(_NOT_IN_SYNTHIA + _NOT_IN_THE_MEAN),
    ),
    "11": Protocol("the 11 classes of CamVid", "camvid11", _ELEVEN, _ELEVEN),
}


def set_space(description: str) -> str | None:
    """Label space of the set a description names (`adapt.data.open.open_dataset`); None: as the pack says."""
    kind = description.partition(":")[0]
    if kind in ("camvid", "street"):
        return {"camvid": "camvid11", "street": "street"}[kind]
    return None if kind == "folder" else "cityscapes19"
