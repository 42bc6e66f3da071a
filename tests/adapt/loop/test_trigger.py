"""What starts a round, and with which frames."""

from __future__ import annotations

import time

import pytest

from adapt.loop.trigger import Trigger
from tests.adapt.loop.toys import Clock, Server, captured, pool_of, tools


def filled(tmp_path, count, clock, cameras=("front",), server=None, **settings):
    """(trigger, state) with so many frames per camera."""
    config, state, pool = pool_of(tmp_path, clock, **settings)
    for number in range(count):
        for camera in cameras:
            pool.add(captured(200 + number, camera))
    return Trigger(server or Server(), config, tools(clock), state, pool), state


def decide(trigger, *, finished=False):
    start = trigger.decide(finished=finished)
    return start.reason, len(start.rows)


def test_drift_starts_a_round_with_the_frames_since(tmp_path):
    server, clock = Server(), Clock()
    trigger, _ = filled(tmp_path, 14, clock, server=server, on=("drift",), patience=5.0, frames=100)
    assert decide(trigger) == ("", 14)
    server.drifting = [{"source": "front", "state": "drifting", "since": 0.0}]
    clock.now += 60
    assert decide(trigger) == ("drift", 14)
    server.drifting = [{"source": "front", "state": "drifting", "since": time.time() + 60}]
    clock.now += 60
    assert decide(trigger) == ("", 14)


def test_drift_of_one_camera_takes_no_frame_of_another_and_a_server_that_is_away_changes_nothing(tmp_path):
    server, clock = Server(), Clock()
    cameras = ("front", "rear")
    trigger, _ = filled(tmp_path, 12, clock, cameras, server, on=("drift",), frames=12)
    server.drifting = [{"source": "rear", "state": "drifting", "since": 0.0}]
    start = trigger.decide(finished=False)
    assert (start.reason, {row.source for row in start.rows}) == ("drift", {"rear"})
    server.drift = None
    clock.now += 60
    assert decide(trigger) == ("drift", 12)


def test_cameras_do_not_mix_unless_told(tmp_path):
    trigger, _ = filled(tmp_path / "a", 12, Clock(), ("front", "rear"), frames=12)
    rows = trigger.decide(finished=False).rows
    assert len(rows) == 12
    assert len({row.source for row in rows}) == 1
    mixed, _ = filled(tmp_path / "b", 12, Clock(), ("front", "rear"), frames=24, mix=True)
    assert decide(mixed) == ("frames", 24)


def test_with_patience_or_at_the_end_of_the_source_fewer_frames_suffice(tmp_path):
    clock = Clock()
    trigger, _ = filled(tmp_path / "a", 10, clock, patience=5.0)
    assert trigger.required_frames == 10
    assert decide(trigger) == ("", 10)
    clock.now += 6
    assert decide(trigger) == ("frames", 10)
    trigger.restart_patience()
    assert decide(trigger) == ("", 10)
    ended, _ = filled(tmp_path / "b", 10, clock)
    assert (ended.required_frames, decide(ended)) == (14, ("", 10))
    assert decide(ended, finished=True) == ("frames", 10)


@pytest.mark.parametrize(("finished", "starts"), [(-10.0, False), (-3700.0, True), (1e6, True)])
def test_a_rest_is_kept_and_a_clock_that_jumped_back_does_not_add_to_it(tmp_path, finished, starts):
    trigger, state = filled(tmp_path, 14, Clock(), rest=3600.0)
    state.update(finished=time.time() + finished)
    assert bool(trigger.decide(finished=False).reason) == starts
    trigger.manual = "now"
    assert decide(trigger)[0] == "command: now"


def test_a_schedule_counts_from_the_first_decision(tmp_path):
    trigger, state = filled(tmp_path, 12, Clock(), on=("schedule",), every=60.0)
    assert decide(trigger) == ("", 12)
    assert state.finished == pytest.approx(time.time(), abs=30.0)
    state.update(finished=time.time() - 61)
    assert decide(trigger) == ("schedule", 12)
