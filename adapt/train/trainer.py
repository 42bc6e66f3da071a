"""The training loop that survives a crash: a step is a function of (weights, optimiser, seed, step number).

The random numbers of step s come from (seed, s) alone.  A checkpoint therefore holds weights, optimiser and
history and little else, and a run that was killed ends with the same weights as one that was not (same
machine, same number of threads).  A subclass gives the loss of a step; knows no task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from common.files import replace_file
from common.progress import Progress

__all__ = ["ResumableTrainer", "atomic_save", "generator"]


def generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on the seed and the key (stage, step …) and on nothing else."""
    return np.random.default_rng([seed & 0xFFFFFFFF, *key])


def atomic_save(path: Path, content: Any) -> None:
    """Write a file as torch.save does, whole or not at all, also after power loss."""
    with replace_file(path) as file:
        torch.save(content, file)


class ResumableTrainer:
    """Moves a network's weights, one checked step after the other.

    A subclass sets `optimiser`, `moving` and `frozen`, and calls `_resume` at the end of its constructor.

    Args:
        network: trained in place, on the device it is on.
        steps: of the whole training.
        checkpoint: file to continue from and to write, or None.
        every: steps between checkpoints; the last step writes one too.
        identity: text that must equal the checkpoint's, so that a changed recipe starts from the beginning.

    Attributes:
        history: the loss of every step so far, those before a resumption included.
        moving, frozen: parameters that are trained, and those that stay as they are.
        clip: largest gradient norm, 0 = no limit.
    """

    #: Write a checkpoint that is due before the step is reported, so that a report that raises loses nothing.
    STORE_FIRST: ClassVar[bool] = False

    optimiser: torch.optim.Optimizer
    moving: Sequence[nn.Parameter] = ()
    frozen: Sequence[nn.Parameter] = ()
    clip = 0.0

    def __init__(
        self, network: nn.Module, steps: int, *, checkpoint: Path | None, every: int, identity: str
    ) -> None:
        self.network, self.steps = network, steps
        self.checkpoint, self.every, self.identity = checkpoint, every, identity
        self.device = next(network.parameters()).device
        self.history: list[float] = []

    @property
    def step(self) -> int:
        """Steps that are done."""
        return len(self.history)

    # ------------------------------------------------------------------------------------ for subclasses
    def _loss(self, step: int) -> Tensor:
        """Draw the batch of `step`, prepare network and optimiser, and return the loss."""
        raise NotImplementedError

    def _before_step(self, progress: Progress) -> None:
        """Called before every step, outside its clock."""

    def _after_update(self, step: int) -> None:
        """Called after the optimiser moved the weights."""

    def _after_step(self) -> None:
        """Called after a step is recorded and reported, and stored if a checkpoint is due."""

    def _extra(self) -> dict[str, Any]:
        """What a checkpoint holds besides network, optimiser, history and identity."""
        return {}

    def _restore(self, stored: dict[str, Any]) -> None:
        """Take over what `_extra` returned."""

    def _can_resume(self, stored: dict[str, Any]) -> bool:
        """Whether a checkpoint of this training has everything it needs."""
        return True

    def _discard(self) -> None:
        """Called if there is no checkpoint to continue from."""

    def _not_finite(self, step: int, value: float) -> str:
        """The error of a loss that is not finite."""
        return f"the loss of step {step} is {value}: lower the learning rate"

    # ------------------------------------------------------------------------------------ checkpoints
    def _stored(self) -> dict[str, Any] | None:
        """The checkpoint of this training, or None if there is none that can be used."""
        if self.checkpoint is None:
            return None
        try:
            stored = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except Exception:  # missing or damaged: it costs time, nothing else
            return None
        if not isinstance(stored, dict) or stored.get("identity") != self.identity:
            return None
        return stored if self._can_resume(stored) else None

    def _resume(self, stored: dict[str, Any] | None) -> None:
        if stored is None:
            self._discard()
            return
        self.network.load_state_dict(stored["network"])
        self.optimiser.load_state_dict(stored["optimiser"])
        self.history = [float(v) for v in stored["history"]]
        self._restore(stored)

    def save(self) -> None:
        """Write the checkpoint now."""
        if self.checkpoint is None:
            return
        content = {
            "identity": self.identity,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "history": self.history,
        }
        atomic_save(self.checkpoint, content | self._extra())

    # ------------------------------------------------------------------------------------------ steps
    def _run(self, progress: Progress, stage: str) -> None:
        """Do all steps that are left.

        Raises:
            FloatingPointError: the loss is not finite.
            Exception: whatever `progress` raises; `save` then stores what was done.
        """
        frozen = [p for p in self.frozen if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        try:
            self._steps(progress, stage)
        finally:
            for p in frozen:
                p.requires_grad_(True)
        self.network.eval()

    def _steps(self, progress: Progress, stage: str) -> None:
        while self.step < self.steps:
            self._before_step(progress)
            start = time.monotonic()
            loss = self.one_step()
            seconds = time.monotonic() - start
            due = self.step % self.every == 0 or self.step == self.steps
            if due and self.STORE_FIRST:
                self.save()
            progress(stage, self.step, self.steps, loss=loss, seconds=seconds)
            if due and not self.STORE_FIRST:
                self.save()
            self._after_step()

    def one_step(self) -> float:
        """Move the weights once; returns the loss, which is also appended to `history`.

        Raises:
            FloatingPointError: the loss is not finite; no weight has moved.
        """
        step = self.step
        loss = self._loss(step)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(self._not_finite(step, value))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.moving, self.clip)
        self.optimiser.step()
        self._after_update(step)
        self.history.append(value)
        return value
