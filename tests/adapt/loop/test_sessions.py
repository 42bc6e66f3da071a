"""Sessions of a round: paused and continued, cancelled, and ended if a limit never suffices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from adapt.frames.store import StoreError
from adapt.loop import Paused
from adapt.loop.commands import RoundCancelled
from adapt.loop.outcome import Decision, RoundStopped
from adapt.loop.sessions import Sessions
from adapt.loop.state import Phase
from adapt.round import RoundPaused
from tests.adapt.loop.toys import Clock, captured, pool_of, tools


class Bench:
    """Sessions over real frames and state; permission, commands and reports are played."""

    def __init__(self, tmp_path, *, once=False) -> None:
        clock = Clock()
        self.blocked: list[str] = []  # answers of the permission, one per question; then it permits
        self.log, self.reports, self.waited, self.begun, self.ended = [], [], [], 0, 0
        config, self.state, self.pool = pool_of(tmp_path / "work", clock)
        for number in range(5):
            self.pool.add(captured(200 + number))
        self.state.enter(Phase.ROUND, frames=[1, 2, 3, 4, 5], kind="train")
        self.folder = tmp_path / "round"
        permit = SimpleNamespace(
            blocked_reason=lambda: self.blocked.pop(0) if self.blocked else "",
            is_budget_spent=lambda: True,
            begin=lambda: setattr(self, "begun", self.begun + 1),
            end=lambda: setattr(self, "ended", self.ended + 1),
        )
        self.sessions = Sessions(
            config,
            tools(clock, log=self.log.append, once=once),
            self.state,
            pool=self.pool,
            permit=permit,
            commands=SimpleNamespace(wait_polling=lambda s, *, running: self.waited.append(s)),
            reporter=SimpleNamespace(report=lambda phase, **more: self.reports.append(phase)),
        )

    def run(self, work):
        return self.sessions.run("round 1", self.folder, self.pool.remaining_frames, work)


def test_work_waits_for_permission_and_its_frames_are_pinned_meanwhile(tmp_path):
    bench = Bench(tmp_path)
    bench.blocked = ["not parked", "not parked"]
    pinned = []

    def work(rows):
        pinned.append(set(bench.pool.store.pinned))
        return len(rows)

    assert bench.run(work) == 5
    assert (len(bench.waited), bench.reports) == (2, ["paused", "paused", "round"])
    assert pinned == [{1, 2, 3, 4, 5}]
    assert (set(bench.pool.store.pinned), bench.begun) == (set(), 1)


def test_a_pause_is_continued_and_with_once_a_spent_budget_ends_it(tmp_path):
    bench = Bench(tmp_path / "a")
    pauses = ["not parked", "not charging"]

    def work(rows):
        if pauses:
            raise RoundPaused(pauses.pop(0))
        return "done"

    assert bench.run(work) == "done"
    assert bench.begun == bench.ended == 3
    assert "round 1 paused: not charging" in bench.log
    ends = Bench(tmp_path / "b", once=True)
    ends.blocked = ["budget: 1 of 1 s are spent"]
    with pytest.raises(Paused, match="round 1: budget"):
        ends.run(work)


def test_a_limit_that_never_suffices_ends_the_round_unless_it_makes_steps_forward(tmp_path):
    bench = Bench(tmp_path / "a")

    def stuck(rows):
        raise RoundPaused("memory: 9 MB are held, 1 MB are allowed")

    with pytest.raises(RoundStopped) as stopped:
        bench.run(stuck)
    assert stopped.value.outcome.decision is Decision.FAILED
    assert stopped.value.outcome.reason.endswith("3 times at the same place; raise that limit, or ask less")
    assert bench.begun == 3
    moves = Bench(tmp_path / "b")
    labels = moves.folder / "checkpoint.pt.labels"
    labels.mkdir(parents=True)

    def forward(rows):
        if len(list(labels.iterdir())) == 6:
            return "done"
        (labels / f"{len(list(labels.iterdir()))}.npz").touch()
        raise RoundPaused("budget: 1 of 1 steps are spent")

    assert moves.run(forward) == "done"


def test_a_cancelled_round_stops_also_after_a_kill(tmp_path):
    bench = Bench(tmp_path)

    def work(rows):
        bench.state.update(cancelled=True)
        raise RoundCancelled("cancelled by command")

    for attempt in (work, lambda rows: pytest.fail("it was cancelled")):
        with pytest.raises(RoundStopped) as stopped:
            bench.run(attempt)
        assert stopped.value.outcome.decision is Decision.CANCELLED


def test_a_round_that_loses_its_frames_goes_on_with_those_that_can_be_read_or_fails(tmp_path):
    bench = Bench(tmp_path)
    files = bench.pool.store.path / "frames"
    counts, plan = [], [1, 0]

    def damage(rows):
        counts.append(len(rows))
        damaged = plan.pop(0)
        for row in rows[:damaged]:
            (files / row.file).write_bytes(b"damaged")
        if damaged:
            raise StoreError("frame 1 cannot be read")
        return "done"

    assert (bench.run(damage), counts) == ("done", [5, 4])
    plan, counts = [2], []
    with pytest.raises(RoundStopped) as stopped:
        bench.run(damage)
    assert (counts, stopped.value.outcome.reason) == ([5], "frame 1 cannot be read"), "three are too few"
