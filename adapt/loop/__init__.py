"""The adaptation loop on a vehicle: collect, decide, adapt, build, submit.  `loop.py` is the page to read."""

from __future__ import annotations

from adapt.loop.assembly import Loop
from adapt.loop.builder import build_version
from adapt.loop.config import EdgeMember, LoopConfig
from adapt.loop.errors import LoopError, Paused
from adapt.loop.loop import AdaptationLoop

__all__ = [
    "AdaptationLoop",
    "EdgeMember",
    "Loop",
    "LoopConfig",
    "LoopError",
    "Paused",
    "build_version",
]
