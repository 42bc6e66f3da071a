"""Ten thousand requests with a swap every hundred: nothing lost, nothing leaked.

Half of the clients send raw bytes, half go through shared memory where the server has it.  Every request
is counted on both sides: sent = answered + rejected here, accepted = answered + rejected in the server's
account.  Memory, descriptors, threads and shared-memory regions of the server are read from outside;
growth counts from the end of the warm-up, a tenth of the swaps.  The clients are paced, so that frames
flow all through every swap.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import grpc

from bench import load, machine, onnx_models
from bench.peers import process, roadworthy
from bench.peers.contestants import Refusal, Roadworthy

SIZE = (256, 512)
SETTINGS = "[watch]\nseconds = 0\n"


def sample(pid: int) -> dict[str, int]:
    """What the server holds, seen from outside."""
    return {
        "rss": process.rss_bytes(pid),
        "pss": process.pss_bytes(pid),
        "descriptors": process.descriptors(pid),
        "threads": process.threads(pid),
        "regions": process.shared_regions(pid),
    }


def soak(work: Path, *, requests: int, every: int, clients: int, rate: float) -> dict[str, Any]:
    """Runs it; returns the report, whose "ok" says whether every promise was kept."""
    from runtime.client import Client

    ours = Roadworthy(work, size=SIZE, settings=SETTINGS)
    frame = roadworthy.smooth_frames(1, *SIZE, seed=5)
    ours.publish(onnx_models.convolutional(*SIZE, layers=1, channels=32))
    swaps = requests // every
    sent: list[load.Sent] = []
    samples: list[dict[str, int]] = []
    refused: list[str] = []
    seconds: list[float] = []
    ours_before = set(os.listdir("/dev/shm"))
    with ours.start() as server:
        senders = ours.senders(server, frame, clients)
        try:
            senders[: clients // 2] = ours.shared_senders(server, frame, clients // 2)
        except grpc.RpcError as error:
            print(f"shared memory: left out, {error.code().name} {error.details()}", file=sys.stderr)
        with load.opened(senders):
            for number in range(swaps):
                version = ours.publish(
                    onnx_models.convolutional(*SIZE, layers=1, channels=32, variant=1 + number % 7)
                )
                swap = _Swap(ours, server, version)
                # `every` requests in all, the swap somewhere in their middle
                result = load.closed_loop(
                    senders, 120.0, limit=every // clients, pace=clients / rate, when=swap
                )
                sent += result.sent
                refused += swap.refused
                seconds += swap.seconds
                samples.append(sample(server.pid))
                if number % 10 == 9:
                    print(f"{number + 1} swaps, {samples[-1]}", file=sys.stderr)
        with Client(server.target) as client:
            account = client.status()["account"]
        samples.append(sample(server.pid))
    left = set(os.listdir("/dev/shm")) - ours_before
    return _report(sent, samples, refused, seconds, account, left)


class _Swap:
    """Called once in the middle of a batch of requests."""

    def __init__(self, ours: Roadworthy, server: process.Server, version: int) -> None:
        self._ours, self._server, self._version = ours, server, version
        self.refused: list[str] = []
        self.seconds: list[float] = []

    def __call__(self) -> None:
        begin = time.perf_counter()
        try:
            self._ours.swap(self._server, self._version)
        except Refusal as refusal:
            self.refused.append(str(refusal))
        else:
            self.seconds.append(time.perf_counter() - begin)


def _report(
    sent: list[load.Sent],
    samples: list[dict[str, int]],
    refused: list[str],
    seconds: list[float],
    account: dict[str, Any],
    left: set[str],
) -> dict[str, Any]:
    warm = max(1, len(samples) // 10)
    tail = samples[-max(1, len(samples) // 10) :]
    first = samples[warm : warm + len(tail)]

    def growth(key: str) -> float:
        before = statistics.median(one[key] for one in first)
        return (statistics.median(one[key] for one in tail) - before) / before

    answered = sum(not one.failure for one in sent)
    rejected: dict[str, int] = {}
    for one in sent:
        if one.failure:
            rejected[one.failure] = rejected.get(one.failure, 0) + 1
    theirs = sum(account["rejected"].values())
    # The last sample was taken after the clients had gone: their connections are not a leak.
    descriptors = samples[-2]["descriptors"] - samples[warm]["descriptors"]
    kept = {
        "sent = answered + rejected": len(sent) == answered + sum(rejected.values()),
        "accepted = answered + rejected": account["accepted"] == account["answered"] + theirs,
        "the two sides agree": account["answered"] == answered,
        "none in flight": account["in_flight"] == 0,
        # A short run ends while glibc's pools still fill.
        "memory flat (< 2 %)": len(samples) < 50 or growth("rss") < 0.02,
        "no descriptor leaked": descriptors <= 2,
        "no region held": samples[-1]["regions"] <= samples[0]["regions"],
        "no region left": not left,
        "every swap taken": not refused,
    }
    return {
        "ok": all(kept.values()),
        "kept": kept,
        "sent": len(sent),
        "answered": answered,
        "rejected": rejected,
        "account": account,
        "swaps": len(seconds),
        "refused": refused[:5],
        "swap_seconds_median": round(statistics.median(seconds), 3) if seconds else None,
        "versions_seen": len({one.version for one in sent if one.version}),
        "rss_growth": round(growth("rss"), 4),
        "pss_growth": round(growth("pss"), 4),
        "rss_mb": [round(one["rss"] / 1e6, 1) for one in samples[:: max(1, len(samples) // 10)]],
        "descriptors": [samples[warm]["descriptors"], samples[-2]["descriptors"], samples[-1]["descriptors"]],
        "threads": [samples[warm]["threads"], samples[-1]["threads"]],
        "regions": [samples[0]["regions"], samples[-1]["regions"]],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak_serving",
        description="Many requests with a swap every so often; check that none is lost and nothing leaks.",
        epilog="examples:\n  python -m bench.soak_serving\n  python -m bench.soak_serving --requests 1000\n\n"
        "exit codes: 0 every promise was kept, 1 one was not (the table says which), 2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=10_000,
        help="in all (default 10000); memory is judged from 50 swaps on",
    )
    parser.add_argument("--every", type=int, default=100, help="requests between two swaps (default 100)")
    parser.add_argument("--clients", type=int, default=4, help="at the same time (default 4)")
    parser.add_argument("--rate", type=float, default=150.0, help="frames a second at most (default 150)")
    options = parser.parse_args(argv)
    if options.requests < 10 * options.every:
        parser.error("--requests must be at least ten times --every")
    conditions = machine.describe()
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        try:
            report = soak(
                Path(folder),
                requests=options.requests,
                every=options.every,
                clients=options.clients,
                rate=options.rate,
            )
        except (RuntimeError, OSError) as error:
            print(f"bench.soak_serving: {error}", file=sys.stderr)
            return 1
    conditions["load_after"] = os.getloadavg()[0]
    print(machine.line(conditions))
    rows = [{"promise": name, "kept": "yes" if kept else "NO"} for name, kept in report["kept"].items()]
    print(machine.table(rows, (("promise", "promise"), ("kept", "kept"))))
    print(
        f"{report['sent']} sent, {report['answered']} answered, rejected {report['rejected']}, "
        f"{report['swaps']} swaps (median {report['swap_seconds_median']} s), "
        f"RSS growth {report['rss_growth']:+.2%}"
    )
    print(json.dumps({"bench": "soak_serving", "machine": conditions, **report}))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
