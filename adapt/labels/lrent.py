"""LRENT: label regularisation of CRST (Zou et al., *Confidence Regularized Self-Training*, ICCV 2019).

A pseudo-label need not be one class: with entropy as its regulariser the best label for the weights at hand
is soft,  ŷ_c ∝ (p_c/λ_c)^{1/α},  and a pixel gets one only where that lowers the objective:
Σ_c −ŷ_c log p_c + α ŷ_c log ŷ_c  <  Σ_c −ŷ_c log λ_c.  α → 0 gives CBST's one-hot labels back.
"""

from __future__ import annotations

import numpy as np

__all__ = ["soft_labels"]


def soft_labels(p: np.ndarray, lam: np.ndarray, alpha: float = 0.25) -> np.ndarray:
    """float32 [C,H,W]; sums to 1 over classes where there is a label, all zero where there is none.

    Args:
        p: softmax float32 [C,H,W].
        lam: λ_c [C], positive.
        alpha: weight of the entropy, more than 0.
    """
    if alpha <= 0:
        raise ValueError(f"alpha {alpha}: more than 0 (0 is CBST: use pseudo_labels)")
    if not np.isfinite(p).all() or (p < 0).any():
        raise ValueError("the softmax map holds NaN or negative values: refuse the frame")
    log_p = np.log(np.maximum(p.astype(np.float64), 1e-30))
    log_lam = np.log(np.asarray(lam, np.float64))[:, None, None]
    score = (log_p - log_lam) / alpha
    score -= score.max(0)
    soft = np.exp(score)
    soft /= soft.sum(0)
    log_soft = np.log(np.maximum(soft, 1e-30))
    cost = (-soft * log_p + alpha * soft * log_soft).sum(0)
    keep = cost < (-soft * log_lam).sum(0)
    return np.where(keep, soft, 0.0).astype(np.float32)
