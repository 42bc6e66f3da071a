"""The on-device loop: collect → decide → adapt → build → submit → report, as long as the vehicle lives.

    collect   `collector`: frames of a source pass the rules into the frame store
    decide    `trigger`: enough new frames, drift, a schedule or a command; `permit`: the vehicle and the
              budget allow work.  `responder`: the domain changed: back to a version that knows it, or a
              refresh of the batch statistics, which is a round as any other
    adapt     `rounds`: `adapt.round` in sessions, paused if the vehicle drives off or the budget is spent,
              and continued to the same result
    build     `builder`: `export.build`
    submit    `submitter`: the server's guarded swap (with the edges: as a frame group)
    report    `reporter` to the server, `records` in WORKDIR

A loop that is killed at any moment continues there when it starts again: `state` stores each step before it
is taken, each step can be repeated, and the server keeps answering with what it has in any case.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from adapt.frames.store import FrameStore, StoreError
from adapt.loop.builder import Builder
from adapt.loop.collector import Collector
from adapt.loop.commands import Commands
from adapt.loop.config import LoopConfig, LoopTools
from adapt.loop.domain_response import DomainResponder
from adapt.loop.errors import LoopError, Paused, one_line
from adapt.loop.frame_pool import FramePool
from adapt.loop.outcome import Decision, Outcome, RoundStopped, Submission
from adapt.loop.permit import Permit
from adapt.loop.records import discard_cancelled, prune_rounds, write_page, write_record
from adapt.loop.reporter import Reporter
from adapt.loop.rounds import Rounds, failed_checks
from adapt.loop.state import LoopState, Phase, RoundKind
from adapt.loop.submitter import Submitter
from adapt.loop.trigger import Start, Trigger
from adapt.loop.waiting import Waiting, words
from adapt.round import RoundError, RoundResult

__all__ = ["AdaptationLoop"]

COLLECT_SECONDS = 0.2  # longest wait for a frame before commands and triggers are checked again


@dataclass
class AdaptationLoop:
    """The loop over its components; `adapt.loop.Loop` makes them from a client, a pack and a folder.

    pack: sha256 of the released pack.  responder: None if a change of domain is not responded to.
    waiting: logs what the loop waits for; None = it does not.
    """

    pack: str
    config: LoopConfig
    tools: LoopTools
    state: LoopState
    pool: FramePool
    collector: Collector
    trigger: Trigger
    permit: Permit
    commands: Commands
    rounds: Rounds
    builder: Builder
    submitter: Submitter
    reporter: Reporter
    responder: DomainResponder | None = None
    waiting: Waiting | None = None

    # --------------------------------------------------------------------------------------- the main path
    def once(self) -> dict[str, Any]:
        """Do one round from wherever the state is; return its report (also in WORKDIR/round-NNNN/loop.json).

        A round that fails is reported as FAILED, and the next call collects new frames.

        Raises:
            LoopError: no frame can be collected.
            Paused: with `once`, the budget is spent before the round was done.
            RoundError, StoreError, RuntimeError, ValueError, FloatingPointError, MemoryError, OSError: with
                `once`, the round failed.
        """
        if self.state.phase is Phase.COLLECT:
            self.collect()
        try:
            return self._adapt_and_submit()
        except (
            RoundError,
            StoreError,
            RuntimeError,
            ValueError,
            FloatingPointError,
            MemoryError,
            OSError,
        ) as error:
            if self.tools.once:
                raise
            self.tools.log(f"round {self.state.round} failed: {one_line(error)}")
            report = self._finish_round(Outcome(Decision.FAILED, one_line(error)))
            self.commands.wait_polling(self.config.retry, running=False)
            return report

    def collect(self) -> None:
        """Collect frames until a round may start; store which frames it gets.

        Raises LoopError if the source ends or fails, and Paused.
        """
        self.trigger.restart_patience()
        self.collector.read_imports(between=lambda: self.commands.poll(running=False))
        if self.waiting is not None:
            self.waiting.begin()
        while True:
            kind, start, blocked = self._next_start()
            if start.reason and not blocked:
                break
            self._log_waiting(len(start.rows), blocked)
            self.collect_once(COLLECT_SECONDS)
            if self.collector.finished and not start.reason:
                found = f"the sources are at their end with {len(start.rows)} frames kept"
                required = self.trigger.required_frames
                raise LoopError(f"{found}, {required} are wanted: give more, or a smaller --frames")
        self.tools.progress("collect", len(start.rows), len(start.rows))
        ids = [row.id for row in start.rows]
        self.state.enter(Phase.ROUND, frames=ids, trigger=start.reason, kind=kind.value, marker="", stuck=0)
        self.trigger.manual = ""

    def _adapt_and_submit(self) -> dict[str, Any]:
        try:
            result = self.rounds.adapt_segmentation()
            if not result.accepted or result.pack is None:
                refused = Outcome(Decision.REFUSED, failed_checks(result.report) or "refused")
                return self._finish_round(refused, result)
            if self.state.phase is Phase.ROUND:
                edges = self.rounds.adapt_edges(result)
                self.reporter.report("build")
                self.builder.build_members(result, edges)
        except RoundStopped as stop:
            return self._finish_round(stop.outcome)
        self.reporter.report("submit", force=True)
        submission = self.submitter.submit()
        return self._finish_round(submission.outcome, result, submission)

    # --------------------------------------------------------------------------------------- its steps
    def collect_once(self, timeout: float) -> None:
        """Answer commands and take the next frame that comes within `timeout` seconds."""
        self.commands.poll(running=False)
        if self.collector.finished:
            self.tools.sleep(timeout)
            return
        if self.collector.collect_once(timeout):
            self.trigger.restart_patience()
            kept, required = len(self.pool.unused()), self.config.frames
            self.tools.progress("collect", min(kept, required), required, dropped=self.collector.lost)
        self.reporter.report("collect")

    def _log_waiting(self, kept: int, blocked: str) -> None:
        collector = self.collector
        if self.waiting is None or collector.finished:
            return
        reason = getattr(collector.source, "reason", "")
        if not self.state.is_collecting:
            reason = "collection is switched off"
        self.waiting(
            words(
                self.config.model,
                seen=collector.seen,
                kept=kept,
                wanted=self.trigger.required_frames,
                refused={rule: count for rule, count in collector.refused.items() if count},
                starts=self.config.on,
                held=blocked,
                reason=reason,
            )
        )

    def _next_start(self) -> tuple[RoundKind, Start, str]:
        """Return the round that starts now, if one does, and why it must wait ("" = it need not)."""
        if self.responder is not None and (refresh := self.responder.due()).reason:
            return RoundKind.REFRESH, refresh, ""
        start = self.trigger.decide(finished=self.collector.finished)
        blocked = self.permit.blocked_reason() if start.reason else ""
        if blocked:
            self.reporter.report("waiting", note=blocked, paused=blocked)
            if self.tools.once and self.permit.is_budget_spent():
                raise Paused(blocked)
        return RoundKind.TRAIN, start, blocked

    def _finish_round(
        self, outcome: Outcome, result: RoundResult | None = None, submission: Submission | None = None
    ) -> dict[str, Any]:
        """Record how the round ended, learn from it, and store that the next one collects."""
        state, number, folder = self.state, self.state.round, self.state.folder
        report = self._report_of_round(outcome, result, submission)
        version = int(report.get("version", 0))
        write_record(folder, report)
        if result is not None:
            write_page(folder, number, self.tools.log)
        prune_rounds(state.workdir, number)
        if outcome.decision is Decision.CANCELLED:
            discard_cancelled(folder)
        if outcome.decision is Decision.LIVE:
            models = report["members"] or {self.config.model: version}
            deleted = self.submitter.prune_versions(models)
            if self.responder is not None:
                self.responder.forget(deleted)
        if self.responder is not None:
            self.responder.learn(outcome.decision, result, version)
        # The frames of a refresh are still new to the training round that follows.
        used = {} if state.is_refresh else self.pool.latest_of(state.frame_ids)
        state.finish_round(outcome.decision, used)
        self.pool.forget_list()
        self.reporter.report_end(number, outcome, version)
        return report

    def _report_of_round(
        self, outcome: Outcome, result: RoundResult | None, submission: Submission | None
    ) -> dict[str, Any]:
        state = self.state
        report = {
            "model": self.config.model,
            "round": state.round,
            "state": outcome.decision.value,
            "trigger": state.get("trigger", ""),
            "kind": state.get("kind", RoundKind.TRAIN.value),
            "parent": self.pack,
            "pack": str(result.pack.path) if result and result.pack else "",
            "frames": len(state.frame_ids),
            "build_seconds": state.get("build_seconds", 0.0),
            "spent": self.permit.meter.spent(),
            **({"edges": state["edges"]} if "edges" in state else {}),
            "reason": outcome.reason,
        }
        if submission is not None:
            report |= {
                "version": int(state["version"]),
                "members": self.submitter.members(),
                "events": submission.events,
                "swap_seconds": submission.seconds,
            }
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        return {**report, "adaptation": result.report if result else {}, "finished": finished}

    # --------------------------------------------------------------------------------------- around it
    @property
    def store(self) -> FrameStore:
        """The frame store as it is open now."""
        return self.pool.store

    def close(self) -> None:
        """Close the source and the store, and release the lock of WORKDIR."""
        self.collector.close()
        self.pool.close()
        self.state.close()
