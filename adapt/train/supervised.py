"""Training of a source model on labelled frames: the recipe behind ``python -m adapt.train``.

AdamW, one cycle, random scale, crop and flip.  Colours of another light come only if the recipe asks for
them: a source model that has seen every light leaves adaptation less to do.  State the recipe before
comparing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapt.data.base import Dataset
from adapt.data.pairs import Pairs, examine
from adapt.train.augment import Augmentation, crop
from adapt.train.segmentation import Batch, SegmentationTrainer, TrainConfig
from adapt.train.trainer import generator
from common.progress import Progress, no_progress
from networks.pack import PackSpec

__all__ = ["LabelledFrames", "Recipe", "load", "train", "transfer"]

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Recipe:
    """Epochs, batch, crops and optimisation of a supervised training."""

    epochs: float = 8.0
    batch: int = 6
    augmentation: Augmentation = field(default_factory=lambda: Augmentation((256, 320)))
    rate: float = 1.5e-3
    weight_decay: float = 1e-2
    bn: str = "batch"
    ema: float = 0.0
    amp: str = ""
    compile: bool = False
    memory_mb: float = 0.0

    def __post_init__(self) -> None:
        self.optimisation(1)  # validates the settings before any data is read

    def optimisation(self, frames: int) -> TrainConfig:
        """The optimisation of a training on that many frames."""
        return TrainConfig(
            steps=self.steps(frames),
            rate=self.rate,
            weight_decay=self.weight_decay,
            bn=self.bn,
            ema=self.ema,
            amp=self.amp,
            compile=self.compile,
            memory_mb=self.memory_mb,
        )

    def steps(self, frames: int) -> int:
        """Optimiser steps for that many frames."""
        return max(1, round(self.epochs * frames / self.batch))

    def words(self) -> str:
        """The recipe in a line, for a pack's `training` field."""
        a = self.augmentation
        light = f", brightness x{a.brightness:g}" if a.brightness > 1 else ""
        light += f", colour {a.colour:g}" if a.colour else ""
        light += f", blur {a.blur:g}" if a.blur else ""
        light += f", noise {a.noise:g}" if a.noise else ""
        light += ", frozen statistics" if self.bn == "frozen" else ""
        light += f", mean teacher {self.ema:g}" if self.ema else ""
        light += f", {self.amp}" if self.amp else ""
        light += f", at most {self.memory_mb:g} MiB" if self.memory_mb else ""
        return (
            f"AdamW {self.rate:g} one-cycle, {self.epochs:g} epochs, batch {self.batch}, "
            f"crops {a.size[0]}x{a.size[1]}, scale {a.scale[0]:g}-{a.scale[1]:g}"
            f"{', flip' if a.flip else ''}{light}"
        )


class LabelledFrames(Sequence[Pair]):
    """A labelled data set at one size: frames uint8 [H,W,3], labels uint8 [H,W].

    `adapt.data.pairs.Pairs` reads them when they are asked for; any other sequence is held in memory.
    """

    def __init__(self, pairs: Sequence[Any]) -> None:
        self.pairs: Sequence[Any] = pairs if isinstance(pairs, Pairs) else list(pairs)
        if not self.pairs:
            raise ValueError("no labelled frame: give a data set with labels")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: Any) -> Any:
        return self.pairs[i]


def load(dataset: Dataset, progress: Progress = no_progress) -> LabelledFrames:
    """Every labelled frame of a data set; what does not fit in a cache of 1 GiB is read again when asked for.

    Raises DataError for bad pairs, and if no frame has a label.
    """
    return LabelledFrames(examine(dataset, what="the data set", progress=progress))


def sampler(frames: Sequence[Pair], recipe: Recipe, seed: int) -> Any:
    """(step) -> Batch: every frame once an epoch in a new order, each with its own crop."""
    n = len(frames)
    orders: dict[int, np.ndarray] = {}

    def draw(step: int) -> Batch:
        rng = generator(seed, 11, step)
        picked = []
        for position in range(step * recipe.batch, (step + 1) * recipe.batch):
            epoch = position // n
            if epoch not in orders:
                orders.clear()
                orders[epoch] = generator(seed, 12, epoch).permutation(n)
            picked.append(int(orders[epoch][position % n]))
        crops = [crop(rng, *frames[i], recipe.augmentation) for i in picked]
        return Batch(
            np.stack([x for x, _ in crops]), np.stack([y for _, y in crops]), np.zeros(len(crops), bool)
        )

    return draw


def train(
    network: nn.Module,
    spec: PackSpec,
    frames: Sequence[Pair],
    recipe: Recipe,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 100,
    progress: Progress = no_progress,
    stage: str = "train",
) -> nn.Module:
    """Train in place; continues from `checkpoint` if it holds the same recipe and seed."""
    how = recipe.optimisation(len(frames))
    identity = repr((asdict(recipe), seed, len(frames), spec.name))
    trainer = SegmentationTrainer(
        network,
        spec,
        how,
        sampler(frames, recipe, seed),
        seed=seed,
        checkpoint=checkpoint,
        every=every,
        identity=identity,
    )
    return trainer.run(progress, stage)


def transfer(state: Mapping[str, Tensor], network: nn.Module, table: np.ndarray, classes: int) -> list[str]:
    """Start a network from weights of another label space: equal tensors are copied, class rows are mapped.

    A tensor whose first axis has the old number of classes where the network's has the new gets, for each
    new class, the mean of the old rows that map to it; a new class nothing maps to gets the mean of all.

    Args:
        state: weights of the same architecture with `classes` classes.
        network: with the new number of classes; changed in place.
        table: uint8 [256], old class -> new class, 255 = no counterpart (`networks.labels.mapping`).
        classes: the old number.

    Returns:
        Names of the tensors that were mapped.

    Raises:
        ValueError: a tensor is missing or fits neither way.
    """
    own = network.state_dict()
    mapped = []
    with torch.no_grad():
        for name, tensor in own.items():
            if name not in state:
                raise ValueError(f"the weights lack {name!r}: is it another architecture?")
            given = state[name]
            if given.shape == tensor.shape:
                tensor.copy_(given)
                continue
            if given.ndim == 0 or given.shape[0] != classes or given.shape[1:] != tensor.shape[1:]:
                raise ValueError(
                    f"{name!r} is {list(given.shape)} in the weights and {list(tensor.shape)} in the network"
                )
            for new in range(tensor.shape[0]):
                rows = [old for old in range(classes) if table[old] == new]
                tensor[new].copy_(given[rows].mean(0) if rows else given.mean(0))
            mapped.append(name)
    return mapped
