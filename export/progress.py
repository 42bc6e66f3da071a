"""Progress on standard error: one rich bar a stage, for anything that may take more than two seconds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

#: progress(stage, done, total)
Callback = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """No progress at all."""


class Bars:
    """A context manager to call with (stage, done, total, **numbers): a `Callback` and more.

    Without a terminal it prints one line at each quarter of a stage instead of drawing, or nothing
    (`lines=False`: commands whose standard error is one line when they refuse).
    """

    def __init__(self, *, quiet: bool = False, lines: bool = True) -> None:
        self.console = Console(file=sys.stderr)
        self.draws = self.console.is_terminal and not quiet
        self.quiet = quiet or not (lines or self.draws)
        self.rich = RichProgress(
            TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
            console=self.console, transient=not lines,
        )  # fmt: skip
        self.tasks: dict[str, object] = {}
        self.quarter: dict[str, int] = {}

    def __enter__(self) -> Bars:
        if self.draws:
            self.rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.draws:
            self.rich.stop()

    def __call__(self, stage: str, done: int, total: int, **numbers: float) -> None:
        if self.quiet:
            return
        text = "  ".join(f"{key} {value:.3g}" for key, value in numbers.items())
        if not self.draws:
            quarter = 4 * done // max(total, 1)
            if quarter > self.quarter.get(stage, 0):
                self.quarter[stage] = quarter
                print(f"{stage}: {done}/{total}  {text}", file=sys.stderr, flush=True)
            return
        if stage not in self.tasks:
            self.tasks[stage] = self.rich.add_task(stage, total=total, numbers="")
        self.rich.update(self.tasks[stage], completed=done, total=total, numbers=text)  # type: ignore[arg-type]
