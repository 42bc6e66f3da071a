"""Comparison of an engine with the network that it was built from."""

from __future__ import annotations

from export.parity.parity import Thresholds, compare, judge

__all__ = ["Thresholds", "compare", "judge"]
