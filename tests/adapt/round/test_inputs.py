"""What a round is judged by is not learnt from: hold-out frames among the target frames are refused."""

from __future__ import annotations

import pytest

from adapt.data.base import read_frame
from adapt.round import RoundConfig, RoundError, adapt
from tests.adapt.conftest import toy_scene

CONFIG = RoundConfig(portions=(0.3,), steps=1, threads=1)


def test_a_frame_of_the_labelled_holdout_is_refused(toy_pack, dark_frames, tmp_path):
    frame, label = toy_scene(203, dark=True)  # number 3 of the target frames
    with pytest.raises(RoundError, match="target frame 3 is also frame 1 of the labelled hold-out"):
        adapt(
            toy_pack,
            dark_frames,
            config=CONFIG,
            out=tmp_path / "r",
            labelled=[toy_scene(900, dark=True), (frame, label)],
        )
    assert not (tmp_path / "r").exists()


def test_a_frame_of_the_source_holdout_is_refused(toy_pack, dark_frames, tmp_path):
    known = read_frame(toy_pack.replay("holdout")[2][0])
    with pytest.raises(RoundError, match="target frame 14 is also frame 2 of the source hold-out"):
        adapt(toy_pack, [*dark_frames, known], config=CONFIG, out=tmp_path / "r")
