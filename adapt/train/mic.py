"""Masked image consistency (Hoyer et al., *MIC*, CVPR 2023): learn the context of the target domain.

Most blocks of a target crop are hidden from the student, and its answer to the whole crop is held to the
answer of the mean teacher to the crop unhidden.  A crop's weight is the share of its pixels that the
teacher is sure of.  Blocks of 64 pixels at a crop of 512, ratio .7, confidence .968 and weight 1 are the
paper's.

This module knows tensors and masks.  It may not know where crops come from or how weights move.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["CONFIDENCE", "block_mask", "consistency"]

RATIO = 0.7
CONFIDENCE = 0.968


def block_mask(rng: np.random.Generator, count: int, size: tuple[int, int], block: int = 0) -> np.ndarray:
    """bool [count,H,W], True = the student sees it; a block of `block` pixels is hidden with chance .7.

    block: 0 = an eighth of the crop's height, the paper's 64 of 512, at least 8.
    """
    side = block or max(8, size[0] // 8)
    rows, columns = -(-size[0] // side), -(-size[1] // side)
    seen = rng.random((count, rows, columns)) >= RATIO
    return np.asarray(seen.repeat(side, 1).repeat(side, 2)[:, : size[0], : size[1]])


def consistency(
    student: Tensor, teacher: Tensor, ignore: Tensor | None = None, confidence: float = CONFIDENCE
) -> Tensor:
    """Mean over all pixels of q·CE(student, argmax teacher); q: each crop's share of sure pixels.

    Args:
        student, teacher: logits float32 [N,C,H,W], the student's of the masked crops.
        ignore: bool [N,H,W], True = no part in it (own bonnet, padding); or None.
    """
    with torch.no_grad():
        probability, label = teacher.softmax(1).max(1)
        valid = torch.ones_like(label, dtype=torch.bool) if ignore is None else ~ignore
        counted = valid.sum((1, 2)).clamp(min=1)
        sure = ((probability >= confidence) & valid).sum((1, 2)) / counted
    each = F.cross_entropy(student, label, reduction="none") * valid
    return (each.sum((1, 2)) * sure).sum() / counted.sum()
