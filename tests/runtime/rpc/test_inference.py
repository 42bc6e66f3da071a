"""An unmodified tritonclient gets answers, metadata and Triton's own words from the server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading

import numpy as np
import pytest

grpcclient = pytest.importorskip("tritonclient.grpc")
from tritonclient.utils import InferenceServerException, np_to_triton_dtype  # noqa: E402

from bench import onnx_models  # noqa: E402
from runtime.config import QueueConfig  # noqa: E402
from runtime.errors import Code, ServiceError  # noqa: E402
from runtime.serving import request  # noqa: E402
from runtime.tensors import TensorSpec  # noqa: E402
from tests.runtime import builders as b  # noqa: E402
from tests.waits import PATIENCE, until  # noqa: E402


@pytest.fixture
def server(repository, quick, serve):
    b.publish(repository, adaptation={"round": 4})
    b.publish(repository, "simple", b.simple(), foreign=True)
    b.publish(repository, "many", b.segmentation(*b.nearest_weights(), batch="N"), batch="N")
    return serve(quick)


@pytest.fixture
def client(server):
    with grpcclient.InferenceServerClient(server.target) as client:
        yield client


def tensor(name, array, raw=True):
    value = grpcclient.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    value.set_data_from_numpy(array)
    return value


def test_a_frame_is_answered(client):
    frame, labels = b.blocks(np.random.default_rng(0))
    result = client.infer("road", [tensor("frame", frame[None])], request_id="42")
    assert (result.as_numpy("labels")[0] == labels).all()
    assert result.as_numpy("confidence").dtype == np.uint8
    assert result.as_numpy("probabilities") is None  # large, and nobody asked for them
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("42", "road", "1")
    assert response.parameters["round"].string_param == "4"
    assert response.parameters["engine"].string_param == "onnxruntime"
    assert response.parameters["precision"].string_param == "fp32"
    assert response.parameters["pack"].string_param == "ab" * 32
    outputs = [grpcclient.InferRequestedOutput("probabilities")]
    result = client.infer("road", [tensor("frame", frame[None])], outputs=outputs)
    assert result.as_numpy("probabilities").sum(1) == pytest.approx(1.0)
    assert result.as_numpy("labels") is None


def test_metadata_and_readiness(client, server):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("road")
    assert client.is_model_ready("road", "1")
    assert not client.is_model_ready("road", "9")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata().name == "roadworthy"
    metadata = client.get_model_metadata("road")
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.inputs] == [
        ("frame", "UINT8", [1, 16, 32, 3])
    ]
    assert [(t.name, t.datatype, list(t.shape)) for t in metadata.outputs] == [
        ("labels", "UINT8", [1, 16, 32]),
        ("confidence", "UINT8", [1, 16, 32]),
        ("probabilities", "FP32", [1, 4, 8, 16]),
    ]
    assert list(metadata.versions) == ["1"]
    assert client.get_model_metadata("many").inputs[0].shape[0] == -1


def test_properties_carry_classes_and_lineage(server):
    import grpc

    from protos import inference_pb2, inference_pb2_grpc

    with grpc.insecure_channel(server.target) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        properties = stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name="road")).properties
    assert properties["classes"] == '["road", "car", "vegetation", "sky"]'
    assert properties["round"] == "4"
    assert properties["pack"] == "ab" * 32


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
def test_tritons_simple(client, raw):
    x, y = np.arange(32, dtype=np.int32).reshape(2, 16), np.full((2, 16), 3, np.int32)
    inputs = [tensor("INPUT0", x), tensor("INPUT1", y)]
    if not raw:
        inputs = [
            Typed(name, "INT32", array, "int_contents") for name, array in (("INPUT0", x), ("INPUT1", y))
        ]
    result = client.infer("simple", inputs)
    assert (result.as_numpy("OUTPUT0") == x + y).all()
    assert (result.as_numpy("OUTPUT1") == x - y).all()


class Typed:
    """An input whose values are in the message's typed contents, which tritonclient itself never uses."""

    def __init__(self, name, datatype, array, field):
        from tritonclient.grpc import service_pb2

        self._tensor = service_pb2.ModelInferRequest.InferInputTensor(
            name=name, datatype=datatype, shape=array.shape
        )
        getattr(self._tensor.contents, field).extend(array.reshape(-1).tolist())

    def name(self):
        return self._tensor.name

    def _get_tensor(self):
        return self._tensor

    def _get_content(self):
        return None


FRAME = np.zeros((1, *b.SIZE, 3), np.uint8)
X = np.zeros((1, 16), np.int32)
BAD = {
    "unknown model": (
        "nope",
        "",
        [("frame", FRAME)],
        None,
        "NOT_FOUND",
        "Request for unknown model: 'nope' is not found",
    ),
    "unknown version": (
        "road",
        "9",
        [("frame", FRAME)],
        None,
        "NOT_FOUND",
        "Request for unknown model: 'road' version 9 is not found",
    ),
    "version is no number": (
        "road",
        "abc",
        [("frame", FRAME)],
        None,
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string 'abc'",
    ),
    "data type": (
        "simple",
        "",
        [("INPUT0", X), ("INPUT1", X.astype(np.float32))],
        None,
        "INVALID_ARGUMENT",
        "[request id: 7] inference input 'INPUT1' data-type is 'FP32', but model 'simple' expects 'INT32'",
    ),
    "shape": (
        "simple",
        "",
        [("INPUT0", X), ("INPUT1", X[:, :15])],
        None,
        "INVALID_ARGUMENT",
        "[request id: 7] unexpected shape for input 'INPUT1' for model 'simple'. "
        "Expected [-1,16], got [1,15]. ",
    ),
    "missing input": (
        "simple",
        "",
        [("INPUT0", X)],
        None,
        "INVALID_ARGUMENT",
        "[request id: 7] expected 2 inputs but got 1 inputs for model 'simple'. Got input(s) ['INPUT0'], "
        "but missing required input(s) ['INPUT1']. Please provide all required input(s).",
    ),
    "extra input": (
        "simple",
        "",
        [("INPUT0", X), ("INPUT1", X), ("ZZ", X)],
        None,
        "INVALID_ARGUMENT",
        "expected 2 inputs but got 3 inputs for model 'simple'. Got input(s) ['INPUT0','INPUT1','ZZ']",
    ),
    "unknown output": (
        "simple",
        "",
        [("INPUT0", X), ("INPUT1", X)],
        "ZZ",
        "INVALID_ARGUMENT",
        "unexpected inference output 'ZZ' for model 'simple'",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_refusals_are_tritons(client, server, case):
    model, version, inputs, output, code, message = BAD[case]
    outputs = [grpcclient.InferRequestedOutput(output)] if output else None
    with pytest.raises(InferenceServerException) as error:
        client.infer(
            model, [tensor(n, a) for n, a in inputs], model_version=version, outputs=outputs, request_id="7"
        )
    assert error.value.status() == f"StatusCode.{code}"
    assert message in error.value.message()
    account = server.service.account.snapshot()
    assert (account.accepted, account.answered, sum(account.rejected.values())) == (1, 0, 1)


def test_byte_size_and_missing_data(client):
    value = tensor("frame", FRAME)
    value._raw_content = value._raw_content[:-4]
    with pytest.raises(
        InferenceServerException,
        match=r"byte size mismatch for input 'frame' for model 'road'\. Expected 1536, got 1532",
    ):
        client.infer("road", [value])
    value._raw_content = None
    with pytest.raises(InferenceServerException, match="unable to find data for input tensor 'frame'"):
        client.infer("road", [value])


def test_batches(client):
    rng = np.random.default_rng(1)
    pairs = [b.blocks(rng) for _ in range(3)]
    result = client.infer("many", [tensor("frame", np.stack([f for f, _ in pairs]))])
    assert (result.as_numpy("labels") == np.stack([t for _, t in pairs])).all()
    assert result.as_numpy("confidence").shape == (3, *b.SIZE)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compression(client, compression):
    frame, labels = b.blocks(np.random.default_rng(0))
    result = client.infer("road", [tensor("frame", frame[None])], compression_algorithm=compression)
    assert (result.as_numpy("labels")[0] == labels).all()


def test_asynchronous_calls_and_asyncio(server, client):
    frame, labels = b.blocks(np.random.default_rng(0))
    done = threading.Event()
    seen = []

    def back(result, error):
        seen.append((result, error))
        done.set()

    client.async_infer("road", [tensor("frame", frame[None])], callback=back)
    assert done.wait(PATIENCE)
    assert seen[0][1] is None
    assert (seen[0][0].as_numpy("labels")[0] == labels).all()

    import tritonclient.grpc.aio as aio

    async def ask():
        async with aio.InferenceServerClient(server.target) as one:
            results = await asyncio.gather(
                *(one.infer("road", [tensor("frame", frame[None])]) for _ in range(8))
            )
            return [(r.as_numpy("labels")[0] == labels).all() for r in results]

    assert asyncio.run(ask()) == [True] * 8


def test_bytes_that_are_no_text_are_the_callers_fault_and_not_the_engines(repository, quick, serve):
    """A watch window would roll a version back for failures that any client could cause."""
    b.publish(repository, "text", onnx_models.text(), foreign=True)
    server = serve(quick)
    slot = server.service.models.host("text").live

    def text(*values):
        one = grpcclient.InferInput("TEXT", [len(values)], "BYTES")
        one.set_data_from_numpy(np.array(values, np.object_))
        return [one]

    with grpcclient.InferenceServerClient(server.target) as client:
        with pytest.raises(InferenceServerException, match="'TEXT' for model 'text' is not UTF-8") as refused:
            client.infer("text", text(b"fine", b"\xff\xfe"))
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
        said = ["\u00df".encode(), b"", b"a\x00b\x00"]
        assert client.infer("text", text(*said)).as_numpy("SAME").tolist() == said
    assert slot.failures == 0


def test_a_full_queue_a_deadline_and_a_timeout(repository, quick, serve):
    """The engine is held: one request runs, one waits, the rest is told so at once."""
    b.publish(repository)
    server = serve(dataclasses.replace(quick, queue=QueueConfig(limit=1)))
    slot = server.service.models.host("road").live
    gate, run = threading.Event(), slot.engine.run
    slot.engine.run = lambda inputs, names: gate.wait(5 * PATIENCE) and run(inputs, names)
    ends = {}

    def send(name, **how):
        with grpcclient.InferenceServerClient(server.target) as one:
            try:
                one.infer("road", [tensor("frame", FRAME)], **how)
                ends[name] = "answered"
            except InferenceServerException as error:
                ends[name] = f"{error.status()} {error.message()}"

    def start(name, **how):
        thread = threading.Thread(target=send, args=(name,), kwargs=how)
        thread.start()
        return thread

    account = server.service.account
    first = start("runs")
    until(lambda: account.snapshot().in_flight == 1 and slot.held == 1)
    with grpcclient.InferenceServerClient(server.target) as one:
        waits = one.async_infer("road", [tensor("frame", FRAME)], callback=lambda result, error: None)
        until(lambda: account.snapshot().in_flight == 2)
        send("refused")
        waits.cancel()
        until(lambda: account.snapshot().in_flight == 1)
    assert ends["refused"].startswith("StatusCode.RESOURCE_EXHAUSTED Exceeds maximum queue size")
    send("deadline", client_timeout=0.5)
    assert "Deadline Exceeded" in ends["deadline"]
    until(lambda: account.snapshot().in_flight == 1)
    send("timeout", timeout=100_000)
    assert ends["timeout"] == "StatusCode.UNAVAILABLE [request id: <id_unknown>] Request timeout expired"
    gate.set()
    first.join(PATIENCE)
    assert ends["runs"] == "answered"
    now = account.snapshot()
    assert now.accepted == now.answered + sum(now.rejected.values())
    assert now.answered == 1
    assert {"queue-full", "timeout", "cancelled"} <= set(now.rejected)
    assert set(now.rejected) <= {"queue-full", "deadline", "cancelled", "timeout"}


def test_a_client_that_cancels_frees_its_place_in_the_queue(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    slot = server.service.models.host("road").live
    gate, run = threading.Event(), slot.engine.run
    slot.engine.run = lambda inputs, names: gate.wait(5 * PATIENCE) and run(inputs, names)
    with grpcclient.InferenceServerClient(server.target) as one:

        def send():
            return one.async_infer("road", [tensor("frame", FRAME)], callback=lambda result, error: None)

        send()
        until(lambda: slot.held == 1)  # it runs: the two that follow wait, whichever of them comes first
        waiting = [send(), send()]
        until(lambda: server.service.models.host("road").pending == 2)
        waiting[1].cancel()
        until(lambda: server.service.models.host("road").pending == 1)
        gate.set()
        until(lambda: server.service.account.snapshot().in_flight == 0)
    now = server.service.account.snapshot()
    assert (now.answered, now.rejected) == (2, {"cancelled": 1})


def test_a_message_that_is_too_large(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, max_message=1 << 16))
    with grpcclient.InferenceServerClient(server.target) as one:
        with pytest.raises(InferenceServerException, match="larger than max"):
            one.infer("road", [tensor("frame", np.zeros((1, 200, 200, 3), np.uint8))])
        assert one.is_server_live()


def test_a_load_may_bring_a_configuration_until_the_next(repository, quick, serve):
    b.publish(repository, batch="N")
    server = serve(quick)
    with grpcclient.InferenceServerClient(server.target) as one:

        def most():
            return one.get_model_config("road", as_json=True)["config"].get("max_batch_size", 0)

        assert most() == 0
        one.load_model("road", config=json.dumps({"max_batch_size": 4, "dynamic_batching": {}}))
        assert most() == 4
        two = np.stack([FRAME[0], FRAME[0]])
        assert one.infer("road", [tensor("frame", two)]).as_numpy("labels").shape[0] == 2
        with pytest.raises(InferenceServerException, match="batch-size must be <= 4"):
            one.infer("road", [tensor("frame", np.concatenate([two, two, two]))])
        for config in (
            "{",
            '{"colour": 1}',
            '{"name": "other"}',
            '{"max_batch_size": -1}',
            "[" * 100_000,
        ):
            with pytest.raises(InferenceServerException, match="failed to poll from model repository"):
                one.load_model("road", config=config)
            assert most() == 4  # what was refused changed nothing
        with pytest.raises(InferenceServerException, match="versions are immutable"):
            one.load_model("road", config="{}", files={"file:2/model.onnx": b"x"})
        assert repository.versions("road") == [1]
        one.load_model("road")
        assert most() == 0


def test_metrics_tell_the_account(client, server):
    import urllib.request

    client.infer("road", [tensor("frame", FRAME)])
    with pytest.raises(InferenceServerException):
        client.infer("nope", [tensor("frame", FRAME)])
    address = f"http://127.0.0.1:{server.metrics_port}/metrics"
    with urllib.request.urlopen(address, timeout=PATIENCE) as response:
        lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[:1] != "#")
    assert lines['roadworthy_requests_accepted_total{model=""}'] == "2.0"
    assert lines['roadworthy_requests_answered_total{model=""}'] == "1.0"
    assert lines['roadworthy_requests_rejected_total{model="",reason="unknown-model"}'] == "1.0"
    assert lines['nv_inference_request_success{model="road",version="1"}'] == "1.0"
    assert lines['roadworthy_live_version{model="road"}'] == "1.0"


def test_no_bytes_in_a_shape_that_no_array_can_have():
    given = request.InputTensor("frame", "UINT8", (0, 2**62, 2**62, 3), b"")
    with pytest.raises(ServiceError, match=r"shape \[0,4611686018427387904,.* is too large") as refusal:
        request._array(given, TensorSpec("frame", "UINT8", (-1, -1, -1, 3)), "", "road")
    assert refusal.value.code is Code.INVALID_ARGUMENT
