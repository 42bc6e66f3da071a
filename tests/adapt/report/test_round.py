"""The report of a round: everything that decided is in it, nothing hostile gets out of it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from adapt.report import figures
from adapt.report.__main__ import main
from adapt.report.page import side
from adapt.report.round import ReportError, render, write
from adapt.round import RoundConfig, adapt
from adapt.round.pictures import MOST, keep_pictures
from common.files import write_json

QUICK = RoundConfig(portions=(0.3, 0.5), steps=6, source=3, target=3, rate=1e-3)
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """What a browser would make of it: tags, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def harmless(self) -> bool:
        """No script, no event handler, nothing fetched from anywhere."""
        for tag, attrs in self.tags:
            if tag in ("script", "iframe", "object", "embed", "link", "form", "base"):
                return False
            for name, value in attrs.items():
                fetched = name in ("src", "href") and not (value or "").startswith("data:")
                if name.startswith("on") or fetched:
                    return False
        return True


@pytest.fixture(scope="module")
def finished(toy_pack, dark_frames, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("round")
    adapt(toy_pack, dark_frames, config=QUICK, out=out)
    return out


@pytest.mark.parametrize(
    ("value", "limit", "passed", "expected"),
    [
        (0.9, 0.6, True, "≥ "),
        (0.5, 0.6, False, "≥ "),
        (0.01, 0.03, True, "≤ "),
        (0.05, 0.03, False, "≤ "),
        (1.0, 1.0, True, ""),
    ],
)
def test_a_limit_says_whether_it_is_a_most_or_a_least(value, limit, passed, expected):
    check = {"name": "a", "value": value, "limit": limit, "passed": passed}
    assert side(check) == expected
    assert side({**check, "name": "frames-a"}) == "≤ "


def test_no_column_stands_without_a_number():
    names, colours, nan = ["road"], [[1, 2, 3]], float("nan")
    assert ">bound<" not in figures.per_class(names, colours, [0.5], [0.6], [nan])
    assert ">bound<" in figures.per_class(names, colours, [0.5], [0.6], [0.7])


def test_a_round_leaves_pictures_and_the_report_shows_them(finished, toy_pack):
    page = Page(render(finished))
    pictures = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(list((finished / "pictures").glob("*.png"))) >= 3 * 2
    assert len(pictures) >= 3 * 2
    assert all(str(src).startswith("data:image/png;base64,") for src in pictures)
    report = json.loads((finished / "report.json").read_text())
    for check in report["gate"]["checks"]:
        assert check["name"] in page.text
    for name in toy_pack.spec.classes:
        assert name in page.text
    assert toy_pack.sha256 in page.text
    assert page.harmless()


def test_what_became_of_it_is_told(finished):
    events = [
        {"time": 100.0 + i, "state": s, "check": "", "reason": ""}
        for i, s in enumerate(("SUBMITTED", "VERIFIED", "LIVE"))
    ]
    write_json(
        finished / "loop.json",
        {"model": "road", "round": 3, "state": "LIVE", "version": 7, "reason": "", "events": events},
    )
    text = Page(render(finished)).text
    assert "The refreshed network is live" in text
    assert "2.00 s" in text
    assert "road 7" in text
    (finished / "loop.json").unlink()


def test_hostile_names_stay_text(finished, tmp_path):
    for file in ("report.json",):
        told = json.loads((finished / file).read_text())
    told["classes"] = [EVIL for _ in told["classes"]]
    told["parent"] = told["round"] = told["torch"] = told["chosen"] = EVIL
    told["gate"]["checks"][0].update(name=EVIL, reason=EVIL, passed=False)
    told["config"][EVIL] = EVIL
    write_json(tmp_path / "report.json", told)
    write_json(
        tmp_path / "loop.json",
        {
            "model": EVIL,
            "round": EVIL,
            "state": EVIL,
            "version": EVIL,
            "finished": EVIL,
            "reason": EVIL,
            "spent": {EVIL: EVIL},
            "events": [{"time": 1.0, "state": EVIL, "check": EVIL, "reason": EVIL}],
        },
    )
    page = Page(render(tmp_path))
    assert page.harmless()
    assert page.text.count("alert(1)") > 10


def test_a_declined_round_has_a_report_too(toy_pack, dark_frames, tmp_path):
    adapt(toy_pack, [dark_frames[0]] * 12, config=QUICK, out=tmp_path)
    text = Page(render(tmp_path)).text
    assert "declined" in text
    assert "camera stuck" in text


def test_damaged_pictures_and_records(finished, tmp_path):
    with pytest.raises(ReportError, match="no finished round"):
        render(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ReportError, match="cannot be read"):
        render(tmp_path)
    (tmp_path / "report.json").write_bytes((finished / "report.json").read_bytes())
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0-frame.png").write_bytes(b"\x89PNG nothing")
    assert "<img" not in render(tmp_path)


def test_the_command(finished, tmp_path, capsys):
    assert main([str(finished), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert write(finished) == finished / "report.html"
    assert main([str(tmp_path / "nothing")]) == 1
    assert re.match(r"adapt\.report: .*no finished round", capsys.readouterr().err)


@pytest.mark.parametrize("told", [{"classes": 3}, {"gate": []}, {"gate": {"checks": [{}]}}, {"stages": [1]}])
def test_records_of_another_form_end_in_one_line(tmp_path, told):
    write_json(tmp_path / "report.json", told)
    with pytest.raises(ReportError, match="are not of a round"):
        write(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_no_more_pictures_than_promised(tmp_path):
    frames = [np.full((8, 8, 3), i, np.uint8) for i in range(30)]
    labels = [np.zeros((8, 8), np.uint8)] * 30
    keep_pictures(tmp_path / "p", frames, {"before": labels, "after": labels[:1]}, (frames, labels))
    kept = {p.name for p in (tmp_path / "p").iterdir()}
    assert {n for n in kept if n.endswith("frame.png")} == {f"{i}-frame.png" for i in range(MOST)}
    assert [n for n in sorted(kept) if n.endswith("after.png")] == ["0-after.png"]


def test_curves_leave_gaps_and_escape_names():
    svg = figures.curves(
        {EVIL: [0.1, float("nan"), 0.5]}, step=24, bands=[(EVIL, 0, 72)], y_words="mIoU", marks=[(30, EVIL)]
    )
    root = ElementTree.fromstring(svg)
    line = next(e for e in root.iter() if e.tag.endswith("polyline"))
    assert len(line.attrib["points"].split()) == 2
    assert not [e for e in root.iter() if e.tag.endswith("script")]


def test_bars_grow_with_the_share():
    svg = figures.shares(["road", "sky"], [(1, 2, 3), (4, 5, 6)], ["parent"], [[0.64, 0.16]])
    widths = [float(e.attrib["width"]) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("rect")]
    assert widths[0] == pytest.approx(2 * widths[1], rel=0.01)  # square roots of 4 : 1


def test_the_edges_that_follow_are_told_with_their_gate(finished, tmp_path):
    import shutil

    folder = tmp_path / "round"
    shutil.copytree(finished, folder)
    assert "The edges" not in Page(render(folder)).text
    (folder / "edges").mkdir()
    check = {"name": f"edges-source{EVIL}", "value": 0.13, "limit": 0.02, "passed": False, "reason": EVIL}
    report = {
        "accepted": False,
        "gate": {"passed": False, "checks": [check]},
        "parent_measures": {"source": 0.65, "source_tight": 0.512},
        "candidate_measures": {"source": 0.52},
    }
    write_json(folder / "edges" / "report.json", report)
    page = Page(render(folder))
    assert page.harmless()
    for words in ("The edges: refused", "edges-source", "65.0", "51.2", "52.0"):
        assert words in page.text
    write_json(folder / "loop.json", {"state": "LIVE", "edges": f"declined: 3 frames {EVIL}"})
    page = Page(render(folder))
    assert page.harmless()
    assert "The edges: declined: 3 frames" in page.text
    assert "65.0" not in page.text, "what lies there is of another attempt"
