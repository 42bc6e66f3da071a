"""A model being served: its live slot, the one kept warm, and the way of a request through them.

Knows engines, slots, the scheduler and tensors; knows neither gRPC nor how a version
comes to be live (`runtime/swap.py`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.accounts import Account, Durations, Statistics
from runtime.config import ServerConfig
from runtime.errors import Code, ServiceError
from runtime.scheduler import Job, Scheduler
from runtime.shm import Place
from runtime.slot import Slot
from runtime.tap import Observation
from runtime.tensors import DTYPES, Array, TensorSpec, TextError, datatype, decode_bytes

Parameter = bool | int | float | str


@dataclass(slots=True)
class InputTensor:
    """`data`: raw little-endian bytes, an array (typed contents), or a place in shared memory that the
    service turns into bytes; None = the request brought none."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | memoryview | Array | Place | None


@dataclass(slots=True)
class OutputRequest:
    name: str
    classification: int = 0  # the k highest values as "value:index:label" instead of the tensor
    place: Place | None = None  # where the answer goes when it does not go into the message


@dataclass(slots=True)
class InferRequest:
    model: str
    version: str
    id: str
    parameters: dict[str, Parameter]
    inputs: list[InputTensor]
    outputs: list[OutputRequest]

    @property
    def label(self) -> str:
        """How Triton's messages name a request."""
        return f"[request id: {self.id or '<id_unknown>'}] "


@dataclass(slots=True)
class Answer:
    """outputs in the order asked for: (name, KServe data type, array)."""

    model: str
    version: int
    id: str
    outputs: list[tuple[str, str, Array]]
    parameters: dict[str, str]
    places: dict[str, Place] = field(default_factory=dict)  # outputs that lie in shared memory


@dataclass(slots=True)
class _Work:
    """What travels with a Job.  `pinned`: the slot that must answer, held by who asks (a frame group)."""

    inputs: dict[str, Array]
    names: tuple[str, ...]
    version: int | None
    source: str
    pinned: Slot | None = None
    slot: Slot | None = None
    stages: Durations = field(default_factory=Durations)


class ModelHost:
    """`lock`: guards what is live; the members of a frame group share one, so that they flip as one."""

    def __init__(self, name: str, config: ServerConfig, lock: threading.RLock | None = None) -> None:
        self.name = name
        self.account = Account()
        self.reason = "no version has been loaded"  # why the model is not ready, while it is not
        self.unloaded: tuple[int, ...] = ()  # versions that answered until the model was unloaded
        self.observers: tuple[Callable[[Observation], None], ...] = ()
        self._config = config
        self._lock = lock or threading.RLock()
        self._live: Slot | None = None
        self._previous: Slot | None = None
        self._statistics: dict[int, Statistics] = {}
        self._scheduler = Scheduler(self._execute, config.queue, config.engine.concurrency)

    # -- slots -----------------------------------------------------------------------

    @property
    def live(self) -> Slot | None:
        return self._live

    @property
    def previous(self) -> Slot | None:
        return self._previous

    @property
    def pending(self) -> int:
        return self._scheduler.pending

    def loaded(self) -> list[Slot]:
        """The slots that answer requests: live first."""
        with self._lock:
            return [slot for slot in (self._live, self._previous) if slot is not None]

    def flip(self, slot: Slot) -> Slot | None:
        """Makes `slot` live and keeps the old live slot warm.  The slot displaced from warmth is retired
        and returned.
        """
        with self._lock:
            displaced, self._previous, self._live = self._previous, self._live, slot
            self.unloaded = ()
            self._statistics.setdefault(slot.version, Statistics())
        if displaced is not None:
            displaced.retire()
        return displaced

    def flip_back(self) -> tuple[Slot, Slot]:
        """Makes the warm slot live again; returns (the new live slot, the one it replaces, now retired).

        Raises ServiceError(FAILED_PRECONDITION) when there is none.
        """
        with self._lock:
            if self._previous is None or self._live is None:
                raise ServiceError(
                    Code.FAILED_PRECONDITION,
                    f"'{self.name}' has no previous version to go back to; promote one",
                    "state",
                )
            bad, self._live, self._previous = self._live, self._previous, None
        bad.retire()
        return self._live, bad

    def keep_warm(self, slot: Slot) -> None:
        """Makes `slot` the rollback target."""
        with self._lock:
            displaced, self._previous = self._previous, slot
        if displaced is not None:
            displaced.retire()

    def drop_previous(self) -> Slot | None:
        """Gives up the warm slot, and with it the rollback target."""
        with self._lock:
            dropped, self._previous = self._previous, None
        if dropped is not None:
            dropped.retire()
        return dropped

    def unload(self, reason: str) -> None:
        """Stops answering; what is in flight finishes."""
        with self._lock:
            slots = [slot for slot in (self._live, self._previous) if slot is not None]
            self._live = self._previous = None
            self.reason = reason
            self.unloaded = tuple(slot.version for slot in slots)
        for slot in slots:
            slot.retire()

    def slot(self, version: str) -> Slot:
        """The slot that would answer a request for `version` ("" = the live one), with Triton's words
        when none would.
        """
        number = parse_version(version)
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
        with self._lock:
            return self._statistics.setdefault(version, Statistics())

    # -- observers -------------------------------------------------------------------

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
        """Answers one request by exactly one version: `pinned`, which the caller holds, or the one that is
        live when the run begins.

        `deadline` is a time.monotonic(); `on_job` is given a function that cancels the request.
        Raises ServiceError.
        """
        begun = time.monotonic_ns()
        slot = pinned or self.slot(request.version)
        names = self._names(request, slot)  # before the inputs, as Triton: of two faults the same is reported
        inputs = self._inputs(request, slot)
        source = str(request.parameters.get("source", ""))
        work = _Work(inputs, names, parse_version(request.version), source, pinned)
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
        )
        for output in request.outputs:
            if output.classification:
                _classify(answer, output, used)
        stages.compute_output += time.monotonic_ns() - ended
        self.statistics_of(used.version).succeeded(time.monotonic_ns() - begun, stages, job.size)
        self._observed(work, used, outputs)
        return answer

    def _job(self, request: InferRequest, work: _Work, slot: Slot, deadline: float | None) -> Job:
        timeout = request.parameters.get("timeout", 0)
        seconds = (
            timeout / 1e6 if isinstance(timeout, int | float) and timeout > 0 else self._config.queue.timeout
        )
        key = None
        size = 1
        if slot.engine.spec.batched and self._config.queue.max_batch > 1:
            first = next(iter(work.inputs.values()))
            size = int(first.shape[0])
            shapes = tuple((name, array.shape[1:]) for name, array in sorted(work.inputs.items()))
            key = (work.version, id(work.pinned), work.names, shapes)  # a slot that is held keeps its id
        job = Job(work, source=work.source, deadline=deadline, batch_key=key, size=size)
        if seconds > 0:
            until = time.monotonic() + seconds
            if deadline is None or until < deadline:
                job.deadline = until
                job.rejection = ServiceError(
                    Code.UNAVAILABLE, f"{request.label}Request timeout expired", "timeout"
                )
        return job

    def _inputs(self, request: InferRequest, slot: Slot) -> dict[str, Array]:
        """The checks in Triton's order, so that of two faults the same one is reported."""
        spec = slot.engine.spec
        given: dict[str, InputTensor] = {}
        prefix, model = request.label, self.name
        for tensor in request.inputs:
            if tensor.name in given:
                raise _invalid(f"{prefix}input '{tensor.name}' already exists in request")
            given[tensor.name] = tensor
            if tensor.data is None:
                raise _invalid(
                    f"unable to find data for input tensor '{tensor.name}' for model '{model}' in request."
                )
        expected = [tensor.name for tensor in spec.inputs]
        missing = [name for name in expected if name not in given]
        if len(given) != len(expected):
            raise _invalid(
                f"{prefix}expected {len(expected)} inputs but got {len(given)} inputs for model '{model}'. "
                f"Got input(s) {_quoted(sorted(given))}, but missing required input(s) {_quoted(missing)}. "
                "Please provide all required input(s)."
            )
        for name in given:
            if name not in expected:
                raise _invalid(f"unexpected inference input '{name}' for model '{model}'")
        for want in spec.inputs:
            kind = given[want.name].datatype
            if kind != want.datatype:
                kind = kind if kind in DTYPES else "<invalid>"
                raise _invalid(
                    f"{prefix}inference input '{want.name}' data-type is '{kind}', "
                    f"but model '{model}' expects '{want.datatype}'"
                )
        for want in spec.inputs:
            shape = given[want.name].shape
            if not want.fits(shape):
                raise _invalid(
                    f"{prefix}unexpected shape for input '{want.name}' for model '{model}'. "
                    f"Expected {_shape(want.shape)}, got {_shape(shape)}. "
                )
            if min(shape, default=0) < 0:
                raise _invalid(
                    f"{prefix}All input dimensions should be specified for input '{want.name}' "
                    f"for model '{model}', got {_shape(shape)}"
                )
        return {want.name: self._array(given[want.name], want, prefix) for want in spec.inputs}

    def _array(self, given: InputTensor, spec: TensorSpec, prefix: str) -> Array:
        model, data = self.name, given.data
        assert data is not None
        assert not isinstance(data, Place), "the service resolves places"
        if spec.datatype == "BYTES":
            try:
                return _text(data, given.shape)
            except TextError as error:
                raise _invalid(_text_message(error, prefix, spec.name, model)) from error
        dtype = DTYPES[spec.datatype]
        size = math.prod(given.shape) * dtype.itemsize
        got = data.nbytes if isinstance(data, np.ndarray) else len(data)
        if got != size:
            raise _invalid(
                f"{prefix}input byte size mismatch for input '{spec.name}' for model '{model}'. "
                f"Expected {size}, got {got}"
            )
        if isinstance(data, np.ndarray):
            return data.view(dtype).reshape(given.shape)
        array: Array = np.frombuffer(data, dtype=dtype).reshape(given.shape)
        return array if array.flags.aligned else array.copy()

    def _names(self, request: InferRequest, slot: Slot) -> tuple[str, ...]:
        spec = slot.engine.spec
        for output in request.outputs:
            if spec.output(output.name) is None:
                raise _invalid(f"unexpected inference output '{output.name}' for model '{self.name}'")
            if output.classification and slot.task is not None and slot.task.is_map(output.name):
                raise _invalid(
                    f"{request.label}classification of '{output.name}' for model '{self.name}' has no "
                    "meaning: it holds edges of every class at every pixel; ask for the tensor"
                )
        if request.outputs:
            return tuple(dict.fromkeys(output.name for output in request.outputs))
        if slot.task is not None:
            return slot.task.outputs
        return tuple(output.name for output in spec.outputs)

    def _execute(self, jobs: list[Job]) -> None:
        work: _Work = jobs[0].payload
        slot = self._hold(work)
        try:
            begun, cpu = time.monotonic_ns(), time.thread_time_ns()
            inputs = work.inputs
            if len(jobs) > 1:
                inputs = {name: np.concatenate([job.payload.inputs[name] for job in jobs]) for name in inputs}
            gathered = time.monotonic_ns()
            try:
                outputs = slot.engine.run(inputs, work.names)
            except Exception as error:
                slot.failures += len(jobs)
                why = " ".join(str(error).split())[:300]
                message = f"engine of '{self.name}' version {slot.version} failed: {why}"
                raise ServiceError(Code.INTERNAL, message, "engine") from error
            finally:
                for job in jobs:
                    job.payload.slot = slot
            done = time.monotonic_ns()
            slot.run_ms.append((done - gathered) / 1e6)
            slot.cpu_ms.append((time.thread_time_ns() - cpu) / 1e6)
            offset = 0
            for job in jobs:
                job.result = (
                    outputs
                    if len(jobs) == 1
                    else {n: a[offset : offset + job.size] for n, a in outputs.items()}
                )
                offset += job.size
            split = time.monotonic_ns()
            run = Durations(0, gathered - begun + work.stages.compute_input, done - gathered, split - done)
            self.statistics_of(slot.version).executed(sum(job.size for job in jobs), run)
            for job in jobs:
                stages: Durations = job.payload.stages
                stages.compute_input += gathered - begun
                stages.compute_infer = done - gathered
                stages.compute_output = split - done
        finally:
            slot.release()

    def _hold(self, work: _Work) -> Slot:
        """The slot of this run, held.  Decided here, at the start of the run, not when the request came."""
        while True:
            slot = work.pinned or self.slot("" if work.version is None else str(work.version))
            if slot.hold():
                return slot

    def _observed(self, work: _Work, slot: Slot, outputs: dict[str, Array]) -> None:
        observers = self.observers
        if not observers or slot.task is None or not slot.task.seen(outputs):
            return
        observation = Observation(
            self.name,
            slot.version,
            work.source,
            work.inputs["frame"],
            outputs,
            time.time(),
        )
        for observer in observers:
            try:
                observer(observation)
            except Exception:  # observers may fail, serving may not
                self.unobserve(observer)


def parse_version(version: str) -> int | None:
    """A request's version string; None for "".  Raises ServiceError(INVALID_ARGUMENT) in Triton's words."""
    if not version:
        return None
    digits = version.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise _invalid(
            f"failed to get model version from specified version string '{version[:80]}' (details: stol), "
            "version should be an integral value > 0"
        )
    if version != digits:
        raise _invalid(
            f"invalid model version specified '{version}' , version should be an integral value > 0"
        )
    return int(version)


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")


def _shape(shape: Sequence[int]) -> str:
    return "[" + ",".join(str(size) for size in shape) + "]"


def _text(data: bytes | memoryview | Array, shape: Sequence[int]) -> Array:
    if not isinstance(data, np.ndarray):
        return decode_bytes(data, shape)
    if data.dtype.kind != "O":  # shared memory
        return decode_bytes(data.data, shape)
    count = math.prod(shape)
    if data.size != count:
        few = data.size < count
        raise TextError("few" if few else "many", count if few else count + 1, data.size if few else count)
    return data.reshape(tuple(shape))


def _text_message(error: TextError, prefix: str, name: str, model: str) -> str:
    """Triton's words."""
    where = f"inference input '{name}' for model '{model}'"
    if error.kind == "few":
        return f"{prefix}expected {error.expected} string elements for {where}, got {error.got}"
    if error.kind == "many":
        found = f"unexpected number of string elements {error.expected} for {where}"
        return f"{prefix}{found}, expecting {error.got}"
    if error.kind == "short":
        return (
            f"incomplete string data for inference input '{name}', expecting string of length "
            f"{error.expected} but only {error.got} bytes available"
        )
    return (
        f"{prefix}incomplete string length indicator for {where}, expecting {error.expected} bytes but only "
        f"{error.got} bytes available. Please make sure the string length indicator is in one buffer."
    )


def _classify(answer: Answer, output: OutputRequest, slot: Slot) -> None:
    """Replaces a tensor by its highest values, "value:index[:label]": Triton's classification extension."""
    labels = slot.classes if output.name == "probabilities" else ()
    for position, (name, _, array) in enumerate(answer.outputs):
        if name != output.name or array.dtype.kind == "O":
            continue
        flat = array.reshape(-1)
        order = np.argsort(-flat.astype(np.float64), kind="stable")[: output.classification]
        texts = np.empty(len(order), np.object_)
        for rank, index in enumerate(order):
            value = f"{float(flat[index]):f}" if flat.dtype.kind == "f" else str(int(flat[index]))
            label = f":{labels[index]}" if index < len(labels) else ""
            texts[rank] = f"{value}:{index}{label}".encode()
        answer.outputs[position] = (name, "BYTES", texts)


def _quoted(names: list[str]) -> str:
    return "[" + ",".join(f"'{name}'" for name in names) + "]"


__all__ = [
    "Answer",
    "InferRequest",
    "InputTensor",
    "ModelHost",
    "OutputRequest",
    "Parameter",
    "parse_version",
]
