"""How a command ends: an exit code and one line on standard error, whatever became of it.

Knows nothing of what commands do.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Exit codes of a command that was told to stop, as shells write them: 128 and the signal's number.
INTERRUPTED, TERMINATED = 130, 143


class _Terminated(BaseException):
    """SIGTERM, as an exception: what was begun is undone on the way out, as after Ctrl-C."""


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold escaped: a file's name may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def finish(work: Callable[[], int], refusals: tuple[type[Exception], ...]) -> int:
    """`work()`, or what a command answers where it raises.

    Args:
        refusals: exceptions whose message is the line to print.
    Returns:
        `work`'s own code; 1 for a refusal, a file that cannot be used or too little memory; 130 after
        Ctrl-C and 143 after SIGTERM.
    """
    with contextlib.suppress(AttributeError, OSError):  # a stream of somebody else's
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with _sigterm_raises():
            return work()
    except refusals as error:
        return _say(str(error), 1)
    except MemoryError as error:
        why = f" ({error})" if str(error) else ""
        return _say(f"out of memory{why}: use smaller or fewer frames, or stop another process", 1)
    except OSError as error:
        where = f"{str(error.filename)!r}: " if error.filename else ""
        return _say(f"{where}{error.strerror or error}", 1)
    except KeyboardInterrupt:
        # An interrupt that fell into exec() of a text (each dataclass that torch defines is one) would make
        # CPython end the process by the signal even though it was caught here; the next exec() clears that.
        exec("")
        return _say("interrupted", INTERRUPTED)
    except _Terminated:
        return _say("terminated", TERMINATED)


def _say(text: str, code: int) -> int:
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    return code


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
