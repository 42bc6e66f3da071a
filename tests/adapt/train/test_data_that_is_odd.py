"""Labelled data that is not what it seems, through the commands that read it: each ends at reading."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from adapt import align
from adapt.evaluate.__main__ import main as evaluate
from adapt.evaluate.truth import training_plan
from adapt.train.__main__ import main as train
from networks.labels import CAMVID11, CITYSCAPES19, STREET, mapping
from networks.pack import load_pack

SIZE = (32, 64)
SMALL = [
    "--network",
    "roadnet",
    "--set",
    "width=8",
    "--size",
    "32x64",
    "--epochs",
    "1",
    "--batch",
    "2",
    "--replay",
    "2",
    "--golden",
    "1",
    "--threads",
    "1",
    "--quiet",
]


def frame(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def label(i: int, values: tuple[int, ...] = tuple(range(12))) -> np.ndarray:
    return np.random.default_rng(90 + i).choice(np.array(values, np.uint8), SIZE)


def folder(root, labels, count: int = 4) -> str:
    for part in ("frames", "labels"):
        (root / part).mkdir(parents=True)
    for i in range(count):
        Image.fromarray(frame(i)).save(root / "frames" / f"{i:03d}.png")
        if (array := labels(i)) is not None:
            Image.fromarray(array).save(root / "labels" / f"{i:03d}.png")
    return f"folder:{root}"


def cityscapes(root, values) -> str:
    for i in range(2):
        for part, suffix, array in (
            ("leftImg8bit", "leftImg8bit", frame(i)),
            ("gtFine", "gtFine_labelIds", label(i, values)),
        ):
            (root / part / "train" / "x").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(root / part / "train" / "x" / f"{i}_{suffix}.png")
    return f"cityscapes:{root}:train"


def run(tmp_path, data: str, *more: str, classes: str = "street") -> int:
    out = str(tmp_path / "pack")
    return train([*SMALL, "--data", data, "--classes", classes, "--out", out, *more])


def refused(capsys, *words: str) -> None:
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    for word in words:
        assert word in said


def test_void_as_the_number_of_classes_is_refused_and_can_be_named(tmp_path, capsys):
    data = folder(tmp_path / "d", lambda i: label(i, (0, 5, 12)) if i == 2 else label(i))
    assert run(tmp_path, data) == 1
    refused(capsys, "the label of 002 holds class 12, street has 12", "--void N")
    assert not (tmp_path / "pack").exists()
    assert run(tmp_path, data, "--void", "12") == 0
    stored = [np.asarray(Image.open(y)) for _, y in load_pack(tmp_path / "pack").replay("train")]
    assert {255} | set(range(12)) >= set(np.unique(stored))


def test_every_label_of_150_classes_is_named_once(tmp_path, capsys):
    assert run(tmp_path, folder(tmp_path / "d", lambda i: label(i, (0, 24, 132)))) == 1
    refused(capsys, "4 bad pairs", "label of 000 holds class 132", "label of 003")


def test_zero_as_void_shifts_the_classes_back(tmp_path):
    plain = folder(tmp_path / "a", label)
    shifted = folder(tmp_path / "b", lambda i: label(i) + np.uint8(1))
    assert run(tmp_path, plain) == 0
    assert run(tmp_path / "x", shifted, "--void", "0") == 0
    ours, theirs = load_pack(tmp_path / "x" / "pack").state(), load_pack(tmp_path / "pack").state()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_labels_in_colours_need_a_palette(tmp_path, capsys):
    palette = STREET.palette()
    data = folder(tmp_path / "d", lambda i: palette[label(i)])
    assert run(tmp_path, data) == 1
    refused(capsys, "4 bad pairs", "mode RGB", "--palette")
    assert run(tmp_path, data, "--palette", "street") == 0
    _, file = load_pack(tmp_path / "pack").replay("train")[0]
    np.testing.assert_array_equal(np.asarray(Image.open(file)), label(0))
    assert run(tmp_path / "x", data, "--palette", "street", "--void", "3") == 1
    refused(capsys, "exclude each other")


def test_a_palette_png_whose_indices_are_not_the_classes_is_refused(tmp_path, capsys):
    """As a program writes it that saves a picture of few colours: the same colours, numbered as it likes."""
    order = np.random.default_rng(5).permutation(12)
    data = folder(tmp_path / "d", label)
    for i in range(4):
        place = np.argsort(order).astype(np.uint8)  # class -> its index in the file
        for name, indices, colours in (
            ("d", place[label(i)], np.array(STREET.colours)[order]),
            ("e", label(i), np.array(STREET.colours)),
        ):
            (tmp_path / name / "labels").mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(indices)
            picture.putpalette(colours.astype(np.uint8).tobytes())
            picture.save(tmp_path / name / "labels" / f"{i:03d}.png")
    assert run(tmp_path, data) == 1
    refused(capsys, "4 bad pairs", "its indices are not those of the classes", "--palette")
    assert run(tmp_path, data, "--palette", "street") == 0
    _, file = load_pack(tmp_path / "pack").replay("train")[1]
    np.testing.assert_array_equal(np.asarray(Image.open(file)), label(3))
    (tmp_path / "e" / "frames").symlink_to(tmp_path / "d" / "frames")
    assert run(tmp_path / "x", f"folder:{tmp_path / 'e'}") == 0


def test_classes_of_the_set_are_mapped_or_refused(tmp_path, capsys):
    ids = (7, 8, 11, 23, 26, 24)
    data = cityscapes(tmp_path / "d", ids)
    assert run(tmp_path, data) == 1
    refused(capsys, "labels of cityscapes19", "--classes is street", "give --classes cityscapes19")
    assert run(tmp_path, data, classes="camvid11") == 0
    train_ids = {7: 0, 8: 1, 11: 2, 23: 10, 26: 13, 24: 11}
    table = mapping("cityscapes19", "camvid11")
    shares = np.zeros(len(CAMVID11))
    for i in range(2):
        for value, count in zip(*np.unique(label(i, ids), return_counts=True), strict=True):
            shares[table[train_ids[int(value)]]] += count
    found = load_pack(tmp_path / "pack").reference()["share"]
    np.testing.assert_allclose(found, shares / shares.sum())
    assert run(tmp_path / "y", "street:day:2", classes="camvid11") == 1
    refused(capsys, "labels of street")


def test_train_ids_called_label_ids_are_doubted_aloud(tmp_path, capsys):
    data = cityscapes(tmp_path / "d", tuple(range(12)))
    assert run(tmp_path, data, classes="cityscapes19") == 0
    said = capsys.readouterr().err
    assert "no label holds an id over 18, so these are trainIds" in said
    assert "% of the pixels are void" in said


def test_sixteen_bit_grey_frames_teach_what_they_show(tmp_path):
    data = folder(tmp_path / "d", label)
    for i in range(4):
        values = frame(i)[..., 0].astype(np.uint16) * 257
        Image.fromarray(values).save(tmp_path / "d" / "frames" / f"{i:03d}.png")
    assert run(tmp_path, data) == 0
    file, _ = load_pack(tmp_path / "pack").replay("train")[0]
    np.testing.assert_array_equal(np.asarray(Image.open(file))[..., 0], frame(0)[..., 0])


def test_bad_pairs_are_left_out_when_asked_and_listed(tmp_path, capsys):
    data = folder(tmp_path / "d", label)
    (tmp_path / "d" / "labels" / "001.png").write_bytes(b"")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "d" / "labels" / "002.png")
    assert run(tmp_path, data) == 1
    refused(capsys, "2 bad pairs", "001.png", "002.png", "--skip-bad")
    assert run(tmp_path, data, "--skip-bad", "--json") == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["name"] for row in found["left_out"]] == ["001", "002"]
    assert found["frames"] == 2
    assert "2 bad pairs left out" in err
    assert "2 bad pairs left out" in load_pack(tmp_path / "pack").spec.training


def test_labels_of_255_alone_and_frames_without_label(tmp_path, capsys):
    assert run(tmp_path, folder(tmp_path / "a", lambda i: np.full(SIZE, 255, np.uint8))) == 1
    refused(capsys, "every pixel of all 4 labels is void")
    data = folder(tmp_path / "b", lambda i: label(i) if i < 3 else None)
    assert run(tmp_path, data) == 0
    assert "1 of 4 frames have no label and are not used: 003" in capsys.readouterr().err


def test_frames_read_again_and_again_give_the_weights_of_frames_in_memory(tmp_path, capsys):
    data = folder(tmp_path / "d", label, 6)
    val = folder(tmp_path / "v", lambda i: label(i + 50), 2)
    for i in range(2):
        Image.fromarray(frame(70 + i)).save(tmp_path / "v" / "frames" / f"{i:03d}.png")
    packs = []
    for name, room in (("a", "1024"), ("b", "0"), ("c", "0.02")):
        assert run(tmp_path / name, data, "--val", val, "--cache-mb", room, "--epochs", "2") == 0
        packs.append(load_pack(tmp_path / name / "pack").sha256)
    assert len(set(packs)) == 1
    assert run(tmp_path / "e", data, "--val", data) == 1
    assert "also the evaluation frame" in capsys.readouterr().err


def test_a_pack_without_golden_frames_can_be_trained(tmp_path):
    assert run(tmp_path, folder(tmp_path / "d", label), "--golden", "0") == 0
    assert len(load_pack(tmp_path / "pack").golden()) == 0


def test_scoring_refuses_and_reads_what_training_does(tmp_path, capsys):
    good = folder(tmp_path / "good", label)
    assert run(tmp_path, good) == 0
    pack = str(tmp_path / "pack")
    capsys.readouterr()

    def score(data: str, *more: str) -> dict:
        assert evaluate([pack, "--data", data, "--quiet", "--threads", "1", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["scores"][0]

    wanted = score(good)
    shifted = folder(tmp_path / "shifted", lambda i: label(i) + np.uint8(1))
    assert score(shifted, "--void", "0")["iou"] == wanted["iou"]
    colours = folder(tmp_path / "colours", lambda i: STREET.palette()[label(i)])
    assert score(colours, "--palette", "street")["iou"] == wanted["iou"]
    bad = folder(tmp_path / "bad", lambda i: label(i, (0, 99)) if i in (1, 3) else label(i))
    assert evaluate([pack, "--data", bad, "--quiet"]) == 1
    refused(capsys, "2 bad pairs", "label of 001 holds class 99", "label of 003")
    kept = score(bad, "--skip-bad")
    assert kept["frames"] == 2
    assert [row["name"] for row in kept["left_out"]] == ["001", "003"]
    void = folder(tmp_path / "void", lambda i: np.full(SIZE, 255, np.uint8))
    assert evaluate([pack, "--data", void, "--quiet"]) == 1
    refused(capsys, "every pixel")


EDGES = [
    "edges",
    "--network",
    "casenet_light",
    "--steps",
    "1",
    "--batch",
    "1",
    "--crop",
    "32x64",
    "--quiet",
]


def test_edge_training_reads_by_the_same_rules(tmp_path, capsys):
    bad = folder(tmp_path / "bad", lambda i: label(i, (0, 12)) if i < 2 else label(i))
    out = ["--out", str(tmp_path / "pack")]
    assert train([*EDGES, "--data", bad, "--classes", "street", *out]) == 1
    refused(capsys, "2 bad pairs", "label of 000 holds class 12")
    data = cityscapes(tmp_path / "c", (7, 8, 26))
    for classes, words in (("street", "--classes is street"), ("12", "has the 19 classes of cityscapes19")):
        assert train([*EDGES, "--data", data, "--classes", classes, *out]) == 1
        refused(capsys, words)
    void = folder(tmp_path / "void", lambda i: np.full(SIZE, 255, np.uint8))
    assert train([*EDGES, "--data", void, "--classes", "street", *out]) == 1
    refused(capsys, "every pixel")
    (tmp_path / "edges").mkdir()
    for name in ("x", "y"):
        (tmp_path / "edges" / f"{name}.npz").write_bytes(b"nothing")
    files = ["--labels", str(tmp_path / "edges"), "--images", str(tmp_path / "bad" / "frames")]
    assert train([*EDGES, *files, "--classes", "4", *out]) == 1
    refused(capsys, "2 bad pairs", "has no image x.jpg", "has no image y.jpg")


def test_alignment_reads_class_maps_by_the_same_rules(tmp_path, capsys):
    folder(tmp_path / "d", lambda i: label(i, (0, 12)) if i == 1 else label(i, (0, 1)), 3)
    (tmp_path / "maps").mkdir()
    for i in range(3):
        np.savez(tmp_path / "maps" / f"{i:03d}.npz", probability=np.zeros((2, *SIZE), np.float32))
    told = [
        "--segmentation",
        "--labels",
        str(tmp_path / "d" / "labels"),
        "--images",
        str(tmp_path / "d" / "frames"),
        "--probabilities",
        str(tmp_path / "maps"),
        "--classes",
        "2",
        "--quiet",
    ]
    assert align.main([*told, "--out", str(tmp_path / "a")]) == 1
    refused(capsys, "1 bad pair", "label of 001 holds class 12")
    assert align.main([*told, "--out", str(tmp_path / "b"), "--skip-bad", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 2
    assert "1 bad pairs left out" in err
    assert align.main([*told, "--out", str(tmp_path / "c"), "--void", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 3


def test_a_number_of_classes_stands_for_those_of_the_set():
    assert training_plan("gta5:x", CITYSCAPES19.classes, None).labels is None
    with pytest.raises(ValueError, match="19 classes"):
        training_plan("gta5:x", tuple("abc"), None)
