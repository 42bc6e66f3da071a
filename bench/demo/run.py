"""One seed of the demo: build, serve, drive, adapt, swap, and only then score.

Four processes, as on a vehicle: the server (``runtime.serve``), the vehicle (``bench.demo.vehicle``), the
adapter (``adapt.run``, which lowers its own priority), and this one, which starts and watches them.  The
vehicle and the adapter get frames and nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.demo import streets

MODEL = "street"
VEHICLE = "vehicle"  # the name of its camera
ADAPTER = "adapt.run"
ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "packs" / "street-day"
Progress = Callable[..., None]
STATES = ("SUBMITTED", "VERIFIED", "SHADOWING", "LIVE", "REJECTED", "RETIRED", "ROLLED_BACK")

# The drift monitor's defaults (two answers a second, a baseline of 120) need a minute of each road.
SERVER = "[engine]\nthreads = 1\n\n[drift]\nmax_fps = 50.0\nlearn = 48\n"
DAY_FRAMES = 4  # frames down each street by day, for the drift monitor alone

_STAGE = re.compile(r"^(?P<stage>[^:]{1,60}): (?P<done>\d+)/(?P<total>\d+)")


class DemoError(RuntimeError):
    """The demo cannot go on; the message is one line: what, why, where to look."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of; every number stands in the summary."""

    domain: str = "dusk"
    rate: float = 10.0  # frames a second from the vehicle
    before: float = 6.0  # seconds of driving before the adapter starts
    after: float = 10.0  # seconds of driving after the swap
    frames: int = 96  # frames the adapter collects
    sample: float = 5.0  # frames a second it takes from the tap
    portions: str = "0.3,0.5"
    steps: int = 120  # of training for each portion
    batch: str = "4+4"  # replayed and collected frames in a batch
    # Further settings of the round.
    recipe: tuple[str, ...] = ("scale=[0.9,1.5]", "bn=split", "adabn_by=shares", "adabn_keep=[0.0,0.5]")
    nice: int = 10  # niceness of the adapter
    heldout: int = 80  # frames of the final scoring
    threads: int = 1  # torch threads of adapter and upper bound; the other core is the server's
    drives: int = streets.DRIVES
    along: int = streets.FRAMES
    patience: float = 400.0  # seconds the adapter may take


@contextmanager
def process(
    name: str, command: list[str], folder: Path, *, wait: float = 20.0
) -> Iterator[subprocess.Popen[str]]:
    """A child with its output in folder/name.{out,err}; at the end TERM, then, if it must be, KILL."""
    with (folder / f"{name}.out").open("w") as out, (folder / f"{name}.err").open("w") as err:
        child = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            stdout=out,
            stderr=err,
            text=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            yield child
        finally:
            stop(child, wait)


def stop(child: subprocess.Popen[str], wait: float = 20.0) -> int:
    """TERM, wait, KILL.  The exit status."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(wait)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    return int(child.returncode)


def last_line(path: Path) -> str:
    """The last line a child wrote, for an error message."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"


class Follower(threading.Thread):
    """Reads the progress lines of a child's standard error ("stage: 3/40 …") and passes them on."""

    def __init__(self, path: Path, progress: Progress, prefix: str) -> None:
        super().__init__(daemon=True)
        self.path, self.progress, self.prefix, self.done = path, progress, prefix, threading.Event()

    def run(self) -> None:
        with self.path.open(errors="replace") as file:
            while not self.done.is_set():
                line = file.readline()
                if not line:
                    self.done.wait(0.2)
                    continue
                found = _STAGE.match(line.strip())
                if found:
                    self.progress(f"{self.prefix}{found['stage']}", int(found["done"]), int(found["total"]))


def wait_ready(child: subprocess.Popen[str], path: Path, seconds: float = 60.0) -> str:
    """The server's address, once it says that it is ready."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = re.search(r"ready grpc=(\S+)", path.read_text(errors="replace"))
        if found:
            return found[1]
        if child.poll() is not None:
            raise DemoError(f"the server did not start: {last_line(path)} (see {path})")
        time.sleep(0.05)
    raise DemoError(f"the server was not ready after {seconds:.0f} s: see {path}")


class Events(threading.Thread):
    """Every event of the guarded swap, as the server tells it."""

    def __init__(self, server: str) -> None:
        super().__init__(daemon=True)
        from runtime.client import Client

        self.client = Client(server)
        self.seen: list[dict[str, Any]] = []
        self.stream = self.client.watch()

    def run(self) -> None:
        try:
            for event in self.stream:
                self.seen.append(asdict(event))
        except Exception:  # the stream ends with the server; what was seen is kept
            return

    def close(self) -> None:
        self.stream.close()
        self.client.close()


def pause(
    seconds: float, progress: Progress, stage: str, *children: tuple[str, subprocess.Popen[str]]
) -> None:
    """Let the vehicle drive for a while; a child that ends meanwhile is an error."""
    begin = time.monotonic()
    while (passed := time.monotonic() - begin) < seconds:
        progress(stage, int(10 * passed), int(10 * seconds))
        for name, child in children:
            if child.poll() is not None:
                raise DemoError(
                    f"the {name} ended with status {child.returncode} while it should have been running"
                )
        time.sleep(0.1)
    progress(stage, int(10 * seconds), int(10 * seconds))


def run_seed(
    seed: int, out: Path, settings: Settings, progress: Progress, pack_path: Path = PACK
) -> dict[str, Any]:
    """Everything for one seed; returns the run's record (docs/demo.md) with its pictures under "pictures".

    Raises DemoError; children are ended whatever happens.
    """
    from bench.demo.scoring import Exam, collected_frames
    from export.build import build
    from networks.pack import load_pack
    from runtime.client import Client

    folder = out / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - start, 2)

    with timed("render"):
        frames = streets.stream(
            seed,
            settings.domain,
            drives=settings.drives,
            frames=settings.along,
            tick=lambda done, of: progress("render the road", done, of),
        )
        np.save(folder / "road.npy", frames)
    with timed("build"):
        pack = load_pack(pack_path)
        progress("build the engine", 0, 1)
        first = build(pack, folder / "engines", model=MODEL)
        progress("build the engine", 1, 1)

    with ExitStack() as stack:
        (folder / "server.toml").write_text(SERVER)
        serve = [
            "runtime.serve",
            "--repository",
            str(folder / "engines"),
            "--port",
            "0",
            "--metrics-port",
            "0",
        ]
        server = stack.enter_context(
            process("server", [*serve, "--config", str(folder / "server.toml")], folder)
        )
        address = wait_ready(server, folder / "server.err")
        events = Events(address)
        stack.callback(events.close)
        events.start()
        said: dict[str, Any] = {}
        with timed("by day"):
            said["day"] = by_day_drift(address, seed, settings.drives, progress)
        drive = [
            "bench.demo.vehicle",
            "--server",
            address,
            "--model",
            MODEL,
            "--frames",
            str(folder / "road.npy"),
            "--rate",
            str(settings.rate),
            "--log",
            str(folder / "vehicle.jsonl"),
        ]
        vehicle = stack.enter_context(process("vehicle", drive, folder))
        driving = ("vehicle", vehicle), ("server", server)
        pause(settings.before, progress, "drive on the released version", *driving)
        said["before"] = drift_of(address, VEHICLE)
        adapter_began = time.time()
        with timed("adapt"):
            result = adapt_once(folder, address, pack_path, settings, seed, progress, driving)
        adapter_ended = time.time()
        pause(settings.after, progress, "drive on after the swap", *driving)
        said["after"] = drift_of(address, VEHICLE)
        if stop(vehicle) != 0:
            raise DemoError(
                f"the vehicle failed: {last_line(folder / 'vehicle.err')} (see {folder / 'vehicle.err'})"
            )
        account = json.loads((folder / "vehicle.out").read_text())
        requests = [json.loads(line) for line in (folder / "vehicle.jsonl").read_text().splitlines()]
        # From here on labels may be known: whatever could learn from them has ended.
        with timed("score"), Client(address) as client:
            live = int(client.status()["models"][MODEL]["live"])
            exam = Exam(seed, settings.domain, len(pack.spec.classes), settings.heldout, progress)
            by_day = exam.served(client, MODEL, first.version, by_day=True)
            before = exam.served(client, MODEL, first.version)
            after = exam.served(client, MODEL, live)
            after_day = exam.served(client, MODEL, live, by_day=True)
        events.close()
        if stop(server) != 0:
            raise DemoError(f"the server did not stop cleanly: {last_line(folder / 'server.err')}")
    with timed("upper bound"):
        kept = collected_frames(folder / "adapter")
        bound = exam.upper_bound(
            pack, kept, round_config(result["adaptation"]), settings.threads, frames, settings.drives
        )
        upper = exam.in_torch(bound, pack.spec)
    record = timings(requests, events.seen, adapter_began, adapter_ended)
    swapped = live != first.version
    return {
        "seed": seed,
        "domain": settings.domain,
        "miou_source": by_day.numbers()["miou"],
        "miou_before": before.numbers()["miou"],
        "miou_after": after.numbers()["miou"],
        "miou_upper": upper.numbers()["miou"],
        "miou_source_after": after_day.numbers()["miou"],
        **{key: account[key] for key in ("sent", "answered", "rejected", "failed")},
        **record["numbers"],
        "swapped": swapped,
        "drift": said,
        "collected": len(kept),
        "seconds": {**seconds, "all": round(time.monotonic() - began, 2)},
        "scores": {
            name: sheet.numbers()
            for name, sheet in (("source", by_day), ("before", before), ("after", after), ("upper", upper))
        },
        "events": record["events"],
        "phases": record["phases"],
        "requests": record["requests"],
        "round": result["adaptation"],
        "pictures": exam.pictures(before, after),
    }


def by_day_drift(server: str, seed: int, drives: int, progress: Progress) -> dict[str, Any]:
    """What the drift monitor says of the same streets by day: they are driven once, as a camera "day"."""
    from runtime.client import Client

    frames = streets.stream(seed, "day", drives=drives, frames=DAY_FRAMES)
    with Client(server) as client:
        for i, frame in enumerate(frames):
            client.infer(MODEL, frame, source="day", timeout=30.0)
            progress("drive by day", i + 1, len(frames))
            time.sleep(0.03)  # the monitor looks at 50 answers a second
    return drift_of(server, "day")


def drift_of(server: str, source: str, seconds: float = 10.0) -> dict[str, Any]:
    """The drift monitor's word on a camera: {"state", "reason", "frames"}.

    Waits until the camera's baseline is learnt, so many seconds at most.
    """
    from runtime.client import Client

    end = time.monotonic() + seconds
    with Client(server) as client:
        while True:
            told = client.drift(MODEL)
            found = next((s for s in told.get("sources", ()) if s.get("source") == source), {})
            state = str(found.get("state", "learning"))
            if state != "learning" or time.monotonic() >= end:
                frames = int(found.get("frames", 0))
                return {"state": state, "reason": str(found.get("reason", "")), "frames": frames}
            time.sleep(0.2)


def adapt_once(
    folder: Path, address: str, pack: Path, settings: Settings, seed: int, progress: Progress, driving: Any
) -> dict[str, Any]:
    """Run the adapter as its own low-priority process; what it printed as JSON, with the round's report."""
    told = {
        "server": address,
        "model": MODEL,
        "pack": pack,
        "repository": folder / "engines",
        "workdir": folder / "adapter",
        "frames": settings.frames,
        "max-fps": settings.sample,
        "portions": settings.portions,
        "steps": settings.steps,
        "batch": settings.batch,
        "threads": settings.threads,
        "seed": seed,
        "nice": settings.nice,
        "wait": 30,
    }
    options = [text for key, value in told.items() for text in (f"--{key}", str(value))]
    command = [ADAPTER, *options, "--once", "--json", *(f"--set={item}" for item in settings.recipe)]
    with process("adapter", command, folder) as child:
        follower = Follower(folder / "adapter.err", progress, "adapter: ")
        follower.start()
        end = time.monotonic() + settings.patience
        while child.poll() is None:
            for name, other in driving:
                if other.poll() is not None:
                    raise DemoError(f"the {name} ended with status {other.returncode} during adaptation")
            if time.monotonic() > end:
                where = folder / "adapter.err"
                raise DemoError(f"the adapter took more than {settings.patience:.0f} s: see {where}")
            time.sleep(0.1)
        follower.done.set()
    try:
        # A round that was refused ends with status 1 and a report all the same.
        report: dict[str, Any] = json.loads((folder / "adapter.out").read_text())
    except ValueError:
        where = folder / "adapter.err"
        raise DemoError(
            f"the adapter ended with status {child.returncode}: {last_line(where)} (see {where})"
        ) from None
    return report


def round_config(report: dict[str, Any]) -> Any:
    """The `RoundConfig` a report was made with, so that the upper bound has the same recipe."""
    from dataclasses import fields

    from adapt.round import RoundConfig

    told: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in report["config"].items() if k != "limits"
    }
    known = {f.name for f in fields(RoundConfig)}
    return RoundConfig(**{k: v for k, v in told.items() if k in known})


def quantile(values: list[float], q: float) -> float | None:
    """Milliseconds, or None where there is nothing to rank."""
    return round(float(np.quantile(values, q)), 3) if values else None


def timings(
    requests: list[dict[str, Any]], events: list[dict[str, Any]], adapter_began: float, adapter_ended: float
) -> dict[str, Any]:
    """Latencies by phase, the swap's times, and requests and events on one clock (seconds from the first
    frame).

    Phases: "before" (no adapter), "adapting" (collecting and training), "during" (from SUBMITTED until one
    second after LIVE), "after"."""
    requests = sorted(requests, key=lambda r: r["due"])
    zero = requests[0]["due"]
    swap = [e for e in events if e["state"] in STATES]
    submitted = next((e["time"] for e in swap if e["state"] == "SUBMITTED"), None)
    version = next((e["version"] for e in swap if e["state"] == "SUBMITTED"), None)
    live = next((e["time"] for e in swap if e["state"] == "LIVE" and e["version"] == version), None)
    flip = next(
        (e["detail"].get("flip_ms") for e in swap if e["state"] == "LIVE" and e["time"] == live), None
    )
    done = (
        live
        if live is not None
        else next((e["time"] for e in swap if e["state"] == "REJECTED"), adapter_ended)
    )
    start = submitted if submitted is not None else adapter_ended
    edges = {
        "before": (zero, adapter_began),
        "adapting": (adapter_began, start),
        "during": (start, done + 1.0),
        "after": (done + 1.0, float("inf")),
    }
    numbers: dict[str, Any] = {
        "swap_seconds": round(live - submitted, 3) if live is not None and submitted is not None else None,
        "flip_ms": flip,
        "versions_seen": sorted({r["version"] for r in requests if r["outcome"] == "answered"}),
    }
    for name, (a, b) in edges.items():
        # A request belongs to every phase it was alive in: one that was due before the swap and waited for
        # its end is the swap's as well.
        alive = [r for r in requests if r["done"] >= a and r["due"] < b]
        took = [r["ms"] for r in alive if r["outcome"] == "answered"]
        numbers[f"p50_ms_{name}"], numbers[f"p99_ms_{name}"] = quantile(took, 0.5), quantile(took, 0.99)
        numbers[f"max_ms_{name}"] = quantile(took, 1.0)
        numbers[f"requests_{name}"] = len(took)
    end = requests[-1]["due"]
    return {
        "numbers": numbers,
        "events": [
            {
                "t": round(e["time"] - zero, 3),
                **{k: e[k] for k in ("state", "version", "check", "reason", "detail")},
            }
            for e in swap
        ],
        "phases": {
            name: [round(max(a, zero) - zero, 3), round(min(b, end) - zero, 3)]
            for name, (a, b) in edges.items()
        },
        "requests": [
            {
                "t": round(r["due"] - zero, 3),
                "ms": r["ms"],
                "version": r.get("version", 0),
                "outcome": r["outcome"],
                "confidence": r.get("confidence"),
            }
            for r in requests
        ],
    }
