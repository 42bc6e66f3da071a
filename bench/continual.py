"""A road that keeps changing: day, fog, night, day again; mean IoU over time of seven ways to meet it.

    python -m bench.continual [--out out/continual] [--seeds 3]

frozen      the released network
statistics  batch statistics follow the stream (adapt.baselines.BatchStatistics)
tent        TENT: entropy lowered on every batch by scale and shift of batch normalisation
ours        a round (adapt.round) after every 50 frames on those 50, from the released pack, behind its gate;
            what it accepts answers from the next frame on.  Where it finds that the released pack is best
            here, that one answers; where it refuses otherwise, nothing changes
refresh     the loop's answer to a change of road alone (adapt.loop.domain_memory.DomainPolicy,
            adapt.loop.domain_response.refresh_config): after a dozen frames of another road back to the
            version that knows it, or new batch statistics
ours+refresh  both, as adapt.run does it: refreshed at once, trained on 50 frames of the new road
bound       the rounds of "ours" with the true labels of the same frames and no gate

Every method answers a frame before it may learn from it, and only "bound" sees labels.  Streets are rendered
at 64×128, fourteen a phase, twelve frames down each; the network is that of ``bench.gate``.  Each (seed,
method) is one line of OUT/runs.jsonl, and a bench that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt import baselines, inference
from adapt.data.street import scenes
from adapt.evaluate.segmentation import Confusion
from adapt.loop.domain_memory import RELEASED, DomainPolicy, FeatureProbe
from adapt.loop.domain_response import refresh_config
from adapt.round import RoundConfig, adapt
from adapt.round.labelling import GivenLabels
from bench.gate import BASE, SIZE, source_pack
from networks.pack import Pack

PHASES = ("day", "fog", "night", "day")
DRIVES, ALONG = 14, 12
EVERY = 50  # frames between rounds; no divisor of a phase, so that some rounds see two domains
BATCH = 6
WINDOW = 24  # frames of a point on the curve
METHODS = ("frozen", "statistics", "tent", "refresh", "ours", "ours+refresh", "bound")
RECIPE = replace(BASE, force=False, steps=30, source_holdout=16)


def stream(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [n,H,W,3] and labels uint8 [n,H,W] in order."""
    pairs = [
        pair
        for i, domain in enumerate(PHASES)
        for k in range(DRIVES)
        for pair in scenes.drive(900_000 + 1000 * seed + 100 * i + k, domain, ALONG, SIZE, step=2.0)
    ]
    return np.stack([x for x, _ in pairs]), np.stack([y for _, y in pairs])


class Rounds:
    """ "ours" and "bound" as a method of `adapt.baselines`: what is live answers, a round may change it.

    refresh: `adapt.loop.domain_memory.DomainPolicy` responds to a change of road, as in the running loop.
    train: rounds of training follow.  lag: frames that go by, answered but not kept, until what was decided
    is live.
    """

    def __init__(
        self,
        pack: Pack,
        config: RoundConfig,
        out: Path,
        truth: dict[bytes, np.ndarray] | None = None,
        *,
        refresh: bool = False,
        train: bool = True,
        lag: int = 0,
    ) -> None:
        self.pack, self.config, self.out, self.truth = pack, config, out, truth
        self.train, self.lag = train, lag
        self.policy = DomainPolicy(FeatureProbe(pack)) if refresh else None
        self.networks = {RELEASED: pack.network().eval()}
        self.live = self.decided = RELEASED
        self.count = self.busy = self.returns = 0
        self.seen: list[np.ndarray] = []
        self.log: list[dict[str, Any]] = []

    def answer(self, frames: np.ndarray) -> np.ndarray:
        if self.count >= self.busy:
            self.live = self.decided
        network = self.networks[self.live]
        answers = inference.labels_and_confidence(network, self.pack.spec, inference.as_tensor(frames))[0]
        for frame in frames:
            self.count += 1
            if self.count > self.busy:
                self._see(frame)
        return answers

    def _see(self, frame: np.ndarray) -> None:
        self.seen.append(frame)
        if self.policy is not None:
            action = self.policy.offer(frame, self.decided)
            if action is not None and action.kind != "stay":
                self.seen = self.seen[-self.policy.config.frames * self.policy.config.agree :]
                if action.kind == "back":
                    self._serve(action.version)
                    self.policy.start_again()
                    self.returns += 1
                else:
                    self._round(self.seen, refresh_config(self.config))
        if self.train and len(self.seen) >= EVERY:
            self._round(self.seen, self.config)
            self.seen = []

    def _serve(self, version: int) -> None:
        self.decided, self.busy = version, self.count + self.lag
        if not self.lag:
            self.live = version

    def _round(self, frames: list[np.ndarray], config: RoundConfig) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        began, refreshing = time.monotonic(), not config.portions
        if self.truth is not None:
            forced, labeller = replace(config, force=True), GivenLabels(self.truth)
            result = adapt(self.pack, frames, config=forced, out=self.out, labeller=labeller)
        else:
            result = adapt(self.pack, frames, config=config, out=self.out)
        failed = result.report["gate"]["failed"]
        stats = self.policy.probe.measure_all(frames) if self.policy is not None else None
        if result.pack is not None:
            version = max(self.networks) + 1
            self.networks[version] = result.pack.network().eval()
            self._serve(version)
            if self.policy is not None and stats is not None:
                self.policy.learn(version, stats)
        elif self.policy is None and failed == ["changed"]:
            self._serve(RELEASED)
        elif refreshing and self.policy is not None and stats is not None:
            answer = self.policy.refreshed(None, failed, self.decided, stats)
            if answer != self.decided:
                self._serve(answer)
        self.log.append(
            {
                "kind": "refresh" if refreshing else "train",
                "accepted": result.accepted,
                "at": self.count,
                "chosen": result.report.get("chosen"),
                "failed": failed,
                "stages": {k: s.get("failed") for k, s in result.report["stages"].items()},
                "seconds": round(time.monotonic() - began, 1),
            }
        )
        shutil.rmtree(self.out, ignore_errors=True)


def make(name: str, pack: Pack, seed: int, out: Path, truth: dict[bytes, np.ndarray], lag: int = 0) -> Any:
    config, work = replace(RECIPE, seed=seed), out / f"work-{seed}-{name}"
    makers: dict[str, Callable[[], Any]] = {
        "frozen": lambda: baselines.Frozen(pack),
        "statistics": lambda: baselines.BatchStatistics(pack),
        "tent": lambda: baselines.Tent(pack),
        "refresh": lambda: Rounds(pack, config, work, refresh=True, train=False, lag=lag),
        "ours": lambda: Rounds(pack, config, work, lag=lag),
        "ours+refresh": lambda: Rounds(pack, config, work, refresh=True, lag=lag),
        "bound": lambda: Rounds(pack, config, work, truth, lag=lag),
    }
    return makers[name]()


def run(
    name: str, pack: Pack, seed: int, out: Path, lag: int = 0, seconds: float = 0
) -> dict[str, Any] | None:
    """One method over one stream; None where `seconds` were over first: the same call goes on from there."""
    frames, labels = stream(seed)
    truth = {x.tobytes(): y for x, y in zip(frames, labels, strict=True)}
    method = make(name, pack, seed, out, truth, lag)
    classes = len(pack.spec.classes)
    windows: list[Confusion] = []
    began, spent, first = time.monotonic(), 0.0, 0
    kept = out / f"{name}-{seed}-{lag}.kept"
    if kept.is_file():
        method, windows, spent, first = pickle.loads(kept.read_bytes())  # our own, in our own folder
    for start in range(first, len(frames), BATCH):
        if seconds and start % WINDOW == 0:
            kept.write_bytes(pickle.dumps((method, windows, spent + time.monotonic() - began, start)))
            if time.monotonic() - began > seconds:
                return None
        if start % WINDOW == 0:
            windows.append(Confusion(classes))
        windows[-1].add(labels[start : start + BATCH], method.answer(frames[start : start + BATCH]))
    kept.unlink(missing_ok=True)
    each = len(frames) // len(PHASES) // WINDOW
    phases = []
    for i in range(len(PHASES)):
        total = Confusion(classes)
        for window in windows[i * each : (i + 1) * each]:
            total.merge(window)
        phases.append(round(total.miou(), 5))
    return {
        "method": name,
        "seed": seed,
        "windows": [round(w.miou(), 5) for w in windows],
        "phases": phases,
        "seconds": round(spent + time.monotonic() - began, 1),
        "rounds": getattr(method, "log", []),
        "returns": getattr(method, "returns", 0),
        "lag": lag,
    }


def average(rows: list[list[float]]) -> list[float]:
    return [round(statistics.fmean(column), 4) for column in zip(*rows, strict=True)]


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"phases": list(PHASES), "methods": {}}
    for name in METHODS:
        own = [r for r in records if r["method"] == name]
        if not own:
            continue
        means = [statistics.fmean(r["windows"]) for r in own]
        each = len(own[0]["windows"]) // len(PHASES)
        ends = [each * (i + 1) for i in range(len(PHASES))]
        settled = [round(statistics.fmean(v for r in own for v in r["windows"][e - 3 : e]), 4) for e in ends]
        found["methods"][name] = {
            "seeds": len(own),
            "mean": round(statistics.fmean(means), 4),
            "spread": round(statistics.stdev(means), 4) if len(means) > 1 else 0.0,
            "phases": average([r["phases"] for r in own]),
            "windows": average([r["windows"] for r in own]),
            "settled": settled,
            "settled_mean": round(statistics.fmean(settled), 4),
            "seconds": round(statistics.fmean(r["seconds"] for r in own), 1),
            "rounds": sum(len(r["rounds"]) for r in own),
            "accepted": sum(x["accepted"] for r in own for x in r["rounds"]),
            "returns": sum(r.get("returns", 0) for r in own),
        }
    return found


def main(argv: list[str] | None = None) -> int:
    words = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m bench.continual", description=words)
    parser.add_argument("--out", type=Path, default=Path("out/continual"))
    parser.add_argument("--pack", type=Path, default=Path("out/gate"), help="where bench.gate keeps its pack")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    names = ", ".join(METHODS)
    parser.add_argument("--methods", default=",".join(METHODS), metavar="M,M,..", help=f"of {names}")
    parser.add_argument(
        "--lag", type=int, default=0, metavar="N", help="frames from a decision to its swap (0)"
    )
    parser.add_argument(
        "--seconds", type=float, default=0, help="stop after so many; again goes on (0: never)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the curves here")
    parser.add_argument("--table", action="store_true", help="no new run: show what is recorded")
    a = parser.parse_args(argv)
    if unknown := set(a.methods.split(",")) - set(METHODS):
        parser.error(f"--methods {', '.join(sorted(unknown))}: choose of {names}")
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    a.pack.mkdir(parents=True, exist_ok=True)
    pack = source_pack(a.pack)
    file = a.out / "runs.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    records = [r for r in records if r.get("lag", 0) == a.lag]
    known = {(r["method"], r["seed"]) for r in records}
    began = time.monotonic()
    for seed in range(a.seeds) if not a.table else ():
        for name in a.methods.split(","):
            if (name, seed) not in known:
                left = max(1.0, a.seconds - (time.monotonic() - began)) if a.seconds else 0
                record = run(name, pack, seed, a.out, a.lag, left)
                if record is None:
                    print(f"stopped after {a.seconds:g} s: start again", file=sys.stderr)
                    return 0
                records.append(record)
                with file.open("a") as out:
                    out.write(json.dumps(records[-1]) + "\n")
                print(f"{name} {seed}: {records[-1]['phases']}", file=sys.stderr, flush=True)
    found = summary(records)
    heads = ("mean", "±", "settled", "rounds", "accepted", "s")
    words = "{:>8} {:>5} {:>8} {:>7} {:>9} {:>7}".format(*heads)
    print(f"{'':<13}" + "".join(f"{p:>8}" for p in PHASES) + words)
    for name, m in found["methods"].items():
        cells = "".join(f"{100 * v:>8.1f}" for v in m["phases"])
        scores = [100 * m[k] for k in ("mean", "spread", "settled_mean")]
        counts = [m[k] for k in ("rounds", "accepted", "seconds")]
        shown = "{:>8.1f} {:>5.1f} {:>8.1f} {:>7} {:>9} {:>7.1f}".format(*scores, *counts)
        print(f"{name:<13}{cells}{shown}")
    if a.svg:
        from adapt.report.figures import curves

        series = {name: m["windows"] for name, m in found["methods"].items()}
        bands = [(p, i * DRIVES * ALONG, (i + 1) * DRIVES * ALONG) for i, p in enumerate(PHASES)]
        a.svg.write_text(curves(series, step=WINDOW, bands=bands, x_words="frames driven", y_words="mIoU, %"))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
