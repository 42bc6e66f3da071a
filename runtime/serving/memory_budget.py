"""The memory account: what an engine will take is declared before it is loaded.

A candidate that does not fit is refused, and the live version keeps its memory: the
server refuses, it does not swell.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from runtime.config import GuardConfig
from runtime.errors import Refused
from runtime.serving.served_model import ServedModel

OVERHEAD = 16 << 20  # a session with next to no weights


class Reservation:
    """A candidate's claim, from before it is loaded until it is live (and counted by its slot) or closed."""

    def __init__(self, ledger: MemoryBudget, need: int) -> None:
        self.need = need
        self.is_loaded = False
        self._ledger = ledger

    def loaded(self) -> None:
        """Marks the memory as allocated: the machine's free memory no longer includes it."""
        self.is_loaded = True

    def release(self) -> None:
        """Releases the reservation; may be called any number of times."""
        self._ledger.forget(self)


class MemoryBudget:
    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        # A candidate that was given up is released when it is collected: maybe on the thread that holds this.
        self._lock = threading.RLock()
        self._hosts: list[ServedModel] = []
        self._reservations: list[Reservation] = []

    def configure(self, config: GuardConfig) -> None:
        self._config = config

    def add(self, host: ServedModel) -> None:
        with self._lock:
            self._hosts.append(host)

    def need(self, engine_bytes: int) -> int:
        """What an engine of that file size is declared to take."""
        return int(self._config.memory_factor * engine_bytes) + OVERHEAD

    def declared(self) -> int:
        """Bytes declared for every loaded slot, and for what is being loaded."""
        with self._lock:
            return self._declared()

    def reserve(self, host: ServedModel, engine_bytes: int) -> Reservation:
        """Declares the memory of a candidate; Refused("memory") when there is not that much.

        Under the resource-preserving policy the warm previous version of the same model is given up first.
        """
        claim = Reservation(self, self.need(engine_bytes))
        reason = self._reserve(claim)
        if reason and self._config.resource_preserving and host.drop_previous() is not None:
            reason = self._reserve(claim)
        if reason:
            raise Refused("memory", reason)
        return claim

    def readable(self, file_bytes: int) -> None:
        """Refused("memory") for a version whose files alone are more than there is: they are read whole."""
        limits = [self._config.memory_budget_bytes or None, available()]
        most = min((limit for limit in limits if limit is not None), default=None)
        if most is not None and file_bytes > most:
            raise Refused("memory", f"its files have {_mib(file_bytes)}, {_mib(most)} may be taken")

    def forget(self, claim: Reservation) -> None:
        with self._lock, contextlib.suppress(ValueError):
            self._reservations.remove(claim)

    def _reserve(self, claim: Reservation) -> str:
        need = claim.need
        with self._lock:
            budget = self._config.memory_budget_bytes
            taken = self._declared()
            if budget > 0 and taken + need > budget:
                return (
                    f"needs {_mib(need)}, {_mib(taken)} of the budget of {_mib(budget)} "
                    f"are taken (guard.memory_budget_bytes)"
                )
            left = available()
            if budget <= 0 and left is not None:
                left -= sum(other.need for other in tuple(self._reservations) if not other.is_loaded)
                if need + self._config.memory_reserve_bytes > left:
                    return f"needs {_mib(need)} and the machine has {_mib(left)} left"
            self._reservations.append(claim)
            return ""

    def _declared(self) -> int:
        slots = [slot for host in self._hosts for slot in host.loaded()]
        claimed = sum(claim.need for claim in tuple(self._reservations))
        return claimed + sum(self.need(slot.engine.memory_bytes) for slot in slots)


def available() -> int | None:
    """Bytes that a process may still take: of the machine or of its control group, whichever is less."""
    candidates = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                candidates.append(int(line.split()[1]) * 1024)
    except (OSError, ValueError):
        pass
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            candidates.append(max(0, int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text())))
    except (OSError, ValueError):
        pass
    return min(candidates) if candidates else None


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
