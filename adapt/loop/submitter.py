"""Submits versions to the server's guarded swap and follows its decision.

Knows the server and the repository's records; knows neither frames nor rounds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from adapt.loop.config import EdgeMember, LoopConfig, LoopTools
from adapt.loop.domain_memory import RELEASED
from adapt.loop.errors import rpc_details
from adapt.loop.outcome import Decision, Outcome, Submission
from adapt.loop.state import LoopState
from runtime.client import Rejected
from runtime.repository.repository import Repository

__all__ = ["Submitter"]

NO_DECISION = "the server ended the stream without a decision"


class Submitter:
    """Submissions of one model, or of the frame group in which its edges follow.

    Args:
        client: a `runtime.client.Client`.
        pack: sha256 of the released pack.
        poll: answers commands; called between two attempts.
    """

    def __init__(
        self,
        client: Any,
        repository: Path,
        pack: str,
        config: LoopConfig,
        tools: LoopTools,
        state: LoopState,
        *,
        edges: EdgeMember | None = None,
        poll: Callable[[], None] = lambda: None,
    ) -> None:
        self._client, self._repository, self._pack = client, repository, pack
        self._config, self._tools, self._state, self._edges = config, tools, state, edges
        self._poll = poll

    # ---------------------------------------------------------------------------------- a round's versions
    def submit(self) -> Submission:
        """Submit the versions that the state names, again and again while the server is away.

        The outcome is LIVE, REJECTED, or UNKNOWN after `swap_timeout` seconds without a decision.
        """
        version = int(self._state["version"])
        started = time.monotonic()
        events: list[dict[str, Any]] = []
        outcome = Outcome(Decision.UNKNOWN, NO_DECISION)
        while time.monotonic() < started + self._config.swap_timeout:
            if (earlier := self._earlier_decision(version)) is not None:
                outcome = earlier
                break
            attempt = self.follow(self._submission(version))
            events, outcome = events + attempt.events, attempt.outcome
            if outcome.decision is not Decision.UNKNOWN:
                break
            # The server comes back, or the time runs out.
            self._tools.log(f"submit: {outcome.reason}; trying again")
            self._tools.sleep(1.0)
            self._poll()
        return Submission(outcome, events, round(time.monotonic() - started, 3))

    def _submission(self, version: int) -> Callable[[], Any]:
        members = self.members()
        if self._edges is not None and len(members) > 1:
            return partial(self._client.submit_group, self._edges.group, members)
        return partial(self._client.submit, self._config.model, version)

    def members(self) -> dict[str, int]:
        """Return {model: version} of what the state says is submitted."""
        return {str(model): int(version) for model, version in self._state.get("members", {}).items()}

    def follow(self, submit: Callable[[], Any]) -> Submission:
        """Log the events of one submission as they come, up to the decision."""
        events: list[dict[str, Any]] = []
        try:
            for event in submit():
                events.append({k: getattr(event, k) for k in ("time", "state", "check", "reason")})
                words = " ".join(part for part in (event.check, event.reason) if part)
                self._tools.log(f"version {getattr(event, 'version', '')}: {event.state} {words}".rstrip())
                of_model = getattr(event, "model", self._config.model) == self._config.model
                if event.state == "REJECTED" or (event.state == "LIVE" and of_model):
                    return Submission(Outcome(Decision(event.state), words), events)
        except Rejected as error:
            away = error.code == "UNAVAILABLE"
            decision = Decision.UNKNOWN if away else Decision.REJECTED
            return Submission(Outcome(decision, error.reason), events)
        except grpc.RpcError as error:  # the server went away
            return Submission(Outcome(Decision.UNKNOWN, rpc_details(error)), events)
        return Submission(Outcome(Decision.UNKNOWN, NO_DECISION), events)

    def _earlier_decision(self, version: int) -> Outcome | None:
        """Return the decision about a version that was submitted before the loop was killed."""
        repository = Repository(self._repository)
        live = repository.live(self._config.model) or {}
        if live.get("live") == version:
            return Outcome(Decision.LIVE, "was live already")
        for line in reversed(list(repository.history(self._config.model))):
            if line.get("version") == version and line.get("state") in ("REJECTED", "ROLLED_BACK"):
                reason = f"{line.get('check', '')} {line.get('reason', '')}".strip()
                return Outcome(Decision.REJECTED, reason)
        return None

    def prune_versions(self, models: Collection[str]) -> list[int]:
        """Have the server delete old versions of these models; return those of the adapted model.

        The server decides which versions are still needed.
        """
        deleted: list[int] = []
        if not self._config.keep_versions:
            return deleted
        for model in models:
            try:
                gone = self._client.prune(model, self._config.keep_versions)["deleted"]
            except Exception as error:  # an older server, one that denies it, or away: the next round asks
                self._tools.log(f"old versions of {model} stay: {rpc_details(error)}")
                break
            if model == self._config.model:
                deleted += gone
        return deleted

    # -------------------------------------------------------------------------------------- earlier versions
    def answering_version(self) -> int | None:
        """Return the version that answers now: 0 = the released pack, None = a version of another adapter."""
        try:
            repository = Repository(self._repository, read_only=True)
            live = int((repository.live(self._config.model) or {}).get("live", 0))
            if not live:
                return self._state.answering
            pack = repository.manifest(self._config.model, live).get("pack", {})
        except Exception:  # a repository that is being written, or damaged: the next frame asks again
            return None
        if pack.get("sha256") == self._pack:
            return RELEASED
        is_ours = pack.get("parent") == self._pack or live == self._state.get("answers")
        return live if is_ours else None

    def go_back(self, version: int) -> Submission:
        """Submit an earlier version, or reset to the released pack (0), through the same guarded swap."""
        if version == RELEASED:
            return self.follow(self._reset)
        return self.follow(partial(self._client.submit, self._config.model, version))

    def _reset(self) -> Iterator[Any]:
        """Reset to the released pack; without the right to that, submit its version as any other."""
        try:
            yield from self._client.reset(self._config.model)
            return
        except Rejected as error:
            number = self._released_version() if error.code == "PERMISSION_DENIED" else 0
            if not number:
                raise
        yield from self._client.submit(self._config.model, number)

    def _released_version(self) -> int:
        """Return the newest version that was built from the released pack, or 0."""
        repository, model = Repository(self._repository, read_only=True), self._config.model
        for number in reversed(repository.versions(model)):
            with contextlib.suppress(Exception):  # skip damaged versions
                if repository.manifest(model, number)["pack"]["sha256"] == self._pack:
                    return number
        return 0
