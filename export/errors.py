"""The one exception of this package."""

from __future__ import annotations

from common.text import one_line

__all__ = ["ExportError", "one_line"]


class ExportError(Exception):
    """An export that cannot be done; the message is one line: thing, reason, remedy."""
