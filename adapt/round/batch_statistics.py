"""Batch statistics of the target (AdaBN, Li et al., 2016), mixed with the present ones, or the present ones.

`RoundConfig.adabn_by` names what decides.  No weight moves here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import Tensor, nn

from adapt import batchnorm
from adapt.gate.measures import Measures
from adapt.gate.preference import (
    prefer_by_class_shares,
    prefer_by_flip_consistency,
    prefer_by_translated_source,
)
from adapt.round.config import RoundConfig
from adapt.round.measurement import normalised_batches
from adapt.round.outcome import RoundError
from common.progress import Progress
from networks.pack import PackSpec

__all__ = ["BY_SOURCE_FRAMES", "TargetStatistics", "resolve_choice"]

BY_SOURCE_FRAMES = ("translated", "veto")  # choices that need labelled source frames


def resolve_choice(choice: str, *, source_holdout: bool) -> str:
    """The choice that "auto" stands for; any other choice is returned unchanged."""
    if choice == "auto":
        return "veto" if source_holdout else "mirror"
    return choice


class TargetStatistics:
    """Estimates batch statistics on target frames and decides how much of the present ones stays.

    Args:
        frames: uint8 [H,W,3] of the target that are learnt from.
        choice: a resolved `RoundConfig.adabn_by`.
        measure: measures a network as it is (`HoldoutMeasurement.quick`).
        source_share: float64 [C], or None if it is not known; "shares" needs it.
        source_holdout: whether there is a labelled source hold-out; "translated" and "veto" need it.
    """

    def __init__(
        self,
        frames: Sequence[np.ndarray],
        spec: PackSpec,
        config: RoundConfig,
        choice: str,
        measure: Callable[[nn.Module], Measures],
        *,
        source_share: np.ndarray | None,
        source_holdout: bool,
        progress: Progress,
    ) -> None:
        self.frames, self.spec, self.config, self.choice = frames, spec, config, choice
        self.measure, self.progress = measure, progress
        self.source_share, self.source_holdout = source_share, source_holdout

    def choose(self, network: nn.Module, stage: str, before: Measures | None = None) -> float:
        """Load the best mix of target and present statistics into the network.

        Args:
            before: what was measured with the present statistics, if that is known.

        Returns:
            The share of the present statistics in the mix; 1 = nothing changed.

        Raises:
            RoundError: the pack lacks what `choice` compares with.
        """
        if self.choice == "shares" and self.source_share is None:
            raise RoundError("adabn_by is shares and the pack knows no class shares: use mirror")
        if self.choice in BY_SOURCE_FRAMES and not self.source_holdout:
            raise RoundError(f"adabn_by is {self.choice} and the pack has no source hold-out: use mirror")
        present, target = batchnorm.statistics(network), self.estimate(network, stage)
        best = before or self._measure_with(network, present)
        chosen, kept = present, 1.0
        for keep in self.config.adabn_keep:
            mixed = batchnorm.mix(target, present, keep)
            measures = self._measure_with(network, mixed)
            if self._wins(measures, best):
                best, chosen, kept = measures, mixed, keep
                if self.choice == "veto":
                    break
        batchnorm.load(network, chosen)
        return kept

    def after_training(self, network: nn.Module, stage: str, kept: float) -> float:
        """Update the statistics after a training; returns the share that stays of those it ended with.

        A veto that was decided before any weight moved holds: it compares with the old domain's statistics,
        and a training that mixes both domains has none of those.

        Args:
            kept: what `choose` returned before any weight moved.
        """
        if self.choice != "veto":
            return self.choose(network, stage)
        if kept < 1:
            present = batchnorm.statistics(network)
            batchnorm.load(network, batchnorm.mix(self.estimate(network, stage), present, kept))
        return kept

    def estimate(self, network: nn.Module, stage: str) -> dict[str, Tensor]:
        """Batch statistics of the target frames; the network has them afterwards."""
        # In random order, so that a batch is a sample and not one street.
        order = np.random.default_rng([self.config.seed, 31]).permutation(len(self.frames))
        frames = [self.frames[i] for i in order]
        size, device = self.config.adabn_batch, self.config.device

        def batches() -> Iterator[Tensor]:
            for x, done in normalised_batches(frames, self.spec, size, device):
                yield x
                self.progress(stage, done, len(frames))

        batchnorm.reestimate(network, batches())
        return batchnorm.statistics(network)

    def _measure_with(self, network: nn.Module, statistics: dict[str, Tensor]) -> Measures:
        batchnorm.load(network, statistics)
        return self.measure(network)

    def _wins(self, measures: Measures, best: Measures) -> bool:
        limits = self.config.limits
        if self.choice in BY_SOURCE_FRAMES:
            return prefer_by_translated_source(measures, best, limits)
        if self.choice == "shares":
            assert self.source_share is not None
            return prefer_by_class_shares(measures, best, self.source_share, limits)
        return prefer_by_flip_consistency(measures, best, limits)
