"""Frozen, batch statistics alone, and TENT, over a stream of batches.  No file, no gate.

Written from the papers: Schneider et al., *Improving robustness against common corruptions by covariate
shift adaptation*, NeurIPS 2020 (statistics); Wang et al., *Tent: Fully test-time adaptation by entropy
minimization*, ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapt import batchnorm, inference
from networks.pack import Pack, normalise

__all__ = ["BatchStatistics", "Frozen", "Method", "Tent", "entropy"]


class Method(Protocol):
    """Answers batches of a stream in order; what it learns from one may show in the next."""

    def answer(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        """Labels uint8 [N,H,W] of frames uint8 [H,W,3]."""
        ...

    def reset(self) -> None:
        """Back to the released network."""
        ...


class Frozen:
    """The released network as it is."""

    def __init__(self, pack: Pack) -> None:
        self.pack = pack
        self.reset()

    def reset(self) -> None:
        self.network = self.pack.network().eval()

    def answer(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        return inference.labels_and_confidence(self.network, self.pack.spec, inference.as_tensor(frames))[0]


class BatchStatistics(Frozen):
    """Running statistics follow the stream, (1 − momentum)·old + momentum·the batch's; no weight moves.

    momentum: 1 is the batch alone, 0 the released statistics.
    """

    def __init__(self, pack: Pack, momentum: float = 0.3) -> None:
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum is {momentum}: give 0..1")
        self.momentum = momentum
        super().__init__(pack)

    def answer(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        tensor = inference.as_tensor(frames)
        batchnorm.reestimate(self.network, [normalise(tensor, self.pack.spec)], keep=1.0 - self.momentum)
        return inference.labels_and_confidence(self.network, self.pack.spec, tensor)[0]


def entropy(logits: Tensor) -> Tensor:
    """Mean over pixels of H(softmax(logits)) in nats; logits float [N,C,H,W]."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


class Tent(Frozen):
    """Each batch is normalised by its own statistics, and one step of Adam lowers the entropy of its answer
    by moving the scale and shift of batch normalisation, nothing else.

    rate: of Adam.  steps: for each batch (1 in the paper).  The answer is that of the forward pass before the
    step, as in the paper.
    """

    def __init__(self, pack: Pack, rate: float = 1e-3, steps: int = 1) -> None:
        if steps < 1 or rate <= 0:
            raise ValueError(f"rate {rate}, steps {steps}: both are positive")
        self.rate, self.steps = rate, steps
        super().__init__(pack)

    def reset(self) -> None:
        super().reset()
        self.network.requires_grad_(False)
        self.moving: list[nn.Parameter] = []
        for layer in batchnorm.layers(self.network):
            layer.train()
            layer.track_running_stats = False  # the released running statistics stay as they are
            layer.running_mean, layer.running_var = None, None
            for p in (layer.weight, layer.bias):
                if p is not None:
                    p.requires_grad_(True)
                    self.moving.append(p)
        if not self.moving:
            raise ValueError("TENT moves batch normalisation, and this network has none")
        self.optimiser = torch.optim.Adam(self.moving, lr=self.rate)
        self.entropies: list[float] = []

    def answer(self, frames: Sequence[np.ndarray]) -> np.ndarray:
        tensor = inference.as_tensor(frames)
        labels: Tensor | None = None
        with torch.enable_grad():
            for _ in range(self.steps):
                raw = self.network(normalise(tensor, self.pack.spec))
                if labels is None:
                    size = tensor.shape[1:3]
                    full = F.interpolate(raw.detach(), size=size, mode="bilinear", align_corners=False)
                    labels = full.argmax(1)
                loss = entropy(raw)
                self.optimiser.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self.optimiser.step()
                self.entropies.append(float(loss.detach()))
        assert labels is not None
        return np.asarray(labels.to(torch.uint8).numpy())
