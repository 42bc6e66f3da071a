"""Truth that does not know, truth and predictions as other tools write them, class borders, suppression."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from scipy.sparse import csc_matrix

from adapt.evaluate import edges_main
from adapt.evaluate.boundary_iou import BoundaryIoU
from adapt.evaluate.edge_sets import Predictions, around, inverted, open_truth, unknown
from adapt.evaluate.edges import PROTOCOLS, EdgeCounts
from adapt.evaluate.nms import across, nms
from adapt.labels import edge_codec
from adapt.labels.edges import category_edges, seg2edge
from adapt.labels.errors import EdgeError
from adapt.labels.thinning import thin

SIZE = (48, 64)


def regions(seed=0, size=SIZE):
    rng = np.random.default_rng(seed)
    return np.digitize(gaussian_filter(rng.normal(size=size), 6), [-0.03, 0.03]).astype(np.uint8)


def run(capsys, *arguments):
    code = edges_main.main([*map(str, arguments), "--quiet", "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out) if captured.out else None, captured.err


# ------------------------------------------------------------------------------------------ what is unknown
@pytest.fixture
def camvid(tmp_path):
    """A class map with void."""
    (tmp_path / "set" / "labels").mkdir(parents=True)
    (tmp_path / "maps").mkdir()
    label = regions()
    label[10:25, 20:50] = 255
    Image.fromarray(label).save(tmp_path / "set" / "labels" / "a.png")
    (tmp_path / "set" / "val.txt").write_text("a")
    return tmp_path


def test_a_right_detector_that_also_marks_borders_to_void_scores_one(camvid, capsys):
    label = np.asarray(Image.open(camvid / "set" / "labels" / "a.png"))
    for mode, radius in (("raw", 2), ("thin", 1)):
        p = category_edges(label, 11, radius, ignore=())
        assert (p & ~category_edges(label, 11, radius)).sum() > 50
        np.savez(camvid / "maps" / "a.npz", probability=255 * p.astype(np.uint8))
        arguments = ("--truth", f"camvid:{camvid}/set:val", "--predictions", camvid / "maps")
        code, result, _ = run(capsys, *arguments, "--mode", mode)
        assert code == 0
        assert result[mode]["mf_ods"] == 1


def test_void_reaches_as_far_as_an_edge_is_wide(camvid):
    truth = open_truth(f"camvid:{camvid}/set:val")
    for mode, radius in (("thin", 2), ("raw", 2)):
        mask = unknown(truth, 0, mode)
        ys, xs = np.nonzero(np.asarray(Image.open(camvid / "set" / "labels" / "a.png")) == 255)
        yy, xx = np.mgrid[: SIZE[0], : SIZE[1]]
        nearest = ((yy[..., None] - ys) ** 2 + (xx[..., None] - xs) ** 2).min(-1)
        assert (mask == (nearest <= radius**2)).all()
    assert not around(np.zeros((4, 4), bool), 2).any()


def test_the_ignore_bit_of_edge_labels_is_not_counted(tmp_path, capsys):
    edges = category_edges(regions(), 3)
    ignore = np.zeros(SIZE, bool)
    ignore[:, 40:] = True
    (tmp_path / "truth").mkdir()
    edge_codec.write(tmp_path / "truth" / "a.npz", edge_codec.pack(edges, ignore), 3)
    wrong = edges.copy()
    wrong[:, :, 40:] = np.random.default_rng(0).random((3, SIZE[0], 24)) < 0.5
    np.savez(tmp_path / "a.npz", probability=255 * wrong.astype(np.uint8))
    code, result, _ = run(capsys, "--truth", f"labels:{tmp_path}/truth:3", "--predictions", tmp_path)
    assert code == 0
    assert result["raw"]["mf_ods"] == 1
    counts = EdgeCounts(0.01, thin=False, classes=3)
    counts.add_classes(wrong, edges, ignore)
    assert counts.all_truth.max(1).tolist() == edges[:, :, :40].sum((1, 2)).tolist()
    assert counts.all_prediction.max(1).tolist() == edges[:, :, :40].sum((1, 2)).tolist()
    with pytest.raises(EdgeError, match="ignore is"):
        counts.add(wrong[0], edges[0], 0, ignore[:5])


def test_ignored_pixels_are_cut_with_the_margin_and_hold_for_every_annotator():
    rng = np.random.default_rng(3)
    truth, p = rng.random((2, 30, 30)) < 0.2, rng.random((30, 30))
    ignore = rng.random((30, 30)) < 0.3
    clean_truth, clean_p = truth & ~ignore, np.where(ignore, 0.0, p)
    for kwargs in ({"thin": True}, {"thin": False, "margin": 4}):
        ours, wanted = (EdgeCounts(0.03, **kwargs) for _ in range(2))
        ours.add(p, truth, ignore=ignore)
        wanted.add(clean_p, clean_truth)
        assert (ours.matched_truth == wanted.matched_truth).all()
        assert (ours.all_prediction == wanted.all_prediction).all()


# --------------------------------------------------------------------------------------- files of other tools
def palette_png(path, indices, palette):
    image = Image.fromarray(indices.astype(np.uint8), mode="P")
    image.putpalette(np.asarray(palette, np.uint8).ravel().tolist())
    image.save(path)


def test_a_palette_of_greys_is_applied_and_one_that_loses_levels_or_order_is_refused(tmp_path):
    p = np.clip(255 * gaussian_filter(seg2edge(regions()).astype(float), 1), 0, 255).astype(np.uint8)
    turned = np.arange(255, -1, -1)
    palette_png(tmp_path / "a.png", 255 - p, np.repeat(turned[:, None], 3, 1))
    read = Predictions(tmp_path, ("boundary",)).read
    assert (read("a", SIZE)[0] == p).all()
    values, indices = np.unique(p // 17, return_inverse=True)
    greys = np.repeat((17 * values)[:, None], 3, 1)
    palette_png(tmp_path / "few.png", indices.reshape(SIZE), greys)
    with pytest.raises(EdgeError, match="greys: levels were merged"):
        read("few", SIZE)
    palette_png(tmp_path / "two.png", p > 100, [[0, 0, 0], [255, 255, 255]])
    assert (read("two", SIZE)[0] == 255 * (p > 100)).all()
    palette_png(tmp_path / "colours.png", p // 64, [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]])
    with pytest.raises(EdgeError, match="palette of colours"):
        read("colours", SIZE)


def test_an_inverted_map_is_scored_with_a_warning_that_names_it(tmp_path, capsys):
    edge = seg2edge(regions())
    (tmp_path / "truth").mkdir()
    Image.fromarray((255 * edge).astype(np.uint8)).save(tmp_path / "truth" / "a.png")
    for name, p in (("right", 255 * edge), ("dark", 255 - 255 * edge)):
        (tmp_path / name).mkdir()
        Image.fromarray(p.astype(np.uint8)).save(tmp_path / name / "a.png")
        arguments = ("--truth", f"labels:{tmp_path}/truth:1", "--predictions", tmp_path / name)
        code, _, err = run(capsys, *arguments, "--mode", "thin")
        assert code == 0
        assert ("inverted" in err and "a is one" in err and err.count("\n") == 1) == (name == "dark")
    assert inverted(np.full((3, 3), 0.6))
    assert not inverted(np.full((3, 3), 127, np.uint8))
    assert not inverted(np.zeros((0, 3)))


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "ones"])
def test_a_black_and_white_drawing_is_one_annotator(tmp_path, mode):
    edge = thin(seg2edge(regions()))
    (tmp_path / "edges").mkdir()
    image = Image.fromarray((edge * (1 if mode == "ones" else 255)).astype(np.uint8))
    if mode == "P":
        palette_png(tmp_path / "edges" / "a.png", edge, [[0, 0, 0], [255, 255, 255]])
    else:
        image = image.convert("L" if mode == "ones" else mode, dither=Image.Dither.NONE)
        image.save(tmp_path / "edges" / "a.png")
    assert (open_truth(f"labels:{tmp_path}/edges:1").truth(0, "thin") == edge[None]).all()
    if mode != "RGB":
        assert (open_truth(f"bsds:{tmp_path}").truth(0, "thin") == edge[None]).all()


def test_other_pictures_are_still_refused_as_truth(tmp_path):
    soft = np.clip(255 * gaussian_filter(seg2edge(regions()).astype(float), 1), 0, 255).astype(np.uint8)
    Image.fromarray(soft).save(tmp_path / "a.png")
    for classes in (1, 3):
        with pytest.raises(EdgeError, match="24-bit label is RGB"):
            open_truth(f"labels:{tmp_path}:{classes}").truth(0, "thin")
    (tmp_path / "edges").mkdir()
    Image.fromarray(soft.astype(np.uint16) * 256).save(tmp_path / "edges" / "a.png")
    with pytest.raises(EdgeError, match="8-bit"):
        open_truth(f"bsds:{tmp_path}").truth(0, "thin")
    # DFF's bit of class 0 is (0, 0, 1), no drawing
    bits = edge_codec.pack(seg2edge(regions())[None])
    edge_codec.write(tmp_path / "a.png", bits, 1)
    assert (edge_codec.read(tmp_path / "a.png", 1) == bits).all()


@pytest.fixture
def cityscapes(tmp_path):
    folder = tmp_path / "gtFine" / "val" / "ulm"
    folder.mkdir(parents=True)
    ids = np.full((24, 40), 7, np.uint8)
    ids[:, 20:] = 26
    instances = np.where(ids == 26, 26000, 7).astype(np.uint16)
    instances[:12, 20:] = 26001
    ids[:, :2], instances[:, :2] = 3, 3

    def write(ids=ids, instances=instances):
        Image.fromarray(ids).save(folder / "a_gtFine_labelIds.png")
        Image.fromarray(instances).save(folder / "a_gtFine_instanceIds.png")
        return open_truth(f"cityscapes:{tmp_path}:val")

    return write, ids, instances


def test_ids_that_are_not_those_of_the_file_s_name_are_refused(cityscapes):
    write, ids, instances = cityscapes
    assert write().truth(0, "raw").any()
    with pytest.raises(EdgeError, match="8 bits"):
        write(instances=instances.astype(np.uint8)).truth(0, "raw")
    with pytest.raises(EdgeError, match="trainIds"):
        write(ids=np.where(ids == 7, 0, np.where(ids == 26, 13, 255)).astype(np.uint8)).truth(0, "thin")
    with pytest.raises(EdgeError, match="another image"):
        write(ids=np.ascontiguousarray(ids[:, ::-1])).truth(0, "thin")
    with pytest.raises(EdgeError, match="another image"):
        write(instances=instances[:12]).truth(0, "thin")


# --------------------------------------------------------------------------------------------- class borders
def test_class_borders_leave_out_what_lies_between_two_cars(cityscapes):
    write, _, _ = cityscapes
    truth = write()
    with_instances = {mode: truth.truth(0, mode) for mode in ("raw", "thin")}
    truth.protocol = PROTOCOLS["cityscapes-cls"]
    without = {mode: truth.truth(0, mode) for mode in ("raw", "thin")}
    for mode in ("raw", "thin"):
        assert with_instances[mode][13, 4:8, 14:].any()  # two cars meet at row 12 of 24
        assert not without[mode][13, :, 14:].any()
        assert without[mode][13, :, 9:11].any()
        assert not without[mode][:, :, :3].any()  # nothing along the rectification border
    assert set(np.flatnonzero(without["raw"].any((1, 2)))) == {0, 13}


def test_sbd_s_class_borders_are_those_of_its_class_files(tmp_path, capsys):
    for folder in ("cls", "inst"):
        (tmp_path / folder).mkdir()
    categories = np.zeros((30, 40), np.uint8)
    categories[8:20, 8:30] = 15
    boundaries = np.empty((20, 1), object)
    for k in range(20):
        boundaries[k, 0] = csc_matrix(thin(seg2edge(categories == k + 1, 1)))
    savemat(tmp_path / "cls" / "a.mat", {"GTcls": {"Segmentation": categories, "Boundaries": boundaries}})
    (tmp_path / "val.txt").write_text("a")
    truth = open_truth(f"sbd:{tmp_path}:val")
    truth.protocol = PROTOCOLS["sbd-cls"]
    assert (truth.truth(0, "raw")[14] == seg2edge(categories == 15)).all()
    assert (truth.truth(0, "thin")[14] == boundaries[14, 0].toarray()).all()
    assert truth.truth(0, "raw").sum() == truth.truth(0, "raw")[14].sum()
    np.savez(tmp_path / "a.npz", probability=255 * truth.truth(0, "raw").astype(np.uint8))
    arguments = ("--truth", f"sbd:{tmp_path}:val", "--predictions", tmp_path, "--protocol")
    code, result, _ = run(capsys, *arguments, "sbd-cls")
    assert code == 0
    assert result["raw"]["mf_ods"] == 1
    assert result["raw"]["margin"] == 5
    code, _, err = run(capsys, *arguments, "cityscapes-cls")
    assert code == 1
    assert "cityscapes:" in err


# ----------------------------------------------------------------------------------------------- suppression
def test_a_ridge_of_any_direction_is_thinned_to_its_crest():
    yy, xx = np.mgrid[:61, :61] - 30.0
    for degrees in (0, 20, 45, 70, 90, 110, 135, 160):
        normal = np.deg2rad(degrees)
        away = np.cos(normal) * xx + np.sin(normal) * yy
        p = 0.9 * np.exp(-(away**2) / (2 * 2.0**2))
        middle = np.s_[15:46, 15:46]
        published = np.arctan(np.tan(normal) ** 2) * np.sign(np.cos(normal) * np.sin(normal) or 1)
        difference = (across(p)[middle] - published)[np.abs(away[middle]) < 1]
        assert np.abs(np.sin(difference)).max() < 0.02
        left = nms(p)
        assert np.abs(away[left > 0.05]).max() <= 1.0
        assert (left[middle][np.abs(away[middle]) < 0.3] > 0).all()


def test_suppression_fades_borders_and_a_factor_of_one_keeps_less():
    p = np.random.default_rng(0).random((40, 50))
    full, faded = nms(p, border=0), nms(p)
    assert (faded[5:-5, 5:-5] == full[5:-5, 5:-5]).all()
    assert (faded[0] == 0).all()
    assert (faded[:, -1] == 0).all()
    np.testing.assert_allclose(faded[2, 6:-6], full[2, 6:-6] * 2 / 5)
    assert (nms(p, multiplier=1.0) > 0).sum() <= (full > 0).sum()
    assert (nms(p, radius=2) > 0).sum() < (full > 0).sum()
    assert set(np.unique(full[full > 0])) <= set(p.ravel())
    np.testing.assert_allclose(nms(np.rint(255 * p).astype(np.uint8)), nms(np.rint(255 * p) / 255.0))


@pytest.mark.parametrize(
    ("bad", "more"),
    [
        (np.zeros((2, 9)), {}),
        (np.zeros((9, 9), int), {}),
        (np.full((9, 9), np.nan), {}),
        (np.zeros((9, 9)), {"radius": 0}),
        (np.zeros((9, 9)), {"multiplier": 0.0}),
    ],
)
def test_what_cannot_be_suppressed_is_named(bad, more):
    with pytest.raises(EdgeError, match="nms"):
        nms(bad, **more)


def test_a_detector_with_skirts_to_one_side_scores_higher_after_suppression(tmp_path, capsys):
    """At the threshold that the weak ridge needs, thinning moves the strong one into its skirt."""
    truth = np.zeros((80, 120), bool)
    truth[10:70, 30] = truth[10:70, 80] = True
    p = np.zeros(truth.shape)
    for column, height in ((30, 1.0), (80, 0.3)):
        for d in range(20):
            p[10:70, column + d] = np.maximum(p[10:70, column + d], height * np.exp(-d / 8))
        p[10:70, column - 1] = 0.5 * height
    (tmp_path / "truth").mkdir()
    Image.fromarray((255 * truth).astype(np.uint8)).save(tmp_path / "truth" / "a.png")
    Image.fromarray(np.rint(255 * p).astype(np.uint8)).save(tmp_path / "a.png")
    arguments = ("--truth", f"labels:{tmp_path}/truth:1", "--predictions", tmp_path, "--mode", "thin")
    plain, suppressed = (run(capsys, *arguments, *more)[1]["thin"]["mf_ods"] for more in ((), ("--nms",)))
    assert suppressed > plain + 0.1
    assert suppressed > 0.9


# ---------------------------------------------------------------------------------------------- boundary IoU
def test_boundary_iou_is_the_iou_of_the_inner_bands():
    truth = np.zeros((40, 60), np.uint8)
    truth[10:30, 15:45] = 1
    ours = np.roll(truth, 1, 1)
    score = BoundaryIoU(2, ratio=2 / np.hypot(40, 60)).add(truth, ours)

    def band(mask):
        out = np.zeros_like(mask)
        for y, x in np.argwhere(mask):
            window = mask[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
            out[y, x] = window.size < 25 or not window.all()
        return out

    for c in (0, 1):
        a, b = band(truth == c), band(ours == c)
        assert score.iou()[c] == pytest.approx((a & b).sum() / (a | b).sum())
    assert score.mean() == pytest.approx(score.iou().mean())
    same = BoundaryIoU(2, 0.02).add(truth, truth)
    assert same.iou().tolist() == [1, 1]


def test_boundary_iou_does_not_count_void_and_adds_up():
    truth = regions().astype(np.uint8)
    wrong = truth.copy()
    truth[5:20, 5:30] = 255
    wrong[6:19, 6:29] = 2
    assert BoundaryIoU(3, 0.01).add(truth, wrong).iou().tolist() == [1, 1, 1]
    other = regions(1)
    whole = BoundaryIoU(4).add(truth, wrong).add(other, np.roll(other, 2, 0))
    parts = BoundaryIoU(4).add(truth, wrong).merge(BoundaryIoU(4).add(other, np.roll(other, 2, 0)))
    assert (whole.both == parts.both).all()
    assert (whole.either == parts.either).all()
    assert np.isnan(whole.iou()[3])
    for bad in (
        lambda: BoundaryIoU(3, 0),
        lambda: BoundaryIoU(0),
        lambda: whole.merge(BoundaryIoU(3)),
        lambda: whole.add(truth, wrong[:5]),
        lambda: whole.add(truth, wrong / 2),
    ):
        with pytest.raises(ValueError):
            bad()
