"""What collection costs the answer path: the same requests with the collector on and off, turn about.

One server in its own process, one client that sends the next frame when the last was answered, and the
collector (subscription to the tap, selection, frame store, the look at the road) in a process of its own at
the adapter's default priority.  Beside that two times which no noise hides: what the answering thread itself
spends on the tap, measured in this process, and the processor time of the collector.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from bench.p99_training import MODEL, ROOT, BenchError, Service

EPILOG = """\
examples:
  python -m bench.collector
  python -m bench.collector --pairs 20 --max-fps 10

exit codes: 0 measured, 1 a process failed, 2 wrong usage
"""
CHILD = """
import sys, threading, time
import torch
from adapt.frames.store import FrameStore, confidence_summary
from adapt.loop.domain_memory import RELEASED, DomainPolicy, FeatureProbe
from adapt.loop.process_priority import lower_priority
from adapt.sources.live import LiveSource
from networks.pack import load_pack
from runtime.client import Client
lower_priority(nice=10, idle=sys.argv[5] == "idle")
torch.set_num_threads(1)
policy = DomainPolicy(FeatureProbe(load_pack(sys.argv[6])))
client, store = Client(sys.argv[1]), FrameStore(sys.argv[2], near=-1)
kept = 0
on, source = threading.Event(), None
def collect():
    global kept
    while True:
        on.wait()
        captured = source.get(0.1) if source is not None else None
        if captured is not None:
            summary = confidence_summary(captured.labels, captured.confidence, int(sys.argv[4]))
            if store.add(captured.frame, source="front", summary=summary).id is not None:
                kept += 1
                policy.offer(captured.frame, RELEASED, "front")
threading.Thread(target=collect, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "on":
        source = LiveSource(client, "road", max_fps=float(sys.argv[3]))
        on.set()
    elif line.strip() == "off":
        on.clear()
        source.close()
        source = None
    print(kept, time.process_time(), flush=True)
"""


def on_the_answering_thread(frames: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """µs a request: an observation made and offered to a tap with one subscriber at 5 fps, and to a drift
    monitor.
    """
    from runtime.config import TapConfig
    from runtime.drift import DriftMonitor
    from runtime.serving.tap import Observation, Tap

    tap, monitor = Tap(TapConfig()), DriftMonitor(MODEL, 12)
    subscription = tap.subscribe(MODEL, max_fps=5.0)
    threading.Thread(target=lambda: [None for _ in subscription], daemon=True).start()
    spent = {"tap": 0.0, "drift": 0.0}
    count = 2000
    for i in range(count):
        outputs = {"labels": labels, "confidence": labels}
        begin = time.perf_counter()
        seen = Observation(MODEL, 1, "front", frames[i % len(frames)][None], outputs, time.time())
        tap(seen)
        middle = time.perf_counter()
        monitor(seen)
        spent["tap"] += middle - begin
        spent["drift"] += time.perf_counter() - middle
        time.sleep(0.0005)
    subscription.close()
    monitor.close()
    return {key: round(1e6 * value / count, 2) for key, value in spent.items()}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.collector",
        description="What collection costs the answer path.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--pack", type=Path, default=ROOT / "packs" / "street-day")
    p.add_argument("--pairs", type=int, default=12)
    p.add_argument("--seconds", type=float, default=3.0)
    p.add_argument("--max-fps", type=float, default=5.0)
    p.add_argument("--priority", choices=("nice", "idle"), default="nice", help="of the collector's process")
    a = p.parse_args(argv)
    from bench.demo import streets
    from export.build import build
    from networks.pack import load_pack
    from runtime.client import Client

    pack = load_pack(a.pack)
    frames = streets.stream(0, "day", drives=2, frames=12)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(pack, folder / "repo", model=MODEL)
        try:
            service = Service(folder / "repo", folder / "serve.log")
        except BenchError as error:
            print(f"bench.collector: {error}", file=sys.stderr)
            return 1
        child = subprocess.Popen(
            [
                sys.executable,
                "-c",
                CHILD,
                service.address,
                str(folder / "frames"),
                str(a.max_fps),
                str(len(pack.spec.classes)),
                a.priority,
                str(pack.path),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None

        def tell(word: str) -> tuple[int, float]:
            """(frames kept, processor seconds) so far."""
            assert child.stdin is not None
            assert child.stdout is not None
            print(word, file=child.stdin, flush=True)
            frames_kept, seconds = child.stdout.readline().split()
            return int(frames_kept), float(seconds)

        took: dict[str, list[float]] = {"off": [], "on": []}
        ratios, kept, busy, collected = [], 0, 0.0, 0.0
        try:
            child.stdout.readline()
            with Client(service.address) as client:
                for pair in range(2 * a.pairs):
                    # off, on, on, off, … so that a machine that gets slower favours neither
                    word = ("off", "on", "on", "off")[pair % 4]
                    if word == "on":
                        began, before = time.monotonic(), tell("on")[1]
                        time.sleep(0.5)
                    end, these, i = time.monotonic() + a.seconds, [], 0
                    while time.monotonic() < end:
                        begin = time.perf_counter()
                        client.infer(MODEL, frames[i % len(frames)], source="front")
                        these.append(1000 * (time.perf_counter() - begin))
                        i += 1
                    took[word] += these
                    ratios.append((word, float(np.median(these))))
                    if word == "on":
                        kept, after = tell("off")
                        busy, collected = busy + after - before, collected + time.monotonic() - began
        finally:
            child.kill()
            child.wait()
            service.close()
    thread = on_the_answering_thread(frames, np.zeros((1, *pack.spec.size), np.uint8))
    off, on = (np.percentile(took[word], (50, 99)) for word in ("off", "on"))
    medians = {word: float(np.mean([m for w, m in ratios if w == word])) for word in ("off", "on")}
    cost = medians["on"] / medians["off"] - 1
    print(f"{'collector':<12}{'p50 ms':>9}{'p99 ms':>9}{'requests':>10}")
    for word, (p50, p99) in (("off", off), ("on", on)):
        print(f"{word:<12}{p50:>9.3f}{p99:>9.3f}{len(took[word]):>10}")
    print(f"mean of medians: {100 * cost:+.2f}%; {kept} frames kept at up to {a.max_fps:g} a second")
    print(f"processor time of the collector: {100 * busy / collected:.1f}% of a core")
    share = 100 * thread["tap"] / 1000 / off[0]
    words = f"tap {thread['tap']} µs ({share:.3f}% of an answer), drift {thread['drift']} µs"
    print(f"on the answering thread: {words}")
    result = {
        "bench": "collector",
        "off_ms": [round(v, 3) for v in off],
        "on_ms": [round(v, 3) for v in on],
        "cost_of_median": round(cost, 4),
        "kept": kept,
        "priority": a.priority,
        "collector_share_of_a_core": round(busy / collected, 4),
        "thread_us": thread,
        "thread_share": round(share / 100, 6),
        "requests": {k: len(v) for k, v in took.items()},
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
