"""Count tables: scores against a slow transcription of the benchmark, merging, bad input."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from adapt.evaluate.edges import PROTOCOLS, EdgeCounts, EdgeError, levels_of, match
from adapt.labels.thinning import thin


def scene(rng, size=(40, 56)):
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.normal(size=size), 5)
    region = field > 0
    truth = region ^ np.roll(region, 1, 0)
    truth |= region ^ np.roll(region, 1, 1)
    p = gaussian_filter(np.roll(truth, 1, 1) + 0.4 * rng.random(size), 1.0)
    return np.clip(p / p.max(), 0, 1).astype(np.float32), truth


def slow_scores(images, max_distance, thinned):
    """The benchmark, threshold by threshold, with its loops left in."""
    f = lambda p, r: 2 * p * r / (p + r) if p + r else 0.0  # noqa: E731
    totals = np.zeros((99, 4))
    best = np.zeros(4)
    for p, truth in images:
        truth = thin(truth) if thinned else truth
        rows = []
        for k in range(1, 100):
            mask = p >= np.float32(k / 100)
            mask = thin(mask) if thinned else mask
            m = match(mask, truth, max_distance)
            rows.append([m, truth.sum(), m, mask.sum()])
        rows = np.array(rows, float)
        totals += rows
        values = [f(r[2] / max(r[3], 1), r[0] / max(r[1], 1)) for r in rows]
        best += rows[max(i for i in range(99) if values[i] == max(values))]
    recall = totals[:, 0] / np.maximum(totals[:, 1], 1)
    precision = totals[:, 2] / np.maximum(totals[:, 3], 1)
    ods = f(precision[0], recall[0])
    for i in range(1, 99):
        for d in np.linspace(0, 1, 100):
            ods = max(
                ods,
                f(precision[i] * d + precision[i - 1] * (1 - d), recall[i] * d + recall[i - 1] * (1 - d)),
            )
    ois = f(best[2] / max(best[3], 1), best[0] / max(best[1], 1))
    curve = sorted(dict(zip(recall[::-1], precision[::-1], strict=True)).items())
    area = 0.0
    for i in range(101):
        r = i / 100
        for (r0, p0), (r1, p1) in itertools.pairwise(curve):
            if r0 <= r <= r1:
                area += 0.01 * (p0 + (p1 - p0) * (r - r0) / (r1 - r0))
                break
    return ods, ois, area


@pytest.mark.parametrize("thinned", [True, False])
def test_scores_equal_the_benchmark_written_out(thinned):
    rng = np.random.default_rng(3)
    images = [scene(rng) for _ in range(3)]
    table = EdgeCounts(0.03, thin=thinned)
    for p, truth in images:
        table.add(p, truth)
    ods, ois, area = slow_scores(images, 0.03, thinned)
    assert 0.3 < ods < 1
    assert table.ods() == pytest.approx(ods, abs=1e-9)
    assert table.ois() == pytest.approx(ois, abs=1e-12)
    assert table.ap() == pytest.approx(area, abs=1e-9)


def test_merged_shards_equal_one_table_and_survive_a_file(tmp_path):
    rng = np.random.default_rng(4)
    images = [scene(rng) for _ in range(4)]
    whole = EdgeCounts(0.02, classes=2)
    shards = [EdgeCounts(0.02, classes=2) for _ in range(2)]
    for i, (p, truth) in enumerate(images):
        for table in (whole, shards[i % 2]):
            table.add_classes(np.stack([p, p[::-1]]), np.stack([truth, truth]))
    shards[1].save(tmp_path / "shard.npz")
    merged = shards[0].merge(EdgeCounts.load(tmp_path / "shard.npz"))
    assert merged.scores() == whole.scores()
    assert merged.images.tolist() == [4, 4]


def test_a_perfect_map_scores_one_and_a_silent_one_nought():
    rng = np.random.default_rng(5)
    _, truth = scene(rng)
    perfect, silent = EdgeCounts(), EdgeCounts()
    perfect.add(truth, truth)
    silent.add(np.zeros(truth.shape), truth)
    assert perfect.ods() == perfect.ois() == 1.0
    assert silent.ods() == silent.ois() == silent.ap() == 0.0


def test_an_image_without_the_class_adds_false_positives_only():
    rng = np.random.default_rng(6)
    p, truth = scene(rng)
    table, worse = EdgeCounts(), EdgeCounts()
    table.add(p, truth)
    worse.add(p, truth)
    worse.add(p, np.zeros_like(truth))
    assert (worse.all_truth == table.all_truth).all()
    assert (worse.all_prediction == 2 * table.all_prediction).all()
    assert worse.ods() < table.ods()


def test_a_class_absent_from_the_truth_has_no_score_and_no_part_in_the_mean():
    rng = np.random.default_rng(7)
    p, truth = scene(rng)
    table = EdgeCounts(classes=2)
    table.add_classes(np.stack([p, p]), np.stack([truth, np.zeros_like(truth)]))
    scores = table.scores()
    assert math.isnan(scores[1].ods)
    assert scores[1].truth_pixels == 0
    assert table.ods() == scores[0].ods
    empty = EdgeCounts()
    empty.add(p, np.zeros_like(truth))
    for ask in (empty.ods, empty.ois, empty.ap):
        with pytest.raises(EdgeError, match="no truth pixel"):
            ask()


def test_uint8_and_its_float_quotients_are_on_at_the_same_thresholds():
    v = np.arange(256, dtype=np.uint8)[None]
    exact = np.array([[sum(int(x) * 100 >= 255 * k for k in range(1, 100)) for x in range(256)]])
    assert (levels_of(v) == exact).all()
    assert (levels_of(v / 255.0) == exact).all()
    for dtype in (np.float32, np.float64):
        k = (np.arange(1, 100) / 100).astype(dtype)[None]
        assert (levels_of(k) == np.arange(1, 100)).all()
        assert (levels_of(np.nextafter(k, dtype(0))) == np.arange(0, 99)).all()
    assert levels_of(np.array([[0.0, 1.0]])).tolist() == [[0, 99]]


def test_the_margin_is_cut_before_the_diagonal_is_taken():
    truth, p = np.zeros((2, 40, 40), bool)
    truth[20, 10:30] = True
    p[20:23:2, 10:30] = True
    p[0], truth[:, 0] = True, True
    table = EdgeCounts(0.02, thin=False, margin=5)
    table.add(p, truth)
    assert table.all_truth[0, 0] == 20
    assert table.all_prediction[0, 0] == 40
    assert table.matched_truth[0, 0] == 20


def test_protocols_are_the_published_ones():
    assert {n: (p.max_distance, p.margin, p.scale) for n, p in PROTOCOLS.items()} == {
        "sbd": (0.02, 5, 1.0),
        "sbd-reanno": (0.0075, 5, 1.0),
        "cityscapes": (0.0035, 0, 0.5),
        "sbd-cls": (0.02, 5, 1.0),
        "cityscapes-cls": (0.02, 0, 0.5),
        "bsds": (0.0075, 0, 1.0),
    }
    assert EdgeCounts.of("sbd", classes=20).margin == 5
    with pytest.raises(EdgeError, match="no protocol"):
        EdgeCounts.of("coco")


def test_bad_input_is_named_and_leaves_the_table_as_it_was(tmp_path):
    truth = np.zeros((20, 20), bool)
    truth[10] = True
    p = truth.astype(np.float32)
    nan = p.copy()
    nan[3, 3] = np.nan
    table = EdgeCounts(margin=2)
    cases = [
        (nan, truth, "NaN"),
        (p * 3, truth, "sigmoids"),
        (p - 1, truth, "sigmoids"),
        (p.astype(np.int32), truth, "int32"),
        (p[:-1], truth, "resize"),
        (p, truth.astype(np.uint8), "bool"),
        (p[:4], truth[:4], "margin"),
    ]
    for probability, mask, word in cases:
        with pytest.raises(EdgeError, match=word) as caught:
            table.add(probability, mask)
        assert "\n" not in str(caught.value)
    with pytest.raises(EdgeError, match="class 1"):
        table.add(p, truth, 1)
    with pytest.raises(EdgeError, match="classes"):
        table.add_classes(np.stack([p, p]), np.stack([truth, truth]))
    with pytest.raises(EdgeError, match="merge"):
        table.merge(EdgeCounts(0.01, margin=2))
    with pytest.raises(EdgeError, match="cannot merge a int"):
        table.merge(3)
    with pytest.raises(EdgeError, match="max_distance"):
        EdgeCounts(float("nan"))
    (tmp_path / "x.npz").write_bytes(b"not a table")
    with pytest.raises(EdgeError, match="not a saved"):
        EdgeCounts.load(tmp_path / "x.npz")
    assert not table.images.any()
    assert not table.all_prediction.any()
