"""May the vehicle spare anything now?  What it says of itself, and the conditions for a round to run.

The interface is one call: ``read() -> VehicleState``.  The default reads a small file that the vehicle's own
software rewrites (JSON, or TOML by its suffix):

    {"time": 1781524800.0, "parked": true, "charging": true, "battery": 0.82, "temperature": 41.0}

`time` (seconds since the epoch) may be left out: the file's own time then counts.  A file that is old,
missing, from the future, not readable or not of this form allows nothing: silence is no permission.  Knows
neither rounds nor the service.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import stat
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Conditions", "FileVehicle", "Vehicle", "VehicleError", "VehicleState", "open_vehicle"]

TRIES = 3  # more, for a file that is read while it is rewritten
AHEAD = 5.0  # seconds that a file may be from the future: two clocks are never the same
LARGEST = 65_536  # bytes of a state file


class VehicleError(Exception):
    """The vehicle's state is not known.  One line: thing, reason."""


@dataclass(frozen=True)
class VehicleState:
    """None: the vehicle does not say.  battery: charge 0..1.  temperature: of the computer, in °C."""

    parked: bool | None = None
    charging: bool | None = None
    battery: float | None = None
    temperature: float | None = None


class _Damaged(VehicleError):
    """It cannot be parsed."""


class Vehicle(Protocol):
    """Where the state comes from."""

    def read(self) -> VehicleState:
        """Now.  Raises VehicleError where it is not known."""


class FileVehicle:
    """A file that is rewritten at least every `fresh` seconds."""

    def __init__(self, path: Path, *, fresh: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        self.path, self.fresh, self.clock = Path(path), fresh, clock

    def read(self) -> VehicleState:
        for _ in range(TRIES):
            try:
                return self._read()
            except _Damaged:  # read while it was rewritten in its place, most likely
                time.sleep(0.02)
        return self._read()

    def _read(self) -> VehicleState:
        try:
            # Not blocking: opening a pipe that nobody writes to would wait for ever.
            with open(self.path, "rb", opener=_not_blocking) as file:
                about = os.fstat(file.fileno())  # of this one file, though it may be replaced meanwhile
                if not stat.S_ISREG(about.st_mode):
                    raise VehicleError(f"vehicle state {self.path} is not a file")
                stamp, content = about.st_mtime, file.read(LARGEST + 1)
        except OSError as error:
            raise VehicleError(f"vehicle state {self.path} cannot be read ({error.strerror})") from error
        if len(content) > LARGEST:
            raise VehicleError(f"vehicle state {self.path} is larger than {LARGEST} bytes: not a state file")
        try:
            text = content.decode("utf-8")
            told = tomllib.loads(text) if self.path.suffix == ".toml" else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Damaged(f"vehicle state {self.path} is damaged ({_line(error)})") from error
        if not isinstance(told, dict):
            raise VehicleError(f"vehicle state {self.path} is damaged (not a table)")
        at = _number(told, "time", self.path)
        age = self.clock() - (stamp if at is None else at)
        if age > self.fresh:
            raise VehicleError(f"vehicle state {self.path} is {age:.0f} s old (at most {self.fresh:g})")
        if age < -AHEAD:
            raise VehicleError(f"vehicle state {self.path} is from {-age:.0f} s in the future")
        state = VehicleState(
            parked=_flag(told, "parked", self.path), charging=_flag(told, "charging", self.path),
            battery=_number(told, "battery", self.path), temperature=_number(told, "temperature", self.path),
        )  # fmt: skip
        if state.battery is not None and not 0.0 <= state.battery <= 1.0:
            raise VehicleError(f"vehicle state {self.path}: battery {state.battery:g} is not from 0 to 1")
        return state


def _not_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _flag(told: dict[str, Any], key: str, path: Path) -> bool | None:
    value = told.get(key)
    if value is not None and not isinstance(value, bool):
        raise VehicleError(f"vehicle state {path}: {key} is {str(value)[:40]!r}, not true or false")
    return value


def _number(told: dict[str, Any], key: str, path: Path) -> float | None:
    value = told.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise VehicleError(f"vehicle state {path}: {key} is {str(value)[:40]!r}, not a number")
    return float(value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


@dataclass(frozen=True)
class Conditions:
    """What must hold for a round to run.  None: not asked.  What the vehicle does not say does not hold."""

    parked: bool = False
    charging: bool = False
    battery: float | None = None  # at least
    temperature: float | None = None  # at most

    def __bool__(self) -> bool:
        return self.parked or self.charging or self.battery is not None or self.temperature is not None

    def refuses(self, vehicle: Vehicle | None) -> str:
        """Why no round may run now; "" where it may.  Never raises: a provider that fails forbids."""
        if not self:
            return ""
        if vehicle is None:
            return "the vehicle's state is not known"
        try:
            state = vehicle.read()
        except VehicleError as error:
            return str(error)
        except Exception as error:  # somebody else's provider
            return f"the vehicle's state cannot be read ({type(error).__name__}: {_line(error)})"
        if self.parked and state.parked is not True:
            return "not parked"
        if self.charging and state.charging is not True:
            return "not charging"
        if self.battery is not None and not (state.battery is not None and state.battery >= self.battery):
            said = "unknown" if state.battery is None else f"{100 * state.battery:.0f}%"
            return f"battery {said} (at least {100 * self.battery:.0f}%)"
        if self.temperature is not None and not (
            state.temperature is not None and state.temperature <= self.temperature
        ):
            said = "unknown" if state.temperature is None else f"{state.temperature:.0f} °C"
            return f"temperature {said} (at most {self.temperature:.0f} °C)"
        return ""


def open_vehicle(text: str, *, fresh: float = 60.0) -> Vehicle:
    """A state file, or ``package.module:NAME``: something callable without arguments that gives a Vehicle.

    Raises VehicleError where that is not there.
    """
    module, colon, name = text.partition(":")
    if not colon or "/" in module or module.endswith((".json", ".toml")):
        return FileVehicle(Path(text), fresh=fresh)
    try:
        made = getattr(importlib.import_module(module), name)()
    except Exception as error:
        raise VehicleError(
            f"vehicle {text!r} cannot be opened ({type(error).__name__}: {_line(error)})"
        ) from error
    if not callable(getattr(made, "read", None)):
        raise VehicleError(f"vehicle {text!r} has no read()")
    vehicle: Vehicle = made
    return vehicle
