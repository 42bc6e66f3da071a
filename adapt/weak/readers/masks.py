"""Run lengths of masks as COCO and CVAT write them, to bool arrays.

Sizes are checked before memory is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from adapt.weak.marks import WeakError
from adapt.weak.readers.bounded import number

__all__ = ["coco_mask", "from_runs"]

MOST_RUNS = 4_000_000


def from_runs(counts: Sequence[int], total: int, who: str) -> np.ndarray:
    """bool [total]: runs of 0 and 1 by turns, beginning with 0."""
    if len(counts) > MOST_RUNS or any(c < 0 for c in counts) or sum(counts) != total:
        raise WeakError(f"{who}: its run lengths are not of {total} pixels; export the mask again")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts)


def coco_mask(segmentation: Any, size: tuple[int, int], who: str) -> np.ndarray:
    """bool [H,W] of COCO's {"size": [h, w], "counts": list or text}; runs go down the columns."""
    width, height = size
    given = segmentation.get("size")
    if given != [height, width]:
        raise WeakError(
            f"{who}: its mask is of size {str(given)[:40]}, the picture of [{height}, {width}]; "
            "export it again"
        )
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = _decoded(counts, who)
    elif isinstance(counts, list):
        counts = [int(number(c, who)) for c in counts]
    else:
        raise WeakError(f"{who}: its mask has no counts; export it again")
    return from_runs(counts, width * height, who).reshape(width, height).T


def _decoded(text: str, who: str) -> list[int]:
    """COCO's compressed text: 5 bits per character, each run from the third on as its change to the one two
    places before (the format of pycocotools).
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise WeakError(f"{who}: its compressed mask holds {character!r}; export it again")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise WeakError(f"{who}: its compressed mask is cut off; export it again")
    return counts
