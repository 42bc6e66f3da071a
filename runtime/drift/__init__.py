"""Drift of the live frames' answers against the reference statistics of the source."""

from __future__ import annotations

from runtime.drift.config import DriftConfig, DriftStatus, SignalStatus, SourceStatus
from runtime.drift.detector import SourceDrift, arl, threshold
from runtime.drift.monitor import DriftMonitor
from runtime.drift.signals import Sample, measure

__all__ = [
    "DriftConfig",
    "DriftMonitor",
    "DriftStatus",
    "Sample",
    "SignalStatus",
    "SourceDrift",
    "SourceStatus",
    "arl",
    "measure",
    "threshold",
]
