"""The published quirks one by one, by hand; LRENT against its objective."""

from __future__ import annotations

import numpy as np
import pytest

from adapt.labels.cbst import ClassHistograms, pseudo_labels
from adapt.labels.lrent import soft_labels
from adapt.labels.published import PublishedThresholds, published_labels
from tests.adapt.labels.test_cbst import softmax_map


def two_class(values: list[float]) -> np.ndarray:
    first = np.array([values], np.float32)
    return np.stack([first, 1 - first])


def test_one_value_in_four_restarting_at_each_frame():
    """Of .9 .8 .7 .6 .95 the code keeps .9 and .95; a second frame starts anew with its first value."""
    frames = [two_class([0.9, 0.8, 0.7, 0.6, 0.95]), two_class([0.85, 0.99])]
    crst = PublishedThresholds(2, "crst")
    for p in frames:
        crst.add(p)
    # kept: .9 .95 .85; floor(3·⅔) = 2nd from the top
    assert crst.thresholds(2 / 3 + 1e-9)[0] == pytest.approx(0.9)
    assert crst.thresholds(0.3)[0] == 1.0  # floor(3·.3) = 0: switched off
    assert crst.thresholds(0.5)[1] == 1.0  # never predicted


def test_the_phantom_zero_of_cbst():
    """With it, three values count as four: floor(4·.3) = 1 where crst has floor(3·.3) = 0."""
    p = two_class([0.9, 0.8, 0.7])
    assert PublishedThresholds(2, "crst", rate=1).add(p).thresholds(0.3)[0] == 1.0
    assert PublishedThresholds(2, "cbst", rate=1).add(p).thresholds(0.3)[0] == pytest.approx(0.9)
    # the phantom itself is ranked last, and a threshold of 0 means off
    assert PublishedThresholds(2, "cbst", rate=1).add(p).thresholds(1.0)[0] == 1.0


def test_the_global_policy_pools_one_phantom_more_than_there_are_classes():
    p = two_class([0.9, 0.8, 0.7, 0.2])
    # values .9 .8 .8 .7 and three zeros: floor(7·.3) = 2nd
    assert PublishedThresholds(2, "cbst", rate=1).add(p).thresholds(0.3, "st").tolist() == pytest.approx(
        [0.8, 0.8]
    )
    # crst: four values, floor(4·.3) = 1st
    assert PublishedThresholds(2, "crst", rate=1).add(p).thresholds(0.3, "st").tolist() == pytest.approx(
        [0.9, 0.9]
    )


@pytest.mark.parametrize("portion", [0.15, 0.2, 0.5])
def test_without_the_sampling_crst_is_the_exact_rule(portion):
    maps = [softmax_map(i) for i in range(4)]
    exact, published = ClassHistograms(7), PublishedThresholds(7, "crst", rate=1)
    for p in maps:
        exact.add(p)
        published.add(p)
    lam = published.thresholds(portion)
    np.testing.assert_allclose(exact.thresholds(portion), lam, atol=2**-16)
    for p in maps:
        np.testing.assert_array_equal(published_labels(p, lam, "crst"), pseudo_labels(p, lam))


def test_the_sampled_threshold_is_off_where_neighbours_are_alike():
    """The published 1-in-4 sample misses by far more than the histogram's 2^-16."""
    ramp = np.linspace(0.55, 0.99, 400, dtype=np.float32)[::-1].reshape(20, 20)
    p = np.stack([ramp, 1 - ramp])
    exact = np.sort(ramp.reshape(-1))[::-1][int(400 * 0.01) - 1]
    ours = ClassHistograms(2).add(p).thresholds(0.01)[0]
    theirs = PublishedThresholds(2, "crst").add(p).thresholds(0.01)[0]
    assert abs(ours - exact) <= 2**-16
    assert abs(theirs - exact) > 100 * 2**-16


def test_an_unknown_code_and_shape_are_refused():
    with pytest.raises(ValueError, match="choose one of"):
        PublishedThresholds(2, "other")
    with pytest.raises(ValueError, match="expected"):
        PublishedThresholds(3, "crst").add(two_class([0.5]))


def objective(soft: np.ndarray, p: np.ndarray, lam: np.ndarray, alpha: float) -> float:
    """One pixel's terms of the paper's objective, to be minimised over the simplex and 0."""
    positive = soft > 0
    entropy = (soft[positive] * np.log(soft[positive])).sum()
    return float(-(soft * (np.log(p) - np.log(lam))).sum() + alpha * entropy)


def test_a_soft_label_is_the_minimum_of_the_objective():
    rng = np.random.default_rng(0)
    alpha, lam = 0.25, np.array([0.6, 0.3, 0.5])
    for seed in range(20):
        p = np.random.default_rng(seed).dirichlet([1, 1, 1])
        found = soft_labels(p.astype(np.float32)[:, None, None], lam, alpha)[:, 0, 0].astype(float)
        others = [objective(q, p, lam, alpha) for q in rng.dirichlet([1, 1, 1], 400)]
        if found.sum() > 0:
            assert found.sum() == pytest.approx(1, abs=1e-5)
            value = objective(found, p, lam, alpha)
            assert value <= min(others) + 1e-6
            assert value < 0  # better than no label, whose objective is 0
        else:
            assert min(others) > -1e-6


def test_a_small_alpha_gives_the_one_hot_labels_back():
    p, lam = softmax_map(3), np.full(7, 0.6)
    soft = soft_labels(p, lam, alpha=1e-3)
    hard = np.where(soft.sum(0) > 0, soft.argmax(0), 255)
    same = hard == pseudo_labels(p, lam)
    assert same.mean() > 0.995
    with pytest.raises(ValueError, match="more than 0"):
        soft_labels(p, lam, 0)
    p[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        soft_labels(p, lam)


def test_a_map_that_is_no_softmax_is_refused():
    broken = np.full((3, 2, 2), np.nan, np.float32)
    with pytest.raises(ValueError, match="NaN"):
        PublishedThresholds(3, "crst").add(broken)
    with pytest.raises(ValueError, match="NaN"):
        published_labels(broken, np.ones(3), "cbst")


@pytest.mark.parametrize("portion", [0, -0.2, 1.5, float("nan")])
def test_portions_and_policies_that_cannot_be(portion):
    found = PublishedThresholds(2, "crst").add(two_class([0.9, 0.8]))
    with pytest.raises(ValueError, match="portion"):
        found.thresholds(portion)
    with pytest.raises(ValueError, match="choose cbst or st"):
        found.thresholds(0.5, "both")


@pytest.mark.parametrize("lam", [[0.5], [0.5, 0.0], [0.5, float("nan")], [[0.5], [0.5]]])
def test_thresholds_that_do_not_fit_the_map_are_refused(lam):
    with pytest.raises(ValueError, match="λ positive"):
        published_labels(two_class([0.9, 0.8]), np.array(lam), "crst")
