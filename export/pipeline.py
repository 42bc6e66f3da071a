"""From a pack to the bytes of an engine, and its answers: graph, precision, backend, comparison.

Knows packs, ONNX and the loaders of the server; nothing of repositories.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx

from common.progress import StepCallback
from common.text import one_line, shorten
from export.errors import ExportError
from export.graph import lint, writer
from export.graph.contract import INPUT, Contract
from export.graph.half import to_half
from export.parity import golden, parity
from export.parity.parity import Thresholds
from export.publish import triton_config
from export.quantize import int8, sensitivity
from export.tensorrt import BuildOptions, Plan, build_plan
from export.tensorrt.options import PlanOptions
from networks.base import SegmentationNetwork
from networks.pack import Pack
from runtime.config import EngineConfig
from runtime.engines import load
from runtime.engines.tensorrt.library import TensorRTError
from runtime.errors import Refused

#: Batches that TensorRT optimises an open batch for, unless told otherwise: (min, opt, max).
DEFAULT_BATCHES = (1, 1, 8)


@dataclass(frozen=True)
class Options:
    """How an engine is built.

    size        (height, width); None: the pack's
    batch       frames a call; None: open; (min, opt, max): open, and the range TensorRT optimises for
    opset       ONNX opset
    task        "segmentation", "edges" or "joint"; None: the pack's
    edge_thresholds  from which probability an edge is one: one, or one a class; None: the pack's, else 0.5
    form        how answers are computed from logits (`heads.FORMS`); None: what is faster on the backend
    backend     "onnxruntime", "tensorrt", or "tensorrt-rtx" (`check` only)
    precision   "fp32", "fp16" (tensorrt), "int8"
    thresholds  what parity must reach; None: the precision's own; a mapping: these, the others its own
    frames      golden frames that are compared, at most; a version keeps these
    threads     of the engine that is compared
    calibration uint8 [n,H,W,3] frames for int8; None: the pack's
    int8_frames how many of them
    keep        int8: regular expressions of weights that stay float
    int8_search int8: where parity is missed, find further convolutions that must stay float
    int8_budget seconds that this may take
    refit       tensorrt: mark the weights as replaceable
    plan        tensorrt: how it builds
    """

    size: tuple[int, int] | None = None
    batch: int | tuple[int, int, int] | None = None
    opset: int = writer.DEFAULT_OPSET
    task: str | None = None
    edge_thresholds: float | Sequence[float] | None = None
    form: str | None = None
    backend: str = "onnxruntime"
    precision: str = "fp32"
    thresholds: Thresholds | Mapping[str, float] | None = None
    frames: int = golden.LARGEST
    threads: int = 0
    calibration: np.ndarray | None = None
    int8_frames: int = int8.DEFAULT_COUNT
    keep: tuple[str, ...] = ()
    int8_search: bool = True
    int8_budget: float = sensitivity.BUDGET
    refit: bool = False
    plan: PlanOptions = field(default_factory=PlanOptions)

    @property
    def fixed_batch(self) -> int | None:
        return self.batch if isinstance(self.batch, int) else None


@dataclass(frozen=True)
class Engine:
    """The file of an engine and its entry in the manifest."""

    content: bytes
    facts: dict[str, Any]
    #: Further files of the version.
    beside: dict[str, bytes]


@dataclass(frozen=True)
class Comparison:
    """The parity report and the frames that it was measured on."""

    report: dict[str, Any]
    frames: np.ndarray
    truth: golden.Answers
    answers: golden.Answers
    seconds: float

    def archive(self, precision: str) -> bytes:
        """golden.npz"""
        return golden.archive(self.frames, self.truth, self.answers, precision)


def contract_of(pack: Pack, network: SegmentationNetwork, options: Options) -> Contract:
    """Raises: ExportError."""
    return Contract.of(pack.spec, network, task=options.task, thresholds=options.edge_thresholds)


def make_graph(
    pack: Pack, network: SegmentationNetwork, contract: Contract, options: Options
) -> onnx.ModelProto:
    """Write the pack's float32 ONNX graph and lint it.  Raises ExportError."""
    graph = writer.write(
        network,
        pack.spec,
        size=options.size or pack.spec.size,
        batch=options.fixed_batch,
        opset=options.opset,
        metadata=metadata(pack, contract),
        contract=contract,
        form=options.form or ("per-class" if options.backend == "onnxruntime" else "whole"),
    )
    findings = lint.lint(graph)
    if findings.errors:
        raise ExportError(f"TensorRT's parser would refuse the graph: {'; '.join(findings.errors[:3])}")
    return graph


def make_engine(
    graph: onnx.ModelProto, pack: Pack, contract: Contract, options: Options, progress: StepCallback
) -> Engine:
    """Convert the float32 graph to the precision and the backend of the options.  Raises ExportError."""
    facts: dict[str, Any] = {
        "kind": options.backend,
        "precision": options.precision,
        "file": "model.onnx",
        "opset": options.opset,
        "weights": len(weight_names(graph)),
    }
    tensorrt = options.backend != "onnxruntime"
    encoded = graph
    if options.precision == "int8":
        size = options.size or pack.spec.size
        frames = int8.candidates(pack, size) if options.calibration is None else options.calibration
        compared, _ = golden.frames(pack, size, min(options.frames, golden.limit(contract, size)))
        encoded, facts["int8"] = _in_8_bits(graph, frames, compared, contract, options, progress)
    elif options.precision == "fp16":
        if not tensorrt:
            raise ExportError("fp16 gains nothing on a CPU: use --backend tensorrt, or int8 or fp32 here")
        encoded = to_half(graph)
    content = encoded.SerializeToString()
    if not tensorrt:
        return Engine(content, facts, {})
    plan = _plan(content, weight_names(graph), options, progress)
    facts |= {"file": "model.plan", "plan": plan.manifest()}
    beside = {"model.onnx": content, "layers.json": json.dumps(plan.layers).encode()}
    return Engine(plan.data, facts, beside)


def _in_8_bits(
    graph: onnx.ModelProto,
    frames: np.ndarray,
    compared: np.ndarray,
    contract: Contract,
    options: Options,
    progress: StepCallback,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The quantised graph and its report; what costs too much stays float, unless the search is off.

    `frames` to calibrate on; `compared` are those that parity is measured on in the end.
    """
    how: dict[str, Any] = {
        "classes": len(contract.labels),
        "target": "onnxruntime" if options.backend == "onnxruntime" else "tensorrt",
        "count": options.int8_frames,
        "threads": options.threads or 1,
        "progress": progress,
    }
    if not options.int8_search:
        found = int8.quantise(graph, frames, keep=options.keep, **how)
        return found.model, found.report
    frames, unseen = sensitivity.hold_out(frames)
    unseen = np.concatenate([unseen, compared])
    found = int8.quantise(graph, frames, keep=options.keep, **how)
    limits = parity.wanted("int8", options.thresholds)
    choice = sensitivity.choose(
        graph,
        found.model,
        unseen,
        contract,
        limits,
        threads=options.threads or 1,
        budget=options.int8_budget,
        progress=progress,
    )
    if choice.keep:
        exactly = tuple(f"^{re.escape(name)}$" for name in choice.keep)
        found = int8.quantise(graph, frames, keep=(*options.keep, *exactly), **how)
    return found.model, {**found.report, "search": choice.report}


def _plan(content: bytes, weights: list[str], options: Options, progress: StepCallback) -> Plan:
    batch = options.batch if isinstance(options.batch, tuple) else None
    try:
        return build_plan(
            content,
            BuildOptions(
                **asdict(options.plan),
                precision=options.precision,
                batch=None if options.fixed_batch else batch or DEFAULT_BATCHES,
                refit=tuple(weights) if options.refit else (),
            ),
            backend=options.backend,
            progress=lambda phase, step, steps: progress(phase, step, steps),
        )
    except (TensorRTError, ValueError, OSError) as error:
        raise ExportError(one_line(error)) from error


def configuration(model: str, backend: str, graph: onnx.ModelProto) -> str:
    """config.pbtxt of a graph under the graph contract."""
    inputs, outputs = triton_config.tensors(graph.graph.input), triton_config.tensors(graph.graph.output)
    return triton_config.config(model, backend, inputs, outputs)


def describe(
    pack: Pack, network: SegmentationNetwork, contract: Contract, options: Options
) -> dict[str, Any]:
    """Return the manifest entries of a contract: a refit does not change them."""
    height, width = options.size or pack.spec.size
    facts: dict[str, Any] = {
        "task": contract.task,
        "input": {"height": height, "width": width, "dynamic_batch": options.fixed_batch is None},
        "classes": list(contract.labels),
        # Edges of classes that are not the pack's have no colours there.
        "colours": [list(c) for c in pack.spec.colours] if contract.labels == pack.spec.classes else [],
        "output_stride": network.output_stride,
    }
    if contract.edge_classes:
        facts["edge_classes"] = list(contract.edge_classes)
        facts["edge_thresholds"] = list(contract.thresholds)
    return facts


def metadata(pack: Pack, contract: Contract) -> dict[str, str]:
    """Return the metadata that stays with a graph wherever it is copied to."""
    found = {
        "roadworthy.schema": "1",
        "roadworthy.pack": f"{pack.spec.name} {pack.spec.version}",
        "roadworthy.pack_sha256": pack.sha256,
        "roadworthy.parent": pack.spec.parent,
        "roadworthy.task": contract.task,
        "roadworthy.classes": json.dumps(list(contract.labels)),
        "roadworthy.skeleton": json.dumps(skeleton(pack), sort_keys=True),
    }
    if contract.edge_classes:
        found["roadworthy.edge_classes"] = json.dumps(list(contract.edge_classes))
        found["roadworthy.edge_thresholds"] = json.dumps(list(contract.thresholds))
    return found


def skeleton(pack: Pack) -> dict[str, Any]:
    """What of a pack is in the graph besides its weights: packs that agree here can be refitted."""
    spec = pack.spec
    return {
        "network": spec.network,
        "arguments": spec.arguments,
        "classes": list(spec.classes),
        "edge_classes": list(spec.edge_classes),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "channel_order": spec.channel_order,
    }


def weight_names(graph: onnx.ModelProto) -> list[str]:
    """Initialisers that hold weights; all others are constants of the graph and named so."""
    return [i.name for i in graph.graph.initializer if not i.name.startswith("const.")]


def compare_engine(
    built: Engine,
    pack: Pack,
    network: SegmentationNetwork,
    contract: Contract,
    options: Options,
    progress: StepCallback,
) -> Comparison:
    """An engine file, loaded as the server loads it, beside torch on the golden frames.

    Raises: ExportError: it cannot be loaded, answers what is not finite, or misses a threshold.
    """
    started = time.monotonic()
    size = options.size or pack.spec.size
    frames, origin = golden.frames(pack, size, min(options.frames, golden.limit(contract, size)))
    truth = golden.answers(network, pack.spec, contract, frames, progress)
    answers, milliseconds = _answers(built, contract, options, frames, progress)
    report = parity.compare(answers, truth, contract)
    report["engine_ms"] = milliseconds
    report = parity.judge(report, parity.wanted(str(built.facts["precision"]), options.thresholds))
    report["golden"] = origin
    if not report["passed"]:
        raise ExportError(f"parity with torch is missed: {'; '.join(report['missed'])}")
    return Comparison(report, frames, truth, answers, time.monotonic() - started)


def _answers(
    built: Engine, contract: Contract, options: Options, frames: np.ndarray, progress: StepCallback
) -> tuple[golden.Answers, float]:
    """Return the answers of an engine file and its median milliseconds per call."""
    kind, precision = str(built.facts["kind"]), str(built.facts["precision"])
    # A plan that was built a moment ago may bring its own host code.
    config = EngineConfig(threads=options.threads, host_code=options.plan.version_compatible)
    try:
        engine = load(built.content, kind, precision, config, candidate=False)
    except Refused as error:
        raise ExportError(f"the engine cannot be loaded: {one_line(error)}") from error
    found: dict[str, list[np.ndarray]] = {name: [] for name in contract.compared}
    seconds = []
    batch = options.fixed_batch or 1
    try:
        for index in range(len(frames)):
            progress("engine", index, len(frames))
            # A fixed batch is filled with the same frame: only the first answer counts.
            feed = np.repeat(frames[index : index + 1], batch, axis=0)
            start = time.perf_counter()
            try:
                answer = engine.run({INPUT: feed}, contract.outputs)
            except Exception as error:  # every library raises its own
                why = shorten(error, 200)
                raise ExportError(f"the engine cannot answer golden frame {index}: {why}") from error
            seconds.append(time.perf_counter() - start)
            if not all(np.isfinite(a).all() for a in answer.values() if a.dtype.kind == "f"):
                raise ExportError(f"the engine's answer to golden frame {index} is not finite")
            for name, parts in found.items():
                parts.append(answer[name][0])
    finally:
        engine.close()
    progress("engine", len(frames), len(frames))
    answers = {name: np.stack(parts) for name, parts in found.items()}
    return answers, round(1000 * float(np.median(seconds)), 3)
