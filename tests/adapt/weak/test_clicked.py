"""Marks as judges, and marks that a map, a detector or a LiDAR makes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from adapt.evaluate.__main__ import main
from adapt.evaluate.clicks import Clicks, clicked_right, wilson
from adapt.gate.clicked import ALPHA, check_clicked
from adapt.weak import Box, Marks, Point, WeakError
from adapt.weak.producers import Geofence, from_boxes, from_lidar

CLASSES = ("sky", "road", "car")


def clicks(right: list[bool]) -> Clicks:
    return Clicks(np.array(right, bool), np.zeros(len(right), np.int64))


def test_what_is_right() -> None:
    answer = np.array([[0, 1], [2, 1]], np.uint8)
    marks = Marks(
        CLASSES,
        (2, 2),
        points=(Point(0, 0, "sky"), Point(1, 0, "car"), Point(0, 1, "!road"), Point(1, 1, "road|car")),
    )
    found = clicked_right([answer, answer], [marks, None])
    assert found.right.tolist() == [True, False, True, True]
    assert found.truth.tolist() == [0, 2, -1, -1]
    ignored = Marks(CLASSES, (2, 2), points=(Point(0, 0, "?"),))
    assert np.isnan(clicked_right([answer], [ignored]).share)
    assert check_clicked(clicks([]), clicks([])).passed


def test_a_collapse_is_refused_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    parent = clicks((rng.random(50) < 0.8).tolist())
    swapped = clicks((parent.right & (rng.random(50) < 0.6)).tolist())
    refused = check_clicked(parent, swapped)
    assert not refused.passed
    assert "of 50 clicked pixels right" in refused.reason
    assert refused.value > refused.limit
    assert check_clicked(parent, parent).passed
    one_lost = parent.right.copy()
    one_lost[np.flatnonzero(one_lost)[0]] = False
    assert check_clicked(parent, clicks(one_lost.tolist())).passed
    with pytest.raises(ValueError, match="other clicks"):
        check_clicked(parent, clicks([True]))


def test_the_limit_is_the_binomial_one() -> None:
    from math import comb

    for n in range(40):
        for lost in range(n + 1):
            parent = clicks([True] * lost + [False] * (n - lost))
            other = clicks([False] * lost + [True] * (n - lost))
            chance = sum(comb(n, k) for k in range(lost, n + 1)) / 2**n
            assert check_clicked(parent, other).passed == (chance >= ALPHA), (n, lost)


def test_wilson_is_wilsons_formula() -> None:
    from statistics import NormalDist

    z = NormalDist().inv_cdf(0.975)
    for right, n in ((0, 5), (3, 7), (50, 50), (604, 800)):
        p = right / n
        middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        assert wilson(right, n) == pytest.approx([(middle + s * half) / (1 + z * z / n) for s in (-1, 1)])
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="right is 0"):
        wilson(3, 2)


def test_evaluate_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from adapt.data.open import open_dataset
    from networks.pack import load_pack

    root = Path(__file__).parents[3]
    pack = load_pack(root / "packs" / "street-day")
    classes = pack.spec.classes
    data = open_dataset("street:day:1:5")
    frame, label = data[0]
    assert label is not None
    (tmp_path / "road").mkdir()
    Image.fromarray(frame).save(tmp_path / "road" / "a.png")
    height, width = label.shape
    points = [
        [x, y, classes[label[y, x]]]
        for y in range(4, height, 12)
        for x in range(4, width, 12)
        if label[y, x] != 255
    ]
    entry = {"width": width, "height": height, "points": points}
    content = {"schema": 1, "classes": list(classes), "frames": {"a": entry}}
    (tmp_path / "weak.json").write_text(json.dumps(content))
    words = [str(root / "packs" / "street-day"), "--data", f"folder:{tmp_path}/road", "--quiet"]
    assert main([*words, "--marks", str(tmp_path / "weak.json"), "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert score["clicks"] == len(points)
    assert score["interval"][0] < score["accuracy"] < score["interval"][1]
    assert sum(s["right"] for s in score["classes"].values()) == score["right"]
    assert score["accuracy"] > 0.5
    assert main([*words, "--marks", str(tmp_path / "weak.json")]) == 0
    assert "95 % interval" in capsys.readouterr().out
    content["frames"] = {f"sha256:{hashlib.sha256(frame.tobytes()).hexdigest()}": entry}
    (tmp_path / "weak.json").write_text(json.dumps(content))
    assert main([*words, "--marks", str(tmp_path / "weak.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == [score]
    content["frames"] = {"b": entry}
    (tmp_path / "weak.json").write_text(json.dumps(content))
    assert main([*words, "--marks", str(tmp_path / "weak.json")]) == 1
    assert "frame b of the marks is none of the frames" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main([*words, "--marks", "x", "--protocol", "19"])
    assert usage.value.code == 2


# ----------------------------------------------------------------------------------------- producers
def fence(*regions: dict[str, object]) -> dict[str, object]:
    return {"schema": 1, "regions": list(regions)}


SQUARE = [[50, 8], [51, 8], [51, 9], [50, 9]]


def test_geofence(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(
        json.dumps(fence({"name": "motorway", "polygon": SQUARE, "absent": ["car"], "present": ["sky"]}))
    )
    found = Geofence.read(path, CLASSES)
    labels = found.label(
        {"id:1": ((50.5, 8.5), (20, 10)), "id:2": ((52, 8.5), (20, 10)), "id:3": (None, (20, 10))}
    )
    assert labels.frames.keys() == {"id:1"}
    marks = labels.frames["id:1"]
    assert (marks.absent, marks.source) == (("car",), "map")
    assert marks.trusted().present == ()
    assert marks.trusted().absent == ("car",)
    for content, words in (
        (fence({"name": "m", "polygon": SQUARE[:2]}), "region m: its polygon has not 3"),
        (fence({"name": "m", "polygon": [[91, 0], [0, 0], [1, 1]]}), "no place on earth"),
        (fence({"name": "m", "polygon": [[0, -179], [0, 179], [1, 1]]}), "180th meridian"),
        (fence({"name": "m", "polygon": SQUARE, "absent": ["lorry"]}), "'lorry' is not one of"),
        (fence({"name": "m", "polygon": SQUARE, "absent": list(CLASSES)}), "every class is absent"),
        (
            fence({"name": "m", "polygon": SQUARE, "absent": ["car"], "present": ["car"]}),
            "both present and absent",
        ),
        (fence({"where": 1}), "no object of name"),
        ([], "no map"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(WeakError, match=words):
            Geofence.read(path, CLASSES)
    path.write_text(
        json.dumps(
            fence(
                {"name": "m", "polygon": SQUARE, "absent": ["car"]},
                {"name": "n", "polygon": SQUARE, "present": ["car"]},
            )
        )
    )
    with pytest.raises(WeakError, match="present by region n and absent by region m"):
        Geofence.read(path, CLASSES).marks((50.5, 8.5), (4, 4), frame="x")


def test_detector_boxes() -> None:
    marks = from_boxes(
        np.array([[-3, 1, 5, 4], [30, 1, 40, 4], [1, 1, 2, 2]]),
        np.array([0.9, 0.9, 0.2]),
        ["car", "car", "dog"],
        CLASSES,
        (20, 10),
        detector="yolo",
    )
    assert marks.boxes == (Box(0, 1, 5, 4, "car", score=0.9),)
    assert marks.source == "detector:yolo"
    assert marks.trusted(0.95).boxes == ()
    with pytest.raises(WeakError, match="one per box"):
        from_boxes(np.zeros((1, 4)), np.zeros(2), ["car"], CLASSES, (20, 10), detector="x")
    with pytest.raises(WeakError, match="no number"):
        from_boxes(np.full((1, 4), np.nan), np.zeros(1), ["car"], CLASSES, (20, 10), detector="x")


def test_lidar_points_hide_what_is_behind_them() -> None:
    camera = np.array([[10, 0, 10, 0], [0, 10, 5, 0], [0, 0, 1, 0]], float)
    points = np.array([[0, 0, 9], [0, 0, 3], [0, 0, -1], [1, 0, 2], [9, 0, 1], [0.2, 0.2, 1]], float)
    labels = ["road", "car", "sky", "road|car", "car", "dog"]
    marks = from_lidar(points, labels, camera, CLASSES, (20, 10), score=0.8)
    assert marks.points == (Point(15, 5, "road|car"), Point(10, 5, "car"))
    assert marks.trusted(0.9).points == ()
    assert from_lidar(points, labels, camera, CLASSES, (20, 10), most=1).points == (Point(15, 5, "road|car"),)
    with pytest.raises(WeakError, match=r"\[N,3\]"):
        from_lidar(points[:, :2], labels, camera, CLASSES, (20, 10))
