"""The device's primary context, owned by one thread, behind one small interface.

Knows CUDA's rules and no library: `Driver` is what a library must offer
(runtime/engines/cuda/pycuda_driver.py has the one for pycuda), `CudaThread` makes sure that everything a
driver gives is made, used and freed on one thread with the *primary* context current.  That is the context
which TensorRT and torch use; a context of one's own makes their pointers and streams invalid, and a pycuda
object that dies on another thread leaks.

`probe` asks the driver itself, through ctypes, whether there is a device.  It must come before TensorRT is
imported or touched: without a usable driver `tensorrt.Runtime(logger)` gives an object that looks alive, and
the next call ends the process.  Nothing of CUDA is imported when this module is.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from runtime.engines.cuda.gate import GATE
from runtime.tensors import Array

T = TypeVar("T")

ALIGNMENT = 256  # bytes; what TensorRT asks of every tensor address and of device memory given to a context
_COMPUTE_MAJOR, _COMPUTE_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class CudaError(RuntimeError):
    """CUDA is absent or refused something; one line that says what to do."""


@dataclass(frozen=True)
class Device:
    """One CUDA device as the driver names it."""

    index: int
    name: str
    capability: tuple[int, int]


@dataclass(frozen=True)
class Probe:
    """What the driver answered: the CUDA version it supports and its devices."""

    version: tuple[int, int]
    devices: tuple[Device, ...]


def probe(library: str = "libcuda.so.1") -> Probe:
    """Initialises the driver and lists its devices, without creating a context.

    Raises CudaError: no driver library, `cuInit` refused, or no device.
    """
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        raise CudaError(
            f"no CUDA driver ({library} cannot be loaded): install NVIDIA's driver, or use the engine kind "
            "'onnxruntime', which runs on the CPU"
        ) from None

    def ask(function: str, *arguments: Any) -> None:
        code = getattr(cuda, function)(*arguments)
        if code:
            raise CudaError(
                f"the CUDA driver refuses {function} with error {code}: check `nvidia-smi`; "
                "in a container, that the device is passed through"
            )

    ask("cuInit", ctypes.c_uint(0))
    version, count = ctypes.c_int(), ctypes.c_int()
    ask("cuDriverGetVersion", ctypes.byref(version))
    ask("cuDeviceGetCount", ctypes.byref(count))
    if count.value < 1:
        raise CudaError("the CUDA driver lists no device: check `nvidia-smi` and CUDA_VISIBLE_DEVICES")
    devices = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        ask("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
        ask("cuDeviceGetName", name, ctypes.c_int(len(name)), device)
        ask("cuDeviceGetAttribute", ctypes.byref(major), ctypes.c_int(_COMPUTE_MAJOR), device)
        ask("cuDeviceGetAttribute", ctypes.byref(minor), ctypes.c_int(_COMPUTE_MINOR), device)
        devices.append(Device(index, name.value.decode(errors="replace"), (major.value, minor.value)))
    return Probe((version.value // 1000, version.value % 1000 // 10), tuple(devices))


class Driver(Protocol):
    """What is needed of a CUDA library.  Every method is called on the one thread that called `open`.

    Addresses and stream handles are plain integers, as TensorRT takes them; events and graphs are opaque.
    """

    @property
    def can_capture(self) -> bool:
        """True when `capture` works: a library that can record CUDA graphs is installed."""
        ...

    def open(self, device: int) -> None:
        """Retains the device's primary context and makes it current on this thread."""
        ...

    def close(self) -> None:
        """Frees what is left, and gives the context back."""
        ...

    def allocate(self, nbytes: int) -> int:
        """Device memory, aligned to `ALIGNMENT`."""
        ...

    def free(self, address: int) -> None: ...

    def pinned(self, nbytes: int) -> Array:
        """Page-locked host memory as uint8 [nbytes]."""
        ...

    def free_pinned(self, array: Array) -> None: ...

    def stream(self) -> int:
        """A new non-default stream: its handle."""
        ...

    def free_stream(self, stream: int) -> None: ...

    def event(self) -> object: ...

    def record(self, event: object, stream: int) -> None: ...

    def elapsed(self, start: object, end: object) -> float:
        """Milliseconds between two recorded, finished events."""
        ...

    def upload(self, address: int, source: Array, stream: int) -> None:
        """Copies C-contiguous host memory to the device; returns before it is done."""
        ...

    def download(self, target: Array, address: int, stream: int) -> None: ...

    def synchronise(self, stream: int) -> None:
        """Waits (without holding the interpreter) until everything in the stream is done."""
        ...

    def capture(self, stream: int, work: Callable[[], None]) -> object:
        """Runs `work` with the stream in capture mode: nothing executes, the graph is answered."""
        ...

    def launch(self, graph: object, stream: int) -> None: ...

    def free_graph(self, graph: object) -> None: ...

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes of the device."""
        ...


class CudaThread:
    """A thread with the primary context of one device current, which runs what it is given, in order.

    One per lane: while it waits for its stream, other lanes go on.  The context is the same for all of them.
    All of its work goes through the gate (runtime/engines/cuda/gate.py): `run` is for the work of one
    request, `call` for everything else.
    """

    def __init__(self, driver: Driver, device: int = 0, name: str = "cuda") -> None:
        self._driver = driver
        self._tasks: queue.SimpleQueue[tuple[Callable[[Driver], Any], Future[Any], bool] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()
        self._closed = False
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(device, opened), name=name, daemon=True)
        self._thread.start()
        opened.result()

    def call(self, function: Callable[[Driver], T]) -> T:
        """Runs `function(driver)` on the thread and returns what it returns; raises what it raises."""
        return self._do(function, short=False)

    def run(self, function: Callable[[Driver], T]) -> T:
        """Does the same for short work, whose end a capture waits for."""
        return self._do(function, short=True)

    def _do(self, function: Callable[[Driver], T], *, short: bool) -> T:
        if threading.current_thread() is self._thread:
            return function(self._driver)
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise CudaError("the CUDA thread is closed: its engine was closed while it was still used")
            self._tasks.put((function, future, short))
        try:
            return future.result()
        finally:
            # An error holds this frame, and the frame would hold the future and with it the error: a cycle
            # that lives until the garbage collector comes.
            del future

    def close(self) -> None:
        """Runs what is still queued, gives the context back, ends the thread.  Calling it twice is fine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tasks.put(None)
        self._thread.join()

    def _run(self, device: int, opened: Future[None]) -> None:
        try:
            with GATE.change():
                self._driver.open(device)
        except BaseException as error:
            self._closed = True
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            while (task := self._tasks.get()) is not None:
                function, future, short = task
                try:
                    with GATE.run() if short else GATE.change():
                        try:
                            answer = function(self._driver)
                        except BaseException as error:
                            _forget_frames(error)
                            raise
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(answer)
                # A frame that waits for the next task would keep what the last one made alive, and
                # TensorRT's objects must die here, not whenever the next request comes.
                del task, function, future
                answer = None
        finally:
            # A device that is lost takes nothing back; whoever used it has been told.
            with contextlib.suppress(CudaError), GATE.change():
                self._driver.close()


def _forget_frames(error: BaseException | None) -> None:
    """Drops the local variables that an error's traceback holds.

    They are objects of TensorRT, a refitter for one.  Such an object must die on this thread and inside the
    gate, not on the thread of whoever drops the error last.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
