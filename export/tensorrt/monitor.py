"""The progress of a TensorRT build, and how to cancel it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from common.progress import StepCallback
from runtime.engines.tensorrt.library import Library, TensorRTError

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Cancelled", "monitor"]


class Cancelled(TensorRTError):
    """The progress callback asked for the build to stop."""


def monitor(library: Library, progress: StepCallback, trouble: list[BaseException]) -> trt.IProgressMonitor:
    """Make a progress monitor of TensorRT that calls `progress(phase, step, steps)`.

    `phase` is the path of the nested phases.  If `progress` returns False, the build is cancelled.  TensorRT
    swallows what a callback raises: the monitor appends it to `trouble` and cancels the build.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.module
    lock = threading.Lock()
    phases: dict[str, tuple[str, int]] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # Any where the stubs are not made
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            def start() -> None:
                with lock:
                    above = phases.get(parent_phase or "")
                    path = f"{above[0]} / {phase_name}" if above else phase_name
                    phases[phase_name] = (path, num_steps)
                self.report(phase_name, 0)

            self.guarded(start)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.guarded(lambda: self.report(phase_name, step + 1))

        def phase_finish(self, phase_name: str) -> None:
            def finish() -> None:
                with lock:
                    phases.pop(phase_name, None)

            self.guarded(finish)

        def report(self, phase_name: str, step: int) -> None:
            with lock:
                path, steps = phases.get(phase_name, (phase_name, step))
            if not trouble and progress(path, min(step, steps), steps) is False:
                raise Cancelled("the build was cancelled")

        def guarded(self, work: Callable[[], None]) -> bool:
            """Return False once something went wrong: TensorRT then stops at its next step."""
            try:
                work()
            except BaseException as error:
                trouble.append(error)
            return not trouble

    return Monitor()
