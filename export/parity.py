"""Parity: does an engine answer what torch answers in float32?

Compared on the pack's golden frames: labels, confidence, and labels near label edges, where engines differ
first.  Knows arrays; nothing of engines or files.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.errors import ExportError

BOUNDARY_PIXELS = 2


@dataclass(frozen=True)
class Thresholds:
    """What an engine must reach to be published.

    agreement       share of pixels with torch's label
    boundary        the same within two pixels of an edge between labels
    confidence_mean mean absolute difference of confidence, in bytes (0..255)
    """

    agreement: float = 0.999
    boundary: float = 0.99
    confidence_mean: float = 0.5


#: A quantised engine is allowed to differ, most of all on edges.
DEFAULTS = {
    "fp32": Thresholds(),
    "fp16": Thresholds(agreement=0.995, boundary=0.95, confidence_mean=1.0),
    "int8": Thresholds(agreement=0.95, boundary=0.75, confidence_mean=8.0),
}


def near_edges(labels: np.ndarray, distance: int = BOUNDARY_PIXELS) -> np.ndarray:
    """bool [n,H,W]: pixels within `distance` (chessboard) of a pixel whose neighbour has another label."""
    edge = np.zeros(labels.shape, bool)
    across = labels[:, :, 1:] != labels[:, :, :-1]
    down = labels[:, 1:] != labels[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    # Pixels beside an edge are at distance 1 already.
    for _ in range(distance - 1):
        wider = edge.copy()
        wider[:, 1:] |= edge[:, :-1]
        wider[:, :-1] |= edge[:, 1:]
        sideways = wider.copy()
        sideways[:, :, 1:] |= wider[:, :, :-1]
        sideways[:, :, :-1] |= wider[:, :, 1:]
        edge = sideways
    return edge


def compare(
    labels: np.ndarray,
    confidence: np.ndarray,
    truth_labels: np.ndarray,
    truth_confidence: np.ndarray,
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """The parity report: an engine's answers against torch's, all uint8 [n,H,W].

    Returns a dictionary that JSON can hold: frames, pixels, agreement, boundary_agreement (None without
    edges), confidence_mean, confidence_max, and per class (of torch's label) pixels, agreement, mean
    confidence difference.  Classes that do not occur are left out.
    """
    for name, array in (("labels", labels), ("confidence", confidence)):
        if array.shape != truth_labels.shape or array.dtype != np.uint8:
            raise ExportError(
                f"the engine's {name} are {array.dtype} {list(array.shape)}, "
                f"torch's uint8 {list(truth_labels.shape)}"
            )
    same = labels == truth_labels
    difference = np.abs(confidence.astype(np.int16) - truth_confidence.astype(np.int16))
    edges = near_edges(truth_labels)
    per_class = {}
    for index, name in enumerate(classes):
        where = truth_labels == index
        if where.any():
            per_class[name] = {
                "pixels": int(where.sum()),
                "agreement": round(float(same[where].mean()), 6),
                "confidence_mean": round(float(difference[where].mean()), 4),
            }
    return {
        "frames": int(labels.shape[0]),
        "pixels": int(labels.size),
        "agreement": float(same.mean()),
        "boundary_agreement": float(same[edges].mean()) if edges.any() else None,
        "boundary_pixels": int(edges.sum()),
        "confidence_mean": float(difference.mean()),
        "confidence_max": int(difference.max()),
        "classes": per_class,
    }


def judge(report: dict[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """The report with `thresholds`, `passed`, and `missed`: a sentence for every threshold that is missed."""
    boundary = report["boundary_agreement"]
    missed = []
    if report["agreement"] < thresholds.agreement:
        missed.append(f"label agreement {report['agreement']:.5f} is below {thresholds.agreement}")
    if boundary is not None and boundary < thresholds.boundary:
        missed.append(f"boundary agreement {boundary:.5f} is below {thresholds.boundary}")
    if report["confidence_mean"] > thresholds.confidence_mean:
        missed.append(
            f"mean confidence difference {report['confidence_mean']:.3f} "
            f"is above {thresholds.confidence_mean}"
        )
    return {**report, "thresholds": asdict(thresholds), "passed": not missed, "missed": missed}
