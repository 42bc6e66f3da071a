"""Drift of the live frames' answers against the reference statistics of the source."""

from __future__ import annotations

from runtime.drift.drift import DriftConfig, DriftMonitor, DriftStatus, SignalStatus, SourceStatus

__all__ = [
    "DriftConfig",
    "DriftMonitor",
    "DriftStatus",
    "SignalStatus",
    "SourceStatus",
]
