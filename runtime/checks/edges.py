"""What is looked at in an answer of semantic edges, and what a look must show.  Pure functions on arrays.

The counterpart of `runtime/checks/segmentation.py` for `edge_bits` int32 [N,H,W] (bit k: class k at or over its threshold)
and `edges` uint8 [N,K,H,W] (255 · sigmoid).  Edges are thin and few, so shares of equal pixels say little:
agreement is counted on edge pixels, within a tolerance, and beyond chance.  All classes are worked on at
once, on the bit fields.  The limits and why they are what they are: `runtime/config.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from runtime.config import GuardConfig, ShadowConfig
from runtime.tensors import Array

MAX_CLASSES = 31  # edge_bits is one int32, and the sign is none
_BITS = ((np.arange(256)[:, None] >> np.arange(8)) & 1).astype(np.int64)  # byte -> its eight bits
_SLACK = 2  # bytes: rounding of an answer, and of a half-precision engine


@dataclass(frozen=True)
class EdgeLook:
    """Counts over answered pixels; looks add.

    counts    int64 [K], pixels that carry the bit of a class
    some      pixels that carry any
    pixels    all pixels
    stray     pixels that carry a bit beyond the K classes
    strength  sum of the edge bytes over all classes; `measured` of them were looked at (0: not asked for)
    """

    counts: Array
    some: int
    pixels: int
    stray: int
    strength: float
    measured: int

    def __add__(self, other: EdgeLook) -> EdgeLook:
        return EdgeLook(
            self.counts + other.counts,
            self.some + other.some,
            self.pixels + other.pixels,
            self.stray + other.stray,
            self.strength + other.strength,
            self.measured + other.measured,
        )

    @property
    def shares(self) -> Array:
        return self.counts / max(1, self.pixels)

    @property
    def share(self) -> float:
        """Of the pixels, those on an edge of any class."""
        return self.some / max(1, self.pixels)


def class_counts(bits: Array, classes: int) -> Array:
    """int64 [K]: how many pixels of int32 `bits` carry each class's bit."""
    octets = np.ascontiguousarray(bits, dtype="<i4").reshape(-1).view(np.uint8).reshape(-1, 4)
    counts = [np.bincount(octets[:, i], minlength=256) @ _BITS for i in range((classes + 7) // 8)]
    return np.concatenate(counts)[:classes] if counts else np.zeros(0, np.int64)


def look(bits: Array, edges: Array | None, classes: int) -> EdgeLook:
    """edge_bits int32 [N,H,W], edges uint8 [N,K,H,W] of one answer."""
    known = (1 << classes) - 1
    stray = int(np.count_nonzero(bits & ~np.int32(known)))
    strength, measured = 0.0, 0
    if edges is not None:
        strength, measured = float(np.bincount(edges.reshape(-1), minlength=256) @ np.arange(256)), edges.size
    some = int(np.count_nonzero(bits))
    return EdgeLook(class_counts(bits, classes), some, bits.size, stray, strength, measured)


def not_finite(seen: EdgeLook, reference: EdgeLook | None) -> str | None:
    """A sigmoid of NaN becomes byte 0.  Not one probability above 0, in no class and nowhere, is that, unless
    the live version says the same of the same frames (a covered camera)."""
    if seen.measured and seen.strength == 0 and not (reference is not None and reference.strength == 0):
        return "every edge probability is exactly 0, as NaN gives and finite logits do not"
    return None


def inconsistent(bits: Array, edges: Array, thresholds: Sequence[float]) -> str | None:
    """edge_bits must be what `edges` and the manifest's thresholds make them, but for rounding."""
    wrong = 0
    for k, threshold in enumerate(thresholds):
        on = (bits >> k) & 1 == 1
        level = edges[:, k].astype(np.float32)
        wrong += int(np.count_nonzero(on & (level < 255 * threshold - _SLACK)))
        wrong += int(np.count_nonzero(~on & (level > 255 * threshold + _SLACK)))
    if wrong > 0.001 * bits.size:
        return f"{wrong} bits of edge_bits are not the edges at or over the manifest's edge_thresholds"
    return None


def collapsed(
    seen: EdgeLook, reference: EdgeLook | None, guard: GuardConfig, names: Sequence[str], max_vanished: float
) -> str | None:
    """No edges at all, everything an edge, or classes that the reference shows and the candidate does not."""
    if seen.some == 0 and (reference is None or reference.some > 0):
        beside = "" if reference is None else f"; the live version has them on {reference.share:.2%}"
        return f"there is not one edge{beside}"
    top = int(np.argmax(seen.counts))
    if seen.shares[top] > guard.max_edge_share and (
        reference is None or reference.shares[top] <= guard.max_edge_share
    ):
        beside = "" if reference is None else f"; the live version has {reference.shares[top]:.1%}"
        return f"{seen.shares[top]:.1%} of the pixels are an edge of class '{_name(names, top)}'{beside}"
    if reference is None:
        return None
    shown = reference.shares >= guard.shown_edge_share
    gone = shown & (seen.shares < guard.vanished_share * reference.shares)
    if gone.sum() > max_vanished * shown.sum():
        lost = ", ".join(f"'{_name(names, int(k))}'" for k in np.flatnonzero(gone))
        return f"edges of {int(gone.sum())} of {int(shown.sum())} classes have vanished: {lost}"
    return None


@dataclass(frozen=True)
class Parity:
    """Bit fields and bytes against the exporter's; parities add."""

    same: int
    pixels: int
    both: int
    either: int
    difference: float
    measured: int

    def __add__(self, other: Parity) -> Parity:
        return Parity(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @property
    def bits_equal(self) -> float:
        """Share of the pixels whose whole bit field is the exporter's."""
        return self.same / max(1, self.pixels)

    @property
    def overlap(self) -> float:
        """Edge pixels of a class in both, over those in either; 1 where there are none."""
        return self.both / self.either if self.either else 1.0

    @property
    def mean_difference(self) -> float:
        """Of the edge bytes, absolute."""
        return self.difference / max(1, self.measured)


def parity(bits: Array, edges: Array, want_bits: Array, want_edges: Array, classes: int) -> Parity:
    """An answer beside what the manifest's golden set says of the frame (same shapes)."""
    return Parity(
        same=int(np.count_nonzero(bits == want_bits)),
        pixels=bits.size,
        both=int(class_counts(bits & want_bits, classes).sum()),
        either=int(class_counts(bits | want_bits, classes).sum()),
        difference=float(np.abs(edges.astype(np.int16) - want_edges).sum(dtype=np.float64)),
        measured=edges.size,
    )


def missed(seen: Parity, guard: GuardConfig) -> str | None:
    if seen.bits_equal < guard.min_golden_bits:
        return (
            f"edge_bits equal the manifest's on {seen.bits_equal:.2%} of the golden pixels, "
            f"the limit is {guard.min_golden_bits:.2%}"
        )
    if seen.overlap < guard.min_golden_overlap:
        return (
            f"{seen.overlap:.1%} of the golden edge pixels are in both the answer and the manifest, "
            f"the limit is {guard.min_golden_overlap:.0%}"
        )
    if seen.mean_difference > guard.max_golden_edges:
        return (
            f"edges differ from the manifest's by {seen.mean_difference:.1f} of 255 on average, "
            f"the limit is {guard.max_golden_edges}"
        )
    return None


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
    def none(cls, classes: int) -> EdgeComparison:
        count, chance = np.zeros(classes, np.int64), np.zeros(classes)
        return cls(count, count, np.zeros((classes, classes), np.int64), count, chance, chance)

    def __add__(self, other: EdgeComparison) -> EdgeComparison:
        return EdgeComparison(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    @property
    def found(self) -> float:
        """Share of the live version's edge pixels that the candidate has near by, beyond chance."""
        return _beyond_chance(np.trace(self.cross), self.found_by_chance.sum(), self.live.sum())

    @property
    def kept(self) -> float:
        """Share of the candidate's edge pixels that the live version has near by, beyond chance."""
        return _beyond_chance(self.back.sum(), self.back_by_chance.sum(), self.mine.sum())

    @property
    def mixed(self) -> float:
        """Share of the live version's edge pixels, found again at all, in classes that the candidate calls
        something else at least twice as often."""
        best = self.cross.max(1, initial=0)
        weight = self.live[best > 0].sum()
        return float(self.live[(best > 0) & (2 * np.diagonal(self.cross) < best)].sum() / max(1, weight))


def _beyond_chance(got: float, chance: float, of: float) -> float:
    """Cohen's correction; 0 where chance alone would find everything."""
    return 0.0 if of - chance <= 1e-9 * max(1.0, of) else float((got - chance) / (of - chance))


def tolerance(height: int, width: int, fraction: float) -> int:
    """Pixels: a fraction of the diagonal, as the edge benchmarks give it; at least 1."""
    return max(1, round(fraction * math.hypot(height, width)))


def dilate(bits: Array, radius: int) -> Array:
    """Every class's pixels, grown by `radius` in both directions: int32 [N,H,W]."""
    wide = bits.copy()
    for s in range(1, radius + 1):
        wide[:, :, s:] |= bits[:, :, :-s]
        wide[:, :, :-s] |= bits[:, :, s:]
    out = wide.copy()
    for s in range(1, radius + 1):
        out[:, s:] |= wide[:, :-s]
        out[:, :-s] |= wide[:, s:]
    return out


def compare(live: Array, candidate: Array, classes: int, fraction: float) -> EdgeComparison:
    """Two edge_bits int32 [N,H,W] of one shape."""
    radius = tolerance(live.shape[1], live.shape[2], fraction)
    near_live, near_mine = dilate(live, radius), dilate(candidate, radius)
    on = live != 0
    some, near = live[on], near_mine[on]
    cross = np.stack([class_counts(some[(near >> k) & 1 == 1], classes) for k in range(classes)], axis=1)
    counts, mine = class_counts(live, classes), class_counts(candidate, classes)
    return EdgeComparison(
        counts,
        mine,
        cross,
        class_counts(candidate & near_live, classes),
        counts * class_counts(near_mine, classes) / max(1, live.size),
        mine * class_counts(near_live, classes) / max(1, live.size),
    )


def disagrees(comparison: EdgeComparison, shadow: ShadowConfig) -> str | None:
    """Whether the candidate's edges have nothing to do with the live version's.

    One direction is enough: a candidate that finds more than the live version keeps its edges, one that drops
    false edges keeps the rest.  Where the live version shows none there is nothing to agree with.
    """
    if comparison.live.sum() == 0:
        return None
    if max(comparison.found, comparison.kept) < shadow.min_edge_kappa:
        return (
            f"{comparison.found:.1%} of the live version's edges are found again and {comparison.kept:.1%} "
            f"of the candidate's are the live version's, beyond chance (limit {shadow.min_edge_kappa:.0%})"
        )
    if comparison.mixed > shadow.max_mixed:
        return (
            f"the classes are mixed up: {comparison.mixed:.1%} of the live version's edges "
            f"are mostly called another class (limit {shadow.max_mixed:.0%})"
        )
    return None


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)
