"""The report of a round: ROUND_DIR/report.json, loop.json and pictures/ as one HTML file.

Whatever is missing is left out: a round that was declined has no stages, one that was not submitted no
events.  Names come from packs, cameras and servers and are not trusted: everything is escaped.
"""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from adapt.data.base import BROKEN
from adapt.report import figures, page
from adapt.round.pictures import MOST
from common.files import read_json, write_bytes

__all__ = ["ReportError", "render", "write"]


class ReportError(Exception):
    """A report cannot be made.  One line: thing, reason, remedy."""


def _read(path: Path, palette: np.ndarray | None, classes: int) -> str:
    """A data URI, or "" where there is no such picture or it is damaged."""
    try:
        with Image.open(path) as image:
            array = np.asarray(image)
    except BROKEN:
        return ""
    if palette is None:
        return figures.png(array) if array.ndim == 3 else ""
    if array.ndim != 2:
        return ""
    return figures.png(np.where(array < classes, array, 255).astype(np.uint8), palette)


# ------------------------------------------------------------------------------------------------- numbers
def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read ({error}): run the round again") from error
    if not isinstance(found, dict):
        raise ReportError(f"{path} holds no record of a round: give the folder of a round")
    return found


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return str(value)


def _stages(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, measures) in order: the parent, batch statistics, each training."""
    found = [("parent", report.get("parent_measures") or {})]
    stages = report.get("stages") or {}
    for key in sorted(stages, key=lambda k: (k != "adabn", k)):
        measures = stages[key].get("measures")
        if measures:
            found.append(({"adabn": "statistics"}.get(key, key), measures))
    return [(name, m) for name, m in found if m.get("share")]


_ROWS = (
    ("confidence", "mean confidence"),
    ("flip", "agreement with the mirrored answer"),
    ("temporal", "agreement with the next frame"),
    ("teacher", "agreement with the mean of the training's weights"),
    ("variety", "classes in effective use"),
    ("source", "source hold-out mIoU, own statistics"),
    ("source_served", "source hold-out mIoU, as served"),
    ("translated", "source hold-out in the target's colours, mIoU"),
    ("calibration", "calibration error on the source hold-out"),
    ("labelled", "mIoU on the labelled hold-out"),
)


_EDGE_ROWS = (
    ("labelled", "labelled hold-out"),
    ("source", "source hold-out"),
    ("agreement", "against the confident pseudo-edges of the target"),
)


def _edges(folder: Path, loop: dict[str, Any]) -> dict[str, Any] | None:
    """What became of the edges that follow the round; None where none do."""
    report = _json(folder / "edges" / "report.json")
    said = str(loop.get("edges", ""))
    if not report and not said:
        return None
    if not report or (said and not said.startswith(("accepted", "refused"))):
        return {"verdict": said or "not finished", "checks": [], "rows": []}
    before, after = (report.get(f"{k}_measures") or {} for k in ("parent", "candidate"))
    rows = []
    for key, words in _EDGE_ROWS:
        for suffix, more in (("", ", at the benchmark's distance"), ("_tight", ", at the tight one")):
            if before.get(key + suffix) is not None:
                values = (m.get(key + suffix) for m in (before, after))
                rows.append((words + more, *("–" if v is None else f"{100 * float(v):.1f}" for v in values)))
    checks = [
        {**c, "value": float(c.get("value") or 0.0), "limit": float(c.get("limit") or 0.0)}
        for c in (report.get("gate") or {}).get("checks", [])
    ]
    return {"verdict": "passed" if report.get("accepted") else "refused", "checks": checks, "rows": rows}


def _lineage(folder: Path, report: dict[str, Any], loop: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("parent pack", str(report.get("parent", "")))]
    model = folder / "pack" / "model.toml"
    if model.is_file():
        try:
            told = tomllib.loads(model.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            told = {}
        found.append(("refreshed pack", f"{told.get('name', '')} {told.get('version', '')}".strip()))
        found.append(("its hash", str(report.get("pack", ""))))
    found.append(("round", str(report.get("round", ""))))
    if loop.get("version"):
        found.append(("engine version", f"{loop.get('model', '')} {loop['version']}".strip()))
    if loop.get("state"):
        found.append(("what became of it", f"{loop['state']} {loop.get('reason', '')}".strip()))
    return found


def _verdict(report: dict[str, Any], loop: dict[str, Any]) -> tuple[str, str]:
    """(headline, lead)."""
    failed = [c for c in report.get("gate", {}).get("checks", []) if not c.get("passed")]
    why = "; ".join(f"{c['name']}: {c['reason']}" for c in failed)
    count = report.get("frames", {}).get("target", 0)
    if not report.get("stages"):
        return "The round was declined", f"Nothing was learnt from these frames. {why}"
    if not report.get("accepted"):
        words = f"{count} frames were learnt from, and the gate refused what came of it. {why}"
        return "The round was refused", words
    state = str(loop.get("state", ""))
    headline = {
        "LIVE": "The refreshed network is live",
        "REJECTED": "The server refused the refreshed version",
    }.get(state, "The refreshed network passed the gate")
    words = f"{count} frames were learnt from, without a label. Stage chosen: {report.get('chosen', '')}."
    reason = loop.get("reason", "")
    return headline, f"{words} {reason}" if state == "REJECTED" else words


def render(folder: str | os.PathLike[str]) -> str:
    """The report of the round in `folder` as HTML.  Raises ReportError where it holds no finished round."""
    folder = Path(folder)
    loop = _json(folder / "loop.json")
    report = _json(folder / "report.json") or loop.get("adaptation") or {}
    if not report:
        raise ReportError(f"{folder} holds no finished round (no report.json): wait for the end of the round")
    classes = [str(c) for c in report.get("classes") or []]
    stages = _stages(report)
    if not classes and stages:
        classes = [f"class {i}" for i in range(len(stages[0][1]["share"]))]
    numbers = range(len(classes))
    colours = report.get("colours") or [[37 * i % 256, 91 * i % 256, 53 * i % 256] for i in numbers]
    palette = np.full((256, 3), 0, np.uint8)
    palette[: len(colours)] = np.clip(np.array(colours, int).reshape(-1, 3), 0, 255)
    pictures = folder / "pictures"
    shown = []
    for j in range(MOST):
        row = {
            "frame": _read(pictures / f"{j}-frame.png", None, 0),
            "before": _read(pictures / f"{j}-before.png", palette, len(classes)),
            "after": _read(pictures / f"{j}-after.png", palette, len(classes)),
            "learnt": _read(pictures / f"{j}-learnt.png", None, 0),
            "label": _read(pictures / f"{j}-label.png", palette, len(classes)),
        }
        if row["frame"] or row["learnt"]:
            shown.append(row)
    checks = [
        {**c, "value": float(c.get("value") or 0.0), "limit": float(c.get("limit") or 0.0)}
        for c in report.get("gate", {}).get("checks", [])
    ]
    told = report.get("stages") or {}
    rows = [told[k] for k in sorted(told) if k.startswith("label-")]
    labelling = [r for r in rows if len(r.get("lambda", ())) == len(r.get("share", ())) == len(classes)]
    refused = [
        {"stage": name, "checks": [f"{c['name']}: {c['reason']}" for c in stage["refused"]]}
        for name, stage in sorted(told.items())
        if stage.get("refused")
    ]
    headline, lead = _verdict(report, loop)
    begin = min((float(e["time"]) for e in loop.get("events") or [] if e.get("time")), default=0.0)
    events = [
        {
            "t": float(e.get("time") or begin) - begin,
            "version": loop.get("version", ""),
            "state": e.get("state", ""),
            "words": page.event_words(e),
        }
        for e in loop.get("events") or []
    ]
    seconds = {k: float(v) for k, v in (report.get("seconds") or {}).items()}
    seconds |= {k: float(loop[f"{k}_seconds"]) for k in ("build", "swap") if loop.get(f"{k}_seconds")}
    made = {}
    if stages:
        made["shares"] = figures.shares(
            classes, colours, [name for name, _ in stages], [m["share"] for _, m in stages]
        )
    before, after = (_iou(report, k) for k in ("parent_measures", "candidate_measures"))
    if before and after:
        empty = [math.nan] * len(classes)
        made["source"] = figures.per_class(classes, colours, before, after, empty)
    if len(labelling) > 1:
        lam = {name: [s["lambda"][c] for s in labelling] for c, name in enumerate(classes)}
        portions = [100 * float(s["portion"]) for s in labelling]
        made["thresholds"] = figures.curves(
            lam, xs=portions, x_words="portion p, %", y_words="λ of each class, %"
        )
    if seconds:
        made["seconds"] = figures.durations(list(seconds.items()))
    environment = page.environment()
    return environment.get_template("round.html.j2").render(
        classes=classes,
        hexes=page.hexes(colours),
        headline=headline,
        lead=lead,
        title=f"round {loop.get('round', '')} of {loop.get('model', 'a model')}",
        finished=str(loop.get("finished") or report.get("finished", "")),
        accepted=bool(report.get("accepted")),
        pictures=shown,
        hostile=[c for c in checks if str(c.get("name", "")).startswith("frames-")],
        gate=[c for c in checks if not str(c.get("name", "")).startswith("frames-")],
        # The figures are ours and escape every name; all else is escaped by the template.
        figures={k: Markup(v) for k, v in made.items()},
        stages=[name for name, _ in stages],
        rows=[
            (words, [None if m.get(key) is None else f"{float(m[key]):.3f}" for _, m in stages])
            for key, words in _ROWS
            if any(m.get(key) is not None for _, m in stages)
        ],
        edges=_edges(folder, loop),
        labelling=labelling,
        refused=refused,
        events=events,
        lineage=_lineage(folder, report, loop),
        facts=[
            (k, _plain(v))
            for k, v in {
                "frames": report.get("frames"),
                "seconds": seconds,
                "spent in this period": loop.get("spent"),
                "distance from the parent": report.get("distance"),
                "resumed": report.get("resumed"),
                "settings": {k: v for k, v in (report.get("config") or {}).items() if k != "limits"},
                "limits": (report.get("config") or {}).get("limits"),
                "torch": report.get("torch"),
                "threads": report.get("threads"),
            }.items()
            if v not in (None, {}, "")
        ],
    )


def _iou(report: dict[str, Any], key: str) -> list[float]:
    found = (report.get(key) or {}).get("source_iou") or []
    return [math.nan if v is None else float(v) for v in found]


def write(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write ROUND_DIR/report.html (or `out`) atomically and return its path."""
    folder = Path(folder)
    path = Path(out) if out else folder / "report.html"
    try:
        text = render(folder)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, jinja2.TemplateError) as error:
        raise ReportError(
            f"{folder}: its records are not of a round ({type(error).__name__}: {error}): run the round again"
        ) from error
    write_bytes(path, text.encode("utf-8"), durable=False)
    return path
