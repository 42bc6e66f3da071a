"""The adaptation loop on a vehicle: collect, decide, adapt, build, submit."""

from __future__ import annotations

from adapt.loop.loop import EdgeMember, Loop, LoopConfig, LoopError, build_version

__all__ = [
    "EdgeMember",
    "Loop",
    "LoopConfig",
    "LoopError",
    "build_version",
]
