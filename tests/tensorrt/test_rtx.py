"""Our builder, with NVIDIA's real parser and builder: TensorRT-RTX on a CPU.  Nothing is executed.

`sys.modules["tensorrt"]` is replaced here, and only here, to send the code of the backend "tensorrt" through
the real library.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest

from export.graph.half import to_half
from export.tensorrt import BuildOptions, Cancelled, build_plan
from export.tensorrt.__main__ import main
from export.tensorrt.monitor import monitor
from runtime.engines.cuda import context
from runtime.engines.tensorrt import library as tensorrt_library
from runtime.engines.tensorrt.library import Library, Log, TensorRTError, logger
from tests.tensorrt.graphs import segmentation

RTX = "tensorrt-rtx"


@pytest.fixture
def substituted(library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """`import tensorrt` gives TensorRT-RTX, and the probe finds a device that is not there."""
    monkeypatch.setitem(sys.modules, "tensorrt", library.module)
    monkeypatch.setattr(context, "probe", lambda: context.Probe((13, 0), ()))
    return library


def onnx(**how: object) -> bytes:
    return segmentation(**how).SerializeToString()  # type: ignore[arg-type]


def test_the_segmentation_contract_parses_and_builds(library: Library) -> None:
    plan = build_plan(onnx(batch=1), backend=RTX)
    assert len(plan.data) > 1000
    assert [(t.name, t.dtype, t.shape) for t in plan.inputs] == [("frame", "UINT8", (1, 32, 64, 3))]
    assert [(t.name, t.dtype, t.shape) for t in plan.outputs] == [
        ("labels", "UINT8", (1, 32, 64)),
        ("confidence", "UINT8", (1, 32, 64)),
    ]
    manifest = plan.manifest()
    assert manifest["checked"] == "parsed and built by TensorRT-RTX on CPU; not executed"
    assert manifest["backend"] == RTX
    assert json.loads(json.dumps(manifest)) == manifest


def test_the_code_of_the_backend_tensorrt_builds_with_the_library_it_imports(substituted: Library) -> None:
    assert tensorrt_library.tensorrt().name == RTX  # told by the module, not by what it was imported as
    plan = build_plan(onnx(), BuildOptions(batch=(1, 2, 4)), backend="tensorrt")
    assert plan.backend == RTX
    assert plan.inputs[0].shape == (-1, 32, 64, 3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("batch", [1, "N"])
def test_precisions_and_batches(library: Library, precision: str, batch: int | str) -> None:
    model = segmentation(batch=batch, qdq=precision == "int8")
    if precision == "fp16":
        model = to_half(model)
    options = BuildOptions(precision=precision, batch=(1, 2, 8) if batch == "N" else None)
    plan = build_plan(model.SerializeToString(), options, backend=RTX)
    assert plan.inputs[0].shape == (-1 if batch == "N" else 1, 32, 64, 3)
    assert [t.dtype for t in (*plan.inputs, *plan.outputs)] == ["UINT8"] * 3


def test_a_free_batch_without_a_range_is_named(library: Library) -> None:
    with pytest.raises(ValueError, match=r"'frame' has the free shape \[-1, 32, 64, 3\].*--batch"):
        build_plan(onnx(), backend=RTX)


def test_options_that_a_cpu_build_cannot_have(library: Library) -> None:
    options = BuildOptions(refit=("stem.weight",), version_compatible=True)
    with pytest.raises(TensorRTError, match="cannot do refit, version_compatible on a CPU"):
        build_plan(onnx(batch=1), options, backend=RTX)


def test_a_graph_the_parser_refuses_names_the_node(library: Library) -> None:
    model = segmentation(batch=1)
    next(node for node in model.graph.node if node.name == "relu").op_type = "Det"
    with pytest.raises(TensorRTError, match=r"cannot parse.*Det.*export\.inspect"):
        build_plan(model.SerializeToString(), backend=RTX)


def test_the_builders_reason_reaches_the_error(library: Library) -> None:
    with pytest.raises(TensorRTError, match=r"could not build the network: .*tactics"):
        build_plan(onnx(batch=1), BuildOptions(workspace=1), backend=RTX)


def test_progress_shows_nested_phases(library: Library) -> None:
    seen: list[tuple[str, int, int]] = []
    build_plan(onnx(batch=1), backend=RTX, progress=lambda *step: seen.append(step))
    assert seen[0][0] == "Building engine"
    assert any(phase.startswith("Building engine / ") for phase, _, _ in seen)
    assert all(0 <= step <= steps for _, step, steps in seen)


def test_progress_can_cancel(library: Library) -> None:
    with pytest.raises(Cancelled):
        build_plan(onnx(batch=1), backend=RTX, progress=lambda *step: False)


def test_what_progress_raises_is_not_swallowed(library: Library) -> None:
    def fail(phase: str, step: int, steps: int) -> None:
        raise KeyError("bar")

    with pytest.raises(TensorRTError, match="progress callback raised KeyError: 'bar'") as caught:
        build_plan(onnx(batch=1), backend=RTX, progress=fail)
    assert isinstance(caught.value.__cause__, KeyError)


def test_building_leaves_the_interpreter_to_others(library: Library) -> None:
    """The binding releases the interpreter lock: a thread keeps running while a plan is built."""
    ticks, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks[0] += 1
            time.sleep(0.0001)

    def during() -> int:
        before = ticks[0]
        build_plan(onnx(batch=1), backend=RTX)
        return ticks[0] - before

    thread = threading.Thread(target=tick)
    thread.start()
    try:  # a build that held the lock would let none or one through, however often it is tried
        assert any(during() >= 5 for _ in range(50))
    finally:
        stop.set()
        thread.join()


def test_ctrl_c_arrives_while_the_library_builds(library: Library) -> None:
    """It is raised inside the callback, whose exceptions TensorRT swallows."""

    def interrupted(phase: str, step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(onnx(batch=1), backend=RTX, progress=interrupted)


def test_marking_weights_refittable_by_their_onnx_names(library: Library) -> None:
    """The names in the network are the ONNX initialisers' own: the contract that refit stands on."""
    trt = library.module
    log = Log()
    keep = logger(library, log)
    builder = trt.Builder(keep)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, keep)
    assert parser.parse(onnx(batch=1))
    for name in ("stem.weight", "stem.bias", "head.weight", "head.bias"):
        assert network.mark_weights_refittable(name)
        assert network.are_weights_marked_refittable(name)
    assert not network.are_weights_marked_refittable("const.mean")


def test_our_callbacks_are_real_subclasses(library: Library) -> None:
    assert isinstance(logger(library, Log()), library.module.ILogger)
    watch = monitor(library, lambda *step: None, [])
    assert isinstance(watch, library.module.IProgressMonitor)
    watch.phase_start("outer", None, 3)
    watch.phase_start("inner", "outer", 2)
    assert watch.step_complete("inner", 0)
    watch.phase_finish("inner")


def test_the_library_is_content_with_our_loggers(library: Library) -> None:
    """It warns of a logger other than the first, and ignores it: whoever made the first must keep it."""
    trt = library.module
    first, second = Log(), Log()
    kept = [trt.Builder(logger(library, log)) for log in (first, second)]
    assert trt.OnnxParser(kept[1].create_network(1), logger(library, second)).parse(b"") in (True, False)
    assert not [line for log in (first, second) for line in log.lines() if "differs from one already" in line]

    class Other(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.heard: list[str] = []

        def log(self, severity: object, msg: str) -> None:
            self.heard.append(msg)

    other = Other()
    kept.append(trt.Builder(other))
    assert any("differs from one already registered" in line for line in other.heard)


def test_a_file_that_is_no_onnx_is_one_line(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for content, says in ((b"nonsense", "not an ONNX file"), (None, "does not exist")):
        source = tmp_path / "model.onnx"
        source.unlink(missing_ok=True)
        if content is not None:
            source.write_bytes(content)
        assert main([str(source), "--backend", RTX, "--out", str(tmp_path / "x.plan")]) == 1
        said = capsys.readouterr().err
        assert says in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_command_builds_a_file(library: Library, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "model.plan"
    source.write_bytes(onnx())
    code = main([str(source), "--backend", RTX, "--batch", "1:2:4", "--out", str(out), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert code == 0
    assert printed["bytes"] == out.stat().st_size
    assert printed["options"]["batch"] == [1, 2, 4]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_command_fails_in_one_line(
    library: Library, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source, out = tmp_path / "model.onnx", tmp_path / "model.plan"
    source.write_bytes(onnx())
    assert main([str(source), "--backend", RTX, "--out", str(out)]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("error: input 'frame' has the free shape")
    assert not out.exists()
