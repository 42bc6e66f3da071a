"""ONNX files that are not ours, in the repository and behind the server's own engine loader."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from export.build import main, show
from export.errors import ExportError
from export.publish import publish_onnx
from runtime.config import EngineConfig
from runtime.engines import load
from runtime.repository.repository import Repository


def depth(value=2.0, opset=17, nodes=None):
    """NCHW float image to one map; batch and sides open."""
    info = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes
            or [
                helper.make_node("ReduceMean", ["image"], ["grey"], axes=[1], keepdims=1),
                helper.make_node("Mul", ["grey", "w"], ["depth"]),
            ],
            "depth",
            [info("image", TensorProto.FLOAT, ["n", 3, "h", "w_"])],
            [info("depth", TensorProto.FLOAT, ["n", 1, "h", "w_"])],
            [numpy_helper.from_array(np.float32([value]), "w")],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )


@pytest.fixture
def file(tmp_path):
    onnx.save(depth(), tmp_path / "depth.onnx")
    return tmp_path / "depth.onnx"


def test_it_is_published_as_it_is_and_runs(file, tmp_path):
    result = publish_onnx(file, tmp_path / "repo", "depth", labels=["near", "far"])
    manifest = Repository(tmp_path / "repo").verify("depth", 1)
    assert (result.path / "model.onnx").read_bytes() == file.read_bytes()
    assert (manifest["task"], manifest["classes"]) == ("foreign", ["near", "far"])
    content = (result.path / "model.onnx").read_bytes()
    engine = load(content, "onnxruntime", "fp32", EngineConfig(threads=1), candidate=False)
    x = np.random.default_rng(0).random((1, 3, 5, 7), np.float32)
    assert np.allclose(engine.run({"image": x}, ["depth"])["depth"], 2 * x.mean(1, keepdims=True))
    engine.close()


def test_tritons_own_schema_reads_the_configuration(file, tmp_path):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    publish_onnx(file, tmp_path / "repo", "depth")
    config = text_format.Parse(
        (tmp_path / "repo" / "depth" / "config.pbtxt").read_text(), schema.ModelConfig()
    )
    assert config.max_batch_size == 8
    assert list(config.input[0].dims) == [3, -1, -1]
    assert config.output[0].data_type == schema.TYPE_FP32


class TestWhatIsRefused:
    def refused(self, tmp_path, words, model, name="depth", **keywords):
        file = tmp_path / "bad.onnx"
        file.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
        with pytest.raises(ExportError, match=words) as caught:
            publish_onnx(file, tmp_path / "repo", name, **keywords)
        assert "\n" not in str(caught.value)
        assert not list((tmp_path / "repo").rglob("*.onnx"))

    def test_no_onnx(self, tmp_path):
        self.refused(tmp_path, "is not an ONNX file", b"nonsense")

    def test_an_unknown_operator(self, tmp_path):
        node = helper.make_node("Frobnicate", ["image"], ["depth"])
        self.refused(tmp_path, r"is not a valid graph: .*Frobnicate", depth(nodes=[node]))

    def test_an_operator_of_a_domain_that_onnx_runtime_lacks(self, tmp_path):
        model = depth(nodes=[helper.make_node("Frobnicate", ["image"], ["depth"], domain="acme")])
        model.opset_import.append(helper.make_opsetid("acme", 1))
        self.refused(tmp_path, "ONNX Runtime refuses the graph: .*Frobnicate", model)

    def test_an_opset_too_new(self, tmp_path):
        self.refused(tmp_path, "is of opset 99, the newest known here is", depth(opset=99))

    def test_answers_that_are_not_finite(self, tmp_path):
        self.refused(tmp_path, "output 'depth' is not finite", depth(value=np.nan))

    def test_a_bad_name(self, tmp_path):
        self.refused(tmp_path, r"model name '\.\./x'", depth(), name="../x")

    def test_weights_in_other_files(self, tmp_path):
        model = depth()
        onnx.save(
            model, tmp_path / "bad.onnx", save_as_external_data=True, size_threshold=0, location="w.bin"
        )
        content = (tmp_path / "bad.onnx").read_bytes()
        self.refused(tmp_path, "keeps 1 weights in other files", content)

    def test_sides_that_do_not_fit_the_graph_ask_for_a_size(self, tmp_path):
        nodes = [
            helper.make_node("Reshape", ["image", "shape"], ["flat"]),
            helper.make_node("ReduceMean", ["flat"], ["depth"], axes=[1], keepdims=1),
        ]
        model = depth(nodes=nodes)
        model.graph.initializer.append(numpy_helper.from_array(np.int64([1, 3, 10, 20]), "shape"))
        self.refused(tmp_path, "give --size where its sides are open", model)
        file = tmp_path / "bad.onnx"
        assert publish_onnx(file, tmp_path / "repo", "depth", size=(10, 20)).version == 1


def test_a_graph_with_our_contracts_tensors_is_served_as_segmentation(pack, tmp_path):
    """Somebody's own export of somebody's own network: here one of ours, without its pack."""
    from export.build import build
    from runtime.client import Client
    from runtime.config import EngineConfig as Engines
    from runtime.config import ServerConfig, WatchConfig
    from runtime.server import Server

    file = build(pack, tmp_path / "other").path / "model.onnx"
    repository = tmp_path / "repo"
    with pytest.raises(ExportError, match="name its classes, --labels FILE"):
        publish_onnx(file, repository, "road")
    with pytest.raises(ExportError, match="answers class"):
        publish_onnx(file, repository, "road", labels=["one"])
    result = publish_onnx(file, repository, "road", labels=list(pack.spec.classes))
    assert "parity with onnxruntime without optimisation on 2 golden frames" in show(result)
    assert result.manifest["task"] == "segmentation"
    assert result.manifest["parity"]["reference"] == "onnxruntime without optimisation"
    config = ServerConfig(
        repository=str(repository),
        port=0,
        metrics_port=-1,
        engine=Engines(threads=1),
        watch=WatchConfig(seconds=0),
    )
    with Server(config) as server, Client(server.target) as client:
        answer = client.infer("road", pack.golden()[0])
    assert (answer.version, answer.labels.shape) == (1, (64, 96))


def test_given_frames_are_what_our_contracts_graph_is_compared_on(pack, tmp_path):
    from export.build import build

    file = build(pack, tmp_path / "other").path / "model.onnx"
    np.savez(tmp_path / "in.npz", frame=pack.golden())
    labels = list(pack.spec.classes)
    result = publish_onnx(file, tmp_path / "repo", "road", labels=labels, inputs=tmp_path / "in.npz")
    assert (result.manifest["parity"]["golden"], result.manifest["parity"]["frames"]) == ("given", 3)
    with np.load(result.path / "golden.npz") as stored:
        assert np.array_equal(stored["frames"], pack.golden())
    assert not (result.path / "inputs.npz").exists()


def test_command_line(file, tmp_path, capsys):
    labels = tmp_path / "labels.txt"
    labels.write_text("near\nfar\n")
    words = [
        "--onnx",
        str(file),
        "--name",
        "depth",
        "--repository",
        str(tmp_path / "repo"),
        "--labels",
        str(labels),
    ]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 1
    assert main(words) == 0
    assert "depth version 2" in capsys.readouterr().out
    for wrong in (["--onnx", str(file), "--repository", "x"], ["--repository", "x"], ["PACK"]):
        with pytest.raises(SystemExit) as stop:
            main(wrong)
        assert stop.value.code == 2


@pytest.mark.parametrize("words", [["--precision", "int8"], ["--backend", "tensorrt"], ["--task", "edges"]])
def test_what_is_about_building_is_wrong_usage_for_a_file(tmp_path, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--onnx", "x.onnx", "--name", "x", "--repository", str(tmp_path), *words])
    assert stop.value.code == 2
    assert "an ONNX file is published as it is" in capsys.readouterr().err


class TestConfig:
    """A config.pbtxt of one's own."""

    def text(self, tmp_path, file, content):
        config = tmp_path / "config.pbtxt"
        config.write_text(content)
        result = publish_onnx(file, tmp_path / "repo", "depth", config=config)
        return (result.path.parent / "config.pbtxt").read_text()

    def test_what_it_says_is_kept_and_the_rest_is_the_graphs(self, file, tmp_path):
        schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
        queue = "preferred_batch_size: [ 4 ] priority_levels: 2 default_priority_level: 1"
        text = self.text(tmp_path, file, f"max_batch_size: 4\ndynamic_batching {{ {queue} }}")
        config = text_format.Parse(text, schema.ModelConfig())
        assert (config.name, config.backend, config.max_batch_size) == ("depth", "onnxruntime", 4)
        assert list(config.dynamic_batching.preferred_batch_size) == [4]
        assert [(t.name, list(t.dims)) for t in config.input] == [("image", [3, -1, -1])]
        assert [(t.name, list(t.dims)) for t in config.output] == [("depth", [1, -1, -1])]

    def test_without_a_batch_the_dimensions_are_whole(self, file, tmp_path):
        schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
        wanted = 'input { name: "image" data_type: TYPE_FP32 dims: [ 1, 3, 64, 96 ] }'
        config = text_format.Parse(self.text(tmp_path, file, wanted), schema.ModelConfig())
        assert config.max_batch_size == 0
        assert list(config.input[0].dims) == [1, 3, 64, 96]
        assert list(config.output[0].dims) == [-1, 1, -1, -1]

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("nonsense {", "no config.pbtxt"),
            ('name: "other"', "says name 'other'"),
            ('backend: "python"', "says backend 'python'"),
            ('input { name: "frame" data_type: TYPE_FP32 dims: [ 3 ] }', "names input 'frame'"),
            (
                'max_batch_size: 2 input { name: "image" data_type: TYPE_UINT8 dims: [ 3, -1, -1 ] }',
                "says input 'image' is TYPE_UINT8",
            ),
            (
                'max_batch_size: 2 input { name: "image" data_type: TYPE_FP32 dims: [ 4, -1, -1 ] }',
                "the graph's",
            ),
            ("max_batch_size: -1", "max_batch_size must be 0 or above"),
        ],
    )
    def test_one_of_something_else_is_refused(self, file, tmp_path, content, reason):
        with pytest.raises(ExportError, match=reason):
            self.text(tmp_path, file, content)
        assert not (tmp_path / "repo" / "depth").exists()

    def test_it_is_for_files(self, tmp_path, capsys):
        with pytest.raises(SystemExit) as end:
            main(["pack", "--config", str(tmp_path / "x"), "--repository", str(tmp_path)])
        assert end.value.code == 2
        assert "--config is for --onnx" in capsys.readouterr().err
