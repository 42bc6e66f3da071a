"""Facts about a pack, an engine version or any ONNX file, as JSON values.

They are shapes, sizes, hashes, operators, parity and lineage.  This module reads and never writes.
It works on foreign files as far as they go.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from common.text import one_line, shorten
from export.errors import ExportError
from export.graph.lint import lint
from export.graph.onnx_file import external_tensors, read_onnx
from export.parity.samples import inputs_of, read_inputs, sample_inputs
from networks.pack import PackError, load_pack
from runtime.checks import golden
from runtime.config import EngineConfig
from runtime.engines.cuda.context import CudaError
from runtime.engines.tensorrt.engine import TensorRTEngine
from runtime.engines.tensorrt.library import TensorRTError
from runtime.errors import Refused
from runtime.repository.repository import Repository
from runtime.tensors import DTYPES

__all__ = ["Report", "describe_onnx", "inspect", "rounds_of", "table"]

Report = dict[str, Any]


def inspect(
    path: Path | str, *, lineage: bool = False, profile: bool = False, inputs: Path | str | None = None
) -> Report:
    """Return facts about a pack, a version directory or an ONNX file as JSON values; "kind" is which of them.

    Args:
        lineage: for a version: the origin of its weights, and what became of it.
        profile: run the ONNX graph in ONNX Runtime and add the time of each kind of operator.
        inputs: an .npz of the arrays to run it on; None: random ones.
    Raises:
        ExportError: the path is none of the three, or it is damaged.
    """
    target = Path(path)
    if (target / "model.toml").is_file():
        return inspect_pack(target)
    if (target / "manifest.json").is_file():
        return inspect_version(target, lineage=lineage, profile=profile, inputs=inputs)
    if target.is_file():
        return inspect_onnx(target, profile=profile, inputs=inputs)
    raise ExportError(
        f"{str(target)!r} is no pack (model.toml), no engine version (manifest.json) and no file; "
        "a version is DIR/<model>/<number>"
    )


def inspect_pack(path: Path) -> Report:
    """Return facts about a pack as JSON values.  Raises ExportError if the pack is damaged."""
    try:
        pack = load_pack(path)
    except PackError as error:
        raise ExportError(str(error)) from error
    spec, state = pack.spec, pack.state()
    reference = pack.reference()
    return {
        "kind": "pack",
        "path": str(path),
        "name": spec.name,
        "version": spec.version,
        "sha256": pack.sha256,
        "parent": spec.parent,
        "task": spec.task,
        "network": spec.network,
        "arguments": spec.arguments,
        "classes": list(spec.classes),
        "edge_classes": list(spec.edge_classes),
        "edge_thresholds": list(spec.edge_thresholds),
        "size": list(spec.size),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "channel_order": spec.channel_order,
        "training": spec.training,
        "licence": spec.licence,
        "adaptation": spec.adaptation,
        "weights": len(state),
        "parameters": sum(t.numel() for t in state.values() if t.is_floating_point()),
        "bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "golden": len(pack.golden()),
        "replay": {split: len(pack.replay(split)) for split in ("train", "holdout")},
        "prior": None if (prior := pack.prior()) is None else list(prior.shape),
        "reference": {name: list(array.shape) for name, array in reference.items()},
    }


def inspect_version(
    path: Path, *, lineage: bool = False, profile: bool = False, inputs: Path | str | None = None
) -> Report:
    """Return facts about an engine version as JSON values; see `inspect`.  Raises ExportError."""
    path = path.resolve()
    model, number = path.parent.name, path.name
    if not number.isdigit():
        raise ExportError(f"{str(path)!r} is no version: its name is not a number")
    repository = Repository(path.parent.parent, read_only=True)
    try:
        manifest = repository.manifest(model, int(number))
    except Refused as error:
        raise ExportError(one_line(error)) from error
    try:
        repository.verify(model, int(number))
        damage = ""
    except Refused as error:
        damage = error.reason
    report: Report = {
        "kind": "version",
        "path": str(path),
        "intact": not damage,
        "damage": damage,
        "manifest": manifest,
    }
    graph = path / "model.onnx"  # of a plan too: what it was built from
    if graph.is_file() and not graph.is_symlink():
        try:
            stored = path / golden.INPUTS
            own = stored if stored.is_file() and not stored.is_symlink() else None
            report["onnx"] = inspect_onnx(graph, profile=profile, inputs=inputs or own)
        except ExportError:
            if not damage:
                raise
    if profile and manifest["engine"].get("kind") == "tensorrt":
        report["plan_profile"] = profile_plan(repository, manifest)
    if lineage:
        report["lineage"] = lineage_of(repository, model, manifest)
        report["rounds"] = rounds_of(repository, model)
        report["history"] = [e for e in repository.history(model) if e.get("version") == manifest["version"]]
        report["live"] = repository.live(model)
    return report


def lineage_of(repository: Repository, model: str, manifest: Report) -> list[Report]:
    """Return the pack of this version, then its parents as far as the repository knows them."""
    packs: dict[str, Report] = {}
    for version in reversed(repository.versions(model)):
        try:
            entry = repository.manifest(model, version)
        except Refused:
            continue  # a version that cannot be read tells nothing about the origin of another
        sha = table(entry.get("pack")).get("sha256")
        if isinstance(sha, str) and sha not in packs:
            packs[sha] = {**entry["pack"], "engine_version": version, "created": entry.get("created")}
    chain, seen = [], set()
    current = {
        **table(manifest.get("pack")),
        "engine_version": manifest["version"],
        "created": manifest.get("created"),
    }
    while isinstance(current.get("sha256"), str) and current["sha256"] not in seen:
        chain.append(current)
        seen.add(current["sha256"])
        parent = current.get("parent", "")
        if not parent or not isinstance(parent, str):
            break
        current = packs.get(parent, {"sha256": parent, "name": None, "version": None, "parent": ""})
    return chain


def rounds_of(repository: Repository, model: str) -> list[Report]:
    """Return every version of the model, oldest first, to find the round that broke it.

    Each row has: version, created, round ("" for the released pack), parent, chosen stage, distance from the
    parent, gate ("passed", the names of the checks that failed, or "" if there was no gate), source mIoU and
    agreement with the mirrored answer of candidate and parent, and the last state in the history with its
    check and reason.
    """
    last: dict[int, Report] = {}
    for entry in repository.history(model):
        if entry.get("state") not in (None, "NOTE"):
            last[int(entry.get("version") or 0)] = entry
    rounds = []
    for version in repository.versions(model):
        state = last.get(version, {})
        row: Report = {"version": version, **{k: str(state.get(k, "")) for k in ("state", "check", "reason")}}
        try:
            manifest = repository.manifest(model, version)
        except Refused as error:
            rounds.append({**row, "damage": error.reason})
            continue
        made, gate, pack = (table(manifest.get(key)) for key in ("adaptation", "gate", "pack"))
        measures, failed = table(made.get("measures")), gate.get("failed") or []
        row |= {
            "created": manifest.get("created", ""),
            "round": made.get("round", ""),
            "parent": pack.get("parent", ""),
            "chosen": made.get("chosen", ""),
            "distance": made.get("distance"),
            "gate": "passed" if gate.get("passed") else ", ".join(map(str, failed)),
        }
        for who in ("candidate", "parent"):
            measured = table(measures.get(who))
            row[f"{who}_measures"] = {key: measured.get(key) for key in ("source", "flip", "confidence")}
        rounds.append(row)
    return rounds


def table(value: Any) -> Report:
    """Return a table of a manifest that other programs may have written; {} if it is not a table."""
    return value if isinstance(value, dict) else {}


def inspect_onnx(path: Path, *, profile: bool = False, inputs: Path | str | None = None) -> Report:
    """Return facts about an ONNX file as JSON values.  Raises ExportError if the file is damaged."""
    return describe_onnx(read_onnx(path), path, profile=profile, inputs=inputs)


def describe_onnx(
    model: onnx.ModelProto, path: Path, *, profile: bool = False, inputs: Path | str | None = None
) -> Report:
    """Return facts about a graph that was read from `path`, as JSON values."""
    graph = model.graph
    found = lint(model)
    weights = [i for i in graph.initializer if not i.name.startswith("const.")]
    kinds = Counter(TensorProto.DataType.Name(i.data_type) for i in graph.initializer)
    quantised = any(n.op_type == "QuantizeLinear" for n in graph.node)
    report: Report = {
        "kind": "onnx",
        "path": str(path),
        "bytes": path.stat().st_size,
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "metadata": {p.key: p.value for p in model.metadata_props},
        "inputs": [_value(v) for v in graph.input],
        "outputs": [_value(v) for v in graph.output],
        "nodes": len(graph.node),
        "operators": dict(Counter(n.op_type for n in graph.node).most_common()),
        "initialisers": len(graph.initializer),
        "parameters": sum(math.prod(i.dims) for i in weights),
        "external": external_tensors(model),
        "types": dict(kinds),
        "precision": "int8" if quantised else ("fp16" if kinds.get("FLOAT16") else "fp32"),
        # Weights that keep their names and values can be replaced; quantised ones carry scales with them.
        "refittable": bool(weights) and model.producer_name == "roadworthy" and not quantised,
        "tensorrt": {"errors": found.errors, "warnings": found.warnings},
    }
    if profile:
        report["profile"] = profile_onnx(path, model, inputs=inputs)
    return report


def _value(value: onnx.ValueInfoProto) -> Report:
    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in kind.shape.dim]
    return {"name": value.name, "type": TensorProto.DataType.Name(kind.elem_type), "shape": shape}


def profile_onnx(
    path: Path, model: onnx.ModelProto, runs: int = 5, *, inputs: Path | str | None = None
) -> Report:
    """Return milliseconds per run of each operator, by ONNX Runtime's own profiler on one CPU thread.

    Raises ExportError if the graph does not run.
    """
    import onnxruntime as ort

    feed = sample_inputs(model) if inputs is None else read_inputs(inputs, inputs_of(model))
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 4  # it raises what it logs
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for _ in range(runs):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        except Exception as error:  # onnxruntime raises its own types, all of them RuntimeError-like
            raise ExportError(
                f"{str(path)!r} does not run in ONNX Runtime: {shorten(error, 200)}; "
                "give inputs that it takes, --inputs FILE.npz"
            ) from error
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    total = [e["dur"] for e in events if e.get("name") == "model_run"]
    return {
        "runs": runs,
        "ms": round(float(np.median(total)) / 1000, 3) if total else None,
        "operators_ms": {op: round(us / 1000 / runs, 3) for op, us in spent.most_common()},
    }


def profile_plan(repository: Repository, manifest: Report, runs: int = 10) -> Report:
    """Return milliseconds per layer of a TensorRT version on this machine's device.

    The plan is the one whose hash was verified; a plan with host code is not loaded here.  If the plan cannot
    run here, the answer is {"absent": reason}.
    """
    file = str(manifest["engine"].get("file"))
    try:
        _, files = repository.read(manifest["model"], manifest["version"], keep=(file,))
        config = EngineConfig(device="cuda", concurrency=1)
        with TensorRTEngine.load(files[file], "", config, candidate=True) as engine:
            rng = np.random.default_rng(0)
            feed = {}
            for spec in engine.spec.inputs:
                shape = [abs(size) for size in spec.shape]  # -1 is free: one
                feed[spec.name] = rng.integers(0, 127, shape).astype(DTYPES[spec.datatype])
            return {"runs": runs, "layers_ms": engine.profile(feed, runs)}
    except (Refused, TensorRTError, CudaError) as error:
        return {"absent": one_line(error)}
