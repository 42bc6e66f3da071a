"""`runtime.engines.cuda.context.Driver` by pycuda; CUDA graphs, which pycuda lacks, by cuda-python.

Imported only where a device was found.  Executed by nobody yet on a CUDA device: docs/tensorrt.md says what
was checked instead.

pycuda's `autoinit` and `autoprimaryctx` are not used: the first makes a context of its own, the second pushes
one on whichever thread imports it.  Here the primary context is retained and pushed on the thread that opens.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from runtime.engines.cuda.context import ALIGNMENT, CudaError
from runtime.tensors import Array

P = ParamSpec("P")
T = TypeVar("T")


def _told(
    method: Callable[Concatenate[PycudaDriver, P], T],
) -> Callable[Concatenate[PycudaDriver, P], T]:
    """pycuda raises classes of its own (out of memory, a lost device, …): all of them as `CudaError`."""

    @functools.wraps(method)
    def call(self: PycudaDriver, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if self._cuda is None or not isinstance(error, self._cuda.Error):
                raise
            raise CudaError(
                f"CUDA refuses {method.__name__}: {' '.join(str(error).split())}; "
                "if it is out of memory stop another process on the device, else see `nvidia-smi` and dmesg"
            ) from error

    return call


class PycudaDriver:
    """One per thread; see `runtime.engines.cuda.context.Driver` for what the methods promise."""

    def __init__(self) -> None:
        self._cuda: Any = None
        self._graphs: Any = None
        self._context: Any = None
        self._memory: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._pinned: dict[int, Array] = {}

    @property
    def can_capture(self) -> bool:
        return self._graphs is not None

    @_told
    def open(self, device: int) -> None:
        try:
            import pycuda.driver as cuda
        except ImportError as error:
            raise CudaError(
                f"pycuda cannot be imported ({error}): install the extra 'tensorrt' "
                "(pip install 'roadworthy[tensorrt]'); it is compiled from source and needs the CUDA toolkit"
            ) from None
        try:
            from cuda.bindings import driver as graphs
        except ImportError:
            graphs = None  # without cuda-python every run is enqueued, which is slower and as right
        self._cuda, self._graphs = cuda, graphs
        cuda.init()
        self._context = cuda.Device(device).retain_primary_context()
        self._context.push()

    @_told
    def close(self) -> None:
        if self._context is None:
            return
        context, self._context = self._context, None
        with contextlib.ExitStack() as last_first:  # each of them, also where the device is lost
            last_first.callback(context.pop)
            for array in list(self._pinned.values()):
                last_first.callback(self.free_pinned, array)
            for address in list(self._memory):
                last_first.callback(self.free, address)
            for stream in list(self._streams):
                last_first.callback(self.free_stream, stream)

    @_told
    def allocate(self, nbytes: int) -> int:
        allocation = self._cuda.mem_alloc(nbytes)
        address = int(allocation)
        if address % ALIGNMENT:
            allocation.free()
            raise CudaError(f"CUDA gave device memory at {address:#x}, not aligned to {ALIGNMENT} bytes")
        self._memory[address] = allocation
        return address

    @_told
    def free(self, address: int) -> None:
        self._memory.pop(address).free()

    @_told
    def pinned(self, nbytes: int) -> Array:
        flags = self._cuda.host_alloc_flags.PORTABLE
        array: Array = self._cuda.pagelocked_empty((nbytes,), np.uint8, mem_flags=flags)
        self._pinned[id(array)] = array
        return array

    @_told
    def free_pinned(self, array: Array) -> None:
        base: Any = self._pinned.pop(id(array)).base  # pycuda's PagelockedHostAllocation
        base.free()

    @_told
    def stream(self) -> int:
        # Flag 1 is CU_STREAM_NON_BLOCKING: no implicit order with the default stream, which others may use.
        stream = self._cuda.Stream(flags=1)
        handle = int(stream.handle)
        self._streams[handle] = stream
        return handle

    @_told
    def free_stream(self, stream: int) -> None:
        self._streams.pop(stream).synchronize()

    @_told
    def event(self) -> object:
        return self._cuda.Event()

    @_told
    def record(self, event: object, stream: int) -> None:
        made: Any = event
        made.record(self._streams[stream])

    @_told
    def elapsed(self, start: object, end: object) -> float:
        first: Any = start
        return float(first.time_till(end))

    @_told
    def upload(self, address: int, source: Array, stream: int) -> None:
        self._cuda.memcpy_htod_async(address, source, self._streams[stream])

    @_told
    def download(self, target: Array, address: int, stream: int) -> None:
        self._cuda.memcpy_dtoh_async(target, address, self._streams[stream])

    @_told
    def synchronise(self, stream: int) -> None:
        self._streams[stream].synchronize()

    @_told
    def capture(self, stream: int, work: Callable[[], None]) -> object:
        graphs = self._graphs
        if graphs is None:
            raise CudaError("CUDA graphs need cuda-python: pip install cuda-bindings")
        mode = graphs.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._checked("cuStreamBeginCapture", graphs.cuStreamBeginCapture(stream, mode))
        done = False
        try:
            work()
            done = True
        finally:
            # Also after a failure: a stream left in capture mode can do nothing else.
            (ended, *graph) = graphs.cuStreamEndCapture(stream)
            if not done and graph:
                graphs.cuGraphDestroy(graph[0])
        self._checked("cuStreamEndCapture", (ended, *graph))
        try:
            nodes = graphs.cuGraphGetNodes(graph[0])
            self._checked("cuGraphGetNodes", nodes)
            if not nodes[-1]:
                # A launch of it would do nothing, and the last outputs would be taken for answers.
                raise CudaError("the captured CUDA graph is empty: the work went to another stream or device")
            return self._checked("cuGraphInstantiate", graphs.cuGraphInstantiate(graph[0], 0))
        finally:
            graphs.cuGraphDestroy(graph[0])

    def launch(self, graph: object, stream: int) -> None:
        self._checked("cuGraphLaunch", self._graphs.cuGraphLaunch(graph, stream))

    def free_graph(self, graph: object) -> None:
        self._checked("cuGraphExecDestroy", self._graphs.cuGraphExecDestroy(graph))

    @_told
    def memory(self) -> tuple[int, int]:
        free, total = self._cuda.mem_get_info()
        return int(free), int(total)

    @staticmethod
    def _checked(function: str, answer: tuple[Any, ...]) -> Any:
        code, *rest = answer
        if int(code):
            raise CudaError(f"{function} failed with {getattr(code, 'name', code)}")
        return rest[0] if rest else None
