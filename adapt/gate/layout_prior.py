"""Is this a street at all?  How likely a label map is where things are in the source's labels.

A road lies below and sky is above, in the rain too: light and weather change what a street looks like and
not how it is laid out.  A frame of something else (a garage wall, a screen saver) gets labels that lie where
nothing of the kind ever does.  Knows label maps alone: no network, no frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

__all__ = ["Layout"]

SIZE = (32, 64)
LEAST = 1e-4  # a class at a place where it never was: finite, so that one pixel cannot decide
FOLDS = 5
SPREAD = 0.33  # where it cannot be measured: that of the rendered streets under their prior, rounded up


@dataclass(frozen=True)
class Layout:
    """log P(c | y,x) of the source's labels, float64 [C,h,w], and what source frames score under it."""

    log_p: np.ndarray
    mean: float
    spread: float

    @classmethod
    def of_labels(cls, labels: Sequence[np.ndarray], classes: int) -> Layout:
        """From label maps uint8 [H,W], 255 = ignore, in the order of the drive.  Raises ValueError if
        there is none.

        Mean and spread are of maps that the layout was not made of (five parts, neighbours together): forty
        maps fit a layout of themselves so well that every other street looked foreign.
        """
        if not len(labels):
            raise ValueError("no label map: a layout needs the source's labels or its prior")
        parts = np.array_split(np.arange(len(labels)), min(FOLDS, len(labels)))
        mass = [_mass([labels[i] for i in part], classes) for part in parts]
        whole = np.sum(mass, axis=0)
        if len(parts) == 1:  # nothing to compare with
            found = cls(_log(whole), 0.0, 0.0)
            return cls(found.log_p, float(found.scores(labels).mean()), SPREAD)
        scores = np.concatenate(
            [
                cls(_log(whole - own), 0.0, 0.0).scores([labels[i] for i in part])
                for part, own in zip(parts, mass, strict=True)
            ]
        )
        return cls(_log(whole), float(scores.mean()), float(scores.std()))

    @classmethod
    def of_prior(cls, prior: np.ndarray, share: np.ndarray, spread: float = SPREAD) -> Layout:
        """From a pack's q_c(y,x) [C,h,w] and class shares [C], if it has no labelled frame.

        The mean is then what the layout expects of itself; the spread over frames is not known and is taken
        from the rendered streets.
        """
        mass = np.asarray(prior, np.float64)
        mass = mass / np.maximum(mass.sum((1, 2), keepdims=True), 1e-30) * np.asarray(share)[:, None, None]
        planes = [
            np.asarray(Image.fromarray(p.astype(np.float32)).resize(SIZE[::-1], Image.Resampling.BILINEAR))
            for p in mass / max(float(mass.max()), 1e-30)
        ]
        log_p = _log(np.clip(np.stack(planes).astype(np.float64), 0, None))
        return cls(log_p, float((np.exp(log_p) * log_p).sum(0).mean()), spread)

    def scores(self, labels: Sequence[np.ndarray]) -> np.ndarray:
        """Mean log-likelihood per pixel of each label map, float64 [n]; ignored pixels are left out."""
        out = np.zeros(len(labels))
        for i, y in enumerate(labels):
            small = _small(y).astype(np.int64)
            known = small < len(self.log_p)
            picked = np.take_along_axis(self.log_p, np.where(known, small, 0)[None], axis=0)[0]
            out[i] = picked[known].mean() if known.any() else 0.0
        return out


def _mass(labels: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """How often each class was where, smoothed; float64 [C,h,w]."""
    counts = np.zeros((classes, *SIZE))
    for y in labels:
        small = _small(y)
        for c in range(classes):
            counts[c] += small == c
    return np.stack([gaussian_filter(plane, 2.0, mode="nearest") for plane in counts])


def _small(label: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(label).resize(SIZE[::-1], Image.Resampling.NEAREST))


def _log(mass: np.ndarray) -> np.ndarray:
    total = np.maximum(mass.sum(0, keepdims=True), 1e-30)
    return np.asarray(np.log(np.maximum(mass / total, LEAST)))
