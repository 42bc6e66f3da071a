"""The execution contexts of one lane: which one runs an input shape, and the CUDA graph captured of it.

NVIDIA's advice for graphs of several shapes is one context per graph, because a context that gets another
shape makes its graph invalid.  Contexts that never run at the same time share a piece of device memory.  So a
lane has a spare context, which takes any shape, and up to `GRAPHS` contexts that keep the shape they were
made with.  Everything here happens on the lane's thread (runtime/engines/cuda/context.py).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from runtime.engines.cuda.context import CudaError, Driver
from runtime.engines.cuda.gate import GATE
from runtime.engines.tensorrt.library import BINDING_ERRORS, Library, Log, TensorRTError, ask

if TYPE_CHECKING:
    import tensorrt as trt

#: CUDA graphs that a lane keeps, each for one set of input shapes.
GRAPHS = 4
#: Runs after which a new shape takes the place of the graph that was not used for the longest time.
EARNED = 16
#: Captures of one context that may fail.  After the n-th failure, 8^n runs go by before the next one.
TRIES = 4
#: Runs until the next attempt, if a capture could not be alone on the device.
PAUSE = 8
_SEEN = 64  # shapes without a graph whose runs are counted

Shapes = Mapping[str, tuple[int, ...]]
Key = tuple[tuple[str, tuple[int, ...]], ...]


class Input(Protocol):
    """What is needed of an input of the plan."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def largest(self) -> tuple[int, ...]: ...


class Plan(Protocol):
    """What is needed of a deserialised plan."""

    @property
    def library(self) -> Library: ...

    @property
    def log(self) -> Log: ...

    @property
    def engine(self) -> trt.ICudaEngine: ...

    @property
    def inputs(self) -> Sequence[Input]: ...


@dataclass
class Slot:
    """One execution context, the shapes it has, and its graph."""

    held: Any  # the context, or None once it was dropped
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    graph: object | None = None
    #: Since the shapes were set: TensorRT wants one ordinary run of a shape before a capture of it.
    ordinary_runs: int = 0
    failures: int = 0
    due: int = 1  # the number of ordinary runs after which the next capture is tried
    reported: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def context(self) -> trt.IExecutionContext:
        return self.held

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape that a tensor, also an output, has now."""
        if name not in self.reported:
            self.reported[name] = tuple(self.context.get_tensor_shape(name))
        return self.reported[name]


class Contexts:
    """The contexts of one lane.  `stream` is the lane's; `graphs` says if graphs may be captured at all."""

    def __init__(self, plan: Plan, stream: int, *, graphs: bool, profiler: trt.IProfiler | None) -> None:
        self._plan = plan
        self._stream = stream
        self._graphs = graphs
        self._profiler = profiler
        self._free_shapes = any(-1 in tensor.shape for tensor in plan.inputs)
        self._memory = 0
        self._addresses: dict[str, int] = {}
        self._spare: Slot | None = None
        self._slots: OrderedDict[Key, Slot] = OrderedDict()
        self._most = GRAPHS
        self._seen: dict[Key, int] = {}
        self.graph_refused = ""

    @property
    def spare(self) -> Slot:
        if self._spare is None:
            raise TensorRTError("the lane is closed")
        return self._spare

    def open(self, driver: Driver) -> Slot:
        """Makes the spare context at the largest shapes, and the memory that all contexts share."""
        if need := int(self._plan.engine.device_memory_size_v2):
            self._memory = driver.allocate(need)
        self._spare = self._make(driver)
        self._shape(self._spare, {tensor.name: tensor.largest for tensor in self._plan.inputs})
        return self._spare

    def bind(self, name: str, address: int) -> None:
        """Gives the spare context, and all that are made later, the address of a tensor."""
        self._addresses[name] = address
        self._bind(self.spare, name, address)

    def take(self, driver: Driver, shapes: Shapes) -> Slot:
        """The context for a run with these input shapes.  Raises TensorRTError for shapes it cannot have."""
        if not self._free_shapes:
            return self.spare
        key: Key = tuple(sorted(shapes.items()))
        if (kept := self._slots.get(key)) is not None:
            self._slots.move_to_end(key)
            return kept
        if self._deserves(driver, key) and (own := self._own(driver)) is not None:
            self._shape(own, shapes)
            while len(self._slots) >= self._most:
                self._drop(driver, self._slots.popitem(last=False)[1])
            self._seen.pop(key, None)
            self._slots[key] = own
            return own
        if self.spare.shapes != shapes:
            self._shape(self.spare, shapes)
        return self.spare

    def prepare(self, driver: Driver, slot: Slot) -> None:
        """Captures the slot's graph if it is time for it.  The stream must be empty.

        A capture that fails, because another library disturbed it or because the network cannot be captured,
        is tried again after some runs, `TRIES` times at most.
        """
        if slot.graph is not None or not self._may_capture(driver) or slot.failures >= TRIES:
            return
        if slot.ordinary_runs < slot.due or (self._free_shapes and slot is self._spare):
            return
        with GATE.capture() as alone:
            if not alone:
                # Something is being loaded or freed, or a run hangs.  Each attempt may hold up all lanes for
                # as long as it waits, so it is not made at every run.
                slot.due = slot.ordinary_runs + PAUSE
                return
            try:
                slot.graph = driver.capture(self._stream, lambda: self._enqueue(slot))
                self.graph_refused = ""
            except (CudaError, *BINDING_ERRORS) as error:
                slot.failures += 1
                slot.due = slot.ordinary_runs + 8**slot.failures
                self.graph_refused = " ".join(str(error).split())

    def execute(self, driver: Driver, slot: Slot) -> None:
        """Puts one run into the stream."""
        if slot.graph is not None:
            driver.launch(slot.graph, self._stream)
            return
        self._enqueue(slot)
        slot.ordinary_runs += 1

    def free(self, driver: Driver) -> None:
        """Frees graphs, then contexts, then their memory, each of them also if one fails."""
        with contextlib.ExitStack() as last_first:
            if self._memory:
                last_first.callback(driver.free, self._memory)
            if self._spare is not None:
                last_first.callback(self._drop, driver, self._spare)
            for slot in self._slots.values():
                last_first.callback(self._drop, driver, slot)
            self._memory, self._spare = 0, None
            self._slots.clear()

    def _may_capture(self, driver: Driver) -> bool:
        return self._graphs and driver.can_capture

    def _deserves(self, driver: Driver, key: Key) -> bool:
        """If a shape without a context of its own is to get one now."""
        if not self._may_capture(driver) or not self._most:
            return False
        if len(self._slots) < self._most:
            return True
        if len(self._seen) >= _SEEN:
            self._seen.clear()
        self._seen[key] = self._seen.get(key, 0) + 1
        return self._seen[key] > EARNED

    def _own(self, driver: Driver) -> Slot | None:
        """A new context with all addresses, or None if there can be no further one: the spare one does."""
        try:
            slot = self._make(driver)
            for name, address in self._addresses.items():
                self._bind(slot, name, address)
        except (CudaError, TensorRTError) as error:
            self._most = len(self._slots)
            self.graph_refused = str(error)
            return None
        return slot

    def _make(self, driver: Driver) -> Slot:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self._plan.library.module
        log = self._plan.log
        context: trt.IExecutionContext = ask(
            self._plan.engine.create_execution_context,
            "no execution context could be made",
            "free device memory, or lower engine.concurrency",
            log,
            trt.ExecutionContextAllocationStrategy.USER_MANAGED,
        )
        if self._memory:
            context.set_device_memory(self._memory, int(self._plan.engine.device_memory_size_v2))
        if self._profiler is not None:
            context.profiler = self._profiler
        if context.active_optimization_profile != 0:  # a further context of an older TensorRT 10
            ask(
                context.set_optimization_profile_async,
                "a further context cannot have the optimisation profile",
                "set engine.concurrency = 1, or install a newer TensorRT",
                log,
                0,
                self._stream,
            )
            driver.synchronise(self._stream)
        return Slot(context)

    def _bind(self, slot: Slot, name: str, address: int) -> None:
        ask(
            slot.context.set_tensor_address,
            f"the address of '{name}' was refused",
            "build the plan again on this machine",
            self._plan.log,
            name,
            address,
        )

    def _shape(self, slot: Slot, shapes: Shapes) -> None:
        slot.shapes, slot.ordinary_runs, slot.due, slot.failures = {}, 0, 1, 0  # until they have been taken
        slot.reported.clear()
        for tensor in self._plan.inputs:
            if -1 in tensor.shape:
                self._shape_input(slot, tensor, shapes[tensor.name])
        missing = ask(
            slot.context.infer_shapes,
            f"the shapes that follow from {', '.join(f'{name} {list(s)}' for name, s in shapes.items())} "
            "cannot be computed",
            "send inputs of other sizes, or build the plan again with a wider --batch min:opt:max",
            self._plan.log,
        )
        if missing:
            names = ", ".join(f"'{name}'" for name in missing)
            raise TensorRTError(f"TensorRT misses the shape of {names}; build the plan again on this machine")
        slot.shapes = dict(shapes)

    def _shape_input(self, slot: Slot, tensor: Input, shape: tuple[int, ...]) -> None:
        ask(
            slot.context.set_input_shape,
            f"input '{tensor.name}' cannot have the shape {list(shape)}",
            "stay inside the optimisation profile (at most "
            f"{list(tensor.largest)}), or build with a wider one: --batch min:opt:max",
            self._plan.log,
            tensor.name,
            shape,
        )

    def _enqueue(self, slot: Slot) -> None:
        ask(
            slot.context.execute_async_v3,
            "TensorRT could not start the network",
            "see the server's log; a rebuilt plan rules out a damaged one",
            self._plan.log,
            self._stream,
        )

    @staticmethod
    def _drop(driver: Driver, slot: Slot) -> None:
        graph, slot.graph = slot.graph, None
        try:
            if graph is not None:
                driver.free_graph(graph)
        finally:
            slot.held = None
