"""What ModelConfig gives back of a config.pbtxt, and the labels that it names."""

from __future__ import annotations

import os

import numpy as np
import pytest
from google.protobuf import text_format
from onnx import TensorProto as T
from onnx import helper as h

from protos import inference_pb2 as inference
from protos import model_config_pb2 as pb
from runtime.client import Client
from runtime.serving.labels import Labels
from tests.runtime import builders as b

tc = pytest.importorskip("tritonclient.grpc")

#: A value for every field of the message that is no tensor and no batch size: nothing of them may be lost.
FULL = """
name: "another" platform: "onnxruntime_onnx" backend: "onnxruntime" runtime: "r" max_batch_size: 4
version_policy { specific { versions: [1, 3] } }
input { name: "a" data_type: TYPE_FP32 format: FORMAT_NCHW dims: [3, 8, 6] optional: true
        allow_ragged_batch: true is_non_linear_format_io: true }
output { name: "p" data_type: TYPE_FP32 dims: [3, 8, 6] label_filename: "labels.txt" }
output { name: "q" data_type: TYPE_FP32 dims: [3, 8, 6] label_filename: "sub/more.txt" }
batch_input { kind: BATCH_ELEMENT_COUNT target_name: "n" data_type: TYPE_FP32 source_input: "a" }
batch_output { target_name: "p" kind: BATCH_SCATTER_WITH_INPUT_SHAPE source_input: "a" }
optimization { priority: PRIORITY_MAX graph { level: 1 } input_pinned_memory { enable: true } }
dynamic_batching { preferred_batch_size: [2, 4] max_queue_delay_microseconds: 100 preserve_ordering: true }
instance_group { name: "two" count: 2 kind: KIND_CPU rate_limiter { resources { name: "x" count: 1 } } }
default_model_filename: "model.onnx" cc_model_filenames { key: "7.5" value: "m75" }
metric_tags { key: "team" value: "road" }
parameters { key: "execution_mode" value { string_value: "1" } }
model_warmup { name: "w" batch_size: 1 inputs { key: "a" value { data_type: TYPE_FP32 dims: [3, 8, 6] zero_data: true } } }
model_operations { op_library_filename: "x.so" } model_transaction_policy { decoupled: false }
model_repository_agents { agents { name: "checksum" parameters { key: "k" value: "v" } } }
response_cache { enable: false }
"""  # noqa: E501


def model(batch="N"):
    """p = a, q = 2 a; float32 [N,3,8,W]."""
    sides = [batch, 3, 8, "W"]
    infos = [[h.make_tensor_value_info(n, T.FLOAT, sides) for n in names] for names in ("a", "pq")]
    nodes = [h.make_node("Identity", ["a"], ["p"]), h.make_node("Add", ["a", "a"], ["q"])]
    graph = h.make_graph(nodes, "g", *infos)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9).SerializeToString()


def publish(repository, config, labels=None, content=None):
    staged = repository.stage("road")
    (staged / "model.onnx").write_bytes(content or model())
    manifest = {"task": "tensor", "engine": {"kind": "onnxruntime", "file": "model.onnx"}}
    return repository.publish("road", staged, manifest, config, labels)


def asked(target):
    with Client(target) as client:
        request = inference.ModelConfigRequest(name="road").SerializeToString()
        return inference.ModelConfigResponse.FromString(client._kserve("ModelConfig", request)).config


def test_every_field_comes_back(repository, quick, serve):
    publish(repository, FULL, ["car", "road", "sky"])
    wanted = text_format.Parse(FULL, pb.ModelConfig())
    wanted.name = "road"
    assert asked(serve(quick).target) == wanted
    unset = {f.name for f in pb.ModelConfig.DESCRIPTOR.fields} - {f.name for f, _ in wanted.ListFields()}
    assert unset <= {"sequence_batching", "ensemble_scheduling", "model_metrics"}


def test_what_the_engine_shows_holds_against_the_file(repository, quick, serve):
    """Types, tensors that are not there, sides that are fixed; the file may fix a side that is free."""
    publish(
        repository,
        'input { name: "a" data_type: TYPE_INT8 format: FORMAT_NCHW dims: [3, -1, 5] } '
        'input { name: "nope" data_type: TYPE_FP32 dims: [1] } '
        'output { name: "q" data_type: TYPE_FP32 dims: [-1, 3, 8, 5] label_filename: "l" } platform: "x"',
    )
    config = asked(serve(quick).target)
    assert config.platform == "onnxruntime_onnx"
    assert [(t.name, t.data_type, list(t.dims), t.format) for t in config.input] == [
        ("a", pb.TYPE_FP32, [-1, 3, 8, -1], pb.ModelInput.FORMAT_NCHW)
    ]
    outputs = [(t.name, list(t.dims), t.label_filename) for t in config.output]
    assert outputs == [("p", [-1, 3, 8, -1], ""), ("q", [-1, 3, 8, 5], "l")]


def test_a_batch_size_that_is_not_kept_is_not_promised(repository, quick, serve):
    publish(repository, "max_batch_size: 8 instance_group { count: 3 }", content=model(batch=1))
    config = asked(serve(quick).target)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [1, 3, 8, -1]
    assert config.instance_group[0].count == 3


def test_tritons_client_reads_what_an_image_client_needs(repository, quick, serve):
    """`parse_model` of NVIDIA's image_client wants one input with its format and one output."""
    publish(repository, FULL, ["car"])
    client = tc.InferenceServerClient(serve(quick).target)
    config = client.get_model_config("road").config
    metadata = client.get_model_metadata("road")
    assert config.input[0].format == 2
    assert config.max_batch_size == 4
    assert list(metadata.inputs[0].shape) == [-1, 3, 8, -1]
    client.close()


def test_each_output_has_the_labels_of_its_file(repository, quick, serve):
    publish(repository, FULL, ["car", "road", "sky"])
    (repository.path / "road" / "sub").mkdir()
    (repository.path / "road" / "sub" / "more.txt").write_text("zero\none\n")
    client = tc.InferenceServerClient(serve(quick).target)
    a = np.zeros((2, 3, 8, 1), np.float32)
    a[0, 0, 1], a[1, 0, 2] = 5, 7
    tensor = tc.InferInput("a", list(a.shape), "FP32")
    tensor.set_data_from_numpy(a)

    def best(name):
        answer = client.infer("road", [tensor], outputs=[tc.InferRequestedOutput(name, class_count=1)])
        return answer.as_numpy(name).tolist()

    assert best("p") == [[b"5.000000:1:road"], [b"7.000000:2:sky"]]
    assert best("q") == [[b"10.000000:1:one"], [b"14.000000:2"]], "an index beyond the file has no label"
    (repository.path / "road" / "sub" / "more.txt").write_text("zero\nuno\ndue\n")
    assert best("q") == [[b"10.000000:1:uno"], [b"14.000000:2:due"]], "publishing replaces the file"
    client.close()


def test_text_has_no_highest_values(repository, quick, serve):
    """Triton's words; the answer was the text itself, as if nothing had been asked."""
    sides = [[h.make_tensor_value_info(n, T.STRING, ["N", 2])] for n in "xy"]
    graph = h.make_graph([h.make_node("Identity", ["x"], ["y"])], "g", *sides)
    content = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9).SerializeToString()
    publish(repository, "max_batch_size: 8", content=content)
    with tc.InferenceServerClient(serve(quick).target) as client:
        tensor = tc.InferInput("x", [1, 2], "BYTES")
        tensor.set_data_from_numpy(np.array([["a", "b"]], object))
        asked = [tc.InferRequestedOutput("y", class_count=1)]
        with pytest.raises(Exception, match="class result not available for output"):
            client.infer("road", [tensor], outputs=asked)


@pytest.mark.parametrize(
    "name", ["../secret.txt", "/etc/hostname", "link", "absent", "pipe", "large", ".", "a/../b"]
)
def test_labels_come_from_plain_files_of_the_model_alone(name, tmp_path):
    home = tmp_path / "road"
    home.mkdir()
    (tmp_path / "secret.txt").write_text("secret\n")
    (home / "link").symlink_to(tmp_path / "secret.txt")
    os.mkfifo(home / "pipe")
    with open(home / "large", "wb") as file:
        file.truncate(1 << 40)
    assert Labels(home, {"p": name}).of("p") == ()
    assert Labels(home, {"p": name}).of("q") == ()


def test_the_classes_of_a_manifest_are_the_labels_of_probabilities(repository, quick, serve):

    b.publish(repository)
    client = tc.InferenceServerClient(serve(quick).target)
    tensor = tc.InferInput("frame", [1, *b.SIZE, 3], "UINT8")
    tensor.set_data_from_numpy(np.full((1, *b.SIZE, 3), 20, np.uint8))
    asked = [tc.InferRequestedOutput("probabilities", class_count=1)]
    assert client.infer("road", [tensor], outputs=asked).as_numpy("probabilities")[0].endswith(b":road")
    client.close()
