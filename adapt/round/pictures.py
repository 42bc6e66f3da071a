"""A few pictures of a round, as files for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["MOST", "keep_pictures"]

MOST = 4  # pictures of a kind


def keep_pictures(
    folder: Path,
    frames: Sequence[np.ndarray],
    answers: Mapping[str, Sequence[np.ndarray]],
    learnt: tuple[Sequence[np.ndarray], Sequence[np.ndarray]] = ((), ()),
) -> None:
    """Write a few hold-out frames with the answers to them, and a few frames with their pseudo-labels.

    Args:
        folder: created if it is missing.  Files are N-frame.png, N-before.png, N-learnt.png and so on.
        frames: uint8 [H,W,3] of the hold-out.
        answers: by name ("before", "after"), uint8 [H,W] per frame of `frames`.
        learnt: target frames uint8 [H,W,3] and the labels uint8 [H,W] they were learnt with.
    """
    folder.mkdir(exist_ok=True)
    for j, i in enumerate(_evenly(len(frames))):
        Image.fromarray(frames[i]).save(folder / f"{j}-frame.png")
        for name, labels in answers.items():
            if i < len(labels):
                Image.fromarray(labels[i]).save(folder / f"{j}-{name}.png")
    for j, i in enumerate(_evenly(len(learnt[0]))):
        Image.fromarray(learnt[0][i]).save(folder / f"{j}-learnt.png")
        Image.fromarray(learnt[1][i]).save(folder / f"{j}-label.png")


def _evenly(count: int) -> list[int]:
    """At most MOST indices of a list of `count`."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(MOST, count)).round()}) if count else []
