"""Edges: what has no right answer is named in one line, and what looks odd but has one gets it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapt.evaluate.edges import EdgeCounts, EdgeError, match
from adapt.labels import edge_codec
from adapt.labels.edge_probability import offsets
from adapt.labels.edges import category_edges, cityscapes_edges, instance_edges, seg2edge, seg2edge_torch
from adapt.labels.seal import Gate, align
from adapt.train.losses import multilabel_edge_loss

ON = np.ones((3, 3), bool)
MAP = np.eye(3, dtype=np.int64)
P = np.full((3, 3), 0.5, np.float32)
HOW = {"sigma_x": 1, "sigma_y": 3, "max_cost": 2, "smoothness": 0.02}
BITS = np.zeros((1, 2, 2), np.uint32)


def refused(word, call):
    with pytest.raises(EdgeError, match=word) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "call"),
    [
        ("max_distance is True", lambda: match(ON, ON, True)),
        ("classes=1.5", lambda: EdgeCounts(0.1, classes=1.5)),
        ("margin=0.5", lambda: EdgeCounts(0.1, margin=0.5)),
        ("class 0.5 of 2", lambda: EdgeCounts(0.1, classes=2).add(P, ON, 0.5)),
        ("no annotator", lambda: EdgeCounts(0.1).add(P, np.ones((0, 3, 3), bool))),
        ("to 1.00000012", lambda: EdgeCounts(0.1).add(np.nextafter(np.ones((3, 3), "f4"), 2), ON)),
        ("radius is None", lambda: seg2edge(MAP, None)),
        ("radius is '2'", lambda: seg2edge(MAP, "2")),
        ("ignore is 'all'", lambda: seg2edge(MAP, 2, "all")),
        ("ignore is .1.5", lambda: category_edges(MAP, 2, 2, (1.5,))),
        ("more than int64", lambda: seg2edge(np.array([[2**64 - 1, 0]], np.uint64), 2, (2**64 - 1,))),
        ("classes is 1.5", lambda: category_edges(MAP, 1.5)),
        ("classes is 0", lambda: instance_edges(MAP, MAP, 0)),
        ("classes is -1", lambda: cityscapes_edges(MAP, MAP, -1)),
        ("complex64", lambda: seg2edge_torch(torch.eye(3, dtype=torch.complex64))),
        ("sigma_x is '1'", lambda: align(ON, P, **{**HOW, "sigma_x": "1"})),
        ("max_cost is None", lambda: align(ON, P, **{**HOW, "max_cost": None})),
        ("smoothness is inf", lambda: align(ON, P, **{**HOW, "smoothness": float("inf")})),
        ("iterations is 1.5", lambda: align(ON, P, iterations=1.5, **HOW)),
        (r"no solver \[\]", lambda: align(ON, P, solver=[], **HOW)),
        ("tangents", lambda: align(ON, P, tangents=np.full((3, 3), None), **HOW)),
        ("whole pixels", lambda: Gate(tile=1.5)),
        ("finite limits", lambda: Gate(spread="wide")),
        ("1.5 classes", lambda: edge_codec.channels_of(1.5)),
        ("a pixel at least", lambda: edge_codec.pack(np.zeros((2, 0, 3), bool))),
        ("a pixel at least", lambda: edge_codec.unpack(BITS[:, :0], 2)),
    ],
)
def test_it_is_named(word, call):
    refused(word, call)


@pytest.mark.parametrize("size", [(-2, -2), (2, 2, 1), (2.0, 2.0), (0, 4)])
def test_files_are_not_read_at_a_size_that_is_none_nor_written_from_other_numbers(tmp_path, size):
    edge_codec.write(tmp_path / "x.bin", BITS, 3)
    refused("the size is", lambda: edge_codec.read(tmp_path / "x.bin", 3, size))
    refused("int64", lambda: edge_codec.write_bin(tmp_path / "y.bin", np.full((1, 2, 2), -1)))
    assert not (tmp_path / "y.bin").exists()


@pytest.mark.parametrize("content", [[[np.nan, 1]], [[2, 0]], [[-1, 0]], ["ab"]])
def test_cells_of_a_mat_file_that_are_no_maps_of_0_and_1_are_refused(tmp_path, content):
    from scipy.io import savemat

    cells = np.empty((1, 1), object)
    cells[0, 0] = np.array(content)
    savemat(tmp_path / "x.mat", {"labelEdge": cells})
    refused("x.mat", lambda: edge_codec.read(tmp_path / "x.mat", 1))


def test_labels_that_are_ignored_are_the_same_on_both_paths_whatever_the_dtype():
    for value, ignore in ((44, 300), (255, -1), (0, 256)):  # torch wraps these to a uint8
        labels = np.array([[value, 7]], np.uint8)
        assert seg2edge(labels, 2, (ignore,)).all()
        assert seg2edge_torch(torch.from_numpy(labels), 2, (ignore,)).all()
    assert not seg2edge(np.array([[255, 7]], np.uint8), 2, 255).any(), "a single label may stand for a list"


@pytest.mark.parametrize(
    ("word", "logits", "labels"),
    [
        ("bits beyond class 2", torch.zeros(1, 3, 2, 2), torch.full((1, 1, 2, 2), 1 << 5)),
        ("bits beyond class 31", torch.zeros(1, 32, 2, 2), torch.ones((1, 2, 2, 2), dtype=torch.int64)),
        ("int64", torch.zeros(1, 3, 2, 2, dtype=torch.int64), torch.zeros(1, 1, 2, 2, dtype=torch.int64)),
        ("an image", torch.zeros(0, 3, 2, 2), torch.zeros(0, 1, 2, 2, dtype=torch.int64)),
        ("a pixel", torch.zeros(1, 3, 0, 2), torch.zeros(1, 1, 0, 2, dtype=torch.int64)),
    ],
)
def test_a_loss_of_nothing_or_of_other_labels_is_named(word, logits, labels):
    for reduction in ("mean", "caffe_sum"):
        with pytest.raises(ValueError, match=word):
            multilabel_edge_loss(logits, labels, reduction=reduction)


def test_every_bit_a_class_may_have_is_taken():
    for classes in (1, 31, 32, 63):
        bits = edge_codec.pack(np.ones((classes, 2, 2), bool), np.zeros((2, 2), bool))
        loss = multilabel_edge_loss(torch.zeros(1, classes, 2, 2), torch.from_numpy(bits)[None], False)
        assert float(loss) == pytest.approx(np.log(2))


def test_tiles_begin_where_matlabs_round_puts_them():
    """round(2.5) is 3 there."""
    assert offsets(8, 3) == [0, 3, 5]
    assert offsets(12, 5) == [0, 4, 7]
    assert offsets(7, 3) == [0, 2, 4]


def test_a_count_table_that_is_cut_off_or_forged_is_named(tmp_path):
    table = EdgeCounts(0.1, classes=2)
    table.add(P, ON, 1)
    table.save(tmp_path / "good.npz")
    content = (tmp_path / "good.npz").read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 3):
        (tmp_path / "cut.npz").write_bytes(content[:cut])
        refused("not a saved count table", lambda: EdgeCounts.load(tmp_path / "cut.npz"))
    with np.load(tmp_path / "good.npz") as file:
        held = {name: file[name] for name in file.files}
    kind = held["kind"]
    for change in (
        {"kind": np.array([0.1, 1, 1e12, 0])},
        {"kind": np.array([0.1, 1, np.nan, 0])},
        {"matched_truth": held["matched_truth"] - 100},
        {"matched_truth": held["matched_truth"] + 100},
        {"best": held["best"].astype(float)},
    ):
        np.savez(tmp_path / "forged.npz", **{**held, **change})
        refused("forged.npz", lambda: EdgeCounts.load(tmp_path / "forged.npz"))
    assert kind.tolist() == [0.1, 1, 2, 0]


def test_pictures_pillow_has_other_words_for_end_in_one_line_too(tmp_path, capsys):
    from PIL import Image

    from adapt import align as tool
    from adapt.evaluate.edges_main import main as evaluate

    for folder in ("labels", "images", "p"):
        (tmp_path / folder).mkdir()
    for folder in ("labels", "images"):
        picture = np.zeros((8, 8, 3), np.uint8)
        picture[2, 2, 2] = folder == "labels"  # one edge pixel of class 0
        Image.fromarray(picture).save(tmp_path / folder / "a.png")
    np.savez(tmp_path / "p" / "a.npz", probability=np.zeros((2, 8, 8), np.float32))
    good = (tmp_path / "images" / "a.png").read_bytes()
    broken = good[:20] + b"\xff" * 8 + good[28:]  # a header whose checksum is wrong: SyntaxError
    folders = {"--labels": "labels", "--images": "images", "--out": "out", "--probabilities": "p"}
    arguments = [word for option, name in folders.items() for word in (option, str(tmp_path / name))]
    arguments += ["--classes", "2", "--quiet"]
    assert tool.main(arguments) == 0
    for folder in ("images", "labels"):
        (tmp_path / folder / "a.png").write_bytes(broken)
        capsys.readouterr()
        assert tool.main(arguments) == 1
        assert capsys.readouterr().err.count("\n") == 1
        (tmp_path / folder / "a.png").write_bytes(good)
    for main, more in ((tool.main, arguments), (evaluate, ["--truth", "x", "--predictions", "y"])):
        with pytest.raises(SystemExit) as end:
            main([*more, "--jobs", "-1"])
        assert end.value.code == 2


def test_truth_of_another_set_is_named_and_never_scored_as_another_class(tmp_path):
    from PIL import Image
    from scipy.io import savemat

    from adapt.evaluate.edge_sets import open_truth

    for folder in ("inst", "cls", "gtFine/val/city", "groundTruth"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "val.txt").write_text("a")
    edge = np.empty(1, object)
    edge[0] = ON

    def sbd(mode="thin", **struct):
        savemat(tmp_path / "inst" / "a.mat", {"GTinst": struct})
        return open_truth(f"sbd:{tmp_path}:val").truth(0, mode)

    good = {"Segmentation": np.ones((3, 3)), "Boundaries": edge, "Categories": np.array([20])}
    assert sbd(**good)[19].all()
    for category in (0, 21, -1):
        refused(f"category {category}", lambda c=category: sbd(**{**good, "Categories": np.array([c])}))
    refused("1 boundaries of 2", lambda: sbd(**{**good, "Categories": np.array([1, 2])}))
    refused("needed", lambda: sbd(**{**good, "Segmentation": np.ones((4, 3))}))
    refused("no Boundaries", lambda: sbd(Segmentation=np.ones((3, 3)), Categories=np.array([1])))
    refused("no Segmentation", lambda: sbd(mode="raw", Boundaries=edge))
    city = tmp_path / "gtFine" / "val" / "city"
    for name, value in (("labelIds", 26001), ("instanceIds", 26001)):
        Image.fromarray(np.full((4, 4), value, np.uint16)).save(city / f"a_gtFine_{name}.png")
    refused("labelIds are 0 to 255", lambda: open_truth(f"cityscapes:{tmp_path}:val").truth(0, "thin"))
    savemat(tmp_path / "groundTruth" / "a.mat", {"groundTruth": {"Segmentation": ON}})
    refused("no Boundaries", lambda: open_truth(f"bsds:{tmp_path}").truth(0, "thin"))
