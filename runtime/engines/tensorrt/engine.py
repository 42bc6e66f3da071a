"""TensorRT behind the engine protocol: engines that share a plan and run it on lanes.

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
import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.config import EngineConfig
from runtime.engines.cuda.context import CudaError
from runtime.engines.tensorrt.execution import ExecutionLane
from runtime.engines.tensorrt.library import (
    BINDING_ERRORS,
    Library,
    TensorRTError,
    tensorrt,
)
from runtime.engines.tensorrt.plan import REBUILD, DriverFactory, Plan, pycuda, shorten
from runtime.errors import Unjudged
from runtime.tensors import DTYPES, Array, EngineSpec

if TYPE_CHECKING:
    pass

WARM_RUNS = 3  # the first after a shape is ordinary, the second captures, the third is what will be measured


def _line(error: Exception) -> str:
    """Returns one line for an error.  An error of the binding itself names neither TensorRT nor a remedy."""
    text = " ".join(str(error).split())
    if isinstance(error, CudaError | TensorRTError):
        return text
    return f"TensorRT's binding failed ({type(error).__name__}: {text}); see the server's log, or {REBUILD}"


_open: weakref.WeakSet[TensorRTEngine] = weakref.WeakSet()


@functools.cache
def _register_close_at_exit() -> None:
    """Called with the first engine, so that engines are closed before what was registered earlier."""
    atexit.register(_close_at_exit)


def _close_at_exit() -> None:
    """Closes open engines: TensorRT's objects need their thread and context when they are destroyed."""
    for engine in list(_open):
        if engine.idle:  # a run that hangs cannot be waited for
            engine.close()


class TensorRTEngine:
    """A plan ready to run: `Engine` of runtime/engines/__init__.py."""

    def __init__(
        self, plan: Plan, precision: str, config: EngineConfig, lanes: int, *, graphs: bool = True
    ) -> None:
        self._plan = plan
        self._config = config
        self._graphs = graphs
        self._precision = precision
        self._closed = False
        self._free: list[ExecutionLane] = []
        self._lanes: list[ExecutionLane] = []
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
                self._lanes.append(ExecutionLane.open(plan, graphs=graphs))
                self._free.append(self._lanes[-1])
            self._activations = plan.thread.call(lambda driver: int(plan.engine.device_memory_size_v2))
        except BaseException:
            self.close()
            raise
        _register_close_at_exit()
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

        candidate: one lane until `with_serving_threads`.  weights: refit before the first context exists.
        A version-compatible plan brings code for the host and loads only if `config.host_code` allows it.
        Raises Refused("load", …).
        """
        try:
            found = library if library is not None else tensorrt()
            plan = Plan(model, found, driver, host_code=config.host_code, weights=weights)
            return cls._warmed(plan, precision, config, 1 if candidate else config.concurrency, graphs)
        except (CudaError, *BINDING_ERRORS) as error:
            raise Unjudged("load", _line(error)) from error  # the plan's hash is right

    @classmethod
    def _warmed(
        cls, plan: Plan, precision: str, config: EngineConfig, lanes: int, graphs: bool
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
            raise ValueError(f"the engine has no tensor {shorten(unknown)}")
        lane = self._take()
        try:
            return lane.run(inputs, outputs)
        except (CudaError, TensorRTError):
            raise
        except BINDING_ERRORS as error:
            raise TensorRTError(_line(error)) from error
        finally:
            self._give(lane)

    def with_serving_threads(self) -> TensorRTEngine:
        """The same plan with a lane for each concurrent run.

        New lanes also because threads made by a niced thread stay niced.
        """
        try:
            return TensorRTEngine._warmed(
                self._plan.share(), self._precision, self._config, self._config.concurrency, self._graphs
            )
        except (CudaError, *BINDING_ERRORS) as error:
            raise Unjudged("load", _line(error)) from error  # the plan's hash is right

    promoted = with_serving_threads  # the name until 0.2, which programs outside the project call

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
            lane = ExecutionLane.open(plan, graphs=False, profiler=Profiler())
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

    def _take(self) -> ExecutionLane:
        with self._turn:
            while not self._free and not self._closed:
                self._turn.wait()
            if self._closed:
                raise TensorRTError("the engine is closed")
            return self._free.pop()

    def _give(self, lane: ExecutionLane) -> None:
        with self._turn:
            self._free.append(lane)
            self._turn.notify_all()
