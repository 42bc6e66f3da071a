"""Training of segmentation: the batch, the loss of a step, and the settings of the optimisation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt import batchnorm
from adapt.train import losses, mic, truncated_backprop
from adapt.train.trainer import ResumableTrainer
from common.progress import Progress, no_progress
from networks.pack import PackSpec, normalise

__all__ = [
    "Batch",
    "SegmentationTrainer",
    "Tensors",
    "TrainConfig",
    "learning_rate",
    "loss_of",
]


@dataclass(frozen=True)
class Batch:
    """What a step learns from.

    frames uint8 [N,H,W,3], labels uint8 [N,H,W], target bool [N] (pseudo-labelled), weight float32 [N].
    soft: LRENT's labels uint8 [N,H,W,2K] (`adapt.labels.lrent.compact`) in the place of `labels`, or None.
    whole, seen, ignore: for MIC, of the n target frames alone, or None: the crops with nothing pasted on
        (uint8 [n,H,W,3]), what the student sees of them (bool [n,H,W]), pixels that have no part in it.
    """

    frames: np.ndarray
    labels: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None = None
    soft: np.ndarray | None = None
    whole: np.ndarray | None = None
    seen: np.ndarray | None = None
    ignore: np.ndarray | None = None


@dataclass(frozen=True)
class Tensors:
    """A batch on the device that trains."""

    frames: Tensor
    labels: Tensor
    target: np.ndarray
    weight: Tensor | None
    soft: Tensor | None
    whole: Tensor | None
    seen: Tensor | None
    ignore: Tensor | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device | str) -> Tensors:
        def there(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else torch.from_numpy(array).to(device)

        frames, labels = torch.from_numpy(batch.frames), torch.from_numpy(batch.labels)
        return cls(
            frames.to(device),
            labels.to(device).long(),
            batch.target,
            there(batch.weight),
            there(batch.soft),
            there(batch.whole),
            there(batch.seen),
            there(batch.ignore),
        )

    def all(self) -> list[Tensor]:
        """Every tensor of the batch."""
        return [t for t in vars(self).values() if isinstance(t, Tensor)]


@dataclass(frozen=True)
class TrainConfig:
    """Optimiser, schedule and loss of a training.

    Attributes:
        steps: of the optimiser (AdamW).
        rate: peak of the learning rate.
        weight_decay: of weights; biases, batch normalisation and PReLU are not decayed.
        schedule: "one-cycle" (rise over `warm`, cosine down to zero), "warm" (rise, then constant) or
            "constant".
        bn: what batch normalisation does in training: "batch" (statistics of the whole batch), "split"
            (source part and target part each by their own), "frozen" (running statistics stay).
        mrkld: weight of the regulariser on target pixels, 0 = none.
        ema: decay of the mean teacher, 0 = none.
        judge: decay of a mean of the weights that only the gate uses; 0 = none.  `ema` comes before it.
        mic: weight of masked image consistency, 0 = none; it needs the teacher.
        clip: largest gradient norm, 0 = no limit.
        amp: "bf16" runs the network in bfloat16 (weights, loss and optimiser stay float32), "" = float32.
        compile: let torch.compile build the network's code.
        memory_mb: MiB that training may take beyond the weights, 0 = no limit; the first layers are frozen
            until it fits (`adapt.train.truncated_backprop`).
        parts: prefixes of the parameters that move; () = all.
    """

    steps: int
    rate: float = 1.5e-3
    weight_decay: float = 1e-2
    schedule: str = "one-cycle"
    warm: float = 0.3
    bn: str = "batch"
    mrkld: float = 0.0
    ema: float = 0.0
    judge: float = 0.0
    mic: float = 0.0
    clip: float = 0.0
    amp: str = ""
    compile: bool = False
    memory_mb: float = 0.0
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.schedule not in ("one-cycle", "warm", "constant"):
            raise ValueError(f"schedule {self.schedule!r}: choose one-cycle, warm or constant")
        if self.bn not in ("batch", "split", "frozen"):
            raise ValueError(f"bn {self.bn!r}: choose batch, split or frozen")
        if self.amp not in ("", "bf16"):
            raise ValueError(f"amp {self.amp!r}: choose bf16, or nothing for float32")
        if self.steps < 0 or not 0 <= self.ema < 1 or not 0 <= self.judge < 1 or not 0 < self.warm < 1:
            raise ValueError(f"{self}: steps >= 0, 0 <= ema < 1, 0 <= judge < 1, 0 < warm < 1")
        for name in ("rate", "weight_decay", "mrkld", "mic", "clip", "memory_mb"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value}: give a number that is not negative")
        if self.mic and not self.ema:
            raise ValueError(f"mic {self.mic:g} needs the mean teacher: set ema too, such as 0.99")
        if self.memory_mb and self.parts:
            raise ValueError("memory_mb and parts both say what moves: give one of them")

    @property
    def mean(self) -> float:
        """Decay of the mean of the weights, whatever it is used for; 0 = none is kept."""
        return self.ema or self.judge


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step (0-based): one cycle starts at 1/25 of the peak and ends at 1e-4 of that."""
    if config.schedule == "constant":
        return config.rate
    warm = max(1.0, config.warm * config.steps - 1)
    low = config.rate / 25
    if step <= warm:
        return low + (config.rate - low) * (1 - math.cos(math.pi * step / warm)) / 2
    if config.schedule == "warm":
        return config.rate
    rest = (step - warm) / max(1.0, config.steps - 1 - warm)
    end = low / 1e4
    return end + (config.rate - end) * (1 + math.cos(math.pi * min(rest, 1.0))) / 2


def loss_of(
    network: nn.Module,
    spec: PackSpec,
    config: TrainConfig,
    batch: Tensors,
    teacher: Mapping[str, Tensor] | None = None,
    student: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of a step, on the device that network, batch and teacher are on.

    Args:
        network: in training mode (with batch normalisation as `config.bn` describes).
        teacher: the mean teacher's parameters by name; MIC asks it.
        student: calls the network, if that is not `network` itself (compiled).
    """
    ask = network if student is None else student
    size = batch.labels.shape[1:]

    def full(raw: Tensor) -> Tensor:
        return F.interpolate(raw.float(), size=size, mode="bilinear", align_corners=False)

    def forward(x: Tensor) -> Tensor:
        with _precision(config, x):
            out: Tensor = ask(x)
            return out

    def at(positions: np.ndarray) -> Tensor:
        return torch.from_numpy(positions).to(batch.frames.device)

    x = normalise(batch.frames, spec)
    ours = np.flatnonzero(batch.target)
    if config.bn == "split" and 0 < len(ours) < len(x):
        theirs = np.flatnonzero(~batch.target)
        apart = torch.cat([forward(x[at(theirs)]), forward(x[at(ours)])])
        raw = apart[at(np.argsort(np.concatenate([theirs, ours])))]
    else:
        raw = forward(x)
    logits = full(raw)
    if batch.soft is None:
        loss = losses.cross_entropy(logits, batch.labels, batch.weight)
    else:
        loss = losses.soft_cross_entropy(logits, batch.soft)
    if config.mrkld and len(ours):
        loss = loss + config.mrkld * losses.mrkld(logits[at(ours)], batch.labels[at(ours)])
    if config.mic and batch.whole is not None and batch.seen is not None and teacher is not None:
        x = normalise(batch.whole, spec)
        loss = loss + config.mic * mic.consistency(
            full(_masked(network, forward, x * batch.seen[:, None])),
            full(_teachers(network, teacher, x, config)),
            batch.ignore,
        )
    return loss


def _precision(config: TrainConfig, x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16 if the settings ask for it; the meta device has no autocast and counts float32."""
    if not config.amp or x.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def _masked(network: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The student's answer to masked crops, which do not change the running statistics."""
    layers = list(batchnorm.layers(network))
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        return forward(x)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


@torch.no_grad()
def _teachers(network: nn.Module, teacher: Mapping[str, Tensor], x: Tensor, config: TrainConfig) -> Tensor:
    """The teacher's answer: its weights, the student's running statistics, no dropout."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with _precision(config, x):
            out: Tensor = torch.func.functional_call(network, dict(teacher), (x,))
            return out
    finally:
        for module, training in modes:
            module.training = training


class SegmentationTrainer(ResumableTrainer):
    """Trains a segmentation network.

    Args:
        network: trained in place, on the device it is on.
        spec: the pack's, for normalisation.
        config: the optimisation.
        draw: (step) -> Batch; must depend on the step number (and the seed it was made with) alone.
        seed: for dropout.
        checkpoint, every, identity: see `ResumableTrainer`.

    Attributes:
        freeze_point: where training begins and what it takes, if `config.memory_mb` limits it; else None.
        comparison_weights: after `run`: the weights (mean or student) that are not in the network; None if
            no mean was kept.

    Raises:
        ValueError: nothing would move, or not even the last layer's training fits in `config.memory_mb`.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: PackSpec,
        config: TrainConfig,
        draw: Callable[[int], Batch],
        *,
        seed: int,
        checkpoint: Path | None = None,
        every: int = 50,
        identity: str = "",
    ) -> None:
        super().__init__(network, config.steps, checkpoint=checkpoint, every=every, identity=identity)
        self.spec, self.config, self.draw, self.seed, self.clip = spec, config, draw, seed, config.clip
        stored = self._stored()
        self.freeze_point: truncated_backprop.Cut | None = None
        if config.memory_mb and config.steps:  # a resumed training keeps the freeze point of its checkpoint
            known = stored.get("cut") if stored else None
            self.freeze_point = truncated_backprop.Cut(**known) if known else self._choose_freeze_point()
        named = list(network.named_parameters())
        moves = {name for name, _ in named if not config.parts or name.startswith(config.parts)}
        if self.freeze_point is not None:
            moves = set(self.freeze_point.moving)
        if not moves:
            raise ValueError(f"no parameter's name starts with one of {config.parts}")
        self.moving = [p for name, p in named if name in moves]
        self.frozen = [p for name, p in named if name not in moves]
        decay = [p for p in self.moving if p.ndim > 1]
        plain = [p for p in self.moving if p.ndim <= 1]  # biases, BN and PReLU are not decayed
        groups = [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=config.rate)
        self.teacher: dict[str, Tensor] | None = None
        self.comparison_weights: dict[str, Tensor] | None = None
        if config.mean:
            self.teacher = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.student: Callable[[Tensor], Tensor] = network
        if config.compile:
            self.student = torch.compile(network, dynamic=False)
        self._resume(stored)

    def run(self, progress: Progress = no_progress, stage: str = "train") -> nn.Module:
        """Do all steps that are left.

        Returns:
            The network in evaluation mode, with the teacher's weights if `config.ema` asks for one.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        progress(stage, self.step, self.steps)
        self._run(progress, stage)
        if self.teacher is not None:
            self.comparison_weights = self.teacher
        if self.teacher is not None and self.config.ema:
            self.comparison_weights = {n: p.detach().clone() for n, p in self.network.named_parameters()}
            with torch.no_grad():
                for name, p in self.network.named_parameters():
                    p.copy_(self.teacher[name])
        return self.network

    def _extra(self) -> dict[str, Any]:
        cut = None if self.freeze_point is None else asdict(self.freeze_point)
        return {"step": self.step, "teacher": self.teacher, "cut": cut}

    def _restore(self, stored: dict[str, Any]) -> None:
        if self.teacher is not None:
            self.teacher = {name: tensor.to(self.device) for name, tensor in stored["teacher"].items()}

    def _choose_freeze_point(self) -> truncated_backprop.Cut:
        """By the first batch, as if on a device without memory; the batch of every step has its shape."""
        self._training_mode()
        batch = Tensors.of(self.draw(0), "meta")
        teacher = None
        if self.config.mean:
            teacher = {n: p.detach().to("meta") for n, p in self.network.named_parameters()}
        return truncated_backprop.choose(
            self.network,
            lambda network: loss_of(network, self.spec, self.config, batch, teacher),
            int(self.config.memory_mb * 2**20),
            known=[*batch.all(), *(teacher or {}).values()],
            ema=bool(self.config.mean),
        )

    def _training_mode(self) -> None:
        self.network.train()
        if self.config.bn == "frozen":
            batchnorm.freeze(self.network)

    def _loss(self, step: int) -> Tensor:
        config = self.config
        batch = Tensors.of(self.draw(step), self.device)
        torch.manual_seed((self.seed * 1_000_003 + step) & 0x7FFFFFFF)  # dropout
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        self._training_mode()
        try:
            return loss_of(self.network, self.spec, config, batch, self.teacher, self.student)
        except Exception as error:
            if config.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"torch.compile cannot build this network here ({reason}): set compile to false"
                ) from error
            raise

    def _after_update(self, step: int) -> None:
        """Update the mean of the weights: α_t = min(1 − 1/(t+1), decay)."""
        if self.teacher is None:
            return
        alpha = min(1 - 1 / (step + 1), self.config.mean)
        with torch.no_grad():
            weights = dict(self.network.named_parameters())
            torch._foreach_lerp_(list(self.teacher.values()), [weights[n] for n in self.teacher], 1 - alpha)
