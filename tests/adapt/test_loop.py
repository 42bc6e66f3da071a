"""The loop's decisions: what begins a round, what stops it, and that stopping changes nothing."""

from __future__ import annotations

import json
import os
import resource
import time
from types import SimpleNamespace

import pytest
import torch

from adapt.loop.budget import Budget, BudgetError, EnergyMeter, Meter
from adapt.loop.loop import Loop, LoopConfig, LoopError, Paused
from adapt.loop.server_channel import Command, Silent
from adapt.loop.vehicle import Conditions, FileVehicle, VehicleError, open_vehicle
from adapt.round import RoundConfig, RoundPaused, adapt
from tests.adapt.conftest import toy_scene

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


# ------------------------------------------------------------------------------------------- the loop, played
class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += max(seconds, 0.01)


class Camera:
    """A source whose frames are there at once; then it is silent."""

    finished = False

    def __init__(self, clock: Clock, count: int = 14, names: tuple[str, ...] = ("front",)) -> None:
        self.clock, self.left, self.names = clock, [(i, n) for i in range(count) for n in names], names

    def get(self, timeout: float):
        if not self.left:
            self.clock.sleep(timeout)
            return None
        i, name = self.left.pop(0)
        return SimpleNamespace(
            frame=toy_scene(200 + i, dark=True)[0], time=time.time(), source=name, model="road", version=1,
            labels=None, confidence=None, place=None, collect=None, dropped=0,
        )  # fmt: skip

    def close(self) -> None: ...


class Server:
    """Says LIVE to everything."""

    def __init__(self) -> None:
        self.submitted: list = []
        self.drifting: list[dict] = []

    def submit(self, model, version):
        self.submitted.append((model, version))
        yield SimpleNamespace(time=0.0, state="LIVE", check="", reason="", detail={})

    def submit_group(self, group, members):
        self.submitted.append((group, members))
        yield SimpleNamespace(time=0.0, state="LIVE", check="", reason="", detail={})

    def drift(self, model):
        return {"sources": self.drifting}


class Line(Silent):
    """A remote that is played."""

    def __init__(self, *commands: Command) -> None:
        self.commands, self.answers, self.reports = list(commands), [], []

    def poll(self):
        found, self.commands = self.commands, []
        return found

    def answer(self, command, accepted, reason=""):
        self.answers.append((command.kind, accepted, reason))

    def report(self, **parts):
        self.reports.append(parts)


FAST = RoundConfig(portions=(0.4,), steps=3, source=2, target=2, rate=1e-3)


def make(pack, tmp_path, *, clock=None, source=None, server=None, **more) -> Loop:
    clock = clock or Clock()
    keys = ("remote", "vehicle", "throttle", "once", "energy", "edges", "build")
    given = {key: more.pop(key) for key in keys if key in more}
    config = LoopConfig(**{"model": "road", "frames": 14, "near": 0, "round": FAST, "enough": 10, **more})
    return Loop(
        server or Server(), pack, tmp_path / "repo", tmp_path / "work", config, progress=lambda *a, **k: None,
        say=lambda text: None, source=source or Camera(clock), clock=clock, sleep=clock.sleep,
        **{"build": lambda *a: 2, **given},
    )  # fmt: skip


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

    line = Line()
    loop = make(toy_pack, tmp_path / "b", vehicle=Car(), conditions=Conditions(parked=True), remote=line)
    report = loop.once()
    assert any(r.get("phase") == "paused" and r["budget"]["paused"] == "not parked" for r in line.reports)
    assert report["adaptation"]["resumed"] >= 1
    assert report["adaptation"]["pack"] == whole["adaptation"]["pack"]


def test_a_budget_of_nothing_does_nothing(toy_pack, tmp_path):
    loop = make(toy_pack, tmp_path, budget=Budget(seconds=0.0), once=True)
    with pytest.raises(Paused, match="budget: 0 of 0 s"):
        loop.once()
    assert not (tmp_path / "work" / "round-0001").exists()


def test_steps_over_several_periods_give_the_same_weights(toy_pack, tmp_path):
    whole = make(toy_pack, tmp_path / "a").once()
    clock = Clock()
    loop = make(toy_pack, tmp_path / "b", clock=clock, budget=Budget(steps=1, period=0.2), once=False)
    loop.meter = Meter(loop.config.budget, loop.meter.file, wall=clock, clock=clock)
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
    monkeypatch.setattr("adapt.loop.loop.LOOK", 0.0)
    loop = make(toy_pack, tmp_path, budget=Budget(memory=1))
    report = loop.once()
    assert report["state"] == "FAILED"
    assert "memory" in report["reason"]
    assert "at the same place" in report["reason"]
    assert loop.state["phase"] == "collect"


def test_drift_begins_a_round_with_the_frames_since(toy_pack, tmp_path):
    server, clock = Server(), Clock()
    loop = make(toy_pack, tmp_path, server=server, clock=clock, on=("drift",), patience=5.0, frames=100)
    for _ in range(60):
        loop._pump(0.2)
    assert loop._decide()[0] == ""
    server.drifting = [{"source": "front", "state": "drifting", "since": 0.0}]
    clock.now += 60
    trigger, rows = loop._decide()
    assert trigger == "drift"
    assert len(rows) == 14
    server.drifting = [{"source": "front", "state": "drifting", "since": time.time() + 60}]
    clock.now += 60
    assert loop._decide()[0] == ""


def test_cameras_do_not_mix_unless_told(toy_pack, tmp_path):
    clock = Clock()
    loop = make(toy_pack, tmp_path / "a", clock=clock, source=Camera(clock, 12, ("front", "rear")), frames=12)
    for _ in range(24):
        loop._pump(0.1)
    _, rows = loop._decide()
    assert len(rows) == 12
    assert len({row.source for row in rows}) == 1
    mixed = make(toy_pack, tmp_path / "b", source=Camera(clock, 12, ("front", "rear")), frames=24, mix=True)
    for _ in range(24):
        mixed._pump(0.1)
    assert len(mixed._decide()[1]) == 24
    report = loop.once()
    assert report["frames"] == 12
    other = next(rows for rows in loop._candidates())
    assert len(other) == 12, "the other camera's frames were not used up"


def test_commands(toy_pack, tmp_path):
    line, clock = Line(Command(1, "start_round", {"reason": "me"})), Clock()
    loop = make(toy_pack, tmp_path, remote=line, clock=clock, frames=100)
    loop._pump(0.1)
    assert line.answers[-1][:2] == ("start_round", False)
    assert "are needed" in line.answers[-1][2]
    for _ in range(14):
        loop._pump(0.1)
    line.commands = [Command(2, "set_collection", {"on": False}), Command(3, "cancel_round")]
    loop._pump(0.1)
    assert [a[:2] for a in line.answers[-2:]] == [("set_collection", True), ("cancel_round", False)]
    kept = len(loop.store)
    loop.source.left = [(50, "front")]
    loop._pump(0.1)
    assert len(loop.store) == kept
    assert json.loads((tmp_path / "work" / "loop.json").read_text())["collecting"] is False
    line.commands = [Command(4, "start_round", {"reason": "an operator"})]
    report = loop.once()
    assert (report["state"], report["trigger"]) == ("LIVE", "command: an operator")
    healthy = [r["pseudo_labels"] for r in line.reports if "pseudo_labels" in r]
    assert 0 < healthy[-1]["labelled"] <= 1
    assert len(healthy[-1]["classes"]) == 4
    assert line.reports[-2]["last"]["state"] == "LIVE"


def test_a_round_can_be_cancelled(toy_pack, tmp_path):
    class Canceller(Line):
        def report(self, **parts):
            super().report(**parts)
            if parts.get("phase") == "round" and "round" in parts and not self.answers:
                self.commands = [Command(1, "cancel_round"), Command(2, "start_round", {"reason": "now"})]

    server, line = Server(), Canceller()
    report = make(toy_pack, tmp_path, remote=line, server=server).once()
    assert report["state"] == "CANCELLED"
    assert line.answers[0] == ("cancel_round", True, "")
    assert server.submitted == []
    assert not list((tmp_path / "work" / "round-0001").glob("labels-*"))


def test_edges_go_live_with_the_segmentation_as_a_group(toy_pack, tmp_path, monkeypatch):
    from adapt.loop.loop import EdgeMember
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


# ------------------------------------------------------------------------------------------- hostile
# surroundings
def test_the_store_may_vanish_or_be_damaged_while_it_runs(toy_pack, tmp_path):
    import shutil

    clock = Clock()
    loop = make(toy_pack, tmp_path, clock=clock, source=Camera(clock, 30))
    for _ in range(4):
        loop._pump(0.1)
    shutil.rmtree(tmp_path / "work" / "frames")
    loop._pump(0.1)  # noticed, and begun afresh
    loop._pump(0.1)
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


def test_a_full_disk_costs_frames_and_nothing_else(toy_pack, tmp_path):
    clock = Clock()
    loop = make(toy_pack, tmp_path, clock=clock, source=Camera(clock, 20))
    loop._pump(0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        for _ in range(5):
            loop._pump(0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert loop.refused["store"] == 5
    assert not list((tmp_path / "work" / "frames" / "frames").rglob("*.tmp"))
    loop._pump(0.1)
    assert len(loop.store) == 2


def test_a_failing_round_does_not_end_the_loop(toy_pack, tmp_path):
    def build(*_):
        raise RuntimeError("out of memory,\nso to speak")

    loop = make(toy_pack, tmp_path, build=build, retry=1.0)
    report = loop.once()
    assert (report["state"], report["reason"]) == ("FAILED", "out of memory, so to speak")
    loop.build = lambda *a: 2
    loop.source = Camera(loop.clock, 40)
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
    loop._collect()
    row = loop.store.rows()[3]
    (tmp_path / "work" / "frames" / "frames" / row.file).write_bytes(b"no picture")
    report = loop.once()
    assert report["frames"] == 13
    assert report["state"] in ("LIVE", "REFUSED")  # what the gate says of this toy is not asked here


def test_pauses_of_the_throttle_are_no_work(tmp_path):
    clock = Clock()
    energy = EnergyMeter(tmp_path, nvml=False)
    meter = Meter(Budget(seconds=5.0), tmp_path / "budget.json", clock=clock, energy=energy)
    meter.start()
    for _ in range(4):
        clock.now += 1.0 + 20.0
        meter.rested(20.0)
    assert not meter.exceeded()
    assert meter.spent()["seconds"] == pytest.approx(4.0)


def test_a_clock_that_jumps_back_neither_stops_nor_hurries_anything(toy_pack, tmp_path, monkeypatch):
    loop = make(toy_pack, tmp_path, rest=3600.0, on=("frames", "schedule"), every=60.0)
    loop.keep(finished=time.time() + 1e6)
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
    first = make(toy_pack, tmp_path, clock=clock, source=nothing)
    first.imports = dying
    with pytest.raises(Killed):
        first.once()
    first.close()
    again = make(toy_pack, tmp_path, clock=clock, source=nothing)
    again.imports = imports
    assert again.once()["state"] in ("LIVE", "REFUSED")
    assert len(again.store) == 40
    with pytest.raises(LoopError, match="at their end with 0 frames kept, 14 are wanted"):
        again.once()


def test_settings_that_cannot_be(toy_pack):
    with pytest.raises(LoopError, match="choose of frames"):
        LoopConfig(model="m", on=("sometimes",))
    with pytest.raises(LoopError, match="1 or more"):
        LoopConfig(model="m", frames=0)


# ------------------------------------------------------------------------------------------- the vehicle
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "damaged"), (b"[1]", "not a table"), (b'{"parked": "yes"}', "not true or false"),
        (b'{"parked": 1}', "not true or false"), (b'{"battery": 82}', "from 0 to 1"),
        (b'{"battery": NaN}', "not a number"), (b'{"time": true}', "not a number"), (b"\xff\xfe", "damaged"),
        (b"{" * 60_000, "damaged"), (b" " * 70_000, "larger than"), (b'{"time": 0}', "s old"),
        (b'{"time": 1e12}', "in the future"), (b"", "damaged"),
    ],
)  # fmt: skip
def test_a_state_that_is_not_one_forbids(tmp_path, content, says):
    file = tmp_path / "state.json"
    file.write_bytes(content)
    with pytest.raises(VehicleError, match=says):
        FileVehicle(file).read()
    assert says in Conditions(parked=True).refuses(FileVehicle(file))


def test_a_folder_for_a_state_file_costs_no_descriptor(tmp_path):
    for _ in range(5):
        with pytest.raises(VehicleError, match="cannot be read"):
            FileVehicle(tmp_path).read()
    held = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
    assert str(tmp_path) not in held


def test_states_and_conditions(tmp_path):
    file = tmp_path / "state.toml"
    file.write_text("parked = true\ncharging = false\nbattery = 0.5\ntemperature = 61.0\n")
    car = FileVehicle(file)
    assert Conditions(parked=True).refuses(car) == ""
    assert Conditions(charging=True).refuses(car) == "not charging"
    assert Conditions(battery=0.6).refuses(car) == "battery 50% (at least 60%)"
    assert Conditions(temperature=60).refuses(car) == "temperature 61 °C (at most 60 °C)"
    assert Conditions(parked=True).refuses(None)
    assert Conditions().refuses(None) == ""
    os.utime(file, (1, 1))
    assert "s old" in Conditions(parked=True).refuses(car)
    file.unlink()
    assert "cannot be read" in Conditions(parked=True).refuses(car)
    os.mkfifo(file)
    assert "is not a file" in Conditions(parked=True).refuses(car), "and it does not wait for a writer"
    assert "cannot be read" in Conditions(parked=True).refuses(SimpleNamespace(read=lambda: 1 / 0))
    silent = SimpleNamespace(read=lambda: SimpleNamespace(parked=None, battery=None))
    assert Conditions(parked=True).refuses(silent) == "not parked"
    assert Conditions(battery=0.1).refuses(silent).startswith("battery unknown")
    with pytest.raises(VehicleError, match="cannot be opened"):
        open_vehicle("nowhere.at_all:Car")
    with pytest.raises(VehicleError, match="no read"):
        open_vehicle("builtins:dict")


# ------------------------------------------------------------------------------------------- the budget
class Wall(Clock):
    pass


def test_a_budget_lasts_over_restarts_and_is_full_after_its_period(tmp_path):
    wall, clock = Wall(), Clock()
    wall.now = 1000.0

    def meter() -> Meter:
        limits = Budget(seconds=10.0, steps=3, period=100.0)
        return Meter(
            limits, tmp_path / "budget.json", wall=wall, clock=clock, energy=EnergyMeter(tmp_path, nvml=False)
        )

    one = meter()
    one.start()
    clock.now += 7
    assert one.exceeded() == ""
    one.stop()
    two = meter()
    two.start()
    clock.now += 4
    assert "11 of 10 s" in two.exceeded()
    two.stop()
    wall.now -= 500  # the clock jumps back: nothing is given
    assert meter().exceeded()
    wall.now += 99
    assert meter().exceeded()
    three = meter()
    three.save()
    wall.now += 101
    assert meter().exceeded() == ""
    (tmp_path / "budget.json").write_text("{")
    assert meter().exceeded(), "what was spent is not known: the period counts as spent"
    with pytest.raises(BudgetError, match="is damaged"):
        Meter(Budget(seconds=1.0), tmp_path / "budget.json", energy=EnergyMeter(tmp_path, nvml=False))
    with pytest.raises(BudgetError, match="seconds is -1"):
        Budget(seconds=-1)


def test_energy_is_read_from_powercap_over_its_wrap(tmp_path):
    for zone, value in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5), ("intel-rapl:1", 0), ("other", 1)):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(str(value * 1_000_000))
        (tmp_path / zone / "max_energy_range_uj").write_text("1000000000")
    meter = EnergyMeter(tmp_path, nvml=False)
    assert meter.readable
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("50000000")  # 1000 J is nought again
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("25000000")
    assert meter.joules() == pytest.approx(150 + 25)
    counted = Meter(Budget(joules=100.0), tmp_path / "b.json", energy=meter)
    counted.start()
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("130000000")
    assert "105 of 100 J" in counted.exceeded()
    with pytest.raises(BudgetError, match="joules cannot be limited"):
        Meter(Budget(joules=1.0), tmp_path / "c.json", energy=EnergyMeter(tmp_path / "none", nvml=False))


def test_a_state_that_is_rewritten_in_its_place_is_read_between_two_writes(tmp_path, monkeypatch):
    """The first reads find it cut off, as after the writer's truncate; then it is whole."""
    file = tmp_path / "state.json"
    file.write_text('{"time": 17')
    tries = []

    def sleep(seconds):
        tries.append(seconds)
        if len(tries) == 2:
            file.write_text(json.dumps({"time": time.time(), "parked": True}))

    monkeypatch.setattr("adapt.loop.vehicle.time.sleep", sleep)
    assert FileVehicle(file).read().parked is True
    assert len(tries) == 2
    file.write_text("{")
    with pytest.raises(VehicleError, match="damaged"):
        FileVehicle(file).read()
