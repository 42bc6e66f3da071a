"""This server beside the others, same ONNX, same frames, same client: throughput, latency, processor time,
memory, start time, and what they do with a new version.

The engine is tiny, so that the servers are compared and not ONNX Runtime with itself.  All servers run at
the same time and take turns within a round; a server that is not asked anything uses no processor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import load, machine, onnx_models, serving
from bench.peers import environments, roadworthy
from bench.peers.contestants import CONTESTANTS, Contestant, Refusal
from bench.peers.process import Server, pss_bytes

WORDS = {"mlserver": " (BYTES)", "bentoml": " (HTTP)", "litserve": " (HTTP, multipart)"}
COLUMNS = (
    ("server", "server"),
    ("way", "frames as"),
    ("throughput", "frames/s"),
    ("ratio", "ratio"),
    ("ratio_min", "min"),
    ("ratio_max", "max"),
    ("p50_ms", "p50 ms"),
    ("p99_ms", "p99 ms"),
    ("server_cpu_ms", "server CPU ms"),
    ("started_s", "start s"),
    ("pss_mb", "MB"),
    ("reload", "new version under load"),
)


def reload_under_load(contestant: Contestant, server: Server, senders: list[load.Sender], onnx: bytes) -> str:
    """Three new versions while all clients ask: failed requests, median seconds."""
    if not contestant.reloads:
        return "has no reload"
    seconds, failed, sent = [], 0, 0
    for _ in range(3):
        version = contestant.publish(onnx)
        with load.OpenLoop(senders, 30.0) as loop:
            begin = time.perf_counter()
            try:
                contestant.swap(server, version)
            except Refusal as refusal:
                return f"refused: {refusal}"
            seconds.append(time.perf_counter() - begin)
            time.sleep(0.5)
        failed += sum(bool(one.failure) for one in loop.sent)
        sent += len(loop.sent)
    return f"{failed}/{sent} failed, {sorted(seconds)[1]:.2f} s"


def compare(work: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a server and way; raises RuntimeError where our own server does not answer."""
    size = serving.SIZE
    onnx = onnx_models.segmentation(*size)
    other = onnx_models.segmentation(*size, variant=1)
    frame = roadworthy.smooth_frames(1, *size, seed=5)
    found: list[tuple[Contestant, Server, list[serving.Way]]] = []
    with contextlib.ExitStack() as stack:
        for name in options.servers:
            contestant = CONTESTANTS[name](work, size=size)
            try:
                server = stack.enter_context(serving.running(contestant, onnx))
            except environments.Absent as absent:
                print(f"{name}: left out, {absent}", file=sys.stderr)
                continue
            print(f"{name}: ready after {server.started:.1f} s", file=sys.stderr)
            ways = serving.ways_to(stack, contestant, server, frame, name, options.clients)
            found.append((contestant, server, ways))
        everything = [way for _, _, ways in found for way in ways]
        serving.rounds(everything, options.rounds, options.seconds)
        reference = everything[0]
        rows = []
        for contestant, server, ways in found:
            with load.opened(contestant.senders(server, frame, 2)) as senders:
                memory = pss_bytes(server.pid)
                reload = reload_under_load(contestant, server, senders, other)
            for i, way in enumerate(ways):
                row = way.row(reference)
                row["server"], row["way"] = contestant.name, row["way"].split(", ", 1)[1]
                row["way"] += WORDS.get(contestant.name, "")
                if i == 0:
                    row |= {
                        "started_s": round(server.started, 2),
                        "pss_mb": round(memory / 1e6),
                        "reload": reload,
                    }
                rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description="Compare this server with others on this machine.  Ratios are to this server with raw "
        "bytes, taken within each round; the rows say medians.",
        epilog="examples:\n  python -m bench.peers --install triton mlserver\n  python -m bench.peers\n\n"
        "The others live in virtual environments in the folder that ROADWORTHY_PEERS names (default: peers,\n"
        "beside the repository).  One that is missing is left out, with the reason on standard error.\n\n"
        "exit codes: 0 measured or installed, 1 a server failed, 2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--install",
        nargs="+",
        choices=list(environments.ENVIRONMENTS),
        metavar="NAME",
        help="make environments and end",
    )
    parser.add_argument("--servers", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--clients", type=int, default=4, help="at the same time (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each way in a round (default 2)")
    options = parser.parse_args(argv)
    if options.install:
        for name in options.install:
            try:
                print(f"{name}: {environments.install(name)}", file=sys.stderr)
            except subprocess.CalledProcessError as error:
                print(f"bench.peers: {name} could not be installed: {error}", file=sys.stderr)
                return 1
        return 0
    conditions = machine.describe()
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        try:
            rows = compare(Path(folder), options)
        except (RuntimeError, OSError) as error:
            print(f"bench.peers: {error}", file=sys.stderr)
            return 1
    conditions["load_after"] = os.getloadavg()[0]
    print(machine.line(conditions))
    print(machine.table(rows, COLUMNS))
    print(json.dumps({"bench": "peers", "machine": conditions, "clients": options.clients, "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
