"""The judge of a round of segmentation: decides what passes, by the gate.

A round asks its judge twice: may these frames be learnt from, and may this candidate leave the adapter?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from adapt.gate.checks import Check
from adapt.gate.input_quality import check_frames
from adapt.gate.layout_prior import Layout
from adapt.gate.limits import Limits
from adapt.gate.measures import Measures
from adapt.gate.segmentation import cumulative, decide
from networks.pack import PackSpec

__all__ = ["Baseline", "Candidate", "GateJudge", "Judge"]


@dataclass(frozen=True)
class Candidate:
    """Weights that may become the new pack.

    Attributes:
        name: "statistics", "train-1" and so on.
        state: the network's state_dict, on the CPU.
        weight_distance: ‖w − w₀‖/‖w₀‖ to the parent.
    """

    name: str
    state: dict[str, torch.Tensor]
    measures: Measures
    weight_distance: float


@dataclass(frozen=True)
class Baseline:
    """What every candidate of a round is compared with.

    Attributes:
        parent: measures of the round's parent.
        source_share: float64 [C], class shares of the source, or None.
        layout: of the source, or None.
        refreshed: whether the parent is a refreshed pack itself; then the whole way from the released pack
            counts too.
        released_source: mIoU of the released pack on the same source hold-out; NaN = not known.
        released_distance: sum of the weight distances from the released pack to the parent, which bounds the
            true distance.
    """

    spec: PackSpec
    parent: Measures
    source_share: np.ndarray | None
    layout: Layout | None
    refreshed: bool
    released_source: float
    released_distance: float


class Judge(Protocol):
    """Decides for a round."""

    def frames(self, frames: Sequence[np.ndarray], sizes: Sequence[tuple[int, ...]]) -> list[Check]:
        """Checks of the frames uint8 [H,W,3]; `sizes` are those their cameras delivered."""
        ...

    def candidate(self, candidate: Candidate, reference: Measures, baseline: Baseline) -> list[Check]:
        """Checks of a candidate; `reference` was measured before any weight moved."""
        ...


class GateJudge:
    """The judge that ships: `adapt.gate` with these limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def frames(self, frames: Sequence[np.ndarray], sizes: Sequence[tuple[int, ...]]) -> list[Check]:
        return check_frames(frames, self.limits, sizes=sizes)

    def candidate(self, candidate: Candidate, reference: Measures, baseline: Baseline) -> list[Check]:
        checks = decide(
            candidate.measures,
            reference,
            baseline.parent,
            candidate.weight_distance,
            baseline.spec,
            self.limits,
            source_share=baseline.source_share,
            layout=baseline.layout,
        )
        if baseline.refreshed:
            distance = baseline.released_distance + candidate.weight_distance
            checks += cumulative(candidate.measures, baseline.released_source, distance, self.limits)
        return checks
