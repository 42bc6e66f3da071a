"""Checks of a segmentation answer: labels, confidence and probabilities.

The judgements compare a candidate's `AnswerStats` with a reference's and return a reason, or None if they
find no fault.  The limits and why they are what they are: `runtime/config.py`.  Knows arrays; knows nothing
of versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.config import GuardConfig, ShadowConfig
from runtime.tensors import Array, EngineSpec

Answer = Mapping[str, Array]


@dataclass(frozen=True)
class AnswerStats:
    """Counts over the pixels of one or more answered frames; stats add.

    counts       int64 [C], pixels per class
    pixels       all pixels, including those outside the classes (255)
    confidence   sum of the confidence bytes
    impossible   pixels with a confidence that no finite logits can produce (under 255/C)
    edges, pairs horizontally neighbouring pixels with different labels, and all such pairs
    """

    counts: Array
    pixels: int
    confidence: float
    impossible: int
    edges: int
    pairs: int

    def __add__(self, other: AnswerStats) -> AnswerStats:
        return AnswerStats(
            self.counts + other.counts,
            self.pixels + other.pixels,
            self.confidence + other.confidence,
            self.impossible + other.impossible,
            self.edges + other.edges,
            self.pairs + other.pairs,
        )

    @classmethod
    def of(cls, labels: Array, confidence: Array | None, classes: int) -> AnswerStats:
        """Summarizes one answer: labels, confidence uint8 [N,H,W] (or [H,W])."""
        counts = np.bincount(labels.reshape(-1), minlength=256)[:classes].astype(np.int64)
        edges = int(np.count_nonzero(labels[..., 1:] != labels[..., :-1]))
        pairs = max(1, labels.size // max(1, labels.shape[-1]) * (labels.shape[-1] - 1))
        if confidence is None:
            return cls(counts, labels.size, 0.0, 0, edges, pairs)
        # One below the bound: equal logits give 255/C only up to rounding.
        floor = max(0, 255 // max(1, classes) - 1)
        histogram = np.bincount(confidence.reshape(-1), minlength=256)
        total = float(histogram @ np.arange(256))
        return cls(counts, labels.size, total, int(histogram[:floor].sum()), edges, pairs)

    @property
    def shares(self) -> Array:
        """float64 [C]: share of the pixels per class."""
        return self.counts / max(1, self.pixels)

    @property
    def mean_confidence(self) -> float:
        """0..255; 0 if the answer has no confidence."""
        return self.confidence / max(1, self.pixels)

    @property
    def speckle(self) -> float:
        """Share of horizontally neighbouring pixels with different labels."""
        return self.edges / max(1, self.pairs)


@dataclass(frozen=True)
class Comparison:
    """Confusion counts of two versions on the same pixels; comparisons add."""

    counts: Array  # int64 [C,C]: rows the live version, columns the candidate

    def __add__(self, other: Comparison) -> Comparison:
        return Comparison(self.counts + other.counts)

    @classmethod
    def of(cls, live: Array, candidate: Array, classes: int) -> Comparison:
        """Compares two label arrays of one shape, uint8; labels outside the classes are left out."""
        first, second = live.reshape(-1), candidate.reshape(-1)
        code = first.astype(np.uint16) * 256 + second
        counts = np.bincount(code, minlength=65536).reshape(256, 256)[:classes, :classes]
        return cls(counts.astype(np.int64))

    @property
    def agreement(self) -> float:
        """Share of the pixels with the same label."""
        return float(np.trace(self.counts) / max(1, self.counts.sum()))

    @property
    def kappa(self) -> float:
        """Cohen's kappa; 1 if both have one and the same class everywhere."""
        total = max(1, int(self.counts.sum()))
        chance = float((self.counts.sum(0) / total) @ (self.counts.sum(1) / total))
        return 1.0 if chance >= 1.0 else (self.agreement - chance) / (1.0 - chance)


@dataclass(frozen=True)
class SegmentationChecks:
    """Checks of labels, confidence uint8 [N,H,W] and, if present, probabilities float [N,C,h,w].

    Implements `runtime.checks.task.OutputChecks`.
    """

    classes: tuple[str, ...]
    name = "segmentation"
    outputs = ("labels", "confidence")
    required = "labels"
    golden = {"labels": "uint8", "confidence": "uint8"}  # noqa: RUF012

    def required_outputs(self, spec: EngineSpec) -> tuple[str, ...]:
        return (*self.outputs, "probabilities") if spec.output("probabilities") else self.outputs

    def contract(self, spec: EngineSpec) -> str | None:
        if not self.classes:
            return "the manifest of a segmentation engine names no classes"
        probabilities = spec.output("probabilities")
        count = len(self.classes)
        if probabilities is None or len(probabilities.shape) != 4 or probabilities.shape[1] in (-1, count):
            return None
        return f"the engine has {probabilities.shape[1]} classes, the manifest names {count}"

    def contract_violation(self, answer: Answer) -> str | None:
        top = int(answer["labels"].max(initial=0))
        return f"label {top} is beyond the {len(self.classes)} classes" if top >= len(self.classes) else None

    def summarize(self, answer: Answer) -> AnswerStats:
        return AnswerStats.of(answer["labels"], answer.get("confidence"), len(self.classes))

    def not_finite(self, stats: AnswerStats, answer: Answer, reference: AnswerStats | None) -> str | None:
        """Finds NaN and infinity in the probabilities, if there are any, and by the confidence."""
        probabilities = answer.get("probabilities")
        if probabilities is not None and not bool(np.isfinite(probabilities).all()):
            share = 1.0 - float(np.isfinite(probabilities).mean())
            return f"{share:.1%} of the probabilities are NaN or infinite"
        if stats.impossible > 0.001 * stats.pixels:
            return (
                f"{stats.impossible / stats.pixels:.1%} of the pixels have a confidence that no "
                "finite logits give; the engine computes NaN"
            )
        return None

    def collapsed(
        self, stats: AnswerStats, reference: AnswerStats | None, limits: GuardConfig, max_vanished: float
    ) -> str | None:
        """Finds one class everywhere, or classes that the reference shows and the candidate does not."""
        shares = stats.shares
        top = int(np.argmax(shares))
        dominates = shares[top] > limits.max_dominance
        if dominates and (reference is None or reference.shares[top] <= limits.max_dominance):
            live = "" if reference is None else f"; the live version gives it {reference.shares[top]:.1%}"
            return f"class '{class_name(self.classes, top)}' takes {shares[top]:.1%} of the pixels{live}"
        if reference is None:
            return None
        shown = reference.shares >= limits.shown_share
        gone = shown & (shares < limits.vanished_share * reference.shares)
        if gone.sum() > max_vanished * shown.sum():
            lost = ", ".join(f"'{class_name(self.classes, int(k))}'" for k in np.flatnonzero(gone))
            return (
                f"{int(gone.sum())} of {int(shown.sum())} classes that the live version shows "
                f"have vanished: {lost}"
            )
        return None

    def golden_fits(self, golden: Mapping[str, Array]) -> bool:
        return all(golden[name].shape == golden["frames"].shape[:3] for name in self.golden)

    def parity(self, answer: Answer, expected: Answer) -> Array:
        """Returns float64 [3]: agreement, mean absolute difference of confidence, frames; parities add."""
        difference = np.abs(answer["confidence"].astype(np.int16) - expected["confidence"]).mean()
        return np.array([(answer["labels"] == expected["labels"]).mean(), difference, 1.0])

    def parity_report(self, parity: Array) -> dict[str, float]:
        agreement, difference, frames = (float(x) for x in parity)
        return {
            "golden_agreement": round(agreement / frames, 6),
            "golden_confidence": round(difference / frames, 3),
        }

    def golden_mismatch(self, parity: Array, limits: GuardConfig) -> str | None:
        agreement, difference, frames = (float(x) for x in parity)
        if agreement / frames < limits.min_golden_agreement:
            return (
                f"labels equal the manifest's on {agreement / frames:.2%} of the golden "
                f"pixels, the limit is {limits.min_golden_agreement:.2%}"
            )
        if difference / frames > limits.max_golden_confidence:
            return (
                f"confidence differs from the manifest's by {difference / frames:.1f} of 255 "
                f"on average, the limit is {limits.max_golden_confidence}"
            )
        return None

    def pixel_agreement(self, first: Answer, second: Answer) -> float:
        return float((first["labels"] == second["labels"]).mean())

    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> Comparison:
        return Comparison.of(live["labels"], candidate["labels"], len(self.classes))

    def disagrees(
        self, comparison: Comparison, stats: AnswerStats, reference: AnswerStats, limits: ShadowConfig
    ) -> str | None:
        """Finds a candidate whose labels are unrelated to the live version's.

        A live answer without confidence sums to 0 and sets no limit of confidence.
        """
        if comparison.agreement < limits.min_agreement:
            return (
                f"agrees with the live version on {comparison.agreement:.1%} of the pixels "
                f"(limit {limits.min_agreement:.0%})"
            )
        if comparison.kappa < limits.min_kappa:
            return (
                f"agreement with the live version is that of chance: kappa "
                f"{comparison.kappa:.3f} (limit {limits.min_kappa})"
            )
        limit = limits.max_speckle * reference.speckle + limits.speckle_slack
        if stats.speckle > limit:
            return f"labels are speckled: {stats.speckle:.1%} of neighbours differ (limit {limit:.1%})"
        if stats.mean_confidence < limits.min_confidence * reference.mean_confidence:
            return (
                f"mean confidence {stats.mean_confidence:.0f} of 255, the live version has "
                f"{reference.mean_confidence:.0f}"
            )
        return None

    def report(self, comparison: Comparison, stats: AnswerStats, reference: AnswerStats) -> dict[str, Any]:
        return {
            "agreement": round(comparison.agreement, 4),
            "kappa": round(comparison.kappa, 4),
            "speckle": [round(reference.speckle, 4), round(stats.speckle, 4)],
            "confidence": [round(reference.mean_confidence, 1), round(stats.mean_confidence, 1)],
            "shares": [[round(float(x), 4) for x in each.shares] for each in (reference, stats)],
        }

    def mean_confidence(self, stats: AnswerStats) -> float | None:
        return stats.mean_confidence


def class_name(names: tuple[str, ...], index: int) -> str:
    """Returns the name of a class; its index, if it has no name."""
    return names[index] if index < len(names) else str(index)
