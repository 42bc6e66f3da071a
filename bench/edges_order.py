"""The order of the talk on known truth: CASENet, CASENet-S, CASENet-C and SEAL, from one warm-up each.

    python -m bench.edges_order --out out/edges-order [--set street|camvid] [--pushes 4 8 2] [--seeds N]
                                [--methods NAME …] [--steps N] [--size HxW] [--full]

Training labels are damaged as annotators damage them (``bench.edges_damage``): pushed smoothly by at most
2, 4 or 8 pixels, simplified to polygons, objects drawn wide of their borders.  Test labels are exact.  For
each push and seed one network is warmed up on the damaged labels with the unweighted loss; each method goes
on from those weights, on the same crops.  MF (ODS) is counted raw and thin at .02, .0075 and .0035 of the
diagonal.
``--set street`` renders streets with exact labels.  ``--set camvid`` damages CamVid's own labels by day and
scores on the day frames of ``day_val_clean``.

Without options the bench runs what two cores do in 25 minutes: push 4, one seed.  ``--full`` runs pushes 4,
8 and 2 with three seeds.  Every warm-up, training and score is a file in --out; a bench that was killed goes
on with the next one.  ``seal-gated`` is SEAL behind the gate.  casenet-c needs the extra crf; the bench
leaves it out, with the reason, if that is not installed.  The last stdout line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import networks
from adapt.data.open import open_dataset
from adapt.data.street import scenes as street_scenes
from adapt.evaluate.edge_sets import around
from adapt.evaluate.edges import EdgeCounts
from adapt.labels import crf
from adapt.labels.edge_probability import edge_probability
from adapt.labels.edges import category_edges
from adapt.labels.seal import Gate
from adapt.train.augment import Augmentation
from adapt.train.edge_recipes import EdgeRecipe
from adapt.train.edges import crops_of_segmentation, train
from adapt.train.trainer import atomic_save
from bench import machine
from bench.edges_damage import damaged
from common.files import write_json
from networks.labels import SPACES
from networks.pack import PackSpec

__all__ = ["METHODS", "Settings", "main", "recipe_of", "scores", "summary", "verdicts"]

TOLERANCES = (0.02, 0.0075, 0.0035)
MODES = ("raw", "thin")
METHODS = ("casenet", "casenet-s", "casenet-c", "seal")
#: Objects that annotators draw wide of their borders: thin or small ones.
WIDE = {"street": (9, 8, 10, 11), "camvid": (6, 2, 8, 9, 10)}

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


@dataclass(frozen=True)
class Settings:
    """What a run trains and scores; every field is part of the identity of its files.

    frames, test: how many frames to train and score on; crop: (H, W); steps: of each method, after ``warm``
    steps; round: crops per alignment; width: of CASENet's depth-14 network; rate: AdamW's, falling to a
    fifth for the last third of the steps.
    """

    kind: str = "street"
    frames: int = 60
    test: int = 10
    size: tuple[int, int] = (160, 320)
    crop: tuple[int, int] = (128, 128)
    width: int = 16
    warm: int = 140
    steps: int = 160
    batch: int = 8
    round: int = 80
    rate: float = 2e-3

    @property
    def classes(self) -> tuple[str, ...]:
        return SPACES["street" if self.kind == "street" else "camvid11"].classes

    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


def recipe_of(method: str, settings: Settings) -> EdgeRecipe:
    """How a method trains: they differ in loss and alignment alone.  casenet-c differs by its labels."""
    return EdgeRecipe(
        settings.steps,
        batch=settings.batch,
        round=settings.round,
        rate=settings.rate / 2,
        gamma=0.2,
        every=max(1, settings.steps * 2 // 3),
        frozen_bn=False,
        reweighted=method == "casenet",
        aligned=method.startswith("seal"),
        gate=Gate() if method == "seal-gated" else None,
    )


# -------------------------------------------------------------------------------------------------- scenes
def exact_pairs(settings: Settings, data: Path) -> tuple[list[Pair], list[Pair]]:
    """(training pairs with exact labels, test pairs)."""
    if settings.kind == "street":
        every = [street_scenes.render(s, "day", settings.size) for s in range(settings.frames)]
        return every, [street_scenes.render(10_000 + s, "day", settings.size) for s in range(settings.test)]
    out = []
    for listing, count in (("day_train_clean", settings.frames), ("day_val_clean", settings.test)):
        dataset = open_dataset(f"camvid:{data}/camvid:{listing}")
        chosen = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int).tolist()
        out.append([(f, y) for f, y in (dataset[i] for i in chosen) if y is not None])
    return out[0], out[1]


def damaged_pairs(pairs: Sequence[Pair], push: float, seed: int, kind: str) -> list[Pair]:
    """The pairs with each label damaged once, as an annotation is: the damage is the frame's, not the
    crop's."""
    return [
        (frame, damaged(label, np.random.default_rng([seed, i, 71]), push, WIDE[kind]))
        for i, (frame, label) in enumerate(pairs)
    ]


def label_quality(given: Sequence[Pair], exact: Sequence[Pair], classes: int) -> dict[str, float]:
    """Raw F of labels against exact ones at each tolerance: how damaged they are."""
    out = {}
    for tolerance in TOLERANCES:
        table = EdgeCounts(tolerance, thin=False, classes=classes)
        for (_, label), (_, truth) in list(zip(given, exact, strict=True))[:6]:
            edges = category_edges(label, classes)
            table.add_classes(edges, category_edges(truth, classes))
        out[str(tolerance)] = round(table.ods(), 4)
    return out


# ------------------------------------------------------------------------------------------------- scores
def scores(
    predict: Callable[[NDArray[np.uint8]], NDArray[np.floating]], test: Sequence[Pair], classes: int
) -> dict[str, float]:
    """MF (ODS) in 0..1 by "MODE TOLERANCE"; frame -> probabilities [K,H,W].  Truth: radius 1 for thin, 2 for
    raw."""
    tables = {
        (mode, t): EdgeCounts(t, thin=mode == "thin", classes=classes) for mode in MODES for t in TOLERANCES
    }
    for frame, label in test:
        p = np.rint(predict(frame) * 255).astype(np.uint8)
        ignore = around(label == 255, 2)
        truth = {"raw": category_edges(label, classes), "thin": category_edges(label, classes, 1)}
        for (mode, _), table in tables.items():
            table.add_classes(p, truth[mode], ignore)
    return {f"{mode} {t}": table.ods() for (mode, t), table in tables.items()}


# ---------------------------------------------------------------------------------------------- the trial
class Trial:
    """One push and one seed: its scenes, its warm-up and its methods, each made once and kept in a file."""

    def __init__(self, settings: Settings, push: float, seed: int, out: Path, scenes: Any) -> None:
        self.settings, self.push, self.seed, self.out = settings, push, seed, out
        self.exact, self.test = scenes
        self.name = f"{settings.kind}-push{push:g}-seed{seed}-{settings.key()}"
        self._given: list[Pair] | None = None
        classes = settings.classes
        colours = SPACES["street" if settings.kind == "street" else "camvid11"].colours
        self.spec = PackSpec(
            name="order",
            version="1.0.0",
            network="casenet",
            arguments={"depth": 14, "width": settings.width},
            classes=classes,
            colours=colours,
            size=settings.crop,
            mean=(0.45, 0.45, 0.45),
            std=(0.25, 0.25, 0.25),
            task="edges",
            training="bench.edges_order",
        )

    @property
    def given(self) -> list[Pair]:
        """The training pairs with damaged labels."""
        if self._given is None:
            self._given = damaged_pairs(self.exact, self.push, self.seed, self.settings.kind)
        return self._given

    def _draw(self, pairs: Sequence[Pair]) -> Any:
        augmentation = Augmentation(self.settings.crop, scale=(1.0, 1.0))
        return crops_of_segmentation(pairs, len(self.settings.classes), augmentation)

    def _network(self) -> Any:
        torch.manual_seed(self.seed)
        return networks.create(
            "casenet", classes=len(self.settings.classes), depth=14, width=self.settings.width
        )

    def _train(self, network: Any, pairs: Sequence[Pair], recipe: EdgeRecipe, seed: int, file: Path) -> float:
        start = time.process_time()
        train(network, self.spec, self._draw(pairs), recipe, seed=seed, checkpoint=file, every=40)
        file.unlink(missing_ok=True)
        return time.process_time() - start

    def warm(self) -> tuple[dict[str, Any], float]:
        """(weights after the warm-up, its processor seconds)."""
        file = self.out / f"{self.name}-warm.pt"
        if file.is_file():
            kept = torch.load(file, weights_only=True)
            return kept["network"], float(kept["seconds"])
        network = self._network()
        s = self.settings
        recipe = replace(recipe_of("casenet-s", s), steps=s.warm, rate=s.rate, every=0)
        seconds = self._train(network, self.given, recipe, self.seed, file.with_suffix(".checkpoint"))
        atomic_save(file, {"network": network.state_dict(), "seconds": seconds})
        return network.state_dict(), seconds

    def result(self, method: str) -> dict[str, Any]:
        """Scores of a method, from its file or by training it."""
        file = self.out / f"{self.name}-{method}.json"
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
        network, (weights, _) = self._network(), self.warm()
        network.load_state_dict(weights)
        pairs, seconds = self.given, 0.0
        k = len(self.settings.classes)
        if method == "casenet-c":
            pairs = [(frame, crf.refine(frame, label, k)) for frame, label in pairs]
        if method != "warm":
            recipe = recipe_of(method, self.settings)
            checkpoint = self.out / f"{self.name}-{method}.checkpoint"
            seconds = self._train(network, pairs, recipe, 1000 + self.seed, checkpoint)
        network.eval()
        found = {
            "method": method,
            "push": self.push,
            "seed": self.seed,
            "train_cpu_seconds": round(seconds, 1),
            "labels": label_quality(pairs, self.exact, k),
            "mf": scores(lambda frame: edge_probability(network, self.spec, frame), self.test, k),
        }
        write_json(file, found)
        return found


# ------------------------------------------------------------------------------------------------ summary
def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each push, "MODE TOLERANCE" and method: mean and spread (standard deviation, n - 1) in points."""
    out: dict[str, Any] = {}
    for r in results:
        for key, value in r["mf"].items():
            out.setdefault(f"{r['push']:g}", {}).setdefault(key, {}).setdefault(r["method"], []).append(
                100 * value
            )
    for cells in out.values():
        for row in cells.values():
            for method, values in row.items():
                deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
                row[method] = {
                    "mean": round(float(np.mean(values)), 2),
                    "spread": None if deviation is None else round(deviation, 2),
                    "seeds": len(values),
                }
    return out


def differences(results: Sequence[dict[str, Any]], better: str, worse: str) -> dict[str, Any]:
    """Points that one method is above another, seed by seed: {push: {key: [mean, spread or None, n]}}."""
    at = {(r["push"], r["seed"], r["method"]): r["mf"] for r in results}
    out: dict[str, Any] = {}
    for push in sorted({r["push"] for r in results}):
        seeds = sorted(
            {s for p, s, m in at if p == push and m == better}
            & {s for p, s, m in at if p == push and m == worse}
        )
        for key in [f"{mode} {t}" for mode in MODES for t in TOLERANCES] if seeds else []:
            d = [100 * (at[push, s, better][key] - at[push, s, worse][key]) for s in seeds]
            spread = round(float(np.std(d, ddof=1)), 2) if len(d) > 1 else None
            out.setdefault(f"{push:g}", {})[key] = [round(float(np.mean(d)), 2), spread, len(d)]
    return out


def verdicts(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether the talk's order holds at each push and tolerance: raw S - CASENet >= 1 and SEAL - S >= 1, each
    over twice its spread over seeds; thin SEAL >= S - .3.  A difference without a spread decides nothing."""
    out: dict[str, Any] = {}
    for name, better, worse, mode, least in (
        ("raw S over CASENet", "casenet-s", "casenet", "raw", 1.0),
        ("raw SEAL over S", "seal", "casenet-s", "raw", 1.0),
        ("thin SEAL at least S - .3", "seal", "casenet-s", "thin", -0.3),
    ):
        for push, cells in differences(results, better, worse).items():
            for key, (mean, spread, _) in cells.items():
                if key.startswith(mode):
                    sure = None if spread is None else mean >= least and (least < 0 or mean > 2 * spread)
                    out.setdefault(push, {}).setdefault(key.partition(" ")[2], {})[name] = {
                        "points": mean,
                        "spread": spread,
                        "holds": sure,
                    }
    return out


def rows_of(found: dict[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The table: a row per push, mode and tolerance."""

    def cell(c: dict[str, Any] | None) -> str | None:
        if c is None:
            return None
        return f"{c['mean']:.1f}" + ("" if c["spread"] is None else f" ± {c['spread']:.1f}")

    return [
        {"push": push, "scored": key, **{m: cell(row.get(m)) for m in methods}}
        for push, cells in found.items()
        for key, row in cells.items()
    ]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench.edges_order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    here = Path(__file__).resolve().parent.parent
    add = p.add_argument
    add("--out", type=Path, default=Path("out/edges-order"), metavar="DIR", help="files of each training")
    add(
        "--data",
        type=Path,
        default=Path(os.environ.get("ROADWORTHY_DATA", here.parent / "shared" / "data")),
        metavar="DIR",
        help="the folder that holds camvid/ (--set camvid)",
    )
    add("--set", choices=("street", "camvid"), default="street", help="where frames come from (street)")
    add("--pushes", type=float, nargs="+", metavar="PX", help="largest push in pixels (4; --full: 4 8 2)")
    add("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (1; --full: 3)")
    add("--methods", nargs="+", default=list(METHODS), metavar="NAME", help=f"{' '.join(METHODS)} seal-gated")
    for field, what in (
        ("steps", "steps of each method"),
        ("warm", "steps of a warm-up"),
        ("frames", "training frames"),
        ("test", "test frames"),
        ("width", "channels of the network's stem"),
    ):
        add(f"--{field}", type=int, metavar="N", help=f"{what} ({getattr(Settings, field)})")
    add("--size", metavar="HxW", help="of rendered frames (160x320); larger ones have fewer edges per pixel")
    add("--full", action="store_true", help="pushes 4, 8, 2 and three seeds")
    add("--threads", type=int, default=1, metavar="N", help="torch threads (1)")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    a = p.parse_args(argv)
    known = (*METHODS, "seal-gated", "warm")
    if any(m not in known for m in a.methods):
        p.error(f"--methods: choose of {' '.join(known)}")
    if a.seeds is not None and a.seeds < 1:
        p.error("--seeds is 1 at least")
    torch.set_num_threads(a.threads)
    about, start = machine.describe(), time.process_time()
    given = {n: v for n in ("steps", "warm", "frames", "test", "width") if (v := getattr(a, n)) is not None}
    size = Settings.size if a.set == "street" else (360, 480)
    if a.size:
        height, _, width = a.size.partition("x")
        if a.set != "street" or not (height.isdigit() and width.isdigit()):
            p.error("--size is HxW, such as 256x512, and goes with --set street")
        size = (int(height), int(width))
    settings = Settings(kind=a.set, size=size, **given)
    pushes = a.pushes or ([4.0, 8.0, 2.0] if a.full else [4.0])
    seeds = range(a.seeds or (3 if a.full else 1))
    a.out.mkdir(parents=True, exist_ok=True)
    scenes = exact_pairs(settings, a.data)
    results: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    first, second = pushes[:2], pushes[2:]
    for push, seed in [(x, s) for group in (first, second) for s in seeds for x in group]:
        trial = Trial(settings, push, seed, a.out, scenes)
        for method in a.methods:
            if method in left_out:
                continue
            try:
                results.append(trial.result(method))
            except ValueError as error:
                if "dense CRF" not in str(error):
                    raise
                left_out[method] = str(error)
                print(f"{method} is left out: {error}", file=sys.stderr, flush=True)
                continue
            r = results[-1]
            told = " ".join(f"{k} {100 * v:.1f}" for k, v in r["mf"].items())
            print(f"{trial.name} {method} {r['train_cpu_seconds']} s: {told}", file=sys.stderr, flush=True)
    about["load_after"] = round(os.getloadavg()[0], 2)
    found = summary(results)
    print(machine.line(about))
    rows = rows_of(found, a.methods)
    print(machine.table(rows, [(key, key) for key in rows[0]]) if rows else "nothing was scored")
    seconds = {
        m: round(float(np.mean(s)), 1)
        for m in a.methods
        if (s := [r["train_cpu_seconds"] for r in results if r["method"] == m])
    }
    spent = round(time.process_time() - start)
    print(
        json.dumps(
            {
                "bench": "edges_order",
                "machine": about,
                "settings": settings.__dict__,
                "cpu_seconds": spent,
                "mf": found,
                "order": verdicts(results),
                "train_cpu_seconds": seconds,
                "left_out": left_out,
                "labels": {f"{r['push']:g} {r['seed']} {r['method']}": r["labels"] for r in results},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
