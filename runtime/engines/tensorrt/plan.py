"""A TensorRT plan: deserialised once, refitted, and shared by the engines that run it.

Knows plans and tensors; knows nothing of runs.  The caller has verified the plan's hash, because a plan is
executable code.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.engines.cuda.context import CudaThread, Driver
from runtime.engines.tensorrt.library import (
    Library,
    Log,
    TensorRTError,
    ask,
    check,
    construct,
    logger,
    open_runtime,
)
from runtime.tensors import DTYPES, Array, TensorSpec

if TYPE_CHECKING:
    import tensorrt as trt

REBUILD = "build it again on this machine: python -m export.build PACK --repository DIR --backend tensorrt"

DriverFactory = Callable[[], Driver]


def pycuda() -> Driver:
    """Returns the default driver."""
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


def byte_size(datatype: str, shape: Sequence[int]) -> int:
    """Returns the bytes of a tensor, at least 1."""
    return max(1, int(np.prod(shape, dtype=np.int64)) * DTYPES[datatype].itemsize)


class Plan:
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

    def share(self) -> Plan:
        """Returns the same plan for one more user, which must `release` it.

        Raises TensorRTError if it is closed.
        """
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
            f"plans fit one TensorRT version and one GPU model: {REBUILD}"
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
            name = check(engine.get_tensor_name(index), f"tensor {index} has no name", REBUILD, self.log)
            dtype = engine.get_tensor_dtype(name)
            if dtype not in kinds:
                raise TensorRTError(f"tensor '{name}' is {dtype.name}, which KServe v2 cannot carry")
            on_device = engine.get_tensor_location(name) == trt.TensorLocation.DEVICE
            if not on_device or engine.get_tensor_format(name) != trt.TensorFormat.LINEAR:
                raise TensorRTError(f"tensor '{name}' is not a plain array on the device; {REBUILD}")
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
        """Returns the inspector's description of the layers; detailed if the plan was built so."""

        def inspect(driver: Driver) -> str:
            if TYPE_CHECKING:
                import tensorrt as trt
            else:
                trt = self.library.module
            inspector = check(
                self.engine.create_engine_inspector(), "no engine inspector", "free device memory", self.log
            )
            text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
            return check(text, "the inspector gave nothing", REBUILD, self.log)

        found: dict[str, Any] = json.loads(self.thread.call(inspect))
        return found


def refit_engine(library: Library, engine: trt.ICudaEngine, log: Log, weights: Mapping[str, Array]) -> None:
    """Sets the weights of an engine that was just deserialised and has no context and no work yet.

    Raises TensorRTError: a weight is missing, unknown, of another size or not finite, or TensorRT refused;
    the engine may then be half changed and must be dropped.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.module
    if not engine.refittable:
        raise TensorRTError(f"the plan was built without refittable weights; {REBUILD} --refit")
    refitter: trt.Refitter = construct(
        trt.Refitter, "no refitter", "free host memory", log, engine, logger(library, log)
    )
    wanted = set(refitter.get_all_weights())
    if missing := sorted(wanted - set(weights)):
        raise TensorRTError(
            f"refit: {shorten(missing)} given for the plan's {len(wanted)} refittable weights is missing; "
            "give all of them, changed or not"
        )
    if extra := sorted(set(weights) - wanted):
        raise TensorRTError(
            f"refit: {shorten(extra)} cannot be changed in this plan, which would keep the old value; "
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
        raise TensorRTError(f"refit: TensorRT still misses {shorten(sorted(unset))}; build the plan again")
    ask(
        refitter.refit_cuda_engine,
        "refit failed and left this copy of the engine half changed, so it was dropped",
        "the engine in service is untouched; build the plan again with these weights",
        log,
    )


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Returns the first names of a list and the number of the others, for an error."""
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
