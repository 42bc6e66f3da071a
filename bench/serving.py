"""What serving costs: a network through gRPC beside the same network called in process, and a tiny
network through this server beside the same one through the real Triton.

The first says how much of the engine reaches the client; the second, with an engine that costs nothing,
compares the servers alone.  All ways take turns within a round, so that a busy machine slows all alike;
figures are medians over the rounds, and ratios are taken within a round.  Beside the wall clock stand
processor milliseconds of the server and of the client: those survive a busy machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench import load, machine, onnx_models
from bench.peers import roadworthy
from bench.peers.contestants import Contestant, Roadworthy, Triton
from bench.peers.environments import Absent
from bench.peers.process import Server, cpu_seconds

SIZE = (512, 1024)
QUIET = "[watch]\nseconds = 0\n"


@dataclass
class Way:
    """One way of getting answers.  `run(seconds)` returns a result and the server's processor seconds."""

    name: str
    run: Callable[[float], tuple[load.Result, float, float]]
    results: list[dict[str, float]] = field(default_factory=list)

    def round(self, seconds: float) -> None:
        result, server, client = self.run(seconds)
        count = max(1, len(result.answered))
        if result.failed:
            failures = sorted({one.failure for one in result.sent if one.failure})
            raise RuntimeError(
                f"{self.name}: {result.failed} of {len(result.sent)} failed: {', '.join(failures)}"
            )
        self.results.append(
            {
                "throughput": result.throughput,
                "p50_ms": result.percentile(50),
                "p99_ms": result.percentile(99),
                "server_cpu_ms": 1000 * server / count,
                "client_cpu_ms": 1000 * client / count,
            }
        )

    def median(self, key: str) -> float:
        return statistics.median(one[key] for one in self.results)

    def row(self, reference: Way) -> dict[str, Any]:
        """Medians, and the ratio of throughput to the reference's, round by round."""
        ratios = [
            a["throughput"] / b["throughput"] for a, b in zip(self.results, reference.results, strict=True)
        ]
        return {
            "way": self.name,
            "throughput": round(self.median("throughput"), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            **{
                key: round(self.median(key), 2)
                for key in ("p50_ms", "p99_ms", "server_cpu_ms", "client_cpu_ms")
            },
        }


COLUMNS = (
    ("way", "way"),
    ("throughput", "frames/s"),
    ("ratio", "ratio"),
    ("ratio_min", "min"),
    ("ratio_max", "max"),
    ("p50_ms", "p50 ms"),
    ("p99_ms", "p99 ms"),
    ("server_cpu_ms", "server CPU ms"),
    ("client_cpu_ms", "client CPU ms"),
)


def over_the_wire(name: str, server: Server, senders: Sequence[load.Sender]) -> Way:
    """A way through a running server."""

    def run(seconds: float) -> tuple[load.Result, float, float]:
        theirs, mine = cpu_seconds(server.pid), time.process_time()
        result = load.closed_loop(senders, seconds)
        return result, cpu_seconds(server.pid) - theirs, time.process_time() - mine

    return Way(name, run)


def in_process(name: str, onnx: bytes, frame: np.ndarray, *, threads: int, callers: int) -> Way:
    """The same engine called by `callers` threads of this process."""
    from runtime.config import EngineConfig
    from runtime.engines import load as load_engine

    config = EngineConfig(threads=threads)
    engine = load_engine(onnx, "onnxruntime", "fp32", config, candidate=False)
    lock = threading.Lock()  # the server, too, runs one at a time with all its threads

    class Caller(load.Sender):
        def __init__(self) -> None:
            pass

        def send(self, timeout: float = 30.0) -> bytes:
            with lock:
                engine.run({"frame": frame}, load.OUTPUTS)
            return b""

        def close(self) -> None:
            pass

    def run(seconds: float) -> tuple[load.Result, float, float]:
        begin = time.process_time()
        result = load.closed_loop([Caller() for _ in range(callers)], seconds)
        return result, time.process_time() - begin, 0.0

    return Way(name, run)


def real_network(name: str, size: tuple[int, int]) -> bytes:
    """The serving graph of a network of this project with random weights, as ONNX."""
    import torch

    from bench.networks import describe, random_network
    from export.graph.writer import write

    torch.set_num_threads(1)
    spec = describe(name, size)
    network = random_network(spec, roadworthy.smooth_frames(2, *size))
    return bytes(write(network, spec, size=size, batch=None).SerializeToString())


def rounds(ways: Sequence[Way], count: int, seconds: float) -> None:
    """Every way once to warm up, then `count` rounds of all of them in turn."""
    for way in ways:
        way.round(min(1.0, seconds))
        way.results.clear()
    for number in range(count):
        print(f"round {number + 1} of {count}", file=sys.stderr)
        for way in ways:
            way.round(seconds)


@contextlib.contextmanager
def running(contestant: Contestant, onnx: bytes) -> Iterator[Server]:
    """A started server with one version."""
    contestant.publish(onnx)
    with contestant.start() as server:
        yield server


def ways_to(
    stack: contextlib.ExitStack,
    contestant: Contestant,
    server: Server,
    frame: np.ndarray,
    label: str,
    clients: int,
) -> list[Way]:
    """Raw bytes, and shared memory where the server has it; the connections close with the stack."""
    makers = [("raw bytes", contestant.senders)]
    if contestant.shared:
        makers.append(("shared memory", contestant.shared_senders))
    ways = []
    for kind, make in makers:
        try:
            senders = stack.enter_context(load.opened(make(server, frame, clients)))
        except grpc.RpcError as error:
            print(f"{label}, {kind}: left out, {error.code().name} {error.details()}", file=sys.stderr)
            continue
        ways.append(over_the_wire(f"{label}, {kind}", server, senders))
    return ways


def engine_share(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Throughput through gRPC with two requests in flight, over the same engine in process."""
    onnx = real_network(options.network, SIZE)
    frame = roadworthy.smooth_frames(1, *SIZE, seed=5)
    ours = Roadworthy(work / "share", size=SIZE, threads=options.threads, settings=QUIET)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(ours, onnx))
        ways = [in_process("in process", onnx, frame, threads=options.threads, callers=2)]
        ways += ways_to(stack, ours, server, frame, "gRPC", 2)
        rounds(ways, options.rounds, max(options.seconds, 3.0))
    engine = ways[0].median("server_cpu_ms")
    return [
        {**way.row(ways[0]), "engine_cpu": round(engine / way.median("server_cpu_ms"), 3)} for way in ways
    ]


def front_end(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A tiny engine: ours and Triton's, raw and through shared memory; ours over a unix socket too."""
    onnx = onnx_models.segmentation(*SIZE)
    frame = roadworthy.smooth_frames(1, *SIZE, seed=5)
    ours = Roadworthy(work / "tiny", size=SIZE, threads=1, settings=QUIET)
    theirs = Triton(work / "tiny", size=SIZE)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(ours, onnx))
        ways = ways_to(stack, ours, server, frame, "roadworthy", options.clients)
        socket = roadworthy.start(
            ours.repository,
            work=ours.work,
            settings=ours.settings,
            arguments=["--host", f"unix:{work / 'tiny' / 'socket'}", "--read-only"],
            name="socket",
        )
        stack.enter_context(socket)
        senders = stack.enter_context(load.opened(ours.senders(socket, frame, options.clients)))
        ways.append(over_the_wire("roadworthy, raw bytes, unix socket", socket, senders))
        try:
            triton = stack.enter_context(running(theirs, onnx))
        except Absent as absent:
            print(f"triton: left out, {absent}", file=sys.stderr)
        else:
            ways += ways_to(stack, theirs, triton, frame, "triton", options.clients)
        rounds(ways, options.rounds, options.seconds)
    named = {way.name: way for way in ways}
    rows = []
    for way in ways:
        kind = "shared memory" if "shared memory" in way.name else "raw bytes"
        reference = named.get(f"triton, {kind}", ways[0])
        rows.append({**way.row(reference), "ratio_to": reference.name})
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving",
        description="Throughput and processor time of serving: a real network beside the same engine in "
        "process, and a tiny one beside the real Triton.  Frames of 512 x 1024, RGB.",
        epilog="examples:\n  python -m bench.serving\n  python -m bench.serving --only front-end\n\n"
        "exit codes: 0 measured, 1 a server could not be started or a request failed, 2 usage\n"
        "without the real Triton (python -m bench.peers --install triton) its rows are left out",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=("share", "front-end"), help="one of the two parts")
    parser.add_argument("--network", default="ddrnet", help="of the first part (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the engine in the first part (default 1)")
    parser.add_argument("--clients", type=int, default=4, help="of the second part (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in a round (default 2)")
    options = parser.parse_args(argv)
    conditions = machine.describe()
    report: dict[str, Any] = {"bench": "serving", "size": SIZE, "rounds": options.rounds}
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        try:
            if options.only != "front-end":
                report["share"] = {
                    "network": options.network,
                    "threads": options.threads,
                    "rows": engine_share(Path(folder), options),
                }
            if options.only != "share":
                report["front_end"] = {"clients": options.clients, "rows": front_end(Path(folder), options)}
        except (RuntimeError, OSError) as error:
            print(f"bench.serving: {error}", file=sys.stderr)
            return 1
    conditions["load_after"] = os.getloadavg()[0]
    report["machine"] = conditions
    print(machine.line(conditions))
    if "share" in report:
        print(f"\n{options.network}, {options.threads} thread(s), ratio to the engine in process")
        print(machine.table(report["share"]["rows"], (*COLUMNS, ("engine_cpu", "engine / server CPU"))))
    if "front_end" in report:
        print(f"\ntiny engine, {options.clients} clients, ratio to Triton by the same way")
        print(machine.table(report["front_end"]["rows"], COLUMNS))
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
