"""What a frame costs on each network: PyTorch, ONNX Runtime in float32, ONNX Runtime in INT8.

One thread, the whole served graph (uint8 frame in, labels and confidence out), every way in turn within a
round so that a busy machine slows all alike; medians of processor time, and ratios of those medians.
Weights are random: what is measured does not depend on them, but agreement between INT8 and float32 does,
and is therefore only reported for a pack that was trained (`--pack`).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import networks
from adapt.data.street.scenes import render
from bench import machine
from export.errors import ExportError
from export.graph.contract import INPUT, Contract, ServingGraph
from export.graph.writer import write
from export.parity import parity
from export.quantize import int8
from networks.base import SegmentationNetwork
from networks.labels import CITYSCAPES19
from networks.pack import PackError, PackSpec, load_pack, normalise
from runtime.config import EngineConfig
from runtime.engines import load

LIGHT = ("roadnet", "espnetv2", "ddrnet", "pidnet", "casenet_light", "espnetv2_edges")
HEAVY = ("fcn8s", "resnet38", "deeplabv2", "casenet")
#: Frames INT8 is calibrated on; agreement is measured on as many others.
CALIBRATED = 6
SEEDS = range(9000, 9000 + 2 * CALIBRATED)
Way = Callable[[np.ndarray], dict[str, np.ndarray]]


def describe(name: str, size: tuple[int, int], task: str | None = None) -> PackSpec:
    """A pack of that network in its published form, with Cityscapes' classes; `task` None: the network's."""
    return PackSpec(
        name=name,
        version="1.0.0",
        network=name,
        task=task or networks.architecture(name).TASK,
        arguments={},
        classes=CITYSCAPES19.classes,
        colours=CITYSCAPES19.colours,
        size=size,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        training="random weights",
        licence="Apache-2.0",
    )


def random_network(spec: PackSpec, frames: np.ndarray) -> SegmentationNetwork:
    """Random weights with the batch statistics of two frames, so that activations have sane ranges."""
    torch.manual_seed(0)
    network = networks.create(spec.network, classes=len(spec.classes), **spec.arguments)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(normalise(torch.from_numpy(frames[:2].copy()), spec))
    return network.eval()


def multiplications(spec: PackSpec) -> float:
    """Giga multiply-accumulates of one frame, counted on shapes alone."""
    with torch.device("meta"):
        network = networks.create(spec.network, classes=len(spec.classes), **spec.arguments).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.empty(1, 3, *spec.size, device="meta"))
    return float(counter.get_total_flops()) / 2e9


def ways(
    network: SegmentationNetwork, spec: PackSpec, frames: np.ndarray, targets: Sequence[str]
) -> dict[str, Way]:
    """Every way to answer a frame uint8 [1,H,W,3] with what parity compares, by name."""
    graph = ServingGraph(network, spec)
    names = graph.contract.compared

    def eager(frame: np.ndarray) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            answer = dict(zip(graph.contract.outputs, graph(torch.from_numpy(frame)), strict=True))
        return {name: answer[name].numpy() for name in names}

    def engine(model: Any, precision: str) -> Way:
        config = EngineConfig(threads=1)
        loaded = load(model.SerializeToString(), "onnxruntime", precision, config, candidate=False)

        return lambda frame: loaded.run({INPUT: frame}, names)

    model = write(network, spec, size=spec.size, batch=1)
    result: dict[str, Way] = {"torch": eager, "fp32": engine(model, "fp32")}
    for target in targets:
        quantised = int8.quantise(
            model, frames[:CALIBRATED], classes=len(spec.classes), target=target, count=CALIBRATED
        ).model
        result[f"int8 {target}"] = engine(quantised, "int8")
    return result


def measure(
    spec: PackSpec, network: SegmentationNetwork, frames: np.ndarray, rounds: int, targets: Sequence[str]
) -> dict[str, Any]:
    """One row: processor and wall milliseconds of each way, their ratios to float32 in ONNX Runtime."""
    contestants = ways(network, spec, frames, targets)
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(rounds + 1):  # the first round warms up
        frame = np.ascontiguousarray(frames[index % len(frames)][None])
        for name, run in contestants.items():
            start = time.perf_counter(), time.process_time()
            run(frame)
            if index:
                wall[name].append(time.perf_counter() - start[0])
                cpu[name].append(time.process_time() - start[1])
    cpu_ms = {name: 1000 * statistics.median(values) for name, values in cpu.items()}
    row: dict[str, Any] = {
        "network": spec.network,
        "size": f"{spec.size[0]}x{spec.size[1]}",
        "parameters_m": round(sum(p.numel() for p in network.parameters()) / 1e6, 2),
        "gmac": round(multiplications(spec), 2),
        "rounds": rounds,
    }
    for name in contestants:
        key = name.replace(" ", "_")
        row[f"{key}_cpu_ms"] = round(cpu_ms[name], 1)
        row[f"{key}_wall_ms"] = round(1000 * statistics.median(wall[name]), 1)
        row[f"{key}_speed"] = round(cpu_ms["fp32"] / cpu_ms[name], 2)
    if spec.training != "random weights":
        unseen, contract = frames[CALIBRATED:], Contract.of(spec, network)
        truth = _all(contestants["fp32"], unseen)
        for target in targets:
            report = parity.compare(_all(contestants[f"int8 {target}"], unseen), truth, contract)
            for key in ("agreement", "boundary_agreement", "bits_equal", "mf"):
                if report.get(key) is not None:
                    row[f"int8_{target}_{key.removesuffix('_agreement')}"] = round(report[key], 4)
    return row


def _all(run: Way, frames: np.ndarray) -> dict[str, np.ndarray]:
    answers = [run(frame[None].copy()) for frame in frames]
    return {name: np.concatenate([a[name] for a in answers]) for name in answers[0]}


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return int(height), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW, for example 256x512") from None


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m bench.networks",
        description="Time a frame on each network, one thread, served graph: PyTorch, ONNX Runtime float32 "
        "and INT8 in turn; medians of processor time and their ratios.  A Markdown table, then one JSON "
        "object as the last line of standard output.",
        epilog="""examples:
  python -m bench.networks
  python -m bench.networks --networks fcn8s resnet38 deeplabv2 --size 128x256 --rounds 3
  python -m bench.networks --pack packs/street --rounds 30

exit codes: 0 measured, 1 a network could not be exported or a pack not read, 2 usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--networks", nargs="+", choices=LIGHT + HEAVY, default=list(LIGHT), help=f"({' '.join(LIGHT)})")
    add("--pack", type=Path, help="a trained pack instead: its network, size and weights")
    add("--size", type=_size, default=(256, 512), metavar="HxW", help="of the frames (256x512)")
    add("--rounds", type=int, default=15, help="frames of each way (15)")
    add("--targets", nargs="+", choices=int8.TARGETS, default=list(int8.TARGETS), help="encodings (both)")
    return result


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.rounds < 1:
        parser().error("--rounds must be 1 or more")
    torch.set_num_threads(1)
    conditions = machine.describe()
    rows = []
    try:
        pack = load_pack(args.pack) if args.pack else None
        specs = [pack.spec] if pack else [describe(name, args.size) for name in args.networks]
        street = np.stack([render(seed, "day", specs[0].size)[0] for seed in SEEDS])
        for spec in specs:
            multiple = networks.architecture(spec.network).size_multiple
            if any(side % multiple for side in spec.size):
                raise ExportError(f"{spec.network} wants frames whose sides are multiples of {multiple}")
            print(f"{spec.network} …", file=sys.stderr)
            network = pack.network() if pack else random_network(spec, street)
            rows.append(measure(spec, network, street, args.rounds, args.targets))
            del network
            gc.collect()
    except (ExportError, PackError, RuntimeError) as error:
        print(f"bench.networks: {error}", file=sys.stderr)
        return 1
    conditions["load_after"] = os.getloadavg()[0]
    columns = [
        ("network", "network"),
        ("size", "frame"),
        ("parameters_m", "M parameters"),
        ("gmac", "GMAC"),
        ("fp32_cpu_ms", "ORT fp32, ms"),
        ("torch_speed", "torch"),
    ]
    columns += [(f"int8_{target}_speed", f"int8 ({target})") for target in args.targets]
    if pack:
        for target in args.targets:
            columns += [
                (f"int8_{target}_agreement", f"agreement ({target})"),
                (f"int8_{target}_boundary", f"at edges ({target})"),
            ]
    print(machine.line(conditions))
    print("Speed against ONNX Runtime float32 (higher is faster), processor time, one thread, interleaved:")
    print(machine.table(rows, columns))
    print(json.dumps({"bench": "networks", "machine": conditions, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
