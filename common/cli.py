"""How a command ends: with an exit code and one line on standard error.

    0     the command did its work
    1     it failed; the line names the thing, the reason and the remedy
    2     wrong usage (argparse)
    130   Ctrl-C
    143   SIGTERM

`common.launch` does the same while the modules of a command are still being imported.  This module knows
nothing of what commands do, and imports nothing that takes time.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from common.text import one_line

__all__ = ["INTERRUPTED", "TERMINATED", "run_command"]

#: Exit codes of a command that was stopped, as shells write them: 128 and the number of the signal.
INTERRUPTED, TERMINATED = 130, 143


class _Terminated(BaseException):
    """SIGTERM as an exception, so that unfinished work is undone on the way out, as after Ctrl-C."""


def run_command(
    work: Callable[[], int], refusals: tuple[type[Exception], ...] = (), *, name: str = "error"
) -> int:
    """Run `work` and return the exit code of the command.

    Args:
        work: does the work and returns an exit code.
        refusals: exceptions whose message is the line to print.
        name: the word in front of the line: "error", or the name of the command.
    Returns:
        The code that `work` returned; 1 after a refusal, if a file cannot be used or if memory runs out; 130
        after Ctrl-C and 143 after SIGTERM.  Other exceptions are faults of the project and pass through.
    """
    with contextlib.suppress(AttributeError, OSError):  # another program's stream may not have the method
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _sigterm_raises():
            return work()
    except refusals as error:
        return _fail(name, str(error), 1)
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        return _fail(name, f"out of memory{why}: use smaller or fewer frames, or stop another process", 1)
    except OSError as error:
        where = f"{str(error.filename)!r}: " if error.filename else ""
        return _fail(name, f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        # An interrupt that fell into exec() of a text (torch defines each dataclass by one) would make
        # CPython end the process by the signal even though it was caught here; the next exec() clears that.
        exec("")
        return _fail(name, "interrupted", INTERRUPTED)
    except _Terminated:
        return _fail(name, "terminated", TERMINATED)


def _fail(name: str, message: str, code: int) -> int:
    print(f"{name}: {one_line(message)}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows the main thread alone to set a handler
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
