"""Checkpoints of others: tensors only, by name, one line when refused, nothing left behind."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import networks
from networks.import_checkpoint import main
from networks.pack import load_pack


@pytest.fixture
def released(tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "espnetv2.pth"
    torch.save(networks.create("espnetv2", classes=20, scale=0.5).state_dict(), file)
    return file


def run(capsys, *words):
    code = main([str(w) for w in words])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, tmp_path, *words):
    before = sorted(tmp_path.iterdir())
    code, out, err = run(capsys, *words, "--out", tmp_path / "pack")
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
    return err


def test_a_released_file_becomes_a_pack(released, tmp_path, capsys):
    image = tmp_path / "frame.jpg"
    Image.fromarray(np.full((50, 100, 3), 128, np.uint8)).save(image)
    code, out, _ = run(
        capsys,
        "espnetv2",
        released,
        "--classes",
        "cityscapes19",
        "--out",
        tmp_path / "pack",
        "--golden",
        image,
        "--size",
        "64x128",
        "--json",
    )
    assert code == 0
    facts = json.loads(out)
    pack = load_pack(facts["pack"], sha256=facts["sha256"])
    assert pack.spec.arguments == {"scale": 0.5, "projection": 10}
    assert pack.spec.classes[18] == "bicycle"
    assert pack.spec.mean == (0.485, 0.456, 0.406)
    assert pack.golden().shape == (1, 64, 128, 3)


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrappers_and_the_prefix_of_data_parallel_training_are_taken_off(tmp_path, capsys, wrapper):
    state = networks.create("roadnet", classes=12, width=8).state_dict()
    file = tmp_path / "w.pth"
    torch.save({wrapper: {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, file)
    code, _, _ = run(
        capsys,
        "roadnet",
        file,
        "--classes",
        "street",
        "--set",
        "width=8",
        "--size",
        "64x64",
        "--out",
        tmp_path / "p",
    )
    assert code == 0
    assert set(load_pack(tmp_path / "p").state()) == set(state)


def test_safetensors(tmp_path, capsys):
    file = tmp_path / "w.safetensors"
    save_file(networks.create("roadnet", classes=12, width=8).state_dict(), file)
    code, _, _ = run(
        capsys,
        "roadnet",
        file,
        "--classes",
        "street",
        "--set",
        "width=8",
        "--size",
        "64x64",
        "--out",
        tmp_path / "p",
    )
    assert code == 0


def test_half_precision_and_files_without_batch_counters_are_taken(tmp_path, capsys):
    state = networks.create("roadnet", classes=12, width=8).state_dict()
    file = tmp_path / "w.pth"
    torch.save({k: v.half() for k, v in state.items() if "num_batches" not in k}, file)
    words = ("--classes", "street", "--set", "width=8", "--size", "64x64")
    assert run(capsys, "roadnet", file, *words, "--out", tmp_path / "p")[0] == 0
    kept = load_pack(tmp_path / "p").state()
    assert set(kept) == set(state)
    assert torch.equal(kept["classify.weight"], state["classify.weight"].half().float())


class Exploit:
    def __reduce__(self):
        return os.system, ("touch /tmp/roadworthy-was-executed",)


def test_a_file_that_would_execute_code_is_refused_and_not_executed(tmp_path, capsys):
    file = tmp_path / "evil.pth"
    torch.save({"a": Exploit()}, file)
    err = refused(capsys, tmp_path, "espnetv2", file, "--classes", "cityscapes19")
    assert "would execute code" in err
    assert "system" in err
    assert not os.path.exists("/tmp/roadworthy-was-executed")


def test_a_pickled_module_is_refused(tmp_path, capsys):
    file = tmp_path / "whole.pth"
    torch.save(torch.nn.Linear(2, 2), file)
    err = refused(capsys, tmp_path, "espnetv2", file, "--classes", "cityscapes19")
    assert "refused" in err


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 not a zip"])
def test_a_damaged_file_is_refused(tmp_path, capsys, content):
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    err = refused(capsys, tmp_path, "espnetv2", file, "--classes", "cityscapes19")
    assert str(file) in err


def test_a_truncated_file_is_refused(released, tmp_path, capsys):
    released.write_bytes(released.read_bytes()[:-2000])
    err = refused(capsys, tmp_path, "espnetv2", released, "--classes", "cityscapes19")
    assert "truncated or damaged" in err


def test_wrong_weights_are_refused_by_name(tmp_path, capsys):
    file = tmp_path / "w.pth"
    state = networks.create("roadnet", classes=12, width=8).state_dict()
    del state["fuse.bn.bias"]
    torch.save(state, file)
    words = ("roadnet", file, "--classes", "street", "--set", "width=8", "--size", "64x64")
    assert "weights lack 'fuse.bn.bias'" in refused(capsys, tmp_path, *words)


def test_wrong_class_count_is_refused(released, tmp_path, capsys):
    err = refused(capsys, tmp_path, "espnetv2", released, "--classes", "camvid11")
    assert "head has 20 outputs, the label space 11 classes" in err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("espnetv2", "nowhere.pth", "--classes", "cityscapes19"), "does not exist"),
        (("vgg", "nowhere.pth", "--classes", "cityscapes19"), "network 'vgg' is unknown"),
        (("espnetv2", "nowhere.pth", "--classes", "ade20k"), "label space 'ade20k' is unknown"),
    ],
)
def test_unknown_names(tmp_path, capsys, words, reason):
    assert reason in refused(capsys, tmp_path, *words)


def test_a_size_the_network_cannot_take_is_refused(released, tmp_path, capsys):
    err = refused(capsys, tmp_path, "espnetv2", released, "--classes", "cityscapes19", "--size", "100x100")
    assert "size 100x100 must be a multiple of 32" in err


def test_help_reads_like_a_manual_page(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "exit codes:" in text


@pytest.mark.parametrize(
    "state",
    [
        {0: torch.zeros(3)},
        {"a": torch.zeros(3).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
        {"a": torch.zeros(3, dtype=torch.complex64)},
        {"state_dict": {"state_dict": 1}},
        [torch.zeros(3)],
    ],
    ids=["number", "sparse", "meta", "complex", "nested", "list"],
)
def test_tensors_that_are_no_arrays_and_names_that_are_none(state, tmp_path, capsys):
    torch.save(state, tmp_path / "x.pth")
    refused(capsys, tmp_path, "roadnet", tmp_path / "x.pth", "--classes", "street")


@pytest.mark.parametrize("seed", range(20))
def test_a_file_with_flipped_bytes_ends_in_one_line(seed, tmp_path, capsys):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    content = bytearray((tmp_path / "x.pth").read_bytes())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(content), 20):
        content[place] = rng.integers(0, 256)
    (tmp_path / "x.pth").write_bytes(content)
    refused(capsys, tmp_path, "roadnet", tmp_path / "x.pth", "--classes", "street")


@pytest.mark.parametrize("words", ["classes=9", "name=x", "width=-3", "width=1e99", "=", "width"])
def test_arguments_that_make_no_network(words, tmp_path, capsys):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    refused(capsys, tmp_path, "roadnet", tmp_path / "x.pth", "--classes", "street", "--set", words)


def test_a_golden_picture_that_is_none(tmp_path, capsys):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.pth")
    (tmp_path / "a.png").write_bytes(b"")
    words = ("roadnet", tmp_path / "x.pth", "--classes", "street", "--golden", tmp_path / "a.png")
    assert "golden frame" in refused(capsys, tmp_path, *words)
