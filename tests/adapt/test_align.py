"""The alignment command on a tiny data set, with maps and with packs, and its refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

import networks
from adapt import align
from adapt.labels import edge_codec
from adapt.labels.edge_probability import edge_probability, offsets, softmax_ridges
from adapt.labels.edges import category_edges
from networks.labels import STREET
from networks.pack import PackSpec, write_pack

SIZE = (64, 80)


def region(shift=(0, 0)):
    yy, xx = np.mgrid[: SIZE[0], : SIZE[1]]
    inside = np.hypot(yy - 30 - shift[0], xx - 40 - shift[1]) < 18 + 3 * np.sin(
        4 * np.arctan2(yy - 30, xx - 40)
    )
    return inside.astype(np.uint8)


@pytest.fixture
def data(tmp_path):
    """Two images; labels are shifted, the reference and the maps are not."""
    for name in ("labels", "images", "maps", "reference"):
        (tmp_path / name).mkdir()
    for i in range(2):
        truth = category_edges(region(), 2)
        noisy = category_edges(region((3, -2)), 2)
        Image.fromarray(np.full((*SIZE, 3), 90 + i, np.uint8)).save(tmp_path / "images" / f"f{i}.png")
        edge_codec.write(tmp_path / "labels" / f"f{i}.npz", edge_codec.pack(noisy), 2)
        edge_codec.write(tmp_path / "reference" / f"f{i}.npz", edge_codec.pack(truth), 2)
        p = np.stack([gaussian_filter(t.astype(np.float32), 0.8) for t in truth]) * 0.95 + 0.01
        np.savez(tmp_path / "maps" / f"f{i}.npz", probability=p)
    return tmp_path


def arguments(data, *more):
    return [
        *("--labels", str(data / "labels"), "--images", str(data / "images"), "--out", str(data / "out")),
        *("--quiet", "--json"),
        *more,
    ]


def maps(data):
    return ("--probabilities", str(data / "maps"), "--classes", "2")


def test_labels_come_nearer_to_the_reference_and_the_report_says_how_far_they_went(data, capsys):
    more = ("--reference", str(data / "reference"), "--pictures", "1", "--preset", "sbd")
    assert align.main(arguments(data, *maps(data), *more)) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((data / "out" / "report.json").read_text())
    assert report["images"] == 2
    for row in report["reference"]["f"].values():
        assert row["after"] > row["before"] + 0.02
    finest = report["reference"]["f"]["0.0016"]
    assert finest["after"] > finest["before"] + 0.15
    statistics = report["classes"]["class1"]
    assert 0.5 < statistics["shift_mean"] < 6
    assert statistics["shift_median"] <= statistics["shift_p90"] <= statistics["shift_max"] <= 12.1
    before, _ = edge_codec.unpack(edge_codec.read(data / "labels" / "f0.npz", 2), 2)
    after, _ = edge_codec.unpack(edge_codec.read(data / "out" / "f0.npz", 2), 2)
    assert (after.sum((1, 2)) == before.sum((1, 2))).all()
    assert [f.name for f in (data / "out" / "pictures").iterdir()] == ["f0.png"]


def test_what_the_reference_does_not_know_is_not_counted(data, capsys):
    more = (*maps(data), "--reference", str(data / "reference"))
    assert align.main(arguments(data, *more)) == 0
    whole = json.loads(capsys.readouterr().out)["reference"]["f"]["0.0016"]
    # the lower half of the reference is wrong and says so
    for i in range(2):
        path = data / "reference" / f"f{i}.npz"
        edges, _ = edge_codec.unpack(edge_codec.read(path, 2), 2)
        ignore = np.zeros(SIZE, bool)
        ignore[32:] = True
        edges[:, 32:] = False
        edge_codec.write(path, edge_codec.pack(edges, ignore), 2)
    assert align.main(arguments(data, *more)) == 0
    half = json.loads(capsys.readouterr().out)["reference"]["f"]["0.0016"]
    assert half["after"] > half["before"] + 0.1
    assert abs(half["after"] - whole["after"]) < 0.12


def test_noise_moves_nothing_unless_the_gate_is_off_and_the_report_says_why(data, capsys):
    for i in range(2):
        rng = np.random.default_rng(i)
        p = rng.uniform(0.001, 0.999, (2, *SIZE)).astype(np.float32)
        np.savez(data / "maps" / f"f{i}.npz", probability=p)
    loose = ("--smoothness", "0")
    assert align.main(arguments(data, *maps(data), *loose, "--gate")) == 0
    report = json.loads(capsys.readouterr().out)
    row = report["classes"]["class1"]
    assert row["shift_max"] == 0
    assert row["kept_by_gate"] == 1
    why = row["pieces"]
    assert why["all"] == why["kept"]["spread"] + why["kept"]["apart"] > 2
    assert why["moved"] == why["at_rest"] == 0
    assert why["mean_spread"]["kept"] > 0.8
    assert why["mean_spread"]["moved"] is None
    assert align.main(arguments(data, *maps(data), "--no-gate", *loose)) == 0
    row = json.loads(capsys.readouterr().out)["classes"]["class1"]
    assert row["moved"] > 0.2
    assert row["pieces"]["moved"] == row["pieces"]["all"]
    # good ridges pass, and a map that says nothing leaves every piece at rest
    for i in range(2):
        np.savez(data / "maps" / f"f{i}.npz", probability=np.full((2, *SIZE), 0.3, np.float32))
    assert align.main(arguments(data, *maps(data))) == 0
    why = json.loads(capsys.readouterr().out)["classes"]["class1"]["pieces"]
    assert why["at_rest"] == why["all"]


def test_a_segmentation_pack_and_class_maps_go_end_to_end(data, capsys):
    torch.manual_seed(0)
    spec = PackSpec(
        name="tiny",
        version="1.0.0",
        network="roadnet",
        arguments={"width": 8},
        classes=STREET.classes,
        colours=STREET.colours,
        size=(64, 96),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        training="none",
        licence="Apache-2.0",
    )
    network = networks.create("roadnet", classes=len(spec.classes), width=8)
    write_pack(data / "pack", spec, network.state_dict())
    for i in range(2):
        (data / "labels" / f"f{i}.npz").unlink()
        Image.fromarray(region((3, -2))).save(data / "labels" / f"f{i}.png")
    assert align.main(arguments(data, "--segmentation", "--model", str(data / "pack"))) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["classes"]) == set(spec.classes[:2])


def test_ridges_of_a_step_and_of_nothing():
    p = torch.zeros(1, 2, 9, 9)
    p[:, 0, :, :4], p[:, 1, :, 4:] = 1, 1
    ridge = softmax_ridges(p)
    assert (ridge[0, 0, :, 3:5] == 1).all()
    assert ridge[0, :, :, :3].abs().max() == ridge[0, :, :, 5:].abs().max() == 0


def test_tiles_cover_a_side_evenly_and_a_local_network_does_not_notice_them():
    assert offsets(100, 200) == [0]
    assert offsets(1024, 632) == [0, 392]
    assert offsets(2048, 632) == [0, 472, 944, 1416]
    torch.manual_seed(0)
    network = networks.create("casenet", classes=2, depth=14, width=8).eval()
    spec = PackSpec(
        name="e",
        version="1.0.0",
        network="casenet",
        arguments={"depth": 14, "width": 8},
        classes=("a", "b"),
        colours=((0, 0, 0), (9, 9, 9)),
        size=(64, 64),
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        training="none",
        licence="Apache-2.0",
    )
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (61, 75, 3), np.uint8)
    whole = edge_probability(network, spec, frame)
    tiled = edge_probability(network, spec, frame, tile=48)
    assert whole.shape == tiled.shape == (2, 61, 75)
    assert 0 <= whole.min() <= whole.max() <= 1
    assert np.abs(whole - tiled).max() < 0.2
    assert (edge_probability(network, spec, frame, tile=200) == whole).all()


def test_refusals_are_one_line_and_nothing_is_overwritten(data, capsys):
    (data / "empty").mkdir()
    cases = [
        (["--labels", str(data / "empty")], "holds no label"),
        (["--images", str(data / "empty")], "no image f0"),
        (["--out", str(data / "labels")], "overwritten"),
        (["--classes", "3"], "2 classes, 3"),
        (["--reference", str(data / "empty")], "no label of f0"),
        (["--sigma-x", "-1"], "sigma_x"),
        (["--spread", "nan"], "finite limits"),
    ]
    for more, word in cases:
        assert align.main(arguments(data, *maps(data), *more)) == 1
        captured = capsys.readouterr()
        assert word in captured.err
        assert captured.err.count("\n") == 1
    (data / "maps" / "f1.npz").unlink()
    assert align.main(arguments(data, *maps(data))) == 1
    assert "f1.npz" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        align.main(arguments(data))
    assert caught.value.code == 2
