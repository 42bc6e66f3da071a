"""The edge training command: packs from class maps and from edge labels, warm starts, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import networks
from adapt.data.street.scenes import render
from adapt.labels import edge_codec
from adapt.labels.edges import category_edges
from adapt.train import __main__ as train_main
from adapt.train import edges_main
from networks.pack import load_pack

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
    first = [*files, *small, "--steps", "3", "--batch", "2", "--preset", "casenet-s-scratch"]
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


def published_resnet(tmp_path, how, classes=4):
    """A trained ResNet as its publishers name it: weights of ours, statistics that fit them."""
    torch.manual_seed(3)
    network = networks.create("casenet", classes=classes, depth=14, width=8).train()
    with torch.no_grad():
        for _ in range(60):
            network(torch.randn(2, 3, 32, 32) * (60 if how == "caffe" else 1))
    out = {}
    for name, value in network.state_dict().items():
        if name.startswith(network.NEW):
            continue
        if how == "torchvision":
            name = name.replace("bn_conv1", "bn1")
            for stage in range(2, 6):
                name = name.replace(f"res{stage}.", f"layer{stage - 1}.")
            out[name] = value
            continue
        if name.endswith("num_batches_tracked"):
            continue
        *path, kind = name.split(".")
        if path[0].startswith("res"):
            branch = {"conv1": "2a", "bn1": "2a", "conv2": "2b", "bn2": "2b", "conv3": "2c", "bn3": "2c"}
            downsample = path[2] == "downsample"
            end = "1" if downsample else branch[path[2]]
            norm = path[-1] == "1" if downsample else path[2].startswith("bn")
            layer = f"{path[0][3]}{'abc'[int(path[1])]}_branch{end}"
            layer = f"bn{layer}" if norm else f"res{layer}"
        else:
            layer = path[0]
        if how == "caffe-blobs":
            if layer.startswith("bn"):
                stem = layer.replace("bn", "scale", 1) if kind in ("weight", "bias") else layer
                number = {"running_mean": 0, "running_var": 1, "weight": 0, "bias": 1}[kind]
                # Caffe stores sums, and a factor to divide by.
                out[f"{stem}_{number}"] = value * (2.0 if "running" in kind else 1.0)
                out[f"{layer}_2"] = torch.full((1,), 2.0)
            else:
                out[f"{layer}_0"] = value
        else:
            out[f"{layer}.{kind}"] = value
    out["fc.weight"] = torch.ones(10, 256)
    file = tmp_path / f"{how}.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in out.items()}}, file)
    return file, network.state_dict()


TINY = ["--network", "casenet", "--set", "depth=14", "--set", "width=8", "--crop", "32x40"]
TINY += ["--quiet", "--json"]


@pytest.mark.parametrize(("how", "order"), [("torchvision", "rgb"), ("caffe", "bgr"), ("caffe-blobs", "bgr")])
def test_a_published_recipe_starts_from_a_resnet_under_either_name(edge_files, capsys, how, order):
    """The recipe's statistics stay the ResNet's, bit for bit, and the loss is a number from step 0 on."""
    file, trained = published_resnet(edge_files, how)
    files = ["--labels", str(edge_files / "labels"), "--images", str(edge_files / "images"), "--classes", "4"]
    more = ["--steps", "2", "--batch", "1", "--round", "1", "--preset", "casenet-s-cityscapes"]
    assert edges_main.main([*files, *TINY, *more, "--init", str(file), "--out", str(edge_files / "a")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert np.isfinite([summary["loss_first"], summary["loss_last"]]).all()
    pack = load_pack(edge_files / "a")
    assert pack.spec.channel_order == order
    state = pack.state()
    running = [n for n in state if "running" in n]
    assert len(running) > 30
    for name in running:
        torch.testing.assert_close(state[name], trained[name], rtol=1e-6, atol=0)


def test_frozen_statistics_without_a_trained_network_are_refused_in_one_line(edge_files, capsys):
    files = ["--labels", str(edge_files / "labels"), "--images", str(edge_files / "images"), "--classes", "4"]
    steps = ["--steps", "1", "--batch", "1", "--out", str(edge_files / "x")]
    other = published_resnet(edge_files, "torchvision")[0]
    untrained = edge_files / "untrained.pth"
    torch.save(networks.create("casenet", classes=4, depth=14, width=8).state_dict(), untrained)
    odd = edge_files / "odd.pth"
    torch.save({"a.weight": torch.ones(2)}, odd)
    for preset in ("casenet-cityscapes", "casenet-s-sbd", "seal-sbd", "seal-cityscapes"):
        for more, word in (
            ([], "--init"),
            (["--init", str(untrained)], "no batch statistics"),
            (["--init", str(odd)], "neither torchvision's"),
            (["--init", str(edge_files / "none.pth")], "does not exist"),
            (["--init", str(other), "--set", "width=16"], "shape"),
            (["--init", str(other), "--set", "depth=50"], "another depth"),
        ):
            assert edges_main.main([*files, *TINY, *steps, "--preset", preset, *more]) == 1
            error = capsys.readouterr().err
            assert word in error
            assert error.count("\n") == 1
    assert not (edge_files / "x").exists()
    deeper = dict(torch.load(other, weights_only=True)["state_dict"])
    deeper["module.layer3.1.conv1.weight"] = torch.ones(64, 256, 1, 1)
    torch.save(deeper, other)
    arguments = [*files, *TINY, *steps, "--preset", "seal-sbd", "--init", str(other)]
    assert edges_main.main(arguments) == 1
    assert "layer3.1" in capsys.readouterr().err


@pytest.mark.parametrize("preset", ["casenet-scratch", "casenet-s-scratch", "seal-scratch"])
def test_presets_for_random_weights_train_with_live_statistics(edge_files, capsys, preset):
    arguments = [
        *("--data", "street:day:8:0", "--classes", "street", "--preset", preset, "--steps", "6"),
        *("--batch", "2", "--out", str(edge_files / "p"), *TINY, "--crop", "64x64"),
    ]
    assert edges_main.main(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    assert np.isfinite([summary["loss_first"], summary["loss_last"]]).all()
    state = load_pack(edge_files / "p").state()
    assert state["bn_conv1.running_mean"].abs().sum() > 0


@pytest.mark.parametrize(
    ("more", "gated"),
    [
        (["--seal"], True),
        (["--seal", "--no-gate"], False),
        (["--preset", "seal-sbd"], False),
        (["--preset", "seal-sbd", "--gate"], True),
        (["--preset", "seal-scratch"], True),
        (["--preset", "seal-scratch", "--no-gate"], False),
    ],
)
def test_the_gate_is_an_option_of_training_as_of_aligning(more, gated):
    arguments = ["--classes", "4", "--data", "street:day:8:0", "--out", "x", *more]
    recipe = edges_main._recipe(edges_main.parser().parse_args(arguments))
    assert recipe.aligned
    assert (recipe.gate is not None) == gated


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
        ([*files, "--classes", "4", "--preset", "casenet-c-scratch"], "give --data"),
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
