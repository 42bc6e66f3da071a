"""Signals of an answer: cheap statistics that move when the network leaves its domain.

All are computed on a sub-sampled grid.  Of a segmentation answer:

    confidence         mean max softmax, less what the mixture of classes explains         (both directions)
    class-confidence   W₁ between the frame's and the baseline's histogram of each class, mean           (up)
    shares             Jensen-Shannon distance of the class shares to the baseline's                     (up)
    entropy            entropy of the class shares, in nats                                (both directions)
    edges              share of neighbouring pixels with different labels                  (both directions)
    temporal           share of pixels labelled as in the frame just before                            (down)

and of an answer of edges: `edge-density`, `edge-shares` (the same two of the class bits).

Knows numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BINS = 32  # of a confidence histogram: 8 levels of the byte each
LEVELS = (np.arange(BINS) + 0.5) / BINS  # confidence of a bin
GRID = 160  # pixels of the longer side that are processed


@dataclass(frozen=True)
class Sample:
    """One answer, summarised.

    histogram float64 [C,BINS]: of the confidence of each class, together 1 (all of it in the last bin where
    the answer has no confidence).  scalars: what needs no baseline.  grid uint8 [h,w] or None: labels to
    compare the next frame's with.
    """

    histogram: Array
    scalars: dict[str, float]
    grid: Array | None


def measure(
    labels: Array | None, confidence: Array | None, classes: int, *, edge_bits: Array | None = None
) -> Sample:
    """Summarises one answer.

    Args:
        labels: uint8 [H,W], or None for an answer of edges alone.
        confidence: uint8 [H,W], or None if it was not requested.
        edge_bits: int32 [H,W], bit k: class k.

    Raises ValueError for shapes that do not fit.
    """
    scalars: dict[str, float] = {}
    histogram = np.zeros((classes, BINS))
    grid = None
    if labels is not None:
        if labels.ndim != 2 or (confidence is not None and confidence.shape != labels.shape):
            raise ValueError(f"labels of shape {labels.shape}: wanted [H,W], and the confidence alike")
        stride = max(1, max(labels.shape) // GRID)
        grid = labels[::stride, ::stride]
        known = grid < classes
        index = grid[known].astype(np.int64) * BINS
        if confidence is not None:
            levels = confidence[::stride, ::stride][known]
            index += levels >> 3
            scalars["confidence"] = float(levels.mean()) / 255.0 if levels.size else 0.0
        else:
            index += BINS - 1
        counts = np.bincount(index, minlength=classes * BINS).astype(np.float64)
        histogram = counts.reshape(classes, BINS) / max(float(counts.sum()), 1.0)
        share = histogram.sum(1)
        shown = share[share > 0]
        scalars["entropy"] = float(-(shown * np.log(shown)).sum())
        # At full resolution along one axis each: a coarse grid would count textures as edges.
        rows, columns = labels[::stride], labels[:, ::stride]
        different = np.count_nonzero(rows[:, 1:] != rows[:, :-1]) + np.count_nonzero(
            columns[1:] != columns[:-1]
        )
        scalars["edges"] = different / max(rows[:, 1:].size + columns[1:].size, 1)
    if edge_bits is not None:
        stride = max(1, max(edge_bits.shape) // (4 * GRID))
        bits = edge_bits[::stride, ::stride]
        scalars["edge-density"] = float(np.count_nonzero(bits)) / max(bits.size, 1)
        if labels is None:
            per_class = np.array(
                [np.count_nonzero(bits & np.int32(1 << k)) for k in range(min(classes, 31))], float
            )
            histogram[: len(per_class), -1] = per_class / max(per_class.sum(), 1.0)
    return Sample(histogram, scalars, None if grid is None else grid.copy())


def js_distance(p: Array, q: Array) -> float:
    """Jensen-Shannon distance of two distributions float64 [C], 0..1 (square root of the divergence in
    bits).
    """
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        a = np.where(p > 0, p * np.log2(p / middle), 0.0).sum()
        b = np.where(q > 0, q * np.log2(q / middle), 0.0).sum()
    return math.sqrt(max(float(a + b) / 2, 0.0))


def wasserstein(histogram: Array, base: Array, least: float = 0.002) -> float:
    """W₁ between the confidence histograms of a class, 0..1, mean over classes weighted by the frame's
    shares.

    Classes without a share of `least` on both sides are left out.
    """
    frame, baseline = histogram.sum(1), base.sum(1)
    both = (frame >= least) & (baseline >= least)
    if not both.any():
        return 0.0
    a = np.cumsum(histogram[both] / frame[both, None], axis=1)
    b = np.cumsum(base[both] / baseline[both, None], axis=1)
    return float(np.average(np.abs(a - b).mean(1), weights=frame[both]))


def composition(histogram: Array, base: Array) -> float:
    """By how much the mean confidence differs because of what is in the picture: Σ_c (share_c − base
    share_c)·m_c.

    m_c: mean confidence of class c in `base`.  A street with many thin things is less confident and has not
    drifted.
    """
    baseline = base.sum(1)
    mean = (base @ LEVELS) / np.maximum(baseline, 1e-12)
    known = baseline > 0
    return float(((histogram.sum(1) - baseline)[known] * (mean[known] - float(base.sum(0) @ LEVELS))).sum())


def reference_statistics(
    reference: Mapping[str, Array] | None, classes: int
) -> tuple[Array | None, Array | None]:
    """Returns (share [C], histogram [C,BINS]) of a version's reference.npz.

    Each is None if the reference lacks it, or has it in another shape.
    """
    share = histogram = None
    if reference:
        raw = np.asarray(reference["confidence"], np.float64) if "confidence" in reference else None
        if raw is not None and raw.shape == (classes, 256) and np.isfinite(raw).all() and raw.sum() > 0:
            histogram = raw.reshape(classes, BINS, 256 // BINS).sum(2) / raw.sum()
            share = histogram.sum(1)
        raw = np.asarray(reference["share"], np.float64) if "share" in reference else None
        if raw is not None and raw.shape == (classes,) and np.isfinite(raw).all() and raw.sum() > 0:
            share = raw / raw.sum()
    return share, histogram
