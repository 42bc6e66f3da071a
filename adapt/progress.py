"""Progress of adaptation: the bars that exports have."""

from __future__ import annotations

from export.progress import Bars

__all__ = ["Bars"]
