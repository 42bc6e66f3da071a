"""Builds the engine versions of an adapted pack, each pack only once.

Knows the repository and `export.build`; knows nothing of the server.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapt.loop.config import EdgeMember, LoopConfig, LoopTools
from adapt.loop.state import LoopState, Phase
from adapt.round import RoundError, RoundResult
from networks.pack import Pack
from runtime.repository.repository import Repository

__all__ = ["Build", "Builder", "build_version"]

Build = Callable[[Any, Path, str, dict[str, Any], dict[str, Any]], int]

DESCRIPTION = (
    "round",
    "chosen",
    "source_free",
    "frames",
    "config",
    "stages",
    "distance",
    "torch",
    "threads",
)


class Builder:
    """Builds what a round made.

    Args:
        build: (pack, repository, model, adaptation, gate) -> version; see `build_version`.
        edges: the member whose edges are built with the segmentation, or None.
    """

    def __init__(
        self,
        repository: Path,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        *,
        build: Build,
        edges: EdgeMember | None = None,
    ) -> None:
        self.build = build
        self._repository, self._config, self._tools, self._state = repository, config, tools, state
        self._edges = edges

    def build_members(self, result: RoundResult, edges: Any) -> None:
        """Build the versions of a round, and store that they are submitted next.

        edges: the accepted result of the edges' round, or None.  Raises RoundError if one cannot be built.
        """
        started = time.monotonic()
        model = self._config.model
        gate = result.report["gate"]
        version = self.version_of(result.pack, model, _description(result), gate)
        members = {model: version}
        if edges is not None and self._edges is not None:
            description = {"kind": "edges", "with": result.report["round"]}
            members[self._edges.model] = self.version_of(
                edges.pack, self._edges.model, description, edges.report["gate"]
            )
        seconds = round(time.monotonic() - started, 2)
        self._state.enter(Phase.SUBMIT, version=version, members=members, build_seconds=seconds)

    def version_of(self, pack: Any, model: str, adaptation: dict[str, Any], gate: dict[str, Any]) -> int:
        """Return the version that was built from this pack; build it if there is none.

        There is one if the loop was killed after it published it.
        """
        repository = Repository(self._repository)
        for version in sorted(_versions(repository, model), reverse=True):
            try:
                manifest = repository.manifest(model, version)
            except Exception:  # skip damaged versions
                continue
            if manifest.get("pack", {}).get("sha256") == pack.sha256:
                return int(version)
        self._tools.progress("build", 0, 1)
        version = self.build(pack, self._repository, model, adaptation, gate)
        self._tools.progress("build", 1, 1)
        return version


def build_version(
    pack: Pack, repository: Path, model: str, adaptation: dict[str, Any], gate: dict[str, Any]
) -> int:
    """Build a version with `export.build.build` and return its number.

    The version gets the task and the edge thresholds of the model's newest version, because a joint pack may
    be served as its edges alone.

    Raises:
        RoundError: it cannot be built.  This ends the round, not the loop.
    """
    from export.build import Options, build
    from export.errors import ExportError

    served: dict[str, Any] = {}
    home = Repository(repository)
    for number in sorted(_versions(home, model), reverse=True):
        with contextlib.suppress(Exception):  # skip damaged versions
            manifest = home.manifest(model, number)
            served = {"task": manifest["task"], "edge_thresholds": manifest.get("edge_thresholds")}
            break
    try:
        made = build(
            pack, repository, model=model, adaptation=adaptation, gate=gate, options=Options(**served)
        )
        return int(made.version)
    except ExportError as error:
        raise RoundError(str(error)) from error


def _versions(repository: Repository, model: str) -> list[int]:
    return list(repository.versions(model)) if model in repository.models() else []


def _description(result: RoundResult) -> dict[str, Any]:
    """Return what the manifest of the engine version records about the round."""
    report = result.report
    return {
        **{key: report[key] for key in DESCRIPTION if key in report},
        "measures": {k: report[f"{k}_measures"] for k in ("parent", "reference", "candidate")},
    }
