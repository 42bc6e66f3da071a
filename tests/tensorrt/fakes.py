"""A CUDA device and a TensorRT that do nothing but enforce the documented rules.

Asynchronous work really is: a copy or a run sits in its stream until somebody synchronises, so a missing
synchronisation shows as stale data, not as luck.  Breaking a rule raises `RuleBroken`.

Under a type checker the fakes derive from the stubs of the real bindings, so a fake whose signature drifts
from TensorRT's fails `make typecheck-tensorrt` (an overloaded method excepted: a fake has one overload).

A plan is JSON.  Its network is `Plain`, with an input `frame` uint8 [N,H,W,3], a refittable float32 weight
`mix` [3], and the outputs `brightest` uint8 [N,H,W] = max over channels and `mixed` float32 [N,H,W] = frame ·
mix; or `Onnx`, a graph with the input `frame` that ONNX Runtime computes on the CPU.
"""

from __future__ import annotations

import base64
import enum
import json
import threading
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.engines.cuda.context import ALIGNMENT, CudaError
from runtime.engines.tensorrt.library import Library
from runtime.tensors import Array

if TYPE_CHECKING:
    from tensorrt import EngineInspector as Inspector_
    from tensorrt import ICudaEngine as Engine_
    from tensorrt import IExecutionContext as Context_
    from tensorrt import ILogger as Logger_
    from tensorrt import IProfiler as Profiler_
    from tensorrt import ISerializationConfig as Config_
    from tensorrt import Refitter as Refitter_
    from tensorrt import Runtime as Runtime_
    from tensorrt import Weights as Weights_
else:
    Logger_ = Runtime_ = Engine_ = Context_ = Refitter_ = Weights_ = Profiler_ = Inspector_ = Config_ = object


class RuleBroken(AssertionError):
    """The code under test did what TensorRT's or CUDA's documentation forbids."""


def rule(held: object, what: str) -> None:
    if not held:
        raise RuleBroken(what)


# --------------------------------------------------------------------------------------------- CUDA
class Device:
    """Memory and streams that the drivers of all threads share, as they share the primary context."""

    def __init__(self, *, total: int = 1 << 30, graphs: bool = True) -> None:
        self.total, self.graphs = total, graphs
        self.memory: dict[int, bytearray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.capturing: dict[int, list[Callable[[], None]]] = {}
        self.pinned: dict[int, Array] = {}
        self.contexts = 0  # threads that have the primary context current
        self.launched = 0
        self.lost = False  # a sticky error: every call fails from now on
        self.capturer: int | None = None  # the thread that captures a graph
        self.disturbed = 0  # captures that fail from now on, as another library's work makes them fail
        self.during: Callable[[], None] = lambda: None  # called in the middle of a capture
        self.captured = 0  # captures that were tried
        self.executable: dict[int, object] = {}  # graphs by id
        self.broken: list[str] = []  # rules that were broken where nothing can be raised, or it may be lost
        self.current: set[int] = set()  # threads that have the context current
        self.lock = threading.RLock()
        self._next = 0x7000_0000

    def driver(self) -> FakeDriver:
        return FakeDriver(self)

    def name(self) -> int:
        with self.lock:
            self._next += 1 << 20
            return self._next

    def put(self, stream: int, work: Callable[[], None]) -> None:
        rule(stream in self.streams, f"stream {stream} does not exist")
        self.capturing.get(stream, self.streams[stream]).append(work)

    def read(self, address: int, nbytes: int) -> bytearray:
        rule(address in self.memory, f"{address:#x} is not allocated (freed too early?)")
        rule(len(self.memory[address]) >= nbytes, f"{nbytes} bytes at {address:#x} overrun the allocation")
        return self.memory[address]

    def clean(self) -> bool:
        """True when everything was given back and no rule was broken."""
        left = (self.memory, self.streams, self.pinned, self.contexts, self.executable)
        return not (any(left) or self.broken)

    def touch(self, what: str) -> None:
        """Every call of CUDA and TensorRT: none may happen while another thread captures a graph."""
        if self.capturer not in (None, threading.get_ident()):
            self.broken.append(f"{what} while another thread captured a graph")
            raise RuleBroken(self.broken[-1])

    def died(self, what: str, made_on: int) -> None:
        """An object of TensorRT was destroyed: with the context current, if it was made so."""
        me = threading.get_ident()
        if self.capturer not in (None, me):
            self.broken.append(f"{what} was destroyed while another thread captured a graph")
        if made_on and me not in self.current:
            self.broken.append(f"{what} was destroyed on a thread without the context")

    def maker(self) -> int:
        """This thread, if it has the context current."""
        me = threading.get_ident()
        return me if me in self.current else 0


class FakeDriver:
    """`runtime.engines.cuda.context.Driver`: one thread, no frees under work, no double frees."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.thread: int | None = None

    def _mine(self) -> None:
        rule(self.thread == threading.get_ident(), "CUDA objects were used on another thread than their own")
        self.device.touch("a CUDA call")
        if self.device.lost:
            raise CudaError("an illegal memory access was encountered")

    @property
    def can_capture(self) -> bool:
        return self.device.graphs

    def open(self, device: int) -> None:
        rule(self.thread is None, "a driver was opened twice")
        self.thread = threading.get_ident()
        self.device.touch("a context was retained")
        self.device.current.add(self.thread)
        self.device.contexts += 1

    def close(self) -> None:
        self._mine()
        self.device.current.discard(threading.get_ident())
        self.device.contexts -= 1

    def allocate(self, nbytes: int) -> int:
        self._mine()
        address = self.device.name()
        rule(address % ALIGNMENT == 0 and nbytes > 0, "bad allocation")
        self.device.memory[address] = bytearray(nbytes)
        return address

    def free(self, address: int) -> None:
        self._mine()
        rule(address in self.device.memory, f"{address:#x} was freed twice")
        del self.device.memory[address]

    def pinned(self, nbytes: int) -> Array:
        self._mine()
        array = np.zeros(nbytes, np.uint8)
        self.device.pinned[id(array)] = array
        return array

    def free_pinned(self, array: Array) -> None:
        self._mine()
        rule(self.device.pinned.pop(id(array), None) is array, "not pinned memory, or freed twice")

    def stream(self) -> int:
        self._mine()
        handle = self.device.name()
        self.device.streams[handle] = []
        return handle

    def free_stream(self, stream: int) -> None:
        self._mine()
        rule(not self.device.streams[stream], "a stream was destroyed with work in it")
        del self.device.streams[stream]

    def event(self) -> object:
        self._mine()
        return SimpleNamespace()

    def record(self, event: object, stream: int) -> None:
        self._mine()

    def elapsed(self, start: object, end: object) -> float:
        return 1.0

    def _is_pinned(self, array: Array) -> bool:
        base = array
        while isinstance(base.base, np.ndarray):
            base = base.base
        return id(base) in self.device.pinned

    def upload(self, address: int, source: Array, stream: int) -> None:
        self._mine()
        rule(source.flags.c_contiguous, "upload of an array that is not contiguous")
        rule(self._is_pinned(source), "an asynchronous copy from pageable memory is not asynchronous")

        def work() -> None:
            self.device.read(address, source.nbytes)[: source.nbytes] = source.tobytes()

        self.device.put(stream, work)

    def download(self, target: Array, address: int, stream: int) -> None:
        self._mine()
        rule(self._is_pinned(target), "an asynchronous copy to pageable memory is not asynchronous")

        def work() -> None:
            raw = self.device.read(address, target.nbytes)[: target.nbytes]
            np.copyto(target, np.frombuffer(bytes(raw), target.dtype).reshape(target.shape))

        self.device.put(stream, work)

    def synchronise(self, stream: int) -> None:
        self._mine()
        rule(stream not in self.device.capturing, "synchronising a stream while it captures is forbidden")
        work, self.device.streams[stream] = self.device.streams[stream], []
        for step in work:
            step()

    def capture(self, stream: int, work: Callable[[], None]) -> object:
        self._mine()
        rule(self.device.graphs, "capture without a library that can")
        rule(not self.device.streams[stream], "capture began with work in the stream")
        self.device.capturing[stream] = []
        self.device.captured += 1
        self.device.capturer = self.thread
        try:
            self.device.during()
            work()
        finally:
            graph = self.device.capturing.pop(stream)
            self.device.capturer = None
        if self.device.disturbed:
            self.device.disturbed -= 1
            raise CudaError("cuStreamEndCapture failed with CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        self.device.executable[id(graph)] = graph
        return graph

    def launch(self, graph: object, stream: int) -> None:
        self._mine()
        assert isinstance(graph, list)
        self.device.launched += 1
        for step in graph:
            self.device.put(stream, step)

    def free_graph(self, graph: object) -> None:
        self._mine()
        rule(self.device.executable.pop(id(graph), None) is graph, "not a graph, or freed twice")

    def memory(self) -> tuple[int, int]:
        self._mine()
        used = sum(len(block) for block in self.device.memory.values())
        return self.device.total - used, self.device.total


# ----------------------------------------------------------------------------------------- TensorRT
class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT8, INT32, INT64, BOOL, UINT8 = range(8)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.Enum):
    DEVICE, HOST = range(2)


class TensorFormat(enum.Enum):
    LINEAR, HWC8 = range(2)


class LayerInformationFormat(enum.Enum):
    ONELINE, JSON = range(2)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class SerializationFlag(enum.Enum):
    EXCLUDE_WEIGHTS, EXCLUDE_LEAN_RUNTIME, INCLUDE_REFIT = range(3)


class OlderSerializationFlag(enum.Enum):
    """Of TensorRT before 10.14."""

    EXCLUDE_WEIGHTS, EXCLUDE_LEAN_RUNTIME = range(2)


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger(Logger_):
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING  # type: ignore
    Severity = Severity  # type: ignore[misc,assignment]

    def __init__(self) -> None: ...


class IProfiler(Profiler_):
    def __init__(self) -> None: ...


class Weights(Weights_):
    def __init__(self, a: Array) -> None:
        rule(a.flags.c_contiguous, "Weights needs a contiguous array")
        self.array = a  # no copy, as in TensorRT


class Prototype(Weights_):
    def __init__(self, dtype: DataType, size: int) -> None:
        self._dtype, self._size = dtype, size

    @property
    def dtype(self) -> Any:
        return self._dtype

    @property
    def size(self) -> int:
        return self._size


class Plain:
    """See the module's docstring."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.weights = {"mix": np.asarray(plan["mix"], np.float32)}
        self.outputs = {"brightest": DataType.UINT8, "mixed": DataType.FLOAT}

    def shape(self, name: str, frame: tuple[int, ...]) -> tuple[int, ...]:
        return frame[:3]

    def compute(self, frame: Array) -> dict[str, Array]:
        mixed = frame.astype(np.float32) @ self.weights["mix"]
        return {"brightest": frame.max(-1), "mixed": mixed.astype(np.float32)}

    def written(self) -> dict[str, Any]:
        return {"mix": self.weights["mix"].tolist()}


class Onnx:
    """A graph computed by ONNX Runtime; initialisers with "head" in their names can be refitted."""

    def __init__(self, plan: dict[str, Any]) -> None:
        from onnx import ModelProto, numpy_helper

        self.model = ModelProto.FromString(base64.b64decode(plan["onnx"]))
        kinds = {1: DataType.FLOAT, 2: DataType.UINT8}
        graph = self.model.graph
        self.outputs = {v.name: kinds[v.type.tensor_type.elem_type] for v in graph.output}
        self.weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer if "head" in t.name}

    def shape(self, name: str, frame: tuple[int, ...]) -> tuple[int, ...]:
        value = next(value for value in self.model.graph.output if value.name == name)
        return (frame[0], *(size.dim_value for size in value.type.tensor_type.shape.dim[1:]))

    def compute(self, frame: Array) -> dict[str, Array]:
        import onnxruntime
        from onnx import ModelProto, numpy_helper

        model = ModelProto.FromString(self.model.SerializeToString())
        for tensor in model.graph.initializer:
            if tensor.name in self.weights:
                tensor.CopyFrom(numpy_helper.from_array(self.weights[tensor.name], tensor.name))
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = list(self.outputs)
        return dict(zip(names, session.run(names, {"frame": frame}), strict=True))

    def written(self) -> dict[str, Any]:
        return {}


class FakeEngine(Engine_):
    """`plan`: shape, profile, mix or onnx, refittable, memory, graph (whether it can be captured), …"""

    def __init__(self, device: Device, plan: dict[str, Any], log: Any) -> None:
        self.device, self.plan, self.log = device, plan, log
        self.network: Plain | Onnx = Onnx(plan) if "onnx" in plan else Plain(plan)
        self.names: tuple[str, ...] = ("frame", *self.network.outputs)
        self.pending = 0
        self.contexts = 0  # alive
        self.busy_memory: set[int] = set()  # activation memory of contexts that have work pending
        self.made_on = device.maker()

    def __del__(self) -> None:
        self.device.died("an engine", self.made_on)

    @property
    def refittable(self) -> bool:
        return bool(self.plan.get("refittable", True))

    @property
    def device_memory_size_v2(self) -> int:
        return int(self.plan.get("memory", 1 << 20))

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: Any) -> str | None:
        return str(self.names[index])

    def get_tensor_dtype(self, name: str) -> Any:
        return DataType.UINT8 if name == "frame" else self.network.outputs[name]

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name == "frame" else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> Any:
        return TensorLocation.DEVICE

    def get_tensor_format(self, name: str, profile_index: int = 0) -> Any:  # type: ignore[override]
        return TensorFormat[self.plan.get("format", "LINEAR")]

    def get_tensor_shape(self, name: str) -> Any:
        shape = tuple(self.plan["shape"])
        return shape if name == "frame" else self.network.shape(name, shape)

    def get_tensor_profile_shape(self, name: str, profile_index: Any) -> Any:
        rule(name == "frame", "get_tensor_profile_shape of an output crashes")
        return [tuple(shape) for shape in self.plan["profile"]]

    def create_execution_context(self, strategy: Any = None) -> Any:  # type: ignore[override]
        self.device.touch("a context was made")
        rule(strategy is ExecutionContextAllocationStrategy.USER_MANAGED, "contexts share a lane's memory")
        if self.contexts >= self.plan.get("contexts", 99):
            self.log(Severity.ERROR, "out of device memory")
            return None
        self.contexts += 1
        return FakeContext(self)

    def create_engine_inspector(self) -> Any:
        return Inspector()

    def create_serialization_config(self) -> Any:
        return SerializationConfig()

    def serialize_with_config(self, arg0: Any, /) -> Any:
        """A plan; it can be refitted again only if that was asked for."""
        again = SerializationFlag.INCLUDE_REFIT in arg0.given
        return json.dumps({**self.plan, **self.network.written(), "refittable": again}).encode()


class SerializationConfig(Config_):
    def __init__(self) -> None:
        self.given: set[Any] = set()

    def set_flag(self, flag: Any) -> bool:
        self.given.add(flag)
        return True


class Inspector(Inspector_):
    def __init__(self) -> None: ...

    def get_engine_information(self, format: Any) -> str | None:
        rule(format is LayerInformationFormat.JSON, "asked for another format than JSON")
        return json.dumps({"Layers": ["max", "dot"], "I/O Tensors": ["frame", "brightest", "mixed"]})


class FakeContext(Context_):
    def __init__(self, engine: FakeEngine) -> None:
        self.fake, self.owner = engine, 0
        self.made_on = engine.device.maker()
        self.activations = 0
        self.addresses: dict[str, int] = {}
        declared = engine.get_tensor_shape("frame")
        self.shape: tuple[int, ...] | None = None if -1 in declared else declared
        self.flushed = False
        self.busy = 0
        self.reports: Any = None
        #: -1: none; an older TensorRT gives profile 0 to the first context only.
        self.profile = -1 if engine.plan.get("profiles_are_chosen") and engine.contexts > 1 else 0

    def __del__(self) -> None:
        self.fake.contexts -= 1
        self.fake.device.died("a context", self.made_on)
        if self.activations and self.activations not in self.fake.device.memory:
            self.fake.device.broken.append("a context outlived its memory")

    def set_device_memory(self, memory: Any, size: Any) -> None:
        self._mine()
        rule(memory % ALIGNMENT == 0, "activation memory that is not aligned")
        rule(size >= self.fake.device_memory_size_v2, "activation memory that is too small")
        rule(len(self.fake.device.memory[memory]) >= size, "activation memory that is not there")
        self.activations = memory

    @property
    def profiler(self) -> Any:
        return self.reports

    @profiler.setter
    def profiler(self, value: Any) -> None:
        self.reports = value

    def _mine(self) -> None:
        self.owner = self.owner or threading.get_ident()
        self.fake.device.touch("a context was used")
        rule(self.owner == threading.get_ident(), "one context was used by two threads")

    @property
    def active_optimization_profile(self) -> Any:
        return self.profile

    def set_optimization_profile_async(self, profile_index: Any, stream_handle: Any) -> bool:
        self._mine()
        rule(stream_handle in self.fake.device.streams, "a profile is chosen in a stream")
        if self.fake.plan["profiles_are_chosen"] == "once":
            self.fake.log(Severity.ERROR, "profile 0 has been chosen by another context")
            return False
        self.profile = int(profile_index)
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        self._mine()
        rule(self.profile == 0, "a shape was set before a profile was chosen")
        rule(all(type(size) is int for size in shape), "a shape that is not of ints raises in TensorRT")
        rule(not self.busy, "the shape was changed while work of the context was pending")
        if "set_input_shape" in self.fake.plan.get("raises", ()):
            raise RuntimeError("Failed to set\ninput shape")
        lowest, _, highest = self.fake.plan["profile"]
        if name != "frame" or not all(a <= b <= c for a, b, c in zip(lowest, shape, highest, strict=True)):
            self.fake.log(Severity.ERROR, "shape outside the profile")
            return False
        self.shape, self.flushed = tuple(shape), False
        return True

    def infer_shapes(self) -> list[str]:
        self._mine()
        if "infer_shapes" in self.fake.plan.get("raises", ()):
            raise RuntimeError("Failed to infer\nshapes")
        return [] if self.shape else ["frame"]

    def get_tensor_shape(self, name: str) -> Any:
        shape = self.shape or self.fake.get_tensor_shape("frame")
        if name == "mixed" and self.fake.plan.get("data_dependent"):
            return (-1, *shape[1:3])
        return shape if name == "frame" else self.fake.network.shape(name, tuple(shape))

    def set_tensor_address(self, name: str, memory: Any) -> bool:
        self._mine()
        rule(memory % ALIGNMENT == 0, f"the address of {name} is not aligned to {ALIGNMENT} bytes")
        rule(not self.busy, "an address was changed while work that uses it was pending")
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: Any) -> bool:
        self._mine()
        engine, shape, device = self.fake, self.shape, self.fake.device
        rule(shape is not None, "run before the input shape was set")
        assert shape is not None
        rule(stream_handle != 0, "the default stream costs extra synchronisations")
        rule(set(self.addresses) == set(engine.names), "run before every address was set")
        capturing = stream_handle in device.capturing
        rule(self.activations, "run before the context was given its memory")
        rule(
            self.busy or self.activations not in engine.busy_memory,
            "two contexts used one activation memory at the same time",
        )
        if "execute_async_v3" in engine.plan.get("raises", ()):
            raise RuntimeError("Unexpected\nexception")
        rule(self.flushed or not capturing, "captured before one ordinary run had flushed the new shape")
        if engine.plan.get("fails"):
            engine.log(Severity.ERROR, "the kernel could not be launched")
            return False
        if capturing and not engine.plan.get("graph", True):
            engine.log(Severity.ERROR, "operation not permitted when stream is capturing")
            return False
        addresses, captured = dict(self.addresses), self.shape

        def work() -> None:
            rule(self.shape == captured, "a graph was launched after its context had got another shape")
            nbytes = int(np.prod(shape))
            raw = bytes(device.read(addresses["frame"], nbytes)[:nbytes])
            for name, answer in engine.network.compute(np.frombuffer(raw, np.uint8).reshape(shape)).items():
                device.read(addresses[name], answer.nbytes)[: answer.nbytes] = answer.tobytes()
            if self.reports is not None:
                self.reports.report_layer_time("max", 0.25)
                self.reports.report_layer_time("dot", 0.5)

        def counted() -> None:
            engine.pending -= 1
            self.busy -= 1
            engine.busy_memory.discard(self.activations)
            work()

        if capturing:
            device.put(stream_handle, work)
        else:
            engine.pending += 1
            self.busy += 1
            engine.busy_memory.add(self.activations)
            self.flushed = True
            device.put(stream_handle, counted)
        return True


def nptype(trt_type: DataType) -> Any:
    if trt_type is DataType.BF16:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return {DataType.FLOAT: np.float32, DataType.HALF: np.float16}[trt_type]


def library(device: Device, version: str = "11.4.0.106", **quirks: Any) -> Library:
    """A module with the names the runner uses.

    quirks: runtime_error, refit_fails, refit_dtype, no_runtime, no_refitter, deserialise_raises.
    """
    registered: list[Any] = []

    def one_logger(logger: Any) -> None:
        registered.append(logger)
        rule(registered[0] is logger, "a second logger: TensorRT ignores it and writes to the first")

    class Runtime(Runtime_):
        def __init__(self, logger: Any) -> None:
            one_logger(logger)
            self.logger_ = logger
            self.host_code = False
            if "no_runtime" in quirks:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            if "runtime_error" in quirks:
                logger.log(Severity.ERROR, quirks["runtime_error"])

        @property
        def engine_host_code_allowed(self) -> bool:
            return self.host_code

        @engine_host_code_allowed.setter
        def engine_host_code_allowed(self, value: bool) -> None:
            self.host_code = value

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Any:  # type: ignore[override]
            rule("runtime_error" not in quirks, "a Runtime that logged an error kills the process here")
            device.touch("an engine was loaded")
            if "deserialise_raises" in quirks:
                raise RuntimeError("bad\noptional access")
            try:
                plan = json.loads(serialized_engine)
            except ValueError:
                self.logger_.log(Severity.ERROR, "magicTag == kEXPECTED_MAGIC_TAG failed")
                return None
            if plan.get("host_code") and not self.host_code:
                self.logger_.log(Severity.ERROR, "the plan contains host code")
                return None
            return FakeEngine(device, plan, self.logger_.log)

    class Refitter(Refitter_):
        def __init__(self, engine: FakeEngine, logger: Any) -> None:
            one_logger(logger)
            if "no_refitter" in quirks:
                raise TypeError("pybind11::init(): factory function returned nullptr")
            self.engine, self.logger_ = engine, logger
            self.given: dict[str, Weights] = {}
            self.made_on = device.maker()

        def __del__(self) -> None:
            if hasattr(self, "made_on"):
                device.died("a refitter", self.made_on)

        def get_all_weights(self) -> list[str]:
            return list(self.engine.network.weights)

        def get_missing_weights(self) -> list[str]:
            return [name for name in self.engine.network.weights if name not in self.given]

        def get_weights_prototype(self, weights_name: str) -> Any:
            size = self.engine.network.weights[weights_name].size
            return Prototype(DataType[quirks.get("refit_dtype", "FLOAT")], size)

        def set_named_weights(self, name: str, weights: Weights) -> bool:  # type: ignore[override]
            rule(weights.array.size == self.engine.network.weights[name].size, "a weight of another size")
            self.given[name] = weights
            return True

        def refit_cuda_engine(self) -> bool:
            rule(self.engine.pending == 0, "refit with pending work is undefined")
            device.touch("an engine was refitted")
            rule(not self.engine.contexts, "refit of an engine in service (a standby one has no context yet)")
            held = self.engine.network.weights
            for name in held:
                held[name] = np.full_like(held[name], np.nan)  # half changed
            if quirks.get("refit_fails"):
                self.logger_.log(Severity.ERROR, "refit ran out of memory")
                return False
            for name in held:
                held[name] = self.given[name].array.astype(np.float32).reshape(held[name].shape)
            return True

    older = tuple(int(part) for part in version.split(".")[:2]) < (10, 14)
    module = ModuleType("tensorrt")
    for name, value in {
        "__version__": version,
        "nptype": nptype,
        **{kind.__name__: kind for kind in (DataType, TensorIOMode, TensorLocation, TensorFormat)},
        **{kind.__name__: kind for kind in (LayerInformationFormat, ILogger, IProfiler, Weights)},
        **{kind.__name__: kind for kind in (Runtime, Refitter, ExecutionContextAllocationStrategy)},
        "SerializationFlag": OlderSerializationFlag if older else SerializationFlag,
    }.items():
        setattr(module, name, value)
    return Library("tensorrt", module, tuple(int(part) for part in version.split(".")))


def onnx_plan(model: bytes, profile: Sequence[Sequence[int]], *, free: bool = False) -> bytes:
    """A plan whose network is an ONNX graph with the input `frame`."""
    shape = [-1 if free else profile[1][0], *profile[1][1:]]
    text = base64.b64encode(model).decode()
    return json.dumps({"onnx": text, "shape": shape, "profile": [list(s) for s in profile]}).encode()


def plan(
    shape: Sequence[int] = (2, 4, 5, 3),
    profile: Sequence[Sequence[int]] = (),
    mix: Sequence[float] = (0.25, 0.5, 0.25),
    **more: Any,
) -> bytes:
    """A plan for the fake library."""
    chosen = profile or (shape, shape, shape)
    return json.dumps(
        {"shape": list(shape), "profile": [list(s) for s in chosen], "mix": list(mix), **more}
    ).encode()


__all__ = ["CudaError", "Device", "RuleBroken", "library", "onnx_plan", "plan"]
