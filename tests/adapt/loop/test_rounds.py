"""Edges in the loop: paused, cancelled, counted and gone on with as the segmentation is; frames may go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from adapt.loop import EdgeMember, Paused
from adapt.loop.budget import Budget
from adapt.loop.server_channel import Command
from adapt.loop.vehicle import Conditions
from adapt.round import RoundPaused, RoundResult
from adapt.round.edges import adapt_edges
from networks.pack import load_pack
from tests.adapt.conftest import toy_scene
from tests.adapt.edges_toys import ANY, quick
from tests.adapt.loop.toys import FAST, Camera, Clock, PlayedChannel, Server, make

DARK = [toy_scene(300 + i, dark=True)[0] for i in range(6)]


# ------------------------------------------------------------------------------------------------- the round
def test_paused_and_killed_anywhere_a_round_of_edges_ends_with_the_same_weights(joint_pack, tmp_path):
    """A pause keeps what was done; what a kill leaves is what lies on the disk."""
    whole = adapt_edges(joint_pack, DARK, config=quick(limits=ANY), out=tmp_path / "whole")

    class Killed(BaseException):
        pass

    stops = [
        (Killed, "labels", 2),
        (Killed, "align", 2),
        (RoundPaused, "train", 1),
        (Killed, "train", 3),
        (RoundPaused, "measure candidate", 2),
    ]
    result, told = None, []

    def stop(stage: str, done: int, total: int, **numbers: float) -> None:
        told.append(stage)
        if stops and stage == f"edges: {stops[0][1]}" and done >= stops[0][2]:
            raise stops.pop(0)[0]

    while result is None:
        try:
            result = adapt_edges(
                joint_pack, DARK, config=quick(limits=ANY), out=tmp_path / "pieces", progress=stop
            )
        except (Killed, RoundPaused):
            continue
    assert not stops
    assert result.report["resumed"] == 5
    assert result.pack.sha256 == whole.pack.sha256
    for key in ("loss", "gate", "parent_measures", "candidate_measures"):
        assert result.report[key] == whole.report[key], key
    assert told.count("edges: align") == 12, "no crop was aligned twice"
    left = {p.name for p in (tmp_path / "pieces").iterdir()}
    assert left == {"labels-1", "pack", "report.json", "state.json", "train.pt"}


KILLED = """
import os, signal, sys
import numpy as np, torch
from pathlib import Path
from adapt.round.edges import adapt_edges
from networks.pack import load_pack
from tests.adapt.edges_toys import ANY, quick

torch.set_num_threads(1)
where, count = sys.argv[4], int(sys.argv[5])

def progress(stage, done, total, **numbers):
    if stage == f"edges: {where}" and done == count:
        os.kill(os.getpid(), signal.SIGKILL)

frames = list(np.load(sys.argv[2])["frames"])
pack, out = load_pack(sys.argv[1]), Path(sys.argv[3])
adapt_edges(pack, frames, config=quick(limits=ANY), out=out, progress=progress)
"""


@pytest.mark.slow
def test_after_a_real_kill_the_weights_are_bit_for_bit_the_same(joint_pack, tmp_path):
    frames = tmp_path / "frames.npz"
    np.savez(frames, frames=np.stack(DARK))
    told = subprocess.run(
        [sys.executable, "-c", KILLED, joint_pack.path, frames, tmp_path / "killed", "train", "3"],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode == -9, told.stderr
    assert (tmp_path / "killed" / "checkpoint.pt").is_file()
    whole = adapt_edges(joint_pack, DARK, config=quick(limits=ANY), out=tmp_path / "whole")
    result = adapt_edges(joint_pack, DARK, config=quick(limits=ANY), out=tmp_path / "killed")
    assert result.report["resumed"] == 1
    state = result.pack.state()
    assert all(torch.equal(v, state[k]) for k, v in whole.pack.state().items())
    assert result.pack.sha256 == whole.pack.sha256


# -------------------------------------------------------------------------------------------------- the loop
SHORT = quick(limits=ANY, steps=2, source_holdout=1)


def edged(pack, joint_pack, tmp_path, *, built=None, **more):
    """A loop whose edges follow; `built` gets the hash of every pack by its model."""
    built = {} if built is None else built

    def build(made, repository, model, adaptation, gate):
        built[model] = made.sha256
        assert gate["passed"]
        return len(built) + 1

    member = EdgeMember(joint_pack, "edges", "both", SHORT)
    return make(pack, tmp_path, edges=member, build=build, **more)


@pytest.fixture(scope="module")
def whole(toy_pack, joint_pack, tmp_path_factory):
    """(what was built, the report) of a loop nothing disturbed."""
    built: dict[str, str] = {}
    loop = edged(toy_pack, joint_pack, tmp_path_factory.mktemp("whole"), built=built)
    report = loop.once()
    assert (report["state"], report["edges"]) == ("LIVE", "accepted")
    assert loop.permit.meter.spent()["steps"] == FAST.steps + SHORT.steps, "edges' steps count"
    assert set(built) == {"road", "edges"}
    return built, report


def test_a_spent_budget_and_a_car_that_drives_off_stop_in_the_edges_and_change_nothing(
    toy_pack, joint_pack, tmp_path, whole, monkeypatch
):
    steps = FAST.steps + 1
    loop = edged(toy_pack, joint_pack, tmp_path, budget=Budget(steps=steps), once=True)
    with pytest.raises(Paused, match=f"{steps} of {steps} steps are spent"):
        loop.once()
    assert (tmp_path / "work" / "round-0001" / "edges" / "checkpoint.pt").is_file()
    loop.close()

    class Car:
        away = 2  # looks, from the second frame that is measured on

        def read(self):
            drives = self.away > 0 and again.reporter.stage == "edges: measure candidate"
            self.away -= drives
            return SimpleNamespace(parked=not drives, charging=None, battery=None, temperature=None)

    monkeypatch.setattr("adapt.loop.permit.CHECK_SECONDS", 0.0)
    channel, built = PlayedChannel(), {}
    again = edged(
        toy_pack,
        joint_pack,
        tmp_path,
        built=built,
        budget=Budget(steps=100),
        vehicle=Car(),
        conditions=Conditions(parked=True),
        remote=channel,
    )
    assert again.once()["edges"] == "accepted"
    phases = [(r.get("phase"), r.get("round", {}).get("stage", "")) for r in channel.reports]
    assert [phase for phase, _ in phases].count("paused") == 1
    assert any(stage == "edges: measure candidate" for _, stage in phases)
    assert not any(stage.startswith("labels") for _, stage in phases), "the segmentation was done"
    assert built == whole[0]
    assert again.permit.meter.spent()["steps"] == FAST.steps + SHORT.steps


@pytest.fixture
def at_once(toy_pack, monkeypatch):
    """The segmentation's round has come to its end before it begins."""
    nothing = {f"{name}_measures": {} for name in ("parent", "reference", "candidate")}
    gate = {"passed": True, "failed": [], "checks": []}
    done = RoundResult(toy_pack, True, {"round": "0", "gate": gate, **nothing})
    monkeypatch.setattr("adapt.loop.rounds.adapt", lambda *a, **k: done)


def test_the_throttle_is_asked_after_each_piece_and_a_limit_that_never_suffices_is_named(
    toy_pack, joint_pack, tmp_path, monkeypatch, at_once
):
    class Throttle:
        pieces = 0

        def begin(self): ...

        def __call__(self):
            self.pieces += 1
            return 0.0

    throttle, server = Throttle(), Server()
    loop = edged(toy_pack, joint_pack, tmp_path, throttle=throttle, server=server)
    monkeypatch.setattr("adapt.loop.permit.CHECK_SECONDS", 0.0)

    def memory():
        return "memory: 9 MB are held, 1 MB are allowed" if loop.reporter.stage.startswith("edges: ") else ""

    monkeypatch.setattr(loop.permit.meter, "memory_exceeded", memory)
    report = loop.once()
    assert throttle.pieces >= 3
    assert report["state"] == "LIVE"
    assert server.submitted == [("road", 2)], "the segmentation goes on alone"
    assert report["edges"].startswith("failed: memory: 9 MB")
    assert "at the same place" in report["edges"]


def test_a_round_can_be_cancelled_in_its_edges(toy_pack, joint_pack, tmp_path, at_once):
    class Canceller(PlayedChannel):
        def report(self, **parts):
            super().report(**parts)
            if parts.get("round", {}).get("stage") == "edges: train" and not self.answers:
                self.commands = [Command(1, "cancel_round")]

    server, channel = Server(), Canceller()
    report = edged(toy_pack, joint_pack, tmp_path, remote=channel, server=server).once()
    assert channel.answers == [("cancel_round", True, "")]
    assert (report["state"], server.submitted) == ("CANCELLED", [])
    left = {p.name for p in (tmp_path / "work" / "round-0001" / "edges").iterdir()}
    assert left == {"state.json"}


@pytest.mark.parametrize(("gone", "says"), [(5, "accepted"), (12, "at least are needed")])
def test_frames_that_go_before_the_edges_leave_a_smaller_round_or_a_word(
    toy_pack, joint_pack, tmp_path, gone, says, at_once
):
    server = Server()

    def say(text):
        if text.startswith("edges of round") and len(loop.store) == 14:
            loop.store.delete(ids=loop.state["frames"][:gone])

    loop = edged(toy_pack, joint_pack, tmp_path, server=server, say=say)
    report = loop.once()
    assert report["state"] == "LIVE"
    assert says in report["edges"] or (gone == 12 and "frame" in report["edges"])
    assert (server.submitted[0][0] == "both") == (gone == 5)


def test_a_picture_that_is_damaged_before_the_edges_is_left_out(toy_pack, joint_pack, tmp_path, at_once):
    server = Server()
    tries = []

    def say(text):
        if text.startswith("edges of round"):
            tries.append(text)
            assert len(tries) < 9, "again and again"
            (loop.store.path / "frames" / loop.store.rows()[5].file).write_bytes(b"damaged")

    loop = edged(toy_pack, joint_pack, tmp_path, server=server, say=say)
    report = loop.once()
    assert (report["state"], report["edges"]) == ("LIVE", "accepted")
    assert [int(text.split(": ")[1].split()[0]) for text in tries] == [14, 13]
    assert server.submitted[0][0] == "both"


def test_frames_that_go_while_it_was_killed_do_not_cost_the_finished_round(
    toy_pack, joint_pack, tmp_path, whole, monkeypatch
):
    class Killed(BaseException):
        pass

    def dies(text):
        if text.startswith("edges of round"):
            raise Killed

    built: dict[str, str] = {}
    loop = edged(toy_pack, joint_pack, tmp_path, say=dies)
    with pytest.raises(Killed):
        loop.once()
    loop.store.delete(ids=loop.state["frames"][:3])
    loop.close()
    monkeypatch.setattr(
        "adapt.loop.rounds.adapt", lambda *a, **k: pytest.fail("the round had come to its end")
    )
    again = edged(toy_pack, joint_pack, tmp_path, built=built, source=Camera(Clock(), 0))
    report = again.once()
    assert (report["state"], report["edges"]) == ("LIVE", "accepted")
    assert built["road"] == whole[0]["road"]
    assert built["edges"] != whole[0]["edges"], "fewer frames were learnt from"


@pytest.mark.slow
def test_one_network_under_both_heads_is_adapted_as_one(joint_pack, tmp_path):
    """The edges follow on the pack that came out of the segmentation's round."""
    from adapt.gate.limits import Limits
    from adapt.round import RoundConfig

    lenient = Limits(
        source_drop=1.0,
        kept=0.0,
        variety=0.0,
        flip_drop=1.0,
        parent_flip_drop=1.0,
        teacher=0.0,
        agreement=0.0,
        translated_drop=1.0,
        calibration_rise=1.0,
        confidence_jump=1.0,
        foreign=1.0,
        shares_rise=99.0,
    )
    config = RoundConfig(portions=(0.5,), steps=2, source=2, target=2, rate=1e-4, limits=lenient)
    loop = edged(joint_pack, joint_pack, tmp_path, round=config)
    report = loop.once()
    assert (report["state"], report.get("edges")) == ("LIVE", "accepted"), report["reason"]
    folder = tmp_path / "work" / "round-0001"
    edges, segmentation = load_pack(folder / "edges" / "pack"), load_pack(folder / "pack")
    assert edges.spec.parent == segmentation.sha256
    assert edges.reference()["share"].tolist() == segmentation.reference()["share"].tolist()
