"""Why the INT8 recipe is what it is: one trained pack, one choice varied at a time.

Agreement with float32 on frames that were not calibrated on, and processor time against float32, one
thread, interleaved.  The pack's training replay is calibrated on, its golden frames are compared on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import machine
from export.errors import ExportError
from export.graph.contract import INPUT, Contract
from export.graph.writer import write
from export.parity import parity
from export.quantize import int8
from networks.pack import PackError, load_pack
from runtime.config import EngineConfig
from runtime.engines import Engine, load

OUTPUTS = ("labels", "confidence")
SEEDS = (0, 1, 2)


def variants(pool: np.ndarray, count: int) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """name -> (candidates, arguments of `quantise`); the first is the recipe."""
    result: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "recipe": (pool, {"count": count}),
        "tensorrt encoding": (pool, {"count": count, "target": "tensorrt"}),
        "percentile ranges": (pool, {"count": count, "method": "percentile"}),
        "sums too": (pool, {"count": count, "operators": ("Conv", "Add")}),
        "every operator": (pool, {"count": count, "operators": int8.KNOWN_OPERATORS}),
    }
    for seed in SEEDS:
        chosen = np.random.default_rng(seed).choice(len(pool), count, replace=False)
        result[f"frames at random {seed}"] = (pool[chosen], {"count": count})
    return result


def measure(
    engines: dict[str, Engine], frames: np.ndarray, rounds: int
) -> tuple[dict[str, list[dict[str, np.ndarray]]], dict[str, float]]:
    """Each engine's answers to every frame, and its median processor milliseconds."""
    answers: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in engines}
    cpu: dict[str, list[float]] = {name: [] for name in engines}
    for index in range(max(rounds, len(frames))):
        frame = np.ascontiguousarray(frames[index % len(frames)][None])
        for name, engine in engines.items():
            start = time.process_time()
            answer = engine.run({INPUT: frame}, OUTPUTS)
            cpu[name].append(time.process_time() - start)
            if index < len(frames):
                answers[name].append(answer)
    return answers, {name: 1000 * statistics.median(values[1:] or values) for name, values in cpu.items()}


def compare(path: Path, count: int, rounds: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """A row for each variant.  Raises: PackError, ExportError."""
    pack = load_pack(path)
    pool, frames = int8.candidates(pack, pack.spec.size), pack.golden()
    if len(pool) <= count or not len(frames):
        raise ExportError(
            f"{path} has {len(pool)} training frames and {len(frames)} golden ones; "
            f"give it more than {count} and at least one, or ask for fewer --frames"
        )
    model = write(pack.network(), pack.spec, size=pack.spec.size, batch=1)
    config = EngineConfig(threads=1)
    engines = {"fp32": load(model.SerializeToString(), "onnxruntime", "fp32", config, candidate=False)}
    for name, (candidates, arguments) in variants(pool, count).items():
        tell(name)
        encoded = int8.quantise(model, candidates, classes=len(pack.spec.classes), **arguments).model
        engines[name] = load(encoded.SerializeToString(), "onnxruntime", "int8", config, candidate=False)
    answers, cpu = measure(engines, frames, rounds)
    whole = {
        name: {output: np.concatenate([a[output] for a in part]) for output in OUTPUTS}
        for name, part in answers.items()
    }
    contract = Contract("segmentation", pack.spec.classes)
    rows = []
    for name in engines:
        report = parity.compare(whole[name], whole["fp32"], contract)
        rows.append(
            {
                "network": pack.spec.network,
                "variant": name,
                "agreement": round(report["agreement"], 4),
                "classes": round(statistics.mean(c["agreement"] for c in report["classes"].values()), 4),
                "edges": round(report["boundary_agreement"] or 0.0, 4),
                "cpu_ms": round(cpu[name], 2),
                "speed": round(cpu["fp32"] / cpu[name], 2),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.int8",
        description="Vary one choice of the INT8 recipe at a time on a trained pack; agreement with float32 "
        "and processor time.  A Markdown table, then one JSON object as the last line of standard output.",
        epilog="""examples:
  python -m bench.int8 packs/street
  python -m bench.int8 packs/a packs/b --frames 8

exit codes: 0 measured, 1 a pack cannot be read or has too few frames, 2 usage""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packs", nargs="+", type=Path, metavar="PACK")
    parser.add_argument("--frames", type=int, default=4, help="frames to calibrate on (4)")
    parser.add_argument("--rounds", type=int, default=15, help="timed frames of each variant (15)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    conditions = machine.describe()
    rows = []
    try:
        for path in args.packs:
            rows += compare(path, args.frames, args.rounds, lambda name: print(f"{name} …", file=sys.stderr))
    except (ExportError, PackError) as error:
        print(f"bench.int8: {error}", file=sys.stderr)
        return 1
    conditions["load_after"] = os.getloadavg()[0]
    columns = [
        ("network", "network"),
        ("variant", "variant"),
        ("agreement", "labels agree"),
        ("classes", "mean of classes"),
        ("edges", "at edges"),
        ("cpu_ms", "ms"),
        ("speed", "speed"),
    ]
    print(machine.line(conditions))
    print(machine.table(rows, columns))
    print(json.dumps({"bench": "int8", "machine": conditions, "frames": args.frames, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
