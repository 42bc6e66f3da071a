"""Before and after as a picture: an SVG of bars a class and of the reliability of the confidences.

Written as text, so that it needs no plotting library and the same scores give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

__all__ = ["svg"]

# Told apart by everyone (Okabe and Ito), and by lightness on paper.
COLOURS = ("#9a3412", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#555555")
INK, SOFT, RULE = "#1e293b", "#64748b", "#dbe2ea"
BAR, GAP, SIDE = 11, 9, 300


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12, colour: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}">'
        f"{escape(words)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str = RULE, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"/>'
    )


def _known(value: float | None) -> bool:
    return value is not None and value == value


def svg(columns: Sequence[tuple[str, Mapping[str, Any]]], title: str = "") -> str:
    """An SVG document: IoU of each class and their mean, a bar a network, and reliability diagrams.

    Args:
        columns: (heading, {"iou": {class: 0..1 or None}, "miou": …, "calibration": [{"confidence",
            "accuracy", "share"}, …], "ece": …}), as `adapt.evaluate` measures them; the first is the one
            the others are compared with.

    Raises:
        ValueError: no column.
    """
    if not columns:
        raise ValueError("no score: there is nothing to draw")
    names = [
        name
        for name, value in columns[0][1]["iou"].items()
        if any(_known(c["iou"].get(name)) for _, c in columns)
    ]
    rows: list[tuple[str, list[float | None]]] = [("mean IoU", [c["miou"] for _, c in columns])]
    rows += [(name, [c["iou"].get(name) for _, c in columns]) for name in names]
    left = 30 + 7 * max(len(name) for name, _ in rows)
    top = 62 + 18 * len(columns)
    row = len(columns) * BAR + GAP
    bars_width = 420
    height = max(top + row * len(rows) + 40, top + SIDE + 70)
    right = left + bars_width + 130
    width = right + SIDE + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" role="img">',
        f"<title>{escape(title or 'IoU of each class and calibration')}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(20, 30, title or "IoU of each class", size=16),
    ]
    for i, (name, scores) in enumerate(columns):
        y = 54 + 18 * i
        parts.append(f'<rect x="20" y="{y - 10}" width="12" height="12" fill="{_colour(i)}"/>')
        words = f"{name}: mean IoU {_percent(scores['miou'])}"
        if "ece" in scores:
            words += f", calibration error {_percent(scores['ece'])}"
        parts.append(_text(38, y, words))
    parts += _bars(rows, left, top, bars_width, row)
    parts += _reliability(columns, right, top)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _percent(value: float | None) -> str:
    return f"{100 * value:.1f} %" if value is not None and value == value else "–"


def _bars(
    rows: Sequence[tuple[str, Sequence[float | None]]], left: float, top: float, width: float, row: float
) -> list[str]:
    bottom = top + row * len(rows)
    parts = []
    for tick in range(0, 101, 20):
        x = left + width * tick / 100
        parts += [_line(x, top, x, bottom), _text(x, bottom + 16, str(tick), anchor="middle", colour=SOFT)]
    parts.append(_text(left + width / 2, bottom + 32, "IoU, %", anchor="middle", colour=SOFT))
    for k, (name, values) in enumerate(rows):
        y = top + row * k + GAP / 2
        middle = y + len(values) * BAR / 2 + 4
        parts.append(_text(left - 8, middle, name, anchor="end"))
        for i, value in enumerate(values):
            if value is None or value != value:
                continue
            length = width * min(max(value, 0.0), 1.0)
            parts.append(
                f'<rect x="{left:.1f}" y="{y + i * BAR:.1f}" width="{length:.1f}" height="{BAR - 1}" '
                f'fill="{_colour(i)}"><title>{escape(name)}: {_percent(value)}</title></rect>'
            )
        base, last = values[0], values[-1]
        words = _percent(last).removesuffix(" %")
        if len(values) > 1 and base is not None and last is not None and base == base and last == last:
            words += f" ({100 * (last - base):+.1f})"
        parts.append(_text(left + width + 6, middle, words, size=11, colour=SOFT))
    parts.append(_line(left, top, left, bottom, SOFT))
    return parts


def _reliability(columns: Sequence[tuple[str, Mapping[str, Any]]], left: float, top: float) -> list[str]:
    """Accuracy over confidence; on the dotted diagonal a network is as sure as it should be."""
    parts = [_text(left, top - 8, "How often an answer of this confidence is right")]
    for tick in range(0, 101, 20):
        x, y = left + SIDE * tick / 100, top + SIDE - SIDE * tick / 100
        parts += [_line(x, top, x, top + SIDE), _line(left, y, left + SIDE, y)]
        parts.append(_text(x, top + SIDE + 16, str(tick), anchor="middle", colour=SOFT))
        parts.append(_text(left - 6, y + 4, str(tick), anchor="end", colour=SOFT))
    parts.append(
        f'<path d="M{left:.1f} {top + SIDE:.1f}L{left + SIDE:.1f} {top:.1f}" stroke="{SOFT}" '
        'stroke-dasharray="3 4" fill="none"/>'
    )
    parts.append(
        _text(
            left + SIDE / 2,
            top + SIDE + 32,
            "confidence, % (dot size: share of pixels)",
            anchor="middle",
            colour=SOFT,
        )
    )
    for i, (_, scores) in enumerate(columns):
        curve = scores.get("calibration") or []
        spots = [
            (left + SIDE * b["confidence"], top + SIDE - SIDE * b["accuracy"], b["share"]) for b in curve
        ]
        if len(spots) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y, _ in spots)
            parts.append(f'<path d="M{path}" stroke="{_colour(i)}" stroke-width="1.5" fill="none"/>')
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{2 + 8 * share**0.5:.1f}" fill="{_colour(i)}" '
            'fill-opacity=".55"/>'
            for x, y, share in spots
        ]
    return parts
