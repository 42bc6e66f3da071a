"""The stubs are what the compiler writes, and the wire is Triton's, field by field."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool

from protos import generate, inference_pb2, model_config_pb2, roadworthy_pb2

ROOT = Path(__file__).resolve().parents[2]


def fields(message):
    """{name: (number, type, repeated, message or enum name, oneof)} and the same of nested messages."""
    own = {
        f.name: (
            f.number,
            f.type,
            f.is_repeated,
            f.message_type.full_name if f.message_type else "",
            f.enum_type.full_name if f.enum_type else "",
            f.containing_oneof.name if f.containing_oneof else "",
        )
        for f in message.fields
    }
    return own, {nested.name: fields(nested) for nested in message.nested_types}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (inference_pb2, "tritonclient.grpc.service_pb2"),
        (model_config_pb2, "tritonclient.grpc.model_config_pb2"),
    ],
)
def test_every_message_has_tritons_names_and_numbers(ours, theirs):
    theirs = pytest.importorskip(theirs)
    mine, triton = ours.DESCRIPTOR, theirs.DESCRIPTOR
    assert mine.package == triton.package
    assert set(mine.message_types_by_name) == set(triton.message_types_by_name)
    for name, message in triton.message_types_by_name.items():
        own, nested = fields(mine.message_types_by_name[name])
        want, want_nested = fields(message)
        if name == "ModelMetadataResponse":  # KServe's one addition, which Triton lacks
            assert own.pop("properties")[0] == 6
            nested.pop("PropertiesEntry")
        assert own == want, name
        assert nested == want_nested, name
    for name, enum in triton.enum_types_by_name.items():
        assert {v.name: v.number for v in mine.enum_types_by_name[name].values} == {
            v.name: v.number for v in enum.values
        }


def test_the_service_has_tritons_twenty_calls():
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2")

    def calls(descriptor):
        service = descriptor.services_by_name["GRPCInferenceService"]
        return {
            m.name: (m.input_type.full_name, m.output_type.full_name, m.client_streaming, m.server_streaming)
            for m in service.methods
        }

    assert calls(inference_pb2.DESCRIPTOR) == calls(theirs.DESCRIPTOR)
    assert len(calls(theirs.DESCRIPTOR)) == 20


def test_committed_stubs_are_what_the_compiler_writes(tmp_path):
    pytest.importorskip("grpc_tools")
    for name, text in generate.generate(tmp_path).items():
        assert (ROOT / "protos" / name).read_text() == text, f"{name}: run python -m protos.generate"


def test_nothing_of_ours_enters_the_default_pool():
    script = (
        "from google.protobuf import descriptor_pool as d\n"
        "from protos import inference_pb2, roadworthy_pb2\n"
        "for name in ('protos/inference.proto', 'protos/roadworthy.proto', 'protos/model_config.proto'):\n"
        "    try: d.Default().FindFileByName(name)\n"
        "    except KeyError: continue\n"
        "    raise SystemExit(name)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert roadworthy_pb2.DESCRIPTOR.pool is not descriptor_pool.Default()


@pytest.mark.parametrize("first", ["protos.inference_pb2", "tritonclient.grpc"])
def test_lives_beside_other_owners_of_the_package_in_one_process(first):
    """tritonclient, and kserve and mlserver where they are installed, in either order."""
    pytest.importorskip("tritonclient.grpc")
    others = [
        "protos.inference_pb2",
        "tritonclient.grpc",
        "kserve.protocol.grpc.grpc_predict_v2_pb2",
        "mlserver.grpc.dataplane_pb2",
    ]
    others.sort(key=lambda name: name != first)
    script = (
        f"import importlib\nfor name in {others!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except ModuleNotFoundError as e:\n"
        "        if name.split('.')[0] not in ('kserve', 'mlserver'): raise\n"
        "import protos.inference_pb2 as ours, tritonclient.grpc.service_pb2 as theirs\n"
        "m = ours.ModelInferRequest(model_name='m'); m.parameters['k'].int64_param = 3\n"
        "t = theirs.ModelInferRequest.FromString(m.SerializeToString())\n"
        "assert t.parameters['k'].int64_param == 3\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_metadata_properties_are_ignored_by_clients_that_do_not_know_them():
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2")
    ours = inference_pb2.ModelMetadataResponse(name="road", properties={"classes": "road,sky"})
    assert theirs.ModelMetadataResponse.FromString(ours.SerializeToString()).name == "road"
