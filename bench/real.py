"""The main job on real driving frames: CamVid by day → dusk, ESPNetv2, from released weights to a live swap.

    weights trained on Cityscapes → fine-tuned on CamVid by day (adapt.train) → engine → service
      → dusk frames stream at it → adapt.run: collect, adapt, build, guarded swap → scored on dusk frames
        that adaptation never saw, through the service

beside doing nothing, batch statistics alone, and a training with the few true labels there are.  Every
stage is cached under --out, so that a run that was stopped goes on.  It needs the frames and weights of
ROADWORTHY_DATA (see docs/adaptation.md) and leaves nothing of them in the repository but numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODEL = "camvid"
SIZE = (352, 480)
CROP = (256, 320)
STEPS = 60
ROUND = ("--steps", str(STEPS), "--batch", "3+3", "--crop", "256x320", "--rate", "0.0005")
COLUMNS = (
    ("source", "doing nothing"),
    ("adabn", "batch statistics only"),
    ("replay", "**adapted, with replay**"),
    ("free", "**adapted, source-free**"),
    ("upper", "true labels of 15 other frames"),
)

EPILOG = """\
examples:
  make real
  python -m bench.real --out out/real --seeds 3
  python -m bench.real --out out/real --seed 1        # one seed, such as beside others
  python -m bench.real --out out/real --table         # only write the table from what is cached

exit codes: 0 all seeds measured and the table written, 1 data missing or a stage failed, 2 wrong usage
"""


class RealError(Exception):
    """A stage failed.  One line: thing, reason, remedy."""


def data_folder() -> Path:
    """The folder with camvid/ and weights/.  Raises RealError with what is expected."""
    places = [os.environ.get("ROADWORTHY_DATA"), ROOT / ".." / "shared" / "data"]
    for place in places:
        if place and (Path(place) / "camvid" / "dusk_eval.txt").is_file():
            return Path(place).resolve()
    raise RealError(
        "no real data: set ROADWORTHY_DATA to a folder with camvid/{images,labels,*.txt} and weights/*.pth"
    )


def command(arguments: list[str], log: Path) -> str:
    """Run a module of the project; its standard output.  Raises RealError with the last line it said."""
    return measured(arguments, log)[0]


def measured(arguments: list[str], log: Path, *, refusal: bool = False) -> tuple[str, int]:
    """`command`, and the most bytes of memory that the process held at once.

    refusal: exit code 1 with an outcome printed is a result too: a round that the gate refused.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert process.stdout is not None
    told = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode and not (refusal and process.returncode == 1 and told.strip()):
        last = (log.read_text().strip().splitlines() or ["nothing was said"])[-1]
        raise RealError(f"{' '.join(arguments[:2])} ended with {process.returncode}: {last} (see {log})")
    return told, usage.ru_maxrss * 1024


def cached(path: Path, work: Any) -> dict[str, Any]:
    """What `work` gave, kept as JSON."""
    from common.files import write_json

    if not path.is_file():
        start = time.monotonic()
        found = work()
        found.setdefault("seconds", round(time.monotonic() - start, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
    return dict(json.loads(path.read_text()))


class Seed:
    """All stages of one seed."""

    def __init__(self, seed: int, data: Path, out: Path) -> None:
        self.seed, self.data, self.out = seed, data, out
        self.folder = out / f"seed{seed}"
        self.results = self.folder / "results"
        self.log = self.folder / "log.txt"
        self.say(f"seed {seed}: {self.folder}")

    def say(self, text: str) -> None:
        print(f"[{datetime.now(UTC):%H:%M:%S}] {text}", file=sys.stderr, flush=True)

    def run(self) -> None:
        """Everything that is not there yet."""
        self.cityscapes()
        for name, work in (
            ("source", self.source),
            ("adabn", self.adabn),
            ("replay", lambda: self.served("replay")),
            ("free", lambda: self.served("free")),
            ("upper", self.upper),
        ):
            self.say(f"seed {self.seed}: {name}")
            found = cached(self.results / f"{name}.json", work)
            self.say(f"seed {self.seed}: {name}: {100 * found['miou']:.1f} ({found['seconds']} s)")

    # ------------------------------------------------------------------------------------------- stages
    def cityscapes(self) -> Path:
        pack = self.out / "cityscapes"
        if not pack.is_dir():
            weights = self.data / "weights" / "espnetv2_s_1.0_city_1024x512.pth"
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
                    str(pack),
                ],
                self.log,
            )
        return pack

    def set(self, name: str) -> str:
        return f"camvid:{self.data / 'camvid'}:{name}"

    def source_pack(self) -> Any:
        from networks.pack import load_pack

        path = self.folder / "source"
        if not path.is_dir():
            told = command(
                [
                    "adapt.train",
                    "--init",
                    str(self.cityscapes()),
                    "--classes",
                    "camvid11",
                    "--data",
                    self.set("day_train"),
                    "--val",
                    self.set("day_val"),
                    "--size",
                    "352x480",
                    "--crop",
                    "256x320",
                    "--epochs",
                    "8",
                    "--batch",
                    "6",
                    "--rate",
                    "1.5e-3",
                    "--replay",
                    "160",
                    "--replay-holdout",
                    "40",
                    "--name",
                    "camvid-day",
                    "--seed",
                    str(self.seed),
                    "--threads",
                    "1",
                    "--licence",
                    "research only (CamVid, Cityscapes)",
                    "--out",
                    str(path),
                    "--json",
                ],
                self.log,
            )
            (self.folder / "source.json").write_text(told)
        return load_pack(path)

    def score(self, network: Any, spec: Any, name: str = "dusk_eval") -> dict[str, Any]:
        from adapt.data.open import open_dataset
        from adapt.evaluate import scoring

        confusion, calibration = scoring.score(network, spec, open_dataset(self.set(name)))
        return numbers(confusion, spec.classes) | {"ece": calibration.ece()}

    def source(self) -> dict[str, Any]:
        pack = self.source_pack()
        told = json.loads((self.folder / "source.json").read_text())
        found = self.score(pack.network(), pack.spec)
        return found | {"day": told["miou"], "train_seconds": told["seconds"], "training": told["training"]}

    def dusk(self) -> list[np.ndarray]:
        from adapt.data.base import resize_frame
        from adapt.data.camvid import CamVid

        frames = CamVid(self.data / "camvid", "dusk_adapt", labels=False)
        return [resize_frame(frames[i][0], SIZE) for i in range(len(frames))]

    def adabn(self) -> dict[str, Any]:
        """Plain AdaBN with every dusk_adapt frame."""
        from adapt import batchnorm, inference
        from networks.pack import normalise

        pack = self.source_pack()
        network, frames = pack.network(), self.dusk()
        np.random.default_rng(self.seed).shuffle(frames)
        batchnorm.reestimate(
            network,
            (
                normalise(inference.as_tensor(frames[i : i + 6]), pack.spec)
                for i in range(0, len(frames) - 1, 6)
            ),
        )
        return self.score(network, pack.spec) | {"day": self.score(network, pack.spec, "day_val")["miou"]}

    def upper(self) -> dict[str, Any]:
        """True dusk labels in place of pseudo-labels, everything else alike, crossed over two halves.

        Only the frames of dusk_eval have labels here, so each half of that drive is scored by a network that
        learnt from the other half.
        """
        from adapt import batchnorm, inference
        from adapt.data.base import read_frame, read_label, resize_frame, resize_label
        from adapt.data.camvid import CamVid
        from adapt.evaluate import scoring
        from adapt.evaluate.segmentation import Confusion
        from adapt.train.augment import Augmentation
        from adapt.train.batches import BatchMix, sampler
        from adapt.train.segmentation import SegmentationTrainer, TrainConfig
        from networks.pack import normalise

        pack = self.source_pack()
        spec = pack.spec
        drive = CamVid(self.data / "camvid", "dusk_eval")
        replay = [(read_frame(f), read_label(y)) for f, y in pack.replay("train")]
        middle = len(drive) // 2
        halves = [list(range(middle)), list(range(middle, len(drive)))]
        total = Confusion(len(spec.classes))
        for fold, (learn, test) in enumerate((halves, halves[::-1])):
            pairs = []
            for i in learn:
                frame, label = drive[i]
                assert label is not None
                pairs.append((resize_frame(frame, SIZE), resize_label(label, SIZE)))
            network = pack.network()
            mixture = BatchMix(3, 3, Augmentation(CROP))
            draw = sampler(replay, pairs, mixture, len(spec.classes), self.seed, 90 + fold)
            trainer = SegmentationTrainer(
                network, spec, TrainConfig(STEPS, rate=5e-4), draw, seed=self.seed + fold
            )
            trainer.run()
            frames = self.dusk()
            batchnorm.reestimate(
                network,
                (
                    normalise(inference.as_tensor(frames[i : i + 6]), spec)
                    for i in range(0, len(frames) - 1, 6)
                ),
            )
            part, _ = scoring.score(network, spec, [drive[i] for i in test])
            total.merge(part)
        return numbers(total, spec.classes)

    # ------------------------------------------------------------------------------------ the whole loop
    def served(self, kind: str) -> dict[str, Any]:
        """Export, serve, stream, adapt, swap; scored by what the service answers before and after."""
        from adapt.data.camvid import CamVid
        from runtime.client import Client

        pack = self.source_pack()
        repository, workdir = self.folder / f"repository-{kind}", self.folder / f"loop-{kind}"
        if not (repository / MODEL).is_dir():
            command(
                ["export.build", str(pack.path), "--repository", str(repository), "--model", MODEL], self.log
            )
        with server(repository, self.folder / f"serve-{kind}.log") as address:
            client = Client(address)
            evaluation = CamVid(self.data / "camvid", "dusk_eval")
            before = self.ask(client, evaluation, pack.spec.classes)
            self.say(
                f"seed {self.seed}: {kind}: served version {before['versions']}: {100 * before['miou']:.1f}"
            )
            told: dict[str, Any] = {}
            with vehicle(address, self.dusk(), workdir / "loop.json") as count:
                arguments = [
                    "adapt.run",
                    "--server",
                    address,
                    "--model",
                    MODEL,
                    "--pack",
                    str(pack.path),
                    "--repository",
                    str(repository),
                    "--workdir",
                    str(workdir),
                    "--frames",
                    "60",
                    "--near",
                    "2",
                    "--nice",
                    "0",
                    "--patience",
                    "20",
                    "--seed",
                    str(self.seed),
                    "--once",
                    "--json",
                    *ROUND,
                ]
                if kind == "free":
                    arguments += ["--preset", "source-free"]
                start = time.monotonic()
                printed, peak = measured(arguments, self.log, refusal=True)
                told = json.loads(printed.strip().splitlines()[-1])
                took = time.monotonic() - start
            after = self.ask(client, evaluation, pack.spec.classes)
            client.close()
        day = None
        if told.get("pack"):
            from networks.pack import load_pack

            adapted = load_pack(told["pack"])
            day = self.score(adapted.network(), adapted.spec, "day_val")["miou"]
        report = told["adaptation"]
        return after | {
            "before": before,
            "state": told["state"],
            "reason": told.get("reason", ""),
            "day": day,
            "chosen": report.get("chosen"),
            "frames": report["frames"],
            "round_seconds": report["seconds"],
            "build_seconds": told.get("build_seconds"),
            "swap_seconds": told.get("swap_seconds"),
            "adapt_seconds": round(took, 1),
            "peak_bytes": peak,
            "stream": count,
            "gate": report["gate"],
            "stages": {
                name: {k: stage[k] for k in ("labelled", "kept", "statistics_kept", "failed") if k in stage}
                for name, stage in report["stages"].items()
            },
        }

    def ask(self, client: Any, evaluation: Any, classes: tuple[str, ...]) -> dict[str, Any]:
        """Score what the service answers."""
        from adapt.data.base import resize_frame, resize_label
        from adapt.evaluate.segmentation import Confusion

        confusion, versions = Confusion(len(classes)), set()
        for i in range(len(evaluation)):
            frame, truth = evaluation[i]
            answer = client.infer(MODEL, resize_frame(frame, SIZE), source="evaluation")
            confusion.add(truth, resize_label(answer.labels, truth.shape))
            versions.add(int(answer.version))
        return numbers(confusion, classes) | {"versions": sorted(versions)}


def numbers(confusion: Any, classes: tuple[str, ...]) -> dict[str, Any]:
    """mIoU and IoU of each class the truth holds, 0..1."""
    present = confusion.matrix.sum(1) > 0
    iou = confusion.iou()
    return {
        "miou": confusion.miou(),
        "accuracy": confusion.accuracy(),
        "iou": {c: float(iou[i]) for i, c in enumerate(classes) if present[i]},
    }


@contextlib.contextmanager
def server(repository: Path, log: Path) -> Iterator[str]:
    """A service of its own on a free port; gives HOST:PORT."""
    with open(log, "w", encoding="utf-8") as errors:
        process = subprocess.Popen(
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
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            words = log.read_text().split()
            ready = [w.partition("=")[2] for w in words if w.startswith("grpc=")]
            if ready:
                yield ready[0]
                return
            time.sleep(0.2)
        raise RealError(f"the service did not come up, see {log}")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        if process.poll() is None:
            process.kill()
            process.wait()


@contextlib.contextmanager
def vehicle(address: str, frames: list[np.ndarray], loop: Path) -> Iterator[dict[str, Any]]:
    """A thread that asks the service for one frame after the other; the numbers are final on leaving.

    Two frames a second, one a second while the round trains (`loop` says so): this measures accuracy, and
    the cores are few.  `seconds` in what it gives: how long the answers took, collecting and training.
    """
    from runtime.client import Client, Rejected, RpcError

    count: dict[str, Any] = {"sent": 0, "answered": 0, "rejected": 0, "failed": 0, "versions": []}
    seconds: dict[str, list[float]] = {"collecting": [], "training": []}
    count["seconds"] = seconds
    stop = threading.Event()

    def drive() -> None:
        with Client(address) as client:
            i = 0
            while not stop.is_set():
                count["sent"] += 1
                training = '"phase": "round"' in loop.read_text() if loop.is_file() else False
                try:
                    start = time.monotonic()
                    answer = client.infer(MODEL, frames[i % len(frames)], source="front")
                    seconds["training" if training else "collecting"].append(time.monotonic() - start)
                    count["answered"] += 1
                    if answer.version not in count["versions"]:
                        count["versions"].append(int(answer.version))
                except Rejected:
                    count["rejected"] += 1
                except RpcError:
                    count["failed"] += 1
                i += 1
                stop.wait(1.0 if training else 0.5)

    thread = threading.Thread(target=drive, name="vehicle", daemon=True)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join(30)


# ------------------------------------------------------------------------------------------------ the page
def gather(out: Path) -> dict[int, dict[str, Any]]:
    """{seed: {stage: result}} of every seed that has at least its source model scored."""
    found = {}
    for folder in sorted(out.glob("seed*")):
        stages = {}
        for name, _ in COLUMNS:
            file = folder / "results" / f"{name}.json"
            if file.is_file():
                stages[name] = json.loads(file.read_text())
        if "source" in stages:
            found[int(folder.name.removeprefix("seed"))] = stages
    return found


def spread(values: list[float]) -> str:
    """ "mean ± standard deviation" in percent; the deviation over seeds (n−1) where there are several."""
    if not values:
        return "–"
    array = 100 * np.asarray(values)
    return f"{array.mean():.1f}" + (f" ± {array.std(ddof=1):.1f}" if len(array) > 1 else "")


def _latency(seconds: list[float]) -> str:
    if not seconds:
        return "–"
    return " / ".join(f"{1e3 * np.percentile(seconds, q):.0f}" for q in (50, 99))


def gap_closed(found: dict[int, dict[str, Any]], key: str) -> list[float]:
    """Of each seed that has all three: (column − doing nothing) / (true labels − doing nothing)."""
    return [
        (r[key]["miou"] - r["source"]["miou"]) / (r["upper"]["miou"] - r["source"]["miou"])
        for _, r in sorted(found.items())
        if key in r and "upper" in r and key not in ("source", "upper")
    ]


def _goals(found: dict[int, dict[str, Any]]) -> str:
    """Mean share of the gap of the three columns that close some of it."""
    said = []
    for key, words in (("replay", "with replay"), ("free", "source-free"), ("adabn", "statistics alone")):
        shares = gap_closed(found, key)
        said.append(f"{words} {100 * np.mean(shares):.0f} %" if shares else f"{words} not measured")
    return ", ".join(said)


def _kept(found: dict[int, dict[str, Any]]) -> str:
    """The share of the source's statistics that each round kept, and rounds that were refused."""
    said = []
    for s, stages in sorted(found.items()):
        for key, words in (("replay", "with replay"), ("free", "source-free")):
            if key in stages:
                kept = stages[key].get("stages", {}).get("adabn", {}).get("kept")
                state = stages[key].get("state")
                refused = "" if state == "LIVE" else f", {state}: {stages[key].get('reason', '')}"
                share = "unknown" if kept is None else f"{100 * kept:.0f} %"
                said.append(f"seed {s} {words} {share}{refused}")
    return "; ".join(said) or "not measured"


def page(found: dict[int, dict[str, Any]]) -> str:
    """docs/results/real-domain-shift.md."""
    seeds = sorted(found)
    first = found[seeds[0]]
    lines = [
        "# Real domain shift: CamVid, day → dusk",
        "",
        "A network somebody else trained meets a light it has not seen, without labels, while it serves.",
        "",
        f"Command: `make real SEEDS={len(seeds)}`, that is `python -m bench.real --out out/real "
        f"--seeds {len(seeds)}`  ",
        f"Seeds: {', '.join(map(str, seeds))} · date: {datetime.now(UTC):%Y-%m-%d} · machine: {machine()}. "
        "Seeds may run side by side (`--seed S`), as they did here: the seconds below are no speed figures.",
        "",
        "Network: ESPNetv2 s = 1.0 with the released Cityscapes weights; new 11-class head from the mapped "
        "Cityscapes rows; fine-tuned on 497 CamVid daylight frames at 352×480 "
        f"({first['source']['training'].partition(';')[0]}), one source model a seed. Adaptation sees the "
        "frames of `dusk_adapt` without labels, as they come out of the live service's tap; scores are "
        "on the 31 labelled frames of `dusk_eval`, which adaptation never sees; the adapted networks are "
        "scored by the answers of the service after the swap. mIoU in percent over the classes the truth "
        "holds, mean ± standard deviation over seeds.",
        "",
        "| | " + " | ".join(words for _, words in COLUMNS) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for name in first["source"]["iou"]:
        cells = [spread([found[s][key]["iou"][name] for s in seeds if key in found[s]]) for key, _ in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    cells = [spread([found[s][key]["miou"] for s in seeds if key in found[s]]) for key, _ in COLUMNS]
    lines.append("| **mean IoU at dusk** | " + " | ".join(f"**{c}**" for c in cells) + " |")
    shares = [spread(gap_closed(found, key)) for key, _ in COLUMNS]
    lines.append(
        "| of the gap to true labels | " + " | ".join(f"{c} %" if c != "–" else c for c in shares) + " |"
    )
    days = []
    for key, _ in COLUMNS:
        values = [found[s].get(key, {}).get("day") for s in seeds]
        days.append(spread([v for v in values if v is not None]))
    lines.append("| mean IoU by day (80 frames) | " + " | ".join(days) + " |")
    lines += [
        "",
        "Each seed:",
        "",
        "| seed | " + " | ".join(w for _, w in COLUMNS) + " | chosen stage | swap |",
    ]
    lines.append("|---|" + "---:|" * len(COLUMNS) + "---|---|")
    for s in seeds:
        row = [f"{100 * found[s][key]['miou']:.1f}" if key in found[s] else "–" for key, _ in COLUMNS]
        chosen = " / ".join(str(found[s].get(k, {}).get("chosen", "–")) for k in ("replay", "free"))
        states = " / ".join(str(found[s].get(k, {}).get("state", "–")) for k in ("replay", "free"))
        lines.append(f"| {s} | " + " | ".join(row) + f" | {chosen} | {states} |")
    lines.append("")
    counts = ", ".join(f"{words.strip('*')} {sum(key in found[s] for s in seeds)}" for key, words in COLUMNS)
    lines.append(f"Seeds behind each column: {counts}.")
    heads = (
        "seed",
        "",
        "frames kept",
        "s collecting to swap",
        "s training",
        "s swap",
        "MB of the adapter",
        "p50 / p99 ms collecting",
        "p50 / p99 ms training",
        "sent",
        "answered",
        "rejected",
        "failed",
    )
    lines += ["", "What it took:", "", f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * 11]
    for s in seeds:
        for key, words in (("replay", "with replay"), ("free", "source-free")):
            if key not in found[s]:
                continue
            r = found[s][key]
            c = r["stream"]
            kept = r["frames"]["target"] + r["frames"]["target_holdout"]
            figures = (
                f"{r['adapt_seconds']:.0f}",
                f"{r['round_seconds'].get('train', 0):.0f}",
                r["swap_seconds"],
                f"{r['peak_bytes'] / 1e6:.0f}",
                _latency(c["seconds"]["collecting"]),
                _latency(c["seconds"]["training"]),
                *(c[name] for name in ("sent", "answered", "rejected", "failed")),
            )
            lines.append(f"| {s} | {words} | {kept} | " + " | ".join(map(str, figures)) + " |")
    lines += [
        "",
        "How to read it:",
        "",
        f"* share of the gap closed, {_goals(found)} (the goal: 90 % with replay, 70 % source-free);",
        "* a round's batch statistics are the target's with a quarter of the source's kept, or half of them, "
        "or all, where source frames in the target's colours lose by it; the column of batch statistics "
        f"replaces them whole. Kept: {_kept(found)};",
        "* a round is batch statistics, then three times (p = 0.2, 0.35, 0.5) labels and "
        f"{STEPS} steps of 3 replayed source and 3 target crops (256×320) from the source model's weights, "
        "AdamW 5e-4 one-cycle, one torch thread beside the server; the last stage that passes the gate is "
        "served. Source-free is the preset of that name: one portion, p = 0.2, 6 target crops, statistics of "
        "the target kept fixed, and nine tenths of the parent's weights in the result;",
        "* true labels: the same training, once, with labels in place of pseudo-labels. They exist for "
        "`dusk_eval` alone, so it is crossed over its two halves: each half is scored by a network that "
        "learnt from the 15 or 16 labelled frames of the other, then takes the batch statistics of all dusk "
        "frames (not chosen by agreement, as a round does). So few labels are no upper bound: three times as "
        "many unlabelled frames can do better. A bound in the strict sense needs the labels of `dusk_adapt`, "
        "which are not at hand;",
        "* a stage that failed the gate is thrown away and ends the round: where the chosen stage is not the "
        "last, that is why;",
        "* the day row shows what the network gives up where it came from, as served at dusk;",
        "* the frames and the weights are for research only and are not in this repository.",
        "",
    ]
    return "\n".join(lines)


def machine() -> str:
    """Cores and processor, CPU only."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{os.cpu_count()} vCPU ({model}), CPU only, shared with other work"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.real",
        description="The whole loop on real frames: a Cityscapes network fine-tuned on CamVid by day meets "
        "dusk, adapts beside the live service and is swapped in. Writes docs/results/real-domain-shift.md.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--out", type=Path, default=Path("out/real"), metavar="DIR", help="cache of all stages (out/real)"
    )
    p.add_argument(
        "--seeds", type=int, default=int(os.environ.get("SEEDS", "3")), metavar="N", help="0..N-1 (3)"
    )
    p.add_argument("--seed", type=int, metavar="S", help="this seed alone; the table is left as it is")
    p.add_argument("--table", action="store_true", help="only write the table from what is cached")
    p.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "results" / "real-domain-shift.md", metavar="FILE"
    )
    arguments = p.parse_args(argv)
    import torch

    torch.set_num_threads(1)
    try:
        out = arguments.out.resolve()
        if not arguments.table:
            data = data_folder()
            for seed in [arguments.seed] if arguments.seed is not None else range(arguments.seeds):
                Seed(seed, data, out).run()
        if arguments.seed is not None:
            return 0
        found = gather(out)
        if not found:
            raise RealError(f"{out} holds no measured seed: run without --table")
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(page(found), encoding="utf-8")
    except (RealError, OSError, ValueError) as error:
        print(f"bench.real: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(page(found))
    scores = {key: {s: found[s][key]["miou"] for s in sorted(found) if key in found[s]} for key, _ in COLUMNS}
    print(json.dumps({"seeds": sorted(found), "miou": scores}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
