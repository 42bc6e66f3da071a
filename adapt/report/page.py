"""The frame every report shares: escaping, colours and words.  Knows no particular report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from adapt.report import figures

__all__ = ["environment", "event_words", "hexes", "side"]


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of `folders` and the shared ones; all they print is escaped, nothing may be missing."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    found.globals.update(
        arrows=lambda words: str(words).replace("->", "→"),
        colour={"before": figures.BEFORE, "after": figures.AFTER, "upper": figures.UPPER, "bad": figures.BAD},
        side=side,
        pct=lambda v: "–" if v is None else f"{100 * v:.1f}",
        ms=lambda v: "–" if v is None else f"{v:.0f}",
    )
    return found


def hexes(colours: Sequence[Sequence[int]]) -> list[str]:
    """#rrggbb of colours; whatever is no number 0..255 raises ValueError, so that it cannot reach a style."""
    return ["#" + "".join(f"{min(max(int(v), 0), 255):02x}" for v in c[:3]) for c in colours]


def side(check: dict[str, Any]) -> str:
    """Whether a check's limit is a most or a least, for people: "≤ " or "≥ ", "" where numbers do not tell.

    Looks at the frames are of shares that may not be exceeded, whatever else had to be true to refuse.
    """
    value, limit, passed = float(check["value"]), float(check["limit"]), bool(check["passed"])
    if str(check["name"]).startswith("frames-"):
        return "≤ "
    return "" if value == limit else "≥ " if (value > limit) == passed else "≤ "


def event_words(event: dict[str, Any]) -> str:
    """A swap event in words: its check and reason, or the numbers it carries."""
    if event.get("reason"):
        return f"{event['check']}: {event['reason']}" if event.get("check") else str(event["reason"])
    numbers = {
        k: v
        for k, v in (event.get("detail") or {}).items()
        if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    return ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in numbers.items())
