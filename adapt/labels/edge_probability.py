"""Edge probability maps of a network: what alignment climbs and what the benchmark scores.

An edge network answers them (``sides``); from a segmentation network they are read off the softmax, where a
class's probability changes.  It knows networks and frames, nothing of labels or files.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from adapt.labels.errors import EdgeError
from networks.pack import PackSpec, normalise

__all__ = ["edge_probability", "offsets", "softmax_ridges"]


def softmax_ridges(probability: Tensor) -> Tensor:
    """Where a class's probability changes: softmax [N,C,H,W] -> [N,C,H,W] in 0..1, largest minus smallest
    in 3x3.

    1 on a step from certainly-not to certainly, 0 inside and far outside; as wide as a radius-1 edge.
    """
    largest = F.max_pool2d(probability, 3, 1, 1)
    smallest = -F.max_pool2d(-probability, 3, 1, 1)
    return largest - smallest


def offsets(length: int, tile: int) -> list[int]:
    """Evenly spread starts of the fewest tiles that cover a side, as the published test code spreads them."""
    if tile >= length:
        return [0]
    n = math.ceil(length / tile)
    # MATLAB's round: halves go up, where Python's go to the even one.
    return [math.floor((length - tile) * i / (n - 1) + 0.5) for i in range(n)]


def _infer(network: nn.Module, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    m = int(getattr(network, "size_multiple", 1))
    pad = (0, -width % m, 0, -height % m)
    padded = F.pad(x, pad, mode="replicate") if any(pad) else x
    size = list(padded.shape[2:])
    sides: Any = getattr(network, "sides", None)
    if sides is not None:
        logits = F.interpolate(sides(padded)[1], size=size, mode="bilinear", align_corners=False)
        out = logits.sigmoid()
    else:
        logits = F.interpolate(network(padded), size=size, mode="bilinear", align_corners=False)
        out = softmax_ridges(logits.softmax(1))
    return out[:, :, :height, :width]


def edge_probability(
    network: nn.Module, spec: PackSpec, frame: NDArray[np.uint8], *, tile: int = 0
) -> NDArray[np.float32]:
    """Edge probabilities of a frame at its own size: uint8 [H,W,3] RGB -> float32 [K,H,W].

    tile: side of square tiles whose answers are averaged where they overlap (0: the whole frame at once).
    Sides that are no multiple of the network's are padded by repetition and cut again.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise EdgeError(f"edges: the frame is {frame.dtype} {list(frame.shape)}, uint8 [H,W,3] is needed")
    if tile < 0 or not frame.size:
        raise EdgeError(
            f"edges: tiles of {tile} on a frame of {list(frame.shape)}: 0 or more, on some pixels"
        )
    height, width = frame.shape[:2]
    with torch.inference_mode():
        x = normalise(torch.from_numpy(np.array(frame))[None], spec)
        if not tile:
            return np.asarray(_infer(network, x)[0].numpy())
        total, count = torch.zeros(1, 1, height, width), torch.zeros(height, width)
        for y in offsets(height, tile):
            for left in offsets(width, tile):
                part = _infer(network, x[:, :, y : y + tile, left : left + tile])
                if total.shape[1] != part.shape[1]:
                    total = torch.zeros(1, part.shape[1], height, width)
                total[:, :, y : y + tile, left : left + tile] += part
                count[y : y + tile, left : left + tile] += 1
        return np.asarray((total / count)[0].numpy())
