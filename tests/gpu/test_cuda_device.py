"""On a CUDA device: the parts of bench.gpu, with what they must show.  Executed by nobody yet.

python -m pytest tests/gpu -m gpu
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench import gpu
from runtime.engines.cuda import context

# Thread: a signal does not reach who waits inside a driver.
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(2400, method="thread")]


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    try:
        context.probe()
    except context.CudaError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=gpu.DEFAULT)
def case(request: pytest.FixtureRequest) -> str:
    """A segmentation, an edge and a joint network."""
    return str(request.param)


def agrees(found: dict[str, float], least: float) -> bool:
    """Labels where there are any, and edges as bytes: weights are random, and bits near a half may flip."""
    return found.get("labels", 1.0) > least and found.get("edges_mean", 0.0) < 2.0


def part(name: str, case: str) -> dict[str, Any]:
    """In a process of its own: one that crashes or hangs fails its test and not the others."""
    found = gpu.alone(case, name, (128, 256), "cuda", 20)
    if "absent" in found:
        pytest.skip(found["absent"])
    assert "error" not in found, found["error"]
    return found


def test_torch_agrees_with_the_cpu(case: str) -> None:
    found = part("torch", case)
    assert agrees(found["fp32"]["agreement"], 0.995)
    assert agrees(found["fp16"]["agreement"], 0.97)


def test_onnxruntime_runs_on_the_device_and_agrees(case: str) -> None:
    assert agrees(part("onnxruntime", case)["fp32"]["agreement"], 0.995)


def test_pycuda_driver_keeps_its_promises() -> None:
    """Alignment, copies in stream order, a captured copy, everything given back."""
    pytest.importorskip("pycuda.driver")
    from runtime.engines.cuda.pycuda_driver import PycudaDriver

    thread = context.CudaThread(PycudaDriver())
    before = thread.call(lambda driver: driver.memory()[0])

    def work(driver: context.Driver) -> np.ndarray:
        stream, address = driver.stream(), driver.allocate(1 << 20)
        assert address % context.ALIGNMENT == 0
        source, target = driver.pinned(1 << 20), driver.pinned(1 << 20)
        source[:] = np.arange(1 << 20, dtype=np.uint32).astype(np.uint8)
        driver.upload(address, source, stream)
        if driver.can_capture:
            driver.synchronise(stream)
            graph = driver.capture(stream, lambda: driver.download(target, address, stream))
            assert not target.any()  # captured, not executed
            driver.launch(graph, stream)
            driver.synchronise(stream)
            driver.free_graph(graph)
        else:
            driver.download(target, address, stream)
            driver.synchronise(stream)
        answer = target.copy()
        driver.free(address)
        driver.free_pinned(source)
        driver.free_pinned(target)
        driver.free_stream(stream)
        return answer

    answer = thread.call(work)
    np.testing.assert_array_equal(answer, np.arange(1 << 20, dtype=np.uint32).astype(np.uint8))
    after = thread.call(lambda driver: driver.memory()[0])
    thread.close()
    assert after >= before - (8 << 20)


def test_tensorrt_agrees_with_the_cpu(case: str) -> None:
    pytest.importorskip("tensorrt")
    found = part("tensorrt", case)
    for precision, least in (("fp32", 0.995), ("fp16", 0.97)):
        for way in ("enqueued", "cuda_graph"):
            result = found[precision][way]
            assert agrees(result["agreement"], least), (precision, way)
            assert result["same_from_four_threads"], (precision, way)
    assert found["fp32"]["cuda_graph"]["graph_refused"] == ""


def test_tensorrt_refit_is_a_standby_engine(case: str) -> None:
    pytest.importorskip("tensorrt")
    found = part("tensorrt-refit", case)
    assert agrees(found["agreement_of_refittable_plan"], 0.995)
    assert found["changed"] > 0.01
    assert found["live_engine_untouched"]
    assert found["back_to_first"]
    assert found["refit_to_warm_seconds"] < found["build_seconds"]
