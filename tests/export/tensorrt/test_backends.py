"""export.build with the other precisions and backends."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from PIL import Image

from export.build import Options, build, check, main
from export.errors import ExportError
from export.graph.contract import Contract, ServingGraph
from export.graph.fold import Folding
from export.parity.parity import Thresholds
from export.tensorrt import BuildOptions, Plan
from runtime.engines.tensorrt.library import TensorRTError
from tests.export.conftest import SIZE, street_like


@pytest.fixture
def calibration(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, frame in enumerate(street_like(4, (80, 100))):
        Image.fromarray(frame).save(folder / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def test_int8_is_published_with_its_calibration_in_the_manifest(pack, tmp_path, calibration, capsys):
    # Random weights decide by a hair everywhere, so parity says nothing of quantisation here.
    loose = ["--min-agreement", "0.3", "--min-boundary", "0.1", "--max-confidence", "60"]
    words = [str(pack.path), "--repository", str(tmp_path / "r"), "--precision", "int8", "--threads", "1"]
    assert main([*words, "--calibration", str(calibration), *loose]) == 0
    result = build(
        pack,
        tmp_path / "r",
        options=Options(precision="int8", threads=1, thresholds=Thresholds(0.3, 0.1, 60.0)),
    )
    engine = result.manifest["engine"]
    assert (result.version, engine["precision"]) == (2, "int8")
    assert engine["int8"]
    with np.load(result.path / "golden.npz") as golden:
        expected = {name: golden[name] for name in golden.files}
    # A server asks whether the engine still does what it did, not whether 8 bits are torch.
    session = ort.InferenceSession(result.path / "model.onnx", providers=["CPUExecutionProvider"])
    labels, sure = session.run(["labels", "confidence"], {"frame": expected["frames"]})
    assert (labels == expected["labels"]).mean() > 0.999
    assert np.abs(sure.astype(int) - expected["confidence"]).mean() < 0.1
    with torch.inference_mode():
        truth = ServingGraph(pack.network(), pack.spec)(torch.from_numpy(expected["frames"]))
    assert np.array_equal(expected["torch_labels"], truth[0].numpy())


def test_int8_that_answers_otherwise_is_refused(pack, tmp_path):
    strict = Options(precision="int8", threads=1, thresholds=Thresholds())
    with pytest.raises(ExportError, match=r"int8 misses parity .*label agreement"):
        build(pack, tmp_path / "r", options=strict)
    assert not list(tmp_path.glob("r/*/[0-9]*"))


def test_int8_without_frames_is_refused(make_pack, tmp_path):
    with pytest.raises(ExportError, match="int8 needs calibration frames"):
        build(make_pack(), tmp_path / "r", options=Options(precision="int8"))


@pytest.mark.parametrize("content", [None, "empty", "broken"])
def test_a_calibration_folder_that_holds_no_images_is_refused(pack, tmp_path, capsys, content):
    folder = tmp_path / "frames"
    if content:
        folder.mkdir()
    if content == "broken":
        (folder / "x.png").write_bytes(b"nonsense")
    words = [str(pack.path), "--repository", str(tmp_path / "r"), "--precision", "int8"]
    assert main([*words, "--calibration", str(folder)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_fp16_on_a_cpu_is_refused_with_the_remedy(pack, tmp_path):
    with pytest.raises(ExportError, match="fp16 gains nothing on a CPU: use --backend tensorrt"):
        build(pack, tmp_path / "r", options=Options(precision="fp16"))


def test_tensorrt_without_a_device_is_one_line_and_publishes_nothing(pack, tmp_path, capsys):
    from runtime.engines.cuda import context

    try:
        context.probe()
    except context.CudaError:
        pass
    else:
        pytest.skip("there is a CUDA device here")
    repository = tmp_path / "r"
    assert main([str(pack.path), "--repository", str(repository), "--backend", "tensorrt"]) == 1
    err = capsys.readouterr().err
    assert "TensorRT cannot be used" in err
    assert err.count("\n") == 1
    assert not repository.exists()


def test_tensorrt_rtx_is_never_published(pack, tmp_path):
    with pytest.raises(ExportError, match="built for a check only"):
        build(pack, tmp_path / "r", options=Options(backend="tensorrt-rtx"))


def test_a_plan_is_published_with_its_graph_and_layers(pack, make_pack, tmp_path, monkeypatch):
    """The builder and the engine are stand-ins: what is shown is what becomes of a plan, not TensorRT."""
    from export import pipeline as module
    from export import refit as refitting
    from runtime.engines import load

    graphs = {}

    def plan_of(content, options, *, backend, progress):
        progress("Building engine", 1, 1)
        assert (backend, options.batch, options.precision) == ("tensorrt", (1, 1, 8), "fp32")
        assert "classify.bias" in options.refit
        graphs[b"plan"] = content
        return Plan(b"plan", backend, "tensorrt 11.4", (), (), options.refit, 0.1, {}, (), {"Layers": ["a"]})

    def stand_in(content, kind, precision, config, *, candidate):
        assert kind == "tensorrt"
        return load(graphs[content], "onnxruntime", precision, config, candidate=candidate)

    monkeypatch.setattr(module, "build_plan", plan_of)
    monkeypatch.setattr(module, "load", stand_in)
    result = build(pack, tmp_path / "r", options=Options(backend="tensorrt", refit=True, threads=1))
    assert sorted(result.manifest["files"]) == ["golden.npz", "layers.json", "model.onnx", "model.plan"]
    assert (result.path / "model.plan").read_bytes() == b"plan"
    assert result.manifest["engine"]["plan"]["refittable"]
    assert 'platform: "tensorrt_plan"' in (tmp_path / "r" / "tiny" / "config.pbtxt").read_text()

    adapted = make_pack("adapted", golden=street_like(), seed=3)

    def refitted(plan, weights, *, host_code):
        assert not host_code
        assert plan == b"plan"
        fresh = Folding(adapted.network()).weights(adapted.state())
        assert all(np.array_equal(fresh[name], array) for name, array in weights.items())
        contract = Contract("segmentation", adapted.spec.classes)
        graph = module.make_graph(adapted, adapted.network(), contract, Options())
        graphs[b"new plan"] = graph.SerializeToString()
        return b"new plan"

    monkeypatch.setattr(refitting, "refit_plan", refitted)
    again = refitting.refit(tmp_path / "r", "tiny", 1, adapted, threads=1)
    assert (again.path / "model.plan").read_bytes() == b"new plan"
    assert again.manifest["engine"]["refit_of"] == 1


def test_every_tensorrt_option_reaches_the_builder(pack, tmp_path, monkeypatch, capsys):
    from export import pipeline as module

    asked = []

    def plan_of(content, options, *, backend, progress):
        asked.append(options)
        raise TensorRTError("seen")

    monkeypatch.setattr(module, "build_plan", plan_of)
    words = [str(pack.path), "--repository", str(tmp_path / "r"), "--backend", "tensorrt", "--batch", "1:2:4"]
    words += ["--precision", "fp16", "--timing-cache", "times", "--replay", "--version-compatible"]
    words += ["--hardware", "ampere+", "--optimisation-level", "5", "--workspace", "64"]
    words += ["--dla", "0", "--no-gpu-fallback"]
    assert main([*words, "--refit", "--tf32"]) == 1
    assert capsys.readouterr().err == "error: seen\n"
    (options,) = asked
    assert "classify.bias" in options.refit
    assert options == BuildOptions(
        precision="fp16",
        batch=(1, 2, 4),
        refit=options.refit,
        workspace=64 << 20,
        optimisation_level=5,
        timing_cache=Path("times"),
        replay=True,
        version_compatible=True,
        hardware="ampere+",
        dla=0,
        gpu_fallback=False,
        tf32=True,
    )
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--replay"], "replay needs a timing_cache"),
        (["--workspace", "0"], "workspace is 0 bytes"),
        (["--dla", "-1"], "cores are counted from 0"),
        (["--no-gpu-fallback"], "choose a DLA core"),
        (["--hardware", "pascal"], "invalid choice"),
    ],
)
def test_options_that_cannot_be_are_wrong_usage(pack, words, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(pack.path), "--repository", "r", "--backend", "tensorrt", *words])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_tensorrt_option_for_another_engine_is_wrong_usage(pack, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(pack.path), "--repository", "r", "--tf32"])
    assert stop.value.code == 2
    assert "are for --backend tensorrt" in capsys.readouterr().err


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="no TensorRT-RTX wheel here"
)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("batch", [None, 2, (1, 2, 4)])
def test_tensorrt_rtx_parses_and_builds_the_graph(pack, precision, batch):
    result = check(pack, options=Options(precision=precision, batch=batch, threads=1))
    tensors = {t["name"]: (t["dtype"], t["shape"]) for t in result.plan["inputs"] + result.plan["outputs"]}
    lead = batch if isinstance(batch, int) else -1
    assert tensors["frame"] == ("UINT8", [lead, *SIZE, 3])
    assert tensors["labels"] == ("UINT8", [lead, *SIZE])
    assert result.plan["checked"] == "parsed and built by TensorRT-RTX on CPU; not executed"
    assert (result.parity is None) == (precision != "fp32")
    assert np.isfinite(result.plan["seconds"])
