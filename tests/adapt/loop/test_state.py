"""loop.json: what survives a kill, what a round leaves for the next one, and who may write it."""

from __future__ import annotations

import json

import pytest

from adapt.loop import LoopError
from adapt.loop.outcome import Decision
from adapt.loop.state import LoopState, Phase, RoundKind

PACK = "a" * 64


def test_each_change_is_on_disk_at_once_and_a_new_loop_continues_there(tmp_path):
    state = LoopState(tmp_path, PACK)
    assert (state.phase, state.round, state.folder.name) == (Phase.COLLECT, 1, "round-0001")
    state.enter(Phase.ROUND, frames=[3, 5], kind=RoundKind.TRAIN.value)
    state.close()
    again = LoopState(tmp_path, PACK)
    assert (again.phase, again.frame_ids, again.is_refresh) == (Phase.ROUND, [3, 5], False)
    stored = json.loads((tmp_path / "loop.json").read_text())
    assert stored == dict(again)
    assert (stored["schema"], stored["pack"], stored["phase"]) == (1, PACK, "round")


def test_a_finished_round_leaves_its_used_frames_and_what_lasts(tmp_path):
    state = LoopState(tmp_path, PACK)
    state.update(collecting=False, imported={"a": 3}, answers=4, road_since={"front": 2})
    state.enter(Phase.ROUND, frames=[3, 5, 9], trigger="frames", kind="train", cancelled=True)
    state.finish_round(Decision.LIVE, {"front": 5, "rear": 9})
    assert (state.phase, state.round, state["last"], state["used_up_to"]) == (Phase.COLLECT, 2, "LIVE", 9)
    assert state["used"] == {"front": 5, "rear": 9}
    assert state.finished > 0
    assert (state.is_collecting, state["imported"], state.answering) == (False, {"a": 3}, 4)
    for gone in ("trigger", "kind", "cancelled", "frames"):
        assert gone not in state
    assert [state.is_used("front", 5), state.is_used("front", 6), state.is_used("left", 1)] == [
        True,
        False,
        False,
    ]
    state.enter(Phase.ROUND, frames=[4], kind="train")
    state.finish_round(Decision.FAILED, {"front": 4})
    assert state["used"]["front"] == 5, "a frame that was used stays used"


def test_a_refresh_uses_no_frame_up_and_counts_neither_for_rest_nor_for_the_schedule(tmp_path):
    state = LoopState(tmp_path, PACK)
    state.update(finished=17.0)
    state.enter(Phase.ROUND, frames=[3], kind=RoundKind.REFRESH.value)
    assert state.is_refresh
    state.finish_round(Decision.LIVE, {})
    assert (state.finished, state["used"], state["used_up_to"]) == (17.0, {}, 0)


def test_frames_used_by_a_loop_of_before_are_known(tmp_path):
    (tmp_path / "loop.json").write_text(
        json.dumps({"schema": 1, "pack": PACK, "round": 3, "phase": "collect", "used_up_to": 7})
    )
    state = LoopState(tmp_path, PACK)
    assert [state.is_used("front", 7), state.is_used("front", 8)] == [True, False]


@pytest.mark.parametrize("content", ["{", "[1]", '{"round": "1"}', '{"round": 1, "phase": "dance"}'])
def test_a_damaged_state_is_refused_and_the_lock_released(tmp_path, content):
    (tmp_path / "loop.json").write_text(content)
    with pytest.raises(LoopError, match="is damaged"):
        LoopState(tmp_path, PACK)
    (tmp_path / "loop.json").unlink()
    LoopState(tmp_path, PACK).close()


def test_one_loop_per_folder_and_one_pack(tmp_path):
    state = LoopState(tmp_path, PACK)
    with pytest.raises(LoopError, match="in use by another adapter"):
        LoopState(tmp_path, PACK)
    state.update()
    state.close()
    with pytest.raises(LoopError, match="belongs to pack aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        LoopState(tmp_path, "b" * 64)
