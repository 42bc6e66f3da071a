"""What a loop that collects waits for, in a line now and then: a command that is silent looks broken.

Knows words and a clock, nothing of frames.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Waiting"]

CHANGED, SAME = 10.0, 60.0  # seconds between two lines if the words changed, and if they did not


class Waiting:
    """Says what is waited for: at once, every ten seconds while that changes, else every minute.

    Args:
        say: takes a line.
        clock: seconds that only go forward.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._at = -float("inf")
        self._words = ""

    def __call__(self, words: str) -> None:
        """Say the words if it is time to."""
        passed = self._clock() - self._at
        if passed < (SAME if words == self._words else CHANGED):
            return
        self._at, self._words = self._clock(), words
        self._say(words)

    def begin(self) -> None:
        """The next words are said at once: another wait begins."""
        self._at, self._words = -float("inf"), ""


def words(
    model: str,
    *,
    seen: int,
    kept: int,
    wanted: int,
    refused: dict[str, int],
    starts: tuple[str, ...],
    held: str,
    reason: str,
) -> str:
    """The line of a loop that collects.

    Args:
        seen: frames that came.  kept: new ones that a round may use.  wanted: how many begin one.
        refused: how many were left out, by rule.  starts: what begins a round.
        held: why no round may begin although there are enough; "" if nothing forbids it.
        reason: why no frame comes, as the source says; "" if frames come.
    """
    if held:
        return f"waiting: {kept} frames are kept, a round may not begin: {held}"
    found = f"{seen} frames seen, {kept} of {wanted} kept"
    if refused:
        most = sorted(refused.items(), key=lambda rule: -rule[1])[:3]
        left = ", ".join(f"{count} {rule}" for rule, count in most)
        found += f" (left out: {left})"
    if not seen and reason:
        found += f"; none comes ({reason}): send frames to the server, e.g. with python -m adapt.send"
    on = "" if "frames" in starts else f", then for {' or '.join(starts)}"
    return f"waiting for frames of {model!r}{on}: {found}"
