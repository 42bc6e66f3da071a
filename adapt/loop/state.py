"""What the loop remembers over a kill: WORKDIR/loop.json, and the lock that keeps a second loop out.

Each step writes here what it is about to do before it does it.  Knows neither frames nor networks.
"""

from __future__ import annotations

import enum
import fcntl
import math
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adapt.loop.errors import LoopError, one_line
from adapt.loop.outcome import Decision
from common.files import read_json, write_json

__all__ = ["LoopState", "Phase", "RoundKind"]


class Phase(enum.StrEnum):
    """Which step a loop that is started again continues with."""

    COLLECT = "collect"
    ROUND = "round"
    SUBMIT = "submit"


class RoundKind(enum.StrEnum):
    """TRAIN: a whole round.  REFRESH: new batch statistics alone, after a change of domain."""

    TRAIN = "train"
    REFRESH = "refresh"


class LoopState(Mapping[str, Any]):
    """The content of loop.json; as a mapping it gives the raw values.

    Raises:
        LoopError: another loop works in `workdir`, loop.json is damaged, or it belongs to another pack.
    """

    def __init__(self, workdir: Path, pack: str) -> None:
        self.workdir = workdir
        workdir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_workdir(workdir)
        try:
            self._values = _read_state(workdir, pack)
        except BaseException:
            os.close(self._lock)
            raise

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    # ------------------------------------------------------------------------------------------- reading
    @property
    def phase(self) -> Phase:
        return Phase(self["phase"])

    @property
    def round(self) -> int:
        """Number of the round that runs or comes next, from 1."""
        return int(self["round"])

    @property
    def folder(self) -> Path:
        """WORKDIR/round-NNNN of that round."""
        return self.workdir / f"round-{self.round:04d}"

    @property
    def frame_ids(self) -> list[int]:
        """Store ids of the round's frames; raises KeyError in phase COLLECT."""
        return list(self["frames"])

    @property
    def is_refresh(self) -> bool:
        """True if the round that runs only refreshes batch statistics."""
        return self.get("kind") == RoundKind.REFRESH

    @property
    def is_collecting(self) -> bool:
        """False after an operator switched collection off."""
        return bool(self.get("collecting", True))

    @property
    def finished(self) -> float:
        """When the last round of training ended, in seconds since the epoch; 0 = never."""
        return float(self.get("finished", 0.0))

    @property
    def answering(self) -> int:
        """The version that is known to answer; 0 for the released pack."""
        return int(self.get("answers", 0))

    def is_used(self, source: str, frame: int) -> bool:
        """Return True if a round has used this frame of this camera, or a later one."""
        used = self.get("used") or {}
        base = 0 if "used" in self else self["used_up_to"]
        return bool(frame <= used.get(source, base))

    # ------------------------------------------------------------------------------------------- writing
    def update(self, **values: Any) -> None:
        """Store these values durably."""
        self._values = {**self._values, **values}
        write_json(self.workdir / "loop.json", self._values)

    def note(self, **values: Any) -> None:
        """Remember these values; the next `update` stores them."""
        self._values.update(values)

    def enter(self, phase: Phase, **values: Any) -> None:
        """Store that this phase begins now, and these values with it."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.update(phase=phase.value, since=since, **values)

    def finish_round(self, decision: Decision, latest_used: Mapping[str, int]) -> None:
        """Store that the round ended and the next one collects.

        latest_used: per camera the newest frame of the round that no later round may use.
        """
        refreshing = self.is_refresh
        used = dict(self.get("used") or {})
        for source, frame in latest_used.items():
            used[source] = max(used.get(source, 0), frame)
        ids = set() if refreshing else set(self.frame_ids)
        lasting = {"schema", "pack", "imported", "collecting", "road_since", "answers"}
        if refreshing:  # rest and schedule count from rounds of training
            lasting |= {"finished"}
        kept = {key: value for key, value in self._values.items() if key in lasting}
        self._values = {
            "finished": 0.0 if refreshing else time.time(),
            **kept,
            "round": self.round + 1,
            "used": used,
            "last": decision.value,
            "used_up_to": max(ids, default=int(self.get("used_up_to", 0))),
        }
        self.enter(Phase.COLLECT)


def _read_state(workdir: Path, pack: str) -> dict[str, Any]:
    """Return the content of loop.json, or that of a new loop if there is no such file."""
    file = workdir / "loop.json"
    try:
        state = read_json(file)
        _check_state(state)
    except FileNotFoundError:
        return {
            "schema": 1,
            "pack": pack,
            "round": 1,
            "phase": Phase.COLLECT.value,
            "used_up_to": 0,
            "used": {},
        }
    except (ValueError, KeyError, OSError) as error:
        raise LoopError(f"{file} is damaged ({one_line(error)}): move it away to start afresh") from error
    if state.get("pack") != pack:
        raise LoopError(
            f"{workdir} belongs to pack {state.get('pack', '')[:12]}, not {pack[:12]}: give another --workdir"
        )
    return dict(state)


def _check_state(state: Any) -> None:
    """Raise ValueError unless `loop.json` holds what the loop writes: its numbers name folders and frames."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63

    if not isinstance(state, dict) or not whole(state["round"]) or state["round"] > 1_000_000_000:
        raise ValueError("not a state")
    if state["phase"] not in ("collect", "round", "submit"):
        raise ValueError("it names no phase of the loop")
    for key in ("used_up_to", "version", "stuck"):
        if not whole(state.get(key, 0)):
            raise ValueError(f"{key} is no number that the loop writes")
    if not isinstance(state.get("pack", ""), str):
        raise ValueError("pack is no text")
    needed = {"collect": (), "round": ("frames",), "submit": ("frames", "version")}[state["phase"]]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"it lacks {missing[0]}")
    if "used" not in state and "used_up_to" not in state:
        raise ValueError("it lacks used")
    for key in ("answers", "going"):
        value = state.get(key)
        if value is not None and (not isinstance(value, int) or not -(1 << 31) <= value < 1 << 63):
            raise ValueError(f"{key} is no version")
    for key in ("used", "imported", "members", "road_since"):
        table = state.get(key) or {}
        if not isinstance(table, dict) or not all(map(whole, table.values())):
            raise ValueError(f"{key} is no table of numbers")
    frames = state.get("frames", [])
    if not isinstance(frames, list) or not all(map(whole, frames)):
        raise ValueError("frames is no list of numbers")
    finished = state.get("finished", 0.0)
    if not isinstance(finished, int | float) or not math.isfinite(finished):
        raise ValueError("finished is no time")


def _lock_workdir(workdir: Path) -> int:
    """Return the file descriptor that holds the lock of `workdir`."""
    handle = os.open(workdir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        remedy = "end that one, or give another --workdir"
        raise LoopError(f"{workdir} is in use by another adapter: {remedy}") from error
    return handle
