"""The frames that a person marks: of a frame store or a folder, in the order in which they are worth it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import DataError

__all__ = ["ORDERS", "Frames", "order", "unsure"]

ORDERS = ("unsure", "time", "random")


@dataclass(frozen=True)
class Frames:
    """keys: of the marks file, one per frame; read(i) gives frame i, uint8 [H,W,3]."""

    keys: tuple[str, ...]
    read: Callable[[int], np.ndarray]

    @classmethod
    def of(cls, path: Path, seal: str | None = None) -> Frames:
        """The frames of a frame store (keys "id:N") or a folder of pictures (keys are stems).

        Raises DataError or StoreError.
        """
        if (path / "index.sqlite").is_file():
            from adapt.frames.store import FrameStore

            store = FrameStore(path, key=seal, sweep=False)
            rows = store.rows()
            if not rows:
                raise DataError(f"frame store {path} holds no frame: collect some with adapt.run")
            return cls(tuple(f"id:{r.id}" for r in rows), lambda i: store.read(rows[i]))
        from adapt.data.folder import Folder

        folder = Folder(path, labels=False)
        return cls(tuple(folder.name(i) for i in range(len(folder))), lambda i: folder[i][0])


def unsure(shares: np.ndarray, confidences: np.ndarray) -> np.ndarray:
    """How unsure the network is of rare classes in each frame, float64 [N].

    Args:
        shares: float [N,C], part of the frame answered as each class.
        confidences: float [N,C], mean confidence 0..1 of those pixels.

    Returns:
        Σ over the classes a frame shows of (−log of the class's share of all frames)·(1 − confidence).
    """
    total = shares.mean(0)
    rarity = -np.log(np.maximum(total, 1e-6))
    found: np.ndarray = np.where(shares > 0, rarity * (1 - confidences), 0.0).sum(1)
    return found


def order(how: str, summaries: Sequence[dict[str, Any]], seed: int = 0) -> list[int]:
    """Indices of the frames, the first to be marked first; ties in order of time."""
    n = len(summaries)
    if how == "random":
        return np.random.default_rng([0x3A2C, seed]).permutation(n).tolist()  # type: ignore[no-any-return]
    if how == "time":
        return list(range(n))
    score = unsure(np.array([s["share"] for s in summaries]), np.array([s["confidence"] for s in summaries]))
    return np.argsort(-score, kind="stable").tolist()  # type: ignore[no-any-return]
