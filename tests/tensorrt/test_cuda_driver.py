"""The pycuda driver on stand-ins for pycuda and cuda-python that record the order of calls.

Names and arguments are those of pycuda 2026.1 (src/wrapper/wrap_cudadrv.cpp) and cuda-bindings 13.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.engines.cuda.context import CudaError, CudaThread
from runtime.engines.cuda.pycuda_driver import PycudaDriver


class Code(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class Calls(list[str]):
    """What was called; `fails` makes a cuda-python call answer an error; `base` is the first address."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = ""
        self.base = 0x1000
        self.nodes = 1  # of a captured graph

    def note(self, name: str, answer: Any = None) -> Any:
        self.append(name)
        return answer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()

    class Allocation:
        def __init__(self, nbytes: int) -> None:
            calls.note("alloc")
            self.address = calls.base
            calls.base += 0x1000

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            calls.note("free")

    class Stream:
        def __init__(self, flags: int = 0) -> None:
            assert flags == 1, "a stream that waits for the default stream"
            self.handle = 77

        def synchronize(self) -> None:
            calls.note("sync")

    context = SimpleNamespace(push=lambda: calls.note("push"), pop=lambda: calls.note("pop"))
    device = SimpleNamespace(retain_primary_context=lambda: calls.note("retain", context))

    def pagelocked_empty(shape: tuple[int, ...], dtype: Any, order: str = "C", mem_flags: int = 0) -> Any:
        calls.note("pinned")

        class Pinned(np.ndarray):
            base = SimpleNamespace(free=lambda: calls.note("unpin"))  # type: ignore[assignment]

        return np.zeros(shape, dtype).view(Pinned)

    driver: Any = ModuleType("pycuda.driver")
    driver.Error = type("Error", (Exception,), {})
    driver.init = lambda: calls.note("init")
    driver.Device = lambda index: device
    driver.mem_alloc = Allocation
    driver.Stream = Stream
    driver.host_alloc_flags = SimpleNamespace(PORTABLE=1)
    driver.pagelocked_empty = pagelocked_empty
    driver.memcpy_htod_async = lambda dest, src, stream: calls.note(f"up {dest:#x} {stream.handle}")
    driver.memcpy_dtoh_async = lambda dest, src, stream: calls.note(f"down {src:#x} {stream.handle}")
    driver.mem_get_info = lambda: (1, 2)
    package: Any = ModuleType("pycuda")
    package.driver = driver
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)

    def call(name: str, *answer: Any) -> Any:
        def made(*arguments: Any) -> tuple[Any, ...]:
            failed = Code.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            return (failed if calls.note(name, calls.fails) == name else Code.CUDA_SUCCESS, *answer)

        return made

    graphs: Any = ModuleType("cuda.bindings.driver")
    graphs.CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    graphs.cuStreamBeginCapture = call("begin")
    graphs.cuStreamEndCapture = call("end", "graph")
    graphs.cuGraphGetNodes = lambda graph: call("nodes", [], calls.nodes)()
    graphs.cuGraphInstantiate = call("instantiate", "executable")
    graphs.cuGraphDestroy = call("destroy")
    graphs.cuGraphLaunch = call("launch")
    graphs.cuGraphExecDestroy = call("destroy executable")
    bindings: Any = ModuleType("cuda.bindings")
    bindings.driver = graphs
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", graphs)
    return calls


def test_the_primary_context_is_retained_pushed_and_popped(calls: Calls) -> None:
    thread = CudaThread(PycudaDriver())
    assert thread.call(lambda driver: driver.memory()) == (1, 2)
    thread.close()
    assert calls == ["init", "retain", "push", "pop"]


def test_what_is_left_is_freed_before_the_context_goes(calls: Calls) -> None:
    driver = PycudaDriver()
    driver.open(0)
    stream, address = driver.stream(), driver.allocate(100)
    array = driver.pinned(100)
    driver.upload(address, array, stream)
    driver.download(array, address, stream)
    driver.close()
    driver.close()
    assert calls[3:] == ["alloc", "pinned", "up 0x1000 77", "down 0x1000 77", "sync", "free", "unpin", "pop"]


def test_misaligned_memory_is_refused_and_freed(calls: Calls) -> None:
    calls.base = 0x1010
    driver = PycudaDriver()
    driver.open(0)
    with pytest.raises(CudaError, match="not aligned to 256"):
        driver.allocate(100)
    assert calls[-1] == "free"


def test_a_graph_is_captured_and_launched(calls: Calls) -> None:
    driver = PycudaDriver()
    driver.open(0)
    assert driver.can_capture
    graph = driver.capture(driver.stream(), lambda: calls.note("work"))
    driver.launch(graph, 77)
    driver.free_graph(graph)
    assert graph == "executable"
    tail = ["begin", "work", "end", "nodes", "instantiate", "destroy", "launch", "destroy executable"]
    assert calls[3:] == tail


def test_an_empty_graph_is_refused_because_its_launch_would_leave_the_last_answers(calls: Calls) -> None:
    driver = PycudaDriver()
    driver.open(0)
    calls.nodes = 0
    with pytest.raises(CudaError, match="graph is empty: the work went to another stream or device"):
        driver.capture(driver.stream(), lambda: None)
    assert calls[3:] == ["begin", "end", "nodes", "destroy"]


@pytest.mark.parametrize("step", ["begin", "end", "nodes", "instantiate"])
def test_a_capture_that_fails_is_told(calls: Calls, step: str) -> None:
    driver = PycudaDriver()
    driver.open(0)
    calls.fails = step
    with pytest.raises(CudaError, match="CAPTURE_UNSUPPORTED"):
        driver.capture(driver.stream(), lambda: None)


def test_capture_mode_is_left_when_the_work_fails(calls: Calls) -> None:
    driver = PycudaDriver()
    driver.open(0)

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        driver.capture(driver.stream(), fail)
    assert calls[-1] == "destroy"


def test_what_pycuda_raises_is_told_in_our_words(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    import pycuda.driver as cuda

    def full(nbytes: int) -> None:
        raise cuda.Error("cuMemAlloc failed:\nout of memory")

    driver = PycudaDriver()
    driver.open(0)
    monkeypatch.setattr(cuda, "mem_alloc", full)
    with pytest.raises(CudaError, match=r"CUDA refuses allocate: cuMemAlloc failed: out of memory; .*smi"):
        driver.allocate(100)


def test_a_lost_device_still_gives_its_context_back(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    import pycuda.driver as cuda

    def lost(self: Any) -> None:
        raise cuda.Error("cuStreamSynchronize failed: an illegal memory access was encountered")

    thread = CudaThread(PycudaDriver())
    thread.call(lambda driver: (driver.stream(), driver.allocate(100), driver.pinned(100)))
    monkeypatch.setattr(cuda.Stream, "synchronize", lost)
    thread.close()
    assert calls[-3:] == ["free", "unpin", "pop"]


def test_without_pycuda_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(CudaError, match=r"pycuda cannot be imported.*roadworthy\[tensorrt\]"):
        CudaThread(PycudaDriver())
