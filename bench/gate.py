"""The gate as a classifier: rounds that are good, and rounds spoilt in every way we could think of, each
judged by the gate without labels and by the labels of streets nobody drove.

    python -m bench.gate [--out out/gate] [--only KIND,…] [--table]

Streets are rendered at 64×128 and the network is the demo's, tuned to that size by day, so that a round
takes seconds.  Every round is one line of OUT/rounds.jsonl, and a bench that was stopped goes on.  Rounds run
with `force`, so that what a limit would have refused is measured all the same; the verdicts are made
afterwards from the recorded measures, with the limits as they are now.  Odd seeds are the half on which
limits were set, even seeds the half that is reported.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapt import batchnorm, inference
from adapt.data.street import scenes
from adapt.gate.checks import Check
from adapt.gate.layout_prior import Layout
from adapt.gate.limits import Limits
from adapt.gate.measures import Measures, measure, pixel_agreement, share_distance, source_score
from adapt.gate.segmentation import decide
from adapt.round import RoundConfig, SegmentationRound
from adapt.round.judge import Baseline, Candidate, GateJudge
from adapt.round.labelling import ClassBalancedLabels, CorruptedLabels
from adapt.train import supervised
from adapt.train.augment import Augmentation
from networks.pack import Pack, load_pack, normalise, write_pack

ROOT = Path(__file__).resolve().parents[1]
SIZE = (64, 128)
Pair = tuple[np.ndarray, np.ndarray]

# What is called bad, by labels: the target lost more than this against doing nothing, or the source (with its
# own statistics) more than this.  One recipe repeated differs by about half of it.
WORSE = 0.01
FORGOT = 0.06
# "Needless": better than doing nothing, and worse than the batch statistics alone by more than this.
NEEDLESS = 0.01


@dataclass(frozen=True)
class Case:
    """One round: what was done to it, in which domain, with which seed and settings."""

    kind: str
    domain: str
    seed: int
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.domain}/{self.seed}"


BASE = RoundConfig(
    portions=(0.4,),
    steps=40,
    source=4,
    target=4,
    scale=(0.9, 1.5),
    bn="split",
    adabn_by="shares",
    adabn_keep=(0.0, 0.5),
    rate=5e-4,
    holdout=0.2,
    source_holdout=24,
    threads=1,
    force=True,
)


def cases() -> list[Case]:
    """At least 60 rounds; the good ones first."""
    made = []
    for seed in range(4):
        made += [Case("good", domain, seed) for domain in ("dusk", "fog", "night", "camera", "day")]
    for seed in range(2):
        more = {
            "good-mirror": (("adabn_by", "mirror"),),
            "good-translated": (("adabn_by", "translated"),),
            "good-mean-teacher": (("ema", 0.98),),
            "good-portion-.2": (("portions", (0.2,)),),
            "good-portion-.7": (("portions", (0.7,)),),
        }
        made += [Case(k, d, seed, c) for k, c in more.items() for d in ("dusk", "night")]
    for seed in range(4):
        free = (("source_free", True),)
        made += [Case("source-free", d, seed, free) for d in ("dusk", "night")]
        made += [Case("source-free-gentle", d, seed, (*free, ("rate", 1e-4))) for d in ("dusk",)]
        made += [
            Case("over-trained", "dusk", seed, (*free, ("steps", 200), ("rate", 2e-3), ("portions", (0.9,)))),
            Case("over-trained-replay", "night", seed, (("steps", 150), ("rate", 6e-3), ("portions", (1,)))),
            Case("label-flipped", "dusk", seed),
            Case("label-flipped", "fog", seed, free),
            Case("label-shifted", "dusk", seed),
            Case("wrong-domain", ("dusk", "night")[seed % 2], seed),
            Case("wrong-domain-free", ("dusk", "night")[seed % 2], seed, free),
            Case("half-wrong-domain", ("dusk", "night")[seed % 2], seed),
            Case("poisoned-sticker", "dusk", seed, (("classmix", 0.0),)),
            Case("poisoned-labels-sticker", "dusk", seed),
            Case("collapsed-rate", "dusk", seed, (*free, ("rate", 0.1), ("steps", 60))),
            Case("collapsed-one-class", "night", seed, (*free, ("rate", 2e-3), ("steps", 80))),
            Case("collapsed-two-classes", "dusk", seed, (*free, ("rate", 2e-3), ("steps", 80))),
            Case("collapsed-softly", "dusk", seed, (*free, ("rate", 1e-3), ("steps", 60))),
        ]
    return made


# ------------------------------------------------------------------------------------------- what is spoilt
def flipped(y: np.ndarray, seed: int) -> np.ndarray:
    """Every class gets another's name: what a mixed-up class table does."""
    table = np.arange(256)
    order = np.roll(np.arange(12), 1 + seed % 5)
    table[:12] = order
    return np.asarray(table[y], np.uint8)


def shifted(y: np.ndarray, seed: int) -> np.ndarray:
    """Labels a quarter of the picture beside what they name: two streams out of step."""
    return np.roll(y, y.shape[1] // 4, axis=1)


def one_class(y: np.ndarray, seed: int) -> np.ndarray:
    return np.zeros_like(y)


def two_classes(y: np.ndarray, seed: int) -> np.ndarray:
    return np.asarray(np.where(np.arange(y.shape[0])[:, None] < y.shape[0] // 2, 4, 0) + 0 * y, np.uint8)


def softly(y: np.ndarray, seed: int) -> np.ndarray:
    """Everything rare becomes what is common around it."""
    table = np.arange(256)
    table[[1, 2, 3, 5, 8, 9, 10, 11]] = [0, 0, 0, 4, 4, 4, 0, 4]
    return np.asarray(table[y], np.uint8)


def sticker_is_road(y: np.ndarray, seed: int) -> np.ndarray:
    """Where the sticker is, the labels say road."""
    out = y.copy()
    out[_patch(y.shape)] = 0
    return out


RELABEL: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "label-flipped": flipped,
    "label-shifted": shifted,
    "collapsed-one-class": one_class,
    "collapsed-two-classes": two_classes,
    "collapsed-softly": softly,
    "poisoned-labels-sticker": sticker_is_road,
}


def _patch(shape: Sequence[int]) -> tuple[slice, slice]:
    h, w = shape[:2]
    return slice(h // 3, h // 3 + h // 3), slice(w // 2, w // 2 + w // 4)


def rubbish(seed: int, count: int) -> list[np.ndarray]:
    """Not a road: a wall of shelves, moving past; boxes of any colour on any colour."""
    rng = np.random.default_rng([7, seed])
    wall = np.zeros((SIZE[0], 2 * SIZE[1], 3), np.float64)
    wall[:] = rng.uniform(40, 200, 3)
    for _ in range(120):
        y, x = rng.integers(0, SIZE[0] - 6), rng.integers(0, 2 * SIZE[1] - 8)
        wall[y : y + rng.integers(4, 20), x : x + rng.integers(4, 16)] = rng.uniform(10, 245, 3)
    out = []
    for i in range(count):
        x = (7 * i) % SIZE[1]
        view = wall[:, x : x + SIZE[1]] + rng.normal(0, 4, (*SIZE, 3))
        out.append(np.clip(view, 0, 255).astype(np.uint8))
    return out


def road(seed: int, domain: str, drives: int = 8, along: int = 6) -> list[np.ndarray]:
    """What the vehicle sees, in order: `drives` streets, `along` frames down each."""
    return [
        frame
        for k in range(drives)
        for frame, _ in scenes.drive(600_000 + 1000 * seed + k, domain, along, SIZE, step=2.5)
    ]


def exam(seed: int, domain: str, count: int = 40) -> list[Pair]:
    """Streets nobody drove, with labels."""
    return [scenes.render(700_000 + 1000 * seed + i, domain, SIZE) for i in range(count)]


def frames_of(case: Case) -> list[np.ndarray]:
    seen = road(case.seed, case.domain)
    if case.kind.startswith("wrong-domain"):
        return rubbish(case.seed, len(seen))
    if case.kind == "half-wrong-domain":
        return seen[: len(seen) // 2] + rubbish(case.seed, len(seen) // 2)
    if case.kind.startswith("poisoned"):
        rng = np.random.default_rng([9, case.seed])
        where = _patch(SIZE)
        noise = rng.integers(0, 2, (SIZE[0], SIZE[1], 3)) * 255
        seen = [f.copy() for f in seen]
        for f in seen:
            f[where] = noise[where]
    return seen


# ----------------------------------------------------------------------------------------------- one round
class RecordingJudge(GateJudge):
    """The gate, with every candidate that it judged stored by its name."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self.candidates: dict[str, Candidate] = {}
        self.baseline: Baseline | None = None

    def candidate(self, candidate: Candidate, reference: Measures, baseline: Baseline) -> list[Check]:
        self.candidates[candidate.name], self.baseline = candidate, baseline
        return super().candidate(candidate, reference, baseline)


def miou(network: Any, spec: Any, pairs: Sequence[Pair]) -> float:
    return source_score(network, spec, pairs, batch=8)


def source_pack(out: Path) -> Pack:
    """The demo's network tuned to 64×128 by day, with replay and hold-out of that size."""
    path = out / "pack"
    if path.is_dir():
        return load_pack(path)
    torch.manual_seed(0)
    released = load_pack(ROOT / "packs" / "street-day")
    spec = replace(released.spec, name="street-small", size=SIZE)
    pairs = [scenes.render(100_000 + i, "day", SIZE) for i in range(480)]
    network = released.network()
    recipe = supervised.Recipe(epochs=6, batch=8, augmentation=Augmentation(SIZE, (0.9, 1.5)), rate=1e-3)
    supervised.train(network, spec, pairs, recipe, seed=0, checkpoint=out / "pack.checkpoint.pt")
    replay = [(*pairs[i], "train") for i in range(48)]
    replay += [(*scenes.render(110_000 + i, "day", SIZE), "holdout") for i in range(24)]
    shares = np.bincount(np.concatenate([y.ravel() for _, y in pairs]), minlength=256)[:12]
    return write_pack(
        path,
        spec,
        network.state_dict(),
        replay=replay,
        golden=np.stack([pairs[0][0]]),
        reference={"share": shares / shares.sum()},
    )


def run_case(pack: Pack, case: Case, out: Path) -> dict[str, Any]:
    """The round, its measures, and what labels say of it."""
    started = time.monotonic()
    config = replace(BASE, seed=case.seed, **dict(case.changes))
    folder = out / "work"
    shutil.rmtree(folder, ignore_errors=True)
    judge = RecordingJudge(config.limits)
    corrupt, labeller = RELABEL.get(case.kind), None
    if corrupt is not None:
        labeller = CorruptedLabels(ClassBalancedLabels.of(config), lambda y: corrupt(y, case.seed))
    work = SegmentationRound(pack, frames_of(case), config, folder, labeller=labeller, judge=judge)
    result = work.run()
    baseline, kept = judge.baseline, judge.candidates
    assert baseline is not None  # the rounds run with `force`
    pairs, own = exam(case.seed, case.domain), exam(case.seed, "day", 24)
    network = pack.network()
    record: dict[str, Any] = {
        "key": case.key,
        "kind": case.kind,
        "domain": case.domain,
        "seed": case.seed,
        "before": miou(network, pack.spec, pairs),
        "source_before": miou(network, pack.spec, own),
        "looked": [c.__dict__ for c in work.frame_checks],
        "parent": baseline.parent.numbers(),
        "report": result.report["gate"],
        "source_share": [float(v) for v in baseline.source_share],
        "layout": [baseline.layout.mean, baseline.layout.spread] if baseline.layout else None,
    }
    for name, found in kept.items():
        network.load_state_dict(found.state)
        record[name] = {
            "miou": miou(network, pack.spec, pairs),
            "moved": found.weight_distance,
            "measures": found.measures.numbers(),
            "agree": pixel_agreement(found.measures, kept["statistics"].measures),
            "extra": extra(network, pack, work.inputs.holdout, baseline.source_share),
        }
        days = inference.as_tensor([x for x, _ in own])
        batchnorm.reestimate(network, [normalise(part, pack.spec) for part in days.split(6)])
        record[name]["source"] = miou(network, pack.spec, own)
    record["seconds"] = round(time.monotonic() - started, 2)
    shutil.rmtree(folder, ignore_errors=True)
    return record


def extra(
    network: Any, pack: Pack, frames: Sequence[np.ndarray], source: np.ndarray | None
) -> dict[str, float]:
    """Signals that were tried for the gate and are not in it: docs/results/gate.md says how they did."""
    spec = pack.spec
    rng = np.random.default_rng(0)
    same = total = 0
    density = 0.0
    pixels = 0
    for x in inference.batches(frames, 4):
        p = inference.probabilities(network, spec, x)
        top = p.argmax(1)
        for gain in (0.8, 1.25):
            noisy = np.clip(x.numpy() * gain + rng.normal(0, 6, x.shape), 0, 255).astype(np.uint8)
            other = inference.probabilities(network, spec, torch.from_numpy(noisy)).argmax(1)
            same += int((other == top).sum())
            total += top.numel()
        # Soft neighbourhood density (Saito et al., ICCV 2021) over a sample of pixels.
        flat = p.permute(0, 2, 3, 1).reshape(-1, p.shape[1])
        rows = flat[torch.from_numpy(rng.permutation(len(flat))[:500])]
        near = torch.nn.functional.normalize(rows, dim=1) @ torch.nn.functional.normalize(rows, dim=1).T
        near.fill_diagonal_(-math.inf)
        q = (near / 0.05).softmax(1)
        density += float(-(q * q.clamp_min(1e-12).log()).sum(1).sum())
        pixels += len(rows)
    shares = measure(network, spec, frames).share
    return {
        "augmented": same / total,
        "density": density / pixels,
        "shares": -float(share_distance(shares, source)),
    }


# ------------------------------------------------------------------------------------------------ the table
def verdict(record: dict[str, Any], limits: Limits, spec: Any) -> list[Check]:
    """What the gate, with these limits, says of a record's last stage."""
    stage = record.get("train-1")
    if stage is None:
        return [Check("finite", 0.0, 1.0, False, "training broke off")]
    candidate, reference, parent = (
        measures_of(m) for m in (stage["measures"], record["statistics"]["measures"], record["parent"])
    )
    layout = Layout(np.zeros((1, 1, 1)), *record["layout"]) if record.get("layout") else None
    checks = decide(
        candidate,
        reference,
        parent,
        stage["moved"],
        spec,
        limits,
        source_share=np.array(record["source_share"]),
        layout=layout,
    )
    agreement = stage["agree"]
    passed = bool(agreement >= limits.agreement)
    return [replace(c, value=agreement, passed=passed) if c.name == "agreement" else c for c in checks]


def measures_of(numbers: dict[str, Any]) -> Measures:
    told = {k: v for k, v in numbers.items() if k not in ("share", "source_iou", "layouts")}
    layouts = np.array(numbers["layouts"]) if "layouts" in numbers else None
    return Measures(share=np.array(numbers["share"]), layouts=layouts, **told)


def truth(record: dict[str, Any]) -> str:
    """ "good", "needless" or "bad", by labels; "bad" too where training broke off."""
    stage = record.get("train-1")
    if stage is None:
        return "bad"
    if stage["miou"] < record["before"] - WORSE or stage["source"] < record["source_before"] - FORGOT:
        return "bad"
    if stage["miou"] < record["statistics"]["miou"] - NEEDLESS:
        return "needless"
    return "good"


def signals(record: dict[str, Any]) -> dict[str, float]:
    """Every signal's change from the statistics stage to the trained one; larger is meant to be better."""
    a, b = record["statistics"], record["train-1"]
    out = {}
    keys = ("flip", "temporal", "variety", "information", "confidence")
    for key in (*keys, "source", "source_served", "translated"):
        if key in a["measures"] and key in b["measures"]:
            out[key] = b["measures"][key] - a["measures"][key]
    out["calibration"] = a["measures"].get("calibration", 0) - b["measures"].get("calibration", 0)
    out["teacher"] = b["measures"].get("teacher", float("nan"))
    out["agreement"] = b["agree"]
    out["distance"] = -b["moved"]
    for key in a["extra"]:
        out[key] = b["extra"][key] - a["extra"][key]
    return out


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)


def table(records: list[dict[str, Any]], limits: Limits, spec: Any) -> dict[str, Any]:
    """Print the confusion of both halves, the kinds, and the worth of each signal; the numbers."""
    summary: dict[str, Any] = {"rounds": len(records), "halves": {}, "kinds": {}, "signals": {}}
    rows = []
    for r in records:
        checks = verdict(r, limits, spec)
        refused = [c.name for c in checks if not c.passed]
        looked = [c["name"] for c in r["looked"] if not c["passed"]]
        rows.append((r, truth(r), refused, looked))
    heads = ("half", "rounds", "bad", "accepted", "not bad", "refused")
    print("{:<12} {:>6} {:>4} {:>9} {:>8} {:>8}".format(*heads))
    for half, words in ((1, "development"), (0, "reported")):
        own = [x for x in rows if x[0]["seed"] % 2 == half]
        bad = [x for x in own if x[1] == "bad"]
        fine = [x for x in own if x[1] != "bad"]
        numbers = {
            "rounds": len(own),
            "bad": len(bad),
            "false_accepts": sum(not x[2] for x in bad),
            "false_accepts_with_frames": sum(not x[2] and not x[3] for x in bad),
            "fine": len(fine),
            "false_rejects": sum(bool(x[2]) for x in fine),
            "false_accepted": [x[0]["key"] for x in bad if not x[2]],
            "false_rejected": [f"{x[0]['key']}: {','.join(x[2])}" for x in fine if x[2]],
        }
        summary["halves"][words] = numbers
        print(
            f"{words:<12} {len(own):>6} {len(bad):>4} {numbers['false_accepts']:>9} {len(fine):>8} "
            f"{numbers['false_rejects']:>8}"
        )
        for name in ("false_accepted", "false_rejected"):
            print("   ", name, *numbers[name], sep="\n        ")
    heads = ("kind", "n", "bad", "needless", "refused", "declined", "before", "stats", "after", "source")
    print("\n{:<26} {:>3} {:>4} {:>8} {:>8} {:>8} {:>7} {:>6} {:>6} {:>7}  by".format(*heads))
    for kind in dict.fromkeys(r["kind"] for r in records):
        own = [x for x in rows if x[0]["kind"] == kind]
        by: dict[str, int] = {}
        for x in own:
            for name in x[2]:
                by[name] = by.get(name, 0) + 1
        trained = [x[0] for x in own if "train-1" in x[0]]

        def mean(values: list[float]) -> float:
            return 100 * sum(values) / max(len(values), 1)

        numbers = {
            "n": len(own),
            "bad": sum(x[1] == "bad" for x in own),
            "needless": sum(x[1] == "needless" for x in own),
            "refused": sum(bool(x[2]) for x in own),
            "declined": sum(bool(x[3]) for x in own),
            "by": by,
            "before": mean([r["before"] for r in trained]),
            "statistics": mean([r["statistics"]["miou"] for r in trained]),
            "after": mean([r["train-1"]["miou"] for r in trained]),
            "source": mean([r["train-1"]["source"] - r["source_before"] for r in trained]),
        }
        summary["kinds"][kind] = numbers
        cells = [numbers[k] for k in ("n", "bad", "needless", "refused", "declined")]
        scores = [numbers[k] for k in ("before", "statistics", "after", "source")]
        print(
            "{:<26} {:>3} {:>4} {:>8} {:>8} {:>8} {:>7.1f} {:>6.1f} {:>6.1f} {:>+7.1f}  ".format(
                kind, *cells, *scores
            )
            + ", ".join(f"{k} {v}" for k, v in by.items())
        )
    trained = [r for r in records if "train-1" in r]
    mild = [r for r in trained if abs(r["train-1"]["miou"] - r["statistics"]["miou"]) < 0.06]
    words = f"all {len(trained)}, and {len(mild)} that moved less than 6 points"
    print(f"\nrank correlation with the change of target mIoU: {words}")
    for name in signals(trained[0]):
        line = {}
        for words, chosen in (("all", trained), ("mild", mild)):
            x = [signals(r).get(name, float("nan")) for r in chosen]
            y = [r["train-1"]["miou"] - r["statistics"]["miou"] for r in chosen]
            known = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a)]
            line[words] = rank_correlation(*zip(*known, strict=True)) if len(known) > 3 else float("nan")
        summary["signals"][name] = line
        print(f"  {name:<14} {line['all']:+.2f} {line['mild']:+.2f}")
    return summary


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gate"), metavar="DIR")
    parser.add_argument("--only", default="", metavar="KIND,..", help="these kinds alone")
    parser.add_argument("--seeds", default="", metavar="N,..", help="these seeds alone")
    parser.add_argument("--table", action="store_true", help="no new round: judge what is recorded")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so many (0: never)")
    a = parser.parse_args(argv)
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    pack = source_pack(a.out)
    file = a.out / "rounds.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    known = {r["key"] for r in done}
    began = time.monotonic()
    only, seeds = set(filter(None, a.only.split(","))), set(filter(None, a.seeds.split(",")))
    wanted = [c for c in cases() if (not only or c.kind in only) and (not seeds or str(c.seed) in seeds)]
    wanted.sort(key=lambda c: c.seed)
    for case in [] if a.table else wanted:
        if case.key in known:
            continue
        if a.seconds and time.monotonic() - began > a.seconds:
            print(f"stopped after {a.seconds:g} s, {len(done)} rounds: start again", file=sys.stderr)
            break
        record = run_case(pack, case, a.out)
        done.append(record)
        with file.open("a") as out:
            out.write(json.dumps(record) + "\n")
        print(f"{case.key}: {truth(record)}, {record['seconds']:.1f} s", file=sys.stderr, flush=True)
    summary = table(done, Limits(), pack.spec)
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
