"""Checks of an answer of semantic edges: edge_bits and edges.

The counterpart of `runtime/checks/segmentation.py` for `edge_bits` int32 [N,H,W] (bit k: class k at or over
its threshold) and `edges` uint8 [N,K,H,W] (255 · sigmoid).  Edges are thin and few, so shares of equal
pixels contain little information: agreement is counted on edge pixels, within a tolerance, and beyond chance.
All classes are processed at once, on the bit fields.  The limits and why they are what they are:
`runtime/config.py`.  Knows arrays; knows nothing of versions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.checks.segmentation import class_name
from runtime.config import GuardConfig, ShadowConfig
from runtime.tensors import Array, EngineSpec

Answer = Mapping[str, Array]
MAX_CLASSES = 31  # edge_bits is one int32, and the sign bit is not used
_BITS = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.int64)  # byte -> its eight bits
_SLACK = 2  # bytes: rounding of an answer, and of a half-precision engine


@dataclass(frozen=True)
class EdgeStats:
    """Counts over the pixels of one or more answered frames; stats add.

    counts    int64 [K], pixels that carry the bit of a class
    some      pixels that carry the bit of any class
    pixels    all pixels
    stray     pixels that carry a bit beyond the K classes
    strength  sum of the edge bytes over all classes
    measured  number of edge bytes in `strength`; 0 if `edges` was not requested
    """

    counts: Array
    some: int
    pixels: int
    stray: int
    strength: float
    measured: int

    def __add__(self, other: EdgeStats) -> EdgeStats:
        return EdgeStats(
            self.counts + other.counts,
            self.some + other.some,
            self.pixels + other.pixels,
            self.stray + other.stray,
            self.strength + other.strength,
            self.measured + other.measured,
        )

    @classmethod
    def of(cls, bits: Array, edges: Array | None, classes: int) -> EdgeStats:
        """Summarizes one answer: edge_bits int32 [N,H,W], edges uint8 [N,K,H,W]."""
        known = (1 << classes) - 1
        stray = int(np.count_nonzero(bits & ~np.int32(known)))
        strength, measured = 0.0, 0
        if edges is not None:
            histogram = np.bincount(edges.reshape(-1), minlength=256)
            strength, measured = float(histogram @ np.arange(256)), edges.size
        some = int(np.count_nonzero(bits))
        return cls(class_counts(bits, classes), some, bits.size, stray, strength, measured)

    @property
    def shares(self) -> Array:
        """float64 [K]: share of the pixels per class."""
        return self.counts / max(1, self.pixels)

    @property
    def share(self) -> float:
        """Share of the pixels on an edge of any class."""
        return self.some / max(1, self.pixels)


def class_counts(bits: Array, classes: int) -> Array:
    """Returns int64 [K]: the number of pixels of int32 `bits` that carry each class's bit."""
    octets = np.ascontiguousarray(bits, dtype="<i4").reshape(-1).view(np.uint8).reshape(-1, 4)
    counts = [np.bincount(octets[:, i], minlength=256) @ _BITS for i in range((classes + 7) // 8)]
    return np.concatenate(counts)[:classes] if counts else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Parity:
    """Bit fields and bytes compared with the exporter's; parities add."""

    same: int
    pixels: int
    both: int
    either: int
    difference: float
    measured: int

    def __add__(self, other: Parity) -> Parity:
        return Parity(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @classmethod
    def of(cls, bits: Array, edges: Array, want_bits: Array, want_edges: Array, classes: int) -> Parity:
        """Compares an answer with what the golden set contains for the frame (same shapes)."""
        return cls(
            same=int(np.count_nonzero(bits == want_bits)),
            pixels=bits.size,
            both=int(class_counts(bits & want_bits, classes).sum()),
            either=int(class_counts(bits | want_bits, classes).sum()),
            difference=float(np.abs(edges.astype(np.int16) - want_edges).sum(dtype=np.float64)),
            measured=edges.size,
        )

    @property
    def bits_equal(self) -> float:
        """Share of the pixels whose whole bit field is the exporter's."""
        return self.same / max(1, self.pixels)

    @property
    def overlap(self) -> float:
        """Edge pixels of a class in both, over those in either; 1 if there are none."""
        return self.both / self.either if self.either else 1.0

    @property
    def mean_difference(self) -> float:
        """Mean absolute difference of the edge bytes, 0..255."""
        return self.difference / max(1, self.measured)


@dataclass(frozen=True)
class EdgeComparison:
    """Edge pixels of two versions on the same frames, matched within a tolerance; comparisons add.

    live, mine       int64 [K], edge pixels of the live version and of the candidate
    cross            int64 [K,K]: of the live version's pixels of class j, those near one of the candidate's k
    back             int64 [K]: of the candidate's, those near one of the live version's of that class
    found_by_chance, back_by_chance   float64 [K]: what independent maps of these densities would give
    """

    live: Array
    mine: Array
    cross: Array
    back: Array
    found_by_chance: Array
    back_by_chance: Array

    @classmethod
    def of(cls, live: Array, candidate: Array, classes: int, fraction: float) -> EdgeComparison:
        """Compares two edge_bits int32 [N,H,W] of one shape; `fraction`: see `tolerance`."""
        radius = tolerance(live.shape[1], live.shape[2], fraction)
        near_live, near_mine = dilate(live, radius), dilate(candidate, radius)
        on = live != 0
        some, near = live[on], near_mine[on]
        cross = np.stack([class_counts(some[(near >> k) & 1 == 1], classes) for k in range(classes)], axis=1)
        counts, mine = class_counts(live, classes), class_counts(candidate, classes)
        return cls(
            counts,
            mine,
            cross,
            class_counts(candidate & near_live, classes),
            counts * class_counts(near_mine, classes) / max(1, live.size),
            mine * class_counts(near_live, classes) / max(1, live.size),
        )

    def __add__(self, other: EdgeComparison) -> EdgeComparison:
        return EdgeComparison(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @property
    def found(self) -> float:
        """Share of the live version's edge pixels that the candidate has nearby, beyond chance."""
        return _beyond_chance(np.trace(self.cross), self.found_by_chance.sum(), self.live.sum())

    @property
    def kept(self) -> float:
        """Share of the candidate's edge pixels that the live version has nearby, beyond chance."""
        return _beyond_chance(self.back.sum(), self.back_by_chance.sum(), self.mine.sum())

    @property
    def mixed(self) -> float:
        """Share of the live version's edge pixels, of those found again, in classes that the candidate labels
        as one other class at least twice as often."""
        best = self.cross.max(1, initial=0)
        weight = self.live[best > 0].sum()
        return float(self.live[(best > 0) & (2 * np.diagonal(self.cross) < best)].sum() / max(1, weight))


def _beyond_chance(got: float, chance: float, of: float) -> float:
    """Cohen's correction; 0 if chance alone would find everything."""
    return 0.0 if of - chance <= 1e-9 * max(1.0, of) else float((got - chance) / (of - chance))


def tolerance(height: int, width: int, fraction: float) -> int:
    """Returns a fraction of the diagonal in pixels, as edge benchmarks define it; at least 1."""
    return max(1, round(fraction * math.hypot(height, width)))


def dilate(bits: Array, radius: int) -> Array:
    """Returns int32 [N,H,W]: every class's pixels, grown by `radius` in both directions."""
    wide = bits.copy()
    for s in range(1, radius + 1):
        wide[:, :, s:] |= bits[:, :, :-s]
        wide[:, :, :-s] |= bits[:, :, s:]
    out = wide.copy()
    for s in range(1, radius + 1):
        out[:, s:] |= wide[:, :-s]
        out[:, :-s] |= wide[:, s:]
    return out


@dataclass(frozen=True)
class EdgeChecks:
    """Checks of edge_bits int32 [N,H,W] and edges uint8 [N,K,H,W]; `thresholds` are the manifest's.

    Implements `runtime.checks.task.OutputChecks`.
    """

    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    name = "edges"
    outputs = ("edge_bits", "edges")
    required = "edge_bits"
    golden = {"edge_bits": "int32", "edges": "uint8"}  # noqa: RUF012

    def required_outputs(self, spec: EngineSpec) -> tuple[str, ...]:
        return self.outputs

    def contract(self, spec: EngineSpec) -> str | None:
        edges, count = spec.output("edges"), len(self.classes)
        assert edges is not None, "recognised by it"
        if not 1 <= count <= MAX_CLASSES:
            return f"the manifest names {count} edge_classes; edge_bits holds 1 to {MAX_CLASSES}"
        if edges.shape[1] not in (-1, count):
            return f"the engine has {edges.shape[1]} edge classes, the manifest names {count}"
        if len(self.thresholds) != count or not all(0 < t < 1 for t in self.thresholds):
            return f"edge_thresholds must be {count} numbers between 0 and 1, one for each edge class"
        return None

    def contract_violation(self, answer: Answer) -> str | None:
        bits, edges = answer["edge_bits"], answer["edges"]
        if edges.shape != (len(bits), len(self.classes), *bits.shape[1:]):
            return f"edges {list(edges.shape)} and edge_bits {list(bits.shape)} are not of one frame"
        if stray := EdgeStats.of(bits, None, len(self.classes)).stray:
            return f"edge_bits carries bits beyond the {len(self.classes)} classes on {stray} pixels"
        return self._inconsistent(bits, edges)

    def _inconsistent(self, bits: Array, edges: Array) -> str | None:
        """edge_bits must be what `edges` and the manifest's thresholds make them, except for rounding."""
        wrong = 0
        for k, threshold in enumerate(self.thresholds):
            on = (bits >> k) & 1 == 1
            level = edges[:, k].astype(np.float32)
            wrong += int(np.count_nonzero(on & (level < 255 * threshold - _SLACK)))
            wrong += int(np.count_nonzero(~on & (level > 255 * threshold + _SLACK)))
        if wrong > 0.001 * bits.size:
            return f"{wrong} bits of edge_bits are not the edges at or over the manifest's edge_thresholds"
        return None

    def summarize(self, answer: Answer) -> EdgeStats:
        return EdgeStats.of(answer["edge_bits"], answer.get("edges"), len(self.classes))

    def not_finite(self, stats: EdgeStats, answer: Answer, reference: EdgeStats | None) -> str | None:
        """Finds NaN, whose sigmoid becomes byte 0: every probability is 0, unless the live version has the
        same on the same frames (a covered camera).
        """
        covered = reference is not None and reference.strength == 0
        if stats.measured and stats.strength == 0 and not covered:
            return "every edge probability is exactly 0, as NaN gives and finite logits do not"
        return None

    def collapsed(
        self, stats: EdgeStats, reference: EdgeStats | None, limits: GuardConfig, max_vanished: float
    ) -> str | None:
        """Finds no edges at all, edges everywhere, or classes that only the reference shows."""
        if stats.some == 0 and (reference is None or reference.some > 0):
            live = "" if reference is None else f"; the live version has them on {reference.share:.2%}"
            return f"there is not one edge{live}"
        top = int(np.argmax(stats.counts))
        dominates = stats.shares[top] > limits.max_edge_share
        if dominates and (reference is None or reference.shares[top] <= limits.max_edge_share):
            live = "" if reference is None else f"; the live version has {reference.shares[top]:.1%}"
            name = class_name(self.classes, top)
            return f"{stats.shares[top]:.1%} of the pixels are an edge of class '{name}'{live}"
        if reference is None:
            return None
        shown = reference.shares >= limits.shown_edge_share
        gone = shown & (stats.shares < limits.vanished_share * reference.shares)
        if gone.sum() > max_vanished * shown.sum():
            lost = ", ".join(f"'{class_name(self.classes, int(k))}'" for k in np.flatnonzero(gone))
            return f"edges of {int(gone.sum())} of {int(shown.sum())} classes have vanished: {lost}"
        return None

    def golden_fits(self, golden: Mapping[str, Array]) -> bool:
        """The edges may be of fewer frames than there are: a map per class is large."""
        frames, bits, edges = golden["frames"], golden["edge_bits"], golden["edges"]
        return (
            bits.ndim == 3
            and len(bits) <= len(frames)
            and bits.shape[1:] == frames.shape[1:3]
            and edges.shape == (len(bits), len(self.classes), *frames.shape[1:3])
        )

    def parity(self, answer: Answer, expected: Answer) -> Parity:
        mine = answer["edge_bits"], answer["edges"]
        return Parity.of(*mine, expected["edge_bits"], expected["edges"], len(self.classes))

    def parity_report(self, parity: Parity) -> dict[str, float]:
        return {
            "golden_bits": round(parity.bits_equal, 6),
            "golden_overlap": round(parity.overlap, 4),
            "golden_edges": round(parity.mean_difference, 3),
        }

    def golden_mismatch(self, parity: Parity, limits: GuardConfig) -> str | None:
        if parity.bits_equal < limits.min_golden_bits:
            return (
                f"edge_bits equal the manifest's on {parity.bits_equal:.2%} of the golden pixels, "
                f"the limit is {limits.min_golden_bits:.2%}"
            )
        if parity.overlap < limits.min_golden_overlap:
            return (
                f"{parity.overlap:.1%} of the golden edge pixels are in both the answer and the manifest, "
                f"the limit is {limits.min_golden_overlap:.0%}"
            )
        if parity.mean_difference > limits.max_golden_edges:
            return (
                f"edges differ from the manifest's by {parity.mean_difference:.1f} of 255 on average, "
                f"the limit is {limits.max_golden_edges}"
            )
        return None

    def pixel_agreement(self, first: Answer, second: Answer) -> float:
        return float((first["edge_bits"] == second["edge_bits"]).mean())

    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> EdgeComparison:
        both = live["edge_bits"], candidate["edge_bits"]
        return EdgeComparison.of(*both, len(self.classes), limits.edge_tolerance)

    def disagrees(
        self, comparison: EdgeComparison, stats: EdgeStats, reference: EdgeStats, limits: ShadowConfig
    ) -> str | None:
        """Finds a candidate whose edges are unrelated to the live version's.

        One direction is enough: a candidate that finds more than the live version keeps its edges, one that
        drops false edges keeps the rest.  If the live version shows none, there is no reference.
        """
        if comparison.live.sum() == 0:
            return None
        if max(comparison.found, comparison.kept) < limits.min_edge_kappa:
            return (
                f"{comparison.found:.1%} of the live version's edges are found again and "
                f"{comparison.kept:.1%} of the candidate's are the live version's, beyond chance "
                f"(limit {limits.min_edge_kappa:.0%})"
            )
        if comparison.mixed > limits.max_mixed:
            return (
                f"the classes are mixed up: {comparison.mixed:.1%} of the live version's edges "
                f"are mostly called another class (limit {limits.max_mixed:.0%})"
            )
        return None

    def report(self, comparison: EdgeComparison, stats: EdgeStats, reference: EdgeStats) -> dict[str, Any]:
        return {
            "edges_found": round(comparison.found, 4),
            "edges_kept": round(comparison.kept, 4),
            "edges_mixed": round(comparison.mixed, 4),
            "edge_share": [round(reference.share, 5), round(stats.share, 5)],
            "edge_shares": [[round(float(x), 5) for x in each.shares] for each in (reference, stats)],
        }

    def mean_confidence(self, stats: EdgeStats) -> float | None:
        """None: the number of edges depends on the scene."""
        return None
