"""The loop's answer to a change of road: what `adapt.loop.domain_memory` asks for, through the store, budget
and server.

`Responder` stands between the loop and `adapt.loop.domain_memory.Response`: it is shown every frame that was
kept, knows what answers now, goes back to a version through the server's guarded swap, and hands the loop
the frames of a refresh, which is then a round as any other.  WORKDIR/roads.npz are the roads known,
WORKDIR/roads.jsonl says when and why what answers changed without a round.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from adapt.frames.store import StoredFrame, StoreError
from adapt.loop.domain_memory import RELEASED, Action, Look, Probe, Response
from adapt.round import RoundConfig, RoundResult
from adapt.sources import Captured

if TYPE_CHECKING:
    from adapt.loop.loop import Loop

__all__ = ["RESPONSES", "Responder", "refresh_config"]

RESPONSES = ("off", "back", "refresh")
FEWEST = 4  # frames of a round
HELD = ("frozen", "pinned", "stopping")  # somebody holds what is live: no fault of the version's


def refresh_config(config: RoundConfig) -> RoundConfig:
    """The round that only refreshes batch statistics: no training, everything else as `config` has it.

    keep 0.3: statistics of a handful of frames are noisy, and the released ones are the prior (Schneider et
    al., NeurIPS 2020).  Measured on roads that change (docs/results/continual.md): choosing between 0 and 0.5
    on the two or three frames that are held out is worse than 0.3 always.  The gate compares it with the
    parent.  views: a dozen frames down one street are too few to tell what is stuck to the picture from what
    the street is made of (97 of 168 honest ones were refused for that); the round that follows looks for it.
    """
    limits = replace(config.limits, views=3 * config.limits.views)
    return replace(
        config, portions=(), adabn=True, adabn_keep=(0.3,), holdout=max(config.holdout, 0.34), limits=limits
    )


class Responder:
    """Of one loop.  Raises ValueError where the network's look at a road cannot be taken."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        config = loop.config.road
        self.response = Response(Probe(loop.pack, config.layers), config, loop.workdir / "roads.npz")
        self._action: tuple[Action, str] | None = None  # what the road asks for, and which camera saw it
        self._settle = False  # somebody else chose what answers here: not to be undone

    # ------------------------------------------------------------------------------------------- looking
    def answering(self) -> int | None:
        """What answers now: RELEASED, one of our versions, or None for a version that is none of ours."""
        from runtime.repository.repository import Repository

        loop = self.loop
        try:
            repository = Repository(loop.repository, read_only=True)
            live = int((repository.live(loop.config.model) or {}).get("live", 0))
            if not live:
                return int(loop.state.get("answers", RELEASED))
            pack = repository.manifest(loop.config.model, live).get("pack", {})
        except Exception:  # a repository that is being written, or damaged: the next look asks again
            return None
        if pack.get("sha256") == loop.pack.sha256:
            return RELEASED
        ours = pack.get("parent") == loop.pack.sha256 or live == loop.state.get("answers")
        return live if ours else None

    def camera(self, source: str) -> str:
        return "" if self.loop.config.mix else source[:200]

    def see(self, captured: Captured) -> None:
        """A frame was kept: is it still the road that what is live was adapted to?"""
        live = self.answering()
        if live is None:
            return
        before, going = (self.loop.state.get(key) for key in ("answers", "going"))
        if before is not None and live not in (before, going):
            # A watch window or a person took it away: it does not come back by itself, nor is what they chose
            # replaced before the road changes.
            self.response.forget(int(before))
            self.response.start_again()
            self._settle = True
        if live != RELEASED and live not in self.response.versions():
            self._settle = True  # what was known of it is lost: this is its road
        if before != live:
            self.loop.keep(answers=live)
        source = self.camera(captured.source)
        action = self.response.offer(captured.frame, live, source)
        if action is None or not action.sure:
            return
        settle, self._settle = self._settle, False  # of this road, not of the next one
        if action.kind == "stay":
            return
        if settle:
            self.response.learn(live, self.response.seen(source), source)
        elif action.kind == "back" or self.loop.config.respond == "refresh":
            self._action = action, source

    # ------------------------------------------------------------------------------------------- answering
    def due(self) -> tuple[str, list[StoredFrame]]:
        """(why, frames) of a refresh that begins now, else ("", []); a way back is gone here."""
        if self._action is None:
            return "", []
        (action, source), self._action = self._action, None
        loop, config = self.loop, self.loop.config
        rows = [r for r in loop.unused() if config.mix or r.source == source]
        rows = rows[-config.road.frames * config.road.agree :]
        if action.kind == "back":
            self._go_back(action, source, rows, self.response.seen(source))
            return "", []
        waits = loop.forbidden(refresh=True)
        if waits or len(rows) < FEWEST:
            if waits:
                loop.report("waiting", note=f"refresh: {waits}", budget={"paused": waits})
            return "", []
        self._since(source, rows)
        return f"road: {action.why}", rows

    def _since(self, source: str, rows: list[StoredFrame]) -> None:
        """Rounds learn from this road's frames, not from those of the last one."""
        if rows:
            self.loop.keep(road_since={**(self.loop.state.get("road_since") or {}), source: rows[0].id})

    def is_past(self, row: StoredFrame) -> bool:
        """Was it taken before the road changed?"""
        since = self.loop.state.get("road_since") or {}
        return bool(row.id < since.get(self.camera(row.source), 0))

    def _go_back(self, action: Action, source: str, rows: list[StoredFrame], look: Look) -> None:
        """To a version that was live before, through the same guard as a new one."""
        loop, model, version = self.loop, self.loop.config.model, action.version
        loop.say(f"back to {f'version {version}' if version else 'the released pack'}: {action.why}")
        loop.report("submit", note=action.why, force=True)
        submit: Callable[[], Any] = partial(loop.client.submit, model, version)
        loop.keep(going=version)  # killed now, it is known again as our own doing
        events, state, reason = loop.follow(self._reset if version == RELEASED else submit)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "version": version, "why": action.why,
            "state": state, "reason": reason,
        }  # fmt: skip
        with contextlib.suppress(OSError), open(loop.workdir / "roads.jsonl", "a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
        if state == "LIVE":
            self._since(source, rows)
            loop.keep(answers=version)
        elif state == "REJECTED":
            loop.say(f"the server keeps what is live: {reason}")
            if not events or events[-1]["check"] not in HELD:
                self.response.forget(version)
                self.response.learn(int(loop.state.get("answers", RELEASED)), look, source)
        self.response.start_again()
        loop.report("collect", force=True)

    def _reset(self) -> Iterator[Any]:
        """The released pack on an operator's word; without the right to that, offered as any version is."""
        from runtime.client import Rejected

        client, model = self.loop.client, self.loop.config.model
        try:
            yield from client.reset(model)
            return
        except Rejected as error:
            number = self._released() if error.code == "PERMISSION_DENIED" else 0
            if not number:
                raise
        yield from client.submit(model, number)

    def _released(self) -> int:
        """The newest version that was built of the released pack; 0 where there is none."""
        from runtime.repository.repository import Repository

        repository, model = Repository(self.loop.repository, read_only=True), self.loop.config.model
        for number in reversed(repository.versions(model)):
            with contextlib.suppress(Exception):  # a damaged version tells nothing
                if repository.manifest(model, number)["pack"]["sha256"] == self.loop.pack.sha256:
                    return number
        return 0

    def learn(self, state: str, result: RoundResult | None, version: int, refreshing: bool) -> None:
        """A round ended: which version answers the road of its frames from now on."""
        loop = self.loop
        if result is None:
            return
        try:
            rows = loop.left()
            look = self.response.probe.all_of(loop.store.frames(rows)) if rows else None
        except StoreError:  # its frames are gone, or the whole store is
            return
        if look is None:
            return
        source = self.camera(rows[0].source)
        live = int(loop.state.get("answers", RELEASED))
        if state == "LIVE":
            self.response.learn(version, look, source)
            loop.keep(answers=version)
        elif refreshing:
            failed = result.report.get("gate", {}).get("failed", ()) if state == "REFUSED" else ()
            answer = self.response.refreshed(None, failed, live, look, source)
            if answer != live:
                self._go_back(
                    Action("back", answer, "its own statistics are the best here"), source, [], look
                )
