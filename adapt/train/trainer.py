"""The training loop: steps that are pure functions of (weights, optimiser, seed, step number).

Because the random numbers of step s come from (seed, s) alone, a checkpoint holds weights, optimiser,
teacher and step and nothing else, and a run that was killed ends with the same weights as one that was not
(same machine, same number of threads).
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt import batchnorm
from adapt.train import losses, mic, truncated_backprop
from networks.pack import PackSpec, normalise

__all__ = [
    *("Batch", "Optimisation", "Progress", "Tensors", "Trainer"),
    *("atomic_save", "generator", "learning_rate", "loss_of"),
]


class Progress(Protocol):
    """Told after every step: what is being done, how far it is, of how many, and a few numbers."""

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None: ...


def silent(stage: str, done: int, total: int, **numbers: float) -> None:
    """The progress nobody watches."""


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
            frames.to(device), labels.to(device).long(), batch.target, there(batch.weight),
            there(batch.soft), there(batch.whole), there(batch.seen), there(batch.ignore),
        )  # fmt: skip

    def all(self) -> list[Tensor]:
        """Every tensor of it."""
        return [t for t in vars(self).values() if isinstance(t, Tensor)]


@dataclass(frozen=True)
class Optimisation:
    """How weights move.

    rate: peak of AdamW's learning rate.  schedule: "one-cycle" (rise over `warm`, cosine down to nought),
    "warm" (rise, then constant) or "constant".  bn: what batch normalisation does in training: "batch"
    (normal training: statistics of the whole batch), "split" (source and target part each by their own),
    "frozen" (running statistics stay).  mrkld: weight of the regulariser on target pixels.  ema: decay of
    the teacher, 0 = none.  judge: decay of a mean of the weights that is kept for the gate's sake where there
    is no teacher, 0 = none.  mic: weight of masked image consistency, 0 = none; it needs the teacher.  clip:
    largest gradient norm, 0 = none.  amp: "bf16" runs the network in bfloat16 (weights, loss and optimiser
    stay float32), "" = float32.  compile: let torch.compile build the network's code.  memory_mb: MiB that
    training may take beyond the weights, 0 = no limit; the first layers are frozen until it fits
    (`adapt.train.truncated_backprop`).
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
    parts: tuple[str, ...] = field(default=())  # prefixes of parameters that move; () = all

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
        """Decay of the mean of the weights that is kept, whatever for."""
        return self.ema or self.judge


def learning_rate(how: Optimisation, step: int) -> float:
    """The rate of a step (0-based): one cycle starts at 1/25 of the peak and ends at 1e-4 of that."""
    if how.schedule == "constant":
        return how.rate
    warm = max(1.0, how.warm * how.steps - 1)
    low = how.rate / 25
    if step <= warm:
        return low + (how.rate - low) * (1 - math.cos(math.pi * step / warm)) / 2
    if how.schedule == "warm":
        return how.rate
    rest = (step - warm) / max(1.0, how.steps - 1 - warm)
    end = low / 1e4
    return end + (how.rate - end) * (1 + math.cos(math.pi * min(rest, 1.0))) / 2


def generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on the seed and the key (stage, step …) and on nothing else."""
    return np.random.default_rng([seed & 0xFFFFFFFF, *key])


def atomic_save(path: Path, content: Any) -> None:
    """torch.save that is there whole or not at all, also after power loss."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def loss_of(
    network: nn.Module,
    spec: PackSpec,
    how: Optimisation,
    batch: Tensors,
    teacher: Mapping[str, Tensor] | None = None,
    student: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of a step, on the device that network, batch and teacher are on.

    Args:
        network: in training mode (with batch normalisation as `how.bn` says).
        teacher: the mean teacher's parameters by name; MIC asks it.
        student: calls the network, where that is not `network` itself (compiled).
    """
    ask = network if student is None else student
    size = batch.labels.shape[1:]

    def full(raw: Tensor) -> Tensor:
        return F.interpolate(raw.float(), size=size, mode="bilinear", align_corners=False)

    def forward(x: Tensor) -> Tensor:
        with _precision(how, x):
            out: Tensor = ask(x)
            return out

    def at(positions: np.ndarray) -> Tensor:
        return torch.from_numpy(positions).to(batch.frames.device)

    x = normalise(batch.frames, spec)
    ours = np.flatnonzero(batch.target)
    if how.bn == "split" and 0 < len(ours) < len(x):
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
    if how.mrkld and len(ours):
        loss = loss + how.mrkld * losses.mrkld(logits[at(ours)], batch.labels[at(ours)])
    if how.mic and batch.whole is not None and batch.seen is not None and teacher is not None:
        x = normalise(batch.whole, spec)
        loss = loss + how.mic * mic.consistency(
            full(_masked(network, forward, x * batch.seen[:, None])),
            full(_teachers(network, teacher, x, how)),
            batch.ignore,
        )
    return loss


def _precision(how: Optimisation, x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 where it is asked for; the meta device knows no autocast and counts float32's bytes."""
    if not how.amp or x.is_meta:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, torch.bfloat16)


def _masked(network: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The student on masked crops, which leave no trace in the running statistics."""
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
def _teachers(network: nn.Module, teacher: Mapping[str, Tensor], x: Tensor, how: Optimisation) -> Tensor:
    """What the teacher says: its weights, the student's running statistics, no dropout."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with _precision(how, x):
            out: Tensor = torch.func.functional_call(network, dict(teacher), (x,))
            return out
    finally:
        for module, training in modes:
            module.training = training


class Trainer:
    """Moves a network's weights, one checked step after the other.

    Args:
        network: trained in place, on the device it is on.
        spec: the pack's, for normalisation.
        how: the optimisation.
        draw: (step) -> Batch; must depend on the step number (and the seed it was made with) alone.
        seed: for dropout.
        checkpoint: file to continue from and to write every `every` steps, or None.
        identity: text that must equal the checkpoint's, so that a changed recipe starts afresh.

    Attributes:
        cut: where training begins and what it takes, where `how.memory_mb` limits it; else None.

    Raises:
        ValueError: nothing would move, or not even the last layer's training fits in `how.memory_mb`.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: PackSpec,
        how: Optimisation,
        draw: Callable[[int], Batch],
        *,
        seed: int,
        checkpoint: Path | None = None,
        every: int = 50,
        identity: str = "",
    ) -> None:
        self.network, self.spec, self.how, self.draw, self.seed = network, spec, how, draw, seed
        self.checkpoint, self.every, self.identity = checkpoint, every, identity
        self.device = next(network.parameters()).device
        kept = self._kept()
        self.cut: truncated_backprop.Cut | None = None
        if how.memory_mb and how.steps:  # a training that goes on moves what it moved before
            self.cut = truncated_backprop.Cut(**kept["cut"]) if kept and kept.get("cut") else self._cut()
        named = list(network.named_parameters())
        moves = {name for name, _ in named if not how.parts or name.startswith(how.parts)}
        if self.cut is not None:
            moves = set(self.cut.moving)
        if not moves:
            raise ValueError(f"no parameter's name starts with one of {how.parts}")
        self.moving = [p for name, p in named if name in moves]
        self.frozen = [p for name, p in named if name not in moves]
        decay = [p for p in self.moving if p.ndim > 1]
        plain = [p for p in self.moving if p.ndim <= 1]  # biases, BN and PReLU are not decayed
        groups = [{"params": decay, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=how.rate)
        self.teacher: dict[str, Tensor] | None = None
        self.twin: dict[str, Tensor] | None = None  # after the run: of student and mean the one not shipped
        if how.mean:
            self.teacher = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.student: Callable[[Tensor], Tensor] = network
        if how.compile:
            self.student = torch.compile(network, dynamic=False)
        self.step = 0
        self.history: list[float] = []
        if kept is not None:
            self._resume(kept)

    def _cut(self) -> truncated_backprop.Cut:
        """By the first batch, as if on a device without memory; a batch of every step has its shape."""
        self._ready()
        batch = Tensors.of(self.draw(0), "meta")
        teacher = None
        if self.how.mean:
            teacher = {n: p.detach().to("meta") for n, p in self.network.named_parameters()}
        return truncated_backprop.choose(
            self.network,
            lambda network: loss_of(network, self.spec, self.how, batch, teacher),
            int(self.how.memory_mb * 2**20),
            known=[*batch.all(), *(teacher or {}).values()],
            ema=bool(self.how.mean),
        )

    def _ready(self) -> None:
        self.network.train()
        if self.how.bn == "frozen":
            batchnorm.freeze(self.network)

    # ------------------------------------------------------------------------------------ checkpoints
    def _kept(self) -> dict[str, Any] | None:
        """The checkpoint, where there is one of this training."""
        if self.checkpoint is None or not self.checkpoint.is_file():
            return None
        try:
            kept = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except Exception:  # a damaged checkpoint costs time, nothing else
            return None
        if not isinstance(kept, dict) or kept.get("identity") != self.identity:
            return None
        return kept

    def _resume(self, kept: dict[str, Any]) -> None:
        self.network.load_state_dict(kept["network"])
        self.optimiser.load_state_dict(kept["optimiser"])
        if self.teacher is not None:
            self.teacher = {name: tensor.to(self.device) for name, tensor in kept["teacher"].items()}
        self.step = int(kept["step"])
        self.history = [float(v) for v in kept["history"]]

    def save(self) -> None:
        """Write the checkpoint now."""
        if self.checkpoint is None:
            return
        atomic_save(
            self.checkpoint,
            {
                "identity": self.identity,
                "step": self.step,
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "teacher": self.teacher,
                "cut": None if self.cut is None else asdict(self.cut),
                "history": self.history,
            },
        )

    # ------------------------------------------------------------------------------------------ steps
    def run(self, progress: Progress = silent, stage: str = "train") -> nn.Module:
        """All steps that are left; gives the network in evaluation mode, with the teacher's weights if any.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        for p in self.frozen:
            p.requires_grad_(False)
        try:
            self._steps(progress, stage)
        finally:
            for p in self.frozen:
                p.requires_grad_(True)
        if self.teacher is not None:
            self.twin = self.teacher
        if self.teacher is not None and self.how.ema:
            self.twin = {name: p.detach().clone() for name, p in self.network.named_parameters()}
            with torch.no_grad():
                for name, p in self.network.named_parameters():
                    p.copy_(self.teacher[name])
        return self.network.eval()

    def _steps(self, progress: Progress, stage: str) -> None:
        progress(stage, self.step, self.how.steps)
        last = time.monotonic()
        while self.step < self.how.steps:
            loss = self._one_step()
            self.history.append(loss)
            self.step += 1
            now = time.monotonic()
            progress(stage, self.step, self.how.steps, loss=loss, seconds=now - last)
            last = now
            if self.step % self.every == 0 or self.step == self.how.steps:
                self.save()

    def _one_step(self) -> float:
        how = self.how
        batch = Tensors.of(self.draw(self.step), self.device)
        torch.manual_seed((self.seed * 1_000_003 + self.step) & 0x7FFFFFFF)  # dropout
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(how, self.step)
        self._ready()
        try:
            loss = loss_of(self.network, self.spec, how, batch, self.teacher, self.student)
        except Exception as error:
            if how.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                words = str(error).strip().splitlines()[0]
                raise ValueError(
                    f"torch.compile cannot build this network here ({words}): set compile to false"
                ) from error
            raise
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of step {self.step} is {value}: lower the learning rate")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if how.clip:
            torch.nn.utils.clip_grad_norm_(self.moving, how.clip)
        self.optimiser.step()
        self._follow()
        return value

    def _follow(self) -> None:
        """The mean teacher: α_t = min(1 − 1/(t+1), ema)."""
        if self.teacher is None:
            return
        alpha = min(1 - 1 / (self.step + 1), self.how.mean)
        with torch.no_grad():
            weights = dict(self.network.named_parameters())
            torch._foreach_lerp_(list(self.teacher.values()), [weights[n] for n in self.teacher], 1 - alpha)
