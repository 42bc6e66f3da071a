"""Exceptions of the loop, and the one-line texts of errors that came from elsewhere."""

from __future__ import annotations

from typing import Any

__all__ = ["LoopError", "Paused", "one_line", "rpc_details"]

LONGEST = 500  # characters of an error in a record or a report


class LoopError(Exception):
    """The loop cannot go on.  One line: thing, reason, remedy."""


class Paused(Exception):
    """The round waits for the vehicle or for a new budget (only with `once`).

    The same command continues the round.
    """


def one_line(error: BaseException) -> str:
    """Return the message of `error` on one line, or its type's name if it has none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:LONGEST]


def rpc_details(error: Any) -> str:
    """Return "CODE: details" of a gRPC error or of a client's `Rejected`, "Type: message" of any other."""
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    name = getattr(code, "name", code) or type(error).__name__
    details = error.details() if hasattr(error, "details") else getattr(error, "reason", error)
    return f"{name}: {details}"
