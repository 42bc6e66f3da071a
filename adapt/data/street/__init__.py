"""Rendered streets: a free source of labelled frames in any light."""

from __future__ import annotations

from adapt.data.street.scenes import CLASSES, DOMAINS, SIZE, drive, render

__all__ = [
    "CLASSES",
    "DOMAINS",
    "SIZE",
    "drive",
    "render",
]
