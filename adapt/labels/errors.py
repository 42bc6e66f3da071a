"""The one error of the edge tools: a line with the thing, the reason and the remedy."""

from __future__ import annotations

__all__ = ["EdgeError"]


class EdgeError(ValueError):
    """Input that has no right answer: named, never scored."""
