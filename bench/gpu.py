"""What a CUDA device shows: torch, ONNX Runtime's CUDA provider, TensorRT, each compared with the CPU.

    python -m bench.gpu --json --out gpu.json

One command whose output is everything that a machine without a GPU cannot see: versions, agreement with
float32 on the CPU, latencies with and without CUDA graphs, building against refitting, two lanes at once.  A
part that cannot run says why in the same JSON.  Each part is a process of its own with a limit of time: a
driver may hang and a library may end its process, and the others are measured all the same.  Nothing here has
been executed on a CUDA device by the authors yet; with `--device cpu` the torch and ONNX Runtime parts run on
the CPU, which tests the script.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import networks
from adapt.data.street.scenes import render
from bench import machine
from bench.networks import describe, random_network
from common.files import write_bytes
from export.graph.contract import Contract, ServingGraph
from export.graph.half import to_half
from export.graph.writer import write
from export.tensorrt import BuildOptions, build_plan, refit_plan
from networks.base import SegmentationNetwork
from networks.pack import PackSpec
from runtime.config import EngineConfig
from runtime.engines import load
from runtime.engines.cuda import context
from runtime.engines.tensorrt.engine import TensorRTEngine

LIBRARIES = (
    *("torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-cu13", "tensorrt-cu12", "pycuda", "cuda-bindings"),
    *("numpy", "onnx", "roadworthy"),
)
#: Seconds a part may take: two TensorRT builds and their runs need one or two minutes.
LIMIT = 900.0
DEFAULT = ["roadnet", "casenet_light", "espnetv2_edges:joint"]
Answer = Mapping[str, np.ndarray]


class Absent(Exception):
    """A part cannot run here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One network with its served graph, frames, and the float32 answers of ONNX Runtime on the CPU.

    `contract`: what it is served for; `outputs` are those that are compared."""

    contract: Contract
    spec: PackSpec
    network: SegmentationNetwork
    onnx: onnx.ModelProto
    frames: np.ndarray
    answers: dict[str, np.ndarray]

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.contract.compared

    @classmethod
    def make(cls, name: str, size: tuple[int, int], count: int) -> Case:
        """`name`: a network, or NETWORK:TASK."""
        name, _, task = name.partition(":")
        spec = describe(name, size, task or None)
        frames = np.stack([render(seed, "day", size)[0] for seed in range(count)])
        network = random_network(spec, frames)
        contract = Contract.of(spec, network)
        model = write(network, spec, size=size, batch=None)
        engine = load(
            model.SerializeToString(), "onnxruntime", "fp32", EngineConfig(threads=1), candidate=False
        )
        answers = dict(engine.run({"frame": frames}, contract.compared))
        engine.close()
        return cls(contract, spec, network, model, frames, answers)


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def agreement(case: Case, answer: Answer) -> dict[str, float]:
    """Share of pixels with the CPU's label and bit field; differences of confidence and edges (of 255)."""
    found: dict[str, float] = {}
    for name in case.outputs:
        given, wanted = answer[name], case.answers[name]
        if name in ("labels", "edge_bits"):
            found[name] = float((given == wanted).mean())
        else:
            difference = np.abs(given.astype(np.int16) - wanted.astype(np.int16))
            found[f"{name}_max"], found[f"{name}_mean"] = int(difference.max()), float(difference.mean())
    return found


def _same(case: Case, one: Answer, other: Answer) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in case.outputs)


def latency(run: Callable[[np.ndarray], object], frame: np.ndarray, runs: int) -> dict[str, float]:
    """Milliseconds of a call with one frame, host to host: median and 99th percentile of `runs`."""
    for _ in range(max(3, runs // 10)):
        run(frame)
    spent = []
    for _ in range(runs):
        started = time.perf_counter()
        run(frame)
        spent.append(1000 * (time.perf_counter() - started))
    return {
        "median_ms": round(statistics.median(spent), 4),
        "p99_ms": round(float(np.percentile(spent, 99)), 4),
        "runs": runs,
    }


def torch_part(case: Case, device: str, runs: int) -> dict[str, Any]:
    """The served graph in eager torch, float32 and with the network in float16 autocast."""
    if device == "cuda" and not torch.cuda.is_available():
        raise Absent("torch sees no CUDA device (torch.cuda.is_available() is False)")
    graph = ServingGraph(case.network.to(device), case.spec, case.contract)
    try:
        found: dict[str, Any] = {}
        for precision in ("fp32", "fp16") if device == "cuda" else ("fp32",):

            def run(frames: np.ndarray, half: bool = precision == "fp16") -> dict[str, np.ndarray]:
                # TF32 is torch's default in convolutions; float32 is what is compared here.
                with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                    pixels = torch.from_numpy(frames).to(device)
                    with torch.autocast(device, torch.float16, enabled=half):
                        logits = graph.logits(pixels)
                    answers = graph.answers([part.float() for part in logits], case.spec.size)
                    given = dict(zip(case.contract.outputs, answers, strict=True))
                    return {name: given[name].cpu().numpy() for name in case.outputs}

            found[precision] = {
                "agreement": agreement(case, run(case.frames)),
                "latency": latency(run, case.frames[:1], runs),
            }
        return found
    finally:
        case.network.to("cpu")


def onnxruntime_part(case: Case, device: str, runs: int) -> dict[str, Any]:
    """ONNX Runtime with the CUDA provider alone: a silent fall back to the CPU counts as an error."""
    import onnxruntime

    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise Absent(f"this onnxruntime has no {provider}: uninstall it, then install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = onnxruntime.InferenceSession(case.onnx.SerializeToString(), options, providers=[provider])
    if session.get_providers()[0] != provider:
        raise Absent(f"ONNX Runtime took {session.get_providers()[0]} instead of {provider}")

    def run(frames: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(case.outputs, session.run(list(case.outputs), {"frame": frames}), strict=True))

    return {
        "fp32": {
            "agreement": agreement(case, run(case.frames)),
            "latency": latency(run, case.frames[:1], runs),
        }
    }


def tensorrt_part(case: Case, device: str, runs: int) -> dict[str, Any]:
    """Builds fp32 and fp16 plans and runs them: CUDA graphs, lanes, per-layer times."""
    _tensorrt_device(device)
    found: dict[str, Any] = {}
    for precision, model in (("fp32", case.onnx), ("fp16", to_half(case.onnx))):
        options = BuildOptions(precision=precision, batch=(1, 1, len(case.frames)))
        plan = build_plan(model.SerializeToString(), options)
        found[precision] = {"plan": plan.manifest(), **_engine(case, plan.data, precision, runs)}
    return found


def _tensorrt_device(device: str) -> None:
    if device != "cuda":
        raise Absent("TensorRT runs on a CUDA device only")
    context.probe()


def _engine(case: Case, plan: bytes, precision: str, runs: int) -> dict[str, Any]:
    config = EngineConfig(concurrency=2, device="cuda")
    found: dict[str, Any] = {}
    for graphs in (False, True):
        started = time.perf_counter()
        with TensorRTEngine.load(plan, precision, config, candidate=False, graphs=graphs) as engine:

            def run(frames: np.ndarray, engine: TensorRTEngine = engine) -> dict[str, np.ndarray]:
                return engine.run({"frame": frames}, case.outputs)

            key = "cuda_graph" if graphs else "enqueued"
            found[key] = {
                "load_seconds": round(time.perf_counter() - started, 3),
                "latency": latency(run, case.frames[:1], runs),
                "agreement": agreement(case, run(case.frames)),
                "graph_refused": engine.graph_refused,
                "memory_bytes": engine.memory_bytes,
            }
            singles = [case.frames[i : i + 1] for i in range(len(case.frames))]
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(run, singles * 4))
            same = [
                _same(case, answer, run(single)) for answer, single in zip(answers, singles * 4, strict=True)
            ]
            found[key]["same_from_four_threads"] = all(same)
            if not graphs:
                found["layers_ms"] = engine.profile({"frame": case.frames[:1]}, 10)
    return found


def refit_part(case: Case, device: str, runs: int) -> dict[str, Any]:
    """Refit with other weights, and back: the answers must change, and then be the first ones again."""
    _tensorrt_device(device)
    # Weights alone: what begins with "const." is the graph's own.
    weights = [tensor for tensor in case.onnx.graph.initializer if not tensor.name.startswith("const.")]
    names = tuple(tensor.name for tensor in weights)
    options = BuildOptions(batch=(1, 1, len(case.frames)), refit=names)
    built = build_plan(case.onnx.SerializeToString(), options)
    plan = built.data
    first = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in weights}
    second = {name: value * np.float32(0.5) for name, value in first.items()}
    config = EngineConfig(device="cuda")
    with TensorRTEngine.load(plan, "fp32", config, candidate=True) as engine:
        before = engine.run({"frame": case.frames}, case.outputs)
        started = time.perf_counter()
        standby = engine.refit(second)
        seconds = time.perf_counter() - started
        with standby:
            changed = standby.run({"frame": case.frames}, case.outputs)
        untouched = engine.run({"frame": case.frames}, case.outputs)
        with engine.refit(first) as again:
            back = again.run({"frame": case.frames}, case.outputs)
    started = time.perf_counter()
    written = refit_plan(plan, second)
    return {
        "build_seconds": built.seconds,
        "refit_to_warm_seconds": round(seconds, 4),
        "refit_to_plan_seconds": round(time.perf_counter() - started, 4),
        "plan_bytes": len(written),
        "agreement_of_refittable_plan": agreement(case, before),
        "changed": float(np.mean([(changed[name] != before[name]).mean() for name in case.outputs])),
        "live_engine_untouched": _same(case, untouched, before),
        "back_to_first": _same(case, back, before),
    }


PARTS: dict[str, Callable[[Case, str, int], dict[str, Any]]] = {
    "torch": torch_part,
    "onnxruntime": onnxruntime_part,
    "tensorrt": tensorrt_part,
    "tensorrt-refit": refit_part,
}


def guarded(command: Sequence[str], limit: float) -> dict[str, Any]:
    """The JSON object that a command prints last, or {"error": how it ended instead}."""
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as complained:
        child = subprocess.Popen(command, stdout=said, stderr=complained, start_new_session=True)
        try:
            code = child.wait(limit)
            ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"still running after {limit:g} s, and killed"
        finally:
            with contextlib.suppress(ProcessLookupError):  # and whatever it started
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for file in (said, complained):
            file.seek(0)
        try:
            found = json.loads(said.read())
        except ValueError:
            lines = complained.read().decode(errors="replace").strip().splitlines()
            return {"error": f"{ended}; last said: {' | '.join(lines[-8:])[-1500:]}"}
    return found if isinstance(found, dict) else {"error": f"{ended} without a report"}


def alone(
    name: str, part: str, size: tuple[int, int], device: str, runs: int, limit: float = LIMIT
) -> dict[str, Any]:
    """One part on one network, in a process of its own: what it measured, {"absent": …} or {"error": …}."""
    words = ["--network", name, "--part", part, "--size", f"{size[0]}x{size[1]}", "--device", device]
    command = [sys.executable, "-X", "faulthandler", "-m", "bench.gpu", *words, "--runs", str(runs)]
    report = guarded([*command, "--in-process", "--json"], limit)
    if "networks" not in report:
        return report
    found: dict[str, Any] = report["networks"][name][part]
    return found


def here(
    name: str, parts: Sequence[str], size: tuple[int, int], device: str, runs: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same in this process."""
    case = Case.make(name, size, 4)
    for part in parts:
        try:
            yield part, PARTS[part](case, device, runs)
        except (Absent, context.CudaError) as error:
            yield part, {"absent": str(error)}
        except Exception as error:  # one broken part must not hide what the others show
            yield part, {"error": f"{type(error).__name__}: {error}"}


def measure(
    names: Sequence[str],
    size: tuple[int, int],
    device: str,
    runs: int,
    parts: Sequence[str] = tuple(PARTS),
    *,
    limit: float | None = LIMIT,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Every part on every network.  `executed` counts those that ran.

    `limit`: seconds a part may take; None: all of them in this process.  `keep` gets the report each time
    that there is more of it.
    """
    report: dict[str, Any] = {"machine": machine.describe(), "libraries": versions(), "device": device}
    try:
        found = context.probe()
        report["cuda"] = {"version": found.version, "devices": [asdict(each) for each in found.devices]}
    except context.CudaError as error:
        report["cuda"] = {"absent": str(error)}
    report["executed"] = 0
    report["networks"] = {}
    for name in names:
        results = report["networks"][name] = {}
        found = (
            here(name, parts, size, device, runs)
            if limit is None
            else ((part, alone(name, part, size, device, runs, limit)) for part in parts)
        )
        for part, result in found:
            results[part] = result
            report["executed"] += not {"absent", "error"} & set(result)
            said = result.get("error") or result.get("absent") or "executed"
            print(f"{name} {part}: {said}", file=sys.stderr, flush=True)
            keep(report)
    return report


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Measure and compare torch, ONNX Runtime and TensorRT on a CUDA device, as JSON.",
        epilog="examples:\n  python -m bench.gpu --json --out gpu.json\n"
        "  python -m bench.gpu --network ddrnet --size 512x1024 --runs 200\n"
        "  python -m bench.gpu --network casenet --network espnetv2_edges:joint\n\n"
        "exit codes: 0 something was executed and nothing failed, 1 otherwise, 2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = "NETWORK or NETWORK:TASK, repeatable; default: one of each task"
    parser.add_argument("--network", action="append", metavar="NAME", help=which)
    parser.add_argument("--size", default="256x512", metavar="HxW")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="default: all; repeatable")
    of_a_part = f"of a part ({LIMIT:g})"
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help=of_a_part)
    unguarded = "all parts in this process, without a limit"
    parser.add_argument("--in-process", action="store_true", help=unguarded)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--json", action="store_true", help="print the report to stdout")
    arguments = parser.parse_args(argv)
    try:
        height, width = (int(part) for part in arguments.size.split("x"))
    except ValueError:
        parser.error(f"--size {arguments.size}: write HEIGHTxWIDTH, for example 256x512")
    known = networks.names()
    if wrong := [name for name in arguments.network or () if name.partition(":")[0] not in known]:
        parser.error(f"--network {wrong[0]}: choose one of {', '.join(known)}")
    if arguments.runs < 1 or arguments.limit <= 0:
        parser.error("--runs and --limit must be above 0")

    def keep(report: dict[str, Any]) -> None:
        if arguments.out:
            write_bytes(arguments.out, (json.dumps(report, indent=1) + "\n").encode(), durable=False)

    report = measure(
        arguments.network or DEFAULT,
        (height, width),
        arguments.device,
        arguments.runs,
        arguments.part or tuple(PARTS),
        limit=None if arguments.in_process else arguments.limit,
        keep=keep,
    )
    if arguments.json:
        print(json.dumps(report, indent=1))
    failed = any("error" in result for parts in report["networks"].values() for result in parts.values())
    return 0 if report["executed"] and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
