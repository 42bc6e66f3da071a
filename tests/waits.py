"""How long a test waits for an event.

A busy machine may take its time.  A wait ends as soon as the event comes, so a long limit costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE = 120.0  # seconds; far beyond what a loaded machine needs, and below pytest's limit per test


def until(condition: Callable[[], object], seconds: float = PATIENCE, *, every: float = 0.005) -> None:
    """Waits until `condition()` is true; raises AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(every)
