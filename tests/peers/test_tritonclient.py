"""NVIDIA's own client, unmodified, against our server: sync, asyncio, shared memory, streaming."""

from __future__ import annotations

import asyncio
import queue
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException, shared_memory

from bench.peers import calls
from bench.peers.process import Server
from tests.waits import PATIENCE

FRAME = calls.frames(1, seed=3)
SHAPE = [1, calls.HEIGHT, calls.WIDTH]
PIXELS = calls.HEIGHT * calls.WIDTH


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    """What ONNX Runtime itself answers to FRAME."""
    import onnxruntime

    session = onnxruntime.InferenceSession(calls.models()["seg"][1], providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(names, {"frame": FRAME}), strict=True))


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.target) as one:
        yield one


def frame_input(module: Any = triton, frame: np.ndarray = FRAME) -> Any:
    tensor = module.InferInput("frame", list(frame.shape), "UINT8")
    tensor.set_data_from_numpy(frame)
    return tensor


def test_liveness_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("seg")
    assert not client.is_model_ready("nope")
    metadata = client.get_model_metadata("seg", as_json=True)
    assert [one["name"] for one in metadata["outputs"]] == ["labels", "confidence", "probabilities"]
    assert client.get_server_metadata(as_json=True)["extensions"]


def test_infer(client: triton.InferenceServerClient, expected: dict[str, np.ndarray]) -> None:
    answer = client.infer("seg", [frame_input()], request_id="a7")
    assert answer.get_response().id == "a7"
    assert answer.get_response().model_version == "1"
    for name in ("labels", "confidence"):
        np.testing.assert_array_equal(answer.as_numpy(name), expected[name])


def test_requested_outputs(client: triton.InferenceServerClient, expected: dict[str, np.ndarray]) -> None:
    outputs = [triton.InferRequestedOutput(name) for name in ("probabilities", "labels")]
    answer = client.infer("seg", [frame_input()], outputs=outputs)
    assert answer.as_numpy("confidence") is None
    np.testing.assert_allclose(answer.as_numpy("probabilities"), expected["probabilities"], atol=1e-6)
    np.testing.assert_array_equal(answer.as_numpy("labels"), expected["labels"])


def test_classification(client: triton.InferenceServerClient, expected: dict[str, np.ndarray]) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", class_count=3)]
    best = client.infer("seg", [frame_input()], outputs=outputs).as_numpy("probabilities")
    flat = expected["probabilities"].ravel()
    scores = [one.decode().split(":") for one in best.ravel()]
    assert [int(one[1]) for one in scores] == list(np.argsort(-flat)[:3])
    np.testing.assert_allclose([float(one[0]) for one in scores], np.sort(flat)[::-1][:3], atol=1e-5)


def test_text_goes_both_ways(client: triton.InferenceServerClient) -> None:
    tensor = triton.InferInput("TEXT", [3], "BYTES")
    tensor.set_data_from_numpy(np.array([b"road", b"", "ü€".encode()], dtype=np.object_))
    answer = client.infer("text", [tensor]).as_numpy("SAME")
    assert answer.tolist() == [b"road", b"", "ü€".encode()]


def test_error_is_the_clients_exception(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="'nope' is not found") as caught:
        client.infer("nope", [frame_input()])
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_async_infer_with_callback(
    client: triton.InferenceServerClient, expected: dict[str, np.ndarray]
) -> None:
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    for _ in range(4):
        client.async_infer("seg", [frame_input()], callback=lambda result, error: done.put((result, error)))
    for _ in range(4):
        result, error = done.get(timeout=PATIENCE)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("labels"), expected["labels"])


def test_client_timeout_ends_the_call(client: triton.InferenceServerClient) -> None:
    many = frame_input(frame=calls.frames(4000))  # far more than a millisecond's work
    with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
        client.infer("seg", [many], client_timeout=1e-3)
    assert client.infer("seg", [frame_input()]).as_numpy("labels") is not None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression(
    client: triton.InferenceServerClient, expected: dict[str, np.ndarray], algorithm: str
) -> None:
    answer = client.infer("seg", [frame_input()], compression_algorithm=algorithm)
    np.testing.assert_array_equal(answer.as_numpy("labels"), expected["labels"])


def test_keepalive_options_are_borne(server: Server) -> None:
    options = triton.KeepAliveOptions(keepalive_time_ms=1000, keepalive_permit_without_calls=True)
    with triton.InferenceServerClient(server.target, keepalive_options=options) as client:
        assert client.infer("seg", [frame_input()]).as_numpy("labels").shape == tuple(SHAPE)


def test_asyncio(server: Server, expected: dict[str, np.ndarray]) -> None:
    async def run() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(server.target) as client:
            assert await client.is_server_ready()
            answers = await asyncio.gather(
                *(client.infer("seg", [frame_input(triton_aio)]) for _ in range(4))
            )
            with pytest.raises(InferenceServerException, match="is not found"):
                await client.infer("nope", [frame_input(triton_aio)])
            return [answer.as_numpy("labels") for answer in answers]

    for labels in asyncio.run(run()):
        np.testing.assert_array_equal(labels, expected["labels"])


def test_streaming(client: triton.InferenceServerClient, expected: dict[str, np.ndarray]) -> None:
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(callback=lambda result, error: done.put((result, error)))
    for i in range(3):
        client.async_stream_infer("seg" if i != 1 else "nope", [frame_input()], request_id=str(i))
    answers = [done.get(timeout=PATIENCE) for _ in range(3)]
    client.stop_stream()
    good = [result for result, error in answers if error is None]
    bad = [error for _, error in answers if error is not None]
    assert sorted(one.get_response().id for one in good) == ["0", "2"]
    assert len(bad) == 1
    assert "'nope' is not found" in str(bad[0])
    for one in good:
        np.testing.assert_array_equal(one.as_numpy("labels"), expected["labels"])


def test_asyncio_streaming(server: Server, expected: dict[str, np.ndarray]) -> None:
    async def run() -> list[np.ndarray]:
        async def requests() -> Any:
            for i in range(3):
                yield {"model_name": "seg", "inputs": [frame_input(triton_aio)], "request_id": str(i)}

        labels = []
        async with triton_aio.InferenceServerClient(server.target) as client:
            async for result, error in client.stream_infer(requests()):
                assert error is None
                labels.append(result.as_numpy("labels"))
        return labels

    answers = asyncio.run(run())
    assert len(answers) == 3
    for labels in answers:
        np.testing.assert_array_equal(labels, expected["labels"])


def test_shared_memory_both_ways(
    client: triton.InferenceServerClient, expected: dict[str, np.ndarray]
) -> None:
    mark = uuid.uuid4().hex[:12]
    names = [f"in_{mark}", f"out_{mark}"]
    regions = [
        shared_memory.create_shared_memory_region(name, f"/rw_{name}", size)
        for name, size in zip(names, (FRAME.nbytes, 2 * PIXELS), strict=True)
    ]
    try:
        for name, size in zip(names, (FRAME.nbytes, 2 * PIXELS), strict=True):
            client.register_system_shared_memory(name, f"/rw_{name}", size)
        assert set(names) <= set(client.get_system_shared_memory_status(as_json=True)["regions"])
        shared_memory.set_shared_memory_region(regions[0], [FRAME])
        tensor = triton.InferInput("frame", list(FRAME.shape), "UINT8")
        tensor.set_shared_memory(names[0], FRAME.nbytes)
        outputs = [triton.InferRequestedOutput(name) for name in ("labels", "confidence")]
        for i, output in enumerate(outputs):
            output.set_shared_memory(names[1], PIXELS, offset=i * PIXELS)
        answer = client.infer("seg", [tensor], outputs=outputs)
        assert b"".join(answer.get_response().raw_output_contents) == b""
        for i, name in enumerate(("labels", "confidence")):
            got = shared_memory.get_contents_as_numpy(regions[1], np.uint8, SHAPE, offset=i * PIXELS)
            np.testing.assert_array_equal(got, expected[name])
    finally:
        for name, region in zip(names, regions, strict=True):
            client.unregister_system_shared_memory(name)
            shared_memory.destroy_shared_memory_region(region)
    assert not set(names) & set(client.get_system_shared_memory_status(as_json=True).get("regions", {}))


def test_statistics_and_configuration(client: triton.InferenceServerClient) -> None:
    client.infer("seg", [frame_input()])
    statistics = client.get_inference_statistics("seg", as_json=True)["model_stats"][0]
    stages = statistics["inference_stats"]
    counts = {stages[name]["count"] for name in ("queue", "compute_input", "compute_infer", "compute_output")}
    assert len(counts) == 1, "perf_analyzer refuses counts that differ"
    config = client.get_model_config("seg", as_json=True)["config"]
    assert config["name"] == "seg"
    assert config["input"][0]["name"] == "frame"


def test_repository_index(client: triton.InferenceServerClient) -> None:
    index = client.get_model_repository_index(as_json=True)["models"]
    assert {"seg", "text"} <= {one["name"] for one in index}
    assert {one["state"] for one in index if one["name"] == "seg"} == {"READY"}
