"""``python -m adapt.weak`` from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from adapt.weak import Marks, Point, WeakLabels, read
from adapt.weak.__main__ import main

CLASSES = ("sky", "road", "car")


def write(path: Path, *points: Point, source: str = "human") -> str:
    marks = Marks(CLASSES, (8, 6), absent=("car",), points=points, source=source)
    WeakLabels(CLASSES, {"a": marks}).write(path)
    return str(path)


def test_convert_merges_and_writes_coco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.json", Point(1, 1, "sky"))
    two = write(tmp_path / "two.json", Point(1, 1, "road"), Point(2, 2, "road"), source="lidar")
    out = str(tmp_path / "out.json")
    assert main(["convert", one, two, out]) == 1
    assert "give --prefer human" in capsys.readouterr().err
    assert not Path(out).exists()
    assert main(["convert", one, two, out, "--prefer", "human"]) == 0
    assert {p.label for p in read(out, CLASSES).frames["a"].points} == {"sky", "road"}
    assert main(["convert", out, str(tmp_path / "coco.json"), "--to", "coco"]) == 0
    assert "1 tags left out" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "coco.json").read_text())["annotations"]) == 2
    assert main(["convert", one, out, "--classes", "sky,road,auto", "--map", "car=auto"]) == 0
    assert read(out, ("sky", "road", "auto")).frames["a"].absent == ("auto",)
    assert main(["convert", one, out, "--map", "car"]) == 1
    assert main(["convert", str(tmp_path / "no.xml"), out]) == 1
    assert "--pack, --classes or --space" in capsys.readouterr().err


def test_check_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.json", Point(1, 1, "sky"))
    (tmp_path / "frames").mkdir()
    picture = tmp_path / "frames" / "a.png"
    Image.fromarray(np.zeros((6, 8, 3), np.uint8)).save(picture)
    assert main(["check", one, "--frames", str(tmp_path / "frames")]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == {"points": 1, "tags": 1}
    assert main(["show", one, "--frames", str(tmp_path / "frames"), "--out", str(tmp_path / "drawn")]) == 0
    assert np.asarray(Image.open(tmp_path / "drawn" / "a.png")).any()
    assert main(["show", one, "--out", str(tmp_path / "drawn")]) == 1
    Image.fromarray(np.zeros((8, 6, 3), np.uint8)).save(picture)
    assert main(["check", one, "--frames", str(tmp_path / "frames")]) == 1
    assert "turned by its EXIF tag?" in capsys.readouterr().err
    picture.rename(tmp_path / "frames" / "b.png")
    assert main(["check", one, "--frames", str(tmp_path / "frames")]) == 1
    assert "frame a of the marks is none of the frames" in capsys.readouterr().err


def test_simulate_marks_of_rendered_streets(tmp_path: Path) -> None:
    pack = Path(__file__).parents[3] / "packs" / "street-day"
    out = tmp_path / "weak.json"
    words = [
        "simulate",
        "street:dusk:2:3",
        "--pack",
        str(pack),
        "--kinds",
        "tags,points,boxes",
        "--boxes-of",
        "car",
    ]
    assert main([*words, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert len(found["frames"]) == 2
    assert all(frame["source"] == "simulated" for frame in found["frames"].values())
    assert main(["simulate", "street:dusk:1:3", "--pack", str(pack), "--kinds", "x", "--out", str(out)]) == 1
