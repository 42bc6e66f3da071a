"""Label spaces: names and colours of classes, and look-up tables from one space to another.

Index 255 is "ignore" in every space.  Knows numpy and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE = 255

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelSpace:
    """Classes in index order with their display colours (red, green, blue; 0..255)."""

    name: str
    classes: tuple[str, ...]
    colours: tuple[Colour, ...]

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.colours):
            raise ValueError(
                f"label space {self.name!r}: {len(self.classes)} classes, {len(self.colours)} colours"
            )
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"label space {self.name!r} names a class twice")

    def __len__(self) -> int:
        return len(self.classes)

    def palette(self) -> np.ndarray:
        """uint8 [256,3]: colour of every label value; unused values and 255 are black."""
        table = np.zeros((256, 3), np.uint8)
        table[: len(self.colours)] = self.colours
        return table


def _space(name: str, entries: dict[str, Colour]) -> LabelSpace:
    return LabelSpace(name, tuple(entries), tuple(entries.values()))


# Cityscapes trainIds with the colours of its paper (Cordts et al., 2016).
CITYSCAPES19 = _space(
    "cityscapes19",
    {
        "road": (128, 64, 128),
        "sidewalk": (244, 35, 232),
        "building": (70, 70, 70),
        "wall": (102, 102, 156),
        "fence": (190, 153, 153),
        "pole": (153, 153, 153),
        "traffic light": (250, 170, 30),
        "traffic sign": (220, 220, 0),
        "vegetation": (107, 142, 35),
        "terrain": (152, 251, 152),
        "sky": (70, 130, 180),
        "person": (220, 20, 60),
        "rider": (255, 0, 0),
        "car": (0, 0, 142),
        "truck": (0, 0, 70),
        "bus": (0, 60, 100),
        "train": (0, 80, 100),
        "motorcycle": (0, 0, 230),
        "bicycle": (119, 11, 32),
    },
)

# The 11 classes everybody scores CamVid on (Brostow et al., 2009, as grouped by SegNet).
CAMVID11 = _space(
    "camvid11",
    {
        "sky": (128, 128, 128),
        "building": (128, 0, 0),
        "pole": (192, 192, 128),
        "road": (128, 64, 128),
        "sidewalk": (60, 40, 222),
        "tree": (128, 128, 0),
        "sign": (192, 128, 128),
        "fence": (64, 64, 128),
        "car": (64, 0, 128),
        "pedestrian": (64, 64, 0),
        "bicyclist": (0, 128, 192),
    },
)

# The classes of the procedural renderer.
STREET = _space(
    "street",
    {
        "road": (128, 64, 128),
        "marking": (255, 255, 255),
        "pavement": (244, 35, 232),
        "terrain": (152, 251, 152),
        "building": (70, 70, 70),
        "fence": (190, 153, 153),
        "vegetation": (107, 142, 35),
        "sky": (70, 130, 180),
        "pole": (250, 170, 30),
        "sign": (220, 220, 0),
        "car": (0, 0, 142),
        "person": (220, 20, 60),
    },
)

SPACES: dict[str, LabelSpace] = {space.name: space for space in (CITYSCAPES19, CAMVID11, STREET)}

_MAPPINGS: dict[tuple[str, str], dict[str, str]] = {
    ("cityscapes19", "camvid11"): {
        "road": "road",
        "sidewalk": "sidewalk",
        "building": "building",
        "wall": "building",
        "fence": "fence",
        "pole": "pole",
        "traffic light": "sign",
        "traffic sign": "sign",
        "vegetation": "tree",
        "terrain": "tree",
        "sky": "sky",
        "person": "pedestrian",
        "rider": "bicyclist",
        "motorcycle": "bicyclist",
        "bicycle": "bicyclist",
        "car": "car",
        "truck": "car",
        "bus": "car",
        "train": "car",
    },
}


def mapping(source: str, target: str) -> np.ndarray:
    """Look-up table uint8 [256] from label values of `source` to those of `target`.

    Values without a counterpart, and 255, become 255.

    Raises:
        ValueError: an unknown space, or a pair for which no mapping is defined.
    """
    for name in (source, target):
        if name not in SPACES:
            raise ValueError(f"label space {name!r} is unknown; choose one of: {', '.join(sorted(SPACES))}")
    table = np.full(256, IGNORE, np.uint8)
    origin, goal = SPACES[source].classes, SPACES[target].classes
    if source == target:
        table[: len(origin)] = np.arange(len(origin), dtype=np.uint8)
        return table
    if (source, target) not in _MAPPINGS:
        known = ", ".join(f"{a} to {b}" for a, b in sorted(_MAPPINGS))
        raise ValueError(f"no mapping from {source!r} to {target!r} is defined; known: {known}")
    for name, counterpart in _MAPPINGS[source, target].items():
        table[origin.index(name)] = goal.index(counterpart)
    return table
