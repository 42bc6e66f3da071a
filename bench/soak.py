"""Left running while everything goes wrong: the road changes, the adapter adapts and swaps, and adapter and
server are killed with SIGKILL at random moments and started again.

    python -m bench.soak [--minutes 10] [--seed 0] [--out out/soak]

Four processes as on a vehicle: ``runtime.serve``, ``adapt.run``, the camera (a thread here, because it has to
know what it sent), and this one, which kills and restarts the others.  Promises, each checked:

  sent = answered + rejected   every frame of the camera ends in an answer or in a refusal by the server;
                               while that is down the camera asks again, and attempts are counted
  one version                  every answer names one version that the repository's history calls live
  memory and disk bounded      resident memory of both and bytes of work folder and repository stay under the
                               bounds printed; of engine versions the last few are kept, the others deleted
  clean end                    after the last kill both start again, and end on SIGTERM with status 0

and mean IoU over time, from labels only this process has: as served, of the released network on the same
frames, and of the labelled bound (the round's recipe with true labels of other streets of each domain).
Streets are rendered at 64×128; the network is that of ``bench.gate``.  The minutes are all of it, rendering,
bound and drawing included.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
MODEL = "street"
DOMAINS = ("day", "dusk", "night", "fog")
WINDOW = 15.0  # seconds of a point on the curve
SERVER_RSS, ADAPTER_RSS, DISK = 900e6, 2.0e9, 1.5e9
KEEP = 6  # engine versions
CONFIG = "[engine]\nthreads = 1\n[shadow]\nframes = 12\ntimeout = 20\n[watch]\nseconds = 8\n"


@dataclass
class Child:
    """A process that may be killed at any moment and is started again."""

    name: str
    command: list[str]
    folder: Path
    starts: int = 0
    kills: int = 0
    ends: list[int] = field(default_factory=list)
    child: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Start it where it does not run."""
        if self.child is not None and self.child.poll() is None:
            return
        if self.child is not None:
            self.ends.append(self.child.returncode)
        self.starts += 1
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self.child is not None and self.child.poll() is None:
            self.child.kill()
            self.child.wait()
            self.kills += 1

    def stop(self, wait: float = 30.0) -> int | None:
        """SIGTERM; its exit status, None where it had to be killed."""
        if self.child is None:
            return 0
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(wait)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
                return None
        return self.child.returncode

    def rss(self) -> int:
        """Resident bytes, 0 where it does not run."""
        if self.child is None or self.child.poll() is not None:
            return 0
        try:
            fields = Path(f"/proc/{self.child.pid}/statm").read_text().split()
        except OSError:
            return 0
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class Camera(threading.Thread):
    """Sends frame after frame at a steady rate; each is asked until it is answered or refused."""

    def __init__(self, address: str, frames: np.ndarray, rate: float) -> None:
        super().__init__(daemon=True)
        self.address, self.frames, self.rate = address, frames, rate
        self.stopped, self.lock = threading.Event(), threading.Lock()
        self.account: Counter[str] = Counter()
        self.lines: list[dict[str, Any]] = []
        self.answers: dict[int, np.ndarray] = {}
        self.work: queue.Queue[tuple[int, float] | None] = queue.Queue()

    def run(self) -> None:
        workers = [threading.Thread(target=self._serve, daemon=True) for _ in range(6)]
        for worker in workers:
            worker.start()
        begin = time.monotonic()
        for i in range(len(self.frames)):
            if self.stopped.wait(max(0.0, begin + i / self.rate - time.monotonic())):
                break
            self.account["sent"] += 1
            self.work.put((i, time.monotonic()))
        for _ in workers:
            self.work.put(None)
        for worker in workers:
            worker.join()

    def _serve(self) -> None:
        import grpc

        from runtime.client import Client, Rejected

        client = Client(self.address)
        while (item := self.work.get()) is not None:
            i, due = item
            attempts, outcome, version = 0, "", 0
            while not outcome:
                attempts += 1
                try:
                    answer = client.infer(MODEL, self.frames[i], source="front", timeout=5.0)
                    outcome, version = "answered", int(answer.version)
                    self.answers[i] = np.asarray(answer.labels).reshape(self.frames.shape[1:3])
                except (Rejected, grpc.RpcError) as error:
                    gone = getattr(error, "code", "")
                    name = gone if isinstance(gone, str) else gone().name
                    if name not in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN"):
                        outcome = "rejected"
                    elif time.monotonic() - due > 90:
                        outcome = "lost"
                    else:  # the server is down or was killed under this request
                        time.sleep(0.25)
            with self.lock:
                self.account[outcome] += 1
                self.account["attempts"] += attempts
                line = {"i": i, "due": due, "done": time.monotonic(), "outcome": outcome, "version": version}
                self.lines.append({**line, "attempts": attempts})
        client.close()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def size_of(folder: Path) -> int:
    """Bytes of all files below; what disappears meanwhile is not counted."""
    total = 0
    for base, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:
                continue
    return total


def render(seconds: float, rate: float, phase: float, seed: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(frames, labels, domain of each): another domain every `phase` seconds."""
    from adapt.data.street import scenes
    from bench.gate import SIZE

    frames, labels, domains = [], [], []
    total, along = int(seconds * rate), 8
    while len(frames) < total:
        domain = DOMAINS[int(len(frames) / rate / phase) % len(DOMAINS)]
        first = 1_500_000 + 10_000 * seed + len(frames)
        for frame, label in scenes.drive(first, domain, along, SIZE, step=2.5):
            frames.append(frame)
            labels.append(label)
            domains.append(domain)
    return np.stack(frames[:total]), np.stack(labels[:total]), domains[:total]


def bounds(pack: Any, seed: int) -> dict[str, Any]:
    """For each domain the network that the round's recipe reaches with true labels of other streets."""
    from adapt.data.street import scenes
    from adapt.round import adapt
    from adapt.round.labelling import GivenLabels
    from bench.continual import RECIPE
    from bench.gate import SIZE

    found = {}
    for d, domain in enumerate(DOMAINS):
        pairs = [
            pair
            for k in range(6)
            for pair in scenes.drive(1_800_000 + 10_000 * seed + 100 * d + k, domain, 6, SIZE, step=2.5)
        ]
        folder = Path(f"/tmp/soak-bound-{os.getpid()}")
        shutil.rmtree(folder, ignore_errors=True)
        config = replace(RECIPE, seed=seed, force=True, source_holdout=8)
        truth = GivenLabels({x.tobytes(): y for x, y in pairs})
        result = adapt(pack, [x for x, _ in pairs], config=config, out=folder, labeller=truth)
        assert result.pack is not None
        found[domain] = result.pack.network().eval()
        shutil.rmtree(folder, ignore_errors=True)
    return found


def soak(a: argparse.Namespace) -> dict[str, Any]:
    import torch

    from adapt import inference
    from adapt.evaluate.segmentation import Confusion
    from bench.gate import source_pack
    from export.build import build
    from runtime.client import Client
    from runtime.repository.repository import Repository

    torch.set_num_threads(1)
    began = time.monotonic()
    chance = random.Random(a.seed)
    shutil.rmtree(a.out, ignore_errors=True)
    a.out.mkdir(parents=True)
    a.pack.mkdir(parents=True, exist_ok=True)
    pack = source_pack(a.pack)
    build(pack, a.out / "engines", model=MODEL)
    after = 75.0 if a.minutes <= 15 else 150.0  # for the bound, the scores and the drawing
    seconds = 60 * a.minutes - after - (time.monotonic() - began)
    frames, labels, domains = render(seconds, a.rate, a.phase, a.seed)
    seconds = 60 * a.minutes - after - (time.monotonic() - began)
    print(f"{len(frames)} frames, {seconds:.0f} s of driving", file=sys.stderr)
    (a.out / "server.toml").write_text(CONFIG)
    port = free_port()
    address = f"127.0.0.1:{port}"
    server = Child(
        "server",
        [
            "runtime.serve",
            "--repository",
            str(a.out / "engines"),
            "--port",
            str(port),
            "--metrics-port",
            "0",
            "--config",
            str(a.out / "server.toml"),
        ],
        a.out,
    )
    settings = ("scale=[0.9,1.5]", "bn=split", "adabn_by=shares", "adabn_keep=[0.0,0.5]", "source_holdout=12")
    adapter = Child(
        "adapter",
        [
            "adapt.run",
            "--server",
            address,
            "--model",
            MODEL,
            "--pack",
            str(pack.path),
            "--repository",
            str(a.out / "engines"),
            "--workdir",
            str(a.out / "adapter"),
            "--frames",
            "28",
            "--max-fps",
            "5",
            "--portions",
            "0.4",
            "--steps",
            "24",
            "--batch",
            "4+4",
            "--max-bytes",
            "40000000",
            "--threads",
            "1",
            "--keep-versions",
            str(KEEP),
            *(f"--set={s}" for s in settings),
        ],
        a.out,
    )
    samples: list[dict[str, float]] = []
    kills: list[tuple[float, str]] = []
    camera = Camera(address, frames, a.rate)
    try:
        server.ensure()
        with Client(address) as client:
            client.wait_ready(60)
        camera.start()
        start = time.monotonic()
        adapter.ensure()
        next_kill = a.first_kill
        while (now := time.monotonic() - start) < seconds and camera.is_alive():
            server.ensure()
            adapter.ensure()
            samples.append({"t": now, "server": server.rss(), "adapter": adapter.rss()})
            if len(samples) % 5 == 0:
                samples[-1]["disk"] = size_of(a.out / "adapter") + size_of(a.out / "engines")
            if now >= next_kill and now < seconds - 25:
                victim = server if chance.random() < 0.45 else adapter
                victim.kill()
                kills.append((round(now, 1), victim.name))
                print(f"{now:.0f} s: killed {victim.name}; {dict(camera.account)}", file=sys.stderr)
                next_kill = now + chance.uniform(0.6, 1.4) * a.kill_every
            time.sleep(1.0)
        camera.stopped.set()
        camera.join(120)
        adapter.ensure()
        server.ensure()
        with Client(address) as client:
            client.wait_ready(60)
            account = client.status()["account"]
            live = int(client.status()["models"][MODEL]["live"])
        codes = {"adapter": adapter.stop(), "server": server.stop()}
    finally:
        camera.stopped.set()
        adapter.kill()
        server.kill()
    versions = sorted(int(p.name) for p in (a.out / "engines" / MODEL).iterdir() if p.name.isdigit())
    history = Repository(a.out / "engines", read_only=True).history(MODEL)
    were_live = {int(line["version"]) for line in history if line["state"] == "LIVE"}
    found = _rounds(a.out / "adapter")
    # ------------------------------------------------------------------ only now are labels known to anything
    released, bound = pack.network().eval(), bounds(pack, a.seed)
    end = a.rate * WINDOW
    curve: dict[str, list[float]] = {"served": [], "frozen": [], "labelled bound": []}
    totals = {name: Confusion(len(pack.spec.classes)) for name in curve}
    lines = {line["i"]: line for line in camera.lines}
    for first in range(0, camera.account["sent"], int(end)):
        last = min(first + int(end), camera.account["sent"])
        chosen = [i for i in range(first, last) if i in camera.answers]
        if not chosen:
            for name in curve:
                curve[name].append(float("nan"))
            continue
        answers = {"served": np.stack([camera.answers[i] for i in chosen])}
        answers["frozen"] = _answers(inference, released, pack, frames[chosen])
        parts = np.empty_like(answers["frozen"])
        for domain in {domains[i] for i in chosen}:
            at = [k for k, i in enumerate(chosen) if domains[i] == domain]
            parts[at] = _answers(inference, bound[domain], pack, frames[[chosen[k] for k in at]])
        answers["labelled bound"] = parts
        for name, given in answers.items():
            window = Confusion(len(pack.spec.classes)).add(labels[chosen], given)
            totals[name].merge(window)
            curve[name].append(round(window.miou(), 4))
    count = camera.account
    given = account["rejected"]  # by reason
    refused = sum(given.values()) if isinstance(given, dict) else int(given)
    waits = sorted(line["done"] - line["due"] for line in camera.lines)
    used = sorted({line["version"] for line in camera.lines if line["outcome"] == "answered"})
    disk = [s["disk"] for s in samples if "disk" in s]
    peak = {k: max((s[k] for s in samples), default=0) for k in ("server", "adapter")}
    promises = {
        "sent = answered + rejected": count["sent"] == count["answered"] + count["rejected"] > 0,
        "server's account": account["accepted"] == account["answered"] + refused,
        "every version named was live": set(used) <= were_live,
        # Beside those kept: the released one, the live one, and one that was just published.
        "old versions deleted": len(versions) <= KEEP + 3,
        "memory bounded": peak["server"] < SERVER_RSS and peak["adapter"] < ADAPTER_RSS,
        "disk bounded": max(disk, default=0) < DISK,
        "clean end": codes == {"adapter": 0, "server": 0},
        "rounds went on": found["LIVE"] >= 1,
    }
    step = max(1, len(waits) - 1)
    return {
        "minutes": a.minutes,
        "seed": a.seed,
        "rate": a.rate,
        "phase": a.phase,
        "ok": all(promises.values()),
        "promises": promises,
        "account": dict(count),
        "last_server_account": account,
        "kills": {"server": server.kills, "adapter": adapter.kills},
        "killed": kills,
        "unasked_ends": {"server": server.ends, "adapter": adapter.ends},
        "exit": codes,
        "rounds": dict(found),
        "versions": max(were_live),
        "versions_kept": versions,
        "live": live,
        "versions_used": used,
        "peak_mb": {k: round(v / 1e6) for k, v in peak.items()},
        "server_mb_first_last": [round(samples[5]["server"] / 1e6), round(samples[-1]["server"] / 1e6)],
        "disk_mb": [round(v / 1e6, 1) for v in disk[:: max(1, len(disk) // 12)]],
        "wait_s": {
            "p50": round(waits[step // 2], 3),
            "p99": round(waits[int(step * 0.99)], 3),
            "longest": round(waits[-1], 2),
        },
        "retried": sum(line["attempts"] > 1 for line in lines.values()),
        "miou": {k: round(t.miou(), 4) for k, t in totals.items()},
        "curve": curve,
        "domains": [domains[min(int(i * end), len(domains) - 1)] for i in range(len(curve["served"]))],
        "seconds": round(time.monotonic() - began, 1),
    }


def _answers(inference: Any, network: Any, pack: Any, frames: np.ndarray) -> np.ndarray:
    parts = [inference.labels_and_confidence(network, pack.spec, t)[0] for t in inference.batches(frames, 16)]
    return np.concatenate(parts)


def _rounds(workdir: Path) -> Counter[str]:
    """How rounds ended."""
    found: Counter[str] = Counter()
    for file in sorted(workdir.glob("round-*/loop.json")):
        told = json.loads(file.read_text())
        found[str(told["state"])] += 1
        found["refreshes"] += str(told.get("trigger", "")).startswith("road")
        found["reports"] += (file.parent / "report.html").is_file()
    return found


def draw(found: dict[str, Any]) -> str:
    from adapt.report.figures import curves

    phase = found["phase"]
    end = WINDOW * len(found["curve"]["served"])
    bands, t = [], 0.0
    while t < end:
        words = DOMAINS[int(t / phase) % len(DOMAINS)]
        bands.append((words, t, min(t + phase, end)))
        t += phase
    series = {"served": found["curve"]["served"], **found["curve"]}
    marks = [(t, f"✕ {name[0]}") for t, name in found["killed"] if t < end]
    return curves(series, step=WINDOW, bands=bands, marks=marks, x_words="seconds", y_words="mIoU, %")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="all of it (10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=4.0, metavar="FPS", help="frames a second (4)")
    parser.add_argument("--phase", type=float, default=110.0, metavar="S", help="seconds of a domain (110)")
    parser.add_argument("--kill-every", type=float, default=55.0, metavar="S", help="on average (55)")
    parser.add_argument("--first-kill", type=float, default=45.0, metavar="S", help="after the start (45)")
    parser.add_argument("--out", type=Path, default=Path("out/soak"), metavar="DIR")
    parser.add_argument("--pack", type=Path, default=Path("out/gate"), help="where bench.gate keeps its pack")
    a = parser.parse_args(argv)
    a.out, a.pack = a.out.resolve(), a.pack.resolve()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        found = soak(a)
    except KeyboardInterrupt:
        print("soak: interrupted; its processes have been ended", file=sys.stderr)
        return 1
    (a.out / "soak.json").write_text(json.dumps(found, indent=1))
    (a.out / "soak.svg").write_text(draw(found))
    for name, kept in found["promises"].items():
        print(f"{'kept  ' if kept else 'BROKEN'}  {name}")
    for name in ("account", "retried", "kills", "rounds", "peak_mb", "disk_mb", "wait_s", "miou"):
        print(f"{name:<8}  {found[name]}")
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
