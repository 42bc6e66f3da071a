"""The gate of edges: may this edge head leave the adapter?  It needs no target label.

Known: MF of the edges on the source's labelled hold-out, agreement with the confident pseudo-edges of the
target hold-out (they come from the segmentation, which the edge head did not make), how many edge pixels the
head expects per class there, and MF on a labelled target hold-out if there is one.  Each MF is taken twice:
at the benchmark's distance, and at one so tight that edges which all moved by a few pixels do not pass.
Every limit stands in `adapt.gate.limits.EdgeLimits` with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapt.evaluate.edges import EdgeCounts
from adapt.gate.checks import Check, at_most, drop_check
from adapt.gate.limits import EdgeLimits
from adapt.labels.edge_probability import edge_probability
from adapt.labels.edges import category_edges
from common.progress import Progress, no_progress
from networks.pack import PackSpec

__all__ = ["EdgeMeasures", "decide", "distances", "edge_score", "measure"]

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class EdgeMeasures:
    """What is known of an edge head.  NaN = not known, because there is no such hold-out.

    Attributes:
        finite: no weight and no answer is NaN or infinite.
        share: float64 [K], mean edge probability per class on the target hold-out.
        source, agreement, labelled: MF (ODS, thin) on the source hold-out, against the pseudo-edges, and on
            the labelled hold-out.
        source_tight, agreement_tight, labelled_tight: the same within `EdgeLimits.tight` pixels.
    """

    finite: bool
    share: NDArray[np.float64]
    source: float = math.nan
    source_tight: float = math.nan
    agreement: float = math.nan
    agreement_tight: float = math.nan
    labelled: float = math.nan
    labelled_tight: float = math.nan

    def numbers(self) -> dict[str, Any]:
        """For a report and for a round that goes on: plain numbers, not rounded, so that it decides alike.
        Values that are not known are left out.
        """
        known = {key: value for key in MEASURED if math.isfinite(value := getattr(self, key))}
        share = [float(v) if math.isfinite(v) else None for v in self.share]  # JSON has no NaN
        return {"finite": self.finite, "share": share, **known}

    @classmethod
    def of(cls, numbers: dict[str, Any]) -> EdgeMeasures:
        """The measures that ``numbers`` returned."""
        known = {key: float(numbers[key]) for key in MEASURED if key in numbers}
        share = [math.nan if v is None else v for v in numbers["share"]]
        return cls(bool(numbers["finite"]), np.asarray(share, np.float64), **known)


MEASURED = ("source", "source_tight", "agreement", "agreement_tight", "labelled", "labelled_tight")


def _near_unknown(label: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels within 2 of one without a label: edges there are not counted."""
    from scipy.ndimage import binary_dilation

    return np.asarray(binary_dilation(label == 255, np.ones((3, 3)), iterations=2))


def distances(shape: tuple[int, int], max_distance: float, tight: float) -> tuple[float, float]:
    """(the benchmark's distance, the tight one), both as fractions of the diagonal of [H,W]."""
    return max_distance, min(max_distance, tight / math.hypot(*shape))


def _tables(
    network: Any, spec: PackSpec, pairs: Sequence[Pair], classes: int, at: Sequence[float]
) -> tuple[list[EdgeCounts], list[NDArray[np.float64]]]:
    """Count tables at each distance, and each frame's mean probability of every class float64 [K]."""
    tables = [EdgeCounts(distance, thin=True, classes=classes) for distance in at]
    shares = []
    for frame, label in pairs:
        p = edge_probability(network, spec, frame)
        shares.append(p.mean((1, 2), np.float64))
        seen, truth = p * ~_near_unknown(label), category_edges(label, classes, 1)
        for table in tables:
            table.add_classes(seen, truth)
    return tables, shares


def edge_score(
    network: Any, spec: PackSpec, pairs: Sequence[Pair], classes: int, max_distance: float = 0.0075
) -> EdgeCounts:
    """Thin counts of a network's edges against the category edges (radius 1) of class maps; 255 is no
    edge."""
    return _tables(network, spec, pairs, classes, [max_distance])[0][0]


def measure(
    network: Any,
    spec: PackSpec,
    *,
    source: Sequence[Pair],
    target: Sequence[Pair],
    labelled: Sequence[Pair] = (),
    max_distance: float,
    limits: EdgeLimits,
    progress: Progress = no_progress,
    stage: str = "measure",
) -> EdgeMeasures:
    """Measure an edge head; the network is afterwards in evaluation mode, else unchanged.

    Args:
        source, labelled: (frame uint8 [H,W,3], class map uint8 [H,W]) each.
        target: the same with pseudo-labels.
        max_distance: the benchmark's, as a fraction of the diagonal.
        progress: called after every frame.
    """
    network.eval()
    classes = len(spec.classes)
    finite = all(
        bool(torch.isfinite(v).all()) for v in network.state_dict().values() if v.is_floating_point()
    )
    if not finite:
        return EdgeMeasures(False, np.full(classes, np.nan))
    total, done = len(source) + len(target) + len(labelled), 0
    found: dict[str, float] = {}
    share = np.full(classes, np.nan)
    for name, pairs in (("source", source), ("agreement", target), ("labelled", labelled)):
        if not pairs:
            continue
        at = distances(pairs[0][1].shape, max_distance, limits.tight)
        tables = [EdgeCounts(distance, thin=True, classes=classes) for distance in at]
        shares = []
        for pair in pairs:
            try:
                frame_tables, seen = _tables(network, spec, [pair], classes, at)
            except ValueError:  # the answer holds NaN
                return EdgeMeasures(False, np.full(classes, np.nan))
            for table, one in zip(tables, frame_tables, strict=True):
                table.merge(one)
            shares += seen
            done += 1
            progress(stage, done, total)
        found[name], found[f"{name}_tight"] = (_ods(table) for table in tables)
        if name == "agreement":
            share = np.asarray(np.mean(shares, 0))
    return EdgeMeasures(True, share, **found)


def _ods(table: EdgeCounts) -> float:
    """MF in 0..1; NaN if no class has an edge in any frame."""
    return table.ods() if table.all_truth.any() else math.nan


def decide(
    candidate: EdgeMeasures, parent: EdgeMeasures, limits: EdgeLimits, classes: Sequence[str]
) -> list[Check]:
    """All checks of a candidate; both were measured on the same hold-outs."""
    reason = "every weight and answer is a number" if candidate.finite else "weights or answers hold NaN"
    checks = [Check("edges-finite", float(candidate.finite), 1.0, bool(candidate.finite), reason)]
    if not candidate.finite:
        return checks
    for name, key, limit, words in (
        ("edges-labelled", "labelled", limits.labelled_drop, "MF on the labelled hold-out"),
        ("edges-source", "source", limits.source_drop, "source hold-out MF"),
        ("edges-pseudo", "agreement", limits.agreement_drop, "MF against the confident pseudo-edges"),
    ):
        for suffix, within in (("", ""), ("_tight", f", within {limits.tight:g} pixels")):
            before, after = getattr(parent, key + suffix), getattr(candidate, key + suffix)
            if math.isfinite(before):
                full = name + suffix.replace("_", "-")
                checks.append(drop_check(full, before, after, limit, words + within, percent=True))
    seen = parent.share > limits.shown
    kept = np.where(seen, candidate.share / np.where(seen, parent.share, 1.0), 1.0)
    gone = [
        f"{classes[k]} {parent.share[k]:.4f} -> {candidate.share[k]:.4f}"
        for k in np.flatnonzero(kept < limits.kept).tolist()
    ]
    reason = "mean probability fell: " + ", ".join(gone) if gone else "every class still has its edges"
    checks.append(Check("edges-vanished", round(float(kept.min()), 5), limits.kept, not gone, reason))
    bound = np.maximum(limits.largest, parent.share + 0.1)
    worst = int((candidate.share - bound).argmax())
    before, after = parent.share[worst], candidate.share[worst]
    reason = f"the most edges are of {classes[worst]}: mean probability {before:.3f} -> {after:.3f}"
    checks.append(at_most("edges-flood", after, bound[worst], reason))
    return [replace(check, limit=round(float(check.limit), 5)) for check in checks]
