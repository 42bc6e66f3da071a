"""The loop's response to a change of domain: refreshed at once, trained afterwards, and back where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from adapt.frames.store import StoreError
from adapt.gate.limits import Limits
from adapt.loop import Loop, LoopConfig
from adapt.loop.budget import Budget
from adapt.loop.domain_memory import RELEASED
from adapt.loop.vehicle import Conditions
from adapt.round import RoundError
from runtime.client import Rejected
from runtime.repository.repository import Repository
from tests.adapt.loop.toys import FAST, Clock, PlayedChannel, captured
from tests.runtime import builders

# What the gate says of a toy is not asked here: it lets everything through.
LAX = Limits(
    static=1.0,
    dead=1.0,
    foreign=1.0,
    flip_drop=1.0,
    parent_flip_drop=2.0,
    agreement=0.0,
    variety=0.0,
    kept=0.0,
    largest=1.0,
    source_drop=1.0,
    translated_drop=1.0,
    temporal_drop=1.0,
    confidence_jump=1.0,
    calibration_rise=1.0,
    teacher=0.0,
    statistics_gain=-1.0,
    distance=9.0,
)
QUICK = replace(FAST, limits=LAX)


class Road:
    """A camera on a road of stretches: ("day" | "dark", frames) each; then it is silent."""

    finished = False

    def __init__(self, clock: Clock, *stretches: tuple[str, int], seed: int = 300) -> None:
        self.clock = clock
        self.left = [name for name, count in stretches for _ in range(count)]
        self.seed = seed

    def get(self, timeout: float):
        if not self.left:
            self.clock.sleep(timeout)
            return None
        self.seed += 1
        return captured(self.seed, dark=self.left.pop(0) == "dark")

    def close(self) -> None: ...


class Server:
    """Decides as told; remembers what it was asked."""

    def __init__(self, *decisions: str) -> None:
        self.asked: list = []
        self.pruned: list = []
        self.decisions, self.check = list(decisions), "shadow"

    def prune(self, model, keep):
        self.pruned.append((model, keep))
        return {"deleted": [], "kept": []}

    def _say(self, *asked):
        self.asked.append(asked)
        state = self.decisions.pop(0) if self.decisions else "LIVE"
        yield SimpleNamespace(time=0.0, state=state, check=self.check, reason="played", version=0)

    def submit(self, model, version):
        return self._say("submit", version)

    def reset(self, model):
        return self._say("reset")


def make(pack, tmp_path, clock, road, server, **more) -> Loop:
    versions = iter(range(2, 99))
    given = {k: more.pop(k) for k in ("remote", "vehicle") if k in more}
    told = {
        "model": "road",
        "frames": 100,
        "near": -1,
        "round": QUICK,
        "enough": 10,
        "respond": "refresh",
        **more,
    }
    return Loop(
        server,
        pack,
        tmp_path / "repo",
        tmp_path / "work",
        LoopConfig(**told),
        source=road,
        clock=clock,
        progress=lambda *a, **k: None,
        say=lambda text: None,
        sleep=clock.sleep,
        build=lambda *a: next(versions),
        **given,
    )


def until_silent(loop: Loop, seconds: float = 3.0) -> None:
    """Go on collecting until nothing comes any more."""

    class Silence(Exception):
        pass

    def sleep(for_: float) -> None:
        if loop.tools.clock.now > seconds:
            raise Silence
        loop.tools.clock.now += max(for_, 0.01)

    loop.tools.clock.now, loop.collector.source.clock = 0.0, SimpleNamespace(sleep=sleep)
    with pytest.raises(Silence):
        loop.once()


def test_a_new_road_is_answered_with_statistics_then_training_and_the_old_one_with_what_was(
    toy_pack, tmp_path
):
    clock, server = Clock(), Server()
    road = Road(clock, ("day", 12), ("dark", 32), ("day", 12))
    loop = make(toy_pack, tmp_path, clock, road, server, frames=30)
    first = loop.once()
    assert (first["kind"], first["state"], first["frames"]) == ("refresh", "LIVE", 12), first["reason"]
    assert first["trigger"].startswith("road: no known road is near")
    assert first["adaptation"]["chosen"] == "statistics"
    assert first["adaptation"]["stages"]["adabn"]["kept"] == 0.3
    second = loop.once()
    assert (second["kind"], second["trigger"]) == ("train", "frames")
    assert second["frames"] == 30, "twelve of the refresh and eighteen more: none from before the change"
    assert loop.state["used"] == {"front": 42}
    live = int(loop.state["answers"])
    until_silent(loop)
    assert server.asked[-1] == ("reset",), "day again: the released pack answers"
    assert loop.state["answers"] == RELEASED
    lines = [json.loads(line) for line in (tmp_path / "work" / "roads.jsonl").read_text().splitlines()]
    assert [(line["version"], line["state"]) for line in lines] == [(RELEASED, "LIVE")]
    loop.collector.source = Road(clock, ("dark", 16), seed=800)
    until_silent(loop)
    assert server.asked[-1] == ("submit", live), "nothing is learnt again that is known"


def test_what_was_known_is_known_after_a_restart(toy_pack, tmp_path):
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12)), server)
    assert loop.once()["state"] == "LIVE"
    loop.close()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12), ("day", 12), ("dark", 12)), server)
    until_silent(loop)
    assert server.asked == [("submit", 2), ("reset",), ("submit", 2)]


def test_a_version_the_server_does_not_want_back_is_forgotten(toy_pack, tmp_path):
    clock, server = Clock(), Server("LIVE", "LIVE", "REJECTED")
    road = Road(clock, ("dark", 12), ("day", 12), ("dark", 24))
    loop = make(toy_pack, tmp_path, clock, road, server)
    assert loop.once()["state"] == "LIVE"
    until_silent(loop)
    assert server.asked == [("submit", 2), ("reset",), ("submit", 2)]
    assert loop.responder.policy.versions() == set()


def test_a_version_is_not_forgotten_because_somebody_holds_what_is_live(toy_pack, tmp_path):
    clock, server = Clock(), Server("LIVE", "LIVE", "REJECTED")
    road = Road(clock, ("dark", 12), ("day", 12), ("dark", 31))
    loop = make(toy_pack, tmp_path, clock, road, server)
    assert loop.once()["state"] == "LIVE"
    server.check = "frozen"
    until_silent(loop)
    assert server.asked == [("submit", 2), ("reset",), ("submit", 2), ("submit", 2)], "asked again, thawed"


def test_an_adapter_that_may_not_reset_offers_the_released_version(toy_pack, tmp_path):
    """The role of an adapter: it submits, and only an operator promotes."""
    clock, server = Clock(), Server()

    def reset(model):
        raise Rejected("Reset needs the role control", "PERMISSION_DENIED")
        yield

    server.reset = reset
    repository = Repository(tmp_path / "repo")
    for pack in ("another", toy_pack.sha256, "another"):
        builders.publish(repository, model=b"x", foreign=True, pack={"sha256": pack})
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12), ("day", 12)), server)
    assert loop.once()["state"] == "LIVE"
    until_silent(loop)
    assert server.asked[1:] == [("submit", 2)]
    assert loop.state["answers"] == RELEASED


def test_a_full_disk_costs_the_memory_of_roads_over_restarts_and_no_more(toy_pack, tmp_path):
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12), ("day", 12)), server)
    (tmp_path / "work" / "roads.tmp").mkdir()  # it cannot be written
    assert loop.once()["state"] == "LIVE"
    until_silent(loop)
    assert server.asked == [("submit", 2), ("reset",)]


def test_what_somebody_else_chose_holds_for_this_road_alone(toy_pack, tmp_path, monkeypatch):
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12)), server)
    loop.once()
    monkeypatch.setattr(loop.submitter, "answering_version", lambda: RELEASED)  # reset, by day
    loop.collector.source = Road(clock, ("day", 18), ("dark", 18), seed=500)
    loop.collector.source.clock = SimpleNamespace(
        sleep=lambda seconds: pytest.fail("no answer to the change")
    )
    assert loop.once()["kind"] == "refresh", "of the dark road nobody has chosen anything"


def test_what_somebody_else_chose_is_not_undone_on_this_road(toy_pack, tmp_path, monkeypatch):
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12)), server)
    loop.once()
    monkeypatch.setattr(loop.submitter, "answering_version", lambda: RELEASED)  # rolled back, or reset
    loop.collector.source = Road(clock, ("dark", 19), seed=500)
    until_silent(loop)
    assert server.asked == [("submit", 2)]
    assert loop.responder.policy.versions() == set()


def test_a_refresh_waits_for_the_vehicle_unless_it_may_drive(toy_pack, tmp_path):
    car = SimpleNamespace(
        read=lambda: SimpleNamespace(parked=False, charging=None, battery=None, temperature=None)
    )
    clock, channel = Clock(), PlayedChannel()
    told = {"vehicle": car, "conditions": Conditions(parked=True)}
    loop = make(toy_pack, tmp_path / "a", clock, Road(clock, ("dark", 12)), Server(), remote=channel, **told)
    until_silent(loop)
    assert any(r.get("note") == "refresh: not parked" for r in channel.reports)
    loop = make(
        toy_pack, tmp_path / "b", clock, Road(clock, ("dark", 12)), Server(), refresh_driving=True, **told
    )
    assert (loop.once()["kind"], loop.state["phase"]) == ("refresh", "collect")
    loop = make(
        toy_pack,
        tmp_path / "c",
        clock,
        Road(clock, ("dark", 12)),
        Server(),
        refresh_driving=True,
        budget=Budget(seconds=0.0),
        **told,
    )
    until_silent(loop)
    assert not list((tmp_path / "c" / "work").glob("round-*"))


def test_only_going_back_may_be_asked_for(toy_pack, tmp_path):
    clock = Clock()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 19)), Server(), respond="back")
    until_silent(loop)
    assert not list((tmp_path / "work").glob("round-*"))


def test_a_refresh_counts_neither_for_rest_nor_for_the_schedule(toy_pack, tmp_path):
    clock = Clock()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 24)), Server(), rest=3600.0, enough=8)
    assert loop.once()["kind"] == "refresh"
    assert loop.state["finished"] == 0.0
    assert loop.state["used"] == {}
    for _ in range(12):
        loop.collect_once(0.1)
    loop.trigger.manual = "nothing but rest could stop a round now"
    assert len(loop.trigger.decide(finished=False).rows) == 24


def test_old_versions_are_pruned_after_a_round_went_live_and_their_roads_forgotten(toy_pack, tmp_path):
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12)), server, keep_versions=4)
    loop.responder.policy.learn(3, loop.responder.policy.released.stats, "rear")
    server.prune = lambda model, keep: server.pruned.append((model, keep)) or {"deleted": [3], "kept": []}
    assert loop.once()["state"] == "LIVE"
    assert server.pruned == [("road", 4)]
    assert loop.responder.policy.versions() == {2}
    server.prune = None  # a server that knows no such thing
    assert loop.submitter.prune_versions(["road"]) == []


def test_a_round_ends_in_words_where_the_store_is_damaged(toy_pack, tmp_path, monkeypatch):
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12)), server)

    def rows(*_, **__):
        raise StoreError("database disk image is malformed")

    def build(*_):
        monkeypatch.setattr(type(loop.store), "rows", rows)
        raise RoundError("no room")

    loop.builder.build = build
    assert loop.once()["state"] == "FAILED"
    assert loop.state["phase"] == "collect"


def test_nothing_is_deleted_unless_told(toy_pack, tmp_path):
    clock, server = Clock(), Server()
    make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12)), server).once()
    assert server.pruned == []


def test_killed_on_the_way_back_it_knows_its_own_doing(toy_pack, tmp_path, monkeypatch):
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12), ("day", 12)), server)
    assert loop.once()["state"] == "LIVE"

    class Killed(BaseException):
        pass

    def reset(model):
        yield from server._say("reset")
        raise AssertionError("nobody reads on after LIVE")

    server.reset = reset
    real = loop.state.update

    def update(**values):
        if "answers" in values:
            raise Killed
        real(**values)

    monkeypatch.setattr(loop.state, "update", update)
    with pytest.raises(Killed):
        loop.once()
    loop.close()
    again = make(toy_pack, tmp_path, clock, Road(clock, ("day", 6), ("dark", 18)), server)
    monkeypatch.setattr(again.submitter, "answering_version", lambda: RELEASED)
    until_silent(again)
    assert server.asked == [("submit", 2), ("reset",), ("submit", 2)], "the dark road is still known"


def test_a_library_that_was_lost_begins_with_what_is_live(toy_pack, tmp_path):
    """Not with a refresh that would replace a trained version."""
    clock, server = Clock(), Server()
    loop = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 12)), server)
    loop.once()
    loop.close()
    (tmp_path / "work" / "roads.npz").write_bytes(b"damaged")
    again = make(toy_pack, tmp_path, clock, Road(clock, ("dark", 30), ("day", 12)), server)
    until_silent(again)
    assert server.asked == [("submit", 2), ("reset",)]
