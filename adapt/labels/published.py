"""The published codes' own thresholds and labels, quirks included, to reproduce their figures.

``crst`` (Zou et al., ICCV 2019) keeps every fourth confidence of a class, starting anew at each frame, and
takes the value ranked floor(L·p) from the top of those L.  ``cbst`` (ECCV 2018) does the same with a phantom
0.0 in every class (so L is one too many), divides in float64, and pools C+1 phantom zeros in its one-k
("global") policy.  Both accept a ratio of exactly 1.  Restated from their description; values are kept in
memory, as there.  Nothing else in the project uses these: the exact rule is ``cbst.ClassHistograms``.
"""

from __future__ import annotations

import numpy as np

from adapt.labels.cbst import check_portion

__all__ = ["CODES", "PublishedThresholds", "published_labels"]

CODES = ("cbst", "crst")
IGNORE = 255


class PublishedThresholds:
    """λ_c as a published code computes them.

    Args:
        classes: C.
        code: "cbst" or "crst".
        rate: one value in `rate` is kept (4 in both codes).
    """

    def __init__(self, classes: int, code: str, rate: int = 4) -> None:
        if code not in CODES:
            raise ValueError(f"code {code!r}: choose one of {', '.join(CODES)}")
        self.classes, self.code, self.rate = classes, code, rate
        self.values: list[list[np.ndarray]] = [[] for _ in range(classes)]

    def add(self, p: np.ndarray) -> PublishedThresholds:
        """Keep one frame's softmax float32 [C,H,W]."""
        if p.ndim != 3 or p.shape[0] != self.classes:
            raise ValueError(f"the softmax map has shape {p.shape}, expected [{self.classes}, H, W]")
        if not bool(((p >= 0) & (p <= 1 + 1e-4)).all()):
            raise ValueError("the softmax map holds NaN or values outside 0..1: refuse the frame")
        index, top = p.argmax(0), p.max(0)
        for c in range(self.classes):
            self.values[c].append(top[index == c][:: self.rate])
        return self

    def _ranked(self, parts: list[np.ndarray], phantoms: int, portion: float) -> float:
        values = (
            np.concatenate([np.zeros(phantoms, np.float32), *parts]) if parts or phantoms else np.zeros(0)
        )
        rank = int(np.floor(len(values) * portion))
        if rank < 1:
            return 1.0
        found = float(np.sort(values)[::-1][rank - 1])
        return found if found > 0 else 1.0

    def thresholds(self, portion: float, policy: str = "cbst") -> np.ndarray:
        """float64 [C]; policy "cbst" (a λ for each class) or "st" (the code's "global": one for all)."""
        check_portion(portion)
        if policy not in ("cbst", "st"):
            raise ValueError(f"policy {policy!r}: choose cbst or st")
        phantom = self.code == "cbst"
        if policy == "st":
            pooled = [part for parts in self.values for part in parts]
            return np.full(self.classes, self._ranked(pooled, (self.classes + 1) * phantom, portion))
        return np.array([self._ranked(parts, int(phantom), portion) for parts in self.values])


def published_labels(p: np.ndarray, lam: np.ndarray, code: str) -> np.ndarray:
    """ŷ uint8 [H,W] as a published code rounds: "cbst" divides in float64, "crst" in float32."""
    if code not in CODES:
        raise ValueError(f"code {code!r}: choose one of {', '.join(CODES)}")
    lam = np.asarray(lam)
    if p.ndim != 3 or lam.shape != p.shape[:1] or not bool((lam > 0).all()):
        raise ValueError(f"the map has shape {p.shape}, λ {lam.shape}: expected [C,H,W], [C], λ positive")
    if not bool(((p >= 0) & (p <= 1 + 1e-4)).all()):
        raise ValueError("the softmax map holds NaN or values outside 0..1: refuse the frame")
    kind: type = np.float64 if code == "cbst" else np.float32
    divisor: np.ndarray = lam.astype(np.float32).astype(kind)[:, None, None]
    ratio: np.ndarray = p.astype(kind) / divisor
    labels: np.ndarray = ratio.argmax(0).astype(np.uint8)
    labels[ratio.max(0) < 1] = IGNORE
    return labels
