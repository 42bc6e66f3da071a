"""The multi-label edge loss of CASENet and SEAL, over bit-field labels.

Per image, over pixels that are not ignored: pos = pixels with any class bit, neg = the rest.  β is the same
for every class of the image (that is how the published layer counts, not per class):

    reweighted    y · neg/(pos+neg) · softplus(−x)  +  (1−y) · pos/(pos+neg) · softplus(x)
    unweighted    y · softplus(−x) + (1−y) · softplus(x)                       (CASENet-S, SEAL)

The published layers return the SUM over pixels and classes divided by N ("caffe_sum": that is why their
learning rates are 1e-7); "mean" divides by the valid pixels and classes instead and suits ordinary rates.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["multilabel_edge_loss", "unpack_labels"]


def unpack_labels(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Bit field uint32 (or int32/int64 of the same bits) [N,C,H,W] -> (bool [N,K,H,W], valid bool [N,H,W]).

    Raises ValueError if the channels are not those of ``classes``.
    """
    channels = (classes + 1 + 31) // 32
    if labels.ndim != 4 or labels.shape[1] != channels:
        raise ValueError(
            f"edge loss: labels are {list(labels.shape)}, {classes} classes take a bit field "
            f"[N,{channels},H,W]"
        )
    if labels.dtype == torch.uint32:
        field = labels.view(torch.int32)  # torch has no shifts on uint32
    elif labels.dtype in (torch.int32, torch.int64):
        field = labels
    else:
        raise ValueError(
            f"edge loss: labels are {labels.dtype}, a uint32 bit field is needed (adapt.labels.edge_codec)"
        )
    spare = -1 << (classes - 32 * (channels - 1)) & 0x7FFFFFFF  # neither a class nor "ignore"
    if bool((field[:, -1] & spare).any()):
        raise ValueError(
            f"edge loss: bits beyond class {classes - 1} are set; the labels hold more classes or "
            "another bit order"
        )
    k = torch.arange(classes, device=labels.device)
    bits = (field[:, k // 32] >> (k % 32).to(field.dtype)[None, :, None, None]) & 1
    valid = ((field[:, -1] >> 31) & 1) == 0
    return bits.bool(), valid


def multilabel_edge_loss(
    logits: Tensor, labels: Tensor, reweighted: bool = True, reduction: str = "mean"
) -> Tensor:
    """The loss of a batch.

    Args:
        logits: float [N,K,H,W].
        labels: bit field uint32 [N,ceil((K+1)/32),H,W]; bit 31 of the last channel = ignore.
        reweighted: CASENet's β weights; False: the unweighted loss of CASENet-S and SEAL.
        reduction: "mean" over valid pixels and classes, or "caffe_sum": sum / N, as the published layers.
    Returns:
        a scalar; 0 (with a gradient of 0) where every pixel is ignored.
    Raises:
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    if reduction not in ("mean", "caffe_sum"):
        raise ValueError(f"edge loss: reduction {reduction!r}; choose mean or caffe_sum")
    if logits.ndim != 4 or labels.shape[:1] != logits.shape[:1] or labels.shape[2:] != logits.shape[2:]:
        raise ValueError(
            f"edge loss: logits are {list(logits.shape)} and labels {list(labels.shape)}; one size "
            "[N,·,H,W] is needed"
        )
    if not logits.numel() or not logits.is_floating_point():
        raise ValueError(
            f"edge loss: logits are {logits.dtype} {list(logits.shape)}; floats with an image, a class and a "
            "pixel at least are needed"
        )
    y, valid = unpack_labels(labels, logits.shape[1])
    mask = valid[:, None]
    if reweighted:
        positive = (y.any(1) & valid).flatten(1).sum(1)
        total = valid.flatten(1).sum(1).clamp(min=1)
        beta = (positive.to(logits.dtype) / total)[:, None, None, None]
        weight = torch.where(y, 1 - beta, beta) * mask
    else:
        weight = mask.to(logits.dtype).expand_as(logits)
    # softplus(−x) for y = 1, softplus(x) for y = 0
    each = weight * F.softplus(torch.where(y, -logits, logits))
    # ignored pixels may hold anything, also inf: 0 · inf must not reach the sum
    loss = torch.where(mask, each, torch.zeros_like(each)).sum()
    if reduction == "caffe_sum":
        return loss / logits.shape[0]
    return loss / (valid.sum().clamp(min=1) * logits.shape[1])
