"""How long the server's answers take: its own counters, for `adapt.loop.throttle`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["counters_of"]


def counters_of(client: Any, model: str) -> Callable[[], tuple[int, float] | None]:
    """A function that reads (answered requests, seconds they took together, waiting included).

    Of all versions; from KServe's ModelStatistics, so any such server will do.  None where it does not say.
    """

    def read() -> tuple[int, float] | None:
        found = [version["inference_stats"]["success"] for version in client.statistics(model)]
        if not found:
            return None
        return sum(int(one["count"]) for one in found), sum(int(one["ns"]) for one in found) / 1e9

    return read
