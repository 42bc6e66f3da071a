"""Scoring a pack from the command line: protocols, the picture, and sets that are not what they claim."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import networks
from adapt.evaluate.__main__ import main
from adapt.evaluate.plot import svg
from adapt.evaluate.protocols import PROTOCOLS
from networks.labels import CITYSCAPES19
from networks.pack import write_pack
from tests.adapt.conftest import toy_scene, toy_spec

NAMES = CITYSCAPES19.classes
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pack19(tmp_path_factory):
    """A network of 19 classes that answers one class everywhere: road (0), by its bias."""
    torch.manual_seed(0)
    network = networks.create("roadnet", classes=19, width=8)
    spec = replace(toy_spec(), classes=NAMES, colours=CITYSCAPES19.colours)
    state = {k: torch.zeros_like(v) if v.is_floating_point() else v for k, v in network.state_dict().items()}
    head = [k for k, v in state.items() if k.endswith("bias") and v.shape == (19,)]
    state[head[-1]][0] = 5.0
    for k, v in state.items():
        if k.endswith("running_var"):
            v.fill_(1.0)
    return write_pack(tmp_path_factory.mktemp("p") / "nineteen", spec, state)


def one_frame(root, label: np.ndarray) -> str:
    for part in ("frames", "labels"):
        (root / part).mkdir(parents=True)
    Image.fromarray(toy_scene(0)[0]).save(root / "frames" / "a.png")
    Image.fromarray(label).save(root / "labels" / "a.png")
    return f"folder:{root}"


def scores(pack, data: str, capsys, *more: str) -> dict:
    assert main([str(pack.path), "--data", data, "--quiet", "--threads", "1", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)["scores"][0]


def test_boundary_iou_is_scored_on_request(pack19, tmp_path, capsys):
    label = np.zeros((32, 64), np.uint8)
    label[:, 32:] = 9
    data = one_frame(tmp_path / "set", label)
    found = scores(pack19, data, capsys, "--boundary", "0.02")
    # Road everywhere: its band is the frame's border, a pixel wide; the truth's also runs along column 31.
    whole, half = 2 * 64 + 2 * 30, 2 * 32 + 2 * 30
    both = 2 * 32 + 30
    assert found["boundary_ratio"] == 0.02
    assert found["boundary_iou"]["road"] == pytest.approx(both / (whole + half - both))
    assert found["boundary_iou"]["terrain"] == 0
    assert found["boundary_iou"]["sky"] is None
    assert found["boundary_miou"] == pytest.approx(found["boundary_iou"]["road"] / 2)
    assert "boundary_iou" not in scores(pack19, data, capsys)
    assert main([str(pack19.path), "--data", data, "--quiet", "--boundary", "0"]) == 1
    assert "boundary IoU" in capsys.readouterr().err


def test_protocols_score_and_average_the_published_classes(pack19, tmp_path, capsys):
    # Quarters of the frame: road, terrain (not of the 16), wall (of the 16, not of the 13), person.
    label = np.zeros((32, 64), np.uint8)
    label[:16, 32:], label[16:, :32], label[16:, 32:] = 9, 3, 11
    data = one_frame(tmp_path / "set", label)
    # The answer is road everywhere: by hand, IoU of road is 1/(scored quarters), of all else 0.
    for name, quarters, classes in (("19", 4, 4), ("16", 3, 3), ("13", 3, 2)):
        found = scores(pack19, data, capsys, "--protocol", name)
        assert found["iou"]["road"] == pytest.approx(1 / quarters)
        assert found["miou"] == pytest.approx(1 / quarters / classes)
        assert set(found["iou"]) == set(PROTOCOLS[name].scored)
    eleven = scores(pack19, data, capsys, "--protocol", "11")
    assert set(eleven["iou"]) == set(PROTOCOLS["11"].scored)
    assert eleven["iou"]["road"] == pytest.approx(1 / 4)  # terrain is tree, wall is building: both scored
    assert eleven["miou"] == pytest.approx(1 / 4 / 4)


def test_the_published_numbers_of_classes():
    assert [(len(PROTOCOLS[n].scored), len(PROTOCOLS[n].averaged)) for n in ("19", "16", "13", "11")] == [
        (19, 19),
        (16, 16),
        (16, 13),
        (11, 11),
    ]
    assert {*NAMES} - {*PROTOCOLS["16"].scored} == {"terrain", "truck", "train"}
    assert {*PROTOCOLS["16"].averaged} - {*PROTOCOLS["13"].averaged} == {"wall", "fence", "pole"}


def test_a_label_outside_the_space_names_its_frame(pack19, toy_pack, tmp_path, capsys):
    data = one_frame(tmp_path / "set", np.full((32, 64), 30, np.uint8))
    for pack, more in ((pack19, ()), (toy_pack, ()), (pack19, ("--truth", "camvid11"))):
        assert main([str(pack.path), "--data", data, "--quiet", *more]) == 1
        said = capsys.readouterr().err
        assert "label of a holds class 30" in said
        assert said.count("\n") == 1


def test_a_pack_of_unknown_classes_cannot_be_mapped(toy_pack, tmp_path, capsys):
    data = one_frame(tmp_path / "set", np.zeros((32, 64), np.uint8))
    for more in (("--protocol", "19"), ("--truth", "camvid11")):
        assert main([str(toy_pack.path), "--data", data, "--quiet", *more]) == 1
        assert "no known label space" in capsys.readouterr().err


def test_frames_without_label_are_said_and_not_counted(toy_pack, tmp_path, capsys):
    data = one_frame(tmp_path / "set", np.zeros((32, 64), np.uint8))
    Image.fromarray(toy_scene(1)[0]).save(tmp_path / "set" / "frames" / "b.png")
    assert main([str(toy_pack.path), "--data", data, "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["scores"][0]["frames"] == 1
    assert "1 of 2 frames have no label" in err


def test_half_a_folder_and_a_label_of_another_size_are_refused(toy_pack, tmp_path, capsys):
    data = one_frame(tmp_path / "a", np.zeros((16, 64), np.uint8))
    assert main([str(toy_pack.path), "--data", data, "--quiet"]) == 1
    assert "resize one of them" in capsys.readouterr().err
    data = one_frame(tmp_path / "b", np.zeros((32, 64), np.uint8))
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(tmp_path / "b" / "labels" / "lost.png")
    assert main([str(toy_pack.path), "--data", data, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "lost.png" in said
    assert "half unpacked" in said


def test_the_picture_is_svg_with_a_bar_as_long_as_the_iou(toy_pack, tmp_path, capsys):
    data = one_frame(tmp_path / "set", toy_scene(0)[1])
    file = tmp_path / "t.svg"
    arguments = [str(toy_pack.path), str(toy_pack.path), "--data", data, "--quiet", "--plot", str(file)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["scores"][0]
    root = ET.fromstring(file.read_text())
    bars = {}
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            bars.setdefault(title.text.partition(":")[0], []).append(float(rect.get("width")))
    assert len(bars["mean IoU"]) == 2
    assert bars["mean IoU"][0] == pytest.approx(420 * found["miou"], abs=0.06)
    for name, value in found["iou"].items():
        assert bars[name][0] == pytest.approx(420 * value, abs=0.06)


def test_a_picture_says_what_is_not_known_and_escapes_names():
    score = {"iou": {"a<b": 0.5, "gone": None}, "miou": 0.5, "ece": float("nan"), "calibration": []}
    text = svg([("one & two", score)], "x < y")
    root = ET.fromstring(text)
    words = [t.text for t in root.iter(f"{SVG}text")]
    assert "a<b" in words
    assert "gone" not in words
    assert any("one & two" in w and "–" in w for w in words)
    with pytest.raises(ValueError, match="nothing to draw"):
        svg([])


def test_what_cannot_be_written_is_said_before_the_work(toy_pack, tmp_path, capsys, monkeypatch):
    import adapt.evaluate.__main__ as command

    monkeypatch.setattr(command, "evaluate", lambda *_: SimpleNamespace())  # would fail if it were reached
    file = tmp_path / "none" / "t.svg"
    assert main([str(toy_pack.path), "--data", "street:day:1", "--quiet", "--plot", str(file)]) == 1
    assert "cannot be used" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([str(toy_pack.path), "--data", "street:day:1", "--plot", str(tmp_path / "t.jpg")])
    assert end.value.code == 2
