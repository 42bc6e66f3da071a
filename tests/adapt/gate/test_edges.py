"""The gate of edges against candidates that were made bad on purpose; a good one passes."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adapt.data.base import read_frame, read_label
from adapt.gate.edges import EdgeMeasures, decide, distances, measure
from adapt.gate.limits import EdgeLimits
from adapt.round import edges
from adapt.round.edges import EdgeRoundError, adapt_edges
from tests.adapt.conftest import toy_scene
from tests.adapt.edges_toys import ANY, quick

ANY_BUT_LABELLED = dataclasses.replace(ANY, labelled_drop=EdgeLimits.labelled_drop)

WIDE = (
    0.06  # 4.3 pixels here: what moved by 3 passes at this distance, as it does at .0075 of a camera's frame
)


class Planted(torch.nn.Module):
    """A network whose fused edge logits are changed, at full resolution."""

    size_multiple = 32

    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = network, change

    def sides(self, x):
        a5, fused = self.network.sides(x)
        return a5, self.change(F.interpolate(fused, x.shape[2:], mode="bilinear", align_corners=False))


BAD = {
    "classes changed places": lambda f: f[:, [1, 2, 3, 0]],
    "edges and no edges flipped": lambda f: -f,
    "all zero": lambda f: torch.full_like(f, -30.0),
    "all one": lambda f: torch.full_like(f, 30.0),
    "3 pixels down": lambda f: torch.roll(f, 3, 2),
    "not a number": lambda f: f * float("nan"),
}


@pytest.fixture(scope="module")
def holdouts(joint_pack):
    """Labelled frames by day, and target frames whose pseudo-labels are right but for a hole."""
    day = [(read_frame(f), read_label(y)) for f, y in joint_pack.replay("holdout")]
    target = [toy_scene(500 + i) for i in range(3)]
    for _, label in target:
        label[:, :6] = 255
    return day, target


def measured(pack, holdouts, change):
    day, target = holdouts
    return measure(
        Planted(pack.network(), change),
        pack.spec,
        source=day,
        target=target,
        labelled=target,
        max_distance=WIDE,
        limits=EdgeLimits(),
    )


@pytest.fixture(scope="module")
def before(joint_pack, holdouts):
    found = measured(joint_pack, holdouts, lambda f: f)
    assert EdgeMeasures.of(found.numbers()).numbers() == found.numbers()
    return found


def failed(before, after, *without, limits=None):
    """Names of the checks that fail where some hold-outs do not exist."""
    gone = {f"{name}{suffix}": math.nan for name in without for suffix in ("", "_tight")}
    checks = decide(after, dataclasses.replace(before, **gone), limits or EdgeLimits(), ["a", "b", "c", "d"])
    return {c.name for c in checks if not c.passed}


@pytest.mark.parametrize("name", BAD)
def test_a_planted_bad_candidate_is_refused_with_and_without_a_source(joint_pack, holdouts, before, name):
    after = measured(joint_pack, holdouts, BAD[name])
    if name == "not a number":
        assert failed(before, after) == {"edges-finite"}
        assert "NaN" not in json.dumps(after.numbers())
        assert np.isnan(EdgeMeasures.of(after.numbers()).share).all()
        return
    known = failed(before, after)
    assert {"edges-source-tight", "edges-pseudo-tight", "edges-labelled-tight"} <= known
    assert failed(before, after, "source", "labelled"), "no labelled frame at all"
    assert "edges-labelled-tight" in failed(before, after, "source", limits=ANY_BUT_LABELLED)
    if name == "all zero":
        assert "edges-vanished" in known
    if name in ("all one", "edges and no edges flipped"):
        assert "edges-flood" in known
    if "pixels" in name:
        assert "edges-source" not in known, "the wide distance alone would have let it pass"


def test_what_did_not_change_passes(before):
    assert failed(before, before) == set()


def test_the_tight_distance_is_in_pixels_and_never_the_wider_one():
    wide, tight = distances((480, 640), 0.0075, 2.0)
    assert (wide, tight * 800) == (0.0075, pytest.approx(2.0))
    assert distances((32, 64), 0.0075, 2.0) == (0.0075, 0.0075)


def test_a_round_that_learnt_flipped_labels_is_refused_and_says_so(joint_pack, tmp_path, monkeypatch):
    original = edges.crops_of_segmentation

    def flipped(pairs, classes, augmentation):
        wrong = [(x, np.where(y == 255, 255, (y + 1) % classes).astype(np.uint8)) for x, y in pairs]
        return original(wrong, classes, augmentation)

    monkeypatch.setattr(edges, "crops_of_segmentation", flipped)
    frames = [toy_scene(600 + i)[0] for i in range(8)]
    labelled = [toy_scene(700 + i) for i in range(2)]
    config = quick(steps=30, batch=4, rate=1e-2, alignment=False, max_distance=WIDE)
    result = adapt_edges(joint_pack, frames, config=config, out=tmp_path / "o", labelled=labelled)
    assert not result.accepted
    assert result.pack is None
    assert {"edges-source", "edges-labelled"} <= set(result.report["gate"]["failed"])
    before, after = (result.report[f"{k}_measures"] for k in ("parent", "candidate"))
    assert after["labelled"] < before["labelled"]
    told = {c["name"]: c for c in result.report["gate"]["checks"]}
    assert told["edges-labelled"]["value"] == pytest.approx(before["labelled"] - after["labelled"], abs=1e-4)
    assert "MF on the labelled hold-out" in told["edges-labelled"]["reason"]


def test_a_round_by_day_passes_the_limits_as_they_are(joint_pack, tmp_path):
    frames = [toy_scene(600 + i)[0] for i in range(8)]
    config = quick(steps=8, batch=4, rate=1e-3, max_distance=WIDE)
    result = adapt_edges(joint_pack, frames, config=config, out=tmp_path / "o")
    assert result.report["gate"]["failed"] == []
    assert result.accepted


def test_frames_the_gate_judges_by_are_not_learnt_from(joint_pack, tmp_path):
    frames = [toy_scene(600 + i)[0] for i in range(5)]
    with pytest.raises(EdgeRoundError, match="frame 2 is also frame 0 of the labelled hold-out"):
        adapt_edges(joint_pack, frames, out=tmp_path / "o", config=quick(), labelled=[toy_scene(602)])
    day = read_frame(joint_pack.replay("holdout")[1][0])
    with pytest.raises(EdgeRoundError, match="frame 5 is also frame 1 of the source hold-out"):
        adapt_edges(joint_pack, [*frames, day], out=tmp_path / "o", config=quick())
    assert not (tmp_path / "o").exists()
