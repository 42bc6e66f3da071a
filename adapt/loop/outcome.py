"""How a round ends: a decision and its reason, both written to reports as they are."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Decision", "Outcome", "RoundStopped", "Submission"]


class Decision(enum.StrEnum):
    """What became of a round.  The values are the words of loop.json, of reports and of the wire."""

    LIVE = "LIVE"  # the server serves the new version
    REJECTED = "REJECTED"  # the server refused it
    REFUSED = "REFUSED"  # the gate refused the adapted pack; nothing was built
    CANCELLED = "CANCELLED"  # by command
    FAILED = "FAILED"  # an error, or a budget that never suffices
    UNKNOWN = "UNKNOWN"  # the server did not decide in time


@dataclass(frozen=True)
class Outcome:
    """A decision, and why; the reason is one line and may be empty."""

    decision: Decision
    reason: str = ""


class RoundStopped(Exception):
    """The round ends before it has a result: CANCELLED or FAILED."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


@dataclass(frozen=True)
class Submission:
    """What the server said about a submitted version.

    events: one {"time", "state", "check", "reason"} per event, in order.  seconds: until the decision.
    """

    outcome: Outcome
    events: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
