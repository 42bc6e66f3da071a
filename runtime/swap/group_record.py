"""live.json of a frame group: which generation a restart loads.

After a kill it decides for all members; their own records contain the number of the generation that they
belong to.  Knows the repository; knows nothing of swaps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from runtime.events import State
from runtime.repository.records import number
from runtime.repository.repository import Repository
from runtime.serving.frame_group import Generation
from runtime.swap.live_record import write_live


class GroupRecord:
    """The record of one group.  The caller of every method that writes holds the group's state lock."""

    def __init__(self, name: str, repository: Repository) -> None:
        self._name = name
        self._repository = repository

    def read(self) -> dict[str, Any]:
        """Returns the group's record; from its history, if live.json is lost."""
        state = self._repository.live(self._name) or {}
        if live_generation(state) is not None:
            return state
        lines = [e for e in self._repository.history(self._name) if e.get("state") == State.LIVE.value]
        found: dict[str, Any] = {}
        for line in lines:
            detail = line.get("detail")
            if isinstance(detail, dict) and isinstance(detail.get("members"), dict):
                found = {"live": line.get("version"), "members": detail["members"]}
        return found | {key: state[key] for key in ("unloaded", "last") if key in state}

    def highest_number(self, state: Mapping[str, Any]) -> int:
        """Returns the highest number that any generation ever had; 0 = none."""
        used = (number(line.get("version")) for line in self._repository.history(self._name))
        return max(number(state.get("last")), number(state.get("live")), *used, 0)

    def write_flip(self, live: Generation, previous: Generation | None, last: int, unloaded: bool) -> None:
        """Records a generation as the live one.  Raises Refused("record", …)."""
        state = {
            "live": live.number,
            "members": dict(live.members),
            "previous": previous.number if previous is not None else None,
            "previous_members": dict(previous.members) if previous is not None else None,
            "last": last,
            "time": time.time(),
        }
        self._write(state | ({"unloaded": True} if unloaded else {}))

    def write_unloaded(self, unloaded: bool) -> None:
        """Records whether an operator has unloaded the group.  Raises Refused("record", …)."""
        state = {key: value for key, value in self.read().items() if key != "unloaded"}
        self._write(state | ({"unloaded": True} if unloaded else {}))

    def _write(self, state: dict[str, Any]) -> None:
        title = f"live.json of '{self._name}'"
        write_live(self._repository, self._name, state, title, make_directory=True)


def live_generation(state: Mapping[str, Any]) -> Generation | None:
    """Returns the live generation of a record; None if the record has none that can be used."""
    return _generation(state, "live", "members")


def previous_generation(state: Mapping[str, Any]) -> Generation | None:
    """Returns the generation before the live one of a record; None if it has none that can be used."""
    return _generation(state, "previous", "previous_members")


def _generation(state: Mapping[str, Any], key: str, members: str) -> Generation | None:
    count, versions = number(state.get(key)), state.get(members)
    if not count or not isinstance(versions, dict) or not all(number(v) for v in versions.values()):
        return None
    return Generation(count, {str(name): int(version) for name, version in versions.items()})
