"""A row of a published table in miniature: the same path, and an evaluation frame refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adapt.reproduce import TABLES, main, row_config
from adapt.round import RoundError
from networks.labels import CITYSCAPES19
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
        "gta5-cityscapes",
        "--row",
        row,
        "--pack",
        str(pack.path),
        "--target",
        f"folder:{sets / 'target'}",
        "--val",
        f"folder:{sets / 'val'}",
        "--out",
        str(sets / row),
        "--set",
        "steps=3",
        "--json",
        "--quiet",
        *more,
    ]


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
    assert (
        main(
            [
                "gta5-cityscapes",
                "--row",
                "source",
                "--pack",
                str(toy_pack.path),
                "--out",
                str(sets / "x"),
                "--root",
                str(sets / "none"),
                "--quiet",
            ]
        )
        == 1
    )
    assert "expected leftImg8bit" in capsys.readouterr().err
    for wrong, words in (
        ("nothing=1", "no such setting"),
        ("steps=many", "a value like"),
        ("portions=0.2", "a value like"),
        ("policy=7", "a value like"),
        ("portions=[2]", "more than 0"),
        ("steps", "no such setting"),
    ):
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


# ------------------------------------------------------------------------------------- is it the row's data?
TABLE = TABLES["gta5-cityscapes"]
VAL = [
    f"{city}_{i:06d}_leftImg8bit"
    for city, n in (("frankfurt", 267), ("lindau", 59), ("munster", 174))
    for i in range(n)
]
TRAIN = [f"aachen_{i:06d}_leftImg8bit" for i in range(2975)]
SETS = ("cityscapes:data/cityscapes:val", "cityscapes:data/cityscapes:train")


def differences(**changes) -> list[str]:
    told = {
        "row": "cbst",
        "network": "resnet38",
        "classes": CITYSCAPES19.classes,
        "described": SETS,
        "val": VAL,
        "size": (1024, 2048),
        "target": TRAIN,
        "used": 505,
        "changed": [],
        **changes,
    }
    return TABLE.differences(**told)


def test_the_published_data_has_no_difference():
    assert differences() == []
    assert differences(row="source", network="fcn8s", target=None, used=0, described=(SETS[0], None)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network": "roadnet"}, "the network is roadnet, the row has fcn8s-vgg16, resnet38"),
        ({"network": "fcn8s", "row": "cbst-sp-mst"}, "the row has resnet38"),
        ({"classes": ("a", "b")}, "the pack has 2 classes, the row those of cityscapes19"),
        ({"described": ("folder:x", SETS[1])}, "the scored set is folder:x"),
        ({"described": (SETS[0], "gta5:x")}, "the target set is gta5:x"),
        ({"val": VAL[:-1]}, "499 frames are scored, the row has 500"),
        ({"val": [*VAL[:-1], "aachen_9_x"]}, "1 scored frames are not of frankfurt, lindau, munster"),
        ({"size": (512, 1024)}, "labels are 512x1024, the row's 1024x2048"),
        ({"target": TRAIN[:9]}, "the target set has 9 frames, the row's 2975"),
        ({"target": [*TRAIN[:-1], VAL[0]]}, "1 target frames are of scored cities"),
        ({"used": 100}, "100 target frames are used, the row has 505"),
        ({"changed": ["steps=3"]}, "settings were changed: steps=3"),
    ],
)
def test_every_difference_is_named(change, words):
    found = differences(**change)
    assert len(found) == 1
    assert words in found[0]


def test_a_row_on_other_data_is_marked(toy_pack, sets, capsys):
    assert main(arguments(toy_pack, sets, "source")) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["comparable"] is False
    assert "this is not the published row: the network is roadnet" in err
    assert "6 frames are scored, the row has 500" in err
    assert json.loads((sets / "source" / "row.json").read_text())["differs"] == json.loads(out)["differs"]
    assert main([a for a in arguments(toy_pack, sets, "source") if a != "--json"]) == 0
    assert "not comparable with the published" in capsys.readouterr().out
