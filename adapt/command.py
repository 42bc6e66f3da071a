"""How an adapt command ends when it is interrupted: one line on standard error and exit code 130.

Knows nothing of what commands do, and imports nothing that takes time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType

__all__ = ["INTERRUPTED", "interruptible", "watch"]

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


def watch() -> None:
    """Make Ctrl-C end the process in one line while a command's modules are imported: torch takes seconds."""
    usual = sys.excepthook

    def ends(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            usual(kind, error, trace)
            return
        words = sys.orig_argv
        name = words[words.index("-m") + 1] if "-m" in words[:-1] else "adapt"
        print(f"{name}: interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # Python would end itself by the signal, after more lines of other libraries

    sys.excepthook = ends
