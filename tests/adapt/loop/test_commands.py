"""Commands of operators: accepted, refused with a reason, and stored where they must survive a kill."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from adapt.loop.commands import Commands, RoundCancelled
from adapt.loop.server_channel import Command
from adapt.loop.state import Phase
from adapt.loop.trigger import Trigger
from tests.adapt.loop.toys import Clock, PlayedChannel, Server, captured, pool_of, tools


class Bench:
    """Commands over real frames and state; permission and reports are played."""

    def __init__(self, tmp_path, frames=0, blocked="", **settings) -> None:
        clock, self.log, self.reported = Clock(), [], []
        config, self.state, pool = pool_of(tmp_path / "work", clock, **settings)
        for number in range(frames):
            pool.add(captured(200 + number))
        self.channel = PlayedChannel()
        self.trigger = Trigger(Server(), config, tools(clock), self.state, pool)
        self.commands = Commands(
            self.channel,
            config,
            tools(clock, log=self.log.append),
            self.state,
            pool=pool,
            trigger=self.trigger,
            permit=SimpleNamespace(blocked_reason=lambda: blocked),
            reporter=SimpleNamespace(
                phase="waiting", report=lambda phase, *, force: self.reported.append(phase)
            ),
        )

    def answer(self, kind, running=False, **values):
        self.channel.commands = [Command(1, kind, values)]
        self.commands.poll(running=running)
        return self.channel.answers[-1][1:]


def test_a_round_starts_on_command_if_there_are_frames(tmp_path):
    few = Bench(tmp_path / "few", frames=9)
    accepted, reason = few.answer("start_round", reason="me")
    assert not accepted
    assert "9 new frames of one camera, 10 are needed" in reason
    enough = Bench(tmp_path / "enough", frames=10)
    assert enough.answer("start_round", reason="me") == (True, "")
    assert enough.trigger.manual == "me"
    assert enough.answer("start_round", running=True) == (False, "round 1 is under way")
    held = Bench(tmp_path / "held", frames=10, blocked="not parked")
    assert held.answer("start_round") == (True, "it waits: not parked")
    assert held.trigger.manual == "no reason given"
    never = Bench(tmp_path / "never", frames=10, on=("frames",))
    assert never.answer("start_round") == (False, "this adapter begins no round on command (--on)")


def test_collection_is_switched_and_stays_so_over_a_restart(tmp_path):
    bench = Bench(tmp_path)
    assert bench.answer("set_collection", on=False) == (True, "")
    assert json.loads((tmp_path / "work" / "loop.json").read_text())["collecting"] is False
    assert bench.reported == ["waiting"]


def test_only_a_round_that_runs_can_be_cancelled(tmp_path):
    bench = Bench(tmp_path)
    assert bench.answer("cancel_round") == (False, "no round is running (phase collect)")
    bench.state.enter(Phase.ROUND, frames=[1])
    with pytest.raises(RoundCancelled):
        bench.answer("cancel_round", running=True)
    assert bench.channel.answers[-1] == ("cancel_round", True, "")
    assert json.loads((tmp_path / "work" / "loop.json").read_text())["cancelled"] is True


def test_an_unknown_command_is_refused_and_another_adapter_in_our_place_is_logged_once(tmp_path):
    bench = Bench(tmp_path)
    assert bench.answer("dance") == (False, "this adapter does not know 'dance'")
    bench.channel.replaced = "adapter car-8 took the place"
    bench.commands.poll(running=False)
    bench.commands.poll(running=False)
    assert bench.log == ["adapter car-8 took the place"]
