"""How a round of adaptation ends: a result, an error, or a pause.  Shared by every kind of round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from networks.pack import Pack

__all__ = ["RoundError", "RoundPaused", "RoundResult"]


class RoundError(Exception):
    """A round cannot be run.  The text is one line: thing, reason, remedy."""


class RoundPaused(Exception):
    """A progress callback raises this to stop a round.  The text gives the reason.

    The round keeps what is done.  The same call on the same folder continues there, and ends with the weights
    of a round that never stopped.
    """


@dataclass(frozen=True)
class RoundResult:
    """What a finished round returns.

    Attributes:
        pack: the refreshed pack, or None if the round was refused.
        accepted: whether every check of the gate passed.
        report: every number that decided something; can be written as JSON.
    """

    pack: Pack | None
    accepted: bool
    report: dict[str, Any]
