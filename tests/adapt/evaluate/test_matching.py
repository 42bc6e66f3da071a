"""Thinning and matching against independent references: a naive thinning, dense assignment, the
definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from adapt.evaluate.counting import count_annotators, count_raw, count_thin
from adapt.evaluate.edges import EdgeError, match
from adapt.evaluate.matching import disc, match_min_cost, match_pairs
from adapt.evaluate.resize import resize_bicubic, resize_nearest
from adapt.labels.thinning import thin

maps = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda s: arrays(bool, s))
pairs = st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(
    lambda s: st.tuples(arrays(bool, s), arrays(bool, s))
)


def naive_thin(mask: np.ndarray) -> np.ndarray:
    """Guo and Hall's algorithm as their paper states it, one full pass after the other."""
    x = np.pad(mask, 1).astype(int)
    while True:
        before = x.copy()
        for second in (False, True):
            # p1..p8: east, then anticlockwise (y grows downwards)
            n = [
                np.roll(x, (dy, dx), (0, 1))
                for dy, dx in ((0, -1), (1, -1), (1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1))
            ]
            p = dict(enumerate(n, 1)) | {9: n[0]}
            crossing = sum((1 - p[i]) & (p[i + 1] | p[i + 2 if i < 7 else 1]) for i in (1, 3, 5, 7))
            n1 = sum(p[2 * k - 1] | p[2 * k] for k in (1, 2, 3, 4))
            n2 = sum(p[2 * k] | p[2 * k + 1] for k in (1, 2, 3, 4))
            smaller = np.minimum(n1, n2)
            turn = ((p[6] | p[7] | (1 - p[4])) & p[5]) if second else ((p[2] | p[3] | (1 - p[8])) & p[1])
            x = x & ~((crossing == 1) & (smaller >= 2) & (smaller <= 3) & (turn == 0))
            x[[0, -1]] = 0
            x[:, [0, -1]] = 0
        if (x == before).all():
            return x[1:-1, 1:-1].astype(bool)


def blob(rng: np.random.Generator, size: tuple[int, int] = (40, 50)) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    field = gaussian_filter(rng.normal(size=size), rng.uniform(0.5, 3))
    return field > np.quantile(field, rng.uniform(0.1, 0.9))


def graph(prediction: np.ndarray, truth: np.ndarray, max_distance: float) -> np.ndarray:
    radius = max_distance * np.hypot(*truth.shape)
    a, b = np.argwhere(prediction), np.argwhere(truth)
    return ((a[:, None] - b[None]) ** 2).sum(2) <= radius**2


def reference_match(prediction: np.ndarray, truth: np.ndarray, max_distance: float) -> int:
    edges = graph(prediction, truth, max_distance)
    rows, columns = linear_sum_assignment(edges.astype(float), maximize=True)
    return int(edges[rows, columns].sum())


@given(maps)
@settings(max_examples=60, deadline=None)
def test_thinning_equals_the_papers_algorithm_on_any_small_map(mask):
    assert (thin(mask) == naive_thin(mask)).all()


def test_thinning_equals_the_papers_algorithm_on_blobs_and_solid_maps():
    rng = np.random.default_rng(0)
    for mask in [blob(rng) for _ in range(12)] + [np.ones((31, 47), bool), np.zeros((5, 5), bool)]:
        skeleton = thin(mask)
        assert (skeleton == naive_thin(mask)).all()
        assert (thin(skeleton) == skeleton).all()
        assert not (skeleton & ~mask).any()


@pytest.mark.peers
def test_thinning_equals_scikit_image():
    morphology = pytest.importorskip("skimage.morphology", reason="scikit-image is not installed")
    rng = np.random.default_rng(3)
    for mask in [blob(rng, (80, 90)) for _ in range(60)] + [np.ones((50, 70), bool)]:
        assert (thin(mask) == morphology.thin(mask)).all()


def test_thinning_refuses_what_is_no_bool_map():
    with pytest.raises(EdgeError, match="bool"):
        thin(np.ones((3, 3), np.uint8))
    with pytest.raises(EdgeError, match="bool"):
        thin(np.ones(3, bool))


@given(pairs, st.sampled_from([0.0, 0.05, 0.15, 0.3, 0.7]))
@settings(max_examples=150, deadline=None)
def test_match_is_the_maximum_and_symmetric(masks, max_distance):
    a, b = masks
    assert match(a, b, max_distance) == reference_match(a, b, max_distance) == match(b, a, max_distance)


@given(pairs, st.sampled_from([0.1, 0.3]))
@settings(max_examples=60, deadline=None)
def test_pairs_are_one_to_one_within_reach(masks, max_distance):
    prediction, truth = masks
    for solve in (match_pairs, match_min_cost):
        a, b = solve(prediction, truth, max_distance)
        assert len(set(a.tolist())) == len(set(b.tolist())) == a.size == b.size
        assert prediction.ravel()[a].all()
        assert truth.ravel()[b].all()
        width = truth.shape[1]
        distance = np.hypot(a // width - b // width, a % width - b % width)
        assert (distance <= max_distance * np.hypot(*truth.shape) + 1e-12).all()


def test_crowded_ribbons_against_dense_assignment():
    rng = np.random.default_rng(1)
    for _ in range(8):
        prediction, truth = blob(rng, (24, 30)), blob(rng, (24, 30))
        assert match(prediction, truth, 0.06) == reference_match(prediction, truth, 0.06)


def test_min_cost_is_as_large_as_the_maximum_and_as_cheap_as_dense_assignment():
    rng = np.random.default_rng(2)
    for _ in range(6):
        prediction, truth = thin(blob(rng)), thin(blob(rng))
        a, b = match_min_cost(prediction, truth, 0.05)
        assert a.size == match(prediction, truth, 0.05)
        p, t = np.argwhere(prediction), np.argwhere(truth)
        distance = np.rint(100 * np.sqrt(((p[:, None] - t[None]) ** 2).sum(2)))
        cost = np.where(graph(prediction, truth, 0.05), distance, 1e6)
        rows, columns = linear_sum_assignment(cost)
        best = cost[rows, columns]
        width = truth.shape[1]
        ours = np.rint(100 * np.hypot(a // width - b // width, a % width - b % width)).sum()
        assert ours == best[best < 1e6].sum()


@given(
    st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
        lambda s: st.tuples(arrays(np.uint8, s, elements=st.integers(0, 99)), arrays(bool, s))
    )
)
@settings(max_examples=40, deadline=None)
def test_one_incremental_matching_answers_every_threshold(case):
    level, truth = case
    raw, thinned = count_raw(level, truth, 0.2), count_thin(level, truth, 0.2)
    for k in sorted(set(level.ravel().tolist()) | {1, 50, 99}):
        if k:
            mask = level >= k
            assert raw[:, k - 1].tolist() == [reference_match(mask, truth, 0.2), mask.sum()]
            mask = naive_thin(mask)
            assert thinned[:, k - 1].tolist() == [reference_match(mask, truth, 0.2), mask.sum()]


def test_annotators_are_ored_for_precision_and_added_for_recall():
    truths = np.zeros((2, 20, 20), bool)
    truths[0, 5, 2:18] = True
    truths[1, 14, 2:18] = True
    level = np.zeros((20, 20), np.uint8)
    level[5, 2:18] = 80
    level[14, 2:10] = 30
    counts, total = count_annotators(level, truths, 0.01)
    assert total == 32
    assert counts[:, 79].tolist() == [16, 16, 16]
    assert counts[:, 29].tolist() == [24, 24, 24]
    assert counts[:, 98].tolist() == [0, 0, 0]


def test_the_radius_is_not_rounded():
    a, b = np.zeros((2, 30, 40), bool)
    a[10, 10] = b[10, 13] = True
    diagonal = 50.0
    assert match(a, b, 3.0 / diagonal) == 1
    assert match(a, b, 2.9999 / diagonal) == 0
    dy, dx = disc(2.5)
    assert len(dy) == 21
    assert (np.diff(dy**2 + dx**2) >= 0).all()


def test_one_pixel_images_and_empty_maps():
    one = np.ones((1, 1), bool)
    assert match(one, one, 0.0) == 1
    assert match(one, ~one, 0.0075) == match(~one, one, 0.0075) == match(~one, ~one, 0.0075) == 0
    assert match_min_cost(~one, one, 0.01)[0].size == 0


@pytest.mark.parametrize(
    ("prediction", "truth", "max_distance", "word"),
    [
        (np.ones((4, 4), bool), np.ones((4, 5), bool), 0.01, "resize"),
        (np.ones((4, 4), np.uint8), np.ones((4, 4), bool), 0.01, "threshold it"),
        (np.ones((2, 4, 4), bool), np.ones((2, 4, 4), bool), 0.01, r"\[H,W\]"),
        (np.ones((0, 4), bool), np.ones((0, 4), bool), 0.01, "without a pixel"),
        (np.ones((4, 4), bool), np.ones((4, 4), bool), float("nan"), "max_distance"),
        (np.ones((4, 4), bool), np.ones((4, 4), bool), -1, "max_distance"),
        (np.ones((4, 4), bool), np.ones((4, 4), bool), 4.3, "fraction"),
    ],
)
def test_bad_input_is_named_in_one_line(prediction, truth, max_distance, word):
    with pytest.raises(EdgeError, match=word) as caught:
        match(prediction, truth, max_distance)
    assert "\n" not in str(caught.value)


def test_nearest_halving_keeps_the_odd_pixels_as_matlab_does():
    assert resize_nearest(np.arange(8)[None], (1, 4)).tolist() == [[1, 3, 5, 7]]


def test_bicubic_keeps_constants_and_lines_and_is_the_identity_at_equal_size():
    ramp = np.tile(np.arange(40.0), (6, 1))
    assert resize_bicubic(ramp, ramp.shape) is not None
    np.testing.assert_array_equal(resize_bicubic(ramp, ramp.shape), ramp)
    np.testing.assert_allclose(resize_bicubic(np.ones((7, 9)), (3, 20)), 1)
    half = resize_bicubic(ramp, (6, 20))
    np.testing.assert_allclose(half[:, 4:16], np.tile(np.arange(20) * 2 + 0.5, (6, 1))[:, 4:16])
