"""How an adapt command ends when it is interrupted: one line on standard error and exit code 130.

Knows nothing of what commands do, and imports nothing that takes time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ["INTERRUPTED", "interruptible"]

INTERRUPTED = 130  # 128 and the number of SIGINT, as shells write it


def interruptible(name: str, work: Callable[[], int]) -> int:
    """`work()`, or 130 after Ctrl-C."""
    try:
        return work()
    except KeyboardInterrupt:
        # An interrupt that fell into exec() of a text (each dataclass that torch defines is one) would make
        # CPython end the process by the signal even though it was caught here; the next exec() clears that.
        exec("")
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
