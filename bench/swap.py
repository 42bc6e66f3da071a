"""What a swap costs the answers: open-loop load, versions swapped under it, ours beside other servers.

Frames come at a fixed rate, answered or not, and a frame's latency counts from when it was due.  Each
server swaps the same 5 MB network several times; between two swaps it is left alone, and those quiet
times are what a swap is compared with.  At the end a network whose weights are NaN is offered.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import load, machine, onnx_models
from bench.peers import roadworthy
from bench.peers.contestants import Contestant, MLServer, Refusal, Roadworthy, Triton
from bench.peers.environments import Absent
from bench.peers.process import pss_bytes

SIZE = (256, 512)
NO_SHADOW = "[watch]\nseconds = 0\n"
SHADOW = "[watch]\nseconds = 0\n[shadow]\nframes = 24\n"
WAYS = {
    "roadworthy": "promote: every check but the shadow",
    "roadworthy+shadow": "submit: every check, 24 live frames in the shadow",
    "triton": "new version directory, RepositoryModelLoad",
    "mlserver": "new weights, RepositoryModelLoad",
}


@dataclass
class Measured:
    """What one server gave.  Latencies in ms, times in s."""

    server: str
    swaps: int = 0
    sent: int = 0
    failed: int = 0
    rejected: int = 0
    seconds: list[float] = field(default_factory=list)
    calm: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    detail: list[dict[str, float]] = field(default_factory=list)
    pss: tuple[int, int] = (0, 0)
    nan: str = ""

    def row(self) -> dict[str, Any]:
        calm, during = load.percentile(self.calm, 99), load.percentile(self.during, 99)
        return {
            "server": self.server,
            "way": WAYS[self.server],
            "swaps": self.swaps,
            "sent": self.sent,
            "failed": self.failed,
            "rejected": self.rejected,
            "swap_seconds_median": round(statistics.median(self.seconds), 3),
            "swap_seconds_max": round(max(self.seconds), 3),
            "without_shadow_seconds_median": _median([one.get("checks") for one in self.detail]),
            "p50_calm_ms": round(load.percentile(self.calm, 50), 1),
            "p50_during_ms": round(load.percentile(self.during, 50), 1),
            "p99_calm_ms": round(calm, 1),
            "p99_during_ms": round(during, 1),
            "p99_ratio": round(during / calm, 2),
            "worst_ratio_median": round(statistics.median(self.ratios), 2),
            "pss_before_mb": round(self.pss[0] / 1e6, 1),
            "pss_after_mb": round(self.pss[1] / 1e6, 1),
            "nan_network": self.nan,
        }


def _median(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return round(statistics.median(present), 3) if present else None


def contestants(work: Path, names: list[str], threads: int) -> list[tuple[str, Contestant]]:
    """The servers by the names of WAYS; raises KeyError for another name."""
    makers: dict[str, Callable[[], Contestant]] = {
        "roadworthy": lambda: Roadworthy(work / "plain", size=SIZE, threads=threads, settings=NO_SHADOW),
        "roadworthy+shadow": lambda: Roadworthy(
            work / "shadow", size=SIZE, threads=threads, settings=SHADOW, shadow=True
        ),
        "triton": lambda: Triton(work, size=SIZE, threads=threads),
        "mlserver": lambda: MLServer(work, size=SIZE, threads=threads),
    }
    return [(name, makers[name]()) for name in names]


def measure(name: str, contestant: Contestant, *, swaps: int, rate: float, calm: float) -> Measured:
    """Starts the server, swaps under load, offers the NaN network, stops it."""
    out = Measured(name)
    height, width = SIZE
    frame = roadworthy.smooth_frames(1, height, width, seed=5)
    contestant.publish(onnx_models.convolutional(height, width))
    with contestant.start() as server, load.opened(contestant.senders(server, frame, 2)) as senders:
        load.closed_loop(senders[:1], 2.0)
        before = pss_bytes(server.pid)
        quiet: list[tuple[float, float]] = []
        busy: list[tuple[float, float]] = []
        with load.OpenLoop(senders, rate) as loop:
            for i in range(swaps):
                begin = time.perf_counter()
                time.sleep(calm)
                quiet.append((begin, time.perf_counter()))
                version = contestant.publish(onnx_models.convolutional(height, width, variant=i + 1))
                time.sleep(0.3)  # what publishing cost this machine is not the swap's
                begin = time.perf_counter()
                detail = contestant.swap(server, version)
                end = time.perf_counter()
                busy.append((begin, end))
                out.seconds.append(end - begin)
                if "shadow_seconds" in detail and "seconds" in detail:
                    detail["checks"] = detail["seconds"] - detail["shadow_seconds"]
                out.detail.append(detail)
                time.sleep(1.0)
        out.swaps = swaps
        out.sent = len(loop.sent)
        # A full queue is a refusal with a reason; a machine too slow for the rate gives it in calm times too.
        out.rejected = sum(one.failure == "RESOURCE_EXHAUSTED" for one in loop.sent)
        out.failed = sum(bool(one.failure) for one in loop.sent) - out.rejected
        for (q0, q1), (b0, b1) in zip(quiet, busy, strict=True):
            calm_ones = [one.milliseconds for one in loop.between(q0, q1) if not one.failure]
            ones = [one.milliseconds for one in loop.between(b0, b1) if not one.failure]
            out.calm += calm_ones
            out.during += ones
            if calm_ones and ones:
                out.ratios.append(max(ones) / max(calm_ones))
        out.pss = (before, pss_bytes(server.pid))
        out.nan = _offer_nan(contestant, server, senders[0])
    return out


def _offer_nan(contestant: Contestant, server: Any, sender: load.Sender) -> str:
    """What becomes of a network that computes NaN."""
    version = contestant.publish(onnx_models.convolutional(*SIZE, nan=True))
    try:
        contestant.swap(server, version)
    except Refusal as refusal:
        return f"refused: {refusal}"
    answered = load.answered_version(sender.send())
    return f"live, answers as version {answered}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.swap",
        description="Swap a 5 MB network under open-loop load, on this server and on others, and print what "
        "it cost the answers: a table, then one JSON object.",
        epilog="examples:\n  python -m bench.swap\n  python -m bench.swap --servers roadworthy --swaps 20\n\n"
        "exit codes: 0 measured, 1 a server could not be started, 2 usage\n"
        "servers that are not installed are left out, with the reason on standard error",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--servers", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--swaps", type=int, default=7, help="swaps of each server (default 7)")
    parser.add_argument("--rate", type=float, default=10.0, help="frames a second (default 10)")
    parser.add_argument(
        "--calm", type=float, default=4.0, help="seconds without a swap before each (default 4)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine (default 1)")
    options = parser.parse_args(argv)
    rows = []
    conditions = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        for name, contestant in contestants(Path(folder), options.servers, options.threads):
            print(f"{name}: {WAYS[name]}", file=sys.stderr)
            try:
                measured = measure(
                    name, contestant, swaps=options.swaps, rate=options.rate, calm=options.calm
                )
            except Absent as absent:
                print(f"{name}: left out, {absent}", file=sys.stderr)
                continue
            except (RuntimeError, Refusal) as error:
                print(f"bench.swap: {name}: {error}", file=sys.stderr)
                return 1
            rows.append(measured.row())
            print(json.dumps(rows[-1]), file=sys.stderr)
    conditions["load_after"] = os.getloadavg()[0]
    columns = (
        ("server", "server"),
        ("failed", "failed"),
        ("rejected", "queue full"),
        ("sent", "sent"),
        ("swap_seconds_median", "swap s"),
        ("without_shadow_seconds_median", "checks s"),
        ("p50_calm_ms", "p50 calm"),
        ("p50_during_ms", "p50 swap"),
        ("p99_calm_ms", "p99 calm"),
        ("p99_during_ms", "p99 swap"),
        ("p99_ratio", "ratio"),
        ("pss_before_mb", "MB before"),
        ("pss_after_mb", "MB after"),
        ("nan_network", "NaN network"),
    )
    print(machine.line(conditions))
    print(machine.table(rows, columns))
    print(
        json.dumps({"bench": "swap", "machine": conditions, "rate": options.rate, "size": SIZE, "rows": rows})
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
