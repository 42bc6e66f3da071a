"""Put somebody's ONNX file into a repository as it is: served, versioned and swapped, without our contract.

Such a version has no golden frames and no classes we know of, so what the guard can check is less: it
loads, runs, answers finite numbers and promises the same tensors as the version before it.  A graph whose
tensors are those of our contract is served as a segmentation engine; its golden frames are synthetic, and
the answers to them are those of ONNX Runtime without any optimisation.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from export.errors import ExportError, one_line
from export.files import read_file
from export.graph.contract import Contract
from export.inspect import describe_onnx, external, parse_onnx, sample_inputs
from export.parity import golden, parity
from export.publish import triton_config
from export.publish.publish import Published, libraries, model_name, publish
from runtime.checks.task import recognise
from runtime.config import EngineConfig
from runtime.engines import load
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import Refused

if TYPE_CHECKING:
    from runtime.repository.repository import Repository

#: Seconds that a graph may take for one answer; one that loops for ever is given up then.
LONGEST = 300.0


def publish_onnx(
    file: Path | str,
    repository: Path | str | Repository,
    name: str,
    *,
    labels: list[str] | None = None,
    size: tuple[int, int] | None = None,
    config: Path | str | None = None,
) -> Published:
    """Check an ONNX file, run it once on made-up inputs, and publish it.

    Args:
        labels: class names for labels.txt.
        size: sides of the made-up image where the graph leaves them open; None: 256x256.
        config: somebody's own config.pbtxt (batching, queues, priorities); the graph says what it leaves out.
    Raises:
        ExportError: no ONNX, a configuration of something else, weights in other files, an invalid graph,
            one that ONNX Runtime refuses or whose answers are not finite.
    """
    path, model = Path(file), model_name(name)
    content = read_file(path)  # once: what is looked at is what is published
    graph = parse_onnx(content, path)
    if outside := external(graph):
        raise ExportError(
            f"{str(path)!r} keeps {len(outside)} weights in other files; a version is one file: "
            "save it with onnx.save(onnx.load(FILE), NEW)"
        )
    newest = onnx.defs.onnx_opset_version()
    opset = next((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset > newest:
        raise ExportError(
            f"{str(path)!r} is of opset {opset}, the newest known here is {newest}: "
            "export it with an older opset, or install a newer onnx and onnxruntime"
        )
    try:
        onnx.checker.check_model(graph)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{str(path)!r} is not a valid graph: {one_line(error)[:200]}") from error
    known = {i.name for i in graph.graph.initializer}
    inputs = triton_config.tensors([v for v in graph.graph.input if v.name not in known])
    outputs = triton_config.tensors(graph.graph.output)
    if not inputs or not outputs:
        raise ExportError(f"{str(path)!r} has no input or no output")
    described = triton_config.config(model, "onnxruntime", inputs, outputs)
    if config is not None:
        described = triton_config.merged(golden.read_text(Path(config)), str(config), described)
    seconds, contract = _run_once(content, graph, size)
    facts = describe_onnx(graph, path)
    manifest: dict[str, Any] = {
        "task": "foreign",
        "engine": {
            "kind": "onnxruntime",
            "precision": facts["precision"],
            "file": "model.onnx",
            "opset": facts["opsets"].get("ai.onnx", 0),
        },
        "input": {t.name: {"type": t.type, "shape": list(t.shape)} for t in inputs},
        "classes": labels or [],
        "colours": [],
        "pack": {},
        "adaptation": {},
        "gate": {},
        "parity": {"frames": 0, "agreement": None, "engine_ms": round(1000 * seconds, 3)},
        "source": {"file": path.name, "producer": facts["producer"], "tensorrt": facts["tensorrt"]},
        "libraries": libraries(),
    }
    files = {"model.onnx": content}
    if contract:
        manifest |= {"task": "segmentation", "colours": [[0, 0, 0]] * len(labels or [])}
        files["golden.npz"], report = _golden(content, graph, labels, size)
        manifest["parity"] = {**report, "engine_ms": round(1000 * seconds, 3)}
    return publish(repository, model, files, manifest, described, labels)


def _golden(
    content: bytes, graph: onnx.ModelProto, labels: list[str] | None, size: tuple[int, int] | None
) -> tuple[bytes, dict[str, Any]]:
    """golden.npz and the parity report of a graph under our contract."""
    import onnxruntime as ort

    if not labels:
        raise ExportError("the graph has our contract's outputs: name its classes, --labels FILE, one a line")
    dims = [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim]
    frames = golden.synthetic((dims[1] or (size or (256, 256))[0], dims[2] or (size or (256, 256))[1]))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    plain = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    engine = load(content, "onnxruntime", "fp32", EngineConfig(threads=1), candidate=False)
    contract, batch = Contract("segmentation", tuple(labels)), dims[0] or 1
    truth: dict[str, list[np.ndarray]] = {name: [] for name in contract.compared}
    answers: dict[str, list[np.ndarray]] = {name: [] for name in contract.compared}
    for frame in frames:
        feed = {"frame": np.repeat(frame[None], batch, axis=0)}
        given = engine.run(feed, contract.compared)
        for name, wanted in zip(contract.compared, plain.run(list(contract.compared), feed), strict=True):
            truth[name].append(wanted[0])
            answers[name].append(given[name][0])
    engine.close()
    expected, found = ({k: np.stack(v) for k, v in side.items()} for side in (truth, answers))
    top = int(expected["labels"].max())
    if top >= len(labels):
        raise ExportError(f"the graph answers class {top}, --labels names {len(labels)}")
    report = parity.judge(parity.compare(found, expected, contract), parity.DEFAULTS["fp32"])
    report |= {"golden": "synthetic", "reference": "onnxruntime without optimisation"}
    if not report["passed"]:
        raise ExportError(f"ONNX Runtime optimised answers otherwise: {'; '.join(report['missed'])}")
    return golden.archive(frames, expected, found, "fp32"), report


def _run_once(content: bytes, graph: onnx.ModelProto, size: tuple[int, int] | None) -> tuple[float, bool]:
    """(seconds of a run on made-up inputs, whether the tensors are those of our contract)."""
    feed = sample_inputs(graph, size or (256, 256))
    names = [o.name for o in graph.graph.output]
    try:
        engine = OnnxRuntimeEngine.load(content, "fp32", EngineConfig(threads=1), candidate=False)
    except Refused as error:
        raise ExportError(f"ONNX Runtime refuses the graph: {one_line(error)}") from error
    try:
        start = time.perf_counter()
        answers = engine.run(feed, names, limit=LONGEST)
        seconds = time.perf_counter() - start
    except Exception as error:  # onnxruntime raises types of its own
        if time.perf_counter() - start >= LONGEST:
            why = f"the graph did not answer within {LONGEST:g} s"
            raise ExportError(f"{why}: a loop without an end?") from error
        raise ExportError(
            f"the graph does not run on made-up inputs { ({k: list(v.shape) for k, v in feed.items()}) }: "
            f"{one_line(error)[:200]}; give --size where its sides are open"
        ) from error
    finally:
        engine.close()
    for name, answer in answers.items():
        if np.issubdtype(answer.dtype, np.floating) and not np.isfinite(answer).all():
            raise ExportError(
                f"output {name!r} is not finite on made-up inputs; the file is damaged or needs --size"
            )
    return seconds, bool(recognise(engine.spec))
