"""The readers on sets of a few pixels, and the command end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from scipy.sparse import csc_matrix

from adapt.evaluate import __main__ as evaluate_main
from adapt.evaluate import edges_main
from adapt.evaluate.edge_sets import CLASSES, Predictions, open_truth
from adapt.evaluate.edges import EdgeCounts
from adapt.labels import edge_codec
from adapt.labels.edges import seg2edge
from adapt.labels.errors import EdgeError
from adapt.labels.thinning import thin


def regions(seed, size=(48, 64)):
    rng = np.random.default_rng(seed)
    return np.digitize(gaussian_filter(rng.normal(size=size), 6), [-0.03, 0.03]).astype(np.uint8)


@pytest.fixture
def camvid(tmp_path):
    root = tmp_path / "camvid"
    (root / "labels").mkdir(parents=True)
    names = [f"f{i}" for i in range(3)]
    for i, name in enumerate(names):
        Image.fromarray(regions(i)).save(root / "labels" / f"{name}.png")
    (root / "val.txt").write_text("\n".join(names))
    predictions = tmp_path / "predictions"
    predictions.mkdir()
    rng = np.random.default_rng(7)
    for i, name in enumerate(names):
        maps = []
        for k in range(11):
            edge = seg2edge(regions(i) == k) if k < 3 else np.zeros((48, 64))
            p = gaussian_filter(np.roll(edge, 1, 0) + 0.3 * rng.random((48, 64)), 1)
            maps.append(np.clip(255 * p / p.max(), 0, 255) if k < 3 else edge)
        np.savez(predictions / f"{name}.npz", probability=np.stack(maps).astype(np.uint8))
    return root, predictions


def test_the_command_prints_what_the_table_holds(camvid, capsys):
    root, predictions = camvid
    arguments = [
        "edges",
        "--truth",
        f"camvid:{root}:val",
        "--predictions",
        str(predictions),
        "--quiet",
        "--json",
    ]
    assert evaluate_main.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"thin", "raw"}
    expected = EdgeCounts(0.0075, thin=True, classes=11)
    truth = open_truth(f"camvid:{root}:val")
    for i, name in enumerate(truth.names):
        expected.add_classes(np.load(predictions / f"{name}.npz")["probability"], truth.truth(i, "thin"))
    assert result["thin"]["mf_ods"] == expected.ods()
    assert result["thin"]["ap"] == expected.ap()
    assert 0.2 < result["thin"]["mf_ods"] <= 1
    assert result["raw"]["classes"]["car"]["ods"] is None
    assert result["raw"]["images"] == 3
    assert evaluate_main.main(arguments[:-1]) == 0
    text = capsys.readouterr().out
    assert f"{100 * expected.ods():.1f}" in text
    assert "| car | – |" in text


def test_a_pack_is_scored_on_the_images_themselves(camvid, tmp_path, capsys):
    import networks
    from networks.labels import CAMVID11
    from networks.pack import PackSpec, write_pack

    root, _ = camvid
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for i in range(3):
        frame = np.repeat(regions(i)[..., None] * 80, 3, 2).astype(np.uint8)
        Image.fromarray(frame).save(tmp_path / "images" / "deep" / f"f{i}.png")
    arguments = {"depth": 14, "width": 8}
    spec = PackSpec(
        name="e",
        version="1.0.0",
        network="casenet",
        arguments=arguments,
        task="edges",
        classes=CAMVID11.classes,
        colours=CAMVID11.colours,
        size=(48, 64),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        training="none",
        licence="",
    )
    network = networks.create("casenet", classes=11, **arguments)
    write_pack(tmp_path / "pack", spec, network.state_dict())
    common = ["--truth", f"camvid:{root}:val", "--images", str(tmp_path / "images"), "--quiet", "--json"]
    common += ["--mode", "raw", "--model", str(tmp_path / "pack")]
    assert edges_main.main(common) == 0
    whole = json.loads(capsys.readouterr().out)["raw"]
    assert whole["images"] == 3
    assert 0 < whole["mf_ods"] < 1
    assert edges_main.main([*common, "--tile", "64"]) == 0
    assert json.loads(capsys.readouterr().out)["raw"]["mf_ods"] == pytest.approx(whole["mf_ods"])
    (tmp_path / "images" / "deep" / "f2.png").unlink()
    assert edges_main.main(common) == 1
    assert "no image f2" in capsys.readouterr().err


def test_shards_of_any_number_of_threads_merge_to_the_whole(camvid, tmp_path, capsys):
    root, predictions = camvid
    common = [
        "--truth",
        f"camvid:{root}:val",
        "--predictions",
        str(predictions),
        "--mode",
        "raw",
        "--quiet",
        "--json",
    ]
    assert edges_main.main([*common, "--jobs", "3"]) == 0
    whole = json.loads(capsys.readouterr().out)["raw"]
    files = []
    for i in (1, 2):
        files.append(str(tmp_path / f"{i}.npz"))
        assert edges_main.main([*common, "--jobs", "1", "--shard", f"{i}/2", "--save", files[-1]]) == 0
    capsys.readouterr()
    assert edges_main.main(["--merge", *files, "--json"]) == 0
    merged = json.loads(capsys.readouterr().out)["raw"]
    assert [merged[k] for k in ("mf_ods", "ois", "ap")] == [whole[k] for k in ("mf_ods", "ois", "ap")]
    assert list(merged["classes"].values()) == list(whole["classes"].values())


def test_refusals_are_one_line_on_stderr(camvid, tmp_path, capsys):
    root, predictions = camvid
    cases = [
        (["--truth", f"camvid:{root}:test", "--predictions", str(predictions)], "test.txt"),
        (["--truth", f"camvid:{root}", "--predictions", str(predictions)], "lacks its last part"),
        (["--truth", f"coco:{root}:val", "--predictions", str(predictions)], "no edge truth"),
        (["--truth", f"camvid:{tmp_path}/no:val", "--predictions", str(predictions)], "no folder"),
        (["--truth", f"camvid:{root}:val", "--predictions", str(root / "labels")], "no prediction of f0"),
        (["--truth", f"camvid:{root}:val", "--predictions", str(predictions), "--save", "x"], "--save"),
        (["--merge", str(predictions / "f0.npz")], "not a saved"),
    ]
    for arguments, word in cases:
        assert edges_main.main([*arguments, "--quiet"]) == 1
        captured = capsys.readouterr()
        assert word in captured.err
        assert captured.err.count("\n") == 1
        assert not captured.out
    for arguments in ([], ["--truth", "x"], ["--mode", "fat"]):
        with pytest.raises(SystemExit) as caught:
            edges_main.main(arguments)
        assert caught.value.code == 2


def test_a_nan_map_is_refused_with_its_image(camvid, capsys):
    root, predictions = camvid
    maps = np.zeros((11, 48, 64), np.float32)
    maps[2, 3, 3] = np.nan
    np.savez(predictions / "f1.npz", probability=maps)
    assert (
        edges_main.main(["--truth", f"camvid:{root}:val", "--predictions", str(predictions), "--quiet"]) == 1
    )
    error = capsys.readouterr().err
    assert "f1" in error
    assert "NaN" in error


def test_sbd_is_read_as_its_matlab_files_say(tmp_path):
    root = tmp_path / "sbd"
    for folder in ("cls", "inst"):
        (root / folder).mkdir(parents=True)
    categories, instances = np.zeros((2, 20, 24), np.uint8)
    categories[4:12, 3:15], categories[13:18, 16:22] = 15, 7
    instances[4:12, 3:9], instances[4:12, 9:15], instances[13:18, 16:22] = 1, 2, 3
    boundaries = np.empty((3, 1), object)
    for i in range(3):
        boundaries[i, 0] = csc_matrix(thin(seg2edge(instances == i + 1, 1)))
    savemat(root / "cls" / "a.mat", {"GTcls": {"Segmentation": categories, "CategoriesPresent": [7, 15]}})
    inst = {"Segmentation": instances, "Boundaries": boundaries, "Categories": np.array([[15], [15], [7]])}
    savemat(root / "inst" / "a.mat", {"GTinst": inst})
    (root / "val.txt").write_text("a\n")
    truth = open_truth(f"sbd:{root}:val")
    assert truth.protocol.max_distance == 0.02
    thin_maps, raw = truth.truth(0, "thin"), truth.truth(0, "raw")
    assert set(np.flatnonzero(raw.any((1, 2)))) == set(np.flatnonzero(thin_maps.any((1, 2)))) == {6, 14}
    assert (raw[14] == seg2edge(np.where(categories == 15, instances, 0))).all()
    assert (thin_maps[14] == (boundaries[0, 0] + boundaries[1, 0]).toarray()).all()
    assert raw[14, 8, 8]
    assert raw[14, 8, 9]  # between two persons


def test_cityscapes_is_scored_at_half_resolution_on_matlabs_pixels(tmp_path):
    folder = tmp_path / "gtFine" / "val" / "ulm"
    folder.mkdir(parents=True)
    ids = np.full((24, 40), 7, np.uint8)
    ids[:, 21:] = 26
    instances = np.where(ids == 26, 26001, 7).astype(np.uint16)
    Image.fromarray(ids).save(folder / "ulm_0_gtFine_labelIds.png")
    Image.fromarray(instances).save(folder / "ulm_0_gtFine_instanceIds.png")
    truth = open_truth(f"cityscapes:{tmp_path}:val")
    assert list(truth.names) == ["ulm_0"]
    raw, thinned = truth.truth(0, "raw"), truth.truth(0, "thin")
    assert raw.shape == thinned.shape == (19, 12, 20)
    # full resolution: columns 19..22 are within 2 of the border at 21; odd ones survive the halving
    assert np.flatnonzero(raw[13, 5]).tolist() == [9, 10]
    assert np.flatnonzero(thinned[13, 5]).tolist() == [9, 10]
    assert np.flatnonzero(raw.any((1, 2))).tolist() == [0, 13]
    with pytest.raises(EdgeError, match="labelIds"):
        open_truth(f"cityscapes:{tmp_path}:train")


def test_bsds_is_read_in_both_forms(tmp_path):
    first, second = np.zeros((2, 10, 12), bool)
    first[3], second[:, 4] = True, True
    cells = np.empty((1, 2), object)
    for i, m in enumerate((first, second)):
        cells[0, i] = {"Boundaries": m.astype(np.uint8), "Segmentation": m.astype(np.uint16)}
    (tmp_path / "a" / "groundTruth" / "test").mkdir(parents=True)
    savemat(tmp_path / "a" / "groundTruth" / "test" / "100.mat", {"groundTruth": cells})
    (tmp_path / "b" / "edges").mkdir(parents=True)
    Image.fromarray((first + 2 * second).astype(np.uint8)).save(tmp_path / "b" / "edges" / "test_100.png")
    for text in (f"bsds:{tmp_path}/a", f"bsds:{tmp_path}/b:test_"):
        truth = open_truth(text)
        assert (truth.truth(0, "thin") == np.stack([first, second])).all()
        assert truth.protocol.annotators


def test_edge_label_files_are_a_truth_too(tmp_path):
    edges = np.stack([seg2edge(regions(0) == k) for k in range(3)])
    edge_codec.write(tmp_path / "x.npz", edge_codec.pack(edges), 3)
    truth = open_truth(f"labels:{tmp_path}:3")
    assert (truth.truth(0, "raw") == edges).all()
    with pytest.raises(EdgeError, match="how many classes"):
        open_truth(f"labels:{tmp_path}:many")


def test_predictions_come_in_three_layouts_and_are_resized_as_matlab_does(tmp_path):
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 256, (20, 6, 8), np.uint8)
    for k, name in enumerate(CLASSES["sbd"]):
        folder = tmp_path / "folders" / (name if k % 2 else f"class_{k + 1:03d}")
        folder.mkdir(parents=True)
        Image.fromarray(maps[k]).save(folder / "a.png")
    found = Predictions(tmp_path / "folders", CLASSES["sbd"]).read("a", (6, 8))
    assert (np.stack(found) == maps).all()
    half = Predictions(tmp_path / "folders", CLASSES["sbd"]).read("a", (3, 4))
    assert half[0].shape == (3, 4)
    assert half[0].dtype == np.float64
    with pytest.raises(EdgeError, match="transposed"):
        Predictions(tmp_path / "folders", CLASSES["sbd"]).read("a", (8, 6))
    (tmp_path / "deep").mkdir()
    Image.fromarray(maps[0].astype(np.uint16) * 256).save(tmp_path / "deep" / "a.png")
    deep = Predictions(tmp_path / "deep", ("boundary",)).read("a", (6, 8))[0]
    np.testing.assert_allclose(deep, maps[0] / 256.0)
    np.savez(tmp_path / "deep" / "b.npz", probability=maps[:3])
    with pytest.raises(EdgeError, match="3 maps"):
        Predictions(tmp_path / "deep", CLASSES["sbd"]).read("b", (6, 8))
