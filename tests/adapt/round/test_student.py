"""A training that ends near its parent: the mean of both networks' weights, statistics as they were."""

from __future__ import annotations

import numpy as np
import pytest

from adapt.round import RoundConfig, RoundError, adapt


def test_a_share_of_the_parents_weights_stays(toy_pack, dark_frames, tmp_path):
    told = {
        "portions": (0.3,),
        "steps": 3,
        "target": 2,
        "source_free": True,
        "bn": "frozen",
        "rate": 2e-3,
        "threads": 1,
        "force": True,
    }
    student, near = (
        adapt(toy_pack, dark_frames, config=RoundConfig(**told, keep_parent=keep), out=tmp_path / str(keep))
        for keep in (0.0, 0.75)
    )
    parent, free, held = (p.network() for p in (toy_pack, student.pack, near.pack))
    moved = 0.0
    for (name, w), (_, s), (_, h) in zip(
        parent.named_parameters(), free.named_parameters(), held.named_parameters(), strict=True
    ):
        expected = 0.75 * w.detach().numpy() + 0.25 * s.detach().numpy()
        np.testing.assert_allclose(h.detach().numpy(), expected, atol=1e-6, err_msg=name)
        moved = max(moved, float((s - w).detach().abs().max()))
    assert moved > 1e-3  # the training did move them
    for (name, s), (_, h) in zip(free.named_buffers(), held.named_buffers(), strict=True):
        np.testing.assert_array_equal(h.numpy(), s.numpy(), err_msg=name)
    assert near.report["distance"] == pytest.approx(0.25 * student.report["distance"], rel=0.05)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(RoundError, match="keep_parent"):
        RoundConfig(keep_parent=share)
