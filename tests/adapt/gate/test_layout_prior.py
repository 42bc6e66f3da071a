"""Streets are told from what is none by where their labels lie."""

from __future__ import annotations

import numpy as np
import pytest

from adapt.data.street import scenes
from adapt.gate.layout_prior import Layout
from adapt.gate.limits import Limits
from adapt.gate.segmentation import decide
from adapt.train.priors import class_shares, spatial_prior
from tests.adapt.conftest import toy_spec
from tests.adapt.gate.test_segmentation import measures

CLASSES = len(scenes.CLASSES)


@pytest.fixture(scope="module")
def labels() -> list[np.ndarray]:
    return [scenes.render(s, "day", (64, 128))[1] for s in range(40)]


def test_streets_score_as_streets_and_upside_down_ones_do_not(labels):
    layout = Layout.of_labels(labels[:30], CLASSES)
    own = layout.scores(labels[30:])
    assert abs(own.mean() - layout.mean) < 2 * layout.spread
    turned = layout.scores([y[::-1] for y in labels[30:]])
    assert turned.max() < own.min()
    assert turned.mean() < layout.mean - 4 * layout.spread


@pytest.mark.parametrize("known", [10, 20])
def test_other_streets_are_no_foreign_ones_where_few_are_known(labels, known):
    """Forty streets of CamVid called 88 % of its dusk foreign: they had been scored by themselves."""
    layout = Layout.of_labels(labels[:known], CLASSES)
    limit = layout.mean - Limits().foreign_candidate * layout.spread
    assert (layout.scores(labels[known:]) < limit).mean() <= 0.1
    assert (layout.scores([y[::-1] for y in labels]) < limit).mean() >= 0.9


def test_a_known_likelihood():
    """Half the labels say 0 and half 1: a pixel has P = 1/2, and 1/3 among the three other maps."""
    maps = [np.full((32, 64), k, np.uint8) for k in (0, 1, 0, 1)]
    layout = Layout.of_labels(maps, 3)
    assert layout.scores(maps) == pytest.approx(np.log(0.5))
    assert layout.mean == pytest.approx(np.log(1 / 3))
    assert layout.spread == pytest.approx(0.0, abs=1e-12)
    lone = Layout.of_labels(maps[:1], 3)
    assert lone.mean == pytest.approx(0.0)
    assert lone.spread > 0.1  # one map tells nothing of others
    assert layout.scores([np.full((32, 64), 2, np.uint8)])[0] == pytest.approx(np.log(1e-4))
    assert layout.scores([np.full((32, 64), 255, np.uint8)])[0] == 0.0  # nothing is known of it
    with pytest.raises(ValueError, match="no label map"):
        Layout.of_labels([], 3)


def test_a_pack_without_frames_has_a_layout_in_its_prior(labels):
    prior, share = spatial_prior(labels, CLASSES), class_shares(labels, CLASSES)
    layout = Layout.of_prior(prior, share)
    own = layout.scores(labels)
    assert abs(own.mean() - layout.mean) < 0.5
    assert layout.scores([y[::-1] for y in labels]).mean() < own.mean() - 1


def test_foreign_frames_fail_the_gate():
    layout = Layout(np.zeros((4, 32, 64)), -1.0, 0.2)
    wild, calm = np.array([-2.5] * 3 + [-1.0] * 7), np.full(10, -1.1)

    def failed(parent: np.ndarray, candidate: np.ndarray) -> list[str]:
        a, b = measures(layouts=candidate), measures(layouts=parent)
        checks = decide(a, a, b, 0.02, toy_spec(), Limits(), layout=layout)
        return [c.name for c in checks if not c.passed]

    assert failed(wild, wild) == ["layout"]
    assert failed(wild, calm) == []  # odd to the old network, a street to the new one: that is the shift
    assert failed(calm, wild) == []
