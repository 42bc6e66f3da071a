"""The published solvers' answers on given inputs: matched counts."""

from __future__ import annotations

import numpy as np
import pytest

from adapt.evaluate.edges import match
from adapt.evaluate.matching import match_min_cost
from adapt.evaluate.thinning import thin

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
