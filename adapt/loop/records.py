"""The records of finished rounds in WORKDIR/round-NNNN: what is written, and what is deleted later.

Knows the files of a round; decides nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.files import write_json

__all__ = ["discard_cancelled", "prune_rounds", "write_page", "write_record"]


def write_record(folder: Path, report: dict[str, Any]) -> None:
    """Write the report of a round to `folder`/loop.json."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "loop.json", report)


def write_page(folder: Path, number: int, log: Callable[[str], None]) -> None:
    """Write the round's page for people.  A failure is logged and does not fail the round."""
    from adapt.report.round import write

    try:
        log(f"report of round {number}: {write(folder)}")
    except Exception as error:
        log(f"no report of round {number}: {type(error).__name__}: {error}")


def prune_rounds(workdir: Path, number: int) -> None:
    """Delete all but the records of the rounds before `number` - 1.

    Decision, report and pictures stay.  The weights are in the engine version, and the labels can be made
    again from the frames.
    """
    for folder in workdir.glob("round-*"):
        digits = folder.name.partition("-")[2].partition(".")[0]
        if not digits.isdigit() or int(digits) >= number - 1:
            continue
        for pattern in ("**/labels-*", "**/pack", "**/*.pt.labels"):
            for part in [*folder.glob(pattern)]:
                shutil.rmtree(part, ignore_errors=True)
        for pattern in ("**/*.pt", "**/state.json"):
            for part in [*folder.glob(pattern)]:
                part.unlink(missing_ok=True)


def discard_cancelled(folder: Path) -> None:
    """Delete labels and checkpoints of a round that was cancelled: no round continues from them."""
    for pattern in ("**/labels-*", "**/*.pt.labels"):
        for part in [*folder.glob(pattern)]:
            shutil.rmtree(part, ignore_errors=True)
    for part in [*folder.glob("**/checkpoint.pt")]:
        part.unlink(missing_ok=True)
