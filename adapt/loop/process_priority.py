"""Lowers the priority of this process on the processor, the disk and the GPU, so that serving comes first.

A system may refuse any of it: the process then works as it is, and the result names the refusal.  The process
that trains calls this once, when it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

__all__ = ["CpuStarvationMonitor", "gpu_background", "lower_priority"]

_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IDLE = 3 << 13  # IOPRIO_CLASS_IDLE


def lower_priority(
    *, nice: int = 10, idle: bool = False, cores: Sequence[int] | None = None
) -> dict[str, str]:
    """Lower the priority of this process and everything it will start.

    Args:
        nice: niceness 0 (as it is) to 19.
        idle: use SCHED_IDLE: the process runs only if nothing else wants the core, and serving takes a core
            back at once.
        cores: the only cores it may use; None = all that it has now.

    Returns {"cores", "nice", "disk", "scheduling", "session": what was done, or "refused (reason)"}.

    Raises:
        ValueError: a core that this process may not use.
    """
    result: dict[str, str] = {}

    def attempt(name: str, done: str, work: object, *arguments: object) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
            result[name] = done
        except (OSError, AttributeError) as error:
            result[name] = f"refused ({error})"

    if cores is not None:
        allowed = os.sched_getaffinity(0)
        if not cores or not set(cores) <= allowed:
            raise ValueError(
                f"cores {sorted(cores)}: this process may use {sorted(allowed)}; choose of those"
            )
        attempt("cores", ",".join(map(str, sorted(cores))), os.sched_setaffinity, 0, set(cores))
    wanted = max(0, min(nice, 19))
    if wanted > os.getpriority(os.PRIO_PROCESS, 0):
        attempt("nice", str(wanted), os.setpriority, os.PRIO_PROCESS, 0, wanted)
    if wanted:
        attempt("disk", "idle", _idle_disk)
    if idle:
        attempt("scheduling", "idle", os.sched_setscheduler, 0, os.SCHED_IDLE, os.sched_param(0))
        # With autogroups, a priority counts only within its session: a session of our own is lowered as a
        # whole.  A process that leads a process group (started from a terminal) cannot have one; its session
        # stays as it is, and Ctrl-C still works.
        with contextlib.suppress(OSError):
            os.setsid()
        if os.getsid(0) == os.getpid():
            attempt("session", "19", Path("/proc/self/autogroup").write_text, "19")
    return result


class CpuStarvationMonitor:
    """Warns if work at low priority hardly gets the processor: such a round would seem to hang.

    Call it after each piece of work.  It compares the time in which this thread ran with the time in which it
    wanted to run; the kernel counts both (/proc/self/schedstat), and neither includes waiting for a GPU, a
    disk or in a pause.

    Args:
        least: smallest share that passes without a warning, 0 to 1.
        after: seconds of run and wait time between two judgements.
        stat: returns (seconds run, seconds waited to run), or None if the system does not count them.
    """

    def __init__(
        self,
        least: float = 0.1,
        after: float = 600.0,
        stat: Callable[[], tuple[float, float] | None] | None = None,
    ) -> None:
        self.least, self.after = least, after
        self._stat = stat or run_and_wait
        self._before = self._stat()

    def __call__(self) -> str:
        """Return the warning, one line with the remedy, or ""."""
        now = self._stat()
        if now is None or self._before is None:
            return ""
        run, waited = (b - a for a, b in zip(self._before, now, strict=True))
        if run + waited < self.after:
            return ""
        self._before = now
        share = run / (run + waited)
        if share >= self.least:
            return ""
        return (
            f"work gets {100 * share:.0f}% of a core: other programs take the processor, and a round takes "
            f"{1 / max(share, 0.001):.0f} times as long; give it a core of its own (--cores) or more weight "
            "(--priority nice), or let it work while the vehicle is parked (--parked)"
        )


def run_and_wait() -> tuple[float, float] | None:
    """Return the seconds that the main thread ran and that it waited for a core; None if not counted."""
    try:
        run, waited, _ = Path("/proc/self/schedstat").read_text().split()
        return int(run) / 1e9, int(waited) / 1e9
    except (OSError, ValueError):
        return None


def _idle_disk() -> None:
    number = _IOPRIO_SET.get(platform.machine())
    if number is None:
        raise OSError(f"not known on {platform.machine()}")
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(number, 1, 0, _IDLE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextlib.contextmanager
def gpu_background(fraction: float | None = None) -> Iterator[None]:
    """Run CUDA work inside on a stream of the lowest priority, in at most `fraction` of the device's memory.

    Without a CUDA device this does nothing.

    Raises:
        ValueError: the fraction is not above 0 and at most 1.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"GPU memory fraction {fraction}: give a number above 0 and at most 1")
    import torch

    if not torch.cuda.is_available():
        yield
        return
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction)
    background = torch.cuda.Stream(priority=0)  # type: ignore[no-untyped-call]  # 0 is CUDA's lowest
    with torch.cuda.stream(background):
        yield
