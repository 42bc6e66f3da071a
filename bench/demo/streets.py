"""Which streets the demo drives, and who may know what of them.

``stream`` is what the vehicle sees: frames, nothing else.  ``heldout`` and ``truth`` give labels; only the
final scoring (``bench.demo.scoring``) may import them, which a test holds.  Streets are set apart by their
seeds: no street of the hold-out is ever driven, and none of either is among those the pack was trained on
(``bench.demo.train_pack``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from adapt.data.street import scenes

STREAM_SEED, HELDOUT_SEED = 400_000, 500_000
ROOM = 1_000  # street seeds for each seed of the demo
DRIVES, FRAMES, STEP = 16, 12, 2.5  # streets, frames down each, metres between frames

Tick = Callable[[int, int], None]


def _drive(seed: int, domain: str, drives: int, frames: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for k in range(drives):
        yield from scenes.drive(STREAM_SEED + ROOM * seed + k, domain, frames, step=STEP)


def stream(
    seed: int, domain: str, *, drives: int = DRIVES, frames: int = FRAMES, tick: Tick | None = None
) -> np.ndarray:
    """What the camera sees on the road, in order: uint8 [drives·frames,H,W,3]."""
    seen = []
    for frame, _ in _drive(seed, domain, drives, frames):
        seen.append(frame)
        if tick:
            tick(len(seen), drives * frames)
    return np.stack(seen)


def truth(seed: int, domain: str, *, drives: int = DRIVES, frames: int = FRAMES) -> np.ndarray:
    """Labels of ``stream``, uint8 [drives·frames,H,W].  For the labelled upper bound alone."""
    return np.stack([label for _, label in _drive(seed, domain, drives, frames)])


def heldout(seed: int, domain: str, count: int, *, tick: Tick | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [count,H,W,3] and labels uint8 [count,H,W] of streets that nobody drives; for scoring
    alone.
    """
    pairs = []
    for i in range(count):
        pairs.append(scenes.render(HELDOUT_SEED + ROOM * seed + i, domain))
        if tick:
            tick(i + 1, count)
    return np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])
