"""Traces: the spans of a request, whose they are, and that a receiver that is gone costs no answer."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from runtime.client import Client, Rejected, messages
from runtime.config import TracingConfig
from runtime.observability import tracing
from tests.runtime import builders as b
from tests.waits import PATIENCE

pytest.importorskip("opentelemetry.sdk")
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

FRAME = np.zeros((*b.SIZE, 3), np.uint8)
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # the example of the W3C's recommendation
STAGES = ["queue", "compute_input", "compute_infer", "compute_output"]


@pytest.fixture
def traced(repository, quick, serve, monkeypatch):
    """traced(rate) -> (server, the finished spans of its requests)."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(tracing, "make", lambda config: tracing.Tracing(config, exporter))

    def start(rate=1.0, **more):
        b.publish(repository)
        config = TracingConfig(endpoint="http://127.0.0.1:1", rate=rate)
        server = serve(dataclasses.replace(quick, tracing=config, **more))

        def spans():
            assert server.service.tracing.flush(PATIENCE)
            finished = exporter.get_finished_spans()
            exporter.clear()
            return finished

        return server, spans

    return start


def infer(server, **metadata):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary(f"{messages.KSERVE}ModelInfer")
        message = messages.Inference("road", FRAME, ("labels",), source="front", request_id="7").plain()
        return call(message, metadata=tuple(metadata.items()), timeout=PATIENCE)


def test_a_request_is_a_span_with_its_stages_inside(traced):
    server, spans = traced()
    infer(server)
    *inside, whole = sorted(spans(), key=lambda span: span.end_time)
    assert whole.name == "ModelInfer"
    assert whole.parent is None
    assert whole.resource.attributes["service.name"] == "roadworthy"
    assert {key: whole.attributes[key] for key in ("model.name", "model.version", "request.source")} == {
        "model.name": "road",
        "model.version": 1,
        "request.source": "front",
    }
    assert whole.attributes["model.engine"] == "onnxruntime"
    assert [span.name for span in sorted(inside, key=lambda span: span.start_time)] == STAGES
    for span in inside:
        assert span.parent.span_id == whole.context.span_id
        assert whole.start_time <= span.start_time <= span.end_time <= whole.end_time
    now = server.service.models.host("road").statistics_of(1).snapshot().stages
    for span in inside:  # as long as the server's own statistics say
        assert span.end_time - span.start_time == getattr(now, span.name)


def test_a_request_to_a_group_has_the_stages_of_its_members_inside(traced, repository):
    b.publish(repository, "seg", b.segmentation(*b.nearest_weights(), b.EDGE_SIZE), size=b.EDGE_SIZE)
    b.publish_edges(repository, "edges", b.edges(*b.nearest_weights()))
    server, spans = traced(groups={"scene": ["seg", "edges"]})
    with Client(server.target) as client:
        frame = np.zeros((*b.EDGE_SIZE, 3), np.uint8)
        client.infer("scene", frame, outputs=("labels", "edge_bits"), timeout=PATIENCE)
    *inside, whole = sorted(spans(), key=lambda span: (span.end_time, span.parent is None))
    assert (whole.attributes["model.name"], whole.attributes["model.seg.version"]) == ("scene", "1")
    assert [span.name for span in sorted(inside, key=lambda span: span.start_time)] == STAGES
    members = [
        server.service.models.host(name).statistics_of(1).snapshot().stages for name in ("seg", "edges")
    ]
    (run,) = [span for span in inside if span.name == "compute_infer"]
    assert run.end_time - run.start_time == sum(each.compute_infer for each in members) > 0


def test_the_callers_traceparent_decides(traced):
    server, spans = traced(rate=0.0)
    infer(server)
    infer(server, traceparent=PARENT[:-2] + "00")
    assert not spans()
    infer(server, traceparent=PARENT, tracestate="vendor=1")
    (whole,) = [span for span in spans() if span.name == "ModelInfer"]
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    for broken in ("", "x", "00-0-0-01", "ff" + PARENT[2:], "0" * 4000):  # from 8 KiB on gRPC itself refuses
        infer(server, traceparent=broken)
    assert not spans()


def test_a_refusal_is_an_error_of_its_span(traced):
    server, spans = traced()
    with Client(server.target) as client, pytest.raises(Rejected):
        client.infer("nope", FRAME)
    (span,) = spans()
    assert not span.status.is_ok
    assert span.attributes["request.rejected"] == "unknown-model"
    assert span.attributes["rpc.grpc.status"] == "NOT_FOUND"


def test_streamed_requests_are_traced_too(traced):
    server, spans = traced()
    with Client(server.target) as client:
        assert len(list(client.infer_stream("road", [FRAME, FRAME]))) == 2
    assert len([span for span in spans() if span.name == "ModelInfer"]) == 2


def test_trace_settings_switch_and_thin(traced):
    server, spans = traced()

    def settings(model="", **values):
        request = pb.TraceSettingRequest(model_name=model)
        for key, value in values.items():
            request.settings[key].value.extend(value)
        with grpc.insecure_channel(server.target) as channel:
            call = channel.unary_unary(f"{messages.KSERVE}TraceSetting")
            answer = pb.TraceSettingResponse.FromString(call(request.SerializeToString()))
        return {key: list(value.value) for key, value in answer.settings.items()}

    now = settings()
    assert (now["trace_level"], now["trace_rate"]) == (["TIMESTAMPS"], ["1"])
    assert settings(trace_level=["OFF"])["trace_level"] == ["OFF"]
    infer(server, traceparent=PARENT)
    assert not spans()
    assert settings(trace_level=["TIMESTAMPS"], trace_rate=["50"])["trace_rate"] == ["50"]
    assert server.service.tracing.rate == 0.02
    for wrong, code in (
        ({"trace_rate": ["x"]}, "INVALID_ARGUMENT"),
        ({"trace_rate": ["0"]}, "UNIMPLEMENTED"),
        ({"trace_level": ["TENSORS"]}, "UNIMPLEMENTED"),
        ({"trace_file": ["/etc/passwd"], "trace_level": ["OFF"]}, "UNIMPLEMENTED"),
        ({"model": "road", "trace_rate": ["2"]}, "UNIMPLEMENTED"),
    ):
        with pytest.raises(grpc.RpcError) as refusal:
            settings(**wrong)
        assert refusal.value.code().name == code
    assert settings(trace_rate=[])["trace_rate"] == ["1"]  # as configured
    assert settings()["trace_level"] == ["TIMESTAMPS"]  # a refused request changes nothing


def test_a_receiver_that_is_gone_or_silent_costs_no_answer(repository, quick, serve):
    b.publish(repository)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = TracingConfig(endpoint=endpoint, rate=1.0, queue=16, timeout=1.0)
        server = serve(dataclasses.replace(quick, tracing=config))
        with Client(server.target) as client:
            for _ in range(50):
                assert client.infer("road", FRAME, timeout=PATIENCE).version == 1
        assert server.service.account.snapshot().answered == 50
        assert server.stop()  # the test ends here if the receiver could hold it


def test_off_is_not_even_imported():
    script = (
        "import sys, runtime.serve\n"
        "from runtime.observability import tracing; from runtime.config import TracingConfig\n"
        "assert tracing.make(TracingConfig()) is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_without_its_packages_the_server_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(tracing.ConfigError, match=r"pip install 'roadworthy\[tracing\]'"):
        tracing.make(TracingConfig(endpoint="http://127.0.0.1:4317"))
