"""The published solvers' answers on given inputs: matched counts."""

from __future__ import annotations

import numpy as np
import pytest

from adapt.evaluate.edges import match
from adapt.evaluate.matching import match_min_cost
from adapt.labels.seal import align, tangents
from adapt.labels.thinning import thin

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def pairs(real_data):
    path = real_data / "edge_fixtures" / "match.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    return np.load(path)


@pytest.mark.parametrize("i", range(12))
def test_counts_reach_the_published_solver_and_exceed_it_by_half_a_percent_at_most(pairs, i):
    prediction, truth, distance = (
        pairs[f"prediction{i}"],
        pairs[f"truth{i}"],
        float(pairs[f"max_distance{i}"]),
    )
    ours, theirs = match(prediction, truth, distance), pairs[f"counts{i}"]
    assert theirs.max() <= ours <= theirs.max() * 1.005
    assert match_min_cost(prediction, truth, distance)[0].size == ours


def test_thinned_fixtures_are_fixed_points(pairs):
    for i in range(0, 12, 2):
        for name in ("prediction", "truth"):
            assert (thin(pairs[f"{name}{i}"]) == pairs[f"{name}{i}"]).all()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("seal_cityscapes", {"sigma_x": 1, "sigma_y": 3, "max_cost": 2, "smoothness": 0.02}),
        ("seal_sbd_no_smoothness", {"sigma_x": 1, "sigma_y": 4, "max_cost": 4.5, "smoothness": 0}),
    ],
)
def test_alignment_is_the_published_solvers(real_data, name, settings):
    path = real_data / "edge_fixtures" / f"{name}.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    given = np.load(path)
    np.testing.assert_allclose(tangents(given["gt"])[given["gt"]], given["tan"][given["gt"]], atol=1e-9)
    for solver, least in (("exact", 0.995), ("auction", 0.99)):
        aligned = align(given["gt"], given["prob"], tangents=given["tan"], solver=solver, **settings)
        assert aligned.sum() == given["aligned"].sum()
        assert (aligned & given["aligned"]).sum() >= least * given["aligned"].sum()
