"""The vehicle: a camera that sends a frame every 1/rate seconds whether or not the last was answered (open
loop).

It knows the server's address and a file of frames.  Every request leaves one line of JSON: when it was due,
sent and answered, the version that answered, or why it was refused.  It stops at SIGTERM, waits for what is
still on its way, and prints its account.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from runtime.client import Client, Rejected


def ask(client: Client, model: str, index: int, frame: np.ndarray, due: float) -> dict[str, Any]:
    """One request, as the line it leaves: ``wait`` from the moment the camera had the frame to the answer."""
    line: dict[str, Any] = {"index": index, "due": due, "sent": time.time()}
    try:
        answer = client.infer(model, frame, source="vehicle", timeout=5.0)
        line.update(outcome="answered", version=answer.version)
        confidence = answer.confidence
        if confidence is not None:
            line["confidence"] = round(float(np.asarray(confidence, np.float32).mean()) / 255, 4)
    except Rejected as error:
        line.update(outcome="rejected", reason=str(error))
    except grpc.RpcError as error:
        line.update(outcome="failed", reason=str(error.code()))
    except Exception as error:  # a camera does not stop because one answer was odd; the line says what it was
        line.update(outcome="failed", reason=f"{type(error).__name__}: {error}")
    line["done"] = time.time()
    line["ms"] = round(1000 * (line["done"] - due), 3)
    return line


def drive(
    server: str, model: str, frames: np.ndarray, rate: float, log: Path, stop: threading.Event
) -> dict[str, int]:
    """Send frames round and round until ``stop``; returns the account."""
    account = {"sent": 0, "answered": 0, "rejected": 0, "failed": 0}
    with Client(server) as client, log.open("w", encoding="utf-8") as out, ThreadPoolExecutor(16) as pool:

        def leave(line: dict[str, Any]) -> None:
            with lock:
                account[line["outcome"]] += 1
                out.write(json.dumps(line) + "\n")

        lock = threading.Lock()
        begin_clock, begin = time.monotonic(), time.time()
        i = 0
        while not stop.is_set():
            due = i / rate
            if stop.wait(max(0.0, begin_clock + due - time.monotonic())):
                break
            task = pool.submit(ask, client, model, i, frames[i % len(frames)], begin + due)
            task.add_done_callback(lambda done: leave(done.result()))
            account["sent"] += 1
            i += 1
        pool.shutdown(wait=True)
    return account


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo.vehicle",
        description="Stream frames at a server at a fixed rate until SIGTERM.",
        epilog="Exit codes: 0 after SIGTERM or SIGINT, 2 wrong usage.",
    )
    parser.add_argument("--server", required=True, help="HOST:PORT")
    parser.add_argument("--model", required=True)
    parser.add_argument("--frames", type=Path, required=True, help=".npy of uint8 [n,H,W,3]")
    parser.add_argument("--rate", type=float, default=10.0, help="frames a second (default %(default)s)")
    parser.add_argument("--log", type=Path, required=True, help="JSON lines, one a request")
    a = parser.parse_args(argv)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    frames = np.load(a.frames, mmap_mode="r", allow_pickle=False)
    print(json.dumps(drive(a.server, a.model, frames, a.rate, a.log, stop)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
