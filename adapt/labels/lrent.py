"""LRENT: label regularisation of CRST (Zou et al., *Confidence Regularized Self-Training*, ICCV 2019).

A pseudo-label need not be one class: with entropy as its regulariser the best label for the weights at hand
is soft,  ŷ_c ∝ (p_c/λ_c)^{1/α},  and a pixel gets one only where that lowers the objective:
Σ_c −ŷ_c log p_c + α ŷ_c log ŷ_c  <  Σ_c −ŷ_c log λ_c.  With that ŷ the two sides differ by
α log Σ_c (p_c/λ_c)^{1/α}, so a pixel is kept where the sum exceeds 1.  α → 0 gives CBST's one-hot labels.

The published code keeps ŷ as another float32 map on disk (159 MB a frame).  Here a pixel keeps its `KEEP`
largest ŷ_c and their classes, a byte each: with the published α = .25 the rest holds under 1 % (tests).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from adapt.labels import cbst

__all__ = ["KEEP", "compact", "compact_labels", "read", "soft_labels", "write"]

KEEP = 4
IGNORE = 255


def _checked(p: np.ndarray, lam: np.ndarray, alpha: float) -> np.ndarray:
    if not alpha > 0:
        raise ValueError(f"alpha {alpha}: more than 0 (0 is CBST: use pseudo_labels)")
    if p.ndim != 3 or np.shape(lam) != p.shape[:1]:
        raise ValueError(f"the softmax map has shape {p.shape} and λ {np.shape(lam)}: expected [C,H,W], [C]")
    if not bool(((p >= 0) & (p <= 1 + 1e-4)).all()):
        raise ValueError("the softmax map holds NaN or values outside 0..1: refuse the frame")
    lam = np.asarray(lam, np.float64)
    if not bool(((lam > 0) & np.isfinite(lam)).all()):
        raise ValueError(f"λ must be positive and finite, got {lam.tolist()}: was the histogram empty?")
    return lam


def soft_labels(p: np.ndarray, lam: np.ndarray, alpha: float = 0.25) -> np.ndarray:
    """float32 [C,H,W]; sums to 1 over classes where there is a label, all zero where there is none.

    Args:
        p: softmax float32 [C,H,W].
        lam: λ_c [C], positive.
        alpha: weight of the entropy, more than 0.

    Raises:
        ValueError: alpha not positive, λ not positive, NaN or values outside 0..1 in the map.
    """
    lam = _checked(p, lam, alpha)
    with np.errstate(divide="ignore"):
        score = (np.log(p.astype(np.float64)) - np.log(lam)[:, None, None]) / alpha
    top = np.maximum(score.max(0), -1e300)  # a pixel of zeros everywhere gets no label
    soft = np.exp(score - top)
    total = soft.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        keep = top + np.log(total) > 0
        soft = soft / total
    return np.where(keep, soft, 0.0).astype(np.float32)


def compact(soft: np.ndarray, keep: int = KEEP) -> np.ndarray:
    """A soft label in 2·keep bytes a pixel: uint8 [H,W,2·keep], classes by falling weight, then weights.

    Weights are in 1/255 of ŷ; an unused place, and a pixel without a label, has class 255 and weight 0.
    """
    classes = soft.shape[0]
    count = min(keep, classes)
    order = np.argsort(-soft, axis=0, kind="stable")[:count]
    weight = np.rint(np.take_along_axis(soft, order, 0) * 255).astype(np.uint8)
    out = np.zeros((*soft.shape[1:], 2 * keep), np.uint8)
    out[..., :keep] = IGNORE
    out[..., :count] = np.where(weight > 0, order, IGNORE).transpose(1, 2, 0)
    out[..., keep : keep + count] = weight.transpose(1, 2, 0)
    return out


def compact_labels(
    p: np.ndarray,
    lam: np.ndarray,
    alpha: float = 0.25,
    *,
    prior: np.ndarray | None = None,
    allowed: Collection[int] | np.ndarray | None = None,
    valid: np.ndarray | None = None,
    keep: int = KEEP,
) -> np.ndarray:
    """`compact(soft_labels(…))` of q_c·p_c over the allowed classes, in one pass where Numba is installed.

    Args:
        p: softmax float32 [C,H,W].
        lam, alpha: as in `soft_labels`.
        prior, allowed, valid: as in `adapt.labels.cbst.pseudo_labels`.

    Returns:
        uint8 [H,W,2·keep], see `compact`; channel 0 is the most likely class, 255 = no label.
    """
    lam = _checked(p, lam, alpha)
    if prior is not None:
        cbst.check_prior(prior, p)
    mask, inside = cbst.allowed_mask(allowed, p.shape[0]), cbst.valid_mask(valid, p)
    q = np.ascontiguousarray(p if prior is None else p * prior, np.float32)
    kernels = cbst.kernels()
    if kernels is None:
        soft = soft_labels(q if mask is None else np.where(mask[:, None, None], q, 0.0), lam, alpha)
        out = compact(soft, keep)
    else:
        out = np.zeros((*q.shape[1:], 2 * keep), np.uint8)
        out[..., :keep] = IGNORE
        kernels.soften(q, lam, alpha, np.ones(len(q), np.bool_) if mask is None else mask, keep, out)
    if inside is not None:
        out[~inside] = np.repeat(np.array([IGNORE, 0], np.uint8), keep)
    return out


def write(path: Path, soft: np.ndarray) -> None:
    """Keep what `compact` gave (compressed .npz)."""
    with open(path, "wb") as file:
        np.savez_compressed(file, soft=soft)


def read(path: Path) -> np.ndarray:
    """What `write` kept, uint8 [H,W,2K]."""
    with np.load(path, allow_pickle=False) as data:
        return np.asarray(data["soft"])
