"""Progress on standard error: one bar per stage, for anything that may take more than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

__all__ = ["Progress", "ProgressBars", "StepCallback", "no_progress"]

#: callback(stage, done, total): a `Progress` for work that reports no numbers.
StepCallback = Callable[[str, int, int], object]


class Progress(Protocol):
    """Called after every step with the stage, the steps done, their total, and a few numbers by name."""

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> object: ...


def no_progress(stage: str, done: int, total: int, **numbers: float) -> None:
    """Report nothing."""


class ProgressBars:
    """A `Progress` that draws bars, and a context manager that removes them.

    Without a terminal it prints one line at each quarter of a stage instead.  With `lines=False` it prints
    nothing there: for commands that print one line on standard error when they refuse.
    """

    def __init__(self, *, quiet: bool = False, lines: bool = True) -> None:
        console = Console(file=sys.stderr)
        self._draws = console.is_terminal and not quiet
        self._quiet = quiet or not (lines or self._draws)
        self._bars = RichProgress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=not lines,
        )
        self._tasks: dict[str, TaskID] = {}
        self._quarters: dict[str, int] = {}

    def __enter__(self) -> ProgressBars:
        if self._draws:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._draws:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        if self._quiet:
            return
        text = "  ".join(f"{key} {value:.3g}" for key, value in numbers.items())
        if not self._draws:
            quarter = 4 * done // max(total, 1)
            if quarter > self._quarters.get(stage, 0):
                self._quarters[stage] = quarter
                print(f"{stage}: {done}/{total}  {text}", file=sys.stderr, flush=True)
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, numbers="")
        self._bars.update(self._tasks[stage], completed=done, total=total, numbers=text)
