"""The commands: train, evaluate; what they leave, what they print, how they end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adapt.evaluate.__main__ import main as evaluate
from adapt.train.__main__ import main as train
from networks.pack import load_pack
from tests.adapt.conftest import toy_scene


def labelled_folder(path, first: int):
    """A folder with eight labelled toy scenes, from that seed on."""
    for name in ("frames", "labels"):
        (path / name).mkdir(parents=True)
    for i in range(8):
        frame, label = toy_scene(first + i)
        Image.fromarray(frame).save(path / "frames" / f"{i}.png")
        Image.fromarray(label).save(path / "labels" / f"{i}.png")
    return path


@pytest.fixture
def bands(tmp_path):
    return labelled_folder(tmp_path / "set", 0)


def quick(bands, out, *more: str) -> list[str]:
    return [
        "--network",
        "roadnet",
        "--set",
        "width=8",
        "--classes",
        "street",
        "--data",
        f"folder:{bands}",
        "--out",
        str(out),
        "--size",
        "32x64",
        "--epochs",
        "2",
        "--batch",
        "4",
        "--threads",
        "1",
        "--quiet",
        *more,
    ]


def test_a_trained_pack_holds_what_adaptation_needs(bands, tmp_path, capsys):
    out = tmp_path / "pack"
    others = labelled_folder(tmp_path / "val", 50)
    arguments = quick(
        bands, out, "--val", f"folder:{others}", "--replay", "5", "--replay-holdout", "3", "--json"
    )
    assert train(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    pack = load_pack(out, sha256=told["sha256"])
    assert len(pack.replay("train")) == 5
    assert len(pack.replay("holdout")) == 3
    assert pack.golden().shape == (4, 32, 64, 3)
    assert pack.prior().shape[0] == 12
    labels = np.concatenate([toy_scene(i)[1].reshape(-1) for i in range(8)])
    np.testing.assert_allclose(pack.reference()["share"], np.bincount(labels, minlength=12) / labels.size)
    confidence = pack.reference()["confidence"]  # of the hold-out alone, which was not learnt from
    assert (confidence.shape, confidence.sum()) == ((12, 256), 3 * 32 * 64)
    assert confidence.dtype == np.int64
    assert "AdamW 0.0015 one-cycle, 2 epochs" in pack.spec.training
    assert not list(tmp_path.glob("*.checkpoint.pt"))
    assert told["steps"] == 4


def test_training_again_with_the_same_seed_gives_the_same_weights(bands, tmp_path):
    assert train(quick(bands, tmp_path / "a", "--seed", "5")) == 0
    assert train(quick(bands, tmp_path / "b", "--seed", "5")) == 0
    assert train(quick(bands, tmp_path / "c", "--seed", "6")) == 0
    a, b, c = ({k: v.numpy() for k, v in load_pack(tmp_path / x).state().items()} for x in "abc")
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not all(np.array_equal(a[k], c[k]) for k in a)


def test_a_pack_continues_in_the_same_label_space(bands, tmp_path):
    assert train(quick(bands, tmp_path / "a")) == 0
    arguments = quick(bands, tmp_path / "b")[4:]
    assert train(["--init", str(tmp_path / "a"), *arguments]) == 0
    assert load_pack(tmp_path / "b").spec.arguments == {"width": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--out", "{set}"], "exists already"),
        (["--data", "folder:{set}/none"], "there is no folder"),
        (["--classes", "moon"], "label space"),
        (["--crop", "33x64"], "multiples of"),
        (["--size", "33x64", "--crop", "32x64"], "size 33x64"),
        (["--val", "folder:{set}"], "also the evaluation frame"),
        (["--data", "nothing"], "describes no data set"),
    ],
)
def test_training_that_cannot_be_ends_with_one_line(bands, tmp_path, capsys, change, message):
    arguments = quick(bands, tmp_path / "pack", *[part.format(set=bands) for part in change])
    assert train(arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_before_and_after_in_a_table_and_as_json(bands, toy_pack, tmp_path, capsys):
    arguments = [
        str(toy_pack.path),
        str(toy_pack.path),
        "--data",
        f"folder:{bands}",
        "--quiet",
        "--threads",
        "1",
    ]
    assert evaluate([*arguments, "--markdown", str(tmp_path / "t.md")]) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "t.md").read_text()
    assert "(+0.0)" in table
    assert evaluate([*arguments, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["scores"]
    assert first == second
    assert first["frames"] == 8
    assert 0.4 < first["miou"] <= 1
    assert first["sha256"] == toy_pack.sha256


def test_scoring_without_labels_or_pack_ends_with_one_line(tmp_path, toy_pack, capsys):
    (tmp_path / "frames").mkdir()
    Image.fromarray(toy_scene(0)[0]).save(tmp_path / "frames" / "a.png")
    assert evaluate([str(toy_pack.path), "--data", f"folder:{tmp_path}", "--quiet"]) == 1
    assert "no labelled frame" in capsys.readouterr().err
    assert evaluate([str(tmp_path / "none"), "--data", f"folder:{tmp_path}", "--quiet"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_table_that_cannot_be_written_names_the_file(bands, toy_pack, capsys):
    table = ["--markdown", "/proc/none/t.md"]
    assert (
        evaluate([str(toy_pack.path), "--data", f"folder:{bands}", "--quiet", "--threads", "1", *table]) == 1
    )
    said = capsys.readouterr().err
    assert said.startswith("adapt.evaluate: '/proc/none/t.md' cannot be used: No such file")
    assert said.count("\n") == 1


@pytest.mark.parametrize("wrong", [["--threads", "-1"], ["--batch", "0"]])
def test_counts_that_cannot_be_are_wrong_usage(bands, tmp_path, toy_pack, wrong):
    for command, arguments in (
        (train, quick(bands, tmp_path / "pack", *wrong)),
        (evaluate, [str(toy_pack.path), "--data", f"folder:{bands}", *wrong]),
    ):
        with pytest.raises(SystemExit) as end:
            command(arguments)
        assert end.value.code == 2


@pytest.mark.parametrize("command", [train, evaluate])
def test_help_is_a_manual_page(command, capsys):
    with pytest.raises(SystemExit) as end:
        command(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("examples:", "exit codes:", "--json"):
        assert part in text
