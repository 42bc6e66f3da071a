"""The boundary benchmark as a library: MF (ODS), OIS and AP per class, thin and raw, without MATLAB.

``match`` is one matching; ``EdgeCounts`` is the streaming, mergeable table of a whole evaluation, cheap
enough for a validation metric during training and for the gate of a swap.  Protocols are data
(``PROTOCOLS``).

A threshold k is k/100, k = 1..99, and a pixel is on at k when its probability is >= k/100.  uint8 maps mean
v/255 and are compared exactly; float maps are compared in their own precision.

It knows nothing of files, data sets or networks.
Source: the SEAL evaluation (Yu et al., ECCV 2018) and the BSDS500 bench it grew from; our counts are the
maximum matching that their randomised solver approaches from below (see docs/edges.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt.evaluate.counting import LEVELS, count_annotators, count_raw, count_thin
from adapt.evaluate.matching import match_pairs, radius_of
from adapt.labels.errors import EdgeError
from adapt.labels.thinning import thin as thin_map

__all__ = ["PROTOCOLS", "ClassScores", "EdgeCounts", "EdgeError", "Protocol", "best_f", "levels_of", "match"]

THRESHOLDS = np.arange(1, LEVELS + 1) / 100.0


@dataclass(frozen=True)
class Protocol:
    """How a benchmark scores: matching distance as a fraction of the diagonal, cut margin in pixels,
    resolution.

    ``scale``: the truth's resolution over the annotation's; predictions are brought to the truth's size.
    ``annotators``: several truths an image, OR-ed through min-cost matchings; the truth is not thinned again.
    ``modes``: what the benchmark reports.  ``instances``: a border between two instances of a class is an
    edge; False: only a border of the class is (the other protocol of CASENet, DFF and STEAL).
    """

    name: str
    max_distance: float
    margin: int = 0
    scale: float = 1.0
    annotators: bool = False
    modes: tuple[str, ...] = ("thin", "raw")
    instances: bool = True


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("sbd", 0.02, margin=5),
        Protocol("sbd-reanno", 0.0075, margin=5),
        Protocol("cityscapes", 0.0035, scale=0.5),
        Protocol("sbd-cls", 0.02, margin=5, instances=False),
        Protocol("cityscapes-cls", 0.02, scale=0.5, instances=False),
        Protocol("bsds", 0.0075, annotators=True, modes=("thin",)),
    )
}


def match(prediction: NDArray[np.bool_], truth: NDArray[np.bool_], max_distance: float) -> int:
    """How many prediction pixels have a truth pixel of their own within reach: the maximum one-to-one
    matching.

    prediction, truth: bool [H,W]; max_distance: fraction of the diagonal (the radius is compared unrounded,
    dx^2 + dy^2 <= R^2).  Raises EdgeError for maps that differ in size or are not bool [H,W].
    """
    for name, mask in (("prediction", prediction), ("truth", truth)):
        if np.asarray(mask).dtype != np.bool_:
            raise EdgeError(
                f"match: the {name} is {np.asarray(mask).dtype}, bool is needed; threshold it first"
            )
    return int(match_pairs(prediction, truth, max_distance)[0].size)


def levels_of(probability: NDArray[Any]) -> NDArray[np.uint8]:
    """The largest k in 0..99 with probability >= k/100, per pixel: uint8, shape kept.

    probability: uint8 (v/255), bool, or float in 0..1.  Raises EdgeError for other dtypes, NaN or out of
    range.
    """
    p = np.asarray(probability)
    if p.dtype == np.bool_:
        return p.astype(np.uint8) * np.uint8(LEVELS)
    if p.dtype == np.uint8:
        # v/255 >= k/100 in integers
        return np.asarray(np.minimum(np.arange(256) * 100 // 255, LEVELS).astype(np.uint8)[p])
    if not np.issubdtype(p.dtype, np.floating):
        raise EdgeError(f"edges: probabilities are {p.dtype}; uint8 (v/255) or float in 0..1 is needed")
    low, high = (p.min(), p.max()) if p.size else (0.0, 0.0)
    if np.isnan(low) or np.isnan(high):
        raise EdgeError(
            "edges: the probability map holds NaN, which no threshold orders; mend the network first"
        )
    if low < 0 or high > 1:
        raise EdgeError(
            f"edges: probabilities run from {low:.9g} to {high:.9g}; give sigmoids in 0..1, not logits"
        )
    if not high:
        return np.zeros(p.shape, np.uint8)
    threshold = np.append(0.0, np.append(THRESHOLDS, 2.0)).astype(p.dtype)
    k = np.minimum((p * 100).astype(np.uint8), LEVELS)
    k += p >= threshold[k + 1]  # rounding in p * 100 may be one off on either side
    k -= p < threshold[k]
    return np.asarray(k)


def _f(precision: NDArray[np.float64], recall: NDArray[np.float64]) -> NDArray[np.float64]:
    total = precision + recall
    return 2 * precision * recall / np.where(total == 0, 1, total)


def _ratio(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return part / np.where(whole == 0, 1, whole)


def best_f(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """(F, threshold, precision, recall) at the best point of a curve over thresholds 0.01 … 0.99.

    Between neighbouring thresholds precision and recall are interpolated linearly in 100 steps, as the
    benchmark does.
    """
    t = np.linspace(0, 1, 100)
    r = (recall[1:, None] * t + recall[:-1, None] * (1 - t)).ravel()
    p = (precision[1:, None] * t + precision[:-1, None] * (1 - t)).ravel()
    at = (THRESHOLDS[1:, None] * t + THRESHOLDS[:-1, None] * (1 - t)).ravel()
    r, p, at = np.append(recall[0], r), np.append(precision[0], p), np.append(THRESHOLDS[0], at)
    f = _f(p, r)
    i = int(f.argmax())
    return float(f[i]), float(at[i]), float(p[i]), float(r[i])


@dataclass(frozen=True)
class ClassScores:
    """One class of a finished table.  All nan where the class has no truth pixel in any image."""

    ods: float
    threshold: float
    precision: float
    recall: float
    ois: float
    ap: float
    truth_pixels: int


NO_SCORES = ClassScores(math.nan, math.nan, math.nan, math.nan, math.nan, math.nan, 0)


@dataclass
class EdgeCounts:
    """A mergeable table of matched and total pixels at 99 thresholds.

    max_distance: fraction of the diagonal; thin: thin predictions (and truths, unless there are several
    annotators); classes: how many rows; margin: pixels cut off on every side before anything else.

    Adding the same images in any order, split over any number of tables and merged, gives the same numbers.
    """

    max_distance: float = 0.0075
    thin: bool = True
    classes: int = 1
    margin: int = 0
    # int64 [classes, 99] each: matched and all truth pixels, matched and all predicted pixels
    matched_truth: NDArray[np.int64] = field(init=False, repr=False)
    all_truth: NDArray[np.int64] = field(init=False, repr=False)
    matched_prediction: NDArray[np.int64] = field(init=False, repr=False)
    all_prediction: NDArray[np.int64] = field(init=False, repr=False)
    # int64 [classes, 4]: the same four at each image's own best threshold
    best: NDArray[np.int64] = field(init=False, repr=False)
    images: NDArray[np.int64] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        radius_of((1, 1), self.max_distance)
        whole = all(isinstance(v, int | np.integer) for v in (self.classes, self.margin))
        if not whole or self.classes < 1 or self.margin < 0:
            raise EdgeError(
                f"EdgeCounts: classes={self.classes}, margin={self.margin}; whole numbers, at least 1 and 0, "
                "are needed"
            )
        for name in ("matched_truth", "all_truth", "matched_prediction", "all_prediction"):
            setattr(self, name, np.zeros((self.classes, LEVELS), np.int64))
        self.best = np.zeros((self.classes, 4), np.int64)
        self.images = np.zeros(self.classes, np.int64)

    @classmethod
    def of(cls, protocol: str | Protocol, *, thin: bool = True, classes: int = 1) -> EdgeCounts:
        """An empty table with a protocol's distance and margin."""
        if isinstance(protocol, str):
            if protocol not in PROTOCOLS:
                raise EdgeError(f"EdgeCounts: no protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
            protocol = PROTOCOLS[protocol]
        return cls(protocol.max_distance, thin, classes, protocol.margin)

    def _cut(self, array: NDArray[Any]) -> NDArray[Any]:
        m = self.margin
        height, width = array.shape[-2:]
        if height <= 2 * m or width <= 2 * m:
            raise EdgeError(
                f"edges: a map of {height}x{width} has nothing left inside a margin of {m}; leave it out "
                "or set margin=0"
            )
        return array[..., m : height - m, m : width - m] if m else array

    def count(
        self, probability: NDArray[Any], truth: NDArray[np.bool_], ignore: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """One image's counts of one class, int64 [4,99]: matched truth, truth, matched predicted, predicted.

        Pure (touches no table, may run in any thread).  probability: uint8 or float [H,W]; truth: bool
        [H,W], or bool [A,H,W] for several annotators.  An image without the class adds its predicted pixels
        as false positives, as the SEAL benchmark has it.  ignore: bool [H,W] or None; where it is True the
        truth does not know, so that neither predicted nor truth pixels count there.  Raises EdgeError, see
        ``levels_of`` and ``match``.
        """
        truth = np.asarray(truth)
        if truth.dtype != np.bool_ or truth.ndim not in (2, 3):
            raise EdgeError(
                f"edges: the truth is {truth.dtype} {list(truth.shape)}; bool [H,W] (or [A,H,W]) is needed"
            )
        if not len(truth):
            raise EdgeError(f"edges: the truth is {list(truth.shape)}, of no annotator; leave this image out")
        p = np.asarray(probability)
        if p.shape != truth.shape[-2:]:
            raise EdgeError(
                f"edges: the probability map is {list(p.shape)} and the truth {list(truth.shape)}; "
                "resize the prediction to the truth first (adapt.evaluate.resize.resize_bicubic)"
            )
        level, truth = levels_of(np.ascontiguousarray(self._cut(p))), self._cut(truth)
        if ignore is not None:
            unknown = np.asarray(ignore)
            if unknown.shape != p.shape or unknown.dtype != np.bool_:
                raise EdgeError(
                    f"edges: ignore is {unknown.dtype} {list(unknown.shape)}; bool {list(p.shape)} is needed"
                )
            unknown = self._cut(unknown)
            level, truth = np.where(unknown, np.uint8(0), level), truth & ~unknown
        counts = np.zeros((4, LEVELS), np.int64)
        if truth.ndim == 3:
            rows, total = count_annotators(level, truth, self.max_distance, thinned=self.thin)
            counts[0], counts[1], counts[2], counts[3] = rows[0], total, rows[1], rows[2]
            return counts
        if self.thin:
            truth = thin_map(truth)
        counts[1] = int(truth.sum())
        if level.any():
            counts[2:] = (count_thin if self.thin else count_raw)(level, truth, self.max_distance)
            counts[0] = counts[2]
        return counts

    def _check_class(self, class_index: int) -> None:
        if not isinstance(class_index, int | np.integer) or not 0 <= class_index < self.classes:
            raise EdgeError(
                f"EdgeCounts: class {class_index} of {self.classes}; make the table with classes=…"
            )

    def add_counts(self, counts: NDArray[np.int64], class_index: int = 0) -> None:
        """Add what ``count`` returned for an image to a class."""
        self._check_class(class_index)
        self.matched_truth[class_index] += counts[0]
        self.all_truth[class_index] += counts[1]
        self.matched_prediction[class_index] += counts[2]
        self.all_prediction[class_index] += counts[3]
        f = _f(_ratio(counts[2], counts[3]), _ratio(counts[0], counts[1]))
        self.best[class_index] += counts[:, LEVELS - 1 - int(f[::-1].argmax())]  # the last of equals
        self.images[class_index] += 1

    def add(
        self,
        probability: NDArray[Any],
        truth: NDArray[np.bool_],
        class_index: int = 0,
        ignore: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count one image of one class; see ``count`` for what is taken and what is refused."""
        self._check_class(class_index)
        self.add_counts(self.count(probability, truth, ignore), class_index)

    def add_classes(
        self, probability: NDArray[Any], truth: NDArray[np.bool_], ignore: NDArray[np.bool_] | None = None
    ) -> None:
        """Count one image of all classes: probability uint8 or float [K,H,W], truth bool [K,H,W], ignore bool
        [H,W]."""
        if len(probability) != self.classes or len(truth) != self.classes:
            raise EdgeError(
                f"EdgeCounts: {len(probability)} probability and {len(truth)} truth maps for "
                f"{self.classes} classes"
            )
        # All or none are added.
        counts = [self.count(p, t, ignore) for p, t in zip(probability, truth, strict=True)]
        for index, one in enumerate(counts):
            self.add_counts(one, index)

    def merge(self, other: EdgeCounts) -> EdgeCounts:
        """Add another table of the same kind to this one (and return this one)."""
        if not isinstance(other, EdgeCounts):
            raise EdgeError(f"EdgeCounts: cannot merge a {type(other).__name__}; count tables merge")
        mine = (self.max_distance, self.thin, self.classes, self.margin)
        theirs = (other.max_distance, other.thin, other.classes, other.margin)
        if mine != theirs:
            raise EdgeError(
                f"EdgeCounts: cannot merge (max_distance, thin, classes, margin) = {theirs} into {mine}; "
                "count both with one protocol"
            )
        for name in _TABLES:
            getattr(self, name)[...] += getattr(other, name)
        return self

    def save(self, path: str | Path) -> None:
        """Write the table as .npz, so that shards can be merged later."""
        kind = np.array([self.max_distance, self.thin, self.classes, self.margin], np.float64)
        with open(path, "wb") as file:
            np.savez_compressed(file, kind=kind, **{name: getattr(self, name) for name in _TABLES})

    @classmethod
    def load(cls, path: str | Path) -> EdgeCounts:
        """Read what ``save`` wrote.  Raises EdgeError for any other file."""
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                distance, thin, classes, margin = file["kind"].tolist()
                held = {name: file[name] for name in _TABLES}
                if any(len(v) != classes or v.dtype != np.int64 or (v < 0).any() for v in held.values()):
                    raise ValueError("counts of other classes, or no counts")
                table = cls(distance, bool(thin), int(classes), int(margin))
                for name, counts in held.items():
                    if counts.shape != getattr(table, name).shape:
                        raise ValueError(f"{name} is {list(counts.shape)}")
                    setattr(table, name, counts)
        except Exception as error:  # zip, zlib, numpy: damaged files raise many kinds
            why = (str(error).splitlines() or [type(error).__name__])[0]
            raise EdgeError(
                f"EdgeCounts: {path} is not a saved count table ({why}); write it with save()"
            ) from None
        for part, whole in (("truth", "all_truth"), ("prediction", "all_prediction")):
            if (getattr(table, f"matched_{part}") > getattr(table, whole)).any():
                raise EdgeError(f"EdgeCounts: {path} has more matched than all pixels; count again")
        return table

    def scores(self) -> list[ClassScores]:
        """Per class: ODS with its threshold, precision and recall, OIS, AP."""
        out = []
        for k in range(self.classes):
            truth_pixels = int(self.all_truth[k].max())
            if truth_pixels == 0:
                out.append(NO_SCORES)
                continue
            recall = _ratio(self.matched_truth[k], self.all_truth[k])
            precision = _ratio(self.matched_prediction[k], self.all_prediction[k])
            f, threshold, p, r = best_f(recall, precision)
            b = self.best[k]
            ois = float(_f(_ratio(b[2], b[3]), _ratio(b[0], b[1])))
            out.append(
                ClassScores(f, threshold, p, r, ois, _average_precision(recall, precision), truth_pixels)
            )
        return out

    def _mean(self, what: str) -> float:
        values = [getattr(s, what) for s in self.scores() if s.truth_pixels]
        if not values:
            raise EdgeError(
                f"EdgeCounts: no truth pixel of any class in {int(self.images.max())} images, so {what} "
                "has no value; "
                "check the truth maps"
            )
        return float(np.mean(values))

    def ods(self) -> float:
        """MF at the best threshold of the data set, mean over the classes that have truth pixels."""
        return self._mean("ods")

    def ois(self) -> float:
        """F of the counts at each image's own best threshold, mean over the classes that have truth
        pixels."""
        return self._mean("ois")

    def ap(self) -> float:
        """Average precision on a recall grid of 0.01, mean over the classes that have truth pixels."""
        return self._mean("ap")


_TABLES = ("matched_truth", "all_truth", "matched_prediction", "all_prediction", "best", "images")


def _average_precision(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the curve, precision interpolated at recall 0, .01, …, 1 and 0 outside the curve."""
    unique, first = np.unique(recall, return_index=True)
    if unique.size < 2:
        return 0.0
    return float(np.interp(np.arange(101) / 100, unique, precision[first], left=0, right=0).sum() * 0.01)
