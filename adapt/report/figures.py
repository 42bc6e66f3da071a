"""Figures of reports: SVG text and PNG data URIs from numbers and arrays.  Knows nothing of how they were
won.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

BEFORE, AFTER, UPPER, BAD = "#c2571a", "#0f766e", "#64748b", "#b91c1c"
MANY = 3000  # dots in a figure; more only make the file large
INK, SOFT, RULE = "#1e293b", "#64748b", "#e2e8f0"
STATES = {
    "SUBMITTED": "#475569",
    "VERIFIED": "#7c3aed",
    "SHADOWING": "#2563eb",
    "LIVE": AFTER,
    "REJECTED": BAD,
    "ROLLED_BACK": BAD,
    "RETIRED": "#94a3b8",
}


def png(image: np.ndarray, palette: np.ndarray | None = None) -> str:
    """Data URI of uint8 [H,W,3], or of uint8 [H,W] indices with a palette uint8 [256,3]."""
    picture = Image.fromarray(image)
    if palette is not None:
        picture.putpalette(palette.astype(np.uint8).tobytes())
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def changed(frame: np.ndarray, truth: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3]: the frame in pale grey; set right in green, made wrong in red, still wrong in sand."""
    grey = 0.45 * frame.mean(-1, keepdims=True) + 130
    out = np.repeat(grey, 3, -1)
    was, now = before == truth, after == truth
    for mask, colour in (
        (~was & ~now, (232, 205, 160)),
        (~was & now, (22, 163, 74)),
        (was & ~now, (220, 38, 38)),
    ):
        out[mask] = 0.25 * out[mask] + 0.75 * np.array(colour)
    return np.asarray(np.clip(out, 0, 255), np.uint8)


def _text(
    x: float,
    y: float,
    words: str,
    *,
    size: float = 12,
    fill: str = INK,
    anchor: str = "start",
    more: str = "",
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"'
    return f"<text {place} {more}>{escape(words)}</text>"


def _line(
    x1: float, y1: float, x2: float, y2: float, stroke: str = RULE, width: float = 1, more: str = ""
) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width}" {more}/>'


def _dot(x: float, y: float, radius: float, fill: str, opacity: float = 1.0) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{fill}" fill-opacity="{opacity}"/>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    body = "".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg" preserveAspectRatio="xMidYMid meet">{body}</svg>'
    )


def _hex(colour: Sequence[int]) -> str:
    return "#" + "".join(f"{int(v):02x}" for v in colour)


def per_class(
    names: Sequence[str],
    colours: Sequence[Sequence[int]],
    before: Sequence[float],
    after: Sequence[float],
    upper: Sequence[float],
) -> str:
    """Dumbbells: IoU of each class before and after, the labelled upper bound as a tick.  NaN leaves a mark
    out.
    """
    left, right, row, top = 120.0, 640.0, 30.0, 26.0
    height = top + row * len(names) + 30
    parts = []

    def at(v: float) -> float:
        return left + (right - left) * v

    for tick in (0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line(at(tick), top, at(tick), height - 28))
        parts.append(_text(at(tick), height - 10, f"{100 * tick:.0f}", size=11, fill=SOFT, anchor="middle"))
    known = any(not math.isnan(u) for u in upper)
    for heading, x in (("before", 690), ("after", 745), ("gain", 800), ("bound", 855))[: 4 if known else 3]:
        parts.append(_text(x, 14, heading, size=11, fill=SOFT, anchor="end"))
    for i, name in enumerate(names):
        y = top + row * i + row / 2
        b, a, u = before[i], after[i], upper[i]
        look = f'rx="3" fill="{_hex(colours[i])}" stroke="#cbd5e1"'
        parts.append(f'<rect x="0" y="{y - 7:.1f}" width="14" height="14" {look}/>')
        parts.append(_text(22, y + 4.5, name, size=13))
        if not math.isnan(u):
            parts.append(_line(at(u), y - 9, at(u), y + 9, UPPER, 2.5))
            parts.append(_text(855, y + 4.5, f"{100 * u:.1f}", anchor="end", fill=SOFT))
        if math.isnan(b) or math.isnan(a):
            continue
        parts.append(_line(at(b), y, at(a), y, AFTER if a >= b else BAD, 5, 'stroke-opacity="0.35"'))
        parts.append(f'<circle cx="{at(b):.1f}" cy="{y:.1f}" r="5.5" fill="{BEFORE}"/>')
        parts.append(f'<circle cx="{at(a):.1f}" cy="{y:.1f}" r="5.5" fill="{AFTER}"/>')
        parts.append(_text(690, y + 4.5, f"{100 * b:.1f}", anchor="end"))
        parts.append(_text(745, y + 4.5, f"{100 * a:.1f}", anchor="end"))
        gain = 100 * (a - b)
        parts.append(
            _text(
                800,
                y + 4.5,
                f"{gain:+.1f}",
                anchor="end",
                fill=AFTER if gain >= 0 else BAD,
                more='font-weight="600"',
            )
        )
    return _svg(870, height, parts, "IoU of each class before and after adaptation")


def _log_scale(values: Sequence[float], top: float, bottom: float) -> tuple[Any, list[float]]:
    low = max(0.5, min(values, default=1.0) * 0.8)
    high = max(values, default=10.0) * 1.25
    span = math.log(high / low) or 1.0

    def at(v: float) -> float:
        return bottom - (bottom - top) * math.log(max(v, low) / low) / span

    ticks = [v for d in range(5) for v in (10.0**d, 2 * 10.0**d, 5 * 10.0**d) if low <= v <= high]
    return at, ticks


def timeline(
    requests: Sequence[dict[str, Any]],
    events: Sequence[dict[str, Any]],
    phases: Sequence[tuple[str, float, float, str]],
    window: tuple[float, float],
    *,
    height: float = 320.0,
) -> str:
    """Every request as a dot (when it was due, how long it took), coloured by the version that answered.

    Args:
        requests: dictionaries with t (seconds), ms, version, outcome.
        events: t, state, version of the swap's states.
        phases: (words, from, to, colour) shaded behind.
        window: (from, to) in seconds.
    """
    left, right, top, bottom = 56.0, 1064.0, 80.0, height - 34
    begin, end = window
    shown = [r for r in requests if begin <= r["t"] <= end]
    y_at, ticks = _log_scale([r["ms"] for r in shown if r["outcome"] == "answered"], top, bottom)

    def x_at(t: float) -> float:
        return left + (right - left) * (min(max(t, begin), end) - begin) / max(end - begin, 1e-9)

    parts = []
    for words, a, b, colour in phases:
        if b <= begin or a >= end:
            continue
        x, w = x_at(a), x_at(b) - x_at(a)
        parts.append(f'<rect x="{x:.1f}" y="{top}" width="{w:.1f}" height="{bottom - top}" fill="{colour}"/>')
        if w > 6.2 * len(words):
            parts.append(_text(x + w / 2, bottom - 8, words, size=11, fill=SOFT, anchor="middle"))
    for v in ticks:
        parts.append(_line(left, y_at(v), right, y_at(v), "#cbd5e1", 0.6))
        parts.append(_text(left - 8, y_at(v) + 4, f"{v:g}", size=11, fill=SOFT, anchor="end"))
    parts.append(_text(left - 8, top - 8, "ms", size=11, fill=SOFT, anchor="end"))
    step = next(s for s in (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300) if (end - begin) / s <= 14)
    t = math.ceil(begin / step) * step
    while t <= end:
        parts.append(_text(x_at(t), bottom + 18, f"{t:g} s", size=11, fill=SOFT, anchor="middle"))
        t += step
    first = min((r["version"] for r in requests if r.get("version")), default=1)
    stride = 1 + len(shown) // MANY
    if stride > 1:
        parts.append(_text(right, top - 8, f"one dot in {stride} drawn", size=11, fill=SOFT, anchor="end"))
    for i, r in enumerate(shown):
        if i % stride and r["outcome"] == "answered":
            continue
        x = x_at(r["t"])
        if r["outcome"] == "answered":
            colour = BEFORE if r["version"] == first else AFTER
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y_at(r["ms"]):.1f}" r="1.9" fill="{colour}" fill-opacity="0.75"/>'
            )
        else:
            parts.append(_text(x, top + 14, "✕", size=13, fill=BAD, anchor="middle"))
    taken = [-1e9] * 4
    for e in events:
        if not begin <= e["t"] <= end:
            continue
        x, colour = x_at(e["t"]), STATES.get(e["state"], SOFT)
        words = f"{e['state']} v{e['version']}"
        width = 6.6 * len(words) + 8
        lane = next((i for i, edge in enumerate(taken) if x >= edge), 0)
        taken[lane] = x + width
        y = 12 + 16 * lane
        parts.append(_line(x, y + 3, x, bottom, colour, 1.4))
        anchor = "start" if x + width < right + 30 else "end"
        parts.append(
            _text(
                x + (3 if anchor == "start" else -3),
                y,
                words,
                size=11,
                fill=colour,
                anchor=anchor,
                more='font-weight="600"',
            )
        )
    parts.append(_line(left, bottom, right, bottom, "#94a3b8"))
    return _svg(1080, height, parts, "Latency of every request over time, by version")


def _axes(left: float, right: float, top: float, bottom: float, x_words: str, y_words: str) -> list[str]:
    parts = []
    for k in range(5):
        v = k / 4
        x, y = left + (right - left) * v, bottom - (bottom - top) * v
        parts += [_line(x, top, x, bottom), _line(left, y, right, y)]
        parts.append(_text(x, bottom + 16, f"{100 * v:.0f}", size=11, fill=SOFT, anchor="middle"))
        parts.append(_text(left - 7, y + 4, f"{100 * v:.0f}", size=11, fill=SOFT, anchor="end"))
    parts.append(_text((left + right) / 2, bottom + 34, x_words, fill=SOFT, anchor="middle"))
    parts.append(_text(left, top - 9, y_words, fill=SOFT))
    return parts


def reliability(curves: dict[str, Sequence[dict[str, float]]]) -> str:
    """Accuracy against confidence; the diagonal is perfect calibration.  The dot's area is the share of
    pixels.
    """
    left, right, top, bottom = 46.0, 500.0, 30.0, 300.0
    parts = _axes(left, right, top, bottom, "confidence as served, %", "pixels that are right, %")
    parts.append(_line(left, bottom, right, top, "#94a3b8", 1.2, 'stroke-dasharray="5 4"'))
    for (_, curve), colour in zip(curves.items(), (BEFORE, AFTER), strict=False):
        points = [
            (left + (right - left) * p["confidence"], bottom - (bottom - top) * p["accuracy"], p["share"])
            for p in curve
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.2"/>')
        for x, y, share in points:
            parts.append(_dot(x, y, 2 + 9 * math.sqrt(share), colour, 0.55))
    return _svg(520, 345, parts, "Reliability: accuracy against confidence")


def confidence_over_time(requests: Sequence[dict[str, Any]], live: float | None) -> str:
    """Mean confidence of the answers on the road, a running mean over time, coloured by version."""
    left, right, top, bottom = 46.0, 500.0, 30.0, 300.0
    rows = [r for r in requests if r["outcome"] == "answered" and r.get("confidence") is not None]
    if not rows:
        return _svg(520, 345, [_text(260, 170, "no answers", anchor="middle")], "no answers")
    rows = rows[:: 1 + len(rows) // MANY]
    end = max(r["t"] for r in rows) or 1.0
    low = max(0.0, min(r["confidence"] for r in rows) - 0.02)
    high = min(1.0, max(r["confidence"] for r in rows) + 0.02)
    parts = []

    def y_at(v: float) -> float:
        return float(bottom - (bottom - top) * (v - low) / max(high - low, 1e-6))

    for k in range(5):
        v = low + (high - low) * k / 4
        parts.append(_line(left, y_at(v), right, y_at(v)))
        parts.append(_text(left - 7, y_at(v) + 4, f"{100 * v:.0f}", size=11, fill=SOFT, anchor="end"))
        parts.append(
            _text(
                left + (right - left) * k / 4,
                bottom + 16,
                f"{end * k / 4:.0f}",
                size=11,
                fill=SOFT,
                anchor="middle",
            )
        )
    parts.append(_text(left, top - 9, "mean confidence of an answer, %", fill=SOFT))
    parts.append(_text((left + right) / 2, bottom + 34, "seconds", fill=SOFT, anchor="middle"))
    first = min(r["version"] for r in rows)
    for r in rows:
        colour = BEFORE if r["version"] == first else AFTER
        x = left + (right - left) * r["t"] / end
        parts.append(_dot(x, y_at(r["confidence"]), 1.6, colour, 0.4))
    for version in sorted({r["version"] for r in rows}):
        own = [r for r in rows if r["version"] == version]
        path = []
        for r in own[:: max(1, len(own) // 120)]:
            near = [q["confidence"] for q in own if abs(q["t"] - r["t"]) <= 2.0]
            path.append(f"{left + (right - left) * r['t'] / end:.1f},{y_at(sum(near) / len(near)):.1f}")
        colour = BEFORE if version == first else AFTER
        line = 'fill="none" stroke-width="2.4" stroke-linejoin="round"'
        parts.append(f'<polyline points="{" ".join(path)}" stroke="{colour}" {line}/>')
    if live is not None:
        x = left + (right - left) * live / end
        parts.append(_line(x, top, x, bottom, AFTER, 1.4))
        parts.append(
            _text(x - 5, top + 12, "LIVE", size=11, fill=AFTER, anchor="end", more='font-weight="600"')
        )
    return _svg(520, 345, parts, "Mean confidence of answers over time")


LINES = ("#64748b", "#2563eb", "#c2571a", "#0f766e", "#1e293b", "#b91c1c", "#7c3aed")


def curves(
    series: Mapping[str, Sequence[float]],
    *,
    step: float = 1.0,
    bands: Sequence[tuple[str, float, float]] = (),
    x_words: str = "",
    y_words: str = "",
    marks: Sequence[tuple[float, str]] = (),
    xs: Sequence[float] | None = None,
) -> str:
    """Lines over one axis, named at their ends; values 0..1 drawn as per cent, NaN leaves a gap.

    Args:
        series: name to values, value i at (i + 1/2)·step or at `xs[i]`.
        bands: (words, from, to) shaded behind.
        marks: (x, words) upright lines, such as a swap or a kill.
    """
    left, right, top, bottom = 52.0, 900.0, 34.0, 330.0
    points = {
        name: [
            ((i + 0.5) * step if xs is None else xs[i], float(v))
            for i, v in enumerate(values)
            if v is not None and not math.isnan(v)
        ]
        for name, values in series.items()
    }
    every = [p for line in points.values() for p in line]
    begin = min([b for _, b, _ in bands] + [x for x, _ in every] or [0.0])
    end = max([b for _, _, b in bands] + [x for x, _ in every] or [1.0])
    high = min(1.0, math.ceil(10 * max([v for _, v in every] or [1.0]) + 0.3) / 10)
    low = max(0.0, math.floor(10 * min([v for _, v in every] or [0.0])) / 10)

    def at(x: float, v: float) -> tuple[float, float]:
        across = left + (right - left) * (x - begin) / max(end - begin, 1e-9)
        return across, bottom - (bottom - top) * (v - low) / max(high - low, 1e-9)

    parts = []
    for i, (words, a, b) in enumerate(bands):
        x, width = at(a, low)[0], at(b, low)[0] - at(a, low)[0]
        fill = ("#f8fafc", "#eef2ff")[i % 2]
        parts.append(
            f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{bottom - top}" fill="{fill}"/>'
        )
        parts.append(_text(x + width / 2, top + 14, words, size=12, fill=SOFT, anchor="middle"))
    ticks = round(10 * (high - low))
    for k in range(ticks + 1):
        v = low + k / 10
        y = at(begin, v)[1]
        parts.append(_line(left, y, right, y))
        parts.append(_text(left - 8, y + 4, f"{100 * v:.0f}", size=11, fill=SOFT, anchor="end"))
    for k in range(5):
        v = begin + (end - begin) * k / 4
        parts.append(_text(at(v, low)[0], bottom + 18, f"{v:.0f}", size=11, fill=SOFT, anchor="middle"))
    for x, words in marks:
        across = at(x, low)[0]
        parts.append(_line(across, top, across, bottom, BAD, 1, 'stroke-dasharray="3 3"'))
        parts.append(_text(across, top - 4, words, size=10, fill=BAD, anchor="middle"))
    parts.append(_text(left, top - 14, y_words, fill=SOFT))
    parts.append(_text((left + right) / 2, bottom + 36, x_words, fill=SOFT, anchor="middle"))
    taken: list[float] = []
    ends = sorted(points.items(), key=lambda item: item[1][-1][1] if item[1] else 0.0, reverse=True)
    order = list(series)
    for name, line in ends:
        if not line:
            continue
        colour = LINES[order.index(name) % len(LINES)]
        path = " ".join(f"{at(x, v)[0]:.1f},{at(x, v)[1]:.1f}" for x, v in line)
        look = f'fill="none" stroke="{colour}" stroke-width="2.2" stroke-linejoin="round"'
        parts.append(f'<polyline points="{path}" {look}/>')
        y = at(*line[-1])[1]
        while taken and y < taken[-1] + 15:
            y = taken[-1] + 15
        taken.append(y)
        parts.append(_text(right + 10, y + 4, name, size=13, fill=colour, more='font-weight="600"'))
    return _svg(1030, 375, parts, y_words or "curves")


def shares(
    names: Sequence[str],
    colours: Sequence[Sequence[int]],
    stages: Sequence[str],
    values: Sequence[Sequence[float]],
) -> str:
    """Share of each class at each stage, one row a class, one bar a stage; values [stages][classes], 0..1.

    The scale is the square root, so that a sign is seen beside a road.
    """
    left, width, row, top = 120.0, 150.0, 26.0, 30.0
    height = top + row * len(names) + 8
    high = math.sqrt(max((v for stage in values for v in stage), default=1.0)) or 1.0
    parts = []
    for s, stage in enumerate(stages):
        parts.append(_text(left + s * (width + 60), 16, stage, size=12, fill=SOFT))
    for i, name in enumerate(names):
        y = top + row * i
        parts.append(_text(0, y + 15, name, size=13))
        for s in range(len(stages)):
            v = float(values[s][i])
            x = left + s * (width + 60)
            long = width * math.sqrt(max(v, 0.0)) / high
            look = f'fill="{_hex(colours[i])}" stroke="#94a3b8" stroke-width="0.6" rx="2"'
            parts.append(f'<rect x="{x:.1f}" y="{y + 3:.1f}" width="{long:.1f}" height="15" {look}/>')
            parts.append(_text(x + long + 5, y + 15, f"{100 * v:.1f}", size=11, fill=SOFT))
    return _svg(left + len(stages) * (width + 60), height, parts, "Share of each class at each stage")


def durations(parts_of: Sequence[tuple[str, float]]) -> str:
    """One bar cut into what the time went into; (words, seconds) each."""
    known = [(words, float(v)) for words, v in parts_of if v > 0]
    total = sum(v for _, v in known) or 1.0
    x, parts = 0.0, []
    for i, (words, v) in enumerate(known):
        wide = 900 * v / total
        fill = ("#dbeafe", "#ccfbf1", "#fef3c7", "#ede9fe", "#fee2e2", "#e2e8f0")[i % 6]
        parts.append(f'<rect x="{x:.1f}" y="4" width="{wide:.1f}" height="30" fill="{fill}"/>')
        if wide > 7 * len(words):
            parts.append(_text(x + wide / 2, 24, words, size=12, anchor="middle"))
        if wide > 14:
            parts.append(_text(x + 2, 50 + 14 * (i % 3), f"{words} {v:.1f} s", size=11, fill=SOFT))
        x += wide
    return _svg(900, 90, parts, "Where the time went")
