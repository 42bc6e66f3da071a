"""The student of a round: pseudo-labelled target frames and replayed source frames in every batch.

Without replay (source-free) a batch is target alone, and what holds the student to its parent is the
shortness of the training, the small portion of labels and the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from adapt.train.augment import Augmentation, Window, crop
from adapt.train.mic import block_mask
from adapt.train.segmentation import Batch
from adapt.train.trainer import generator

__all__ = ["BatchMix", "class_mix", "rare_class_chances", "sampler"]

IGNORE = 255
#: A rare class that was drawn should be in the crop: DAFormer asks 3000 of 512x512 pixels, in ten tries.
CROP_SHARE, CROP_TRIES = 3000 / 512**2, 10
Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class BatchMix:
    """What a batch is made of.

    source, target: images of each.  augmentation: crops of target frames, and of source frames if
    `source_augmentation` is None.  rare: temperature of rare-class sampling on replay, 0 = uniform
    (DAFormer: 0.01; larger is milder); rare_target: the same on pseudo-labels.  classmix: chance that a
    target crop gets half the classes of a replay crop pasted on (DACS).  mic: draw masks for masked image
    consistency.
    """

    source: int
    target: int
    augmentation: Augmentation
    source_augmentation: Augmentation | None = None
    rare: float = 0.0
    rare_target: float = 0.0
    classmix: float = 0.0
    mic: bool = False

    def __post_init__(self) -> None:
        if not (self.rare >= 0 and self.rare_target >= 0 and 0 <= self.classmix <= 1):
            raise ValueError(f"{self}: rare and rare_target are temperatures >= 0, classmix a chance 0..1")


def rare_class_chances(share: np.ndarray, temperature: float) -> np.ndarray:
    """P(c) ∝ exp((1 − f_c)/T), over classes that occur (Hoyer et al., *DAFormer*, CVPR 2022); float64 [C]."""
    score = (1.0 - share) / temperature
    chance = np.where(share > 0, np.exp(score - score.max()), 0.0)
    return np.asarray(chance / chance.sum())


def class_mix(rng: np.random.Generator, source: Pair, target: Pair) -> Pair:
    """Paste half of the source crop's classes on the target crop (Tranheden et al., *DACS*, WACV 2021)."""
    (sx, sy), (tx, ty) = source, target
    present = np.flatnonzero(np.bincount(_hard(sy).reshape(-1), minlength=256))
    present = present[present != IGNORE]
    if not len(present):
        return target
    chosen = rng.choice(present, size=(len(present) + 1) // 2, replace=False)
    pasted = np.zeros(256, bool)
    pasted[chosen] = True
    mask = pasted[_hard(sy)]
    x, y = tx.copy(), ty.copy()
    x[mask], y[mask] = sx[mask], sy[mask]
    return x, y


def _counts(labels: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """int64 [n,C]: pixels of each class in each label."""
    return np.stack([np.bincount(y.reshape(-1), minlength=256)[:classes] for y in labels])


class _Picker:
    """Which frame, and a crop of it: every frame once before any comes twice, or rare classes first."""

    def __init__(
        self, pairs: Sequence[Pair], how: Augmentation, temperature: float, classes: int, key: Sequence[int]
    ) -> None:
        self.pairs, self.how, self.key = pairs, how, key
        self.counts: np.ndarray | None = None
        if temperature and pairs:
            counts = _counts([_hard(y) for _, y in pairs], classes)
            if counts.sum():  # pseudo-labels may name no pixel at all
                self.counts = counts
                self.chances = rare_class_chances(counts.sum(0) / counts.sum(), temperature)

    def __call__(self, rng: np.random.Generator, position: int) -> Pair:
        if self.counts is None:
            order = generator(*self.key, position // len(self.pairs)).permutation(len(self.pairs))
            return crop(rng, *self.pairs[int(order[position % len(self.pairs)])], self.how)
        c = int(rng.choice(len(self.chances), p=self.chances))
        i = int(rng.choice(np.flatnonzero(self.counts[:, c] > 0)))
        frame, label = self.pairs[i]
        for _ in range(CROP_TRIES):
            window = Window.draw(rng, label.shape, self.how)
            if window.share(_hard(label), c, self.how) >= CROP_SHARE:
                break
        return crop(rng, frame, label, self.how, window)


def _hard(y: np.ndarray) -> np.ndarray:
    """The one class of a pixel: a label of one plane, or the first of several."""
    return y if y.ndim == 2 else y[..., 0]


def _stacked(y: np.ndarray, soft: np.ndarray | None, ignore: np.ndarray | None, keep: int) -> np.ndarray:
    """[H,W,1+2·keep+1]: hard label, soft label and what MIC leaves out, so that one crop cuts all alike.

    Padding writes 255 everywhere, which is what each plane means by "nothing here".
    """
    if soft is None:  # a source label: its class with all the weight
        soft = np.zeros((*y.shape, 2 * keep), np.uint8)
        soft[..., :keep] = IGNORE
        if keep:
            soft[..., 0], soft[..., keep] = y, np.where(y == IGNORE, 0, 255)
    out = np.zeros(y.shape, np.uint8) if ignore is None else np.where(ignore, IGNORE, 0).astype(np.uint8)
    return np.concatenate([y[..., None], soft, out[..., None]], axis=2)


def sampler(
    replay: Sequence[Pair],
    target: Sequence[Pair],
    mixture: BatchMix,
    classes: int,
    seed: int,
    stage: int,
    *,
    soft: Sequence[np.ndarray] | None = None,
    valid: np.ndarray | None = None,
) -> Callable[[int], Batch]:
    """(step) -> Batch, a function of (seed, stage, step) alone.

    Args:
        replay: labelled source frames (may be empty if `mixture.source` is 0).
        target: frames with pseudo-labels.
        soft: LRENT's labels of the target frames, uint8 [H,W,2K] each (`adapt.labels.lrent`), or None.
        valid: bool [H,W], False = the pixel has no part in MIC (own bonnet, border), or None.

    Raises:
        ValueError: the batch asks for frames and there is none.
    """
    if mixture.source and not replay:
        raise ValueError("the batch asks for source frames and there is no replay: use a source-free mixture")
    if mixture.target and not target:
        raise ValueError("the batch asks for target frames and there are none")
    keep = 0 if soft is None else soft[0].shape[2] // 2
    several = bool(keep) or mixture.mic
    if several:
        ignore = None if valid is None else ~valid
        replay = [(x, _stacked(y, None, None, keep)) for x, y in replay] if mixture.source else []
        target = [
            (x, _stacked(y, None if soft is None else soft[i], ignore, keep))
            for i, (x, y) in enumerate(target)
        ]
    theirs = _Picker(
        replay, mixture.source_augmentation or mixture.augmentation, mixture.rare, classes, (seed, 21, stage)
    )
    ours = _Picker(target, mixture.augmentation, mixture.rare_target, classes, (seed, 22, stage))

    def draw(step: int) -> Batch:
        rng = generator(seed, 20, stage, step)
        pairs = [theirs(rng, step * mixture.source + j) for j in range(mixture.source)]
        whole: list[Pair] = []
        for j in range(mixture.target):
            pair = ours(rng, step * mixture.target + j)
            whole.append(pair)
            if mixture.classmix and mixture.source and rng.random() < mixture.classmix:
                pair = class_mix(rng, pairs[j % mixture.source], pair)
            pairs.append(pair)
        is_target = np.arange(len(pairs)) >= mixture.source
        frames, labels = np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])
        if not several:
            return Batch(frames, labels, is_target)
        batch = Batch(
            frames,
            np.ascontiguousarray(labels[..., 0]),
            is_target,
            soft=np.ascontiguousarray(labels[..., 1:-1]) if keep else None,
        )
        if not mixture.mic:
            return batch
        return replace(
            batch,
            whole=np.stack([x for x, _ in whole]),
            seen=block_mask(generator(seed, 23, stage, step), len(whole), labels.shape[1:3]),
            ignore=np.stack([y[..., -1] for _, y in whole]) > 0,
        )

    return draw
