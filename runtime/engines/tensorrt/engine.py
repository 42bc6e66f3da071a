"""TensorRT behind the engine protocol: a plan, one execution context per stream, pinned buffers, CUDA graphs.

Type- and API-checked against the bindings of TensorRT 10.12 to 11.4, and run against fakes that enforce the
documented rules; not yet executed on a CUDA device (docs/tensorrt.md).  Knows plans and tensors, not versions
or requests: the caller has verified the plan's hash, because a plan is executable code.

The rules that shaped it (NVIDIA's documentation of TensorRT 10 and 11):

* a context serves one thread at a time, an engine many: a *lane* has contexts, a stream, buffers and its own
  thread (runtime/engines/cuda/context.py), and a run takes a whole lane;
* after a new input shape the first run is an ordinary one; only then may a graph be captured, and it is good
  for these addresses and shapes alone (runtime/engines/tensorrt/contexts.py);
* no other thread works on the device while a graph is captured (runtime/engines/cuda/gate.py);
* weights may be changed only while nothing of the engine is enqueued, and a refit that fails leaves it half
  changed: `refit` never touches this engine, it deserialises the plan again and answers a standby engine.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.config import EngineConfig
from runtime.engines.cuda.context import CudaError, CudaThread, Driver
from runtime.engines.tensorrt.contexts import Contexts, Slot
from runtime.engines.tensorrt.library import (
    BINDING_ERRORS,
    Library,
    Log,
    TensorRTError,
    ask,
    check,
    construct,
    logger,
    open_runtime,
    tensorrt,
)
from runtime.errors import Unjudged
from runtime.tensors import DTYPES, Array, EngineSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt

WARM_RUNS = 3  # the first after a shape is ordinary, the second captures, the third is what will be measured
_REBUILD = "build it again on this machine: python -m export.build PACK --repository DIR --backend tensorrt"

DriverFactory = Callable[[], Driver]


def pycuda() -> Driver:
    """The driver used where no other is given."""
    from runtime.engines.cuda.pycuda_driver import PycudaDriver

    return PycudaDriver()


@dataclass(frozen=True)
class Tensor:
    """One engine input or output: its declared shape and those of the optimisation profile."""

    name: str
    datatype: str
    shape: tuple[int, ...]  # -1 = free
    is_input: bool
    optimum: tuple[int, ...] = ()  # of inputs
    largest: tuple[int, ...] = ()  # of inputs

    @property
    def spec(self) -> TensorSpec:
        return TensorSpec(self.name, self.datatype, self.shape)


def _nbytes(datatype: str, shape: Sequence[int]) -> int:
    return max(1, int(np.prod(shape, dtype=np.int64)) * DTYPES[datatype].itemsize)


class _Plan:
    """A deserialised engine, shared by the lanes of one or two `TensorRTEngine`s; the last one closes it."""

    def __init__(
        self,
        model: bytes,
        library: Library,
        make_driver: DriverFactory,
        *,
        host_code: bool,
        weights: Mapping[str, Array] | None = None,
    ) -> None:
        self.model = model
        self.library = library
        self.make_driver = make_driver
        self.host_code = host_code
        self.log = Log()
        self.thread = CudaThread(make_driver(), name="tensorrt")
        self._users = 1
        self._lock = threading.Lock()
        self._engine: Any = None
        self._runtime: Any = None
        try:
            self.thread.call(lambda driver: self._deserialise(driver))
            if weights is not None:
                self.thread.call(lambda driver: self._refit(weights))
            self.tensors = self.thread.call(lambda driver: self._read_tensors())
        except BaseException:
            self.release()
            raise

    @property
    def engine(self) -> trt.ICudaEngine:
        return self._engine

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.is_input)

    def share(self) -> _Plan:
        """The same plan for one user more, who must `release` it.  Raises TensorRTError once it is closed."""
        with self._lock:
            if not self._users:
                raise TensorRTError("the engine is closed")
            self._users += 1
        return self

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users:
                return
        self.thread.call(lambda driver: self._forget())
        self.thread.close()

    def _forget(self) -> None:
        # The engine before its runtime, both on the thread that made them.
        self._engine = None
        self._runtime = None

    def _deserialise(self, driver: Driver) -> None:
        self._runtime = open_runtime(self.library, self.log, host_code=self.host_code)
        self._engine = ask(
            self._runtime.deserialize_cuda_engine,
            f"the plan cannot be loaded by {self.library.text}",
            f"plans fit one TensorRT version and one GPU model: {_REBUILD}"
            + ("" if self.host_code else "; a version-compatible one needs engine.host_code"),
            self.log,
            self.model,
        )
        free, _ = driver.memory()
        need = self.engine.device_memory_size_v2
        if need > free:
            raise TensorRTError(
                f"the plan needs {need >> 20} MiB of device memory to run, {free >> 20} MiB are free: "
                "stop another process on the device, or build for a smaller batch"
            )

    def _refit(self, weights: Mapping[str, Array]) -> None:
        refit_engine(self.library, self.engine, self.log, weights)

    def _read_tensors(self) -> tuple[Tensor, ...]:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        kinds = {
            trt.DataType.UINT8: "UINT8",
            trt.DataType.INT8: "INT8",
            trt.DataType.INT32: "INT32",
            trt.DataType.INT64: "INT64",
            trt.DataType.FLOAT: "FP32",
            trt.DataType.HALF: "FP16",
            trt.DataType.BOOL: "BOOL",
        }
        engine = self.engine
        found = []
        for index in range(engine.num_io_tensors):
            name = check(engine.get_tensor_name(index), f"tensor {index} has no name", _REBUILD, self.log)
            dtype = engine.get_tensor_dtype(name)
            if dtype not in kinds:
                raise TensorRTError(f"tensor '{name}' is {dtype.name}, which KServe v2 cannot carry")
            on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            if not on_device or engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
                raise TensorRTError(f"tensor '{name}' is not a plain array on the device; {_REBUILD}")
            shape = tuple(engine.get_tensor_shape(name))
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            optimum: tuple[int, ...] = ()
            largest: tuple[int, ...] = ()
            if is_input:  # asking for an output's profile crashes
                optimum = largest = shape
                if -1 in shape:
                    _, middle, top = engine.get_tensor_profile_shape(name, 0)
                    optimum, largest = tuple(middle), tuple(top)
            found.append(Tensor(name, kinds[dtype], shape, is_input, optimum, largest))
        return tuple(found)

    def layers(self) -> dict[str, Any]:
        """What the inspector says of the layers; detailed if the plan was built with detailed verbosity."""

        def inspect(driver: Driver) -> str:
            if TYPE_CHECKING:
                import tensorrt as trt
            else:
                trt = self.library.module
            inspector = check(
                self.engine.create_engine_inspector(), "no engine inspector", "free device memory", self.log
            )
            text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            return check(text, "the inspector gave nothing", _REBUILD, self.log)

        found: dict[str, Any] = json.loads(self.thread.call(inspect))
        return found


def refit_engine(
    library: Library, engine: trt.ICudaEngine, log: Log, weights: Mapping[str, Array]
) -> None:
    """Gives a freshly deserialised engine, which has no context and no work yet, its new weights.

    Raises TensorRTError: a weight is missing, unknown, of another size or not finite, or TensorRT refused;
    the engine may then be half changed and must be dropped.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.module
    if not engine.refittable:
        raise TensorRTError(f"the plan was built without refittable weights; {_REBUILD} --refit")
    refitter: trt.Refitter = construct(
        trt.Refitter, "no refitter", "free host memory", log, engine, logger(library, log)
    )
    wanted = set(refitter.get_all_weights())
    if missing := sorted(wanted - set(weights)):
        raise TensorRTError(
            f"refit: {_few(missing)} given for the plan's {len(wanted)} refittable weights is missing; "
            "give all of them, changed or not"
        )
    if extra := sorted(set(weights) - wanted):
        raise TensorRTError(
            f"refit: {_few(extra)} cannot be changed in this plan, which would keep the old value; "
            "name it when the plan is built (--refit), or leave it out"
        )
    kept = []  # TensorRT does not copy: the arrays must live until the refit has returned
    for name in sorted(wanted):
        prototype = refitter.get_weights_prototype(name)
        try:
            dtype = trt.nptype(prototype.dtype)
        except TypeError:
            raise TensorRTError(
                f"refit: '{name}' is {prototype.dtype.name}, which numpy cannot hold; build again"
            ) from None
        with np.errstate(over="ignore"):  # a float16 weight that overflows is refused below
            array = np.ascontiguousarray(weights[name], dtype=dtype)
        if array.size != prototype.size:
            raise TensorRTError(
                f"refit: '{name}' has {array.size} values, the plan's weight has {prototype.size}; "
                "the network differs from the one the plan was built from, so build again"
            )
        if not np.isfinite(array).all():
            raise TensorRTError(f"refit: '{name}' holds values that are not finite as {array.dtype}")
        kept.append(array)
        ask(
            refitter.set_named_weights,
            f"refit: '{name}' was refused",
            "build the plan again with these weights",
            log,
            name,
            trt.Weights(array),
        )
    if unset := refitter.get_missing_weights():
        raise TensorRTError(f"refit: TensorRT still misses {_few(sorted(unset))}; build the plan again")
    ask(
        refitter.refit_cuda_engine,
        "refit failed and left this copy of the engine half changed, so it was dropped",
        "the engine in service is untouched; build the plan again with these weights",
        log,
    )


def _line(error: Exception) -> str:
    """One line of an error.  What the binding raises itself says nothing of TensorRT or of a remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, CudaError | TensorRTError):
        return text
    return f"TensorRT's binding failed ({type(error).__name__}: {text}); see the server's log, or {_REBUILD}"


def _few(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


@dataclass
class _Lane:
    """A stream, its buffers and its contexts.  Everything but `run` and `close` happens on `thread`."""

    plan: _Plan
    thread: CudaThread
    graphs: bool = True
    _contexts: Contexts | None = None
    _stream: int = 0
    _device: dict[str, int] = field(default_factory=dict)
    _host: dict[str, Array] = field(default_factory=dict)
    #: Of the device: the buffers, at their largest.
    nbytes: int = 0

    @classmethod
    def open(cls, plan: _Plan, *, graphs: bool = True, profiler: trt.IProfiler | None = None) -> _Lane:
        lane = cls(plan, CudaThread(plan.make_driver(), name="tensorrt-lane"), graphs)
        try:
            lane.thread.call(lambda driver: lane._make(driver, profiler))
        except BaseException:
            lane.close()
            raise
        return lane

    @property
    def contexts(self) -> Contexts:
        if self._contexts is None:
            raise TensorRTError("the lane is closed")
        return self._contexts

    @property
    def graph_refused(self) -> str:
        return self._contexts.graph_refused if self._contexts is not None else ""

    def close(self) -> None:
        # A device that is lost refuses to give anything back, and there is nothing more to be done about it.
        with contextlib.suppress(CudaError):
            self.thread.call(self._free)
        self.thread.close()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        return self.thread.run(lambda driver: self._run(driver, inputs, outputs))

    def _make(self, driver: Driver, profiler: trt.IProfiler | None) -> None:
        plan = self.plan
        self._stream = driver.stream()
        self._contexts = Contexts(plan, self._stream, graphs=self.graphs, profiler=profiler)
        spare = self._contexts.open(driver)
        for tensor in plan.tensors:
            shape = spare.shape_of(tensor.name)
            if -1 in shape:
                raise TensorRTError(
                    f"output '{tensor.name}' has a size that depends on the data; only fixed sizes are served"
                )
            nbytes = _nbytes(tensor.datatype, shape)
            address = driver.allocate(nbytes)
            self._device[tensor.name] = address
            self.nbytes += nbytes
            self._host[tensor.name] = driver.pinned(nbytes)
            self._contexts.bind(tensor.name, address)

    def _run(self, driver: Driver, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        contexts = self.contexts
        slot = contexts.take(driver, {name: tuple(array.shape) for name, array in inputs.items()})
        contexts.prepare(driver, slot)  # before the uploads, which must not become part of the graph
        try:
            for name, array in inputs.items():
                pinned = self._view(slot, name)
                np.copyto(pinned, array)
                driver.upload(self._device[name], pinned, self._stream)
            contexts.execute(driver, slot)
            views = {name: self._view(slot, name) for name in outputs}
            for name, view in views.items():
                driver.download(view, self._device[name], self._stream)
        finally:
            # Also after a failure: the next run must not meet what this one left in the stream.
            driver.synchronise(self._stream)
        return {name: view.copy() for name, view in views.items()}

    def _view(self, slot: Slot, name: str) -> Array:
        tensor = next(tensor for tensor in self.plan.tensors if tensor.name == name)
        shape = slot.shape_of(name)
        dtype = DTYPES[tensor.datatype]
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return self._host[name][:nbytes].view(dtype).reshape(shape)

    def _free(self, driver: Driver) -> None:
        with contextlib.ExitStack() as last_first:  # each of them, also where one fails
            if self._stream:
                last_first.callback(driver.free_stream, self._stream)
            for array in self._host.values():
                last_first.callback(driver.free_pinned, array)
            for address in self._device.values():
                last_first.callback(driver.free, address)
            if self._contexts is not None:
                # The contexts go before the memory that they write to.
                last_first.callback(self._contexts.free, driver)
            if self._stream:
                last_first.callback(driver.synchronise, self._stream)
        self._contexts = None
        self._device.clear()
        self._host.clear()
        self._stream = 0


_open: weakref.WeakSet[TensorRTEngine] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    """Closes what was left open: TensorRT's objects need their thread and context when they are destroyed."""
    for engine in list(_open):
        if engine.idle:  # a run that hangs cannot be waited for
            engine.close()


class TensorRTEngine:
    """A plan ready to run: `Engine` of runtime/engines/__init__.py."""

    def __init__(
        self, plan: _Plan, precision: str, config: EngineConfig, lanes: int, *, graphs: bool = True
    ) -> None:
        self._plan = plan
        self._config = config
        self._graphs = graphs
        self._precision = precision
        self._closed = False
        self._free: list[_Lane] = []
        self._lanes: list[_Lane] = []
        self._turn = threading.Condition()
        self._spec = EngineSpec(
            inputs=tuple(tensor.spec for tensor in plan.tensors if tensor.is_input),
            outputs=tuple(tensor.spec for tensor in plan.tensors if not tensor.is_input),
            kind="tensorrt",
            precision=precision,
            device="cuda",
            metadata={"library": plan.library.text},
        )
        try:
            for _ in range(lanes):
                self._lanes.append(_Lane.open(plan, graphs=graphs))
                self._free.append(self._lanes[-1])
            self._activations = plan.thread.call(lambda driver: int(plan.engine.device_memory_size_v2))
        except BaseException:
            self.close()
            raise
        _open.add(self)

    @classmethod
    def load(
        cls,
        model: bytes,
        precision: str,
        config: EngineConfig,
        *,
        candidate: bool,
        graphs: bool = True,
        weights: Mapping[str, Array] | None = None,
        library: Library | None = None,
        driver: DriverFactory = pycuda,
    ) -> TensorRTEngine:
        """Deserialises a plan whose hash the caller has verified, and warms it up.

        `candidate`: one lane until `promoted`.  `weights`: refit before the first context exists.  A
        version-compatible plan brings code for the host and loads only where `config.host_code` allows it.
        Raises Refused("load", …).
        """
        try:
            found = library if library is not None else tensorrt()
            plan = _Plan(model, found, driver, host_code=config.host_code, weights=weights)
            return cls._warmed(plan, precision, config, 1 if candidate else config.concurrency, graphs)
        except (CudaError, *BINDING_ERRORS) as error:
            raise Unjudged("load", _line(error)) from error  # the plan's hash is right

    @classmethod
    def _warmed(
        cls, plan: _Plan, precision: str, config: EngineConfig, lanes: int, graphs: bool
    ) -> TensorRTEngine:
        engine = cls(plan, precision, config, lanes, graphs=graphs)
        try:
            engine.warm()
        except BaseException:
            engine.close()
            raise
        return engine

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def idle(self) -> bool:
        """If no run is in progress."""
        with self._turn:
            return len(self._free) == len(self._lanes)

    @property
    def memory_bytes(self) -> int:
        """Plan, activation memory of every lane, and its buffers at their largest."""
        return len(self._plan.model) + sum(self._activations + lane.nbytes for lane in self._lanes)

    @property
    def graph_refused(self) -> str:
        """Why a lane's last capture of a CUDA graph failed, or ""."""
        with self._turn:
            return next((lane.graph_refused for lane in self._free if lane.graph_refused), "")

    def warm(self) -> None:
        """Runs every lane at the profile's optimum until its CUDA graph exists."""
        inputs = [tensor for tensor in self._plan.tensors if tensor.is_input]
        zeros = {tensor.name: np.zeros(tensor.optimum, DTYPES[tensor.datatype]) for tensor in inputs}
        outputs = [spec.name for spec in self._spec.outputs]
        lanes = [self._take() for _ in self._lanes]
        try:
            for lane in lanes:
                for _ in range(WARM_RUNS):
                    lane.run(zeros, outputs)
        finally:
            for lane in lanes:
                self._give(lane)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Computes the named outputs, in the order they were named.  Raises ValueError, TensorRTError."""
        for spec in self._spec.inputs:
            array = inputs.get(spec.name)
            if array is None:
                raise ValueError(f"input '{spec.name}' is missing")
            if array.dtype != DTYPES[spec.datatype] or not spec.fits(array.shape):
                raise ValueError(
                    f"input '{spec.name}' is {array.dtype} {list(array.shape)}, the engine takes "
                    f"{spec.datatype} {list(spec.shape)}"
                )
        if unknown := [name for name in (*inputs, *outputs) if not self._known(name)]:
            raise ValueError(f"the engine has no tensor {_few(unknown)}")
        lane = self._take()
        try:
            return lane.run(inputs, outputs)
        except (CudaError, TensorRTError):
            raise
        except BINDING_ERRORS as error:
            raise TensorRTError(_line(error)) from error
        finally:
            self._give(lane)

    def promoted(self) -> TensorRTEngine:
        """The same plan with a lane for each concurrent run.

        New lanes also because threads made by a niced thread stay niced.
        """
        try:
            return TensorRTEngine._warmed(
                self._plan.share(), self._precision, self._config, self._config.concurrency, self._graphs
            )
        except (CudaError, *BINDING_ERRORS) as error:
            raise Unjudged("load", _line(error)) from error  # the plan's hash is right

    def refit(self, weights: Mapping[str, Array]) -> TensorRTEngine:
        """A NEW, warm standby engine with these weights; this one goes on untouched.

        `weights` must be exactly the plan's refittable weights.  Raises Refused("load", …).
        """
        return TensorRTEngine.load(
            self._plan.model,
            self._precision,
            self._config,
            candidate=True,
            graphs=self._graphs,
            weights=weights,
            library=self._plan.library,
            driver=self._plan.make_driver,
        )

    def layers(self) -> dict[str, Any]:
        """Layer information as TensorRT's inspector writes it."""
        plan = self._plan.share()
        try:
            return plan.layers()
        finally:
            plan.release()

    def profile(self, inputs: Mapping[str, Array], runs: int = 10) -> list[dict[str, Any]]:
        """Mean milliseconds per layer over `runs` runs: [{"layer", "milliseconds"}], in execution order.

        Runs in a lane of its own without a CUDA graph, because a graph has no layers.
        """
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._plan.library.module
        times: dict[str, list[float]] = {}
        trouble: list[BaseException] = []

        class Profiler(trt.IProfiler):  # type: ignore[misc]  # Any where the stubs are not made
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                try:
                    times.setdefault(layer_name, []).append(ms)
                except BaseException as error:  # nothing may be raised into TensorRT
                    trouble.append(error)

        with contextlib.ExitStack() as last_first:
            plan = self._plan.share()  # it stays until this is over, also if the engine is closed meanwhile
            last_first.callback(plan.release)
            lane = _Lane.open(plan, graphs=False, profiler=Profiler())
            last_first.callback(lane.close)
            lane.run(inputs, [])
            times.clear()  # the first run allocates
            for _ in range(runs):
                lane.run(inputs, [])
        if trouble:
            raise TensorRTError(f"the profiler failed: {trouble[0]}") from trouble[0]
        return [{"layer": name, "milliseconds": sum(spent) / runs} for name, spent in times.items()]

    def close(self) -> None:
        """Waits for the runs in progress, then frees everything.  Calling it twice is fine."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            self._turn.notify_all()
            while len(self._free) < len(self._lanes):
                self._turn.wait()
        with contextlib.ExitStack() as last_first:
            last_first.callback(self._plan.release)
            for lane in self._lanes:
                last_first.callback(lane.close)
        self._free.clear()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _known(self, name: str) -> bool:
        return any(tensor.name == name for tensor in self._plan.tensors)

    def _take(self) -> _Lane:
        with self._turn:
            while not self._free and not self._closed:
                self._turn.wait()
            if self._closed:
                raise TensorRTError("the engine is closed")
            return self._free.pop()

    def _give(self, lane: _Lane) -> None:
        with self._turn:
            self._free.append(lane)
            self._turn.notify_all()
