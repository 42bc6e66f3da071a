"""Texts that fit on one line of a terminal: error messages and the names of files."""

from __future__ import annotations

__all__ = ["one_line", "printable", "shorten"]


def one_line(value: object) -> str:
    """Return `str(value)` with each run of white space, line breaks included, as one space."""
    return " ".join(str(value).split())


def shorten(value: object, limit: int) -> str:
    """Return the first `limit` characters of `one_line(value)`."""
    return one_line(value)[:limit]


def printable(text: str) -> str:
    """Return the text with escapes for what UTF-8 cannot encode: the name of a file may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()
