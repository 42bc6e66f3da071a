"""What the vehicle reports, and the conditions for work."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from adapt.loop.vehicle import Conditions, FileVehicle, VehicleError, open_vehicle


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "damaged"),
        (b"[1]", "not a table"),
        (b'{"parked": "yes"}', "not true or false"),
        (b'{"parked": 1}', "not true or false"),
        (b'{"battery": 82}', "from 0 to 1"),
        (b'{"battery": NaN}', "not a number"),
        (b'{"time": true}', "not a number"),
        (b"\xff\xfe", "damaged"),
        (b"{" * 60_000, "damaged"),
        (b" " * 70_000, "larger than"),
        (b'{"time": 0}', "s old"),
        (b'{"time": 1e12}', "in the future"),
        (b"", "damaged"),
    ],
)
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
