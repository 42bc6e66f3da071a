from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from adapt.report import figures
from bench.demo import report
from bench.demo.__main__ import problems, show
from networks.labels import STREET

CLASSES = len(STREET.classes)
PROMISED = (
    "miou_source",
    "miou_before",
    "miou_after",
    "miou_upper",
    "sent",
    "answered",
    "rejected",
    "failed",
    "swap_seconds",
    "p99_ms_before",
    "p99_ms_during",
    "p99_ms_after",
    "versions_seen",
)


def a_run(seed: int = 0) -> dict[str, Any]:
    """The record of a run nobody made."""
    rng = np.random.default_rng(seed)
    requests = [
        {
            "t": i / 10,
            "ms": float(rng.uniform(5, 40)),
            "version": 1 if i < 70 else 2,
            "outcome": "answered",
            "confidence": float(rng.uniform(0.5, 0.9)),
        }
        for i in range(100)
    ]
    requests[40] = {"t": 4.0, "ms": 1.0, "version": 0, "outcome": "rejected", "confidence": None}
    iou: list[float | None] = [round(float(v), 3) for v in rng.uniform(0.1, 0.9, CLASSES)]
    iou[9] = None
    scores = {
        name: {
            "miou": 0.3 + k / 10 + seed / 100,
            "iou": iou,
            "accuracy": 0.8,
            "ece": 0.1,
            "curve": [
                {"confidence": c, "accuracy": c - 0.1, "share": 0.2} for c in (0.3, 0.5, 0.7, 0.9, 0.99)
            ],
        }
        for k, name in enumerate(("before", "after", "upper", "source"))
    }
    label = rng.integers(0, CLASSES, (8, 16)).astype(np.uint8)
    frame = rng.integers(0, 256, (8, 16, 3)).astype(np.uint8)
    run: dict[str, Any] = {
        "seed": seed,
        "domain": "dusk",
        "sent": 100,
        "answered": 99,
        "rejected": 1,
        "failed": 0,
        **{f"miou_{name}": scores[name]["miou"] for name in scores},
        "miou_source_after": 0.6,
        "swap_seconds": 2.5 + seed,
        "flip_ms": 0.03,
        "versions_seen": [1, 2],
        "swapped": True,
        "collected": 60,
        "seconds": {"all": 90.0},
        "scores": scores,
        "requests": requests,
        "phases": {"before": [0, 2], "adapting": [2, 6], "during": [6, 8], "after": [8, 9.9]},
        "events": [
            {"t": 6.0, "state": "SUBMITTED", "version": 2, "check": "", "reason": "", "detail": {}},
            {
                "t": 6.5,
                "state": "VERIFIED",
                "version": 2,
                "check": "",
                "reason": "",
                "detail": {"seconds": 0.5},
            },
            {"t": 7.0, "state": "LIVE", "version": 2, "check": "", "reason": "<ok & well>", "detail": {}},
        ],
        "round": {
            "frames": {"target": 50, "target_holdout": 10, "replay": 40},
            "seconds": {"train": 30.0},
            "stages": {
                "adabn": {"kept": 0.0, "reason": "agreement 0.80 -> 0.84"},
                "label-1": {
                    "portion": 0.3,
                    "lambda": [0.5] * CLASSES,
                    "labelled": 0.3,
                    "share": [1 / CLASSES] * CLASSES,
                },
            },
            "chosen": "train-1",
            "gate": {
                "checks": [
                    {"name": "finite", "value": 1.0, "limit": 1.0, "passed": True, "reason": "numbers"}
                ]
            },
        },
        "pictures": [
            {"words": "median", "gain": 0.1, "frame": frame, "truth": label, "before": label, "after": label}
        ],
    }
    for phase in ("before", "adapting", "during", "after"):
        run |= {
            f"p50_ms_{phase}": 20.0,
            f"p99_ms_{phase}": 38.0,
            f"max_ms_{phase}": 40.0,
            f"requests_{phase}": 20,
        }
    return run


FACTS = {
    "domain": "dusk",
    "command": "make demo",
    "finished": "2026-11-22T16:00:00+00:00",
    "seconds": 90.0,
    "machine": "2 vCPU",
    "pack": "street-day 1.0.0",
    "training": "x",
    "libraries": {"numpy": "2"},
    "settings": {"rate": 10.0, "heldout": 80},
}


def test_the_summary_holds_what_is_promised_for_each_seed() -> None:
    runs = [a_run(0), a_run(1), a_run(2)]
    summary = json.loads(json.dumps(report.summary(runs, FACTS), allow_nan=False))
    assert [r["seed"] for r in summary["seeds"]] == [0, 1, 2]
    for run in summary["seeds"]:
        assert set(PROMISED) <= set(run)
        assert "requests" not in run
        assert "pictures" not in run
    after = [r["miou_after"] for r in runs]
    assert summary["mean"]["miou_after"] == pytest.approx(statistics.fmean(after), abs=1e-5)
    assert summary["spread"]["miou_after"] == pytest.approx(statistics.stdev(after), abs=1e-5)
    assert summary["iou"]["before"][9] is None


def test_one_seed_has_no_spread() -> None:
    assert report.summary([a_run()], FACTS)["spread"]["miou_after"] == 0.0


def test_a_swap_that_did_not_happen_has_no_time() -> None:
    runs = [a_run(0) | {"swap_seconds": None, "swapped": False}, a_run(1)]
    assert report.summary(runs, FACTS)["mean"]["swap_seconds"] == 3.5
    assert "did not go live" in problems({"seeds": runs})[0]


def test_a_lost_request_is_a_problem() -> None:
    assert problems({"seeds": [a_run()]}) == []
    assert "1 of 101 requests were lost" in problems({"seeds": [a_run() | {"sent": 101}]})[0]


@pytest.mark.parametrize("seeds", [1, 2])
def test_the_report_is_one_file_that_needs_no_network(seeds: int) -> None:
    runs = [a_run(s) for s in range(seeds)]
    html = report.render(report.summary(runs, FACTS), runs)
    assert "<script" not in html
    assert "<link" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert set(re.findall(r"https?://[^\"'<> ]+", html)) <= {"http://www.w3.org/2000/svg"}
    sources = re.findall(r'src="([^"]{0,40})', html)
    assert len(sources) == 5 * seeds
    assert all(s.startswith("data:image/png;base64,") for s in sources)
    assert "&lt;ok &amp; well&gt;" in html
    assert "<ok & well>" not in html
    for name in STREET.classes:
        assert name in html


def test_a_refused_round_has_a_report_too() -> None:
    run = a_run() | {"swapped": False, "swap_seconds": None, "versions_seen": [1], "events": []}
    html = report.render(report.summary([run], FACTS), [run])
    assert "No version went live" in html


def test_the_timeline_has_a_dot_for_each_answer_in_its_window() -> None:
    run = a_run()
    phases = [("before", 0.0, 2.0, "#fff"), ("after", 2.0, 9.9, "#eee")]
    svg = ElementTree.fromstring(figures.timeline(run["requests"], run["events"], phases, (0.0, 9.9)))
    name = "{http://www.w3.org/2000/svg}"
    dots = svg.findall(f"{name}circle")
    assert len(dots) == 99
    assert sum(d.get("fill") == figures.AFTER for d in dots) == 30
    words = [t.text or "" for t in svg.findall(f"{name}text")]
    assert "✕" in words
    assert "LIVE v2" in words
    width, height = (float(v) for v in svg.get("viewBox", "").split()[2:])
    for d in dots:
        assert 0 <= float(d.get("cx", "-1")) <= width
        assert 0 <= float(d.get("cy", "-1")) <= height
    zoomed = ElementTree.fromstring(figures.timeline(run["requests"], run["events"], phases, (6.95, 7.25)))
    assert len(zoomed.findall(f"{name}circle")) == 3


def test_class_bars_leave_out_what_is_not_known() -> None:
    nan = math.nan
    svg = figures.per_class(("a", "b"), ((1, 2, 3), (4, 5, 6)), (0.2, nan), (0.4, 0.5), (0.5, nan))
    circles = ElementTree.fromstring(svg).findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2
    assert "nan" not in svg
    assert "+20.0" in svg


def test_other_figures_are_well_formed() -> None:
    run = a_run()
    curve = run["scores"]["before"]["curve"]
    for svg in (
        figures.reliability({"before": curve, "after": curve}),
        figures.confidence_over_time(run["requests"], 7.0),
        figures.confidence_over_time([], None),
        figures.timeline([], [], [], (0.0, 1.0)),
    ):
        ElementTree.fromstring(svg)


def test_what_changed_is_painted_by_its_kind() -> None:
    frame = np.full((1, 4, 3), 100, np.uint8)
    truth = np.array([[1, 1, 1, 1]], np.uint8)
    before = np.array([[0, 1, 0, 1]], np.uint8)
    after = np.array([[1, 0, 0, 1]], np.uint8)
    right, wrong, still, same = figures.changed(frame, truth, before, after)[0].astype(int)
    assert right[1] > right[0] + 50
    assert wrong[0] > wrong[1] + 50
    assert still[0] > still[2] > wrong[2]
    assert len(set(same.tolist())) == 1


def test_a_long_drive_is_thinned_out_but_no_refusal_is_hidden() -> None:
    requests = [
        {"t": i / 10, "ms": 10.0, "version": 1, "outcome": "answered", "confidence": 0.5} for i in range(9000)
    ]
    requests[4001] |= {"outcome": "failed"}
    svg = ElementTree.fromstring(figures.timeline(requests, [], [], (0.0, 900.0)))
    name = "{http://www.w3.org/2000/svg}"
    assert len(svg.findall(f"{name}circle")) == 2250
    words = [t.text or "" for t in svg.findall(f"{name}text")]
    assert "✕" in words
    assert "one dot in 4 drawn" in words


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_tables_are_shown(seeds: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [a_run(s) for s in range(seeds)]
    show(json.loads(json.dumps(report.summary(runs, FACTS))), tmp_path)
    shown = capsys.readouterr().out
    assert all(name in shown for name in STREET.classes)
    assert f"mean of {seeds}" in shown
    assert str(tmp_path) in shown.replace("\n", "")


def test_what_the_drift_monitor_said_is_on_the_page_and_in_the_summary() -> None:
    said = {
        "day": {"state": "in-domain", "reason": "", "frames": 64},
        "before": {"state": "drifting", "reason": "shares 0.28 <from> the reference", "frames": 60},
        "after": {"state": "in-domain", "reason": "", "frames": 90},
    }
    run = a_run() | {"drift": said}
    summary = report.summary([run], FACTS)
    assert summary["seeds"][0]["drift"] == said
    html = report.render(summary, [run])
    assert "What the drift monitor said" in html
    assert "shares 0.28 &lt;from&gt; the reference" in html
    assert html.count(">in-domain<") == 2
    refused = run | {"swapped": False, "swap_seconds": None, "versions_seen": [1], "events": []}
    assert report.render(report.summary([refused], FACTS), [refused]).count(">in-domain<") == 1
    assert "What the drift monitor said" not in report.render(report.summary([a_run()], FACTS), [a_run()])
