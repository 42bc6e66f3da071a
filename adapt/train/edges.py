"""Training of edge networks: CASENet, CASENet-S, -C and SEAL, which differ in loss, labels and alignment
alone.

SEAL's loop: rounds of some hundred crops; at the start of each but the first the labels of its crops are
aligned to the ridges of the current weights, then the round's updates are made on them.  Everything random
of round r comes from (seed, r), so a run is repeatable.  A network needs ``sides`` (see
``networks.architectures.casenet``); one with ``joint`` is trained together with its segmentation.

Source: Yu et al., CVPR 2017 and ECCV 2018; the published constants are the presets' comments.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from adapt import batchnorm
from adapt.labels.edge_codec import pack
from adapt.labels.edges import category_edges
from adapt.train import losses
from adapt.train.aligning import Aligners
from adapt.train.augment import Augmentation, crop
from adapt.train.edge_recipes import EdgeRecipe
from adapt.train.trainer import ResumableTrainer, generator
from common.progress import Progress, no_progress
from networks.pack import PackSpec, normalise

__all__ = [
    "EdgeTrainer",
    "Sample",
    "crops_of_edges",
    "crops_of_segmentation",
    "has_statistics",
    "train",
]


@dataclass(frozen=True)
class Sample:
    """One crop: frame uint8 [h,w,3], bits uint32 [channels,h,w], labels uint8 [h,w] or None (joint
    networks)."""

    frame: NDArray[np.uint8]
    bits: NDArray[np.uint32]
    labels: NDArray[np.uint8] | None = None


Draw = Callable[[np.random.Generator], Sample]


# ------------------------------------------------------------------------------------------------- crops
def crops_of_segmentation(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint8]]],
    classes: int,
    augmentation: Augmentation,
    *,
    radius: float = 2,
    scales: Sequence[float] = (),
) -> Draw:
    """Crops of labelled frames, edges made on the fly: equally wide whatever the scale.

    Pixels with label 255 are ignored; nothing is an edge along them.  scales: magnify by one of these instead
    of any in the augmentation's range.
    """
    if not pairs:
        raise ValueError("edge training: no labelled frame")

    def draw(rng: np.random.Generator) -> Sample:
        pair, how = pairs[int(rng.integers(len(pairs)))], augmentation
        if scales:
            scale = float(scales[int(rng.integers(len(scales)))])
            how = replace(augmentation, scale=(scale, scale))
        frame, label = crop(rng, *pair, how)
        return Sample(frame, pack(category_edges(label, classes, radius), label == 255), label)

    return draw


def crops_of_edges(
    pairs: Sequence[tuple[NDArray[np.uint8], NDArray[np.uint32]]], size: tuple[int, int], *, flip: bool = True
) -> Draw:
    """Crops of frames with bit-field edge labels; a crop larger than the frame is padded and ignored
    there."""
    if not pairs:
        raise ValueError("edge training: no labelled frame")
    height, width = size

    def draw(rng: np.random.Generator) -> Sample:
        frame, bits = pairs[int(rng.integers(len(pairs)))]
        top = int(rng.integers(max(frame.shape[0] - height, 0) + 1))
        left = int(rng.integers(max(frame.shape[1] - width, 0) + 1))
        f, b = (
            frame[top : top + height, left : left + width],
            bits[:, top : top + height, left : left + width],
        )
        down, right = height - f.shape[0], width - f.shape[1]
        if down or right:
            f = np.pad(f, ((0, down), (0, right), (0, 0)))
            inside = b
            b = np.zeros((len(bits), height, width), np.uint32)
            b[-1] = np.uint32(1 << 31)
            b[:, : inside.shape[1], : inside.shape[2]] = inside
        if flip and rng.random() < 0.5:
            f, b = f[:, ::-1], b[:, :, ::-1]
        return Sample(np.ascontiguousarray(f), np.ascontiguousarray(b))

    return draw


# ---------------------------------------------------------------------------------------------- training
def _moving(network: nn.Module, recipe: EdgeRecipe) -> list[tuple[str, nn.Parameter]]:
    """Parameters that are trained, by name.  Raises ValueError if there is none."""
    stay = {id(p) for layer in batchnorm.layers(network) for p in layer.parameters() if recipe.frozen_affine}
    moving = [
        (name, p)
        for name, p in network.named_parameters()
        if id(p) not in stay and (not recipe.parts or name.startswith(recipe.parts))
    ]
    if not moving:
        raise ValueError(f"edge training: no parameter's name starts with one of {recipe.parts}")
    return moving


def has_statistics(network: nn.Module) -> bool:
    """Whether batch normalisation has gathered statistics: some running mean or variance is not its start."""
    return any(
        bool(layer.running_mean.any()) or not bool((layer.running_var == 1).all())
        for layer in batchnorm.layers(network)
        if layer.running_mean is not None and layer.running_var is not None
    ) or not any(True for _ in batchnorm.layers(network))


def _groups(network: nn.Module, recipe: EdgeRecipe) -> list[dict[str, Any]]:
    new = tuple(getattr(network, "NEW", ()))
    groups = []
    for name, p in _moving(network, recipe):
        bias = p.ndim == 1
        factor = (
            (20.0 if bias else 10.0) if recipe.optimiser == "sgd" and name.startswith(new) and new else 1.0
        )
        decay = 0.0 if bias else (5e-4 if recipe.optimiser == "sgd" else 1e-2)
        groups.append({"params": [p], "lr": recipe.rate * factor, "factor": factor, "weight_decay": decay})
    return groups


def _forward(network: nn.Module, x: Tensor, joint: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """(segmentation or None, A5, fused), at the input's resolution."""
    parts: list[Tensor | None] = [None, *network.sides(x)] if not joint else list(network.joint(x))  # type: ignore[operator]
    size = x.shape[2:]
    full = [
        t
        if t is None or t.shape[2:] == size
        else F.interpolate(t, size, mode="bilinear", align_corners=False)
        for t in parts
    ]
    a5, fused = full[1], full[2]
    assert a5 is not None
    assert fused is not None
    return full[0], a5, fused


class EdgeTrainer(ResumableTrainer):
    """Trains an edge network, in rounds of crops (see the module).

    Args:
        network: trained in place.
        spec: the pack's, for normalisation.
        draw: (random numbers) -> Sample; all crops have one size that suits the network.
        seed: of everything random.
        checkpoint, every, identity: see `ResumableTrainer`.  A checkpoint is also written before labels are
            aligned.  The labels that were aligned for the round under way lie in CHECKPOINT.labels/, one file
            per crop: a training that was killed while it aligned continues with the next crop.
        jobs: processes that align labels (see ``Aligners``); they change nothing but the time.

    Raises:
        ValueError: the network has no ``sides``, or nothing would move.
    """

    STORE_FIRST = True

    def __init__(
        self,
        network: nn.Module,
        spec: PackSpec,
        draw: Draw,
        recipe: EdgeRecipe,
        *,
        seed: int = 0,
        checkpoint: Path | None = None,
        every: int = 50,
        identity: str = "",
        jobs: int = 1,
    ) -> None:
        if not hasattr(network, "sides"):
            raise ValueError(
                f"edge training: {type(network).__name__} answers no edges; use casenet or casenet_light"
            )
        super().__init__(network, recipe.steps, checkpoint=checkpoint, every=every, identity=identity)
        self.spec, self.draw, self.recipe, self.seed = spec, draw, recipe, seed
        self.aligners = Aligners(jobs, recipe.solver, recipe.gate, recipe.alignment)
        self.joint = hasattr(network, "joint") and recipe.segmentation > 0 and not recipe.parts
        groups = _groups(network, recipe)
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9) if recipe.optimiser == "sgd" else torch.optim.AdamW(groups)
        )
        self.moving = [p for _, p in _moving(network, recipe)]
        moves = {id(p) for p in self.moving}
        self.frozen = [p for p in network.parameters() if id(p) not in moves]
        self.round_number = 0
        self.round_start = 0  # the step that the round began with
        self._samples: list[Sample] | None = None  # of the round, once they are drawn
        self._resume(self._stored())

    # ------------------------------------------------------------------------------------ checkpoints
    @property
    def _labels(self) -> Path | None:
        file = self.checkpoint
        return None if file is None else file.with_name(f"{file.name}.labels")

    def _extra(self) -> dict[str, Any]:
        return {"number": self.round_number, "begun": self.round_start}

    def _restore(self, stored: dict[str, Any]) -> None:
        self.round_number, self.round_start = int(stored["number"]), int(stored["begun"])

    def _discard(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
            self._remove_labels()

    def _can_resume(self, stored: dict[str, Any]) -> bool:
        """In the middle of an aligned round every aligned label is needed: the weights they were aligned with
        are gone."""
        number, begun = int(stored["number"]), int(stored["begun"])
        if len(stored["history"]) == begun or not self._is_aligned(number):
            return True
        return all(self._kept_labels(number, i) is not None for i in range(self._wanted(begun)))

    def _remove_labels(self) -> None:
        if self._labels is not None:
            shutil.rmtree(self._labels, ignore_errors=True)

    def _kept_labels(self, number: int, i: int) -> NDArray[np.uint32] | None:
        if self._labels is None:
            return None
        try:
            with np.load(self._labels / f"{number:05d}-{i:05d}.npz", allow_pickle=False) as file:
                return np.asarray(file["bits"], np.uint32)
        except Exception:  # zip, zlib, numpy: not there, or damaged
            return None

    def _keep_labels(self, number: int, i: int, bits: NDArray[np.uint32]) -> None:
        if self._labels is None:
            return
        self._labels.mkdir(exist_ok=True)
        path = self._labels / f"{number:05d}-{i:05d}.npz"
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "wb") as file:
            np.savez_compressed(file, bits=bits)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    # ------------------------------------------------------------------------------------------ rounds
    def _is_aligned(self, number: int) -> bool:
        return self.recipe.aligned and number >= self.recipe.unaligned

    def _wanted(self, begun: int) -> int:
        """Crops of the round that begins with that step."""
        recipe = self.recipe
        return max(recipe.batch, min(recipe.round, (recipe.steps - begun) * recipe.batch))

    def run(self, progress: Progress = no_progress) -> list[float]:
        """Do all steps that are left; returns the loss of every step, those before included.

        Raises:
            FloatingPointError: the loss is not finite.
            Exception: whatever ``progress`` raises; ``save`` then stores what was done.
        """
        if not self.history and self._is_aligned(0):
            self.save()
        with self.aligners:
            self._run(progress, "train")
        return self.history

    def _before_step(self, progress: Progress) -> None:
        if self._is_round_over():  # stopped between the last step of a round and the next round
            self._next_round()
        if self._samples is None:
            rng = generator(self.seed, 31, self.round_number)
            self._samples = [self.draw(rng) for _ in range(self._wanted(self.round_start))]
            if self._is_aligned(self.round_number):
                self._samples = self._aligned(self._samples, progress)

    def _is_round_over(self) -> bool:
        """Whether the crops of the round that are left are fewer than a batch."""
        batches = self._wanted(self.round_start) // self.recipe.batch
        return self.step - self.round_start >= batches

    def _after_step(self) -> None:
        if self._is_round_over():
            self._next_round()

    def _next_round(self) -> None:
        self.round_number, self.round_start, self._samples = self.round_number + 1, self.step, None
        if self._is_aligned(self.round_number):  # by these weights: they must not be lost
            self.save()
        self._remove_labels()

    def _loss(self, step: int) -> Tensor:
        recipe = self.recipe
        drop = recipe.gamma ** (step // recipe.every) if recipe.every else 1.0
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.rate * group["factor"] * drop
        assert self._samples is not None
        first = (step - self.round_start) * recipe.batch
        batch = self._samples[first : first + recipe.batch]
        return edge_loss(self.network, self.spec, batch, recipe, self.joint)

    def _not_finite(self, step: int, value: float) -> str:
        remedy = (
            "start from a pretrained network, or train with live batch statistics"
            if self.recipe.frozen_bn and not has_statistics(self.network)
            else "lower the learning rate"
        )
        return f"edge training: the loss is {value}: {remedy}"

    def _aligned(self, samples: list[Sample], progress: Progress) -> list[Sample]:
        self.network.eval()
        kept = [self._kept_labels(self.round_number, i) for i in range(len(samples))]
        missing = [i for i, bits in enumerate(kept) if bits is None]
        work = ((samples[i].bits, self._ridges(samples[i])) for i in missing)
        for i, bits in zip(missing, self.aligners.aligned(work), strict=True):
            self._keep_labels(self.round_number, i, bits)
            kept[i] = bits
            progress("align", i + 1, len(samples))
        return [
            replace(sample, bits=bits) for sample, bits in zip(samples, kept, strict=True) if bits is not None
        ]

    def _ridges(self, sample: Sample) -> NDArray[np.float32]:
        """Edge probabilities of a crop by the current weights: float32 [K,h,w]."""
        with torch.inference_mode():
            x = normalise(torch.from_numpy(np.array(sample.frame))[None], self.spec)
            return np.asarray(_forward(self.network, x, False)[2].sigmoid()[0].numpy())


def train(
    network: nn.Module,
    spec: PackSpec,
    draw: Draw,
    recipe: EdgeRecipe,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    every: int = 500,
    identity: str = "",
    progress: Progress = no_progress,
    jobs: int = 1,
) -> list[float]:
    """Train in place (see ``EdgeTrainer``); returns the loss of every step."""
    return EdgeTrainer(
        network,
        spec,
        draw,
        recipe,
        seed=seed,
        checkpoint=checkpoint,
        every=every,
        identity=identity,
        jobs=jobs,
    ).run(progress)


def edge_loss(
    network: nn.Module, spec: PackSpec, samples: Sequence[Sample], recipe: EdgeRecipe, joint: bool
) -> Tensor:
    """The loss of a step, with the network in training mode (batch normalisation as the recipe has it)."""
    network.train()
    if recipe.frozen_bn:
        batchnorm.freeze(network)
    x = normalise(torch.from_numpy(np.stack([s.frame for s in samples])), spec)
    bits = torch.from_numpy(np.stack([s.bits for s in samples]))
    segmentation, a5, fused = _forward(network, x, joint)
    loss = torch.zeros(())
    for logits in (a5, fused):
        loss = loss + losses.multilabel_edge_loss(logits, bits, recipe.reweighted, recipe.reduction)
    if segmentation is not None and samples[0].labels is not None:
        labels = torch.from_numpy(np.stack([s.labels for s in samples if s.labels is not None]))
        loss = loss + recipe.segmentation * losses.cross_entropy(segmentation, labels)
    return loss
