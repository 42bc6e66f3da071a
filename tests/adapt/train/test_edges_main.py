"""The edge training command: packs from class maps and from edge labels, warm starts, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adapt.data.street.scenes import render
from adapt.labels import edge_codec
from adapt.labels.edges import category_edges
from adapt.train import __main__ as train_main
from adapt.train import edges_main
from networks.pack.pack import load_pack

SIZE = (64, 96)


@pytest.fixture
def edge_files(tmp_path):
    for name in ("labels", "images"):
        (tmp_path / name).mkdir()
    for i in range(2):
        frame, label = render(i, "day", SIZE)
        Image.fromarray(frame).save(tmp_path / "images" / f"f{i}.png")
        edge_codec.write(tmp_path / "labels" / f"f{i}.npz", edge_codec.pack(category_edges(label, 4)), 4)
    return tmp_path


def test_a_pack_comes_out_of_edge_files_and_another_starts_from_it(edge_files, capsys):
    files = ["--labels", str(edge_files / "labels"), "--images", str(edge_files / "images"), "--classes", "4"]
    small = [
        "--network",
        "casenet",
        "--set",
        "depth=14",
        "--set",
        "width=8",
        "--crop",
        "32x40",
        "--quiet",
        "--json",
    ]
    first = [*files, *small, "--steps", "3", "--batch", "2", "--preset", "casenet-s-sbd"]
    assert train_main.main(["edges", *first, "--out", str(edge_files / "a")]) == 0
    summary = json.loads(capsys.readouterr().out)
    pack = load_pack(edge_files / "a")
    assert pack.spec.task == "edges"
    assert pack.spec.channel_order == "bgr"
    assert pack.sha256 == summary["sha256"]
    assert np.isfinite(summary["loss_last"])
    second = [
        *files,
        *small,
        "--steps",
        "3",
        "--batch",
        "1",
        "--round",
        "2",
        "--seal",
        "--init",
        str(edge_files / "a"),
    ]
    assert edges_main.main([*second, "--out", str(edge_files / "b")]) == 0
    assert json.loads(capsys.readouterr().out)["loaded"] == len(pack.state())
    assert edges_main.main([*second, "--out", str(edge_files / "b")]) == 1
    assert "not overwritten" in capsys.readouterr().err


def test_class_maps_train_a_joint_network(tmp_path, capsys):
    arguments = [
        *(
            "--network",
            "espnetv2_edges",
            "--set",
            "scale=0.5",
            "--classes",
            "street",
            "--data",
            "street:day:2:0",
        ),
        *(
            "--crop",
            "64x64",
            "--steps",
            "2",
            "--batch",
            "2",
            "--out",
            str(tmp_path / "p"),
            "--quiet",
            "--json",
        ),
    ]
    assert edges_main.main(arguments) == 0
    assert load_pack(json.loads(capsys.readouterr().out)["pack"]).spec.task == "segmentation"


def test_refusals_are_one_line(edge_files, capsys):
    files = ["--labels", str(edge_files / "labels"), "--images", str(edge_files / "images")]
    base = ["--out", str(edge_files / "x"), "--quiet", "--steps", "1", "--batch", "1", "--crop", "32x32"]
    cases = [
        ([*files, "--classes", "5"], "5 were asked for"),
        ([*files, "--classes", "mars"], "mars"),
        ([*files, "--classes", "4", "--crop", "30x32"], "multiples of 16"),
        ([*files, "--classes", "4", "--preset", "casenet-c-sbd"], "give --data"),
        ([*files, "--classes", "4", "--network", "nope"], "unknown"),
    ]
    for arguments, word in cases:
        assert edges_main.main([*base, *arguments]) == 1
        error = capsys.readouterr().err
        assert word in error
        assert error.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        edges_main.main([*base, "--classes", "4"])
    assert caught.value.code == 2
