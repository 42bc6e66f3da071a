"""What a pack's network says of a frame, by the graph contract but in torch: labels, confidence, softmax.

Upsampling is the contract's (bilinear, half-pixel, align_corners=False).  Adaptation and evaluation use
this one path, so that what is measured here is what the engine serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.pack import PackSpec, normalise

__all__ = [
    "as_tensor",
    "batches",
    "confidence_histogram",
    "labels_and_confidence",
    "logits",
    "probabilities",
]


def as_tensor(frames: np.ndarray | Sequence[np.ndarray]) -> Tensor:
    """uint8 [N,H,W,3] tensor of one array [N,H,W,3] or a list of [H,W,3]."""
    array = frames if isinstance(frames, np.ndarray) else np.stack(frames)
    return torch.from_numpy(np.array(array, dtype=np.uint8))


def batches(frames: Sequence[Any], size: int) -> Iterator[Tensor]:
    """Tensors uint8 [n,H,W,3] of up to `size` frames; reads the sequence once, in order."""
    for start in range(0, len(frames), size):
        yield as_tensor([frames[i] for i in range(start, min(start + size, len(frames)))])


def _device(network: nn.Module) -> torch.device:
    parameter = next(network.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def logits(network: nn.Module, spec: PackSpec, frames: Tensor) -> Tensor:
    """float32 [N,C,H,W] at the frames' resolution, for uint8 [N,H,W,3]; on the network's device."""
    raw = network(normalise(frames.to(_device(network)), spec))
    return F.interpolate(raw, size=frames.shape[1:3], mode="bilinear", align_corners=False)


def probabilities(
    network: nn.Module,
    spec: PackSpec,
    frames: Tensor,
    *,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Softmax float32 [N,C,H,W], on the network's device; the mean of several with `flip` and `scales` (MST).

    A scale is rounded to a size the network accepts.
    """
    height, width = frames.shape[1:3]
    multiple = int(getattr(network, "size_multiple", 1))
    with torch.inference_mode():
        x = normalise(frames.to(_device(network)), spec)
        total = torch.zeros((), device=x.device)
        count = 0
        for scale in scales:
            size = tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))
            scaled = (
                x if size == (height, width) else F.interpolate(x, size, mode="bilinear", align_corners=False)
            )
            for mirrored in (False, True) if flip else (False,):
                raw = network(scaled.flip(3) if mirrored else scaled)
                raw = raw.flip(3) if mirrored else raw
                full = F.interpolate(raw, size=(height, width), mode="bilinear", align_corners=False)
                total = total + full.softmax(1)
                count += 1
        return total / count if count > 1 else total


def labels_and_confidence(
    network: nn.Module, spec: PackSpec, frames: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(labels uint8 [N,H,W], confidence uint8 [N,H,W]) as the engine answers them."""
    with torch.inference_mode():
        x = logits(network, spec, frames)
        top, index = x.max(dim=1)
        confidence = 1.0 / torch.exp(x - top.unsqueeze(1)).sum(dim=1)
        return index.to(torch.uint8).cpu().numpy(), (confidence * 255.0).to(torch.uint8).cpu().numpy()


def confidence_histogram(
    network: nn.Module, spec: PackSpec, frames: Sequence[np.ndarray], *, batch: int = 4
) -> np.ndarray:
    """int64 [C,256]: how many pixels were answered as each class with each confidence; a pack's reference."""
    classes = len(spec.classes)
    counts = np.zeros(classes * 256, np.int64)
    for tensor in batches(frames, batch):
        labels, sure = labels_and_confidence(network, spec, tensor)
        counts += np.bincount((labels.astype(np.int64) * 256 + sure).reshape(-1), minlength=classes * 256)
    return counts.reshape(classes, 256)
