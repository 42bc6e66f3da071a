"""Reads how long the server's answers take, from its own counters, for `adapt.loop.throttle`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["counters_of"]


def counters_of(client: Any, model: str) -> Callable[[], tuple[int, float] | None]:
    """Return a function that reads (answered requests, seconds they took together, waiting included).

    It sums over all versions in KServe's ModelStatistics, so any such server will do.  It returns None if the
    server reports no version.
    """

    def read() -> tuple[int, float] | None:
        found = [version["inference_stats"]["success"] for version in client.statistics(model)]
        if not found:
            return None
        return sum(int(one["count"]) for one in found), sum(int(one["ns"]) for one in found) / 1e9

    return read
