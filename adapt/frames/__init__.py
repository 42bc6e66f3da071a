"""The frame store: which frames a vehicle stores, how it encrypts them, and the command that shows them."""

from __future__ import annotations

from adapt.frames.store import FrameStore, Kept, StoredFrame, StoreError, confidence_summary

__all__ = [
    "FrameStore",
    "Kept",
    "StoreError",
    "StoredFrame",
    "confidence_summary",
]
