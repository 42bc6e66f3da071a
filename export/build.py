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

from export import golden, lint, parity, triton, writer
from export.errors import ExportError, one_line
from export.graph import INPUT
from export.parity import Thresholds
from export.progress import Bars, Callback, silent
from networks.pack import Pack, PackError, load_pack
from runtime.config import EngineConfig
from runtime.engines import load
from runtime.errors import Refused
from runtime.repository import Repository, check_name

LIBRARIES = ("roadworthy", "torch", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True)
class Published:
    """A version that now exists."""

    model: str
    version: int
    path: Path
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How an engine is built.

    size       (height, width); None: the pack's
    batch      frames a call; None: open
    opset      ONNX opset
    precision  "fp32"
    thresholds what parity must reach; None: the precision's own
    threads    of the engine that is compared
    """

    size: tuple[int, int] | None = None
    batch: int | None = None
    opset: int = writer.DEFAULT_OPSET
    precision: str = "fp32"
    thresholds: Thresholds | None = None
    threads: int = 0


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
    report = progress or silent
    name = _model_name(model or pack.spec.name)
    started = time.monotonic()
    report("graph", 0, 1)
    network = pack.network()
    graph = make_graph(pack, settings)
    report("graph", 1, 1)
    frames, origin = golden.frames(pack, settings.size)
    labels, confidence = golden.answers(network, pack.spec, frames, report)
    verdict = compare_engine(graph, settings, frames, labels, confidence, pack.spec.classes, report)
    verdict["golden"] = origin
    if not verdict["passed"]:
        raise ExportError(f"parity with torch is missed: {'; '.join(verdict['missed'])}")
    manifest = {
        "task": pack.spec.task,
        "engine": {
            "kind": "onnxruntime",
            "precision": settings.precision,
            "file": "model.onnx",
            "opset": settings.opset,
            "weights": len(weight_names(graph)),
        },
        "input": {
            "height": settings.size[0],
            "width": settings.size[1],
            "dynamic_batch": settings.batch is None,
        },
        "classes": list(pack.spec.classes),
        "colours": [list(c) for c in pack.spec.colours],
        "output_stride": network.output_stride,
        "pack": {
            "name": pack.spec.name,
            "version": pack.spec.version,
            "sha256": pack.sha256,
            "parent": pack.spec.parent,
        },
        "adaptation": adaptation if adaptation is not None else pack.spec.adaptation,
        "gate": gate or {},
        "parity": verdict,
        "lint": asdict(lint.lint(graph)),
        "libraries": libraries(),
        "build_seconds": round(time.monotonic() - started, 3),
    }
    files = {
        "model.onnx": graph.SerializeToString(),
        "golden.npz": golden.archive(frames, labels, confidence),
    }
    text = triton.config(
        name,
        "onnxruntime",
        triton.tensors(graph.graph.input),
        triton.tensors(graph.graph.output),
        labels=("labels",),
    )
    report("publish", 0, 1)
    published = publish(repository, name, files, manifest, text, list(pack.spec.classes))
    report("publish", 1, 1)
    return published


def make_graph(pack: Pack, options: Options) -> onnx.ModelProto:
    """The pack's ONNX graph, linted.  Raises: ExportError."""
    if options.precision != "fp32":
        raise ExportError(
            f"precision {options.precision!r} is not built by the onnxruntime backend; use fp32"
        )
    graph = writer.write(
        pack.network(),
        pack.spec,
        size=options.size or pack.spec.size,
        batch=options.batch,
        opset=options.opset,
        metadata=metadata(pack),
    )
    findings = lint.lint(graph)
    if findings.errors:
        raise ExportError(
            f"the graph leaves what TensorRT's parser documents: {'; '.join(findings.errors[:3])}"
        )
    return graph


def metadata(pack: Pack) -> dict[str, str]:
    """What a graph says about itself wherever it is copied to."""
    return {
        "roadworthy.schema": "1",
        "roadworthy.pack": f"{pack.spec.name} {pack.spec.version}",
        "roadworthy.pack_sha256": pack.sha256,
        "roadworthy.parent": pack.spec.parent,
        "roadworthy.classes": json.dumps(list(pack.spec.classes)),
    }


def weight_names(graph: onnx.ModelProto) -> list[str]:
    """Initialisers that hold weights; all others are constants of the graph and named so."""
    return [i.name for i in graph.graph.initializer if not i.name.startswith("const.")]


def compare_engine(
    graph: onnx.ModelProto,
    options: Options,
    frames: np.ndarray,
    labels: np.ndarray,
    confidence: np.ndarray,
    classes: tuple[str, ...],
    progress: Callback,
) -> dict[str, Any]:
    """The parity report of a graph, run by the very engine that will serve it.  Raises: ExportError."""
    try:
        engine = load(
            graph.SerializeToString(),
            "onnxruntime",
            options.precision,
            EngineConfig(threads=options.threads),
            candidate=False,
        )
    except Refused as error:
        raise ExportError(f"ONNX Runtime refuses the graph: {one_line(error)}") from error
    outputs: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    seconds = []
    batch = options.batch or 1
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
    report = parity.compare(np.stack(outputs[0]), np.stack(outputs[1]), labels, confidence, classes)
    report["engine_ms"] = round(1000 * float(np.median(seconds)), 3)
    return parity.judge(report, options.thresholds or parity.DEFAULTS[options.precision])


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


def parse_batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of frames nor 'dynamic'")
    return int(text)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m export.build",
        description="Build an engine from a model pack and publish it as a new immutable version of a "
        "model in a repository.  The engine is compared with torch in float32 on the pack's golden frames "
        "and published only when it answers the same.",
        epilog="""examples:
  python -m export.build packs/city --repository repo
  python -m export.build packs/city --repository repo --model front --size 352x480 --batch 1 --json

exit codes: 0 published, 1 refused (one line on stderr says why; nothing was published), 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("pack", metavar="PACK", help="directory of the model pack")
    add("--repository", required=True, metavar="DIR", help="engine repository; made if absent")
    add("--model", metavar="NAME", help="name of the model in the repository (the pack's)")
    add("--size", type=parse_size, metavar="HxW", help="size of the frames (the pack's)")
    add("--batch", type=parse_batch, default=None, metavar="N|dynamic", help="frames a call (dynamic)")
    add("--opset", type=int, default=writer.DEFAULT_OPSET, metavar="N", help="ONNX opset, 17 to 20 (18)")
    add("--precision", choices=("fp32",), default="fp32", help="precision of the engine (fp32)")
    add("--min-agreement", type=float, metavar="X", help="least share of pixels with torch's label (0.999)")
    add("--min-boundary", type=float, metavar="X", help="the same within 2 px of label edges (0.99)")
    add(
        "--max-confidence",
        type=float,
        metavar="X",
        help="largest mean difference of confidence, 0..255 (0.5)",
    )
    add(
        "--threads",
        type=int,
        default=0,
        metavar="N",
        help="threads of the compared engine (all cores, at most 4)",
    )
    add("--json", action="store_true", help="print one JSON object: model, version, path, manifest")
    return result


def thresholds(args: argparse.Namespace) -> Thresholds:
    chosen = {
        "agreement": args.min_agreement,
        "boundary": args.min_boundary,
        "confidence_mean": args.max_confidence,
    }
    return replace(parity.DEFAULTS[args.precision], **{k: v for k, v in chosen.items() if v is not None})


def show(published: Published) -> str:
    """The parity report for a person."""
    report = published.manifest["parity"]
    boundary = report["boundary_agreement"]
    lines = [
        f"{published.model} version {published.version}: {published.path}",
        f"  parity with torch on {report['frames']} golden frames ({report['golden']}):",
        f"    labels {100 * report['agreement']:.4f} %"
        + (f", near edges {100 * boundary:.4f} %" if boundary is not None else "")
        + f", confidence differs by {report['confidence_mean']:.4f} of 255 on average, "
        f"{report['confidence_max']} at most",
    ]
    for name, entry in report["classes"].items():
        share, differs = 100 * entry["agreement"], entry["confidence_mean"]
        lines.append(f"    {name:<16} {share:9.4f} %  {differs:7.4f}  {entry['pixels']:>9} px")
    lines.append(
        f"  engine: {report['engine_ms']:.1f} ms a frame; built in {published.manifest['build_seconds']} s"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    # A handful of frames: more threads save little, and cost much where adaptation shares the cores.
    torch.set_num_threads(args.threads or 1)
    try:
        with Bars() as bars:
            published = build(
                load_pack(args.pack),
                args.repository,
                model=args.model,
                progress=bars,
                options=Options(
                    size=args.size,
                    batch=args.batch,
                    opset=args.opset,
                    precision=args.precision,
                    thresholds=thresholds(args),
                    threads=args.threads,
                ),
            )
    except (ExportError, PackError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({**asdict(published), "path": str(published.path)}))
    else:
        print(show(published))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
