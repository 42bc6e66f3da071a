"""On a CUDA device: a frame and its answer through device memory of another process.  Executed by nobody yet.

The client's side is this process, with the driver's own calls; the server is another one, because a process
cannot open its own handles.
"""

from __future__ import annotations

import ctypes
import signal

import numpy as np
import pytest

from runtime.engines.cuda import context
from runtime.repository.repository import Repository
from runtime.shared_memory import cuda as shared_memory_cuda
from tests.runtime import builders as b
from tests.runtime.scenarios.test_kill import Process
from tests.tensorrt.test_cuda_shm import PIXELS, Calls

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900, method="thread")]


@pytest.fixture(scope="module")
def library():
    try:
        context.probe()
    except context.CudaError as error:
        pytest.skip(str(error))
    return ctypes.CDLL("libcuda.so.1")


def test_a_request_goes_through_device_memory_both_ways(library, tmp_path):
    driver = shared_memory_cuda.Driver(library)
    driver._enter(0)
    frame, labels = b.blocks(np.random.default_rng(0))
    size = frame.nbytes + PIXELS
    address, handle = ctypes.c_uint64(), shared_memory_cuda.Handle()
    driver._ask("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
    driver._ask("cuIpcGetMemHandle", ctypes.byref(handle), address)
    driver.upload(0, address.value, np.ascontiguousarray(frame).reshape(-1))
    repository = Repository(tmp_path / "engines")
    b.publish(repository)
    server = Process(repository)
    call = Calls(server.target)
    try:
        raw = ctypes.string_at(ctypes.byref(handle), shared_memory_cuda.HANDLE)
        call("CudaSharedMemoryRegister", name="gpu", raw_handle=raw, byte_size=size)
        call.infer(
            {"region": "gpu", "size": frame.nbytes},
            {"region": "gpu", "size": PIXELS, "offset": frame.nbytes},
        )
        found = np.empty(PIXELS, np.uint8)
        driver.download(0, found, address.value + frame.nbytes)
        assert (found.reshape(b.SIZE) == labels).mean() > 0.95
        call("CudaSharedMemoryUnregister", name="gpu")
    finally:
        call.channel.close()
        assert server.end(signal.SIGTERM) == 0
    driver._ask("cuMemFree_v2", address)
