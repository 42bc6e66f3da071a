"""Training of edge networks: CASENet, CASENet-S, -C and SEAL, which differ in loss, labels and alignment
alone.

SEAL's loop: rounds of some hundred crops; at the start of each but the first the labels of its crops are
aligned to the ridges of the current weights, then the round's updates are made on them.  Everything random
of round r comes from (seed, r), so a run is repeatable.  A network needs ``sides`` (see
``networks.architectures.casenet``); one with ``joint`` is trained with its segmentation beside.

Source: Yu et al., CVPR 2017 and ECCV 2018; the published constants are the presets' comments.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from adapt.labels.seal import Gate
from adapt.train import losses
from adapt.train.aligning import Aligners
from adapt.train.augment import Augmentation, crop
from adapt.train.trainer import Progress, atomic_save, generator, silent
from networks.pack import PackSpec, normalise

__all__ = [
    "PRESETS",
    "SCALES",
    "EdgeRecipe",
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


@dataclass(frozen=True)
class EdgeRecipe:
    """How an edge network is trained.

    reweighted, reduction: the loss (``multilabel_edge_loss``).  aligned: SEAL; the first ``unaligned``
    rounds keep the labels as they are.  round: crops a round; batch: crops a step.  optimiser: "sgd" (the
    published: momentum .9, decay 5e-4, new layers ×10, their biases ×20) or "adamw" (new layers ×1).  rate
    falls by ``gamma`` every ``every`` steps (0: never).  frozen_bn: batch statistics stay; frozen_affine:
    weights and biases of batch normalisation stay, too (the published Scale layers have lr_mult 0).  parts:
    prefixes of the parameters that move, () = all.  alignment: parameters of ``align``; gate: None is SEAL as
    published.  segmentation: weight of the segmentation loss of joint networks."""

    steps: int
    reweighted: bool = False
    reduction: str = "mean"
    aligned: bool = False
    unaligned: int = 1
    round: int = 400
    batch: int = 10
    optimiser: str = "adamw"
    rate: float = 1e-3
    gamma: float = 0.2
    every: int = 0
    frozen_bn: bool = True
    frozen_affine: bool = False
    parts: tuple[str, ...] = ()
    alignment: dict[str, float] = field(
        default_factory=lambda: {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0, "smoothness": 0.02}
    )
    solver: str = "auction"
    gate: Gate | None = field(default_factory=Gate)
    segmentation: float = 1.0

    def __post_init__(self) -> None:
        if self.optimiser not in ("sgd", "adamw"):
            raise ValueError(f"optimiser {self.optimiser!r}: choose sgd or adamw")
        if self.steps < 0 or self.batch < 1 or self.round < self.batch or self.rate <= 0:
            raise ValueError(f"{self}: steps >= 0, 1 <= batch <= round and a positive rate are needed")


_CITYSCAPES = {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0, "smoothness": 0.02}
_SBD = {"sigma_x": 1.0, "sigma_y": 4.0, "max_cost": 4.5, "smoothness": 0.02}

#: The published recipes, NAME-cityscapes and NAME-sbd: crops of 472, mirrored; the loss is a sum, hence the
#: rates; batch normalisation is frozen, so that they start from a pretrained network.  S, C and SEAL start
#: from a short warm-up with the unweighted loss; C is S on labels a dense CRF refined (``adapt.labels.crf``).
#: Ours, NAME-scratch: the same losses, labels and alignment for a network with random weights: AdamW, the
#: mean loss, live batch statistics; SEAL behind the gate.
PRESETS: dict[str, EdgeRecipe] = {
    f"{name}-{data}": replace(
        EdgeRecipe(
            steps, reduction="caffe_sum", optimiser="sgd", round=crops, every=every, gamma=gamma,
            alignment=alignment, gate=None, solver="exact", frozen_affine=True,
        ),
        reweighted=name == "casenet", aligned=name == "seal", rate=rate if name == "casenet" else rate / 2,
    )
    for data, steps, crops, every, gamma, rate, alignment in (
        ("cityscapes", 28000, 400, 20000, 0.2, 5e-8, _CITYSCAPES),
        ("sbd", 22000, 300, 10000, 0.1, 1e-7, _SBD),
    )
    for name in ("casenet", "casenet-s", "casenet-c", "seal")
} | {
    f"{name}-scratch": EdgeRecipe(
        4000, every=2700, frozen_bn=False, reweighted=name == "casenet", aligned=name == "seal",
        unaligned=40 if name == "seal" else 1,  # two fifths: a student that sees nothing moves labels badly
    )
    for name in ("casenet", "casenet-s", "casenet-c", "seal")
}  # fmt: skip

#: The magnifications of the published training sets.
SCALES: dict[str, tuple[float, ...]] = {
    "cityscapes": (1.0,),
    "sbd": (0.5, 0.75, 1.0, 1.25, 1.5),
}


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
    """Parameters that are trained, by name.  Raises ValueError where none is."""
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


def _freeze(network: nn.Module, recipe: EdgeRecipe) -> list[nn.Parameter]:
    """Parameters that stay ask for no gradients; gives those that did."""
    moving = {id(p) for _, p in _moving(network, recipe)}
    frozen = [p for p in network.parameters() if id(p) not in moving and p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    return frozen


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


class EdgeTrainer:
    """Moves an edge network's weights, one step after the other.

    Args:
        network: trained in place.  Raises ValueError for one without ``sides``.
        spec: the pack's, for normalisation.
        draw: (random numbers) -> Sample; all crops have one size that suits the network.
        seed: of everything random.
        checkpoint: file to go on from, written every ``every`` steps and where labels are to be aligned,
            or None.  The labels that were aligned for the round under way lie beside it, in
            CHECKPOINT.labels/, a file a crop: one killed while it aligned goes on with the next crop.
        identity: text that must equal the checkpoint's, so that a changed recipe starts afresh.
        jobs: processes that align labels (see ``Aligners``); they change nothing but the time.

    A killed training ends with the weights of one that was not (same machine, same number of threads).
    """

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
        self.network, self.spec, self.draw, self.recipe, self.seed = network, spec, draw, recipe, seed
        self.checkpoint, self.every, self.identity = checkpoint, every, identity
        self.aligners = Aligners(jobs, recipe.solver, recipe.gate, recipe.alignment)
        self.joint = hasattr(network, "joint") and recipe.segmentation > 0 and not recipe.parts
        groups = _groups(network, recipe)
        self.optimiser: torch.optim.Optimizer = (
            torch.optim.SGD(groups, momentum=0.9) if recipe.optimiser == "sgd" else torch.optim.AdamW(groups)
        )
        self.history: list[float] = []
        self.number = 0  # of the round under way …
        self.begun = 0  # … and the step it began with
        self._resume()

    # ------------------------------------------------------------------------------------ checkpoints
    @property
    def _labels(self) -> Path | None:
        file = self.checkpoint
        return None if file is None else file.with_name(f"{file.name}.labels")

    def _resume(self) -> None:
        """Go on where the checkpoint is, where there is one of this training; else clear what lies there."""
        if self.checkpoint is None:
            return
        try:
            kept = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            ours = kept["identity"] == self.identity
        except Exception:  # none, or a damaged one: it costs time, nothing else
            ours = False
        if not ours or not self._can_go_on(kept):
            self.checkpoint.unlink(missing_ok=True)
            self._forget()
            return
        self.network.load_state_dict(kept["network"])
        self.optimiser.load_state_dict(kept["optimiser"])
        self.history = [float(v) for v in kept["history"]]
        self.number, self.begun = int(kept["number"]), int(kept["begun"])

    def _can_go_on(self, kept: dict[str, Any]) -> bool:
        """In the middle of an aligned round every aligned label is needed: the weights they were aligned with
        are gone."""
        number, begun = int(kept["number"]), int(kept["begun"])
        if len(kept["history"]) == begun or not self._is_aligned(number):
            return True
        return all(self._kept_labels(number, i) is not None for i in range(self._wanted(begun)))

    def save(self) -> None:
        """Write the checkpoint now."""
        if self.checkpoint is None:
            return
        atomic_save(
            self.checkpoint,
            {
                "identity": self.identity,
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "history": self.history,
                "number": self.number,
                "begun": self.begun,
            },
        )

    def _forget(self) -> None:
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

    def run(self, progress: Progress = silent) -> list[float]:
        """All steps that are left; the loss of every step, those before included.

        What ``progress`` raises comes out; ``save`` then keeps what was done.  Raises FloatingPointError
        where the loss is not finite.
        """
        frozen = _freeze(self.network, self.recipe)
        try:
            if not self.history and self._is_aligned(0):
                self.save()
            with self.aligners:
                while len(self.history) < self.recipe.steps:
                    self._round(progress)
        finally:
            for p in frozen:
                p.requires_grad_(True)
        self.network.eval()
        return self.history

    def _round(self, progress: Progress) -> None:
        recipe = self.recipe
        rng = generator(self.seed, 31, self.number)
        samples = [self.draw(rng) for _ in range(self._wanted(self.begun))]
        if self._is_aligned(self.number):
            samples = self._aligned(samples, progress)
        first = (len(self.history) - self.begun) * recipe.batch
        for start in range(first, len(samples) - recipe.batch + 1, recipe.batch):
            if len(self.history) >= recipe.steps:
                break
            drop = recipe.gamma ** (len(self.history) // recipe.every) if recipe.every else 1.0
            for group in self.optimiser.param_groups:
                group["lr"] = recipe.rate * group["factor"] * drop
            batch = samples[start : start + recipe.batch]
            self.history.append(_step(self.network, self.spec, batch, recipe, self.optimiser, self.joint))
            if len(self.history) % self.every == 0:
                self.save()
            progress("train", len(self.history), recipe.steps, loss=self.history[-1])
        self.number, self.begun = self.number + 1, len(self.history)
        if self._is_aligned(self.number):  # by these weights: they must not be lost
            self.save()
        self._forget()

    def _aligned(self, samples: list[Sample], progress: Progress) -> list[Sample]:
        self.network.eval()
        kept = [self._kept_labels(self.number, i) for i in range(len(samples))]
        missing = [i for i, bits in enumerate(kept) if bits is None]
        work = ((samples[i].bits, self._ridges(samples[i])) for i in missing)
        for i, bits in zip(missing, self.aligners.aligned(work), strict=True):
            self._keep_labels(self.number, i, bits)
            kept[i] = bits
            progress("align", i + 1, len(samples))
        return [
            replace(sample, bits=bits)
            for sample, bits in zip(samples, kept, strict=True)
            if bits is not None
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
    progress: Progress = silent,
    jobs: int = 1,
) -> list[float]:
    """Train in place (see ``EdgeTrainer``); returns the loss of every step."""
    return EdgeTrainer(
        network, spec, draw, recipe, seed=seed, checkpoint=checkpoint, every=every, identity=identity,
        jobs=jobs,
    ).run(progress)  # fmt: skip


def _step(
    network: nn.Module,
    spec: PackSpec,
    samples: list[Sample],
    recipe: EdgeRecipe,
    optimiser: torch.optim.Optimizer,
    joint: bool,
) -> float:
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
    value = float(loss.detach())
    if not math.isfinite(value):
        remedy = (
            "start from a pretrained network, or train with live batch statistics"
            if recipe.frozen_bn and not has_statistics(network)
            else "lower the learning rate"
        )
        raise FloatingPointError(f"edge training: the loss is {value}: {remedy}")
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimiser.step()
    return value
