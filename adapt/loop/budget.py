"""What adaptation may spend: seconds, optimiser steps, joules, bytes of memory; counted over restarts.

A `Budget` is the limit for one `period` (for example a day).  A `Meter` counts what is spent in it and stores
the account in a file, so that neither a kill nor a restart gives more.  A clock that jumps back does not
refill it.  Energy is read from RAPL (powercap: the whole package, serving included) and NVML if they can be
read.
Knows nothing of rounds.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import read_json, write_json

__all__ = ["Budget", "BudgetError", "EnergyMeter", "Meter", "resident"]

POWERCAP = Path("/sys/class/powercap")


class BudgetError(Exception):
    """A limit that cannot be kept.  One line: thing, reason, remedy."""


@dataclass(frozen=True)
class Budget:
    """Limits; None = no limit.  Raises BudgetError for values that cannot be.

    seconds  of work, not of waiting, per period
    steps    of the optimiser, per period
    joules   per period
    memory   resident bytes of this process
    gpu      bytes of CUDA memory
    period   seconds after which seconds, steps and joules are full again; None = never
    """

    seconds: float | None = None
    steps: int | None = None
    joules: float | None = None
    memory: int | None = None
    gpu: int | None = None
    period: float | None = None

    def __post_init__(self) -> None:
        for key in ("seconds", "steps", "joules", "memory", "gpu"):
            value = getattr(self, key)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise BudgetError(f"budget: {key} is {value}; give a number from 0 on")
        if self.period is not None and not (math.isfinite(self.period) and self.period > 0):
            raise BudgetError(f"budget: period is {self.period}; give seconds above 0")


class EnergyMeter:
    """Joules since it was made, from every counter that can be read."""

    def __init__(self, powercap: Path = POWERCAP, *, nvml: bool = True) -> None:
        self._zones: dict[Path, tuple[int, int]] = {}  # zone -> (last reading, wraps at), in µJ
        for zone in sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else ():
            if zone.name.count(":") != 1:  # a part of a package, which counts it already
                continue
            try:
                wraps = int((zone / "max_energy_range_uj").read_text())
                self._zones[zone] = (int((zone / "energy_uj").read_text()), wraps)
            except (OSError, ValueError):  # since CVE-2020-8694 most kernels let only root read it
                continue
        self._devices: list[tuple[Any, int]] = []
        self._nvml: Any = None
        if nvml:
            try:
                import pynvml

                pynvml.nvmlInit()
                self._nvml = pynvml
                for i in range(pynvml.nvmlDeviceGetCount()):
                    device = pynvml.nvmlDeviceGetHandleByIndex(i)
                    self._devices.append((device, pynvml.nvmlDeviceGetTotalEnergyConsumption(device)))
            except Exception:  # not installed, no device, or one without this counter
                pass
        self._joules = 0.0

    @property
    def readable(self) -> bool:
        """True if at least one counter can be read."""
        return bool(self._zones or self._devices)

    def joules(self) -> float:
        for zone, (before, wraps) in list(self._zones.items()):
            try:
                now = int((zone / "energy_uj").read_text())
            except (OSError, ValueError):
                continue
            self._joules += ((now - before) if now >= before else (now + wraps - before)) / 1e6
            self._zones[zone] = (now, wraps)
        for i, (device, start) in enumerate(self._devices):
            try:
                millijoules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(device)
            except Exception:
                continue
            self._joules += max(0, millijoules - start) / 1e3
            self._devices[i] = (device, millijoules)
        return self._joules


def resident() -> int:
    """Return the resident bytes of this process; 0 if the system does not report them."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


class Meter:
    """Counts against a budget; the account is stored in `file`.

        meter.start(); ... meter.step(); meter.exceeded() ...; meter.stop()

    peak: most resident bytes that `memory_exceeded` has found.

    Raises BudgetError if joules are limited and no counter can be read, or the account is damaged.
    """

    def __init__(
        self,
        budget: Budget,
        file: Path,
        *,
        energy: EnergyMeter | None = None,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget, self.file, self._wall, self._clock = budget, file, wall, clock
        self._energy = energy if energy is not None else EnergyMeter()
        if budget.joules is not None and not self._energy.readable:
            raise BudgetError(
                "budget: joules cannot be limited, this machine lets nobody read them (RAPL needs root or a "
                "udev rule, NVML a GPU): leave --max-joules out"
            )
        self._account = self._read()
        self._since: float | None = None
        self._joules = self._energy.joules() if self._energy.readable else 0.0
        self._written = -math.inf
        self.peak = 0

    # -- the account ------------------------------------------------------------------------------------
    def _read(self) -> dict[str, float]:
        fresh = {"start": self._wall(), "seconds": 0.0, "steps": 0.0, "joules": 0.0}
        try:
            told = read_json(self.file)
        except FileNotFoundError:
            return fresh
        except (OSError, ValueError) as error:
            return self._unknown(error)
        try:
            account = {key: float(told[key]) for key in fresh}
            if not all(math.isfinite(v) and v >= 0 for v in account.values()):
                raise ValueError("not a number")
            return account
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            return self._unknown(error)

    def _unknown(self, error: Exception) -> dict[str, float]:
        """Not known what was spent: a period from now on with everything spent is the safe reading."""
        spent = {k: float(getattr(self.budget, k) or 0) for k in ("seconds", "steps", "joules")}
        if self.budget.period is None:
            words = " ".join(str(error).split())[:200]
            raise BudgetError(
                f"{self.file} is damaged ({words}): remove it to begin a new account"
            ) from error
        return {"start": self._wall(), **spent}

    def save(self) -> None:
        self._settle()
        write_json(self.file, {k: round(v, 3) for k, v in self._account.items()})
        self._written = self._clock()

    def _settle(self) -> None:
        """Add the time and energy since the last call; start a new period if one has ended."""
        now = self._clock()
        if self._since is not None:
            self._account["seconds"] += now - self._since
            self._since = now
        if self._energy.readable:
            joules = self._energy.joules()
            if self._since is not None:
                self._account["joules"] += joules - self._joules
            self._joules = joules
        wall = self._wall()
        if wall < self._account["start"]:  # the clock jumped back: the period restarts, what was spent stays
            self._account["start"] = wall
        if self.budget.period is not None and wall - self._account["start"] >= self.budget.period:
            self._account.update(start=wall, seconds=0.0, steps=0.0, joules=0.0)

    # -- spending ---------------------------------------------------------------------------------------
    def start(self) -> None:
        if self._since is None:
            self._settle()
            self._since = self._clock()

    def stop(self) -> None:
        if self._since is not None:
            self._settle()
            self._since = None
            self.save()

    def step(self) -> None:
        """Count one step of an optimiser."""
        self._account["steps"] += 1

    def rested(self, seconds: float) -> None:
        """Do not count the last `seconds` as work: they were a pause."""
        if self._since is not None:
            self._since = min(self._since + seconds, self._clock())

    def exceeded(self) -> str:
        """Return which limit is reached, one line, or "".  Stores the account every few seconds."""
        self._settle()
        if self._since is not None and self._clock() - self._written > 5.0:
            self.save()
        for key, unit in (("seconds", "s"), ("steps", "steps"), ("joules", "J")):
            limit = getattr(self.budget, key)
            if limit is not None and self._account[key] >= limit:
                return f"budget: {self._account[key]:.0f} of {limit:g} {unit} are spent"
        return ""

    def memory_exceeded(self) -> str:
        """Return that the memory limit is exceeded, one line, or ""."""
        held = resident()
        self.peak = max(self.peak, held)
        if self.budget.memory is not None and held > self.budget.memory:
            return f"memory: {held / 1e6:.0f} MB are held, {self.budget.memory / 1e6:.0f} MB are allowed"
        return ""

    def wait(self) -> float:
        """Return the seconds until the budget is full again; infinity if it never is."""
        self._settle()
        if self.budget.period is None:
            return math.inf
        return max(0.0, self._account["start"] + self.budget.period - self._wall())

    def spent(self) -> dict[str, float]:
        """Return {"seconds", "steps", "joules", "memory": peak} of this period.

        "joules" is missing if they cannot be read.
        """
        self._settle()
        spent = {key: round(self._account[key], 3) for key in ("seconds", "steps")}
        if self._energy.readable:
            spent["joules"] = round(self._account["joules"], 3)
        return {**spent, "memory": float(self.peak)}
