"""The command `python -m export.tensorrt`: from an ONNX file to a plan."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from common.cli import run_command
from common.files import write_bytes
from common.progress import ProgressBars
from export.errors import ExportError
from export.graph.onnx_file import read_file
from export.tensorrt.builder import build_plan
from export.tensorrt.options import add_arguments, from_arguments
from export.tensorrt.plan import BACKENDS, PRECISIONS, BuildOptions, parse_batch
from runtime.engines.tensorrt.library import TensorRTError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.tensorrt",
        description="Build a TensorRT plan from an ONNX file. A pack is published with "
        "python -m export.build; this is the single step from ONNX to plan.",
        epilog="examples:\n"
        "  python -m export.tensorrt model.onnx --out model.plan\n"
        "  python -m export.tensorrt model.onnx --out model.plan --batch 1:4:8 --timing-cache gpu.cache\n"
        "  python -m export.tensorrt model.onnx --backend tensorrt-rtx      parse and build on a CPU\n\n"
        "The backend tensorrt-rtx needs no GPU; its plans are for TensorRT-RTX and are not executed here.\n\n"
        "exit codes: 0 built, 1 failed, 2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("onnx", type=Path, metavar="FILE.onnx")
    parser.add_argument("--out", type=Path, metavar="FILE.plan", help="where the plan goes; default: nowhere")
    parser.add_argument("--backend", choices=BACKENDS, default="tensorrt")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="what the graph is (fp32)")
    parser.add_argument("--batch", metavar="N|min:opt:max", help="range of a free first dimension")
    parser.add_argument("--refit", metavar="NAME", nargs="+", default=[], help="weights that may change")
    parser.add_argument("--layers", type=Path, metavar="FILE.json", help="write layer information here")
    parser.add_argument("--json", action="store_true", help="print what was built as one JSON object")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        options = BuildOptions(
            precision=arguments.precision,
            batch=parse_batch(arguments.batch) if arguments.batch else None,
            refit=tuple(arguments.refit),
            **asdict(from_arguments(arguments)),
        )
    except ValueError as error:
        parser.error(str(error))
    return run_command(lambda: _run(arguments, options), (TensorRTError, ExportError, ValueError))


def _run(arguments: argparse.Namespace, options: BuildOptions) -> int:
    content = read_file(arguments.onnx)
    with ProgressBars(lines=False) as bars:
        plan = build_plan(content, options, backend=arguments.backend, progress=bars)
    if arguments.out:
        write_bytes(arguments.out, plan.data, durable=False)
    if arguments.layers:
        write_bytes(arguments.layers, json.dumps(plan.layers, indent=1).encode(), durable=False)
    if arguments.json:
        print(json.dumps(plan.manifest()))
    else:
        checked = plan.manifest()["checked"]
        print(f"{len(plan.data) / 1e6:.2f} MB in {plan.seconds:.1f} s by {plan.library}: {checked}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
