"""CUDA shared memory through the whole server, over a driver of fakes."""

from __future__ import annotations

import threading
from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from runtime.config import EngineConfig, ServerConfig
from runtime.engines.cuda.gate import GATE
from runtime.repository.repository import Repository
from runtime.server import Server
from runtime.shared_memory import cuda
from runtime.shared_memory.system import ShmRef
from tests.runtime import builders as b
from tests.tensorrt.fake_ipc import Ipc
from tests.waits import PATIENCE

PIXELS = b.SIZE[0] * b.SIZE[1]
HUGE = [(1 << 64) - 1, 1 << 63, (1 << 63) - 1]


class Calls:
    """The inference service by the names of its calls."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.insecure_channel(target)

    def __call__(self, rpc: str, /, **fields: Any) -> Any:
        call = self.channel.unary_unary(
            f"/inference.GRPCInferenceService/{rpc}",
            request_serializer=getattr(pb, f"{rpc}Request").SerializeToString,
            response_deserializer=getattr(pb, f"{rpc}Response").FromString,
        )
        return call(getattr(pb, f"{rpc}Request")(**fields), timeout=PATIENCE)

    def refused(self, rpc: str, /, **fields: Any) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as error:
            self(rpc, **fields)
        return error.value.code().name, error.value.details()

    def infer(self, frame: dict[str, Any], labels: dict[str, Any]) -> Any:
        request = pb.ModelInferRequest(model_name="road")
        one = request.inputs.add(name="frame", datatype="UINT8", shape=[1, *b.SIZE, 3])
        out = request.outputs.add(name="labels")
        for tensor, place in ((one, frame), (out, labels)):
            tensor.parameters["shared_memory_region"].string_param = place["region"]
            tensor.parameters["shared_memory_byte_size"].int64_param = place["size"]
            tensor.parameters["shared_memory_offset"].int64_param = place.get("offset", 0)
        call = self.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        return pb.ModelInferResponse.FromString(call(request.SerializeToString(), timeout=PATIENCE))


@pytest.fixture
def server(tmp_path):
    repository = Repository(tmp_path / "engines")
    b.publish(repository)
    config = ServerConfig(
        repository=str(repository.path), port=0, metrics_port=-1, engine=EngineConfig(threads=1)
    )
    with Server(config) as running:
        yield running


@pytest.fixture
def call(server):
    calls = Calls(server.target)
    yield calls
    calls.channel.close()


@pytest.fixture
def device(monkeypatch):
    ipc = Ipc(devices=2)
    monkeypatch.setattr(cuda, "_driver", cuda.Driver(ipc))
    return ipc


def test_without_a_device_it_says_what_triton_says(call, monkeypatch):
    def absent() -> None:
        raise cuda.CudaError("no CUDA driver")

    monkeypatch.setattr(cuda, "_driver", None)
    monkeypatch.setattr(cuda, "probe", absent)
    said = call.refused("CudaSharedMemoryRegister", name="g", raw_handle=bytes(64), byte_size=64)
    assert said == ("INVALID_ARGUMENT", "failed to register shared memory region: invalid args")
    assert not call("CudaSharedMemoryStatus").regions


def test_a_request_goes_through_device_memory_both_ways(call, server, device):
    frame, labels = b.blocks(np.random.default_rng(0))
    size = frame.nbytes + PIXELS + 10
    handle = device.allocate(b"\x11" * 10 + frame.tobytes() + b"\x77" * PIXELS)
    call("CudaSharedMemoryRegister", name="gpu", raw_handle=handle, device_id=1, byte_size=size)
    assert device.retained == [1]
    (region,) = call("CudaSharedMemoryStatus", name="gpu").regions.values()
    assert (region.name, region.device_id, region.byte_size) == ("gpu", 1, size)
    for _ in range(3):  # on whichever of gRPC's threads
        answer = call.infer(
            {"region": "gpu", "size": frame.nbytes, "offset": 10},
            {"region": "gpu", "size": PIXELS, "offset": 10 + frame.nbytes},
        )
        assert answer.raw_output_contents == [b""]
        content = device.content(handle)
        found = np.frombuffer(content[10 + frame.nbytes :], np.uint8).reshape(b.SIZE)
        assert (found == labels).mean() > 0.95
        assert content[: 10 + frame.nbytes] == b"\x11" * 10 + frame.tobytes()
    call("CudaSharedMemoryUnregister", name="gpu")
    assert not device.open
    with pytest.raises(grpc.RpcError, match="Unable to find shared memory region: 'gpu'"):
        call.infer({"region": "gpu", "size": frame.nbytes}, {"region": "gpu", "size": PIXELS})


@pytest.mark.parametrize("offset", [1, 8, *HUGE[2:], -1, -(1 << 63)])
def test_no_place_leaves_the_region(call, device, offset):
    size = PIXELS * 3
    call("CudaSharedMemoryRegister", name="gpu", raw_handle=device.allocate(bytes(size)), byte_size=size)
    with pytest.raises(grpc.RpcError, match="Invalid offset") as refusal:
        call.infer({"region": "gpu", "size": size, "offset": offset}, {"region": "gpu", "size": PIXELS})
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_what_cannot_be_registered(call, server, device):
    handle = device.allocate(bytes(64))
    for wrong in (
        {"raw_handle": b"", "byte_size": 64},
        {"raw_handle": bytes(64), "byte_size": 64},
        {"raw_handle": handle[:63], "byte_size": 64},
        {"raw_handle": handle * 1000, "byte_size": 64},
        {"raw_handle": handle, "byte_size": 0},
        {"raw_handle": handle, "byte_size": 65},
        *({"raw_handle": handle, "byte_size": size} for size in HUGE),
        {"raw_handle": handle, "byte_size": 64, "device_id": 2},
        {"raw_handle": handle, "byte_size": 64, "device_id": -1},
        {"raw_handle": handle, "byte_size": 64, "device_id": 1 << 40},
    ):
        assert call.refused("CudaSharedMemoryRegister", name="gpu", **wrong)[0] == "INVALID_ARGUMENT"
        assert not device.open  # nothing half-open is left
    call("CudaSharedMemoryRegister", name="gpu", raw_handle=handle, byte_size=64)
    again = call.refused("CudaSharedMemoryRegister", name="gpu", raw_handle=handle, byte_size=64)
    assert again == ("ALREADY_EXISTS", "shared memory region 'gpu' already in manager")


def test_a_handle_of_the_servers_own_process_is_refused_and_the_reason_is_told(call, device):
    """CUDA opens a handle in another process only; in the one that made it the code is INVALID_CONTEXT."""
    handle = device.allocate(bytes(64), own=True)
    status, said = call.refused("CudaSharedMemoryRegister", name="gpu", raw_handle=handle, byte_size=64)
    assert status == "INVALID_ARGUMENT"
    assert said.startswith("failed to register shared memory region: invalid args: ")
    assert "the server's own process" in said
    assert "a process of its own" in said
    assert "\n" not in said
    assert not device.open
    assert not call("CudaSharedMemoryStatus").regions


def test_one_handle_under_two_names_stays_open_until_both_are_gone(call, device):
    handle = device.allocate(bytes(64))
    for name in ("one", "two"):
        call("CudaSharedMemoryRegister", name=name, raw_handle=handle, byte_size=64)
    call("CudaSharedMemoryUnregister", name="one")
    assert device.open
    call("CudaSharedMemoryUnregister", name="two")
    assert not device.open


def test_device_memory_waits_while_a_graph_is_captured(device):
    """No call of the driver reaches the device while a thread captures."""
    memory = cuda.Driver(device)
    handle = device.allocate(bytes(64))
    for _ in range(2):  # the threads come in any order: it stays open when one of them closes it
        address, _ = memory.open(0, handle)
    buffer = np.zeros(64, np.uint8)
    done: list[str] = []
    work = {
        "open": lambda: memory.open(0, handle),
        "close": lambda: memory.close(0, address),
        "download": lambda: memory.download(0, buffer, address),
        "upload": lambda: memory.upload(0, address, buffer),
    }
    with GATE.capture() as alone:
        assert alone
        for name, one in work.items():
            thread = threading.Thread(target=lambda name=name, one=one: (one(), done.append(name)))
            thread.start()
            thread.join(0.05)
            assert thread.is_alive()
            work[name] = thread
        assert not done
    for thread in work.values():
        thread.join(PATIENCE)
    assert sorted(done) == sorted(work)


def test_the_two_kinds_share_names_and_nothing_else(call, device):
    call("CudaSharedMemoryRegister", name="gpu", raw_handle=device.allocate(bytes(64)), byte_size=64)
    taken = call.refused("SystemSharedMemoryRegister", name="gpu", key="/x", byte_size=64)
    assert taken[0] == "ALREADY_EXISTS"
    assert not call("SystemSharedMemoryStatus").regions
    missing = call.refused("SystemSharedMemoryStatus", name="gpu")
    assert missing == ("NOT_FOUND", "Unable to find system shared memory region: 'gpu'")
    call("SystemSharedMemoryUnregister")
    call("SystemSharedMemoryUnregister", name="gpu")
    assert call("CudaSharedMemoryStatus").regions
    call("CudaSharedMemoryUnregister")
    assert not call("CudaSharedMemoryStatus").regions
    assert not device.open


def test_a_device_that_is_lost_fails_requests_and_not_the_server(call, server, device):
    frame, _ = b.blocks(np.random.default_rng(0))
    handle = device.allocate(frame.tobytes())
    call("CudaSharedMemoryRegister", name="gpu", raw_handle=handle, byte_size=frame.nbytes)
    device.gone = True
    with pytest.raises(grpc.RpcError, match="register it again") as lost:
        call.infer({"region": "gpu", "size": frame.nbytes}, {"region": "gpu", "size": PIXELS})
    assert lost.value.code() is grpc.StatusCode.INTERNAL
    device.gone = False
    call.infer({"region": "gpu", "size": frame.nbytes}, {"region": "gpu", "size": PIXELS})


def test_a_region_that_is_unregistered_while_it_is_used_stays_until_then(server, call, device):
    call("CudaSharedMemoryRegister", name="gpu", raw_handle=device.allocate(bytes(64)), byte_size=64)
    region = server.service.regions.hold(ShmRef("gpu", 0, 64))
    call("CudaSharedMemoryUnregister", name="gpu")
    assert device.open
    assert region.read(ShmRef("gpu", 0, 64)).nbytes == 64
    region.release()
    assert not device.open
