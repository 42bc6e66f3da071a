"""Drift: how soon is a change of domain noticed, and how often is one announced that is none?

    CamVid (ROADWORTHY_DATA): a network drives by day (three recordings), then into dusk
    rendered streets: day → fog → day → dusk → day → night → day, packs/street-day

The answers of every frame are computed once and kept as the monitor's own summaries (OUT/*.npz); everything
after that replays them through `runtime.drift.SourceDrift` as a server does.  False alarms over longer times
than there are frames for are counted on stretches of frames of the domain, drawn at random and put one after
the other (stationary bootstrap, Politis and Romano 1994), learning window included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.drift import DriftConfig, Sample, SourceDrift, measure

DAY = ("0006R0", "0016E5", "Seq05VD")
DUSK = "0001TP"
WEATHER = ("fog", "dusk", "night")

EPILOG = """\
examples:
  python -m bench.drift --out out/drift
  python -m bench.drift --out out/drift --set street          # without real data
  python -m bench.drift --out out/drift --camvid-pack out/real/seed0/source

exit codes: 0 measured, 1 data missing or failed, 2 wrong usage
"""


class DriftBenchError(Exception):
    """One line: thing, reason, remedy."""


class Stream:
    """Summaries of the answers to consecutive frames."""

    def __init__(self, samples: list[Sample], temporal: list[float | None]) -> None:
        self.samples, self.temporal = samples, temporal

    def __len__(self) -> int:
        return len(self.samples)

    def part(self, chosen: Sequence[int]) -> Stream:
        """A copy of some of them; a frame whose predecessor is not before it has no temporal value."""
        temporal = [self.temporal[i] if k and chosen[k - 1] == i - 1 else None for k, i in enumerate(chosen)]
        return Stream([self.samples[i] for i in chosen], temporal)

    def __add__(self, other: Stream) -> Stream:
        return Stream(self.samples + other.samples, self.temporal + other.temporal)


# ------------------------------------------------------------------------------------------------ answers
def answers(name: str, out: Path, pack: Any, frames: Any, say: Any) -> Stream:
    """Run the network over the frames once; kept in OUT."""
    file = out / f"{name}-{pack.sha256[:8]}.npz"
    keys = ("confidence", "entropy", "edges")
    if not file.is_file():
        from adapt import inference

        network = pack.network().eval()
        rows: list[Sample] = []
        temporal = []
        previous = None
        begin = time.monotonic()
        for frame in frames():
            labels, sure = inference.labels_and_confidence(network, pack.spec, inference.as_tensor([frame]))
            sample = measure(labels[0], sure[0], len(pack.spec.classes))
            temporal.append(np.nan if previous is None else float((previous == sample.grid).mean()))
            previous = sample.grid
            rows.append(sample)
            if len(rows) % 50 == 0:
                say(f"{name}: {len(rows)} frames, {time.monotonic() - begin:.0f} s")
        out.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npz")
        np.savez_compressed(
            part,
            histogram=np.stack([r.histogram for r in rows]),
            temporal=np.array(temporal),
            scalars=np.array([[r.scalars[k] for k in keys] for r in rows]),
        )
        part.replace(file)
    with np.load(file) as kept:
        samples = [
            Sample(h, dict(zip(keys, map(float, s), strict=True)), None)
            for h, s in zip(kept["histogram"], kept["scalars"], strict=True)
        ]
        return Stream(samples, [None if np.isnan(t) else float(t) for t in kept["temporal"]])


def camvid(out: Path, pack_path: Path | None, say: Any) -> tuple[dict[str, Stream], int]:
    from adapt.data.base import read_frame, resize_frame
    from bench.real import RealError, command, data_folder
    from networks.pack import load_pack

    try:
        data = data_folder()
    except RealError as error:
        raise DriftBenchError(str(error)) from error
    if pack_path is None:
        pack_path = out / "cityscapes"
        if not pack_path.is_dir():
            weights = data / "weights" / "espnetv2_s_1.0_city_1024x512.pth"
            command(
                [
                    "networks.import_checkpoint",
                    "espnetv2",
                    str(weights),
                    "--classes",
                    "cityscapes19",
                    "--size",
                    "352x480",
                    "--out",
                    str(pack_path),
                ],
                out / "log.txt",
            )
    pack = load_pack(pack_path)

    def frames(recording: str) -> Any:
        files = sorted((data / "camvid" / "images").glob(f"{recording}_*"))
        # 0016E5_07959 to 08159 are 15 frames a second; everything else is one: every 15th of those
        kept = []
        for file in files:
            number = int("".join(c for c in file.stem.split("_")[1] if c.isdigit()))
            if recording != "0016E5" or not 7959 < number <= 8159:
                kept.append(file)
        return lambda: (resize_frame(read_frame(file), pack.spec.size) for file in kept)

    return {n: answers(f"camvid-{n}", out, pack, frames(n), say) for n in (*DAY, DUSK)}, len(
        pack.spec.classes
    )


def street(
    out: Path, seed: int, say: Any, drives: int = 40, length: int = 12
) -> tuple[dict[str, Stream], int]:
    from adapt.data.street import scenes as world
    from networks.pack import load_pack

    pack = load_pack(Path(__file__).resolve().parent.parent / "packs" / "street-day")

    def frames(domain: str, first: int, count: int) -> Any:
        def go() -> Iterator[np.ndarray]:
            for k in range(count):
                for frame, _ in world.drive(first + k, domain, length, step=2.5):
                    yield frame

        return go

    found = {}
    for i, name in enumerate(("day", *WEATHER)):
        first, count = 700_000 + 1000 * seed + 200 * i, drives if name == "day" else drives // 4
        found[name] = answers(f"street-{name}-{seed}", out, pack, frames(name, first, count), say)
    return found, len(pack.spec.classes)


# ------------------------------------------------------------------------------------------------- replay
def replay(
    parts: Sequence[tuple[str, bool, Stream]], classes: int, config: DriftConfig, reference: Any = None
) -> list[dict[str, Any]]:
    """What the monitor says of each part (name, is it the domain it learnt, frames), one after the other."""
    monitor = SourceDrift("bench", classes, config, reference)
    at, said = 0.0, []
    for name, in_domain, stream in parts:
        noticed = back = None
        before, drifting = monitor.alarms, 0
        began = monitor.state
        for i, (sample, temporal) in enumerate(zip(stream.samples, stream.temporal, strict=True)):
            at += 1.0 / config.max_fps
            fresh = Sample(sample.histogram, dict(sample.scalars), None)
            monitor.add(fresh, temporal, at)
            drifting += monitor.state == "drifting"
            if monitor.state == "drifting" and noticed is None:
                noticed = i + 1
            if began == "drifting" and monitor.state == "in-domain" and back is None:
                back = i + 1
        said.append(
            {
                "part": name,
                "in_domain": in_domain,
                "frames": len(stream),
                "alarms": monitor.alarms - before,
                "noticed_after": noticed,
                "back_after": back,
                "drifting": drifting,
                "began": began,
                "state": monitor.state,
                "reason": monitor.reason,
                "signals": {s.name: s.alarmed for s in monitor.status().signals},
            }
        )
    return said


def bootstrap(
    streams: Sequence[Stream],
    classes: int,
    config: DriftConfig,
    points: int,
    stretch: float,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """(alarms, frames) on a random sequence of stretches (geometric length, mean `stretch`) of the domain."""
    monitor = SourceDrift("bootstrap", classes, config)
    frames = 0
    while frames < points:
        stream = streams[int(rng.integers(len(streams)))]
        i, first = int(rng.integers(len(stream))), True
        for _ in range(int(rng.geometric(1.0 / stretch))):
            sample = stream.samples[i % len(stream)]
            temporal = None if first else stream.temporal[i % len(stream)]
            fresh = Sample(sample.histogram, dict(sample.scalars), None)
            monitor.add(fresh, temporal, frames / config.max_fps)
            i, frames, first = i + 1, frames + 1, False
    return monitor.alarms, frames - config.learn


def camvid_orders(streams: dict[str, Stream], classes: int, config: DriftConfig) -> list[dict[str, Any]]:
    """Every order of the day recordings, then dusk, then the first day recording again."""
    rows = []
    for order in itertools.permutations(DAY):
        parts = [(name, True, streams[name]) for name in order]
        said = replay(
            [*parts, (DUSK, False, streams[DUSK]), (order[0], True, streams[order[0]])], classes, config
        )
        rows.append({"order": "-".join(order), "said": said})
    return rows


def mixed(streams: dict[str, Stream], classes: int, config: DriftConfig, seeds: int) -> list[dict[str, Any]]:
    """Learnt on all three recordings (stretches of ten frames); the rest of them, then dusk, then day."""
    rows = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        chunks = [
            streams[name].part(range(i, min(i + 10, len(streams[name]))))
            for name in DAY
            for i in range(0, len(streams[name]), 10)
        ]
        order = rng.permutation(len(chunks))
        day = chunks[order[0]]
        for i in order[1:]:
            day = day + chunks[i]
        said = replay(
            [("day", True, day), (DUSK, False, streams[DUSK]), ("day again", True, day)], classes, config
        )
        rows.append({"order": f"mixed {seed}", "said": said})
    return rows


def weather(streams: dict[str, Stream], classes: int, config: DriftConfig) -> list[dict[str, Any]]:
    day, step = streams["day"], len(streams["day"]) // 4
    days = [day.part(range(i * step, (i + 1) * step)) for i in range(4)]
    parts = [("day", True, days[0])]
    for name, after in zip(WEATHER, days[1:], strict=True):
        parts += [(name, False, streams[name]), (f"day after {name}", True, after)]
    return [{"order": "day-fog-day-dusk-day-night-day", "said": replay(parts, classes, config)}]


# -------------------------------------------------------------------------------------------------- table
def table(title: str, rows: list[dict[str, Any]], fps: float) -> dict[str, Any]:
    print(f"\n{title}")
    print(f"  {'part':<18}{'frames':>7}{'alarms':>8}{'noticed after':>16}{'back after':>12}{'drifting':>10}")
    false = frames = 0
    delays, missed = [], 0
    for row in rows:
        print(f"  -- {row['order']}")
        for part in row["said"]:
            fine = part["in_domain"]
            noticed = part["noticed_after"] if part["began"] != "drifting" else None
            if fine:
                false, frames = false + part["alarms"], frames + part["frames"]
            elif noticed is None:
                missed += 1
            else:
                delays.append(noticed)
            print(
                f"  {part['part']:<18}{part['frames']:>7}{part['alarms']:>8}{noticed or '-':>16}"
                f"{part['back_after'] or '-':>12}{100 * part['drifting'] / part['frames']:>9.0f}%"
            )
    summary = {
        "false_alarms": false,
        "in_domain_frames": frames,
        "changes": len(delays) + missed,
        "missed": missed,
        "delay_frames_median": float(np.median(delays)) if delays else None,
        "delay_frames_max": max(delays, default=None),
        "delay_seconds_median": float(np.median(delays)) / fps if delays else None,
    }
    print(f"  {summary}")
    return summary


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.drift",
        description="Detection delay and false alarms of the drift monitor.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, default=Path("out/drift"))
    p.add_argument("--set", choices=("all", "camvid", "street"), default="all")
    p.add_argument("--camvid-pack", type=Path, help="a pack to answer CamVid (ESPNetv2 of Cityscapes)")
    p.add_argument("--seeds", type=int, default=3, help="of rendered streets and of mixed orders (3)")
    p.add_argument("--hours", type=float, default=24.0, help="bootstrapped driving for the false alarms (24)")
    p.add_argument("--votes", type=int, nargs="*", default=[1, 2, 3])
    a = p.parse_args(argv)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    result: dict[str, Any] = {"bench": "drift", "config": vars(DriftConfig()), "sets": {}}
    try:
        sets = {}
        if a.set in ("all", "street"):
            for seed in range(a.seeds):
                sets[f"street-{seed}"] = street(a.out, seed, say)
        if a.set in ("all", "camvid"):
            sets["camvid"] = camvid(a.out, a.camvid_pack, say)
    except (DriftBenchError, OSError, ValueError) as error:
        print(f"bench.drift: {error}", file=sys.stderr)
        return 1
    for votes in a.votes:
        config = replace(DriftConfig(), votes=votes, max_fps=1.0, min_interval=0.0)
        for name, (streams, classes) in sets.items():
            key = f"{name} votes={votes}"
            if name == "camvid":
                one, three = camvid_orders(streams, classes, config), mixed(streams, classes, config, a.seeds)
                found = {
                    "orders": table(f"{key}: learnt on one recording", one, 1.0),
                    "mixed": table(f"{key}: learnt on all three", three, 1.0),
                }
                day = [streams[n] for n in DAY]
            else:
                found = {"weather": table(key, weather(streams, classes, config), 1.0)}
                day = [streams["day"]]
            rng = np.random.default_rng(0)
            alarms, frames = bootstrap(day, classes, config, int(a.hours * 3600), 12.0, rng)
            found["bootstrap"] = {"alarms": alarms, "hours": round(frames / 3600, 1)}
            print(f"  {key}: {alarms} false alarms in {frames / 3600:.1f} bootstrapped hours")
            result["sets"][key] = found
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
