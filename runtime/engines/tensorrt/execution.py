"""One lane of execution: a CUDA stream, its buffers, and the contexts that run a plan on them.

Knows a plan and its contexts; knows nothing of engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from runtime.engines.cuda.context import CudaError, CudaThread, Driver
from runtime.engines.tensorrt.contexts import Contexts, Slot
from runtime.engines.tensorrt.library import TensorRTError
from runtime.engines.tensorrt.plan import Plan, byte_size
from runtime.tensors import DTYPES, Array

if TYPE_CHECKING:
    import tensorrt as trt


@dataclass
class ExecutionLane:
    """A stream, its buffers and its contexts.  Everything but `run` and `close` happens on `thread`."""

    plan: Plan
    thread: CudaThread
    graphs: bool = True
    _contexts: Contexts | None = None
    _stream: int = 0
    _device: dict[str, int] = field(default_factory=dict)
    _host: dict[str, Array] = field(default_factory=dict)
    nbytes: int = 0  # of device memory, for buffers of the largest shape

    @classmethod
    def open(cls, plan: Plan, *, graphs: bool = True, profiler: trt.IProfiler | None = None) -> ExecutionLane:
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
        # A lost device refuses to free anything; nothing else can be done.
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
            nbytes = byte_size(tensor.datatype, shape)
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
        with contextlib.ExitStack() as last_first:  # each of them, even if one fails
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
