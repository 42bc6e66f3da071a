"""New weights for an engine that exists: a new version without tracing, writing or checking a graph again.

    python -m export.refit road 3 packs/city-adapted --repository repo

The version that is refitted is read and never changed: what comes out is a version of its own, with its own
parity report against torch.  Weights find their place by name, which is why the exporter keeps names.  The
weights are written into the graph (or a plan, by TensorRT's refitter); `SessionOptions.add_initializer` is
not used, because it keeps the file's weights in convolutions that ONNX Runtime blocks (docs/export.md).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from common.cli import run_command
from common.progress import ProgressBars, StepCallback, no_progress
from common.text import one_line
from export.build import add_thresholds, show, thresholds
from export.errors import ExportError
from export.graph.fold import Folding
from export.graph.onnx_file import parse_onnx
from export.parity import golden
from export.parity.parity import Thresholds
from export.pipeline import (
    Engine,
    Options,
    compare_engine,
    configuration,
    contract_of,
    describe,
    metadata,
    skeleton,
    weight_names,
)
from export.publish.publish import Published, from_pack, publish, reference_file
from export.tensorrt import refit_plan
from export.tensorrt.options import PlanOptions
from networks.images import MOST_PIXELS
from networks.pack import TASKS, Pack, PackError, load_pack
from runtime.engines.tensorrt.library import TensorRTError
from runtime.errors import Refused
from runtime.repository.repository import Repository


def refit(
    repository: Path | str | Repository,
    model: str,
    version: int,
    pack: Pack,
    *,
    adaptation: dict[str, Any] | None = None,
    gate: dict[str, Any] | None = None,
    thresholds: Thresholds | Mapping[str, float] | None = None,
    frames: int = golden.LARGEST,
    threads: int = 0,
    host_code: bool = False,
    progress: StepCallback | None = None,
) -> Published:
    """Publish version `version` again with the weights of `pack`.

    Args:
        frames: golden frames that parity is measured on, at most; most of a refit's time goes into them.
        host_code: load a version-compatible plan, whose code then runs in this process.
    Raises:
        ExportError: the version is damaged or cannot be refitted (quantised, foreign), the pack is of
            another network, class list or normalisation, a weight is missing or misshapen, or parity is
            missed.  Nothing is left behind.
    """
    report = progress or no_progress
    started = time.monotonic()
    home = repository if isinstance(repository, Repository) else Repository(repository)
    try:
        manifest, files = home.read(model, version)
    except (Refused, ValueError) as error:
        raise ExportError(f"model {model!r} version {version}: {one_line(error)}") from error
    facts = manifest["engine"]
    _check_engine(model, version, facts, files)
    graph = parse_onnx(files["model.onnx"], home.directory(model, version) / "model.onnx")
    _check_skeleton(graph, pack)
    size = _check_described(model, version, manifest)
    batch = graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None
    options = Options(
        size=size,
        batch=batch,
        task=manifest["task"],
        edge_thresholds=manifest.get("edge_thresholds"),
        thresholds=thresholds,
        frames=frames,
        threads=threads,
        plan=PlanOptions(version_compatible=host_code),
    )
    network = pack.network()
    contract = contract_of(pack, network, options)
    served = network.fused()
    weights = Folding(served, served.TASKS[contract.task]).weights(served.state_dict())
    replace_weights(graph, weights)
    onnx.helper.set_model_props(graph, metadata(pack, contract))
    engine = _engine(facts, files, graph, weights, host_code)
    made = time.monotonic() - started
    compared = compare_engine(engine, pack, network, contract, options, report)
    entry = describe(pack, network, contract, options) | from_pack(
        pack,
        engine={**engine.facts, "refit_of": version, "refit_seconds": round(made, 3)},
        parity=compared.report,
        adaptation=adaptation,
        gate=gate,
        seconds=time.monotonic() - started,
        seconds_of={"engine": made, "parity": compared.seconds},
    )
    content = {
        str(facts["file"]): engine.content,
        "golden.npz": compared.archive(str(facts["precision"])),
        **engine.beside,
        **reference_file(pack, contract.labels),
    }
    config = configuration(model, str(facts["kind"]), graph)
    return publish(home, model, content, entry, config, contract.labels)


_TYPES: dict[int, type] = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


def replace_weights(graph: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> None:
    """Put `weights` (as `Folding.weights` gives them) into a graph, float32 or half, all of them or none.

    Raises: ExportError naming the first that is missing, of another size, or too large for half.
    """
    wanted = {i.name: i for i in graph.graph.initializer if i.name in set(weight_names(graph))}
    missing = sorted(set(wanted) - set(weights))
    if missing:
        raise ExportError(f"{len(missing)} weights of the engine are not in the pack, first {missing[0]!r}")
    for name, tensor in wanted.items():
        if tensor.data_type not in _TYPES:
            raise ExportError(f"weight {name!r} of the engine is no float; build it again from the pack")
        if int(np.prod(tensor.dims, dtype=np.int64)) != weights[name].size:
            raise ExportError(
                f"weight {name!r} is {list(weights[name].shape)}, the engine has {list(tensor.dims)}"
            )
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in wanted.items():
        with np.errstate(over="ignore"):  # refused below
            arrays[name] = np.ascontiguousarray(weights[name], dtype=_TYPES[tensor.data_type])
        if not np.isfinite(arrays[name]).all():
            kind = arrays[name].dtype
            raise ExportError(f"weight {name!r} does not fit {kind}; build the pack in fp32")
    for name, tensor in wanted.items():
        tensor.raw_data = arrays[name].tobytes()


def _check_engine(model: str, version: int, facts: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    what = f"model {model!r} version {version}"
    if facts.get("precision") not in ("fp32", "fp16"):
        raise ExportError(
            f"{what} is {facts.get('precision')}: its weights carry scales; "
            "export the pack and quantise again"
        )
    if "model.onnx" not in files:
        raise ExportError(f"{what} has no model.onnx to put weights into; build it from the pack")
    refittable = facts.get("kind") != "tensorrt" or facts.get("plan", {}).get("refittable")
    if not refittable:
        raise ExportError(f"{what} was built without --refit; build it again with it")


def _check_skeleton(graph: onnx.ModelProto, pack: Pack) -> None:
    held = {p.key: p.value for p in graph.metadata_props}.get("roadworthy.skeleton")
    if held is None:
        raise ExportError(
            "the engine does not say which network it is (foreign file?); build it from the pack"
        )
    ours = json.loads(json.dumps(skeleton(pack)))
    try:
        theirs = json.loads(held)
    except (ValueError, RecursionError):
        theirs = None
    if not isinstance(theirs, dict) or set(ours) - set(theirs):
        raise ExportError("what the engine says of its network cannot be read; build it from the pack")
    for key, value in sorted(theirs.items(), key=lambda item: item[0] != "network"):
        if ours.get(key) != value:
            raise ExportError(
                f"the pack's {key} is {ours.get(key)}, the engine's {value}; build it from the pack"
            )


def _check_described(model: str, version: int, manifest: Mapping[str, Any]) -> tuple[int, int]:
    """Return (height, width) of the version.  Raises ExportError if the manifest lacks what a refit needs."""
    size = manifest.get("input")
    sides: list[Any] = [size.get(key) for key in ("height", "width")] if isinstance(size, dict) else []
    limits = manifest.get("edge_thresholds")
    if (
        len(sides) != 2
        or not all(isinstance(side, int) and side > 0 for side in sides)
        or sides[0] * sides[1] > MOST_PIXELS
        or manifest.get("task") not in TASKS
        or not (limits is None or (isinstance(limits, list) and all(isinstance(t, float) for t in limits)))
    ):
        raise ExportError(
            f"model {model!r} version {version}: its manifest does not say task and input as export.build "
            "does; build it from the pack"
        )
    return sides[0], sides[1]


def _engine(
    facts: Mapping[str, Any],
    files: Mapping[str, bytes],
    graph: onnx.ModelProto,
    weights: Mapping[str, np.ndarray],
    host_code: bool,
) -> Engine:
    content = graph.SerializeToString()
    if facts.get("kind") != "tensorrt":
        return Engine(content, dict(facts), {})
    used = {name: weights[name] for name in weight_names(graph)}
    try:
        plan = refit_plan(files[str(facts["file"])], used, host_code=host_code)
    except (TensorRTError, ValueError) as error:
        raise ExportError(one_line(error)) from error
    return Engine(plan, dict(facts), {"model.onnx": content, "layers.json": files.get("layers.json", b"{}")})


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m export.refit",
        description="Publish an engine version again with the weights of another pack of the same network: "
        "the graph stays, parity with torch is measured anew.  The version itself is never changed.",
        epilog="""examples:
  python -m export.refit road 3 packs/city-adapted --repository repo

exit codes: 0 published, 1 refused (one line on stderr says why; nothing was published), 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("model", metavar="MODEL", help="name of the model in the repository")
    result.add_argument("version", metavar="VERSION", type=int, help="the version to take the graph from")
    result.add_argument("pack", metavar="PACK", help="the pack to take the weights from")
    result.add_argument("--repository", required=True, metavar="DIR")
    allow = "refit a version-compatible TensorRT plan: its code runs in this process, so trust the version"
    result.add_argument("--allow-host-code", action="store_true", help=allow)
    result.add_argument("--threads", type=int, default=0, metavar="N", help="threads of the compared engine")
    result.add_argument(
        "--json", action="store_true", help="print one JSON object: model, version, path, manifest"
    )
    add_thresholds(result)
    return result


def main(argv: list[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    if not 1 <= args.golden_frames <= golden.LARGEST:
        command.error(f"--golden-frames {args.golden_frames}: 1 to {golden.LARGEST}")
    if args.threads < 0:
        command.error(f"--threads {args.threads}: must not be negative")
    torch.set_num_threads(args.threads or 1)
    return run_command(lambda: _run(args), (ExportError, PackError))


def _run(args: argparse.Namespace) -> int:
    if not Path(args.repository).is_dir():
        raise ExportError(f"repository {args.repository!r} does not exist")
    with ProgressBars(lines=False) as bars:
        published = refit(
            args.repository,
            args.model,
            args.version,
            load_pack(args.pack),
            thresholds=thresholds(args),
            frames=args.golden_frames,
            threads=args.threads,
            host_code=args.allow_host_code,
            progress=bars,
        )
    print(json.dumps(asdict(published), default=str) if args.json else show(published))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
