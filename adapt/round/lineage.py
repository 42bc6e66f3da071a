"""What a pack records of its way from the released pack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["distance_from_release", "for_manifest", "release_baseline"]

#: What of the report goes into the pack, and from there into the engine's manifest: decisions, no times.
_FOR_MANIFEST = (
    "round",
    "chosen",
    "source_free",
    "frames",
    "config",
    "stages",
    "distance",
    "released",
    "gate",
    "torch",
    "threads",
)


def for_manifest(report: Mapping[str, Any]) -> dict[str, Any]:
    """The field `adaptation` of the new pack's spec."""
    measures = {name: report[f"{name}_measures"] for name in ("parent", "reference", "candidate")}
    return {**{key: report[key] for key in _FOR_MANIFEST}, "measures": measures}


def release_baseline(adaptation: Mapping[str, Any] | None, parent_source: float) -> tuple[float, float]:
    """What is known of the way from the released pack to the parent of a round.

    Args:
        adaptation: of the parent's spec; empty for a released pack.
        parent_source: mIoU of the parent on the source hold-out.

    Returns:
        mIoU of the released pack on the same hold-out (NaN = not known), and the sum of the weight distances,
        which bounds the true one.
    """
    if not adaptation:
        return parent_source, 0.0
    way = adaptation.get("released") or {}
    first = (adaptation.get("measures") or {}).get("parent") or {}
    source = way.get("source", first.get("source"))
    distance = float(way.get("distance", adaptation.get("distance", 0.0)))
    return float("nan") if source is None else float(source), distance


def distance_from_release(released_source: float, distance: float) -> dict[str, float]:
    """The report's field `released`, which `release_baseline` of the next round reads."""
    known = {"source": round(released_source, 5)} if np.isfinite(released_source) else {}
    return {**known, "distance": round(distance, 5)}
