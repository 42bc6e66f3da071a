"""Whatever bytes come: a status for each, no crash, no hang, and the account still adds up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from runtime.config import EngineConfig, ServerConfig
from runtime.errors import Code, ServiceError
from runtime.repository.repository import Repository
from runtime.rpc.inference import InferenceEdge
from runtime.service import Service
from tests.runtime import builders as b

numbers = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**62, -(2**63), 2**63 - 1]))
names = st.sampled_from(["frame", "INPUT0", "INPUT1", "labels", "", "ZZ", "OUTPUT0"])
kinds = st.sampled_from(["UINT8", "INT32", "FP32", "BYTES", "BOOL", "FP16", "", "NOPE"])


@st.composite
def parameters(draw, target):
    for key in draw(
        st.lists(st.sampled_from(["timeout", "source", "priority", "shared_memory_region", "x"]), max_size=3)
    ):
        kind = draw(
            st.sampled_from(
                ["bool_param", "int64_param", "string_param", "double_param", "uint64_param", None]
            )
        )
        value = target[key]
        if kind == "string_param":
            value.string_param = draw(st.text(max_size=4))
        elif kind == "bool_param":
            value.bool_param = draw(st.booleans())
        elif kind == "double_param":
            value.double_param = draw(st.floats())
        elif kind == "int64_param":
            value.int64_param = draw(st.integers(-(2**63), 2**63 - 1))
        elif kind == "uint64_param":
            value.uint64_param = draw(st.integers(0, 2**64 - 1))


@st.composite
def requests(draw):
    """Requests that are nearly right, which is where the mistakes are."""
    request = pb.ModelInferRequest(
        model_name=draw(st.sampled_from(["road", "simple", "simple", "nope", "", "../road"])),
        model_version=draw(st.sampled_from(["", "", "1", "-1", "0", "abc", "99999999999999999999", "²"])),
        id=draw(st.text(max_size=3)),
    )
    draw(parameters(request.parameters))
    for _ in range(draw(st.integers(0, 3))):
        tensor = request.inputs.add(
            name=draw(names), datatype=draw(kinds), shape=draw(st.lists(numbers, max_size=5))
        )
        draw(parameters(tensor.parameters))
        if draw(st.booleans()):
            tensor.contents.uint_contents.extend(draw(st.lists(st.integers(0, 2**32 - 1), max_size=4)))
            tensor.contents.int_contents.extend(draw(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20)))
            tensor.contents.bytes_contents.extend(draw(st.lists(st.binary(max_size=4), max_size=3)))
    for _ in range(draw(st.integers(0, 2))):
        draw(parameters(request.outputs.add(name=draw(names)).parameters))
    sizes = st.sampled_from([0, 1, 4, 64, 1536])
    request.raw_input_contents.extend(bytes(draw(sizes)) for _ in range(draw(st.integers(0, 3))))
    return request.SerializeToString()


@st.composite
def damaged(draw):
    message = bytearray(draw(requests()))
    for _ in range(draw(st.integers(0, 4))):
        if message:
            message[draw(st.integers(0, len(message) - 1))] = draw(st.integers(0, 255))
    return bytes(message[: draw(st.integers(0, len(message)))])


@pytest.fixture(scope="module")
def edge(tmp_path_factory):
    repository = Repository(tmp_path_factory.mktemp("engines"))
    b.publish(repository)
    b.publish(repository, "simple", b.simple(), foreign=True)
    service = Service(ServerConfig(repository=str(repository.path), engine=EngineConfig(threads=1)))
    service.start()
    yield InferenceEdge(service)
    service.close()


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.one_of(requests(), damaged(), st.binary(max_size=300)))
def test_every_message_gets_a_status(edge, message):
    failure = None
    try:
        answer = pb.ModelInferResponse.FromString(edge.infer(message))
        assert answer.model_version == "1"
    except ServiceError as error:
        failure = error
    if failure is not None:
        assert failure.code in (Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.UNAVAILABLE)
        assert failure.message
    now = edge._service.account.snapshot()
    assert now.accepted == now.answered + sum(now.rejected.values())
    assert "internal" not in now.rejected
    assert "engine" not in now.rejected


def test_the_service_still_answers_after_all_that(edge):
    frame, labels = b.blocks(np.random.default_rng(0))
    request = pb.ModelInferRequest(model_name="road", raw_input_contents=[frame.tobytes()])
    request.inputs.add(name="frame", datatype="UINT8", shape=(1, *frame.shape))
    answer = pb.ModelInferResponse.FromString(edge.infer(request.SerializeToString()))
    assert (
        np.frombuffer(answer.raw_output_contents[0], np.uint8).reshape(labels.shape).tolist()
        == labels.tolist()
    )
