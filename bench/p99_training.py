"""Serving beside training: is the 99th percentile of answers at most 1.25 times what it is without?

One server, one camera that sends frames at a fixed rate whether or not the last was answered (open loop:
latency counts from the moment the frame was due), and the adapter as it is shipped (`adapt.run`) in a
training that does not end.  The adapter is stopped and continued (SIGSTOP, SIGCONT) every few seconds, so
that both cases are measured side by side on the same machine; the first answers of every stretch are left
out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
MODEL = "road"
VARIANTS: dict[str, list[str]] = {
    "default": [],
    "default+throttle": ["--slow", "1.15"],
    "idle": ["--priority", "idle"],
    "impolite": ["--nice", "0"],
}

EPILOG = """\
examples:
  python -m bench.p99_training
  python -m bench.p99_training --variants default,default+throttle,idle --pairs 6 --seconds 10
  python -m bench.p99_training --pack out/real/cityscapes --rate 5

exit codes: 0 measured, 1 a process failed, 2 wrong usage
"""


class BenchError(Exception):
    """One line: thing, reason."""


class Service:
    """runtime.serve in a process of its own."""

    def __init__(self, repository: Path, log: Path) -> None:
        self.log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "runtime.serve",
                    "--repository",
                    str(repository),
                    "--port",
                    "0",
                    "--metrics-port",
                    "0",
                ],
                cwd=ROOT,
                stderr=errors,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        for _ in range(600):
            found = [w[5:] for w in log.read_text().split() if w.startswith("grpc=")]
            if found:
                self.address = found[0]
                return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        self.close()
        raise BenchError(f"the server did not start: {log.read_text()[-500:]}")

    def close(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        if self.process.poll() is None:
            self.process.kill()


class Camera:
    """Open loop at `rate`; `latencies` of the present stretch, in ms."""

    def __init__(self, address: str, frames: np.ndarray, rate: float) -> None:
        from runtime.client import Client

        self.client, self.frames, self.rate = Client(address), frames, rate
        self.latencies: list[tuple[float, float]] = []
        self.failed = 0
        self.stopped = threading.Event()
        self.pool = ThreadPoolExecutor(8)
        self.thread = threading.Thread(target=self._drive, daemon=True)
        self.thread.start()

    def _ask(self, frame: np.ndarray, due: float) -> None:
        try:
            self.client.infer(MODEL, frame, source="front", timeout=10.0)
            self.latencies.append((due, 1000 * (time.monotonic() - due)))
        except Exception:
            self.failed += 1

    def _drive(self) -> None:
        begin, i = time.monotonic(), 0
        while not self.stopped.is_set():
            due = begin + i / self.rate
            if self.stopped.wait(max(0.0, due - time.monotonic())):
                return
            self.pool.submit(self._ask, self.frames[i % len(self.frames)], due)
            i += 1

    def stretch(self, seconds: float, leave_out: float) -> list[float]:
        begin = time.monotonic() + leave_out
        self.stopped.wait(leave_out + seconds)
        end = time.monotonic()
        time.sleep(0.2)
        return [ms for due, ms in self.latencies if begin <= due < end]

    def close(self) -> None:
        self.stopped.set()
        self.pool.shutdown(wait=True)
        self.client.close()


def adapter(
    service: Service, a: argparse.Namespace, folder: Path, options: list[str]
) -> subprocess.Popen[bytes]:
    work = Path(tempfile.mkdtemp(dir=folder))
    with open(folder / "adapter.log", "a") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "adapt.run",
                "--server",
                service.address,
                "--model",
                MODEL,
                "--pack",
                str(a.pack),
                "--repository",
                str(folder / "repo"),
                "--workdir",
                str(work),
                "--from",
                f"front={folder / 'pictures'}",
                "--frames",
                str(a.frames),
                "--near",
                "-1",
                "--portions",
                "0.3",
                "--steps",
                "1000000",
                "--batch",
                a.batch,
                "--set",
                "checkpoint_every=50",
                "--once",
                "--quiet",
                *options,
            ],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_for_training(
    camera: Camera, process: subprocess.Popen[bytes], folder: Path, patience: float
) -> None:
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(Exception):
            said = camera.client.adaptation(MODEL)["adapters"]
            stage = said[0]["report"].get("round", {}).get("stage", "") if said else ""
            if stage.startswith("train"):
                return
        time.sleep(0.3)
    raise BenchError(f"the adapter did not come to train: {(folder / 'adapter.log').read_text()[-500:]}")


def percentile(values: list[float], p: float) -> float:
    return round(float(np.percentile(values, p)), 2) if values else float("nan")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    service: Service, a: argparse.Namespace, folder: Path, frames: np.ndarray, name: str
) -> dict[str, Any]:
    camera = Camera(service.address, frames, a.rate)
    process = adapter(service, a, folder, VARIANTS[name])
    try:
        wait_for_training(camera, process, folder, 90.0)
        alone: list[float] = []
        beside: list[float] = []
        worked = 0.0
        ratios = []
        for _ in range(a.pairs):
            os.killpg(process.pid, signal.SIGSTOP)
            one = camera.stretch(a.seconds, 0.5)
            os.killpg(process.pid, signal.SIGCONT)
            before = cpu_seconds(process.pid)
            two = camera.stretch(a.seconds, 0.5)
            worked += cpu_seconds(process.pid) - before
            if process.poll() is not None:
                raise BenchError(f"the adapter ended: {(folder / 'adapter.log').read_text()[-500:]}")
            alone += one
            beside += two
            ratios.append(percentile(two, 99) / percentile(one, 99))
        result = {
            "variant": name,
            "requests": [len(alone), len(beside)],
            "failed": camera.failed,
            "alone_ms": {p: percentile(alone, p) for p in (50, 95, 99)},
            "beside_ms": {p: percentile(beside, p) for p in (50, 95, 99)},
            "p99_ratio": round(percentile(beside, 99) / percentile(alone, 99), 3),
            "p99_ratio_of_pairs": [round(r, 3) for r in ratios],
            "training_share_of_a_core": round(worked / (a.pairs * (a.seconds + 0.7)), 3),
        }
        print(
            f"{name:<18}{result['alone_ms'][50]:>9}{result['alone_ms'][99]:>9}{result['beside_ms'][50]:>11}"
            f"{result['beside_ms'][99]:>9}{result['p99_ratio']:>8}{result['training_share_of_a_core']:>10}",
            flush=True,
        )
        return result
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        camera.close()


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.p99_training",
        description="p99 of serving while a round trains.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--pack", type=Path, default=ROOT / "packs" / "street-day")
    p.add_argument("--rate", type=float, default=10.0, help="frames a second (10)")
    p.add_argument("--pairs", type=int, default=5, help="stretches of each kind (5)")
    p.add_argument("--seconds", type=float, default=8.0, help="of a stretch (8)")
    p.add_argument("--frames", type=int, default=48)
    p.add_argument("--batch", default="3+3")
    p.add_argument("--variants", default="default,idle", help=f"of {', '.join(VARIANTS)} (default,idle)")
    a = p.parse_args(argv)
    names = a.variants.split(",")
    if unknown := set(names) - set(VARIANTS):
        p.error(f"variants {', '.join(sorted(unknown))}: choose of {', '.join(VARIANTS)}")
    from bench.demo import streets
    from export.build import build
    from networks.pack import load_pack

    pack = load_pack(a.pack)
    a.pack = pack.path
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        seen = streets.stream(0, "dusk", drives=max(1, a.frames // 12), frames=12)
        (folder / "pictures").mkdir()
        for i, frame in enumerate(seen):
            Image.fromarray(frame).resize(pack.spec.size[::-1]).save(folder / "pictures" / f"{i:04d}.png")
        frames = np.stack([np.asarray(Image.fromarray(f).resize(pack.spec.size[::-1])) for f in seen])
        build(pack, folder / "repo", model=MODEL)
        results = []
        try:
            service = Service(folder / "repo", folder / "serve.log")
            try:
                print(f"{'':<18}{'alone':>18}{'beside training':>20}")
                heads = f"{'p50 ms':>9}{'p99 ms':>9}{'p50 ms':>11}{'p99 ms':>9}{'ratio':>8}{'training':>10}"
                print(f"{'variant':<18}{heads}")
                for name in names:
                    results.append(measure(service, a, folder, frames, name))
            finally:
                service.close()
        except BenchError as error:
            print(f"bench.p99_training: {error}", file=sys.stderr)
            return 1
    print(json.dumps({"bench": "p99_training", "rate": a.rate, "size": pack.spec.size, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
