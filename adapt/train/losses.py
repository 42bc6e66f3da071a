"""The losses of self-training: cross-entropy over labelled pixels and CRST's regularisers.

After Zou et al., *Confidence Regularized Self-Training*, ICCV 2019.  MRKLD pulls the softmax of
pseudo-labelled pixels towards the uniform one, so that a wrong label is not learnt with certainty.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adapt.train.edge_losses import multilabel_edge_loss

__all__ = ["anchored_cross_entropy", "cross_entropy", "mrkld", "multilabel_edge_loss", "soft_cross_entropy"]

IGNORE = 255


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean of −log p(label) over pixels whose label is not 255; 0 if there is none.

    Args:
        logits: float32 [N,C,H,W].
        labels: uint8 or int64 [N,H,W].
        weight: float32 [N], a factor for each image, or None.
    """
    target = labels.long()
    if weight is None:
        total = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        return total / (target != IGNORE).sum().clamp(min=1)
    each = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    scale = weight.view(-1, 1, 1) * (target != IGNORE)
    return (each * scale).sum() / scale.sum().clamp(min=1e-6)


def anchored_cross_entropy(logits: Tensor, labels: Tensor, anchored: Tensor, weight: float) -> Tensor:
    """weight · mean of −log p(label) over anchored pixels (`adapt.labels.weak`); 0 where there are none.

    Args:
        logits: float32 [N,C,H,W].
        labels: uint8 or int64 [N,H,W]; an anchored pixel without a label (255) does not count.
        anchored: bool [N,H,W].
        weight: of the term, beside the mean over all labelled pixels.
    """
    known = torch.where(anchored, labels.long(), IGNORE)
    return weight * cross_entropy(logits, known)


def mrkld(logits: Tensor, labels: Tensor) -> Tensor:
    """−(1/C) Σ_c log p(c), mean over pixels whose label is not 255: KL(uniform ‖ p) up to a constant."""
    valid = labels != IGNORE
    each = -logits.log_softmax(1).mean(1)
    return (each * valid).sum() / valid.sum().clamp(min=1)


def soft_cross_entropy(logits: Tensor, soft: Tensor) -> Tensor:
    """−Σ_c ŷ_c log p_c (LRENT's soft labels), mean over pixels that have one; 0 if there is none.

    Args:
        logits: float32 [N,C,H,W].
        soft: uint8 [N,H,W,2K] as `adapt.labels.lrent.compact` packs them: K classes (255 = unused), then
            their K weights in 1/255.  The weights of a pixel are brought to a sum of 1.
    """
    classes, weights = (part.permute(0, 3, 1, 2) for part in soft.chunk(2, dim=3))
    known = classes != IGNORE
    weight = weights.to(logits.dtype) * known
    total = weight.sum(1)
    log_p = logits.log_softmax(1).gather(1, torch.where(known, classes, 0).long())
    each = -(weight * log_p).sum(1) / total.clamp(min=1)
    return each.sum() / (total > 0).sum().clamp(min=1)
