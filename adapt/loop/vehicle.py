"""Whether the vehicle can spare anything now: the state it reports, and the conditions for a round to run.

The interface is one call: ``read() -> VehicleState``.  `FileVehicle` reads a small file that the vehicle's
software rewrites (JSON, or TOML by its suffix):

    {"time": 1781524800.0, "parked": true, "charging": true, "battery": 0.82, "temperature": 41.0}

`time` (seconds since the epoch) may be left out: the file's modification time then counts.  A file that is
old, missing, from the future, not readable or not of this form permits nothing.  Knows neither rounds nor the
service.
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

TRIES = 3  # further reads of a file that may be just being rewritten
AHEAD = 5.0  # seconds that a file may be from the future: two clocks always differ
LARGEST = 65_536  # bytes of a state file


class VehicleError(Exception):
    """The vehicle's state is not known.  One line: thing, reason."""


@dataclass(frozen=True)
class VehicleState:
    """What the vehicle reports; None = unknown.

    battery: charge, 0 to 1.  temperature: of the computer, in °C.
    """

    parked: bool | None = None
    charging: bool | None = None
    battery: float | None = None
    temperature: float | None = None


class _Damaged(VehicleError):
    """The file cannot be parsed."""


class Vehicle(Protocol):
    """Reports the state of the vehicle."""

    def read(self) -> VehicleState:
        """Return the state now.  Raises VehicleError if it is not known."""


class FileVehicle:
    """Reads a file that the vehicle rewrites at least every `fresh` seconds."""

    def __init__(self, path: Path, *, fresh: float = 60.0, clock: Callable[[], float] = time.time) -> None:
        self.path, self.fresh, self.clock = Path(path), fresh, clock

    def read(self) -> VehicleState:
        for _ in range(TRIES):
            try:
                return self._read()
            except _Damaged:  # most likely it was read while it was rewritten in place
                time.sleep(0.02)
        return self._read()

    def _read(self) -> VehicleState:
        try:
            # Not blocking: opening a pipe that has no writer would never return.
            with open(self.path, "rb", opener=_not_blocking) as file:
                about = os.fstat(
                    file.fileno()
                )  # of the open file, although the path may be replaced meanwhile
                if not stat.S_ISREG(about.st_mode):
                    raise VehicleError(f"vehicle state {self.path} is not a file")
                stamp, content = about.st_mtime, file.read(LARGEST + 1)
        except OSError as error:
            raise VehicleError(f"vehicle state {self.path} cannot be read ({error.strerror})") from error
        if len(content) > LARGEST:
            raise VehicleError(f"vehicle state {self.path} is larger than {LARGEST} bytes: not a state file")
        try:
            text = content.decode("utf-8")
            table = tomllib.loads(text) if self.path.suffix == ".toml" else json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Damaged(f"vehicle state {self.path} is damaged ({_line(error)})") from error
        if not isinstance(table, dict):
            raise VehicleError(f"vehicle state {self.path} is damaged (not a table)")
        at = _number(table, "time", self.path)
        age = self.clock() - (stamp if at is None else at)
        if age > self.fresh:
            raise VehicleError(f"vehicle state {self.path} is {age:.0f} s old (at most {self.fresh:g})")
        if age < -AHEAD:
            raise VehicleError(f"vehicle state {self.path} is from {-age:.0f} s in the future")
        state = VehicleState(
            parked=_flag(table, "parked", self.path),
            charging=_flag(table, "charging", self.path),
            battery=_number(table, "battery", self.path),
            temperature=_number(table, "temperature", self.path),
        )
        if state.battery is not None and not 0.0 <= state.battery <= 1.0:
            raise VehicleError(f"vehicle state {self.path}: battery {state.battery:g} is not from 0 to 1")
        return state


def _not_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _flag(table: dict[str, Any], key: str, path: Path) -> bool | None:
    value = table.get(key)
    if value is not None and not isinstance(value, bool):
        raise VehicleError(f"vehicle state {path}: {key} is {str(value)[:40]!r}, not true or false")
    return value


def _number(table: dict[str, Any], key: str, path: Path) -> float | None:
    value = table.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise VehicleError(f"vehicle state {path}: {key} is {str(value)[:40]!r}, not a number")
    return float(value)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]


@dataclass(frozen=True)
class Conditions:
    """What must hold for a round to run; None = not required.

    A condition does not hold if the vehicle does not report it.  battery: least charge, 0 to 1.
    temperature: highest, in °C.
    """

    parked: bool = False
    charging: bool = False
    battery: float | None = None
    temperature: float | None = None

    def __bool__(self) -> bool:
        return self.parked or self.charging or self.battery is not None or self.temperature is not None

    def refuses(self, vehicle: Vehicle | None) -> str:
        """Return why no round may run now, or "".  Never raises: a provider that fails forbids it."""
        if not self:
            return ""
        if vehicle is None:
            return "the vehicle's state is not known"
        try:
            state = vehicle.read()
        except VehicleError as error:
            return str(error)
        except Exception as error:  # a provider that is not ours may raise anything
            return f"the vehicle's state cannot be read ({type(error).__name__}: {_line(error)})"
        if self.parked and state.parked is not True:
            return "not parked"
        if self.charging and state.charging is not True:
            return "not charging"
        if self.battery is not None and not (state.battery is not None and state.battery >= self.battery):
            shown = "unknown" if state.battery is None else f"{100 * state.battery:.0f}%"
            return f"battery {shown} (at least {100 * self.battery:.0f}%)"
        if self.temperature is not None and not (
            state.temperature is not None and state.temperature <= self.temperature
        ):
            shown = "unknown" if state.temperature is None else f"{state.temperature:.0f} °C"
            return f"temperature {shown} (at most {self.temperature:.0f} °C)"
        return ""


def open_vehicle(text: str, *, fresh: float = 60.0) -> Vehicle:
    """Open a state file, or call ``package.module:NAME`` without arguments for a Vehicle.

    Raises VehicleError if the module has no such name, or what it returns has no `read`.
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
