"""What is looked at in an answer, and what a look must show.  Pure functions on arrays.

A `Look` is the summary of one or more answered frames; the judgements compare a
candidate's look with a reference's and return a reason, or None when there is nothing to
say against it.  The limits and why they are what they are: `runtime/config.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.config import GuardConfig, ShadowConfig
from runtime.tensors import Array


@dataclass(frozen=True)
class Look:
    """Counts over answered pixels; looks add.

    counts       int64 [C], pixels per class
    pixels       all pixels, those outside the classes (255) included
    confidence   sum of the confidence bytes
    impossible   pixels whose confidence no finite logits can give (under 255/C)
    edges, pairs horizontally neighbouring pixels with different labels, and all such pairs
    """

    counts: Array
    pixels: int
    confidence: float
    impossible: int
    edges: int
    pairs: int

    def __add__(self, other: Look) -> Look:
        return Look(
            self.counts + other.counts,
            self.pixels + other.pixels,
            self.confidence + other.confidence,
            self.impossible + other.impossible,
            self.edges + other.edges,
            self.pairs + other.pairs,
        )

    @property
    def shares(self) -> Array:
        return self.counts / max(1, self.pixels)

    @property
    def mean_confidence(self) -> float:
        return self.confidence / max(1, self.pixels)

    @property
    def speckle(self) -> float:
        return self.edges / max(1, self.pairs)


def look(labels: Array, confidence: Array | None, classes: int) -> Look:
    """labels, confidence uint8 [N,H,W] (or [H,W]) of one answer."""
    counts = np.bincount(labels.reshape(-1), minlength=256)[:classes].astype(np.int64)
    edges = int(np.count_nonzero(labels[..., 1:] != labels[..., :-1]))
    pairs = max(1, labels.size // max(1, labels.shape[-1]) * (labels.shape[-1] - 1))
    if confidence is None:
        return Look(counts, labels.size, 0.0, 0, edges, pairs)
    # one below the bound: equal logits give 255/C only up to rounding
    floor = max(0, 255 // max(1, classes) - 1)
    histogram = np.bincount(confidence.reshape(-1), minlength=256)
    total = float(histogram @ np.arange(256))
    return Look(counts, labels.size, total, int(histogram[:floor].sum()), edges, pairs)


def not_finite(seen: Look, probabilities: Array | None) -> str | None:
    """NaN and infinity, from the probabilities where there are any and from the confidence in any case."""
    if probabilities is not None and not bool(np.isfinite(probabilities).all()):
        share = 1.0 - float(np.isfinite(probabilities).mean())
        return f"{share:.1%} of the probabilities are NaN or infinite"
    if seen.impossible > 0.001 * seen.pixels:
        return (
            f"{seen.impossible / seen.pixels:.1%} of the pixels have a confidence that no "
            f"finite logits give; "
            "the engine computes NaN"
        )
    return None


def collapsed(
    seen: Look, reference: Look | None, guard: GuardConfig, names: Sequence[str], max_vanished: float
) -> str | None:
    """One class everywhere, or classes that the reference shows and the candidate does not."""
    shares = seen.shares
    top = int(np.argmax(shares))
    if shares[top] > guard.max_dominance and (
        reference is None or reference.shares[top] <= guard.max_dominance
    ):
        beside = "" if reference is None else f"; the live version gives it {reference.shares[top]:.1%}"
        return f"class '{_name(names, top)}' takes {shares[top]:.1%} of the pixels{beside}"
    if reference is None:
        return None
    shown = reference.shares >= guard.shown_share
    gone = shown & (shares < guard.vanished_share * reference.shares)
    if gone.sum() > max_vanished * shown.sum():
        lost = ", ".join(f"'{_name(names, int(k))}'" for k in np.flatnonzero(gone))
        return (
            f"{int(gone.sum())} of {int(shown.sum())} classes that the live version shows "
            f"have vanished: {lost}"
        )
    return None


@dataclass(frozen=True)
class Comparison:
    """Confusion counts of two versions on the same pixels; comparisons add."""

    counts: Array  # int64 [C,C]: rows the live version, columns the candidate

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.counts + other.counts)

    @property
    def agreement(self) -> float:
        return float(np.trace(self.counts) / max(1, self.counts.sum()))

    @property
    def kappa(self) -> float:
        """Cohen's kappa; 1 when both give one and the same class everywhere."""
        total = max(1, int(self.counts.sum()))
        chance = float((self.counts.sum(0) / total) @ (self.counts.sum(1) / total))
        return 1.0 if chance >= 1.0 else (self.agreement - chance) / (1.0 - chance)


def compare(live: Array, candidate: Array, classes: int) -> Comparison:
    """Two label arrays of one shape, uint8; labels outside the classes are left out."""
    first, second = live.reshape(-1), candidate.reshape(-1)
    code = first.astype(np.uint16) * 256 + second
    counts = np.bincount(code, minlength=65536).reshape(256, 256)[:classes, :classes]
    return Comparison(counts.astype(np.int64))


def disagrees(
    comparison: Comparison, seen: Look, reference: Look, shadow: ShadowConfig, *, confidence: bool = True
) -> str | None:
    """Whether the candidate has nothing to do with what the live version sees."""
    if comparison.agreement < shadow.min_agreement:
        return (
            f"agrees with the live version on {comparison.agreement:.1%} of the pixels "
            f"(limit {shadow.min_agreement:.0%})"
        )
    if comparison.kappa < shadow.min_kappa:
        return (
            f"agreement with the live version is that of chance: kappa "
            f"{comparison.kappa:.3f} (limit {shadow.min_kappa})"
        )
    limit = shadow.max_speckle * reference.speckle + shadow.speckle_slack
    if seen.speckle > limit:
        return f"labels are speckled: {seen.speckle:.1%} of neighbours differ (limit {limit:.1%})"
    least = shadow.min_confidence * reference.mean_confidence
    if confidence and seen.mean_confidence < least:
        return (
            f"mean confidence {seen.mean_confidence:.0f} of 255, the live version has "
            f"{reference.mean_confidence:.0f}"
        )
    return None


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)
