"""Scores of a segmentation network over a labelled set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from adapt import inference
from adapt.data.base import resize_frame, resize_label
from adapt.evaluate.boundary_iou import BoundaryIoU
from adapt.evaluate.segmentation import Calibration, Confusion
from networks.pack import PackSpec

__all__ = ["score"]


def _no_progress(stage: str, done: int, total: int) -> None:
    """Nothing is shown."""


def score(
    network: nn.Module,
    spec: PackSpec,
    dataset: Any,
    *,
    batch: int = 4,
    progress: Callable[..., None] = _no_progress,
    table: np.ndarray | None = None,
    classes: int | None = None,
    boundary: BoundaryIoU | None = None,
) -> tuple[Confusion, Calibration]:
    """Confusion and calibration over a labelled set, at the labels' own size (prediction resized nearest).

    Args:
        dataset: items (frame uint8 [h,w,3], label uint8 [h,w] or None); frames are resized to `spec.size`.
        table: uint8 [256] that maps the network's classes to the truth's, or None if they are the same.
        classes: number of the truth's classes (the network's).
        boundary: counts every frame, too, if it is given.
    """
    confusion, calibration = Confusion(classes or len(spec.classes)), Calibration()
    network.eval()
    total = len(dataset)
    for start in range(0, total, batch):
        pairs = [dataset[i] for i in range(start, min(start + batch, total))]
        pairs = [(x, y) for x, y in pairs if y is not None]
        if pairs:
            tensor = inference.as_tensor([resize_frame(x, spec.size) for x, _ in pairs])
            labels, confidence = inference.labels_and_confidence(network, spec, tensor)
            for (_, truth), answer, sure in zip(pairs, labels, confidence, strict=True):
                answer, sure = resize_label(answer, truth.shape), resize_label(sure, truth.shape)
                answer = answer if table is None else table[answer]
                confusion.add(truth, answer)
                if boundary is not None:
                    boundary.add(truth, answer)
                calibration.add(truth, answer, sure)
        progress("score", min(start + batch, total), total)
    return confusion, calibration
