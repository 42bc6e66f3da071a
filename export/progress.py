"""Progress on stderr for builds: one line a step without a terminal, a bar with one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: progress(stage, done, total)
Callback = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """No progress at all."""


class Bars(AbstractContextManager["Bars"]):
    """A callback that draws; use as a context manager."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._bars = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, object] = {}

    def __enter__(self) -> Bars:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._console.is_terminal:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)  # type: ignore[arg-type]
