"""The training of one stage of a round: from the parent (or the last stage) to a student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from adapt import batchnorm
from adapt.round.config import RoundConfig
from adapt.round.inputs import RoundInputs
from adapt.round.labelling import Labels
from adapt.round.outcome import RoundPaused
from adapt.train.batches import sampler
from adapt.train.segmentation import SegmentationTrainer
from common.progress import Progress

__all__ = ["first_and_last", "train_student"]


def train_student(
    network: nn.Module,
    labels: Labels,
    stage: int,
    *,
    inputs: RoundInputs,
    config: RoundConfig,
    parent: Mapping[str, Tensor],
    keep_statistics: bool,
    checkpoint: Path,
    identity: str,
    progress: Progress,
    name: str,
) -> SegmentationTrainer:
    """Train in place, or continue from the checkpoint; returns the trainer after its run.

    Args:
        labels: of `inputs.target`.
        stage: number of the training, from 0; part of the random stream.
        parent: the parent's state_dict.
        keep_statistics: keep the network's batch statistics when its weights go back to the parent's.
        identity: of the round; a checkpoint of another training is ignored.
        name: of the stage, for the progress.

    Raises:
        FloatingPointError: the loss is not finite.
        RoundPaused: `progress` raised it; the checkpoint is written.
    """
    if config.from_parent:
        statistics = batchnorm.statistics(network)
        network.load_state_dict(parent)
        if keep_statistics:
            network.load_state_dict({**network.state_dict(), **statistics})
    spec = inputs.spec
    draw = sampler(
        inputs.replay,
        list(zip(inputs.target, labels.maps, strict=True)),
        config.mixture(not inputs.replay, spec.size),
        len(spec.classes),
        config.seed,
        stage,
        soft=labels.soft,
        valid=inputs.valid,
    )
    trainer = SegmentationTrainer(
        network,
        spec,
        config.optimisation(stage),
        draw,
        seed=config.seed * 101 + stage,
        checkpoint=checkpoint,
        every=config.checkpoint_every,
        identity=f"{identity} train-{stage + 1}",
    )
    try:
        trainer.run(progress, name)
    except RoundPaused:
        trainer.save()
        raise
    if config.keep_parent:
        _pull_towards(network, parent, config.keep_parent)
    return trainer


def first_and_last(losses: Sequence[float]) -> dict[str, float]:
    """Mean loss of the first and of the last tenth of a training."""
    tenth = max(1, len(losses) // 10)
    return {
        "loss_first": round(float(np.mean(losses[:tenth])), 4) if losses else 0.0,
        "loss_last": round(float(np.mean(losses[-tenth:])), 4) if losses else 0.0,
    }


@torch.no_grad()
def _pull_towards(network: nn.Module, parent: Mapping[str, Tensor], share: float) -> None:
    """Weights (not statistics) become share·parent + (1−share)·student."""
    for name, weight in network.named_parameters():
        weight.lerp_(parent[name].to(weight.device), share)
