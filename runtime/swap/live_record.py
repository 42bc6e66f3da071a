"""live.json: which version of a model (or generation of a group) a restart loads.

It is written before the change becomes visible: durable first, then visible.  Knows the repository; knows
nothing of swaps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from runtime.errors import Refused
from runtime.repository.repository import Repository


def write_live(
    repository: Repository,
    name: str,
    state: dict[str, Any],
    title: str = "live.json",
    *,
    make_directory: bool = False,
) -> None:
    """Replaces live.json of a model or group.  `title` names the file in the error.

    Raises Refused("record", …).
    """
    try:
        if make_directory:
            repository.ensure_model_dir(name)
        repository.set_live(name, state)
    except OSError as error:
        raise Refused("record", f"{title} cannot be written: {error.strerror or error}") from error


class LiveRecord:
    """The record of one model.  The caller of every method that writes holds the scope's state lock."""

    def __init__(self, model: str, repository: Repository) -> None:
        self._model = model
        self._repository = repository

    def read(self) -> tuple[dict[str, Any], bool]:
        """Returns (what was live when the server last ran, whether it comes from live.json).

        If live.json is lost, the history replaces it.
        """
        state = self._repository.live(self._model) or {}
        if state.get("live"):
            return state, True
        state.pop("previous", None)
        return {**self._repository.last_live(self._model), **state}, False

    def write(self, state: dict[str, Any]) -> None:
        """Raises Refused("record", …)."""
        write_live(self._repository, self._model, state)

    def write_flip(
        self, live: int, previous: int | None, flags: Mapping[str, Any], extra: Mapping[str, Any]
    ) -> None:
        """Records a flip: the version that becomes live, the one before it, the operator's flags, and what
        the scope adds.  Raises Refused("record", …).
        """
        self.write({"live": live, "previous": previous, **flags, "time": time.time(), **extra})

    def write_scope(self, extra: Mapping[str, Any]) -> None:
        """Records what the scope adds, if live.json does not contain it yet.  Raises Refused("record", …)."""
        state = self._repository.live(self._model) or {}
        if state.get("live") and any(state.get(key) != value for key, value in extra.items()):
            self.write({**state, **extra})

    def write_unloaded(self, unloaded: bool) -> None:
        """Records whether an operator has unloaded the model.  Raises Refused("record", …)."""
        state = self.read()[0]
        if unloaded:
            self.write({**state, "unloaded": True})
        else:
            self.write({key: value for key, value in state.items() if key != "unloaded"})
