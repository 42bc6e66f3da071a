"""From a pack to a published version, and every way in which it must not be published."""

from __future__ import annotations

import errno
import hashlib
import json
import os

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from google.protobuf import text_format

from export import build as module
from export.build import Options, build, main
from export.errors import ExportError
from export.graph.contract import ServingGraph
from export.parity import parity
from runtime.repository.repository import Repository

from .conftest import SIZE, street_like


@pytest.fixture
def repository(tmp_path):
    return tmp_path / "repo"


def published(repository):
    return [p for p in repository.rglob("*") if p.is_file()] if repository.exists() else []


def test_a_version_appears_with_everything_the_manifest_promises(pack, repository):
    result = build(pack, repository, adaptation={"round": 3}, gate={"passed": True})
    home = Repository(repository)
    manifest = home.verify("tiny", 1)
    assert (result.model, result.version, result.path) == ("tiny", 1, repository / "tiny" / "1")
    assert manifest["task"] == "segmentation"
    assert manifest["engine"] == {
        "kind": "onnxruntime",
        "precision": "fp32",
        "file": "model.onnx",
        "opset": 18,
        "weights": manifest["engine"]["weights"],
    }
    assert manifest["input"] == {"height": 64, "width": 96, "dynamic_batch": True}
    assert manifest["classes"] == list(pack.spec.classes)
    assert manifest["output_stride"] == 4
    assert manifest["pack"] == {"name": "tiny", "version": "1.0.0", "sha256": pack.sha256, "parent": ""}
    assert (manifest["adaptation"], manifest["gate"]) == ({"round": 3}, {"passed": True})
    assert manifest["parity"]["passed"]
    assert manifest["parity"]["golden"] == "pack"
    assert manifest["libraries"]["torch"] == torch.__version__
    content = (result.path / "model.onnx").read_bytes()
    assert manifest["files"]["model.onnx"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert (repository / "tiny" / "labels.txt").read_text().split() == list(pack.spec.classes)


def test_the_golden_file_holds_torchs_answers(pack, repository):
    result = build(pack, repository)
    with np.load(result.path / "golden.npz") as golden:
        frames, labels, confidence = golden["frames"], golden["labels"], golden["confidence"]
    assert np.array_equal(frames, pack.golden())
    with torch.inference_mode():
        wanted = ServingGraph(pack.network(), pack.spec)(torch.from_numpy(frames))
    assert np.array_equal(labels, wanted[0].numpy())
    assert np.array_equal(confidence, wanted[1].numpy())


def test_the_published_file_answers_like_torch(pack, repository):
    result = build(pack, repository)
    session = ort.InferenceSession(result.path / "model.onnx", providers=["CPUExecutionProvider"])
    x = street_like(2)[:, ::-1].copy()
    labels, confidence, probabilities = session.run(["labels", "confidence", "probabilities"], {"frame": x})
    with torch.inference_mode():
        wanted = [y.numpy() for y in ServingGraph(pack.network(), pack.spec)(torch.from_numpy(x))]
    assert (labels == wanted[0]).mean() > 0.999
    assert np.abs(confidence.astype(int) - wanted[1]).max() <= 1
    assert np.allclose(probabilities, wanted[2], atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["roadworthy.pack_sha256"] == pack.sha256


def test_versions_count_up_and_stay(pack, repository):
    first = build(pack, repository)
    digest = Repository(repository).manifest("tiny", 1)["digest"]
    second = build(pack, repository, options=Options(batch=1, opset=17), size=(32, 64))
    assert (first.version, second.version) == (1, 2)
    assert Repository(repository).verify("tiny", 1)["digest"] == digest
    assert second.manifest["input"] == {"height": 32, "width": 64, "dynamic_batch": False}
    assert second.manifest["parity"]["golden"] == "pack, resized"


def test_a_pack_without_golden_frames_is_compared_on_synthetic_ones(make_pack, repository):
    result = build(make_pack(), repository)
    assert result.manifest["parity"]["golden"] == "synthetic"
    assert result.manifest["parity"]["frames"] == 2


def test_bgr_and_another_normalisation_reach_the_graph(make_pack, repository):
    pack = make_pack(golden=street_like(), channel_order="bgr", mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    assert build(pack, repository).manifest["parity"]["agreement"] > 0.999


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_tritons_own_schema_reads_the_configuration(pack, repository, batch):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    build(pack, repository, options=Options(batch=batch))
    config = text_format.Parse((repository / "tiny" / "config.pbtxt").read_text(), schema.ModelConfig())
    assert (config.name, config.backend, config.platform) == ("tiny", "onnxruntime", "onnxruntime_onnx")
    lead = [] if batch is None else [batch]
    assert config.max_batch_size == (8 if batch is None else 0)
    assert list(config.input[0].dims) == [*lead, *SIZE, 3]
    assert config.input[0].data_type == schema.TYPE_UINT8
    found = {o.name: (o.data_type, list(o.dims)) for o in config.output}
    assert found == {
        "labels": (schema.TYPE_UINT8, [*lead, *SIZE]),
        "confidence": (schema.TYPE_UINT8, [*lead, *SIZE]),
        "probabilities": (schema.TYPE_FP32, [*lead, 12, SIZE[0] // 4, SIZE[1] // 4]),
    }


def test_progress_names_every_stage(pack, repository):
    seen = []
    build(pack, repository, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["graph", "torch", "engine", "publish"]
    assert all((s == "graph") or d <= t for s, d, t in seen)


class TestWhatIsNotPublished:
    def refused(self, repository, words, *arguments, **keywords):
        before = published(repository)
        with pytest.raises(ExportError, match=words) as caught:
            build(*arguments, **keywords)
        assert "\n" not in str(caught.value)
        assert published(repository) == before

    def test_an_engine_that_answers_otherwise(self, pack, repository, monkeypatch):
        honest = module.make_graph

        def altered(*arguments):
            graph = honest(*arguments)
            for initialiser in graph.graph.initializer:
                if initialiser.name == "classify.bias":
                    values = onnx.numpy_helper.to_array(initialiser).copy()
                    values[0] += 3
                    initialiser.CopyFrom(onnx.numpy_helper.from_array(values, initialiser.name))
            return graph

        monkeypatch.setattr(module, "make_graph", altered)
        self.refused(repository, "parity with torch is missed: label agreement", pack, repository)

    def test_a_threshold_that_cannot_be_met(self, pack, repository):
        strict = Options(thresholds=parity.Thresholds(agreement=1.1))
        self.refused(repository, r"is below 1\.1", pack, repository, options=strict)

    def test_a_size_the_network_cannot_take(self, pack, repository):
        self.refused(repository, "size 65x96 must be a multiple of 32", pack, repository, size=(65, 96))

    def test_an_opset_too_new(self, pack, repository):
        self.refused(repository, "opset 99", pack, repository, options=Options(opset=99))

    def test_a_model_name_that_leaves_the_repository(self, pack, repository):
        self.refused(repository, "model name '../x'", pack, repository, model="../x")

    def test_a_repository_that_is_a_file(self, pack, tmp_path):
        file = tmp_path / "file"
        file.write_text("x")
        self.refused(tmp_path, "cannot be written", pack, file)

    def test_a_disk_that_fills_in_mid_write(self, pack, repository, monkeypatch):
        build(pack, repository)

        def full(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        self.refused(repository, "No space left on device; nothing was published", pack, repository)
        monkeypatch.undo()
        assert Repository(repository).versions("tiny") == [1]
        Repository(repository).verify("tiny", 1)


class TestCommandLine:
    def test_json(self, pack, repository, capsys):
        assert (
            main(
                [
                    str(pack.path),
                    "--repository",
                    str(repository),
                    "--model",
                    "road",
                    "--threads",
                    "1",
                    "--json",
                ]
            )
            == 0
        )
        answer = json.loads(capsys.readouterr().out)
        assert (answer["model"], answer["version"]) == ("road", 1)
        assert answer["manifest"]["parity"]["passed"]

    def test_for_a_person(self, pack, repository, capsys):
        assert main([str(pack.path), "--repository", str(repository), "--batch", "1"]) == 0
        out = capsys.readouterr().out
        assert "tiny version 1" in out
        assert "parity with torch on 3 golden frames (pack)" in out

    def test_a_broken_pack_is_one_line_and_exit_code_1(self, tmp_path, repository, capsys):
        assert main([str(tmp_path), "--repository", str(repository)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: pack ")
        assert err.count("\n") == 1
        assert published(repository) == []

    def test_missed_parity_is_exit_code_1(self, pack, repository, capsys):
        assert main([str(pack.path), "--repository", str(repository), "--min-agreement", "1.5"]) == 1
        assert "parity with torch is missed" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "words",
        [
            ["--size", "64"],
            ["--batch", "0"],
            ["--batch", "x"],
            ["--precision", "fp8"],
            ["--threads", "-3"],
            ["--min-agreement", "nan"],
            ["--golden-frames", "0"],
            ["--golden-frames", "9"],
        ],
    )
    def test_wrong_usage_is_exit_code_2(self, pack, repository, words):
        with pytest.raises(SystemExit) as stop:
            main([str(pack.path), "--repository", str(repository), *words])
        assert stop.value.code == 2

    def test_help_reads_like_a_manual_page(self, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
        assert "examples:" in text
        assert "exit codes:" in text
