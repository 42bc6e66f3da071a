"""The loop's decisions: what begins a round, what stops it, and that stopping changes nothing."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest
import torch

from adapt.loop import EdgeMember, LoopError, Paused
from adapt.loop.budget import Budget
from adapt.loop.server_channel import Command
from adapt.loop.vehicle import Conditions
from adapt.round import RoundConfig, RoundPaused, adapt
from tests.adapt.conftest import toy_scene
from tests.adapt.loop.toys import Camera, Clock, PlayedChannel, Server, make

QUICK = RoundConfig(portions=(0.3, 0.5), steps=6, source=2, target=2, checkpoint_every=100, rate=1e-3)


# ------------------------------------------------------------------------------------------- pausing a round
def test_paused_anywhere_a_round_ends_with_the_same_weights(toy_pack, dark_frames, tmp_path):
    """Stopped after every third piece of work, whatever it is, and gone on with: bit for bit the same."""
    whole = adapt(toy_pack, dark_frames, config=QUICK, out=tmp_path / "whole")
    pieces = 0

    def stop(stage: str, done: int, total: int, **numbers: float) -> None:
        nonlocal pieces
        pieces += 1
        # Labelling and measuring are repeated from their beginning: they are let through, as a budget that
        # lasts.
        if stage.startswith("train") and pieces % 3 == 0 and done < total:
            raise RoundPaused("enough for now")

    result, pauses = None, 0
    while result is None:
        try:
            result = adapt(toy_pack, dark_frames, config=QUICK, out=tmp_path / "pieces", progress=stop)
        except RoundPaused:
            pauses += 1
            assert pauses < 50
    assert pauses >= 3
    assert result.report["chosen"] == whole.report["chosen"]
    for name, tensor in whole.pack.state().items():
        assert torch.equal(tensor, result.pack.state()[name]), name
    assert result.pack.sha256 == whole.pack.sha256


def test_the_refreshed_pack_knows_the_statistics_of_its_own_domain(toy_pack, dark_frames, tmp_path):
    made = adapt(toy_pack, dark_frames, config=RoundConfig(portions=()), out=tmp_path).pack
    reference = made.reference()
    assert reference["share"].sum() == pytest.approx(1.0)
    pixels = len(dark_frames) * 32 * 64
    assert reference["confidence"].sum() == pixels
    assert reference["confidence"].shape == (4, 256)


def test_nothing_begins_while_the_vehicle_forbids_it_and_frames_are_kept_meanwhile(toy_pack, tmp_path):
    class Car:
        looks = 0

        def read(self):
            self.looks += 1
            return SimpleNamespace(parked=self.looks > 5, charging=None, battery=None, temperature=None)

    car = Car()
    report = make(toy_pack, tmp_path, vehicle=car, conditions=Conditions(parked=True)).once()
    assert report["state"] == "LIVE"
    assert car.looks > 5


def test_a_car_that_drives_off_pauses_the_round_and_the_result_is_the_same(toy_pack, tmp_path):
    whole = make(toy_pack, tmp_path / "a").once()

    class Car:
        looks = 0

        def read(self):
            self.looks += 1
            return SimpleNamespace(parked=self.looks % 4 < 2, charging=None, battery=None, temperature=None)

    channel = PlayedChannel()
    loop = make(toy_pack, tmp_path / "b", vehicle=Car(), conditions=Conditions(parked=True), remote=channel)
    report = loop.once()
    assert any(r.get("phase") == "paused" and r["budget"]["paused"] == "not parked" for r in channel.reports)
    assert report["adaptation"]["resumed"] >= 1
    assert report["adaptation"]["pack"] == whole["adaptation"]["pack"]


def test_a_budget_of_nothing_does_nothing(toy_pack, tmp_path):
    loop = make(toy_pack, tmp_path, budget=Budget(seconds=0.0), once=True)
    with pytest.raises(Paused, match="budget: 0 of 0 s"):
        loop.once()
    assert not (tmp_path / "work" / "round-0001").exists()


def test_steps_over_several_periods_give_the_same_weights(toy_pack, tmp_path):
    whole = make(toy_pack, tmp_path / "a").once()
    loop = make(
        toy_pack,
        tmp_path / "b",
        budget=Budget(steps=1, period=0.2),
        once=False,
        clock=time.monotonic,
        sleep=time.sleep,
        source=Camera(Clock()),
    )
    report = loop.once()
    assert report["state"] == "LIVE"
    assert report["adaptation"]["resumed"] >= 1
    assert report["adaptation"]["pack"] == whole["adaptation"]["pack"]


def test_with_once_a_spent_budget_ends_with_paused_and_the_next_run_goes_on(toy_pack, tmp_path):
    loop = make(toy_pack, tmp_path, budget=Budget(steps=1), once=True)
    with pytest.raises(Paused, match="1 of 1 steps are spent"):
        loop.once()
    loop.close()
    again = make(toy_pack, tmp_path, budget=Budget(steps=100), once=True)
    assert again.state["phase"] == "round"
    assert again.once()["state"] == "LIVE"


def test_a_limit_that_never_suffices_is_named(toy_pack, tmp_path, monkeypatch):
    monkeypatch.setattr("adapt.loop.permit.CHECK_SECONDS", 0.0)
    loop = make(toy_pack, tmp_path, budget=Budget(memory=1))
    report = loop.once()
    assert report["state"] == "FAILED"
    assert "memory" in report["reason"]
    assert "at the same place" in report["reason"]
    assert loop.state["phase"] == "collect"


def test_the_frames_of_another_camera_are_not_used_up(toy_pack, tmp_path):
    clock = Clock()
    loop = make(toy_pack, tmp_path, clock=clock, source=Camera(clock, 12, ("front", "rear")), frames=12)
    for _ in range(24):
        loop.collect_once(0.1)
    assert loop.once()["frames"] == 12
    assert len(loop.pool.unused_by_camera()[0]) == 12


def test_a_command_starts_a_round_and_the_reports_describe_its_labels(toy_pack, tmp_path):
    channel, clock = PlayedChannel(), Clock()
    loop = make(toy_pack, tmp_path, remote=channel, clock=clock, frames=100)
    for _ in range(14):
        loop.collect_once(0.1)
    channel.commands = [Command(4, "start_round", {"reason": "an operator"})]
    report = loop.once()
    assert (report["state"], report["trigger"]) == ("LIVE", "command: an operator")
    healthy = [r["pseudo_labels"] for r in channel.reports if "pseudo_labels" in r]
    assert 0 < healthy[-1]["labelled"] <= 1
    assert len(healthy[-1]["classes"]) == 4
    assert channel.reports[-2]["last"]["state"] == "LIVE"


def test_a_round_can_be_cancelled(toy_pack, tmp_path):
    class Canceller(PlayedChannel):
        def report(self, **parts):
            super().report(**parts)
            if parts.get("phase") == "round" and "round" in parts and not self.answers:
                self.commands = [Command(1, "cancel_round"), Command(2, "start_round", {"reason": "now"})]

    server, channel = Server(), Canceller()
    report = make(toy_pack, tmp_path, remote=channel, server=server).once()
    assert report["state"] == "CANCELLED"
    assert channel.answers[0] == ("cancel_round", True, "")
    assert server.submitted == []
    assert not list((tmp_path / "work" / "round-0001").glob("labels-*"))


def test_edges_go_live_with_the_segmentation_as_a_group(toy_pack, tmp_path, monkeypatch):
    from adapt.round import edges as round_edges

    gate = {"passed": True, "failed": [], "checks": []}
    made = SimpleNamespace(accepted=True, pack=toy_pack, report={"gate": gate})
    monkeypatch.setattr(round_edges, "adapt_edges", lambda *a, **k: made)
    server, built = Server(), []

    def build(pack, repository, model, adaptation, gate):
        built.append(model)
        return len(built) + 1

    edges = EdgeMember(toy_pack, "edges", "both")
    report = make(toy_pack, tmp_path, server=server, edges=edges, build=build).once()
    assert server.submitted == [("both", {"road": 2, "edges": 3})]
    assert report["members"] == {"road": 2, "edges": 3}


# ------------------------------------------------------------------------------------- hostile surroundings
def test_the_store_may_vanish_or_be_damaged_while_it_runs(toy_pack, tmp_path):
    import shutil

    clock = Clock()
    loop = make(toy_pack, tmp_path, clock=clock, source=Camera(clock, 30))
    for _ in range(4):
        loop.collect_once(0.1)
    shutil.rmtree(tmp_path / "work" / "frames")
    loop.collect_once(0.1)  # noticed, and begun afresh
    loop.collect_once(0.1)
    assert len(loop.store) == 1
    index = tmp_path / "work" / "frames" / "index.sqlite"
    loop.close()
    content = bytearray(index.read_bytes())
    content[100:] = os.urandom(len(content) - 100)
    index.write_bytes(content)
    again = make(toy_pack, tmp_path, clock=clock, source=Camera(clock, 14))
    assert len(again.store) == 0
    assert list((tmp_path / "work").glob("frames.damaged-*"))
    assert again.once()["state"] == "LIVE"


def test_a_failing_round_does_not_end_the_loop(toy_pack, tmp_path):
    def build(*_):
        raise RuntimeError("out of memory,\nso to speak")

    clock = Clock()
    loop = make(toy_pack, tmp_path, build=build, retry=1.0, clock=clock)
    report = loop.once()
    assert (report["state"], report["reason"]) == ("FAILED", "out of memory, so to speak")
    loop.builder.build = lambda *a: 2
    loop.collector.source = Camera(clock, 40)
    assert loop.once()["round"] == 2


def test_a_version_that_cannot_be_built_does_not_end_the_loop(toy_pack, tmp_path, monkeypatch):
    import export.build
    from export.errors import ExportError

    def build(*_, **__):
        raise ExportError("parity: the answers differ; nothing was published")

    monkeypatch.setattr(export.build, "build", build)
    report = make(toy_pack, tmp_path, build=None, retry=1.0).once()
    assert report["state"] == "FAILED"
    assert report["reason"] == "parity: the answers differ; nothing was published"


def test_a_picture_that_became_unreadable_is_left_out_of_its_round(toy_pack, tmp_path):
    """It is still there, so opening the store again does not help: the round must not try it for ever."""
    loop = make(toy_pack, tmp_path)
    loop.collect()
    row = loop.store.rows()[3]
    (tmp_path / "work" / "frames" / "frames" / row.file).write_bytes(b"no picture")
    report = loop.once()
    assert report["frames"] == 13
    assert report["state"] in ("LIVE", "REFUSED")  # what the gate says of this toy is not asked here


def test_a_clock_that_jumps_back_neither_stops_nor_hurries_anything(toy_pack, tmp_path, monkeypatch):
    loop = make(toy_pack, tmp_path, rest=3600.0, on=("frames", "schedule"), every=60.0)
    loop.state.update(finished=time.time() + 1e6)
    assert loop.once()["state"] == "LIVE"


def test_frames_of_a_folder_killed_while_reading_come_once(toy_pack, tmp_path):
    from PIL import Image

    from adapt.sources import open_source

    (tmp_path / "drive").mkdir()
    for i in range(40):
        Image.fromarray(toy_scene(200 + i, dark=True)[0]).save(tmp_path / "drive" / f"{i:03d}.png")
    text = f"front={tmp_path / 'drive'}"

    class Killed(BaseException):
        pass

    def imports(done):
        return [(text, open_source(text, skip=done.get(text, 0)))]

    def dying(done):
        ((name, source),) = imports(done)
        whole = source.get

        def get(timeout):
            if source.read == 35:
                raise Killed
            return whole(timeout)

        source.get = get
        return [(name, source)]

    clock = Clock()
    nothing = SimpleNamespace(finished=True, get=lambda timeout: None, close=lambda: None)
    first = make(toy_pack, tmp_path, clock=clock, source=nothing, imports=dying)
    with pytest.raises(Killed):
        first.once()
    first.close()
    again = make(toy_pack, tmp_path, clock=clock, source=nothing, imports=imports)
    assert again.once()["state"] in ("LIVE", "REFUSED")
    assert len(again.store) == 40
    with pytest.raises(LoopError, match="at their end with 0 frames kept, 14 are wanted"):
        again.once()
