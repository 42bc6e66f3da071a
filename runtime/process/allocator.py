"""glibc's allocator, told to keep the memory of frames.

Without this every frame is mapped and unmapped again: about a thousand page faults a
request, measured at 2.3 times the server's CPU time (docs/serving.md).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8


def tune_allocator() -> bool:
    """Sets the thresholds for this process; False where the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = (
        (_M_MMAP_THRESHOLD, 1 << 30),
        (_M_TRIM_THRESHOLD, (1 << 31) - 1),
        (_M_TOP_PAD, 16 << 20),
        (_M_ARENA_MAX, 1),
    )
    return min(mallopt(key, value) for key, value in settings) == 1
