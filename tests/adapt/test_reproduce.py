"""A row of a published table in miniature: the same path, and an evaluation frame refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adapt.reproduce import TABLES, main, row_config
from adapt.round import RoundError
from tests.adapt.conftest import toy_scene


@pytest.fixture
def sets(tmp_path):
    """Dark bands: 8 unlabelled to adapt on, 6 labelled to score."""
    for name, first, count in (("target", 200, 8), ("val", 700, 6)):
        for part in ("frames", "labels"):
            (tmp_path / name / part).mkdir(parents=True)
        for i in range(count):
            frame, label = toy_scene(first + i, dark=True)
            Image.fromarray(frame).save(tmp_path / name / "frames" / f"{i}.png")
            if name == "val":
                Image.fromarray(label).save(tmp_path / name / "labels" / f"{i}.png")
    return tmp_path


def arguments(pack, sets, row: str, *more: str) -> list[str]:
    return [
        "gta5-cityscapes", "--row", row, "--pack", str(pack.path), "--target", f"folder:{sets / 'target'}",
        "--val", f"folder:{sets / 'val'}", "--out", str(sets / row), "--set", "steps=3", "--json", "--quiet",
        *more,
    ]  # fmt: skip


def test_every_row_runs_through(toy_pack, sets, capsys):
    scores = {}
    for row in TABLES["gta5-cityscapes"].published:
        assert main(arguments(toy_pack, sets, row)) == 0
        scores[row] = json.loads(capsys.readouterr().out)
        assert json.loads((sets / row / "row.json").read_text()) == scores[row]
    assert scores["source"]["gate"] is None
    assert all(0 <= found["miou"] <= 1 for found in scores.values())
    assert scores["cbst"]["published"]["resnet38"] == 45.2


def test_an_evaluation_frame_among_the_target_frames_is_refused(toy_pack, sets, capsys):
    (sets / "val" / "frames" / "3.png").rename(sets / "target" / "frames" / "zz.png")
    Image.fromarray(np.asarray(Image.open(sets / "target" / "frames" / "zz.png"))).save(
        sets / "val" / "frames" / "3.png"
    )
    assert main(arguments(toy_pack, sets, "cbst")) == 1
    assert "also the evaluation frame" in capsys.readouterr().err


def test_rows_are_what_they_are_called():
    assert row_config("st").policy == "st"
    assert not row_config("cbst").prior
    assert row_config("cbst-sp").prior
    assert row_config("cbst-sp-mst").label_flip
    with pytest.raises(RoundError, match="choose"):
        row_config("best")


def test_a_missing_set_and_a_wrong_setting_end_with_one_line(toy_pack, sets, capsys):
    assert main(["gta5-cityscapes", "--row", "source", "--pack", str(toy_pack.path), "--out", str(sets / "x"),
                 "--root", str(sets / "none"), "--quiet"]) == 1  # fmt: skip
    assert "expected leftImg8bit" in capsys.readouterr().err
    for wrong, words in (
        ("nothing=1", "no such setting"), ("steps=many", "a value like"), ("portions=0.2", "a value like"),
        ("policy=7", "a value like"), ("portions=[2]", "more than 0"), ("steps", "no such setting"),
    ):  # fmt: skip
        assert main(arguments(toy_pack, sets, "cbst", "--set", wrong)) == 1
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    with pytest.raises(SystemExit) as end:
        main(arguments(toy_pack, sets, "cbst", "--limit", "-1"))
    assert end.value.code == 2


def test_target_labels_are_neither_read_nor_asked_for(toy_pack, sets, capsys):
    (sets / "target" / "labels" / "0.png").write_bytes(b"no label at all")
    assert main(arguments(toy_pack, sets, "cbst")) == 0
    for file in (sets / "val" / "labels").glob("*.png"):
        file.unlink()
    assert main(arguments(toy_pack, sets, "source")) == 1
    assert "holds no labelled frame" in capsys.readouterr().err
