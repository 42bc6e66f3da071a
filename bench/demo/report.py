"""Summary and report of the demo: ``summary.json`` for programs, ``report.html`` for people (one file, no
network).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from adapt.report import figures, page
from networks.labels import STREET

PHASES = (
    ("before", "before: the released version alone"),
    ("adapting", "adapting: collecting and training beside it"),
    ("during", "during: the guarded swap"),
    ("after", "after: the refreshed version"),
)
TINTS = {"before": "#f8fafc", "adapting": "#eef2ff", "during": "#fef3c7", "after": "#ecfdf5"}
SHORT = {
    "before": "released version",
    "adapting": "adapter collects and trains",
    "during": "swap",
    "after": "refreshed version",
}
NOT_IN_SUMMARY = ("pictures", "requests")


def summary(runs: Sequence[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """What summary.json holds: ``seeds`` (one record a seed), ``mean`` and ``spread`` over them, facts.

    ``spread`` is the sample standard deviation, 0 for a single run.  Every request stands in the vehicle's
    log beside the summary, not in it."""
    records = [{k: v for k, v in run.items() if k not in NOT_IN_SUMMARY} for run in runs]
    mean: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for key, value in records[0].items():
        if isinstance(value, bool) or not (isinstance(value, (int, float)) or value is None) or key == "seed":
            continue
        values = [r[key] for r in records if r.get(key) is not None]
        mean[key] = round(statistics.fmean(values), 5) if values else None
        spread[key] = round(statistics.stdev(values), 5) if len(values) > 1 else 0.0
    iou = {}
    for name in ("source", "before", "after", "upper"):
        columns = zip(*(r["scores"][name]["iou"] for r in records), strict=True)
        iou[name] = [_mean_of(column) for column in columns]
    return {
        "schema": 1,
        "seeds": records,
        "mean": mean,
        "spread": spread,
        "classes": list(STREET.classes),
        "iou": iou,
        **facts,
    }


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return round(statistics.fmean(known), 5) if known else None


def _floats(values: Sequence[float | None]) -> list[float]:
    return [math.nan if v is None else v for v in values]


def _figures(run: dict[str, Any]) -> dict[str, Any]:
    scores, requests, events = run["scores"], run["requests"], run["events"]
    phases = [(SHORT[name], *run["phases"][name], TINTS[name]) for name, _ in PHASES]
    end = max((r["t"] for r in requests), default=1.0)
    made = {
        "classes": figures.per_class(
            STREET.classes,
            STREET.colours,
            _floats(scores["before"]["iou"]),
            _floats(scores["after"]["iou"]),
            _floats(scores["upper"]["iou"]),
        ),
        "whole": figures.timeline(requests, events, phases, (0.0, end)),
        "reliability": figures.reliability(
            {"before": scores["before"]["curve"], "after": scores["after"]["curve"]}
        ),
        "close": "",
    }
    start, stop = run["phases"]["during"]
    live = next((e["t"] for e in reversed(events) if e["state"] == "LIVE"), None)
    made["confidence"] = figures.confidence_over_time(requests, live)
    if run["swapped"]:
        made["close"] = figures.timeline(
            requests, events, phases, (max(0.0, start - 1.0), min(end, stop + 1.0)), height=280
        )
    return {k: Markup(v) for k, v in made.items()}  # the figures are ours; everything else is escaped


def _pictures(run: dict[str, Any]) -> list[dict[str, Any]]:
    palette = STREET.palette()
    return [
        {
            "words": p["words"],
            "gain": p["gain"],
            "frame": figures.png(p["frame"]),
            **{k: figures.png(p[k], palette) for k in ("truth", "before", "after")},
            "changed": figures.png(figures.changed(p["frame"], p["truth"], p["before"], p["after"])),
        }
        for p in run["pictures"]
    ]


def _labelling(report: dict[str, Any]) -> list[dict[str, Any]]:
    stages = report.get("stages", {})
    return [stages[key] for key in sorted(stages) if key.startswith("label-")]


def _round_words(run: dict[str, Any]) -> str:
    report = run["round"]
    frames, seconds = report["frames"], report["seconds"]
    statistics_ = report["stages"].get("adabn", {})
    words = (
        f"{run['collected']} frames were collected from the live service; {frames['target']} were learnt "
        f"from and {frames['target_holdout']} kept aside for the gate, and every batch replays some of the "
        f"{frames['replay']} labelled daylight frames that the pack carries. "
    )
    if "kept" in statistics_:
        words += (
            f"Batch normalisation keeps {100 * statistics_['kept']:.0f} % of its daylight statistics "
            f"({statistics_['reason']}). "
        )
    if report.get("chosen"):
        words += f"Stage chosen: {report['chosen']}. "
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    return words + f"Time of the round: {spent}."


def _drift(run: dict[str, Any], domain: str) -> list[dict[str, Any]]:
    """What the drift monitor said of each road, beside what the network was worth there."""
    rows = (
        ("day", "by day", "the released version", "miou_source"),
        ("before", f"at {domain}", "the released version", "miou_before"),
        ("after", f"at {domain}", "the refreshed version", "miou_after"),
    )
    said = run.get("drift", {})
    return [
        {"road": road, "version": version, "miou": run[key], **said[name]}
        for name, road, version, key in rows
        if name in said and (name != "after" or run["swapped"])
    ]


def _recovered(scores: dict[str, Any]) -> str:
    """Share of the gap between "before" and the labelled bound that was closed, in words."""
    gap = scores["miou_upper"] - scores["miou_before"]
    return f"{100 * (scores['miou_after'] - scores['miou_before']) / gap:.0f} %" if gap > 0 else "–"


def _swap_words(run: dict[str, Any]) -> str:
    if not run["swapped"]:
        return "No version went live: the refreshed one was refused, and the released one kept answering."
    inside = [r for r in run["requests"] if r["outcome"] == "answered"]
    start, stop = run["phases"]["during"]
    n = sum(start <= r["t"] <= stop for r in inside)
    return f"{n} requests were answered while the guarded swap was under way, each by exactly one version."


def render(content: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """The report as HTML.  ``content``: the summary; ``runs``: the records with pictures and requests."""
    environment = page.environment(Path(__file__).parent)
    shown = [
        {
            **run,
            "figures": _figures(run),
            "pictures": _pictures(run),
            "labelling": _labelling(run["round"]),
            "gate": run["round"]["gate"]["checks"],
            "round_words": _round_words(run),
            "swap_words": _swap_words(run),
            "drift": _drift(run, content["domain"]),
            "events": [{**e, "words": page.event_words(e)} for e in run["events"]],
            "rate": f"{content['settings']['rate']:g}",
            "heldout": content["settings"]["heldout"],
        }
        for run in runs
    ]
    mean = content["mean"]
    lost = sum(r["sent"] - r["answered"] - r["rejected"] for r in runs)
    facts = {
        "command": content["command"],
        "pack": content["pack"],
        "domain": f"day → {content['domain']}",
        "machine": content["machine"],
        "finished": content["finished"],
        "seconds a seed": ", ".join(f"{r['seconds']['all']:.0f}" for r in runs),
        "settings": ", ".join(f"{k} {v}" for k, v in content["settings"].items() if v not in ((), [], "")),
        "libraries": ", ".join(f"{k} {v}" for k, v in content["libraries"].items()),
    }
    lost_points = 100 * (mean["miou_source"] - mean["miou_before"])
    gain = 100 * (mean["miou_after"] - mean["miou_before"])
    lead = (
        f"The released network loses {lost_points:.0f} points of mIoU when the light goes. While a vehicle "
        f"keeps streaming {content['settings']['rate']:g} frames a second, the adapter collects what it "
        "sees, labels it by class-balanced self-training, trains, passes its own gate and hands the "
        "refreshed engine to the server, which tries it in the shadow of live traffic before it goes live: "
        f"{gain:+.0f} points, no frame unanswered."
    )
    if lost or any(not r["swapped"] for r in runs):
        lead = lead.replace(", no frame unanswered.", f"; {lost} requests were lost." if lost else ".")
    return environment.get_template("report.html.j2").render(
        domain=content["domain"],
        made=datetime.fromisoformat(content["finished"]).strftime("%-d %B %Y, %H:%M"),
        lead=lead,
        mean=mean,
        spread=content["spread"],
        runs=shown,
        classes=STREET.classes,
        hexes=page.hexes(STREET.colours),
        lost=lost,
        total_sent=sum(r["sent"] for r in runs),
        phases=PHASES,
        facts=list(facts.items()),
        recovered=_recovered,
    )
