"""What is in a pack, an engine version or any ONNX file: shapes, sizes, hashes, operators, parity, lineage.

    python -m export.inspect repo/road/3 --lineage

Reads and never writes.  Works on foreign files as far as they go.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto

from export.errors import ExportError, one_line
from export.files import read_file
from export.graph.functions import check_functions
from export.graph.lint import lint
from export.parity.samples import inputs_of, read_inputs, sample_inputs
from networks.command import finish
from networks.pack.pack import PackError, load_pack
from runtime.checks import golden
from runtime.config import EngineConfig
from runtime.engines.cuda.context import CudaError
from runtime.engines.tensorrt.engine import TensorRTEngine
from runtime.engines.tensorrt.library import TensorRTError
from runtime.errors import Refused
from runtime.repository.repository import Repository
from runtime.tensors import DTYPES

Report = dict[str, Any]


def inspect(
    path: Path | str, *, lineage: bool = False, profile: bool = False, inputs: Path | str | None = None
) -> Report:
    """Facts about a pack, a version directory or an ONNX file, as JSON values; "kind" says which.

    Args:
        lineage: for a version: where its weights come from, and what became of it.
        profile: run the ONNX graph in ONNX Runtime and add the time of each kind of operator.
        inputs: an .npz of the arrays to run it on; None: made-up ones.
    Raises:
        ExportError: none of the three, or one that is damaged.
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
        report["lineage"] = _lineage(repository, model, manifest)
        report["rounds"] = _rounds(repository, model)
        report["history"] = [e for e in repository.history(model) if e.get("version") == manifest["version"]]
        report["live"] = repository.live(model)
    return report


def _lineage(repository: Repository, model: str, manifest: Report) -> list[Report]:
    """This version's pack first, then its parents as far as the repository knows them."""
    packs: dict[str, Report] = {}
    for version in reversed(repository.versions(model)):
        try:
            entry = repository.manifest(model, version)
        except Refused:
            continue  # a version that cannot be read has no say in where another comes from
        sha = _table(entry.get("pack")).get("sha256")
        if isinstance(sha, str) and sha not in packs:
            packs[sha] = {**entry["pack"], "engine_version": version, "created": entry.get("created")}
    chain, seen = [], set()
    current = {
        **_table(manifest.get("pack")),
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


def _rounds(repository: Repository, model: str) -> list[Report]:
    """Every version of the model, oldest first: which round broke it?

    Of each: version, created, round ("" = the released pack), parent, chosen stage, distance from the parent,
    gate ("passed", the names of what failed, or "" where there was none), source mIoU and agreement with the
    mirrored answer of candidate and parent, and the last state the history knows, with its check and reason.
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
        made, gate, pack = (_table(manifest.get(key)) for key in ("adaptation", "gate", "pack"))
        measures, failed = _table(made.get("measures")), gate.get("failed") or []
        row |= {
            "created": manifest.get("created", ""), "round": made.get("round", ""),
            "parent": pack.get("parent", ""), "chosen": made.get("chosen", ""),
            "distance": made.get("distance"),
            "gate": "passed" if gate.get("passed") else ", ".join(map(str, failed)),
        }  # fmt: skip
        for who in ("candidate", "parent"):
            told = _table(measures.get(who))
            row[f"{who}_measures"] = {key: told.get(key) for key in ("source", "flip", "confidence")}
        rounds.append(row)
    return rounds


def _table(value: Any) -> Report:
    """A table of a manifest that others may have written; {} where it is none."""
    return value if isinstance(value, dict) else {}


def inspect_onnx(path: Path, *, profile: bool = False, inputs: Path | str | None = None) -> Report:
    return describe_onnx(read_onnx(path), path, profile=profile, inputs=inputs)


def describe_onnx(
    model: onnx.ModelProto, path: Path, *, profile: bool = False, inputs: Path | str | None = None
) -> Report:
    """`inspect_onnx` of a graph that was read from `path`."""
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
        "external": external(model),
        "types": dict(kinds),
        "precision": "int8" if quantised else ("fp16" if kinds.get("FLOAT16") else "fp32"),
        # Weights that keep their names and values can be replaced; quantised ones carry scales with them.
        "refittable": bool(weights) and model.producer_name == "roadworthy" and not quantised,
        "tensorrt": {"errors": found.errors, "warnings": found.warnings},
    }
    if profile:
        report["profile"] = profile_onnx(path, model, inputs=inputs)
    return report


def read_onnx(path: Path) -> onnx.ModelProto:
    """The graph alone; weights in other files are not looked for.  Raises: ExportError."""
    return parse_onnx(read_file(path), path)


def parse_onnx(content: bytes, path: Path) -> onnx.ModelProto:
    """The graph in the bytes of `path`.  Raises: ExportError for a file that is no ONNX graph."""
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{str(path)!r} is not an ONNX file: {one_line(error)[:160]}") from error
    if not _is_text(model):
        raise ExportError(f"{str(path)!r} is damaged: it holds names that are not UTF-8")
    if not model.graph.node or not model.opset_import:
        raise ExportError(f"{str(path)!r} is not an ONNX file: it holds no graph")
    try:
        check_functions(model)
    except ExportError as error:
        raise ExportError(f"{str(path)!r} cannot be read: {error}") from error
    return model


def _is_text(message: Message) -> bool:
    """Whether every text in it is one; protobuf lets others through."""
    try:
        fields = message.ListFields()
    except UnicodeDecodeError:
        return False
    for field, value in fields:
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        repeated = not isinstance(value, (str, bytes, Message))
        for one in value if repeated else [value]:
            if isinstance(one, bytes) or (isinstance(one, Message) and not _is_text(one)):
                return False
    return True


def external(model: onnx.ModelProto) -> list[str]:
    """Names of the tensors whose values are in other files: initialisers, constants, those of subgraphs."""
    graphs = [model.graph]
    found: list[str] = []
    for graph in graphs:  # grows: subgraphs are looked at in their turn
        held = [*graph.initializer, *(t for s in graph.sparse_initializer for t in (s.values, s.indices))]
        for node in (*graph.node, *(n for f in model.functions for n in f.node if graph is model.graph)):
            for a in node.attribute:
                sparse = [a.sparse_tensor, *a.sparse_tensors]
                held += [a.t, *a.tensors, *(t for s in sparse for t in (s.values, s.indices))]
                graphs += [g for g in (a.g, *a.graphs) if g.node or g.initializer]
        found += [t.name for t in held if t.data_location == TensorProto.EXTERNAL or t.external_data]
    return found


def _value(value: onnx.ValueInfoProto) -> Report:
    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else (d.dim_param or "?") for d in kind.shape.dim]
    return {"name": value.name, "type": TensorProto.DataType.Name(kind.elem_type), "shape": shape}


def profile_onnx(
    path: Path, model: onnx.ModelProto, runs: int = 5, *, inputs: Path | str | None = None
) -> Report:
    """Milliseconds a run by operator, from ONNX Runtime's own profiler on one CPU thread."""
    import onnxruntime as ort

    feed = sample_inputs(model) if inputs is None else read_inputs(inputs, inputs_of(model))
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 4  # what it says it also raises
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            for _ in range(runs):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text())
        except Exception as error:  # onnxruntime raises its own types, all of them RuntimeError-like
            raise ExportError(
                f"{str(path)!r} does not run in ONNX Runtime: {one_line(error)[:200]}; "
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
    """Milliseconds a layer of a TensorRT version on this machine's device, or {"absent": why there are none}.

    The plan is the one whose hash was verified; one with host code is not loaded here.
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


# -- for a person -------------------------------------------------------------------------------------


def show(report: Report) -> str:
    shower: Callable[[Report], list[str]] = {
        "pack": _show_pack,
        "version": _show_version,
        "onnx": _show_onnx,
    }[report["kind"]]
    try:
        return "\n".join(shower(report))
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ExportError(
            f"{report['path']}: its manifest is not as export.build writes it ({one_line(error)}); see --json"
        ) from error


def _show_pack(r: Report) -> list[str]:
    lines = [
        f"pack {r['name']} {r['version']}  {r['path']}",
        f"  sha256      {r['sha256']}",
        f"  parent      {r['parent'] or '-'}",
        f"  network     {r['network']} {r['arguments']}, {r['parameters']:,} parameters",
        f"  input       {r['size'][0]}x{r['size'][1]} {r['channel_order']}, mean {r['mean']}, std {r['std']}",
        f"  task        {r['task']}",
        f"  classes     {len(r['classes'])}: {', '.join(r['classes'])}",
        f"  golden      {r['golden']} frames",
        f"  replay      {r['replay']['train']} to train on, {r['replay']['holdout']} held out",
        f"  statistics  prior {r['prior'] or '-'}, reference {', '.join(r['reference']) or '-'}",
        f"  training    {r['training'] or '-'}",
        f"  licence     {r['licence'] or '-'}",
    ]
    if r["adaptation"]:
        lines.append(f"  adaptation  {json.dumps(r['adaptation'])[:200]}")
    return lines


def _show_version(r: Report) -> list[str]:
    m = r["manifest"]
    engine, pack, parity = m["engine"], _table(m.get("pack")), _table(m.get("parity"))
    lines = [
        f"{m['model']} version {m['version']}  {r['path']}",
        f"  files       {'intact' if r['intact'] else 'DAMAGED: ' + r['damage']}",
        f"  created     {m.get('created', '-')}",
        f"  engine      {engine.get('kind')} {engine.get('precision')}, opset {engine.get('opset')}",
        f"  pack        {pack.get('name', '-')} {pack.get('version', '')}  {str(pack.get('sha256', ''))[:12]}"
        f"  parent {str(pack.get('parent', ''))[:12] or '-'}",
    ]
    size = _table(m.get("input"))
    if "height" in size:
        batch = "open" if size.get("dynamic_batch") else "fixed"
        lines.append(f"  task        {m.get('task')}, {size['height']}x{size['width']}, batch {batch}")
    names, limits = m.get("edge_classes") or [], m.get("edge_thresholds") or []
    if names:
        shown = (f"{name} {limit:g}" for name, limit in zip(names, limits, strict=False))
        lines.append(f"  edges       {len(names)}: {', '.join(shown)}")
    if parity.get("frames"):
        verdict = "passed" if parity.get("passed") else "MISSED"
        parts = []
        if parity.get("agreement") is not None:
            parts.append(f"labels {100 * parity['agreement']:.4f} %")
            parts.append(f"confidence {parity['confidence_mean']:.4f} of 255")
        if "bits_equal" in parity:
            parts.append(f"bit fields {100 * parity['bits_equal']:.4f} %")
            parts.append(f"edges {parity['edges_max_difference']} of 255 at most")
        where = f"{parity['frames']} frames ({parity.get('golden')})"
        lines.append(f"  parity      {verdict}: {', '.join(parts)}, {where}")
    for name, entry in sorted(m["files"].items()):
        lines.append(f"  {name:<16}{entry['bytes']:>12,} bytes  {entry['sha256'][:12]}")
    if r.get("live") is not None:
        lines.append(f"  live        version {r['live'].get('live')}, previous {r['live'].get('previous')}")
    for depth, entry in enumerate(r.get("lineage", [])):
        where = (
            f"engine version {entry['engine_version']}"
            if "engine_version" in entry
            else "not in this repository"
        )
        name = f"{entry.get('name') or 'unknown'} {entry.get('version') or ''}".strip()
        lines.append(
            f"  {'lineage' if not depth else '':<10}  {'  ' * depth}{name} {entry['sha256'][:12]} ({where})"
        )
    for row in r.get("rounds", []):
        lines.append(f"  round       {_show_round(row)}"[:200])
    for entry in r.get("history", []):
        lines.append(f"  history     {json.dumps(entry)[:160]}")
    if "onnx" in r:
        lines += _show_onnx(r["onnx"])
    if plan := engine.get("plan"):
        count = len(plan.get("refittable") or ())
        lines.append(f"  plan        {plan.get('library')}, {count} weights can be refitted")
    if found := r.get("plan_profile"):
        said = f"not timed: {found['absent']}" if "absent" in found else "ms a run"
        lines.append(f"  layers      {said}")
        lines += [f"    {row['layer']:<56}{row['milliseconds']:>10.4f}" for row in found.get("layers_ms", [])]
    return lines


def _show_round(row: Report) -> str:
    """One line: what it came from, what its gate measured, what became of it."""
    words = [f"version {row['version']}", row["state"] or "never submitted"]
    words += [part for part in (row["check"], row["reason"]) if part]
    if "damage" in row:
        return ", ".join([*words, f"damaged: {row['damage']}"])
    if not row["round"]:
        return ", ".join([*words, "the released pack" if not row["parent"] else "no round"])
    words.append(f"round {str(row['round'])[:12]} ({row['chosen']}), gate {row['gate'] or 'unknown'}")
    before, after = row["parent_measures"], row["candidate_measures"]
    for key, name in (("source", "source mIoU"), ("flip", "mirrored")):
        if before[key] is not None and after[key] is not None:
            words.append(f"{name} {100 * before[key]:.1f} -> {100 * after[key]:.1f}")
    if row["distance"] is not None:
        words.append(f"moved {100 * row['distance']:.1f}%")
    return ", ".join(words)


def _show_onnx(r: Report) -> list[str]:
    opsets = ", ".join(f"{domain} {version}" for domain, version in r["opsets"].items())
    lines = [
        f"onnx {r['path']}",
        f"  graph       {r['nodes']} nodes, {r['parameters']:,} parameters, {r['precision']}",
        f"  size        {r['bytes']:,} bytes",
        f"  opset       {opsets}; IR {r['ir_version']}; by {r['producer'] or '-'}",
    ]
    for side in ("inputs", "outputs"):
        for value in r[side]:
            lines.append(f"  {side[:-1]:<10}  {value['name']}: {value['type']} {value['shape']}")
    if r["external"]:
        lines.append(f"  external    {len(r['external'])} tensors in other files, first {r['external'][0]!r}")
    lines.append("  operators   " + ", ".join(f"{op} {n}" for op, n in r["operators"].items()))
    lines.append(f"  refit       {'by name' if r['refittable'] else 'no: build again'}")
    errors, warnings = r["tensorrt"]["errors"], r["tensorrt"]["warnings"]
    verdict = "its parser refuses:" if errors else "nothing in it that its parser is known to refuse"
    lines.append(f"  tensorrt    {verdict}")
    lines += [f"    error: {text}" for text in errors] + [f"    warning: {text}" for text in warnings]
    if "profile" in r:
        lines.append(f"  profile     {r['profile']['ms']} ms a run on one thread")
        lines += [f"    {op:<24}{ms:>10.3f} ms" for op, ms in r["profile"]["operators_ms"].items()]
    return lines


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m export.inspect",
        description="Say what is in a model pack, an engine version or any ONNX file: shapes, types, sizes, "
        "hashes, operators, the parity report, whether it can be refitted, and what of it TensorRT's parser "
        "is known to refuse.",
        epilog="""examples:
  python -m export.inspect packs/city
  python -m export.inspect repo/road/3 --lineage
  python -m export.inspect somebody.onnx --profile --json

exit codes: 0 read and intact, 1 unreadable or damaged (one line on stderr says why), 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("path", metavar="PACK|VERSION_DIR|FILE.onnx")
    result.add_argument(
        "--lineage", action="store_true", help="where a version's weights come from, and its history"
    )
    timed = "run it and show the time of each operator, and of each layer of a TensorRT plan (a plan is code)"
    result.add_argument("--profile", action="store_true", help=timed)
    given = "with --profile: run it on these arrays, one for each input, as numpy.savez writes them"
    result.add_argument("--inputs", type=Path, metavar="FILE.npz", help=given)
    result.add_argument("--json", action="store_true", help="print one JSON object")
    return result


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    if args.inputs and not args.profile:
        command.error("--inputs is for --profile; nothing else is run")
    return finish(lambda: _run(args), (ExportError,))


def _run(args: argparse.Namespace) -> int:
    report = inspect(args.path, lineage=args.lineage, profile=args.profile, inputs=args.inputs)
    print(json.dumps(report) if args.json else show(report))
    if report["kind"] == "version" and not report["intact"]:
        raise ExportError(f"{report['path']}: {report['damage']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
