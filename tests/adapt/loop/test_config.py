"""Settings that cannot be are refused in one line."""

from __future__ import annotations

import pytest

from adapt.loop import LoopConfig, LoopError


def test_settings_that_cannot_be():
    with pytest.raises(LoopError, match="choose of frames"):
        LoopConfig(model="m", on=("sometimes",))
    with pytest.raises(LoopError, match="1 or more"):
        LoopConfig(model="m", frames=0)
    with pytest.raises(LoopError, match="choose one of off, back, refresh"):
        LoopConfig(model="road", respond="sometimes")
    with pytest.raises(LoopError, match="0 = all"):
        LoopConfig(model="road", keep_versions=-1)


def test_cameras_that_mix_count_as_one():
    assert LoopConfig(model="m").camera_of("x" * 300) == "x" * 200
    assert LoopConfig(model="m", mix=True).camera_of("front") == ""
