"""The state of a round on disk: what is read back, and what is not trusted."""

from __future__ import annotations

import json

import pytest

from adapt.round.state import RoundState


def test_what_was_saved_is_read_back(tmp_path):
    state = RoundState(tmp_path)
    assert not state.read("one")
    assert state.damage == "", "a missing file is no damage"
    state.resumed += 1
    state.stages["label-1"] = {"labelled": 0.5}
    state.seconds["label"] = 1.23456
    state.save()
    again = RoundState(tmp_path)
    assert again.read("one")
    assert (again.stages, again.resumed, again.report) == ({"label-1": {"labelled": 0.5}}, 0, None)
    assert again.seconds == {"label": 1.235}
    again.report = {"accepted": True}
    again.save()
    assert list(json.loads(state.file.read_text())) == [
        "identity",
        "stages",
        "resumed",
        "seconds",
        "report",
    ]


def test_the_state_of_another_round_is_left_alone(tmp_path):
    state = RoundState(tmp_path)
    state.read("one")
    state.stages["label-1"] = {}
    state.save()
    other = RoundState(tmp_path)
    assert not other.read("two")
    assert (other.stages, other.damage) == ({}, "")


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"\xff", b'{"identity": "one", "stages": []}', b'{"identity": "one", "resumed": "x"}'],
)
def test_a_damaged_state_is_named_and_not_used(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    state = RoundState(tmp_path)
    assert not state.read("one")
    assert state.damage


def test_seconds_add_up_also_if_the_work_raises(tmp_path):
    state = RoundState(tmp_path)
    with state.timed("train"):
        pass
    first = state.seconds["train"]
    with pytest.raises(KeyError), state.timed("train"):
        raise KeyError
    assert state.seconds["train"] >= first >= 0
