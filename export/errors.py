"""The one exception of this package."""

from __future__ import annotations

__all__ = ["ExportError"]


class ExportError(Exception):
    """An export cannot be done.  The message is one line: the thing, the reason and the remedy."""
