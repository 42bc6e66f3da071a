"""Parity: does an engine answer what torch answers in float32?

Compared on the pack's golden frames.  Segmentation: labels, confidence, and labels near label edges, where
engines differ first.  Edges: bytes, bit fields, and the F-measure of the engine's edges where torch's are
taken for the truth.  Knows arrays; nothing of engines or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from export.errors import ExportError
from export.graph.contract import Contract

BOUNDARY_PIXELS = 2
#: How far an engine's edge may be from torch's and still be the same edge; a benchmark allows more (8 pixels
#: of a frame of 512x1024), but two engines of one network do not disagree about where things are.
EDGE_PIXELS = 1
_SEGMENTATION = ("agreement", "boundary", "confidence_mean")
_EDGES = ("edges_max", "edges_mean", "bits", "mf")


@dataclass(frozen=True)
class Thresholds:
    """What an engine must reach to be published.

    agreement       share of pixels with torch's label
    boundary        the same within two pixels of an edge between labels
    confidence_mean mean absolute difference of confidence, in bytes (0..255)
    edges_max       largest difference of an edge probability, in bytes
    edges_mean      mean of the same
    bits            share of pixels with torch's bit field
    mf              how far MF may be from torch's, 0..1
    """

    agreement: float = 0.999
    boundary: float = 0.99
    confidence_mean: float = 0.5
    edges_max: float = 1
    edges_mean: float = 0.1
    bits: float = 0.999
    mf: float = 0.005


#: A quantised engine is allowed to differ, most of all on edges.
DEFAULTS = {
    "fp32": Thresholds(),
    "fp16": Thresholds(
        agreement=0.995,
        boundary=0.95,
        confidence_mean=1.0,
        edges_max=16,
        edges_mean=0.5,
        bits=0.99,
        mf=0.02,
    ),
    "int8": Thresholds(
        agreement=0.95,
        boundary=0.75,
        confidence_mean=8.0,
        edges_max=255,
        edges_mean=4.0,
        bits=0.9,
        mf=0.1,
    ),
}


def wanted(precision: str, chosen: Thresholds | Mapping[str, float] | None = None) -> Thresholds:
    """Return the thresholds of a precision; `chosen` replaces all of them, or those that a mapping names."""
    if isinstance(chosen, Thresholds):
        return chosen
    return replace(DEFAULTS[precision], **(chosen or {}))


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
    return _widened(edge, distance - 1)


def _widened(mask: np.ndarray, distance: int) -> np.ndarray:
    """bool [n,H,W]: pixels within `distance` (chessboard) of one of the mask."""
    for _ in range(distance):
        wider = mask.copy()
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider.copy()
        mask[:, :, 1:] |= wider[:, :, :-1]
        mask[:, :, :-1] |= wider[:, :, 1:]
    return mask


def compare(
    answers: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], contract: Contract
) -> dict[str, Any]:
    """The parity report: an engine's answers against torch's, by output name, each with a first dimension n.

    Returns a dictionary that JSON can hold: frames, pixels, and

      segmentation  agreement, boundary_agreement (None without edges), boundary_pixels, confidence_mean,
                    confidence_max, classes (of torch's label): pixels, agreement, confidence_mean
      edges         edges_max_difference, edges_mean_difference (bytes), bits_equal, mf, mf_difference (None
                    where torch sees no edge), edge_classes: pixels (with torch's bit), max_difference, f

    Classes that do not occur are left out.  Raises: ExportError for answers of another shape or type.
    """
    for name in contract.compared:
        given, wanted = answers[name], truth[name]
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise ExportError(
                f"the engine's {name} are {given.dtype} {list(given.shape)}, "
                f"torch's {wanted.dtype} {list(wanted.shape)}"
            )
    first = truth[contract.compared[0]]
    report: dict[str, Any] = {"frames": int(first.shape[0])}
    report["pixels"] = int(first.shape[0] * first.shape[-2] * first.shape[-1])
    for head in contract.heads:
        if head == "segmentation":
            report |= _segmentation(answers, truth, contract.classes)
        else:
            report |= _edges(answers, truth, contract.edge_classes)
    return report


def _segmentation(
    answers: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], classes: tuple[str, ...]
) -> dict[str, Any]:
    labels = truth["labels"]
    same = answers["labels"] == labels
    difference = np.abs(answers["confidence"].astype(np.int16) - truth["confidence"].astype(np.int16))
    edges = near_edges(labels)
    per_class = {}
    for index, name in enumerate(classes):
        where = labels == index
        if where.any():
            per_class[name] = {
                "pixels": int(where.sum()),
                "agreement": round(float(same[where].mean()), 6),
                "confidence_mean": round(float(difference[where].mean()), 4),
            }
    return {
        "agreement": float(same.mean()),
        "boundary_agreement": float(same[edges].mean()) if edges.any() else None,
        "boundary_pixels": int(edges.sum()),
        "confidence_mean": float(difference.mean()),
        "confidence_max": int(difference.max()),
        "classes": per_class,
    }


def _edges(
    answers: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], classes: tuple[str, ...]
) -> dict[str, Any]:
    largest, total, fs, per_class = 0, 0, [], {}
    for index, name in enumerate(classes):  # one class at a time: all of them are large
        difference = np.abs(
            answers["edges"][:, index].astype(np.int16) - truth["edges"][:, index].astype(np.int16)
        )
        most = int(difference.max())
        largest, total = max(largest, most), total + int(difference.sum(dtype=np.int64))
        given, wanted = ((side["edge_bits"] >> index & 1).astype(bool) for side in (answers, truth))
        pixels = int(wanted.sum())
        if pixels:
            fs.append(edge_f(given, wanted))
            per_class[name] = {"pixels": pixels, "max_difference": most, "f": round(fs[-1], 6)}
    mf = float(np.mean(fs)) if fs else None
    return {
        "edges_max_difference": largest,
        "edges_mean_difference": total / truth["edges"].size,
        "bits_equal": float((answers["edge_bits"] == truth["edge_bits"]).mean()),
        "mf": mf,
        "mf_difference": None if mf is None else 1.0 - mf,
        "edge_classes": per_class,
    }


def edge_f(given: np.ndarray, truth: np.ndarray, distance: int = EDGE_PIXELS) -> float:
    """F-measure of one class's edges, bool [n,H,W], where `truth` is right by definition.

    Precision: share of given pixels within `distance` (chessboard) of a true one; recall: share of true
    pixels within it of a given one.  Maps are taken as they are served, not thinned, and not matched one to
    one: it tells engines of one network apart, and is no score of a benchmark (`adapt.evaluate`).
    """
    if not given.any() or not truth.any():
        return float(given.any() == truth.any())
    precision = float(_widened(truth, distance)[given].mean())
    recall = float(_widened(given, distance)[truth].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def judge(report: dict[str, Any], thresholds: Thresholds) -> dict[str, Any]:
    """The report with `thresholds`, `passed`, and `missed`: a sentence for every threshold that is missed."""
    t, missed = thresholds, []
    names: tuple[str, ...] = ()
    if "agreement" in report:
        names += _SEGMENTATION
        boundary = report["boundary_agreement"]
        if report["agreement"] < t.agreement:
            missed.append(f"label agreement {report['agreement']:.5f} is below {t.agreement}")
        if boundary is not None and boundary < t.boundary:
            missed.append(f"boundary agreement {boundary:.5f} is below {t.boundary}")
        if report["confidence_mean"] > t.confidence_mean:
            missed.append(
                f"mean confidence difference {report['confidence_mean']:.3f} is above {t.confidence_mean}"
            )
    if "bits_equal" in report:
        names += _EDGES
        if report["edges_max_difference"] > t.edges_max:
            missed.append(
                f"largest edge difference {report['edges_max_difference']} of 255 is above {t.edges_max}"
            )
        if report["edges_mean_difference"] > t.edges_mean:
            missed.append(
                f"mean edge difference {report['edges_mean_difference']:.3f} of 255 is above {t.edges_mean}"
            )
        if report["bits_equal"] < t.bits:
            missed.append(f"equal edge bit fields {report['bits_equal']:.5f} are below {t.bits}")
        if report["mf_difference"] is not None and report["mf_difference"] > t.mf:
            missed.append(f"MF differs by {report['mf_difference']:.4f} from torch's, above {t.mf}")
    used = {name: value for name, value in asdict(thresholds).items() if name in names}
    return {**report, "thresholds": used, "passed": not missed, "missed": missed}
