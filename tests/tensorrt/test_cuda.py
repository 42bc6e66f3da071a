"""The CUDA probe against small driver libraries of our own, and the CUDA thread's promises."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.engines.cuda import context, pycuda_driver
from runtime.engines.cuda.gate import GATE
from tests.tensorrt.fakes import Device, RuleBroken
from tests.waits import PATIENCE

DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return INIT; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetName(char *name, int length, int device)
{ strncpy(name, device == 40 ? "First" : "Second", length); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device)
{ *value = attribute == 75 ? 8 : device - 34; return 0; }
"""


def driver(folder: Path, *, init: int = 0, count: int = 2) -> str:
    """A shared library with the driver's entry points."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: it compiles the stand-in for the driver")
    library = folder / f"libcuda-{init}-{count}.so"
    command = ["gcc", "-shared", "-fPIC", f"-DINIT={init}", f"-DCOUNT={count}", "-xc", "-"]
    command += ["-o", str(library)]
    subprocess.run(command, input=DRIVER, text=True, check=True)
    return str(library)


def test_probe_lists_what_the_driver_has(tmp_path: Path) -> None:
    found = context.probe(driver(tmp_path))
    assert found.version == (13, 2)
    assert found.devices == (context.Device(0, "First", (8, 6)), context.Device(1, "Second", (8, 7)))


@pytest.mark.parametrize(
    ("init", "count", "says"),
    [(100, 2, "cuInit with error 100"), (0, 0, "lists no device")],
)
def test_probe_says_why_there_is_no_device(tmp_path: Path, init: int, count: int, says: str) -> None:
    with pytest.raises(context.CudaError, match=says):
        context.probe(driver(tmp_path, init=init, count=count))


def test_probe_without_a_driver_names_the_remedy() -> None:
    with pytest.raises(context.CudaError, match="install NVIDIA's driver"):
        context.probe("libcuda-that-nobody-has.so.1")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            "runtime.engines.cuda.context, runtime.engines.cuda.pycuda_driver, runtime.shared_memory.cuda, "
            "runtime.engines.tensorrt",
            "'pycuda', 'cuda'",
        ),
        ("export.tensorrt", "'pycuda'"),  # torch imports cuda-bindings by itself where they are installed
    ],
)
def test_nothing_of_cuda_or_tensorrt_is_imported_with_our_modules(ours: str, theirs: str) -> None:
    code = (
        f"import sys, {ours};"
        "print([m for m in sys.modules if m.split('.')[0] in "
        f"('tensorrt', 'tensorrt_bindings', 'tensorrt_rtx_bindings', {theirs})])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_calls_run_in_order_on_one_thread_with_the_context() -> None:
    device = Device()
    thread = context.CudaThread(device.driver())
    assert device.contexts == 1
    seen: list[int] = []
    idents = {thread.call(lambda _, i=i: (seen.append(i), threading.get_ident())[1]) for i in range(20)}
    assert seen == list(range(20))
    assert len(idents) == 1
    assert idents != {threading.get_ident()}
    thread.close()
    thread.close()
    assert device.clean()


def test_call_from_inside_a_call_does_not_deadlock() -> None:
    thread = context.CudaThread(Device().driver())
    assert thread.call(lambda _: thread.call(lambda _: 7)) == 7
    thread.close()


def test_errors_come_back_and_the_thread_goes_on() -> None:
    thread = context.CudaThread(Device().driver())

    def fail(_: context.Driver) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        thread.call(fail)
    assert thread.call(lambda _: 3) == 3
    thread.close()
    with pytest.raises(context.CudaError, match="closed"):
        thread.call(lambda _: 3)


def test_what_an_error_holds_dies_on_the_thread_that_made_it() -> None:
    """A traceback keeps local variables, and the thread that drops it last has no context."""
    died_on: list[int] = []

    class Refitter:
        def __del__(self) -> None:
            died_on.append(threading.get_ident())

    def fail(_: context.Driver) -> None:
        refitter = Refitter()
        try:
            raise KeyError(str(refitter))
        except KeyError as error:
            raise ValueError("no") from error

    thread = context.CudaThread(Device().driver())
    mine = thread.call(lambda _: threading.get_ident())
    try:
        thread.call(fail)
    except ValueError as error:
        caught = error
    thread.close()
    assert died_on == [mine]
    assert "in fail" in "".join(traceback.format_exception(caught))  # lines and names stay


def test_everything_on_the_thread_waits_for_a_capture() -> None:
    device = Device()
    thread = context.CudaThread(device.driver())
    done: list[str] = []

    def work(name: str) -> Callable[[], None]:
        return {
            "open": lambda: context.CudaThread(device.driver()).close(),
            "call": lambda: thread.call(lambda _: None),
            "run": lambda: thread.run(lambda _: None),
        }[name]

    waiting = []
    with GATE.capture() as alone:
        assert alone
        for name in ("open", "call", "run"):
            one = threading.Thread(target=lambda name=name: (work(name)(), done.append(name)))
            one.start()
            waiting.append(one)
        for one in waiting:
            one.join(0.05)
            assert one.is_alive()
        assert device.contexts == 1
    for one in waiting:
        one.join(PATIENCE)
    assert sorted(done) == ["call", "open", "run"]
    thread.close()
    assert device.clean()


def test_a_context_that_cannot_be_opened_is_told_to_who_asked() -> None:
    class Broken(type(Device().driver())):  # type: ignore[misc]
        def open(self, device: int) -> None:
            raise context.CudaError("no such device")

    with pytest.raises(context.CudaError, match="no such device"):
        context.CudaThread(Broken(Device()))


def test_the_fake_device_notices_use_from_another_thread() -> None:
    device = Device()
    made = device.driver()
    thread = context.CudaThread(made)
    address = thread.call(lambda d: d.allocate(100))
    with pytest.raises(RuleBroken, match="another thread"):
        made.free(address)
    thread.call(lambda d: d.free(address))
    with pytest.raises(RuleBroken, match="freed twice"):
        thread.call(lambda d: d.free(address))
    thread.close()


def test_the_graph_calls_exist_in_cuda_python() -> None:
    """The pycuda driver's names exist in the real cuda-bindings, which import without a driver."""
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    source = Path(pycuda_driver.__file__).read_text()
    names = set(re.findall(r"graphs\.(\w+)", source))
    assert {"cuStreamBeginCapture", "cuGraphLaunch", "CUstreamCaptureMode"} <= names
    assert [name for name in sorted(names) if not hasattr(driver, name)] == []
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL.value == 1
