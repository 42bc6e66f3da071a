"""``python -m adapt.run``: the on-device loop (`adapt.loop`), beside a live server and behind it in priority.

Holds only the command: its exit codes and what it prints.  The options are in `adapt.loop.options`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys

from adapt.frames.store import StoreError
from adapt.loop import Loop, LoopConfig, LoopError, Paused
from adapt.loop.budget import BudgetError
from adapt.loop.options import parse_arguments, parser, round_config
from adapt.loop.startup import open_loop, set_priority
from adapt.loop.vehicle import VehicleError
from adapt.round import RoundError
from adapt.sources import SourceError
from common.cli import run_command
from common.progress import ProgressBars

__all__ = ["Loop", "LoopConfig", "LoopError", "main", "parser", "round_config"]

FAILURES = (
    LoopError,
    RoundError,
    StoreError,
    SourceError,
    BudgetError,
    VehicleError,
    ValueError,
    FloatingPointError,
    OSError,
)


def main(argv: list[str] | None = None) -> int:
    return run_command(lambda: _command(argv), name="adapt.run")


def _command(argv: list[str] | None) -> int:
    arguments = parse_arguments(argv)
    try:
        set_priority(arguments)
        signal.signal(signal.SIGTERM, _stop)
        with ProgressBars(quiet=arguments.quiet) as bars, open_loop(arguments, bars) as loop:
            return run_rounds(loop, arguments)
    except _Stopped:
        return 0 if not arguments.once else 1
    except Paused as pause:
        print(f"adapt.run: paused, {pause}; the same command goes on with it", file=sys.stderr)
        return 3
    except FAILURES as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename!r} cannot be used: {error.strerror}; check the path and its permissions"
        print(f"adapt.run: {' '.join(text.split())}", file=sys.stderr)
        return 1


def run_rounds(loop: Loop, arguments: argparse.Namespace) -> int:
    """Do rounds and print their reports: one with --once, else until an error or a signal ends the loop."""
    while True:
        report = loop.once()
        if arguments.json:
            print(json.dumps(report), flush=True)
        else:
            print(
                f"round {report['round']}: {report['state']} {report.get('reason', '')}".rstrip(), flush=True
            )
        if arguments.once:
            return 0 if report["state"] == "LIVE" else 1


class _Stopped(BaseException):
    """SIGTERM: the usual end of a loop that is left running."""


def _stop(*_: object) -> None:
    raise _Stopped


if __name__ == "__main__":
    sys.exit(main())
