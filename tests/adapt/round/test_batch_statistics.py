"""Which batch statistics a round takes, and by what."""

from __future__ import annotations

import numpy as np
import pytest

from adapt import batchnorm
from adapt.gate.measures import Measures
from adapt.round import RoundConfig, RoundError, SegmentationRound
from adapt.round.batch_statistics import TargetStatistics


def measures(share: list[float], *, flip: float = 0.8, variety: float = 3.0) -> Measures:
    return Measures(np.array(share), confidence=0.8, flip=flip, variety=variety, information=1.0)


def test_an_unknown_way_to_choose_is_refused() -> None:
    with pytest.raises(RoundError, match="adabn_by 'luck': choose auto, mirror, shares, translated or veto"):
        RoundConfig(adabn_by="luck")


# --------------------------------------------------------------------------- which of them a round takes
# Measured (bench.ordering's shifts, seed 0): mIoU on source hold-out frames in the target's colours, by the
# share of the old statistics that is kept.
DUSK = {1.0: (0.424, 0.870), 0.25: (0.448, 0.875), 0.5: (0.462, 0.866)}
CITYSCAPES = {1.0: (0.217, 0.926), 0.25: (0.206, 0.923), 0.5: (0.225, 0.934)}


def choice_of(pack, frames, out, seen, **settings) -> TargetStatistics:
    """That of a round whose measurements of statistics are `seen`: {kept share: (translated, flip)}."""
    shares = iter((1.0, *settings.get("adabn_keep", RoundConfig().adabn_keep)))

    def measure(network):
        translated, flip = seen[next(shares)]
        found = measures([0.25] * 4, flip=flip)
        found.translated = translated
        return found

    statistics = SegmentationRound(pack, frames, RoundConfig(**settings), out).statistics
    statistics.measure = measure
    return statistics


@pytest.mark.parametrize(
    ("seen", "kept", "words"),
    [
        (DUSK, 0.25, "a quarter is best for the target, though a half is best for translated frames"),
        (CITYSCAPES, 0.5, "a quarter loses, a half does not"),
        ({1.0: (0.4, 0.9), 0.25: (0.3, 0.99), 0.5: (0.39, 0.99)}, 1.0, "both lose, however they agree"),
    ],
)
def test_new_statistics_are_taken_unless_translated_frames_veto_them(
    toy_pack, dark_frames, tmp_path, seen, kept, words
):
    ours = choice_of(toy_pack, dark_frames, tmp_path, seen)
    assert ours.choice == "veto"
    network = toy_pack.network()
    before = batchnorm.statistics(network)
    assert ours.choose(network, "statistics") == kept, words
    moved = any(not t.equal(before[n]) for n, t in batchnorm.statistics(network).items() if "mean" in n)
    assert moved == (kept < 1)


def test_without_a_labelled_holdout_agreement_decides(toy_pack_without_replay, dark_frames, tmp_path):
    ours = choice_of(toy_pack_without_replay, dark_frames, tmp_path, CITYSCAPES)
    assert ours.choice == "mirror"
    assert ours.choose(toy_pack_without_replay.network(), "statistics") == 0.5
    for by in ("veto", "translated"):
        other = choice_of(toy_pack_without_replay, dark_frames, tmp_path, CITYSCAPES, adabn_by=by)
        with pytest.raises(RoundError, match=f"adabn_by is {by} and the pack has no source hold-out"):
            other.choose(toy_pack_without_replay.network(), "statistics")


@pytest.mark.parametrize("kept", [0.25, 1.0])
def test_after_a_training_the_share_found_before_it_holds(toy_pack, dark_frames, tmp_path, kept):
    ours = choice_of(toy_pack, dark_frames, tmp_path, {})  # no look is taken
    network = toy_pack.network()
    trained = batchnorm.statistics(network)
    assert ours.after_training(network, "after", kept) == kept
    found = batchnorm.statistics(network)
    target = ours.estimate(network, "alone")
    for name in (n for n in trained if n.endswith(("mean", "var"))):
        wanted = (1 - kept) * target[name] + kept * trained[name]
        np.testing.assert_allclose(found[name].numpy(), wanted.numpy(), rtol=1e-5, atol=1e-6)
