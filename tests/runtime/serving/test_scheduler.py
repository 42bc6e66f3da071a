"""The queue: bounded, in order, deadline-aware, and nothing is lost in it."""

from __future__ import annotations

import threading
import time

import pytest

from runtime.config import QueueConfig
from runtime.errors import Code, ServiceError
from runtime.serving.queueing import DELAY, BatchingPolicy, QueuePolicy
from runtime.serving.scheduler import Job, Scheduler
from tests.waits import PATIENCE, until


class Engine:
    """Runs wait for `gate`; keeps what ran together."""

    def __init__(self):
        self.gate = threading.Event()
        self.batches = []
        self.together = 0
        self.most = 0
        self.lock = threading.Lock()

    def __call__(self, jobs):
        with self.lock:
            self.together += 1
            self.most = max(self.most, self.together)
            self.batches.append([job.payload for job in jobs])
        assert self.gate.wait(PATIENCE)
        for job in jobs:
            job.result = job.payload
        with self.lock:
            self.together -= 1


class Caller(threading.Thread):
    def __init__(self, scheduler, job):
        super().__init__(daemon=True)
        self.scheduler, self.job = scheduler, job
        self.result = self.error = None
        self.start()

    def run(self):
        try:
            self.result = self.scheduler.submit(self.job)
        except ServiceError as error:
            self.error = error


def test_a_run_that_is_given_up_hands_its_permit_on_once():
    """Who shares the run is told, who waits runs, and its end, when it comes, disturbs nobody."""
    gates = {name: threading.Event() for name in "abcd"}

    def execute(jobs):
        assert gates[jobs[0].payload].wait(PATIENCE)
        for job in jobs:
            job.result = job.payload

    scheduler = Scheduler(execute, BatchingPolicy.of(QueueConfig(max_batch=2, batch_delay=1e6)), 1)
    first = Caller(scheduler, Job("a", batch_key=1))
    company = Caller(scheduler, Job("b", batch_key=1))  # it fills the batch that waits for one
    until(lambda: len(first.job.company) == 2)
    third = Caller(scheduler, Job("c"))
    until(lambda: scheduler.pending == 1)
    assert scheduler.runs() == [first.job]
    assert scheduler.give_up(first.job, lambda: ServiceError(Code.UNAVAILABLE, "hangs", "engine"))
    assert not scheduler.give_up(first.job, lambda: ServiceError(Code.UNAVAILABLE, "hangs", "engine"))
    company.join(PATIENCE)
    assert company.error.message == "hangs"
    until(lambda: scheduler.runs() == [third.job])
    fourth = Caller(scheduler, Job("d"))
    until(lambda: scheduler.pending == 1)
    gates["a"].set()
    first.join(PATIENCE)
    assert first.result == "a"
    assert first.job.done
    assert (scheduler.runs(), scheduler.pending) == ([third.job], 1)  # it had no permit to hand on
    scheduler.refuse_waiting(lambda: ServiceError(Code.UNAVAILABLE, "hangs", "engine"))
    fourth.join(PATIENCE)
    assert fourth.error.message == "hangs"
    gates["c"].set()
    third.join(PATIENCE)
    assert (third.result, scheduler.runs()) == ("c", [])
    gates["d"].set()
    assert scheduler.submit(Job("d")) == "d"


def start(config, jobs, concurrency=1):
    """The first job runs (and blocks); the rest wait in order."""
    engine = Engine()
    scheduler = Scheduler(
        engine, config if isinstance(config, BatchingPolicy) else BatchingPolicy.of(config), concurrency
    )
    callers = []
    for index, job in enumerate(jobs):
        callers.append(Caller(scheduler, job))
        if index < concurrency:
            until(lambda n=index: len(engine.batches) == n + 1)
        else:
            until(lambda j=job, c=callers[-1]: j.wake is not None or c.error)
    return engine, scheduler, callers


def finish(engine, callers):
    engine.gate.set()
    for caller in callers:
        caller.join(PATIENCE)
        assert not caller.is_alive()


def test_first_come_first_served_one_at_a_time():
    jobs = [Job(n) for n in range(6)]
    engine, scheduler, callers = start(QueueConfig(), jobs)
    assert scheduler.pending == 5
    finish(engine, callers)
    assert engine.batches == [[n] for n in range(6)]
    assert [c.result for c in callers] == list(range(6))
    assert engine.most == 1
    assert scheduler.pending == 0


def test_no_more_runs_at_the_same_time_than_permitted():
    engine, _, callers = start(QueueConfig(), [Job(n) for n in range(8)], concurrency=3)
    finish(engine, callers)
    assert engine.most == 3
    assert sorted(c.result for c in callers) == list(range(8))


def test_a_full_queue_refuses():
    engine, _, callers = start(QueueConfig(limit=2), [Job(n) for n in range(4)])
    assert callers[3].error.code is Code.RESOURCE_EXHAUSTED
    assert callers[3].error.reason == "queue-full"
    finish(engine, callers)
    assert [c.result for c in callers[:3]] == [0, 1, 2]


def test_latest_frame_wins_per_source():
    config = QueueConfig(policy="latest")
    jobs = [
        Job("busy"),
        Job("a1", source="a"),
        Job("b1", source="b"),
        Job("a2", source="a"),
        Job("x1"),
        Job("x2"),
    ]
    engine, _, callers = start(config, jobs)
    callers[1].join(PATIENCE)
    assert callers[1].error.reason == "stale"
    assert "newer frame of source 'a'" in callers[1].error.message
    finish(engine, callers)
    assert engine.batches == [["busy"], ["b1"], ["a2"], ["x1"], ["x2"]]


def test_a_deadline_that_passes_in_the_queue():
    jobs = [Job(0), Job(1, deadline=time.monotonic() + 0.15), Job(2)]
    engine, scheduler, callers = start(QueueConfig(), jobs)
    callers[1].join(PATIENCE)
    assert callers[1].error.code is Code.DEADLINE_EXCEEDED
    assert scheduler.pending == 1
    finish(engine, callers)
    assert engine.batches == [[0], [2]]


def test_a_deadline_centuries_away_is_no_deadline():
    engine, _, callers = start(QueueConfig(), [Job(0), Job(1, deadline=time.monotonic() + 1e19)])
    finish(engine, callers)
    assert [c.result for c in callers] == [0, 1]


def test_a_cancelled_request_is_not_run():
    jobs = [Job(0), Job(1), Job(2)]
    engine, scheduler, callers = start(QueueConfig(), jobs)
    scheduler.cancel(jobs[1])
    callers[1].join(PATIENCE)
    assert callers[1].error.reason == "cancelled"
    scheduler.cancel(jobs[0])  # runs already: finishes
    finish(engine, callers)
    assert engine.batches == [[0], [2]]
    assert callers[0].result == 0
    scheduler.cancel(jobs[0])  # over already: nothing


def test_compatible_requests_share_a_run():
    config = QueueConfig(max_batch=3)
    jobs = [
        Job(0, batch_key="k"),
        *(Job(n, batch_key="k") for n in (1, 2, 3)),
        Job("other"),
        Job(4, batch_key="k"),
    ]
    engine, _, callers = start(config, jobs)
    finish(engine, callers)
    assert engine.batches == [[0], [1, 2, 3], ["other"], [4]]
    assert [c.result for c in callers] == [0, 1, 2, 3, "other", 4]


def test_a_run_takes_no_more_than_max_batch_items():
    config = QueueConfig(max_batch=4)
    jobs = [Job(0, batch_key="k", size=1), Job("3", batch_key="k", size=3), Job("2", batch_key="k", size=2)]
    engine, _, callers = start(config, jobs)
    finish(engine, callers)
    assert engine.batches == [[0], ["3"], ["2"]]


def test_a_run_waits_for_company_no_longer_than_the_delay():
    engine = Engine()
    engine.gate.set()
    alone = Scheduler(engine, BatchingPolicy(max_batch=2, delay=0.01), 1)
    assert alone.submit(Job(0, batch_key="k")) == 0  # no company comes
    scheduler = Scheduler(engine, BatchingPolicy(max_batch=2, delay=1e6), 1)
    first = Caller(scheduler, Job(1, batch_key="k"))
    until(lambda: scheduler.runs() == [first.job])  # it waits for company
    second = Caller(scheduler, Job(2, batch_key="k"))
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert engine.batches == [[0], [1, 2]]


def test_an_engine_that_throws_fails_its_requests_and_no_others():
    def execute(jobs):
        for job in jobs:
            if job.payload == "bad":
                raise ServiceError(Code.INTERNAL, "broken", "engine")
            job.result = job.payload

    scheduler = Scheduler(execute, BatchingPolicy(), 1)
    with pytest.raises(ServiceError, match="broken"):
        scheduler.submit(Job("bad"))
    assert scheduler.submit(Job("good")) == "good"


def test_nothing_is_lost_under_a_storm():
    """Every request ends once: with its own answer or with a reason."""

    def execute(jobs):
        time.sleep(0.0005)
        for job in jobs:
            job.result = job.payload

    scheduler = Scheduler(execute, BatchingPolicy(limit=6, max_batch=3), 2)
    ends = []

    def client(number):
        for n in range(60):
            payload = (number, n)
            deadline = time.monotonic() + 0.002 if n % 7 == 0 else None
            try:
                assert scheduler.submit(Job(payload, deadline=deadline, batch_key=number % 2)) == payload
                ends.append("answered")
            except ServiceError as error:
                ends.append(error.reason)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(ends) == 12 * 60
    assert set(ends) <= {"answered", "queue-full", "deadline"}
    assert scheduler.pending == 0
    assert scheduler.submit(Job("after")) == "after"


# -- Triton's priorities and queue policies (their names and meanings: model_config.proto) -----------


def test_the_highest_priority_waiting_runs_next_and_equals_keep_their_order():
    plan = BatchingPolicy(levels=3, default_level=2)
    asked = [0, 3, 0, 1, 2, 9, 1]  # 0 and 9 are the default level
    engine, _, callers = start(plan, [Job("busy"), *(Job((p, n), priority=p) for n, p in enumerate(asked))])
    finish(engine, callers)
    order = [batch[0] for batch in engine.batches[1:]]
    assert order == [(1, 3), (1, 6), (0, 0), (0, 2), (2, 4), (9, 5), (3, 1)]


def test_without_levels_a_priority_changes_nothing():
    engine, _, callers = start(BatchingPolicy(), [Job(n, priority=5 - n) for n in range(5)])
    finish(engine, callers)
    assert engine.batches == [[n] for n in range(5)]


def test_a_level_has_its_own_limit():
    plan = BatchingPolicy(levels=2, default_level=1, policies={2: QueuePolicy(max_queue_size=1)})
    jobs = [Job("busy"), Job("a"), Job("b"), Job("low", priority=2)]
    engine, scheduler, callers = start(plan, jobs)
    with pytest.raises(ServiceError, match=r"Exceeds maximum queue size: 1 .*max_queue_size") as refusal:
        scheduler.submit(Job("lower", priority=2))
    assert refusal.value.code is Code.RESOURCE_EXHAUSTED
    finish(engine, callers)
    assert engine.batches == [["busy"], ["a"], ["b"], ["low"]]


def test_a_level_has_its_own_timeout():
    plan = BatchingPolicy(levels=2, default_level=1, policies={2: QueuePolicy(default_timeout=0.05)})
    jobs = [Job("busy"), Job("a"), Job("b"), Job("low", priority=2)]
    engine, _, callers = start(plan, jobs)
    callers[3].join(PATIENCE)
    assert (callers[3].error.code, callers[3].error.message) == (Code.UNAVAILABLE, "Request timeout expired")
    finish(engine, callers)
    assert engine.batches == [["busy"], ["a"], ["b"]]


def test_delay_lets_a_late_request_run_after_all_that_are_in_time():
    late = QueuePolicy(timeout_action=DELAY, default_timeout=0.03)
    plan = BatchingPolicy(levels=2, default_level=2, policies={1: late})
    engine, scheduler, callers = start(plan, [Job("busy"), Job("late", priority=1), Job("other")])
    time.sleep(0.1)
    assert scheduler.pending == 2
    finish(engine, callers)
    assert engine.batches == [["busy"], ["other"], ["late"]]
    assert callers[1].result == "late"


def test_a_delayed_request_can_still_be_cancelled_and_still_has_its_deadline():
    late = QueuePolicy(timeout_action=DELAY, default_timeout=0.02)
    jobs = [Job("busy"), Job("gone"), Job("over", deadline=time.monotonic() + 1.0)]
    engine, scheduler, callers = start(BatchingPolicy(policy=late), jobs)
    time.sleep(0.08)
    scheduler.cancel(jobs[1])
    callers[2].join(PATIENCE)
    assert [callers[1].error.reason, callers[2].error.reason] == ["cancelled", "deadline"]
    assert scheduler.pending == 0
    finish(engine, callers)
    assert engine.batches == [["busy"]]


@pytest.mark.parametrize(
    ("policy", "asked", "waits"),
    [
        (QueuePolicy(), 1.0, 0.0),  # no override allowed, no default
        (QueuePolicy(default_timeout=2.0), 1.0, 2.0),
        (QueuePolicy(default_timeout=2.0, allow_timeout_override=True), 1.0, 1.0),
        (QueuePolicy(default_timeout=2.0, allow_timeout_override=True), 3.0, 2.0),  # never longer
        (QueuePolicy(default_timeout=2.0, allow_timeout_override=True), 0.0, 2.0),
        (QueuePolicy(own_timeout=True, default_timeout=2.0), 3.0, 3.0),  # the server's own configuration
    ],
)
def test_whose_timeout_counts(policy, asked, waits):
    assert policy.timeout(asked) == waits


def test_a_preferred_size_is_run_without_waiting_for_more():
    plan = BatchingPolicy(max_batch=8, preferred=(2, 4), delay=1e6)
    engine, scheduler, callers = start(plan, [Job("busy"), *(Job(n, batch_key="k") for n in range(5))])
    engine.gate.set()
    until(lambda: len(engine.batches) == 2)
    assert engine.batches == [["busy"], [0, 1, 2, 3]]  # 4 of the 5; the fifth waits for a sixth
    callers.append(Caller(scheduler, Job(5, batch_key="k")))
    finish(engine, callers)
    assert engine.batches[2] == [4, 5]


def test_a_timeout_that_another_thread_deals_with_while_it_is_looked_at():
    """Whoever hands a permit on may end `expires` between two reads of the thread that waits."""

    class Vanishing(Job):
        __slots__ = ("reads",)

        @property
        def expires(self):
            self.reads -= 1
            return time.monotonic() if self.reads >= 0 else None

        @expires.setter
        def expires(self, value):
            self.reads = 1

    engine = Engine()
    scheduler = Scheduler(engine, BatchingPolicy(policy=QueuePolicy(DELAY, default_timeout=5.0)), 1)
    first = Caller(scheduler, Job("first"))
    until(lambda: engine.together == 1)
    second = Caller(scheduler, Vanishing("second"))
    until(lambda: scheduler.pending == 1 and second.job.reads < 1)
    engine.gate.set()
    for caller in (first, second):
        caller.join(PATIENCE)
        assert not caller.is_alive()
        assert (caller.error, caller.result) == (None, caller.job.payload)
