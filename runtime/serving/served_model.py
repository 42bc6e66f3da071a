"""A model being served: its live slot, the one kept warm, and the way of a request through them.

Knows engines, slots, the scheduler and tensors; knows neither gRPC nor how a version
comes to be live (`runtime/swap/controller.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from runtime.config import ServerConfig
from runtime.errors import Code, ServiceError
from runtime.serving import request as serving_request
from runtime.serving.counters import Durations, RequestCounters, Statistics
from runtime.serving.labels import Labels
from runtime.serving.queueing import BatchingPolicy
from runtime.serving.request import (
    Answer,
    InferRequest,
    Parameter,
    parse_version,
    permission,
)
from runtime.serving.scheduler import Job, Scheduler
from runtime.serving.slot import Slot
from runtime.serving.tap import Observation
from runtime.tensors import Array, datatype

log = logging.getLogger("roadworthy.host")


@dataclass(slots=True)
class _Work:
    """The payload of a Job.  pinned: the slot that must answer; the caller (a frame group) holds it."""

    inputs: dict[str, Array]
    names: tuple[str, ...]
    version: int | None
    source: str
    pinned: Slot | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    slot: Slot | None = None
    stages: Durations = field(default_factory=Durations)


UNLOADED = "unloaded"  # the reason of a model that was unloaded on request


class ServedModel:
    """`lock`: guards what is live; the members of a frame group share one, so that they flip as one."""

    def __init__(self, name: str, config: ServerConfig, lock: threading.RLock | None = None) -> None:
        self.name = name
        self.account = RequestCounters()
        self.reason = "no version has been loaded"  # why no version is live, while none is
        self.stuck = ""  # why the live one does not answer, while it does not
        self.unloaded: tuple[int, ...] = ()  # versions that answered until the model was unloaded
        self.labels = Labels(Path(), {})
        self.observers: tuple[Callable[[Observation], None], ...] = ()
        self._config = config
        self._lock = lock or threading.RLock()
        self._live: Slot | None = None
        self._previous: Slot | None = None
        self._claimed = False  # the warm slot is about to be live again
        self._statistics: dict[int, Statistics] = {}
        self._scheduler = Scheduler(self._execute, BatchingPolicy.of(config.queue), config.engine.concurrency)

    # -- slots -----------------------------------------------------------------------

    @property
    def live(self) -> Slot | None:
        return self._live

    @property
    def is_unloaded(self) -> bool:
        """True if the model was unloaded on request."""
        return self._live is None and self.reason == UNLOADED

    @property
    def previous(self) -> Slot | None:
        return self._previous

    @property
    def plan(self) -> BatchingPolicy:
        """How requests wait and share runs."""
        return self._scheduler.plan

    def configure(self, plan: BatchingPolicy, labels: Labels | None = None) -> None:
        """Replaces the batching policy for later requests, and the labels of their outputs."""
        self._scheduler.configure(plan)
        if labels is not None:
            self.labels = labels

    @property
    def pending(self) -> int:
        return self._scheduler.pending

    def loaded(self) -> list[Slot]:
        """Returns the slots that answer requests, the live one first."""
        with self._lock:
            return [slot for slot in (self._live, self._previous) if slot is not None]

    def flip(self, slot: Slot) -> Slot | None:
        """Makes `slot` live and keeps the old live slot warm.  Returns the slot that was warm, which the
        caller retires: it may hold the lock for several models, and closing an engine takes time.
        """
        with self._lock:
            displaced, self._previous, self._live = self._previous, self._live, slot
            self.unloaded = ()
            self._statistics.setdefault(slot.version, Statistics())
        return displaced

    def flip_back(self) -> tuple[Slot, Slot]:
        """Makes the warm slot live again; returns (the new live slot, the one it replaces, to be retired).

        Raises ServiceError(FAILED_PRECONDITION) if there is none.
        """
        with self._lock:
            warm, bad = self.previous_or_refuse(), self._live
            assert bad is not None
            self._live, self._previous, self._claimed = warm, None, False
            return warm, bad

    def reserve_previous(self) -> Slot:
        """Returns the warm slot and keeps it until `flip_back` or `release_previous`: a rollback that is
        recorded must be possible.  Raises ServiceError(FAILED_PRECONDITION) if there is none.
        """
        with self._lock:
            warm = self.previous_or_refuse()
            self._claimed = True
            return warm

    def release_previous(self) -> None:
        with self._lock:
            self._claimed = False

    def keep_warm(self, slot: Slot) -> None:
        """Makes `slot` the rollback target."""
        with self._lock:
            displaced, self._previous = self._previous, slot
        if displaced is not None:
            displaced.retire()

    def drop_previous(self) -> Slot | None:
        """Retires the warm slot, which is the rollback target; returns it, or None if there is none."""
        with self._lock:
            if self._claimed:
                return None
            dropped, self._previous = self._previous, None
        if dropped is not None:
            dropped.retire()
        return dropped

    def unload(self, reason: str) -> None:
        """Stops answering; requests in flight finish."""
        with self._lock:
            slots = [slot for slot in (self._live, self._previous) if slot is not None]
            self._live = self._previous = None
            self.reason = reason
            self.unloaded = tuple(slot.version for slot in slots)
        for slot in slots:
            slot.retire()

    def slot(self, version: str) -> Slot:
        """Returns the slot that would answer a request for `version` ("" = the live one).

        Raises ServiceError with Triton's messages.
        """
        number = parse_version(version)
        live = self._live
        if number is None and live is not None:
            return live
        for slot in self.loaded():
            if number is None or slot.version == number:
                return slot
        if number is not None and self.unloaded and number in self.unloaded:
            raise ServiceError(
                Code.UNAVAILABLE,
                f"Request for unknown model: '{self.name}' version {number} is not at ready state",
                "not-loaded",
            )
        if number is None:
            raise ServiceError(
                Code.NOT_FOUND,
                f"Request for unknown model: '{self.name}' has no available versions",
                "not-loaded",
            )
        raise ServiceError(
            Code.NOT_FOUND,
            f"Request for unknown model: '{self.name}' version {number} is not found",
            "unknown-version",
        )

    def statistics(self) -> dict[int, Statistics]:
        with self._lock:
            return dict(self._statistics)

    def statistics_of(self, version: int) -> Statistics:
        known = self._statistics.get(version)
        if known is None:
            with self._lock:
                known = self._statistics.setdefault(version, Statistics())
        return known

    # -- hung runs (runtime/serving/hung_runs.py) ------------------------------------

    def runs(self) -> list[tuple[Job, Slot]]:
        """Returns the jobs that run now, each with the slot that runs it."""
        found = [(job, job.payload.slot) for job in self._scheduler.runs()]
        return [(job, slot) for job, slot in found if slot is not None]

    def give_up(self, job: Job) -> bool:
        """Gives the permit of a hung run of a retired version to the live one; False if it has ended."""
        return self._scheduler.give_up(job, lambda: _does_not_end(self.name, job.payload.slot.version))

    def hold_back(self, hung: int, limit: float) -> None:
        """`hung` runs of the live version are stuck; if no permit is left, rejects the waiting requests.

        limit: seconds after which a run counts as hung.
        """
        live = self._live
        if live is None or hung < self._config.engine.concurrency:
            self.stuck = ""
            return
        self.stuck = f"a run of version {live.version} has not ended after {limit:g} s; roll back"
        self._scheduler.refuse_waiting(lambda: _does_not_end(self.name, live.version))

    # -- observers -------------------------------------------------------------------

    def previous_or_refuse(self) -> Slot:
        """Returns the warm slot.  Raises ServiceError(FAILED_PRECONDITION) if there is none."""
        previous = self._previous
        if previous is None or self._live is None:
            raise ServiceError(
                Code.FAILED_PRECONDITION,
                f"'{self.name}' has no previous version to go back to; promote one",
                "state",
            )
        return previous

    def observe(self, observer: Callable[[Observation], None]) -> None:
        with self._lock:
            self.observers += (observer,)

    def unobserve(self, observer: Callable[[Observation], None]) -> None:
        with self._lock:
            self.observers = tuple(other for other in self.observers if other is not observer)

    # -- requests --------------------------------------------------------------------

    def infer(
        self,
        request: InferRequest,
        *,
        deadline: float | None = None,
        on_job: Callable[[Callable[[], None]], None] | None = None,
        pinned: Slot | None = None,
    ) -> Answer:
        """Answers one request by exactly one version: `pinned`, which the caller holds, or the version that
        is live when the run begins.

        deadline: a time.monotonic().  on_job: called with a function that cancels the request.
        Raises ServiceError.
        """
        begun = time.monotonic_ns()
        slot = pinned or self.slot(request.version)
        names = serving_request.names(request, slot, self.name)  # before the inputs, as Triton does
        plan = self._scheduler.plan
        most = plan.max_batch_size
        inputs = serving_request.inputs(request, slot.engine.spec, self.name, most, plan.whole)
        source = str(request.parameters.get("source", ""))
        work = _Work(inputs, names, parse_version(request.version), source, pinned, request.parameters)
        stages = work.stages
        stages.compute_input = time.monotonic_ns() - begun
        job = self._job(request, work, slot, deadline)
        if on_job is not None:
            on_job(lambda: self._scheduler.cancel(job))
        try:
            outputs: dict[str, Array] = self._scheduler.submit(job)
        except ServiceError:
            self.statistics_of((work.slot or slot).version).failed(time.monotonic_ns() - begun)
            raise
        used = work.slot
        assert used is not None
        ended = time.monotonic_ns()
        stages.queue = max(0, job.started - job.arrived)
        answer = Answer(
            model=self.name,
            version=used.version,
            id=request.id,
            outputs=[(name, datatype(outputs[name].dtype), outputs[name]) for name in names],
            parameters=used.provenance.parameters(),
            stages=stages,
        )
        for output in request.outputs:
            if output.classification:
                labels = used.classes if output.name == "probabilities" else ()
                labels = labels or self.labels.of(output.name)
                serving_request.classify(
                    answer, output, labels, batched=most > 0 and used.engine.spec.batched
                )
        stages.compute_output += time.monotonic_ns() - ended
        self.statistics_of(used.version).succeeded(time.monotonic_ns() - begun, stages, job.size)
        self._observed(work, used, outputs)
        return answer

    def _job(self, request: InferRequest, work: _Work, slot: Slot, deadline: float | None) -> Job:
        plan, key, size = self._scheduler.plan, None, 1
        if slot.engine.spec.batched:
            rows = {name: array.shape[0] for name, array in work.inputs.items() if name not in plan.whole}
            size = int(next(iter(rows.values()), 1))
            # Inputs of different first sides have no batch, nor do shapes: their run is theirs alone.
            equal = len(rows) == len(work.inputs) and len({*rows.values()}) == 1
            if plan.max_batch > 1 and equal and slot.shares:
                shapes = tuple((name, array.shape[1:]) for name, array in sorted(work.inputs.items()))
                key = (work.version, id(work.pinned), work.names, shapes)  # a slot that is held keeps its id
        return Job(
            work,
            source=work.source,
            deadline=deadline,
            timeout=_number(request, "timeout") / 1e6,
            priority=int(_number(request, "priority")),
            batch_key=key,
            size=size,
            label=request.label,
        )

    def _execute(self, jobs: list[Job]) -> Callable[[], None]:
        """One run for all of the jobs, or one for each where the version cannot share a run.  Returns what is
        left to do when the next run may begin.
        """
        slot = self._hold(jobs[0].payload)
        runs: list[tuple[int, Durations]] = []
        try:
            for job in jobs:
                job.payload.slot = slot
            if len(jobs) == 1:
                runs.append(self._run(slot, jobs))
            elif (shared := self._together(slot, jobs)) is not None:
                runs.append(shared)
            else:
                for job in jobs:
                    try:
                        runs.append(self._run(slot, [job]))
                    except ServiceError as error:
                        job.error = error
        except BaseException:
            slot.release()
            raise

        def after() -> None:
            slot.release()
            for items, run in runs:
                self.statistics_of(slot.version).executed(items, run)

        return after

    def _together(self, slot: Slot, jobs: list[Job]) -> tuple[int, Durations] | None:
        """A run that the jobs share; None where each must run alone: the run failed, maybe by the fault of
        one of them, or its outputs cannot be cut into theirs.
        """
        if not slot.shares:
            return None
        try:
            return self._run(slot, jobs)
        except _Uncut as error:
            slot.shares = False
            log.warning("%s version %s: %s; its requests share no run", self.name, slot.version, error)
        except Exception as error:
            log.debug("%s version %s: a shared run failed: %s", self.name, slot.version, error)
        return None

    def _run(self, slot: Slot, jobs: list[Job]) -> tuple[int, Durations]:
        """Fills the results of the jobs by one run; (items, where its time went).  Raises ServiceError where
        the engine fails on a job alone, and _Uncut before any result is given.
        """
        begun, cpu = time.monotonic_ns(), time.thread_time_ns()
        work: _Work = jobs[0].payload
        inputs = work.inputs
        if len(jobs) > 1:
            inputs = {name: np.concatenate([job.payload.inputs[name] for job in jobs]) for name in inputs}
        gathered = time.monotonic_ns()
        try:
            outputs = slot.engine.run(inputs, work.names)
        except Exception as error:
            if len(jobs) == 1:
                slot.failed_on = (inputs, work.names)
                slot.failures += 1
            why = " ".join(str(error).split())[:300]
            message = f"engine of '{self.name}' version {slot.version} failed: {why}"
            raise ServiceError(Code.INTERNAL, message, "engine") from error
        done = time.monotonic_ns()
        items = sum(job.size for job in jobs)
        parts = [outputs] if len(jobs) == 1 else _cut(outputs, [job.size for job in jobs])
        slot.run_ms.append((done - gathered) / 1e6)
        slot.cpu_ms.append((time.thread_time_ns() - cpu) / 1e6)
        for job, part in zip(jobs, parts, strict=True):
            job.result = part
        split = time.monotonic_ns()
        for job in jobs:
            stages: Durations = job.payload.stages
            stages.compute_input += gathered - begun
            stages.compute_infer = done - gathered
            stages.compute_output = split - done
        return items, Durations(0, work.stages.compute_input, done - gathered, split - done)

    def _hold(self, work: _Work) -> Slot:
        """The slot of this run, held.  Decided here, at the start of the run, not when the request came."""
        while True:
            slot = work.pinned or self.slot("" if work.version is None else str(work.version))
            if slot.hung and slot is not self._live:  # each request would take a thread that never comes back
                raise _does_not_end(self.name, slot.version)
            if work.pinned is not None:  # it may have been retired since then, and answers all the same
                slot.hold_again()
                return slot
            if slot.hold():
                return slot

    def _observed(self, work: _Work, slot: Slot, outputs: dict[str, Array]) -> None:
        observers = self.observers
        if not observers or slot.task is None or not slot.task.has_outputs(outputs):
            return
        frame = work.inputs["frame"]
        if not frame.size:  # an empty batch shows nobody anything
            return
        if any(len(outputs[name]) != len(frame) for name in slot.task.outputs if name in outputs):
            return  # rows that are not the frames': whoever learns from them would learn another's
        observation = Observation(
            self.name,
            slot.version,
            work.source,
            frame,
            outputs,
            time.time(),
            *permission(work.parameters),
        )
        for observer in observers:
            try:
                observer(observation)
            except Exception:  # observers may fail, serving may not
                self.unobserve(observer)


class _Uncut(Exception):
    """The outputs of a shared run do not have one row for each row of its inputs."""


def _cut(outputs: Mapping[str, Array], sizes: Sequence[int]) -> list[dict[str, Array]]:
    """The outputs of each job, whose inputs had so many rows.  Raises _Uncut."""
    for name, array in outputs.items():
        if array.shape[:1] != (sum(sizes),):
            raise _Uncut(f"output '{name}' is {list(array.shape)} for {sum(sizes)} rows of input")
    ends = np.cumsum(sizes).tolist()
    return [
        {name: array[end - size : end] for name, array in outputs.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def _does_not_end(model: str, version: int) -> ServiceError:
    message = f"a run of '{model}' version {version} does not end; the request was not run"
    return ServiceError(Code.UNAVAILABLE, message, "engine")


def _number(request: InferRequest, key: str) -> float:
    value = request.parameters.get(key, 0)
    return value if isinstance(value, int | float) else 0
