"""The student of a round: pseudo-labelled target frames and replayed source frames in every batch.

Without replay (source-free) a batch is target alone, and what holds the student to its parent is the
shortness of the training, the small portion of labels and the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from adapt.train.augment import Augmentation, crop
from adapt.train.loop import Batch, generator

__all__ = ["Mixture", "class_mix", "rare_class_chances", "sampler"]

IGNORE = 255
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Mixture:
    """What a batch is made of.

    source, target: images of each.  augmentation: crops of target frames, and of source frames where
    `source_augmentation` is None.  rare: temperature of rare-class sampling on replay, 0 = uniform
    (DAFormer: 0.01; larger is milder).  classmix: chance that a target crop gets half the classes of a
    replay crop pasted on (DACS).
    """

    source: int
    target: int
    augmentation: Augmentation
    source_augmentation: Augmentation | None = None
    rare: float = 0.0
    classmix: float = 0.0


def rare_class_chances(share: np.ndarray, temperature: float) -> np.ndarray:
    """P(c) ∝ exp((1 − f_c)/T), over classes that occur (Hoyer et al., *DAFormer*, CVPR 2022); float64 [C]."""
    score = (1.0 - share) / temperature
    chance = np.where(share > 0, np.exp(score - score.max()), 0.0)
    return np.asarray(chance / chance.sum())


def class_mix(rng: np.random.Generator, source: Pair, target: Pair) -> Pair:
    """Paste half of the source crop's classes on the target crop (Tranheden et al., *DACS*, WACV 2021)."""
    (sx, sy), (tx, ty) = source, target
    present = np.unique(sy)
    present = present[present != IGNORE]
    if not len(present):
        return target
    chosen = rng.choice(present, size=(len(present) + 1) // 2, replace=False)
    mask = np.isin(sy, chosen)
    return np.where(mask[..., None], sx, tx), np.where(mask, sy, ty)


def _counts(pairs: Sequence[Pair], classes: int) -> np.ndarray:
    """int64 [n,C]: pixels of each class in each label."""
    return np.stack([np.bincount(y.reshape(-1), minlength=256)[:classes] for _, y in pairs])


def sampler(
    replay: Sequence[Pair], target: Sequence[Pair], mixture: Mixture, classes: int, seed: int, stage: int
) -> Callable[[int], Batch]:
    """(step) -> Batch, a function of (seed, stage, step) alone.

    Args:
        replay: labelled source frames (may be empty where `mixture.source` is 0).
        target: frames with pseudo-labels.
    """
    if mixture.source and not replay:
        raise ValueError("the batch asks for source frames and there is no replay: use a source-free mixture")
    if mixture.target and not target:
        raise ValueError("the batch asks for target frames and there are none")
    source_how = mixture.source_augmentation or mixture.augmentation
    counts = _counts(replay, classes) if mixture.source and mixture.rare else None
    chances = rare_class_chances(counts.sum(0) / counts.sum(), mixture.rare) if counts is not None else None

    def pick_source(rng: np.random.Generator, position: int) -> int:
        if counts is None or chances is None:
            order = generator(seed, 21, stage, position // len(replay)).permutation(len(replay))
            return int(order[position % len(replay)])
        c = int(rng.choice(classes, p=chances))
        holders = np.flatnonzero(counts[:, c] > 0)
        return int(rng.choice(holders))

    def draw(step: int) -> Batch:
        rng = generator(seed, 20, stage, step)
        pairs: list[Pair] = []
        for j in range(mixture.source):
            i = pick_source(rng, step * mixture.source + j)
            pairs.append(crop(rng, *replay[i], source_how))
        for j in range(mixture.target):
            position = step * mixture.target + j
            order = generator(seed, 22, stage, position // len(target)).permutation(len(target))
            ours = crop(rng, *target[int(order[position % len(target)])], mixture.augmentation)
            if mixture.classmix and mixture.source and rng.random() < mixture.classmix:
                ours = class_mix(rng, pairs[j % mixture.source], ours)
            pairs.append(ours)
        is_target = np.arange(len(pairs)) >= mixture.source
        return Batch(np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs]), is_target)

    return draw
