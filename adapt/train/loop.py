"""The training loop: steps that are pure functions of (weights, optimiser, seed, step number).

Because the random numbers of step s come from (seed, s) alone, a checkpoint holds weights, optimiser,
teacher and step and nothing else, and a run that was killed ends with the same weights as one that was not
(same machine, same number of threads).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt import batchnorm
from adapt.train import losses
from networks.pack import PackSpec, normalise

__all__ = ["Batch", "Optimisation", "Progress", "Trainer", "atomic_save", "generator", "learning_rate"]


class Progress(Protocol):
    """Told after every step: what is being done, how far it is, of how many, and a few numbers."""

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None: ...


def silent(stage: str, done: int, total: int, **numbers: float) -> None:
    """The progress nobody watches."""


@dataclass(frozen=True)
class Batch:
    """frames uint8 [N,H,W,3], labels uint8 [N,H,W], target bool [N] (pseudo-labelled), weight float32 [N]."""

    frames: np.ndarray
    labels: np.ndarray
    target: np.ndarray
    weight: np.ndarray | None = None


@dataclass(frozen=True)
class Optimisation:
    """How weights move.

    rate: peak of AdamW's learning rate.  schedule: "one-cycle" (rise over `warm`, cosine down to nought),
    "warm" (rise, then constant) or "constant".  bn: what batch normalisation does in training: "batch"
    (normal training: statistics of the whole batch), "split" (source and target part each by their own),
    "frozen" (running statistics stay).  mrkld: weight of the regulariser on target pixels.  ema: decay of
    the teacher, 0 = none.  clip: largest gradient norm, 0 = none.  judge: decay of a mean of the weights that
    is kept for the gate's sake where there is no teacher, 0 = none.
    """

    steps: int
    rate: float = 1.5e-3
    weight_decay: float = 1e-2
    schedule: str = "one-cycle"
    warm: float = 0.3
    bn: str = "batch"
    mrkld: float = 0.0
    ema: float = 0.0
    clip: float = 0.0
    judge: float = 0.0
    parts: tuple[str, ...] = field(default=())  # prefixes of parameters that move; () = all

    def __post_init__(self) -> None:
        if self.schedule not in ("one-cycle", "warm", "constant"):
            raise ValueError(f"schedule {self.schedule!r}: choose one-cycle, warm or constant")
        if self.bn not in ("batch", "split", "frozen"):
            raise ValueError(f"bn {self.bn!r}: choose batch, split or frozen")
        if self.steps < 0 or not 0 <= self.ema < 1 or not 0 < self.warm < 1:
            raise ValueError(f"{self}: steps >= 0, 0 <= ema < 1, 0 < warm < 1")


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


class Trainer:
    """Moves a network's weights, one checked step after the other.

    Args:
        network: trained in place.
        spec: the pack's, for normalisation.
        how: the optimisation.
        draw: (step) -> Batch; must depend on the step number (and the seed it was made with) alone.
        seed: for dropout.
        checkpoint: file to continue from and to write every `every` steps, or None.
        identity: text that must equal the checkpoint's, so that a changed recipe starts afresh.
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
        chosen = [
            (name, p) for name, p in network.named_parameters() if not how.parts or name.startswith(how.parts)
        ]
        if not chosen:
            raise ValueError(f"no parameter's name starts with one of {how.parts}")
        decay = [p for _, p in chosen if p.ndim > 1]
        plain = [p for _, p in chosen if p.ndim <= 1]  # biases, BN and PReLU are not decayed
        groups = [{"params": decay, "weight_decay": how.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=how.rate)
        self.moving = [p for _, p in chosen]
        self.frozen = [
            p for name, p in network.named_parameters() if how.parts and not name.startswith(how.parts)
        ]
        self.teacher: dict[str, Tensor] | None = None
        self.twin: dict[str, Tensor] | None = None  # after the run: of student and mean the one not shipped
        if how.ema or how.judge:
            self.teacher = {name: p.detach().clone() for name, p in network.named_parameters()}
        self.step = 0
        self.history: list[float] = []
        self._resume()

    # ------------------------------------------------------------------------------------ checkpoints
    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return
        try:
            kept = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except Exception:  # a damaged checkpoint costs time, nothing else
            return
        if not isinstance(kept, dict) or kept.get("identity") != self.identity:
            return
        self.network.load_state_dict(kept["network"])
        self.optimiser.load_state_dict(kept["optimiser"])
        if self.teacher is not None:
            self.teacher = kept["teacher"]
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

    def _one_step(self) -> float:
        how = self.how
        batch = self.draw(self.step)
        torch.manual_seed((self.seed * 1_000_003 + self.step) & 0x7FFFFFFF)  # dropout
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(how, self.step)
        self.network.train()
        if how.bn == "frozen":
            batchnorm.freeze(self.network)
        frames = torch.from_numpy(batch.frames)
        labels = torch.from_numpy(batch.labels).long()
        raw = self._forward(frames, batch.target)
        full = F.interpolate(raw, size=labels.shape[1:], mode="bilinear", align_corners=False)
        weight = None if batch.weight is None else torch.from_numpy(batch.weight)
        loss = losses.cross_entropy(full, labels, weight)
        if how.mrkld and batch.target.any():
            chosen = torch.from_numpy(batch.target)
            loss = loss + how.mrkld * losses.mrkld(full[chosen], labels[chosen])
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

    def _forward(self, frames: Tensor, target: np.ndarray) -> Tensor:
        x = normalise(frames, self.spec)
        if self.how.bn != "split" or target.all() or not target.any():
            out: Tensor = self.network(x)
            return out
        chosen = torch.from_numpy(target)
        theirs, ours = self.network(x[~chosen]), self.network(x[chosen])
        joint: Tensor = theirs.new_empty((len(target), *theirs.shape[1:]))
        joint[~chosen], joint[chosen] = theirs, ours
        return joint

    def _follow(self) -> None:
        """The mean teacher: α_t = min(1 − 1/(t+1), ema)."""
        if self.teacher is None:
            return
        alpha = min(1 - 1 / (self.step + 1), self.how.ema or self.how.judge)
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                self.teacher[name].lerp_(p, 1 - alpha)
