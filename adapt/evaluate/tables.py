"""Tables of scores in Markdown: a column a network, a row a class, the change against the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["markdown"]


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _change(value: float | None, base: float | None) -> str:
    if value is None or base is None or value != value or base != base:
        return ""
    return f" ({100 * (value - base):+.1f})"


def markdown(columns: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A Markdown table, percentages.

    Args:
        columns: (heading, {"iou": {class: 0..1 or None}, "miou": …, "accuracy": …, "ece": …}); the first is
            what the others are compared with.  Missing rows are left out.
    """
    if not columns:
        return ""
    first = columns[0][1]
    lines = ["| | " + " | ".join(name for name, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    rows: list[tuple[str, list[float | None]]] = [
        (name, [c["iou"].get(name) for _, c in columns]) for name in first["iou"]
    ]
    for key, words in (
        ("miou", "**mean IoU**"),
        ("boundary_miou", "mean boundary IoU"),
        ("accuracy", "pixels right"),
        ("ece", "calibration error"),
    ):
        if key in first:
            rows.append((words, [c.get(key) for _, c in columns]))
    for words, values in rows:
        cells = [_percent(values[0])]
        cells += [_percent(v) + _change(v, values[0]) for v in values[1:]]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
