"""A pack becomes an engine version in a repository, if it answers what torch answers.

    python -m export.build packs/city --repository repo

Graph, static check, torch's answers, the engine's answers, parity report, publication: in this order, and
whatever fails leaves nothing behind.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from export import golden, int8, lint, parity, triton, writer
from export.errors import ExportError, one_line
from export.graph import INPUT
from export.half import to_half
from export.parity import Thresholds
from export.progress import Bars, Callback, silent
from export.tensorrt import BACKENDS as TENSORRT_BACKENDS
from export.tensorrt import BuildOptions, Plan, build_plan, parse_batch
from networks.pack import Pack, PackError, load_pack
from runtime.config import EngineConfig
from runtime.engines import load
from runtime.engines.tensorrt_library import TensorRTError
from runtime.errors import Refused
from runtime.repository import Repository, check_name

BACKENDS = ("onnxruntime", *TENSORRT_BACKENDS)
#: Batches that TensorRT optimises an open batch for, unless told otherwise: (min, opt, max).
DEFAULT_BATCHES = (1, 1, 8)
LIBRARIES = ("roadworthy", "torch", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Published:
    """A version that now exists."""

    model: str
    version: int
    path: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Checked:
    """What a contract check found; nothing was published."""

    backend: str
    plan: dict[str, Any]
    parity: dict[str, Any] | None


@dataclass(frozen=True)
class Options:
    """How an engine is built.

    size        (height, width); None: the pack's
    batch       frames a call; None: open; (min, opt, max): open, and the range TensorRT optimises for
    opset       ONNX opset
    backend     "onnxruntime", "tensorrt", or "tensorrt-rtx" (`check` only)
    precision   "fp32", "fp16" (tensorrt), "int8"
    thresholds  what parity must reach; None: the precision's own
    threads     of the engine that is compared
    calibration uint8 [n,H,W,3] frames for int8; None: the pack's
    int8_frames how many of them
    keep        int8: regular expressions of weights that stay float
    refit       tensorrt: mark the weights as replaceable
    """

    size: tuple[int, int] | None = None
    batch: int | tuple[int, int, int] | None = None
    opset: int = writer.DEFAULT_OPSET
    backend: str = "onnxruntime"
    precision: str = "fp32"
    thresholds: Thresholds | None = None
    threads: int = 0
    calibration: np.ndarray | None = None
    int8_frames: int = int8.DEFAULT_COUNT
    keep: tuple[str, ...] = ()
    refit: bool = False

    @property
    def fixed_batch(self) -> int | None:
        return self.batch if isinstance(self.batch, int) else None


@dataclass(frozen=True)
class Engine:
    """A file that an engine is loaded from, and what the manifest says of it."""

    content: bytes
    facts: dict[str, Any]
    #: Further files of the version.
    beside: dict[str, bytes]


def build(
    pack: Pack,
    repository: Path | str | Repository,
    *,
    model: str | None = None,
    size: tuple[int, int] | None = None,
    adaptation: dict[str, Any] | None = None,
    gate: dict[str, Any] | None = None,
    progress: Callback | None = None,
    options: Options | None = None,
) -> Published:
    """Build, compare and publish.

    Args:
        pack: what to export.
        repository: where to; made if absent.
        model: name in the repository; None: the pack's.
        adaptation: of the round that made the pack, for the manifest; None: what the pack says.
        gate: report of the gate that the pack passed, for the manifest.
        progress: called with (stage, done, total).
    Raises:
        ExportError: anything that cannot be exported, a parity threshold missed, a repository that cannot
            be written.  Nothing is left behind.
    """
    settings = options or Options()
    settings = replace(settings, size=size or settings.size or pack.spec.size)
    assert settings.size is not None
    if pack.spec.task != "segmentation":
        raise ExportError(
            f"pack {pack.spec.name!r} is of task {pack.spec.task!r}, which is not served yet; "
            "python -m export.edges writes its ONNX file"
        )
    if settings.backend == "tensorrt-rtx":
        raise ExportError("tensorrt-rtx is built for a check only and not served; use backend 'tensorrt'")
    report = progress or silent
    name = _model_name(model or pack.spec.name)
    started = time.monotonic()
    report("graph", 0, 1)
    network = pack.network()
    graph = make_graph(pack, settings)
    report("graph", 1, 1)
    engine = make_engine(graph, pack, settings, report)
    frames, origin = golden.frames(pack, settings.size)
    truth = golden.answers(network, pack.spec, frames, report)
    verdict, answers = compare_engine(engine, settings, frames, truth, pack.spec.classes, report)
    verdict["golden"] = origin
    if not verdict["passed"]:
        raise ExportError(f"parity with torch is missed: {'; '.join(verdict['missed'])}")
    manifest = {
        "task": pack.spec.task,
        "engine": engine.facts,
        "input": {
            "height": settings.size[0],
            "width": settings.size[1],
            "dynamic_batch": settings.fixed_batch is None,
        },
        "classes": list(pack.spec.classes),
        "colours": [list(c) for c in pack.spec.colours],
        "output_stride": network.output_stride,
        "pack": pack_facts(pack),
        "adaptation": adaptation if adaptation is not None else pack.spec.adaptation,
        "gate": gate or {},
        "parity": verdict,
        "libraries": libraries(),
        "build_seconds": round(time.monotonic() - started, 3),
    }
    files = {
        str(engine.facts["file"]): engine.content,
        "golden.npz": golden.archive(frames, truth, answers, settings.precision),
        **engine.beside,
    }
    text = configuration(name, settings.backend, graph)
    report("publish", 0, 1)
    published = publish(repository, name, files, manifest, text, list(pack.spec.classes))
    report("publish", 1, 1)
    return published


def check(pack: Pack, *, progress: Callback | None = None, options: Options | None = None) -> Checked:
    """Let TensorRT-RTX parse and build the pack's graph on the CPU, and publish nothing.

    It is another product than TensorRT: this checks the graph against a real parser and builder, and shows
    nothing about how TensorRT runs it.  Graphs of float32 are compared with torch besides, in ONNX Runtime.

    Raises: ExportError.
    """
    settings = options or Options()
    settings = replace(settings, size=settings.size or pack.spec.size, backend="tensorrt-rtx")
    assert settings.size is not None
    report = progress or silent
    graph = make_graph(pack, settings)
    verdict = None
    if settings.precision == "fp32":
        frames, origin = golden.frames(pack, settings.size)
        truth = golden.answers(pack.network(), pack.spec, frames, report)
        plain = Engine(graph.SerializeToString(), {"kind": "onnxruntime", "precision": "fp32"}, {})
        verdict, _ = compare_engine(plain, settings, frames, truth, pack.spec.classes, report)
        verdict["golden"] = origin
        if not verdict["passed"]:
            raise ExportError(f"parity with torch is missed: {'; '.join(verdict['missed'])}")
    engine = make_engine(graph, pack, settings, report)
    return Checked(settings.backend, engine.facts["plan"], verdict)


def make_graph(pack: Pack, options: Options) -> onnx.ModelProto:
    """The pack's float32 ONNX graph, linted.  Raises: ExportError."""
    graph = writer.write(
        pack.network(),
        pack.spec,
        size=options.size or pack.spec.size,
        batch=options.fixed_batch,
        opset=options.opset,
        metadata=metadata(pack),
    )
    findings = lint.lint(graph)
    if findings.errors:
        raise ExportError(
            f"the graph leaves what TensorRT's parser documents: {'; '.join(findings.errors[:3])}"
        )
    return graph


def make_engine(graph: onnx.ModelProto, pack: Pack, options: Options, progress: Callback) -> Engine:
    """The float32 graph in the precision and for the backend that was asked for.  Raises: ExportError."""
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
        quantised = int8.quantise(
            graph,
            frames,
            classes=len(pack.spec.classes),
            target="tensorrt" if tensorrt else "onnxruntime",
            count=options.int8_frames,
            keep=options.keep,
            threads=options.threads or 1,
            progress=progress,
        )
        encoded, facts["int8"] = quantised.model, quantised.report
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


def _plan(content: bytes, weights: list[str], options: Options, progress: Callback) -> Plan:
    batch = options.batch if isinstance(options.batch, tuple) else None
    try:
        return build_plan(
            content,
            BuildOptions(
                precision=options.precision,
                batch=None if options.fixed_batch else batch or DEFAULT_BATCHES,
                refit=tuple(weights) if options.refit else (),
            ),
            backend=options.backend,
            progress=lambda phase, step, steps: progress(phase, step, steps),
        )
    except (TensorRTError, ValueError) as error:
        raise ExportError(one_line(error)) from error


def pack_facts(pack: Pack) -> dict[str, str]:
    """What a manifest says of the pack that an engine was made from."""
    spec = pack.spec
    return {"name": spec.name, "version": spec.version, "sha256": pack.sha256, "parent": spec.parent}


def configuration(model: str, backend: str, graph: onnx.ModelProto) -> str:
    """config.pbtxt of a graph under the graph contract."""
    inputs, outputs = triton.tensors(graph.graph.input), triton.tensors(graph.graph.output)
    return triton.config(model, backend, inputs, outputs)


def metadata(pack: Pack) -> dict[str, str]:
    """What a graph says about itself wherever it is copied to."""
    return {
        "roadworthy.schema": "1",
        "roadworthy.pack": f"{pack.spec.name} {pack.spec.version}",
        "roadworthy.pack_sha256": pack.sha256,
        "roadworthy.parent": pack.spec.parent,
        "roadworthy.classes": json.dumps(list(pack.spec.classes)),
        "roadworthy.skeleton": json.dumps(skeleton(pack), sort_keys=True),
    }


def skeleton(pack: Pack) -> dict[str, Any]:
    """What of a pack is in the graph besides its weights: packs that agree here can be refitted."""
    spec = pack.spec
    return {
        "network": spec.network,
        "arguments": spec.arguments,
        "classes": list(spec.classes),
        "mean": list(spec.mean),
        "std": list(spec.std),
        "channel_order": spec.channel_order,
    }


def weight_names(graph: onnx.ModelProto) -> list[str]:
    """Initialisers that hold weights; all others are constants of the graph and named so."""
    return [i.name for i in graph.graph.initializer if not i.name.startswith("const.")]


def compare_engine(
    built: Engine,
    options: Options,
    frames: np.ndarray,
    truth: golden.Answers,
    classes: tuple[str, ...],
    progress: Callback,
) -> tuple[dict[str, Any], golden.Answers]:
    """The parity report of an engine file, loaded as the server loads it, and what it answered.

    Raises: ExportError.
    """
    kind, precision = str(built.facts["kind"]), str(built.facts["precision"])
    try:
        engine = load(built.content, kind, precision, EngineConfig(threads=options.threads), candidate=False)
    except Refused as error:
        raise ExportError(f"the engine cannot be loaded: {one_line(error)}") from error
    outputs: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    seconds = []
    batch = options.fixed_batch or 1
    try:
        for index in range(len(frames)):
            progress("engine", index, len(frames))
            # A fixed batch is filled with the same frame: only the first answer counts.
            feed = np.repeat(frames[index : index + 1], batch, axis=0)
            start = time.perf_counter()
            answer = engine.run({INPUT: feed}, ("labels", "confidence", "probabilities"))
            seconds.append(time.perf_counter() - start)
            if not np.isfinite(answer["probabilities"]).all():
                raise ExportError(f"the engine's answer to golden frame {index} is not finite")
            outputs[0].append(answer["labels"][0])
            outputs[1].append(answer["confidence"][0])
    finally:
        engine.close()
    progress("engine", len(frames), len(frames))
    answers = np.stack(outputs[0]), np.stack(outputs[1])
    report = parity.compare(*answers, *truth, classes)
    report["engine_ms"] = round(1000 * float(np.median(seconds)), 3)
    return parity.judge(report, options.thresholds or parity.DEFAULTS[precision]), answers


def publish(
    repository: Path | str | Repository,
    model: str,
    files: dict[str, bytes],
    manifest: dict[str, Any],
    config: str,
    labels: list[str] | None,
) -> Published:
    """Write the files and let the version appear.  Raises: ExportError; nothing is left behind then."""
    try:
        home = repository if isinstance(repository, Repository) else Repository(repository)
        with _staged(home, model) as staged:
            for name, content in files.items():
                (staged / name).write_bytes(content)
            version = home.publish(model, staged, manifest, config, labels)
        return Published(model, version, home.directory(model, version), home.manifest(model, version))
    except OSError as error:
        where = error.filename or getattr(repository, "path", repository)
        raise ExportError(
            f"repository {str(where)!r} cannot be written: {error.strerror or error}; nothing was published"
        ) from error
    except (ValueError, Refused) as error:
        raise ExportError(f"model {model!r} cannot be published: {one_line(error)}") from error


@contextmanager
def _staged(home: Repository, model: str) -> Iterator[Path]:
    staged = home.stage(model)
    try:
        yield staged
    except BaseException:
        home.abandon(staged)
        raise


def _model_name(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise ExportError(str(error)) from error


def libraries() -> dict[str, str]:
    """Versions of what took part, for the manifest."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "absent"
    return versions


# -- command line -------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 352x480")
    return int(match[1]), int(match[2])


def batch_argument(text: str) -> int | tuple[int, int, int] | None:
    if text == "dynamic":
        return None
    try:
        low, middle, high = parse_batch(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N, min:opt:max nor 'dynamic'") from error
    return (low, middle, high) if ":" in text else low


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m export.build",
        description="Build an engine from a model pack and publish it as a new immutable version of a "
        "model in a repository.  The engine is compared with torch in float32 on the pack's golden frames "
        "and published only when it answers the same.  With --onnx, put somebody's ONNX file into the "
        "repository as it is, without the graph contract.",
        epilog="""examples:
  python -m export.build packs/city --repository repo
  python -m export.build packs/city --repository repo --model front --size 352x480 --batch 1 --json
  python -m export.build packs/city --repository repo --precision int8 --calibration frames/
  python -m export.build packs/city --backend tensorrt-rtx            # parse and build only
  python -m export.build --onnx depth.onnx --name depth --repository repo

exit codes: 0 published (tensorrt-rtx: built), 1 refused (one line on stderr says why; nothing was
published), 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("pack", metavar="PACK", nargs="?", help="directory of the model pack")
    add("--onnx", metavar="FILE", help="an ONNX file instead of a pack")
    add("--name", metavar="NAME", help="with --onnx: name of the model")
    add("--labels", metavar="FILE", help="with --onnx: a text file with one class name a line")
    add("--repository", metavar="DIR", help="engine repository; made if absent")
    add("--model", metavar="NAME", help="name of the model in the repository (the pack's)")
    add("--size", type=parse_size, metavar="HxW", help="size of the frames (the pack's)")
    batches = "frames a call (dynamic; TensorRT: 1:1:8)"
    add("--batch", type=batch_argument, default=None, metavar="N|min:opt:max|dynamic", help=batches)
    add("--opset", type=int, default=writer.DEFAULT_OPSET, metavar="N", help="ONNX opset, 17 to 20 (18)")
    backends = (
        "engine (onnxruntime); tensorrt needs an NVIDIA device; tensorrt-rtx parses and builds on the CPU as "
        "a check and publishes nothing"
    )
    add("--backend", choices=BACKENDS, default="onnxruntime", help=backends)
    add("--precision", choices=sorted(parity.DEFAULTS), default="fp32", help="of the engine (fp32)")
    add(
        "--calibration",
        metavar="DIR",
        help="int8: images to calibrate on (the pack's replay or golden frames)",
    )
    add("--int8-frames", type=int, default=int8.DEFAULT_COUNT, metavar="N", help="int8: how many (32)")
    add("--int8-keep", action="append", default=[], metavar="REGEX", help="int8: weights that stay float")
    add("--refit", action="store_true", help="tensorrt: weights can be replaced later")
    add("--min-agreement", type=float, metavar="X", help="least share of pixels with torch's label (0.999)")
    add("--min-boundary", type=float, metavar="X", help="the same within 2 px of label edges (0.99)")
    add(
        "--max-confidence",
        type=float,
        metavar="X",
        help="largest mean difference of confidence, 0..255 (0.5)",
    )
    add("--threads", type=int, default=0, metavar="N", help="threads of the compared engine (all, at most 4)")
    add("--json", action="store_true", help="print one JSON object: model, version, path, manifest")
    return result


def thresholds(args: argparse.Namespace) -> Thresholds:
    chosen = {
        "agreement": args.min_agreement,
        "boundary": args.min_boundary,
        "confidence_mean": args.max_confidence,
    }
    return replace(parity.DEFAULTS[args.precision], **{k: v for k, v in chosen.items() if v is not None})


def show(result: Published | Checked) -> str:
    """The outcome for a person."""
    if isinstance(result, Checked):
        plan = result.plan
        lines = [f"{plan['library']}: {plan['checked']}, {plan['bytes']:,} bytes in {plan['seconds']} s"]
        return "\n".join([*lines, *_show_parity(result.parity)])
    lines = [
        f"{result.model} version {result.version}: {result.path}",
        *_show_parity(result.manifest["parity"]),
    ]
    if "build_seconds" in result.manifest:
        lines.append(f"  built in {result.manifest['build_seconds']} s")
    return "\n".join(lines)


def _show_parity(report: dict[str, Any] | None) -> list[str]:
    if not report or report.get("agreement") is None:
        return ["  parity with torch was not measured"]
    edges = report["boundary_agreement"]
    reference = report.get("reference", "torch")
    lines = [
        f"  parity with {reference} on {report['frames']} golden frames ({report['golden']}):",
        f"    labels {100 * report['agreement']:.4f} %"
        + (f", near edges {100 * edges:.4f} %" if edges is not None else "")
        + f", confidence differs by {report['confidence_mean']:.4f} of 255 on average, "
        f"{report['confidence_max']} at most; {report['engine_ms']:.1f} ms a call",
    ]
    for name, entry in report["classes"].items():
        share, differs = 100 * entry["agreement"], entry["confidence_mean"]
        lines.append(f"    {name:<16} {share:9.4f} %  {differs:7.4f}  {entry['pixels']:>9} px")
    return lines


def _options(args: argparse.Namespace, pack: Pack) -> Options:
    size = args.size or pack.spec.size
    return Options(
        size=size,
        batch=args.batch,
        opset=args.opset,
        backend=args.backend,
        precision=args.precision,
        thresholds=thresholds(args),
        threads=args.threads,
        calibration=golden.read_folder(Path(args.calibration), size) if args.calibration else None,
        int8_frames=args.int8_frames,
        keep=tuple(args.int8_keep),
        refit=args.refit,
    )


def _run(args: argparse.Namespace, progress: Callback) -> Published | Checked:
    if args.onnx:
        from export.foreign import publish_onnx

        labels = golden.read_lines(Path(args.labels)) if args.labels else None
        return publish_onnx(args.onnx, args.repository, args.name, labels=labels, size=args.size)
    pack = load_pack(args.pack)
    options = _options(args, pack)
    if args.backend == "tensorrt-rtx":
        return check(pack, progress=progress, options=options)
    return build(pack, args.repository, model=args.model, progress=progress, options=options)


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    if bool(args.pack) == bool(args.onnx):
        command.error("give either a PACK or --onnx FILE")
    if args.onnx and not args.name:
        command.error("--onnx needs --name NAME")
    if args.threads < 0:
        command.error(f"--threads {args.threads}: must not be negative")
    if not args.repository and args.backend != "tensorrt-rtx":
        command.error("--repository DIR is needed")
    # A handful of frames: more threads save little, and cost much where adaptation shares the cores.
    torch.set_num_threads(args.threads or 1)
    try:
        with Bars() as bars:
            result = _run(args, bars)
    except (ExportError, PackError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(asdict(result), default=str))
    else:
        print(show(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
