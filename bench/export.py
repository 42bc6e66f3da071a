"""What an export costs, and why the graph is written the way it is.

    python -m bench.export [--tail]

For each network: time to write the graph (beside torch's own exporter, with the share of weights that keep
their names), to build and publish a version, to refit one (new weights to a published version, and the part
of it that is parity), to load either, and the processor time of a frame in ONNX Runtime, in float32 and INT8,
beside torch.  Then the same graph written in other ways, one change at a time (`--tail`: these alone).  One
thread; the ways take turns within a round, so that a busy machine slows all alike; medians of processor time,
and ratios of them.  Weights are random: the times do not depend on them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from bench import machine
from bench.networks import describe, random_network
from export.build import Options, Published, build, parse_size
from export.graph.contract import INPUT, ServingGraph
from export.graph.writer import write
from export.parity.parity import Thresholds
from export.quantize.int8 import quantise
from export.refit import refit
from networks.base import SegmentationNetwork
from networks.pack import PackSpec, load_pack, write_pack
from runtime.config import EngineConfig
from runtime.engines import load

CASES = {
    "roadnet": (128, 256),
    "espnetv2": (352, 480),
    "ddrnet": (352, 480),
    "pidnet": (352, 480),
    "casenet_light": (256, 512),
    "espnetv2_edges:joint": (256, 512),
    "fcn8s": (128, 256),
    "resnet38": (128, 256),
    "deeplabv2": (128, 256),
    "casenet": (128, 256),
}
DEFAULT = ("roadnet", "espnetv2", "ddrnet", "casenet_light", "espnetv2_edges:joint")
# Random weights: only time is measured.
ANY = Options(threads=1, thresholds=Thresholds(0, 0, 255, edges_max=255, edges_mean=255, bits=0, mf=1))


def seconds(action: Callable[[], Any], rounds: int) -> float:
    """Median processor time of an action, after one that is not counted."""
    action()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return statistics.median(times)


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of processor time of each way; all take one turn a round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for action in ways.values():
        action()
    for _ in range(rounds):
        for name, action in ways.items():
            start = time.process_time()
            action()
            times[name].append(time.process_time() - start)
    return {name: round(1000 * statistics.median(values), 2) for name, values in times.items()}


def runner(model: onnx.ModelProto, frame: np.ndarray, precision: str = "fp32") -> Callable[[], Any]:
    """A call of the engine for what a request gets that names no output."""
    content = model.SerializeToString()
    engine = load(content, "onnxruntime", precision, EngineConfig(threads=1), candidate=False)
    names = [o.name for o in model.graph.output if o.name != "probabilities"]
    return lambda: engine.run({INPUT: frame}, names)


def described(name: str, size: tuple[int, int]) -> PackSpec:
    """`name`: NETWORK or NETWORK:TASK."""
    network, _, task = name.partition(":")
    return describe(network, size, task or None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard output, not even from C++: the exporter prints the whole graph when it fails."""
    sys.stdout.flush()
    saved = os.dup(1)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(saved, 1)
            os.close(saved)


def torchs_exporter(network: SegmentationNetwork, spec: PackSpec) -> tuple[float, float]:
    """(seconds, share of weights under their state_dict names) of torch.onnx.export's TorchScript path."""
    frame = torch.zeros(1, *spec.size, 3, dtype=torch.uint8)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "model.onnx"
        with _quiet():
            torch.onnx.export(
                ServingGraph(network, spec), (frame,), str(file), opset_version=18, dynamo=False
            )
        spent = time.process_time() - start
        held = [i for i in onnx.load(str(file)).graph.initializer if np.prod(i.dims) > 1]
    names = {f"network.{name}" for name in network.state_dict()}
    return spent, sum(i.name in names for i in held) / len(held)


def measure(name: str, size: tuple[int, int], rounds: int, count: int = 4, builds: int = 3) -> dict[str, Any]:
    """One row of the first table.  `count` golden frames; `builds` of each kind that are counted."""
    spec = described(name, size)
    frames = np.random.default_rng(0).integers(0, 256, (max(count, 2), *size, 3), np.uint8)
    network = random_network(spec, frames)
    row: dict[str, Any] = {"network": name, "size": "x".join(map(str, size))}
    row["write_s"] = round(seconds(lambda: write(network, spec, size=size, batch=None), rounds), 2)
    try:
        spent, kept = torchs_exporter(network, spec)
        row |= {"torch_write_s": round(spent, 2), "torch_names": f"{100 * kept:.0f} %"}
    except Exception as error:  # the exporter's own errors; one is the reason for a case here
        row |= {"torch_write_s": None, "torch_names": f"fails: {type(error).__name__}"}
    with tempfile.TemporaryDirectory() as folder:
        pack = write_pack(Path(folder) / "pack", spec, network.state_dict(), golden=frames[:count])
        repository = Path(folder) / "repo"
        row["build_s"] = round(seconds(lambda: build(pack, repository, options=ANY), builds), 2)
        again = load_pack(pack.path)

        def refitted(frames: int) -> Published:
            return refit(repository, spec.name, 1, again, thresholds=ANY.thresholds, frames=frames, threads=1)

        row["refit_s"] = round(seconds(lambda: refitted(count), builds), 2)
        row["refit_1_s"] = round(seconds(lambda: refitted(1), builds), 2)
        published = refitted(count)
        row["refit_parity"] = round(
            published.manifest["seconds"]["parity"] / published.manifest["build_seconds"], 2
        )
        content = (published.path / "model.onnx").read_bytes()

        def warm() -> None:
            engine = load(content, "onnxruntime", "fp32", EngineConfig(threads=1), candidate=False)
            engine.run({INPUT: frames[:1]}, [engine.spec.outputs[0].name])
            engine.close()

        row["load_s"] = round(seconds(warm, builds), 2)
    tensor = torch.from_numpy(frames[:1].copy())
    served = ServingGraph(network, spec)

    def eager() -> Any:
        with torch.inference_mode():
            return served(tensor)

    graph = write(network, spec, size=size, batch=None, form="per-class")
    quantised = quantise(graph, frames, classes=len(spec.classes), count=len(frames)).model
    ways = {
        "torch": eager,
        "engine": runner(graph, frames[:1]),
        "int8": runner(quantised, frames[:1], "int8"),
    }
    times = take_turns(ways, rounds)
    row |= {f"{way}_ms": spent for way, spent in times.items()}
    row["ratio"] = round(times["torch"] / times["engine"], 2)
    row["int8_ratio"] = round(times["engine"] / times["int8"], 2)
    return row


# -- the same graph, written otherwise ----------------------------------------------------------------


def _producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output}


def with_prelu(model: onnx.ModelProto) -> onnx.ModelProto:
    """PRelu nodes where the writer wrote Relu + slope * Min(x, 0)."""
    model = _copy(model)
    made = _producers(model)
    nodes = []
    for node in model.graph.node:
        parts = [made.get(name) for name in node.input]
        if node.op_type == "Add" and all(parts) and [p.op_type for p in parts if p] == ["Relu", "Mul"]:
            below = made.get(parts[1].input[0]) if parts[1] else None
            if below is not None and below.op_type == "Min" and parts[0].input[0] == below.input[0]:  # type: ignore[union-attr]
                nodes.append(helper.make_node("PRelu", [below.input[0], parts[1].input[1]], node.output))  # type: ignore[union-attr]
                continue
        nodes.append(node)
    return _with_nodes(model, nodes)


def with_softmax(model: onnx.ModelProto) -> onnx.ModelProto:
    """A Softmax node for `probabilities`."""
    model = _copy(model)
    made = _producers(model)
    powers = made[made["probabilities"].input[0]]
    logits = made[powers.input[0]].input[0]
    nodes = [n for n in model.graph.node if n.output[0] != "probabilities"]
    return _with_nodes(model, [*nodes, helper.make_node("Softmax", [logits], ["probabilities"], axis=1)])


def with_full_softmax(model: onnx.ModelProto) -> onnx.ModelProto:
    """Confidence as the largest entry of a full-resolution Softmax."""
    model = _copy(model)
    made = _producers(model)
    index = next(n for n in model.graph.node if n.op_type == "ArgMax")
    nodes = [n for n in model.graph.node if n.output[0] != "confidence"]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "bench.axis"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(255, np.float32), "bench.scale"))
    cast = made["confidence"]
    nodes += [
        helper.make_node("Softmax", [index.input[0]], ["bench.softmax"], axis=1),
        helper.make_node("ReduceMax", ["bench.softmax", "bench.axis"], ["bench.max"], keepdims=0),
        helper.make_node("Mul", ["bench.max", "bench.scale"], ["bench.byte"]),
        helper.make_node("Cast", ["bench.byte"], ["confidence"], to=cast.attribute[0].i),
    ]
    return _with_nodes(model, nodes)


def without_head(model: onnx.ModelProto) -> onnx.ModelProto:
    """Labels and confidence straight from the logits' resolution: what the enlargement and its head cost."""
    model = _copy(model)
    index = next(n for n in model.graph.node if n.op_type == "ArgMax")
    enlarge = _producers(model)[index.input[0]]
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == enlarge.output[0]:
                node.input[i] = enlarge.input[0]
    for output in model.graph.output[:2]:
        for axis in (1, 2):
            output.type.tensor_type.shape.dim[axis].Clear()
    return _with_nodes(model, [n for n in model.graph.node if n is not enlarge])


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def _with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """The model with these nodes, less those that nothing reads any more."""
    wanted = {o.name for o in model.graph.output}
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
            wanted |= set(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    held = [i for i in model.graph.initializer if i.name in wanted]
    del model.graph.initializer[:]
    model.graph.initializer.extend(held)
    onnx.checker.check_model(model)
    return model


def variants(name: str, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """One row of the second table: milliseconds of each way to write the graph."""
    spec = described(name, size)
    frames = np.random.default_rng(0).integers(0, 256, (2, *size, 3), np.uint8)
    network = random_network(spec, frames)
    graph = write(network, spec, size=size, batch=None)
    ways = {
        "as_written": graph,
        "per_class": write(network, spec, size=size, batch=None, form="per-class"),
        "prelu": with_prelu(graph),
    }
    if spec.task == "segmentation":
        ways["softmax"] = with_softmax(graph)
        ways["full_softmax"] = with_full_softmax(graph)
        ways["no_head"] = without_head(graph)
    times = take_turns({key: runner(model, frames[:1]) for key, model in ways.items()}, rounds)
    row: dict[str, Any] = {"network": name, "size": "x".join(map(str, size)), "ms": times["as_written"]}
    return row | {key: round(times[key] / times["as_written"], 2) for key in ways if key != "as_written"}


FIRST = [
    ("network", "network"),
    ("size", "frame"),
    ("write_s", "write, s"),
    ("torch_write_s", "torch.onnx, s"),
    ("torch_names", "names torch.onnx keeps"),
    ("build_s", "build, s"),
    ("refit_s", "refit, s"),
    ("refit_1_s", "refit, 1 frame, s"),
    ("refit_parity", "parity's part"),
    ("load_s", "load and warm, s"),
    ("engine_ms", "engine, ms"),
    ("torch_ms", "torch, ms"),
    ("ratio", "torch / engine"),
    ("int8_ms", "INT8, ms"),
    ("int8_ratio", "engine / INT8"),
]
SECOND = [
    ("network", "network"),
    ("size", "frame"),
    ("ms", "whole, ms"),
    ("per_class", "per class"),
    ("prelu", "PRelu nodes"),
    ("softmax", "Softmax node"),
    ("full_softmax", "full-resolution Softmax"),
    ("no_head", "no enlargement"),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.export",
        description="What an export costs, and why the graph is written the way it is.",
        epilog="""examples:
  python -m bench.export --networks roadnet espnetv2 ddrnet --rounds 7
  python -m bench.export --networks resnet38 --rounds 2 --frames 1 --builds 1    # heavy: one at a time
  python -m bench.export --tail --rounds 7

exit codes: 0 measured, 2 wrong usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of each way (9)")
    parser.add_argument("--networks", nargs="+", choices=sorted(CASES), default=list(DEFAULT))
    positive = {"type": int, "metavar": "N"}
    parser.add_argument("--frames", default=4, help="golden frames of a build (4)", **positive)
    parser.add_argument("--builds", default=3, help="builds and refits that are counted (3)", **positive)
    parser.add_argument("--tail", action="store_true", help="the ways to write the last part alone")
    parser.add_argument("--size", metavar="HxW", type=parse_size, help="of the frames (each network's own)")
    args = parser.parse_args(argv)
    if min(args.rounds, args.frames, args.builds) < 1:
        parser.error("--rounds, --frames and --builds must be 1 or more")
    torch.set_num_threads(1)
    where = machine.describe()
    first, second = [], []
    for name in args.networks:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        if not args.tail:
            size = args.size or CASES[name]
            first.append(measure(name, size, args.rounds, args.frames, args.builds))
        second.append(variants(name, args.size or CASES[name], args.rounds))
        gc.collect()
    where["load_after"] = round(os.getloadavg()[0], 2)
    print(machine.line(where))
    for rows, columns in ((first, FIRST), (second, SECOND)):
        if rows:
            print("", machine.table(rows, columns), sep="\n")
    print(json.dumps({"bench": "export", "machine": where, "export": first, "variants": second}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
