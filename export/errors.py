"""The one exception of this package."""

from __future__ import annotations


class ExportError(Exception):
    """An export that cannot be done; the message is one line: thing, reason, remedy."""


def one_line(error: object) -> str:
    return " ".join(str(error).split())
