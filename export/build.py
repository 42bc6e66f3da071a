"""A pack becomes an engine version in a repository, if it answers what torch answers.

    python -m export.build packs/city --repository repo

Graph, static check, torch's answers, the engine's answers, parity report, publication: in this order, and
whatever fails leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from common.cli import run_command
from common.progress import ProgressBars, StepCallback, no_progress
from export.errors import ExportError
from export.graph import heads, writer
from export.parity import golden, parity
from export.pipeline import (
    Engine,
    Options,
    compare_engine,
    configuration,
    contract_of,
    describe,
    make_engine,
    make_graph,
)
from export.publish.publish import Published, from_pack, model_name, publish, reference_file
from export.quantize import int8, sensitivity
from export.tensorrt import options as tensorrt_options
from export.tensorrt.plan import BACKENDS as TENSORRT_BACKENDS
from export.tensorrt.plan import parse_batch
from networks.pack import TASKS, Pack, PackError, load_pack
from runtime.repository.repository import Repository

__all__ = ["Checked", "Options", "Published", "build", "check", "main"]

BACKENDS = ("onnxruntime", *TENSORRT_BACKENDS)


@dataclass(frozen=True)
class Checked:
    """What a contract check found; nothing was published."""

    backend: str
    plan: dict[str, Any]
    parity: dict[str, Any] | None


def build(
    pack: Pack,
    repository: Path | str | Repository,
    *,
    model: str | None = None,
    size: tuple[int, int] | None = None,
    adaptation: dict[str, Any] | None = None,
    gate: dict[str, Any] | None = None,
    progress: StepCallback | None = None,
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
    if settings.backend == "tensorrt-rtx":
        raise ExportError("tensorrt-rtx is built for a check only and not served; use backend 'tensorrt'")
    report = progress or no_progress
    name = model_name(model or pack.spec.name)
    started = time.monotonic()
    report("graph", 0, 1)
    network = pack.network()
    contract = contract_of(pack, network, settings)
    graph = make_graph(pack, network, contract, settings)
    report("graph", 1, 1)
    engine = make_engine(graph, pack, contract, settings, report)
    made = time.monotonic() - started
    compared = compare_engine(engine, pack, network, contract, settings, report)
    manifest = describe(pack, network, contract, settings) | from_pack(
        pack,
        engine=engine.facts,
        parity=compared.report,
        adaptation=adaptation,
        gate=gate,
        seconds=time.monotonic() - started,
        seconds_of={"engine": made, "parity": compared.seconds},
    )
    files = {
        str(engine.facts["file"]): engine.content,
        "golden.npz": compared.archive(settings.precision),
        **engine.beside,
        **reference_file(pack, contract.labels),
    }
    text = configuration(name, settings.backend, graph)
    report("publish", 0, 1)
    published = publish(repository, name, files, manifest, text, contract.labels)
    report("publish", 1, 1)
    return published


def check(pack: Pack, *, progress: StepCallback | None = None, options: Options | None = None) -> Checked:
    """Let TensorRT-RTX parse and build the pack's graph on the CPU, and publish nothing.

    It is another product than TensorRT: this checks the graph against a real parser and builder, and shows
    nothing about how TensorRT runs it.  Graphs of float32 are compared with torch besides, in ONNX Runtime.

    Raises: ExportError.
    """
    settings = options or Options()
    settings = replace(settings, size=settings.size or pack.spec.size, backend="tensorrt-rtx")
    report = progress or no_progress
    network = pack.network()
    contract = contract_of(pack, network, settings)
    graph = make_graph(pack, network, contract, settings)
    verdict = None
    if settings.precision == "fp32":
        plain = Engine(graph.SerializeToString(), {"kind": "onnxruntime", "precision": "fp32"}, {})
        verdict = compare_engine(plain, pack, network, contract, settings, report).report
    engine = make_engine(graph, pack, contract, settings, report)
    return Checked(settings.backend, engine.facts["plan"], verdict)


# -- command line -------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH, for example 352x480")
    return int(match[1]), int(match[2])


def finite(text: str) -> float:
    """A number that can be compared with: NaN would let everything pass."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


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
        "and published only when it answers the same.  Packs of segmentation, of semantic edges and of both "
        "(joint) are served.  With --onnx, put somebody's ONNX file into the repository as it is, without "
        "the graph contract.",
        epilog="""examples:
  python -m export.build packs/city --repository repo
  python -m export.build packs/city --repository repo --model front --size 352x480 --batch 1 --json
  python -m export.build packs/city --repository repo --precision int8 --calibration frames/
  python -m export.build packs/edges --repository repo --edge-threshold 0.4
  python -m export.build packs/both --repository repo --task joint
  python -m export.build packs/city --repository repo --backend tensorrt --precision fp16 --batch 1:2:8 \\
      --timing-cache gpu.cache
  python -m export.build packs/city --backend tensorrt-rtx            # parse and build only
  python -m export.build --onnx depth.onnx --name depth --repository repo
  python -m export.build --onnx text.onnx --name text --repository repo --inputs ids_and_mask.npz

exit codes: 0 published (tensorrt-rtx: built), 1 refused (one line on stderr says why; nothing was
published), 2 wrong usage, 130 interrupted, 143 terminated (nothing was published)""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("pack", metavar="PACK", nargs="?", help="directory of the model pack")
    add("--onnx", metavar="FILE", help="an ONNX file instead of a pack")
    add("--name", metavar="NAME", help="with --onnx: name of the model")
    add("--labels", metavar="FILE", help="with --onnx: a text file with one class name a line")
    add("--config", metavar="FILE", help="with --onnx: a config.pbtxt of your own (batching, queues)")
    given = (
        "with --onnx: inputs that the graph takes, as numpy.savez writes them, one array for each input by "
        "name (made up: random numbers, small ones, ones, zeros); build, parity and server run them"
    )
    add("--inputs", metavar="FILE.npz", help=given)
    add("--repository", metavar="DIR", help="engine repository; made if absent")
    add("--model", metavar="NAME", help="name of the model in the repository (the pack's)")
    add("--size", type=parse_size, metavar="HxW", help="size of the frames (the pack's)")
    batches = "frames a call (dynamic; TensorRT: 1:1:8)"
    add("--batch", type=batch_argument, default=None, metavar="N|min:opt:max|dynamic", help=batches)
    add("--task", choices=TASKS, help="what is served of a pack that has more than one head (the pack's)")
    add(
        "--edge-threshold",
        type=float,
        nargs="+",
        metavar="P",
        help="edges: probability from which a pixel's bit is set, one or one a class (the pack's, else 0.5)",
    )
    add("--opset", type=int, default=writer.DEFAULT_OPSET, metavar="N", help="ONNX opset, 17 to 20 (18)")
    form = "answers from logits: all classes as one tensor, or each as an image; equal answers (the faster)"
    add("--form", choices=heads.FORMS, help=form)
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
    search = "int8: refuse where parity is missed, instead of finding convolutions that must stay float"
    add("--no-int8-search", action="store_true", help=search)
    budget = f"int8: seconds that finding them may take; then the best so far ({sensitivity.BUDGET:g})"
    add("--int8-budget", type=finite, default=sensitivity.BUDGET, metavar="SECONDS", help=budget)
    add("--refit", action="store_true", help="tensorrt: weights can be replaced later")
    add("--threads", type=int, default=0, metavar="N", help="threads of the compared engine (all, at most 4)")
    add("--json", action="store_true", help="print one JSON object: model, version, path, manifest")
    add_thresholds(result)
    tensorrt_options.add_arguments(result)
    return result


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """What parity must reach, for every command that measures it."""
    group = parser.add_argument_group(
        "parity with torch (defaults are of fp32; fp16 and int8 have wider ones, docs/export.md)"
    )
    for name, what in (
        ("--min-agreement", "least share of pixels with torch's label (0.999)"),
        ("--min-boundary", "the same within 2 px of label edges (0.99)"),
        ("--max-confidence", "largest mean difference of confidence, 0..255 (0.5)"),
        ("--max-edges", "edges: largest difference of a probability, 0..255 (1)"),
        ("--max-edges-mean", "edges: its mean (0.1)"),
        ("--min-bits", "edges: least share of pixels with torch's bit field (0.999)"),
        ("--max-mf", "edges: largest difference of MF, torch's edges taken for the truth (0.005)"),
    ):
        group.add_argument(name, type=finite, metavar="X", help=what)
    group.add_argument(
        "--golden-frames",
        type=int,
        default=golden.LARGEST,
        metavar="N",
        help=f"frames to compare on, 1 to {golden.LARGEST} ({golden.LARGEST}; the version keeps these)",
    )


def thresholds(args: argparse.Namespace) -> dict[str, float]:
    """Those that were given; the others are the precision's."""
    chosen = {
        "agreement": args.min_agreement,
        "boundary": args.min_boundary,
        "confidence_mean": args.max_confidence,
        "edges_max": args.max_edges,
        "edges_mean": args.max_edges_mean,
        "bits": args.min_bits,
        "mf": args.max_mf,
    }
    return {name: value for name, value in chosen.items() if value is not None}


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
    batching = result.manifest.get("batching", {})
    if why := batching.get("reason"):
        lines.append(f"  batching is off: {why}")
    if seconds := result.manifest.get("seconds"):
        parts = ", ".join(f"{stage} {spent} s" for stage, spent in seconds.items())
        lines.append(f"  built in {result.manifest['build_seconds']} s: {parts}")
    return "\n".join(lines)


def _show_parity(report: dict[str, Any] | None) -> list[str]:
    if report and report.get("largest_difference"):
        parts = ", ".join(f"{name} {value:.3g}" for name, value in report["largest_difference"].items())
        return [f"  on {report['inputs']} inputs it differs from {report['reference']} by at most: {parts}"]
    if not report or not report.get("frames"):
        return ["  parity with torch was not measured"]
    reference = report.get("reference", "torch")
    lines = [
        f"  parity with {reference} on {report['frames']} golden frames ({report['golden']}), "
        f"{report['engine_ms']:.1f} ms a call:"
    ]
    if "agreement" in report:
        edges = report["boundary_agreement"]
        lines.append(
            f"    labels {100 * report['agreement']:.4f} %"
            + (f", near edges {100 * edges:.4f} %" if edges is not None else "")
            + f", confidence differs by {report['confidence_mean']:.4f} of 255 on average, "
            f"{report['confidence_max']} at most"
        )
    for name, entry in report.get("classes", {}).items():
        share, differs = 100 * entry["agreement"], entry["confidence_mean"]
        lines.append(f"    {name:<16} {share:9.4f} %  {differs:7.4f}  {entry['pixels']:>9} px")
    if "bits_equal" in report:
        mf = report["mf_difference"]
        lines.append(
            f"    edges differ by {report['edges_mean_difference']:.4f} of 255 on average, "
            f"{report['edges_max_difference']} at most; bit fields {100 * report['bits_equal']:.4f} % equal; "
            + (f"MF differs by {mf:.5f}" if mf is not None else "no edge is over its threshold")
        )
    for name, entry in report.get("edge_classes", {}).items():
        most, f = entry["max_difference"], entry["f"]
        lines.append(f"    {name:<16} F {f:8.6f}  {most:>4} of 255  {entry['pixels']:>9} px")
    return lines


def _options(args: argparse.Namespace, pack: Pack, plan: tensorrt_options.PlanOptions) -> Options:
    size = args.size or pack.spec.size
    folder = Path(args.calibration) if args.calibration else None
    frames = golden.read_folder(folder, size, int8.LARGEST_POOL) if folder else None
    return Options(
        size=size,
        batch=args.batch,
        opset=args.opset,
        form=args.form,
        task=args.task,
        edge_thresholds=args.edge_threshold,
        backend=args.backend,
        precision=args.precision,
        thresholds=thresholds(args),
        frames=args.golden_frames,
        threads=args.threads,
        calibration=frames,
        int8_frames=args.int8_frames,
        keep=tuple(args.int8_keep),
        int8_search=not args.no_int8_search,
        int8_budget=args.int8_budget,
        refit=args.refit,
        plan=plan,
    )


def _run(
    args: argparse.Namespace, plan: tensorrt_options.PlanOptions, progress: StepCallback
) -> Published | Checked:
    if args.onnx:
        from export.publish import publish_onnx

        labels = golden.read_lines(Path(args.labels)) if args.labels else None
        return publish_onnx(
            args.onnx,
            args.repository,
            args.name,
            labels=labels,
            size=args.size,
            config=args.config,
            inputs=args.inputs,
        )
    pack = load_pack(args.pack)
    options = _options(args, pack, plan)
    if args.backend == "tensorrt-rtx":
        return check(pack, progress=progress, options=options)
    return build(pack, args.repository, model=args.model, progress=progress, options=options)


#: What `--onnx` takes besides; everything else is about building.
_FOR_FILES = {"onnx", "name", "labels", "config", "inputs", "repository", "size", "json"}


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    if bool(args.pack) == bool(args.onnx):
        command.error("give either a PACK or --onnx FILE")
    if args.onnx and not args.name:
        command.error("--onnx needs --name NAME")
    if args.config and not args.onnx:
        command.error("--config is for --onnx FILE; of a pack it is written")
    if args.inputs and not args.onnx:
        command.error("--inputs is for --onnx FILE; a pack brings golden frames")
    if args.onnx:
        given = [name for name, value in vars(args).items() if value != command.get_default(name)]
        if extra := sorted(set(given) - _FOR_FILES):
            named = ", ".join("--" + name.replace("_", "-") for name in extra)
            command.error(f"{named}: an ONNX file is published as it is; only packs are built")
    if args.threads < 0:
        command.error(f"--threads {args.threads}: must not be negative")
    if args.int8_budget <= 0:
        command.error(f"--int8-budget {args.int8_budget:g}: must be above 0")
    if not args.repository and args.backend != "tensorrt-rtx":
        command.error("--repository DIR is needed")
    if not 1 <= args.golden_frames <= golden.LARGEST:
        command.error(f"--golden-frames {args.golden_frames}: 1 to {golden.LARGEST}")
    try:
        plan = tensorrt_options.from_arguments(args)
    except ValueError as error:
        command.error(str(error))
    if args.backend == "onnxruntime" and (args.refit or plan != tensorrt_options.PlanOptions()):
        command.error("--refit and the TensorRT options are for --backend tensorrt")
    # A handful of frames: more threads save little, and cost much where adaptation shares the cores.
    torch.set_num_threads(args.threads or 1)
    return run_command(lambda: _print(args, plan), (ExportError, PackError))


def _print(args: argparse.Namespace, plan: tensorrt_options.PlanOptions) -> int:
    with ProgressBars(lines=False) as bars:
        result = _run(args, plan, bars)
    print(json.dumps(asdict(result), default=str) if args.json else show(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
