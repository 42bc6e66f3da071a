"""Does class balance earn its keep?  The rows of the CBST paper and our presets, on shifts that are at hand.

    source only → batch statistics (AdaBN) → ST → CBST → CBST-SP → CBST-SP + MST → presets

Every algorithm starts from the same source weights and the same batch statistics of the target, takes the
same number of steps on the same frames and labels the same portion; the gate is measured and stops none of
them.  Presets run as they ship, gate on.  Every result is kept under --out as soon as it is there, so a run
that was stopped goes on.  It reads target labels, for scoring alone, and no algorithm sees them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapt.data.base import InMemory, Resized, Subset, read_frame, read_label, resize_frame, resize_label
from bench import machine
from bench.real import RealError, command, data_folder, numbers, spread
from common.files import write_json

ROOT = Path(__file__).resolve().parent.parent
SHIFTS = ("street:dusk", "street:fog", "street:night", "camvid:dusk", "cityscapes:camvid")
PORTIONS = (0.2, 0.35, 0.5)

# Everything a round may be told, pinned: a default that changes must not change what is compared here.
# Statistics of the target are always taken, whatever agreement says: the same start for all.
PLAIN: dict[str, Any] = {
    "portions": PORTIONS,
    "policy": "cbst",
    "compat": "",
    "label_flip": False,
    "label_scales": (1.0,),
    "prior": False,
    "adabn": True,
    "adabn_batch": 6,
    "adabn_keep": (0.0,),
    "adabn_by": "mirror",
    "from_parent": True,
    "holdout": 0.15,
    "source_free": None,
    "rate": 5e-4,
    "weight_decay": 1e-2,
    "schedule": "one-cycle",
    "bn": "batch",
    "mrkld": 0.0,
    "ema": 0.0,
    "clip": 0.0,
    "rare": 0.0,
    "classmix": 0.0,
    "keep_parent": 0.0,
    "brightness": 1.0,
    "colour": 0.0,
    "flip": True,
    "force": True,
    "blur": 0.0,
    "noise": 0.0,
    "absent": (),
    "warm": 0.3,
    "mic": 0.0,
    "lrent": 0.0,
    "rare_target": 0.0,
    "amp": "",
    "compile": False,
    "memory_mb": 0.0,
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "st": {"policy": "st"},
    "cbst": {},
    "cbst-sp": {"prior": True},
    "cbst-sp-mst": {"prior": True, "label_flip": True, "label_scales": (0.75, 1.0, 1.25)},
    # Without a labelled source frame; the student alone, and near its parent (preset source-free).
    "free": {"source_free": True, "portions": (0.2,), "bn": "frozen"},
    "free-near": {"source_free": True, "portions": (0.2,), "bn": "frozen", "keep_parent": 0.9},
    # As published: from the source's own statistics, which stay.
    "st-frozen": {"policy": "st", "adabn": False, "bn": "frozen"},
    "cbst-frozen": {"adabn": False, "bn": "frozen"},
}
STUDIES = ("labels", "near")
PRESETS = ("default", "modern", "source-free")
WORDS = {
    "source": "source only",
    "adabn": "batch statistics (AdaBN)",
    "st": "ST",
    "cbst": "CBST",
    "cbst-sp": "CBST-SP",
    "cbst-sp-mst": "CBST-SP + MST",
    "st-frozen": "ST, statistics of the source",
    "cbst-frozen": "CBST, statistics of the source",
    "labelled": "true labels of the target",
    "free": "source-free, the student alone",
    "free-near": "source-free, near the parent",
}
MAIN = (
    "source",
    "adabn",
    "st",
    "cbst",
    "cbst-sp",
    "cbst-sp-mst",
    *(f"preset:{name}" for name in PRESETS),
    "labelled",
)

EPILOG = """\
variants: source, adabn, st, cbst, cbst-sp, cbst-sp-mst, st-frozen, cbst-frozen, free, free-near
(source-free), labelled (true labels in place of pseudo-labels), labels (precision and recall of the
pseudo-labels), near (shares of the parent's weights in a source-free student), preset:NAME,
preset:NAME+KEY=JSON (a preset with a change) and plain+KEY=JSON+…

examples:
  python -m bench.ordering --shift street:dusk --seeds 3
  python -m bench.ordering --shift camvid:dusk --seed 0 --variant st --variant cbst --budget 500
  python -m bench.ordering --shift camvid:dusk --table          # print what is kept

exit codes: 0 measured (or out of budget: the same again goes on), 1 data missing or a stage failed, 2 usage
"""


# ------------------------------------------------------------------------------------------------ the shifts
@dataclass
class Shift:
    """A source pack, unlabelled target frames and labelled ones; what a round is told because of the size.

    frames: uint8 [H,W,3] each; marked: [(frame, label)] to judge pseudo-labels on; evaluation: items
    (frame, label) to score on; crossed: `marked` are those very frames; table: pack class -> truth class,
    uint8 [256], or None.
    """

    words: str
    pack: Any
    frames: list[np.ndarray]
    marked: list[tuple[np.ndarray, np.ndarray]]
    evaluation: Any
    rare: tuple[str, ...]
    classes: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    table: np.ndarray | None = None
    crossed: bool = False

    @cached_property
    def source(self) -> Any:
        """The source network, in evaluation mode."""
        return self.pack.network()


def street(domain: str, seed: int, folder: Path) -> Shift:
    """The committed street-day pack meets another domain: 64 frames of 16 streets, scored on 60 others."""
    from bench.demo import streets
    from networks.pack import load_pack

    drives, along = 16, 4
    frames = list(streets.stream(seed, domain, drives=drives, frames=along))
    truth = streets.truth(seed, domain, drives=drives, frames=along)
    held = list(zip(*streets.heldout(seed, domain, 60), strict=True))
    pack = load_pack(ROOT / "packs" / "street-day")
    return Shift(
        f"rendered streets, day → {domain}",
        pack,
        frames,
        list(zip(frames, truth, strict=True)),
        InMemory(held),
        ("pole", "sign", "person"),
        pack.spec.classes,
        {"source": 4, "target": 4, "scale": (0.9, 1.5), "bn": "split", "steps": 80},
    )


def camvid(seed: int, folder: Path) -> Shift:
    """ESPNetv2 at 192×256: Cityscapes weights, four epochs of CamVid by day, then dusk."""
    from adapt.data.camvid import CamVid
    from networks.pack import load_pack

    data = data_folder()
    root = data / "camvid"
    path = folder / "source"
    if not path.is_dir():
        initial = _cityscapes(folder.parent.parent / "espnetv2-1.0", "1.0", "352x480", data)
        told = command(
            [
                "adapt.train",
                "--init",
                str(initial),
                "--classes",
                "camvid11",
                "--data",
                f"camvid:{root}:day_train",
                "--val",
                f"camvid:{root}:day_val",
                "--size",
                "192x256",
                "--crop",
                "128x160",
                "--epochs",
                "4",
                "--batch",
                "6",
                "--rate",
                "1.5e-3",
                "--replay",
                "160",
                "--replay-holdout",
                "40",
                "--name",
                "camvid-day-small",
                "--seed",
                str(seed),
                "--threads",
                "1",
                "--licence",
                "research only (CamVid, Cityscapes)",
                "--out",
                str(path),
                "--json",
                "--quiet",
            ],
            folder / "log.txt",
        )
        (folder / "source-train.json").write_text(told)
    pack = load_pack(path)
    adapt = CamVid(root, "dusk_adapt", labels=False)
    frames = [resize_frame(adapt[i][0], pack.spec.size) for i in range(len(adapt))]
    evaluation = CamVid(root, "dusk_eval")
    return Shift(
        "CamVid, day → dusk, 192×256",
        pack,
        frames,
        _at_size(evaluation, pack.spec.size),
        evaluation,
        ("pole", "sign", "pedestrian", "bicyclist"),
        pack.spec.classes,
        {
            "source": 3,
            "target": 3,
            "crop": (128, 160),
            "scale": (0.75, 1.6),
            "steps": 60,
            "portions": (0.2, 0.5),
            "adabn_keep": (0.5,),
            "source_holdout": 6,
        },
        crossed=True,
    )


def cityscapes(seed: int, folder: Path) -> Shift:
    """The Cityscapes network (s = 0.5, 19 classes) as released meets CamVid by day; ten frames of replay."""
    from adapt.data.camvid import CamVid
    from adapt.train.priors import class_shares, spatial_prior
    from networks.labels import SPACES, mapping
    from networks.pack import load_pack, write_pack

    data = data_folder()
    path = folder.parent / "source"
    if not path.is_dir():
        initial = load_pack(_cityscapes(folder.parent.parent / "espnetv2-0.5", "0.5", "352x480", data))
        samples = data / "cityscapes_samples"
        labels = sorted((samples / "labels_trainid").glob("*.png"))
        pairs = []
        for file in labels:
            frame = next((samples / "images").glob(f"{file.stem}.*"), None)
            if frame is None:
                raise RealError(f"{samples}/images has no picture for {file.name}")
            pairs.append((_middle(read_frame(frame), (352, 480)), _middle(read_label(file), (352, 480))))
        if not pairs:
            raise RealError(f"no labels in {samples}/labels_trainid")
        # Every one of the ten is replayed and is in the hold-out too: there are no others.
        told = [(f, y, split) for split in ("train", "holdout") for f, y in pairs]
        ours = [y for _, y in pairs]
        write_pack(
            path,
            initial.spec,
            initial.state(),
            golden=np.stack([pairs[0][0]]),
            replay=iter(told),
            reference={"share": class_shares(ours, 19)},
            prior=spatial_prior(ours, 19),
        )
    pack = load_pack(path)
    root = data / "camvid"
    train = CamVid(root, "day_train", labels=False)
    chosen = np.linspace(0, len(train) - 1, 48).round().astype(int) + seed
    frames = [resize_frame(train[int(i) % len(train)][0], pack.spec.size) for i in chosen]
    day = CamVid(root, "day_val")
    evaluation = Subset(day, list(range(0, len(day), 2)))
    return Shift(
        "Cityscapes → CamVid by day, 352×480, s = 0.5",
        pack,
        frames,
        _at_size(evaluation, pack.spec.size)[::2],
        evaluation,
        ("pole", "sign", "pedestrian", "bicyclist"),
        SPACES["camvid11"].classes,
        {
            "source": 3,
            "target": 3,
            "crop": (192, 256),
            "scale": (0.75, 1.6),
            "steps": 40,
            "portions": (0.2, 0.5),
        },
        mapping("cityscapes19", "camvid11"),
    )


def _cityscapes(path: Path, scale: str, size: str, data: Path) -> Path:
    if not path.is_dir():
        weights = data / "weights" / f"espnetv2_s_{scale}_city_1024x512.pth"
        command(
            [
                "networks.import_checkpoint",
                "espnetv2",
                str(weights),
                "--set",
                f"scale={scale}",
                "--classes",
                "cityscapes19",
                "--size",
                size,
                "--out",
                str(path),
            ],
            path.parent / "log.txt",
        )
    return path


def _middle(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of a wider frame or label, at `size`."""
    width = round(array.shape[0] * size[1] / size[0])
    left = (array.shape[1] - width) // 2
    part = np.ascontiguousarray(array[:, left : left + width])
    return resize_frame(part, size) if part.ndim == 3 else resize_label(part, size)


def _at_size(dataset: Any, size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    sized = Resized(dataset, size)
    pairs = (sized[i] for i in range(len(sized)))
    return [(frame, label) for frame, label in pairs if label is not None]


def open_shift(name: str, seed: int, folder: Path) -> Shift:
    """The shift of that name.  Raises RealError where its data are not there."""
    kind, _, domain = name.partition(":")
    if kind == "street":
        return street(domain, seed, folder)
    return camvid(seed, folder) if kind == "camvid" else cityscapes(seed, folder)


# ---------------------------------------------------------------------------------------------- measuring
def score(shift: Shift, network: Any) -> dict[str, Any]:
    """mIoU, IoU of each class, calibration on the evaluation frames."""
    from adapt.evaluate import scoring

    confusion, calibration = scoring.score(
        network, shift.pack.spec, shift.evaluation, table=shift.table, classes=len(shift.classes)
    )
    return numbers(confusion, shift.classes) | {"ece": calibration.ece()}


def with_statistics(shift: Shift, network: Any, seed: int) -> Any:
    """Batch statistics of all target frames, in place: AdaBN, plain or with the share the shift keeps."""
    from adapt import batchnorm, inference
    from networks.pack import normalise

    keep = shift.settings.get("adabn_keep", PLAIN["adabn_keep"])[0]

    order = np.random.default_rng([seed, 31]).permutation(len(shift.frames))
    batches = (
        normalise(inference.as_tensor([shift.frames[k] for k in order[i : i + 6]]), shift.pack.spec)
        for i in range(0, len(order) - 1, 6)
    )
    return batchnorm.reestimate(network, batches, keep=keep)


def settings(shift: Shift, variant: str, seed: int) -> Any:
    """The RoundConfig of a variant: plain algorithms pinned, presets as they ship at the shift's size."""
    from adapt.gate.limits import Limits
    from adapt.round.presets import PRESETS as SHIPPED

    name, *changes = variant.split("+")
    if name in ALGORITHMS or name == "plain":
        told = {**PLAIN, **shift.settings, "limits": Limits(statistics_gain=-1.0), **ALGORITHMS.get(name, {})}
    elif name.startswith("preset:") and name.partition(":")[2] in SHIPPED:
        size = {
            k: v
            for k, v in shift.settings.items()
            if k in ("source", "target", "crop", "scale", "steps", "bn")
        }
        told = {**size, **SHIPPED[name.partition(":")[2]]}
        if len(shift.settings.get("portions", PORTIONS)) < 3 and "portions" not in told:
            told["portions"] = shift.settings["portions"]
    else:
        raise RealError(f"variant {variant!r} is unknown: see --help")
    for change in changes:
        key, _, text = change.partition("=")
        value = json.loads(text)
        told[key] = tuple(value) if isinstance(value, list) else value
    from adapt.round import RoundConfig

    return RoundConfig(**{**told, "seed": seed})


def _file_name(variant: str) -> str:
    return "".join("_" if c in ':+=[]", ' else c for c in variant)


def adapted(shift: Shift, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """A round, and every stage of it scored."""
    import torch

    from adapt.round import adapt

    config = settings(shift, variant, seed)
    out = folder / "rounds" / _file_name(variant)
    result = adapt(shift.pack, shift.frames, config=config, out=out)
    network = shift.pack.network()
    stages = {}
    for name in sorted(p.stem for p in out.glob("train-*.pt") if "." not in p.stem):
        network.load_state_dict(torch.load(out / f"{name}.pt", weights_only=True))
        stages[name] = score(shift, network.eval())["miou"]
    report = result.report
    found = score(shift, result.pack.network() if result.pack else shift.source)
    return found | {
        "stages": stages,
        "chosen": report.get("chosen"),
        "accepted": result.accepted,
        "failed": {k: v["failed"] for k, v in report["stages"].items() if v.get("failed")},
        "labelled": {k: v["labelled"] for k, v in report["stages"].items() if "labelled" in v},
        "measures": {k: report.get(f"{k}_measures", {}).get("source") for k in ("parent", "candidate")},
        "seconds": report["seconds"],
    }


def label_quality(shift: Shift, seed: int) -> dict[str, Any]:
    """Pseudo-labels of the network with the target's statistics, against true labels, before any training.

    precision: of the pixels labelled c, the share that is c; recall: of the pixels that are c, the share
    labelled c.
    """
    from adapt.evaluate.segmentation import Confusion
    from adapt.labels.cbst import ClassHistograms, pseudo_labels, st_threshold

    spec, classes = shift.pack.spec, len(shift.pack.spec.classes)
    network = with_statistics(shift, shift.pack.network(), seed)
    prior = _prior(shift)
    histograms = {"plain": ClassHistograms(classes), "sp": ClassHistograms(classes)}
    for p in _softmax(network, spec, shift.frames):
        histograms["plain"].add(p)
        if prior is not None:
            histograms["sp"].add(p, prior=prior)
    rules: dict[str, tuple[np.ndarray, Any]] = {}
    for portion in PORTIONS[::2]:
        rules[f"st {portion}"] = (st_threshold(histograms["plain"], portion), None)
        rules[f"cbst {portion}"] = (histograms["plain"].thresholds(portion), None)
        if prior is not None:
            rules[f"cbst-sp {portion}"] = (histograms["sp"].thresholds(portion), prior)
    counted = {name: Confusion(len(shift.classes)) for name in rules}
    for p, (_, truth) in zip(
        _softmax(network, spec, [f for f, _ in shift.marked]), shift.marked, strict=True
    ):
        for name, (lam, q) in rules.items():
            y = pseudo_labels(p, lam, prior=q)
            counted[name].add(truth, y if shift.table is None else shift.table[y])
    return {"labels": {name: _quality(c, shift.classes) for name, c in counted.items()}}


def bound(shift: Shift, seed: int) -> dict[str, Any]:
    """One training of the same length with true target labels in place of pseudo-labels.

    Where only the scored frames have labels, it is crossed over two halves of them: each half is scored by
    the network that learnt from the other.
    """
    from adapt.evaluate import scoring
    from adapt.evaluate.segmentation import Confusion
    from adapt.train.augment import Augmentation
    from adapt.train.batches import BatchMix, sampler
    from adapt.train.segmentation import SegmentationTrainer, TrainConfig

    told, spec = shift.settings, shift.pack.spec
    replay = [
        (resize_frame(read_frame(x), spec.size), resize_label(read_label(y), spec.size))
        for x, y in shift.pack.replay("train")
    ]
    if shift.table is not None:
        raise RealError("labelled: the labels of this shift are not in the network's classes")
    whole = list(range(len(shift.evaluation)))
    folds = [(shift.marked, whole)]
    if shift.crossed:
        middle = len(whole) // 2
        folds = [(shift.marked[:middle], whole[middle:]), (shift.marked[middle:], whole[:middle])]
    total = Confusion(len(shift.classes))
    for fold, (pairs, scored) in enumerate(folds):
        light = Augmentation(tuple(told.get("crop") or spec.size), told["scale"])
        mixture = BatchMix(told["source"], told["target"], light)
        how = TrainConfig(told["steps"], rate=PLAIN["rate"], bn=told.get("bn", "batch"))
        network = shift.pack.network()
        draw = sampler(replay, pairs, mixture, len(spec.classes), seed, 90 + fold)
        SegmentationTrainer(network, spec, how, draw, seed=seed + fold).run()
        with_statistics(shift, network, seed)
        part, _ = scoring.score(network, spec, Subset(shift.evaluation, scored))
        total.merge(part)
    return numbers(total, shift.classes)


def near_parent(shift: Shift, seed: int) -> dict[str, Any]:
    """What a source-free student is worth with a share of its parent's weights in it (WiSE-FT).

    One training as preset source-free does it, on every target frame: labels at p = .2 from the network with
    the target's statistics, which stay.
    """
    from adapt.labels.cbst import ClassHistograms, pseudo_labels
    from adapt.train.augment import Augmentation
    from adapt.train.batches import BatchMix, sampler
    from adapt.train.segmentation import SegmentationTrainer, TrainConfig

    told, spec, classes = shift.settings, shift.pack.spec, len(shift.pack.spec.classes)
    network = with_statistics(shift, shift.pack.network(), seed)
    before = score(shift, network)["miou"]
    parent = {name: w.detach().clone() for name, w in network.named_parameters()}
    histograms = ClassHistograms(classes)
    for p in _softmax(network, spec, shift.frames):
        histograms.add(p)
    lam = histograms.thresholds(PORTIONS[0])
    labels = [pseudo_labels(p, lam) for p in _softmax(network, spec, shift.frames)]
    light = Augmentation(tuple(told.get("crop") or spec.size), told["scale"])
    mixture = BatchMix(0, told["source"] + told["target"], light)
    draw = sampler([], list(zip(shift.frames, labels, strict=True)), mixture, classes, seed, 0)
    how = TrainConfig(told["steps"], rate=PLAIN["rate"], bn="frozen")
    SegmentationTrainer(network, spec, how, draw, seed=seed * 101).run()
    student = {name: w.detach().clone() for name, w in network.named_parameters()}
    found = {}
    for keep in (0.0, 0.25, 0.5, 0.75, 0.9):
        state = {name: w.lerp(parent[name], keep) for name, w in student.items()}
        network.load_state_dict({**network.state_dict(), **state})
        found[str(keep)] = score(shift, network)["miou"]
    return {"near": {"statistics alone": before, **found}}


def _quality(confusion: Any, classes: tuple[str, ...]) -> dict[str, Any]:
    matrix = confusion.matrix
    hit = matrix[:, :-1].diagonal()
    given, true = matrix[:, :-1].sum(0), matrix.sum(1)
    return {
        "labelled": float(given.sum() / max(true.sum(), 1)),
        "right": float(hit.sum() / max(given.sum(), 1)),
        "precision": {c: float(hit[i] / given[i]) if given[i] else None for i, c in enumerate(classes)},
        "recall": {c: float(hit[i] / true[i]) if true[i] else None for i, c in enumerate(classes)},
        "share": {c: float(given[i] / max(given.sum(), 1)) for i, c in enumerate(classes)},
        "true_share": {c: float(true[i] / max(true.sum(), 1)) for i, c in enumerate(classes)},
    }


def _prior(shift: Shift) -> np.ndarray | None:
    from PIL import Image

    kept = shift.pack.prior()
    if kept is None:
        return None
    size = shift.pack.spec.size[::-1]
    planes = [
        np.asarray(Image.fromarray(q.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
        for q in kept
    ]
    return np.asarray(np.clip(np.stack(planes), 0.0, 1.0))


def _softmax(network: Any, spec: Any, frames: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    from adapt import inference

    for tensor in inference.batches(frames, 4):
        yield from inference.probabilities(network, spec, tensor).numpy()


def measure(shift: Shift, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """One variant of one seed."""
    if variant == "source":
        return score(shift, shift.source)
    if variant == "adabn":
        return score(shift, with_statistics(shift, shift.pack.network(), seed))
    if variant == "labelled":
        return bound(shift, seed)
    if variant == "near":
        return near_parent(shift, seed)
    if variant == "labels":
        return label_quality(shift, seed)
    return adapted(shift, variant, seed, folder)


# ---------------------------------------------------------------------------------------------- the tables
def gather(out: Path, shift: str) -> dict[str, dict[int, dict[str, Any]]]:
    """{variant: {seed: result}} of what is kept."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted((out / shift.replace(":", "-")).glob("seed*/results/*.json")):
        kept = json.loads(file.read_text())
        found.setdefault(kept["variant"], {})[kept["seed"]] = kept
    return found


def table(found: dict[str, dict[int, dict[str, Any]]], rare: Sequence[str]) -> str:
    """Markdown: a row a variant, mean ± standard deviation over seeds in percent."""
    order = [v for v in MAIN if v in found] + [v for v in found if v not in (*MAIN, *STUDIES)]
    first = next(iter(found[order[0]].values()))
    heads = [c for c in rare if c in first["iou"]]
    lines = [
        f"| | mean IoU | {' | '.join(heads)} | rare | the others | seeds |",
        "|---|" + "---:|" * (len(heads) + 4),
    ]
    for variant in order:
        results = found[variant].values()
        cells = [spread([r["miou"] for r in results])]
        cells += [spread([r["iou"][c] for r in results]) for c in heads]
        cells.append(spread([float(np.mean([r["iou"][c] for c in heads])) for r in results]))
        cells.append(
            spread([float(np.mean([v for c, v in r["iou"].items() if c not in heads])) for r in results])
        )
        words = WORDS.get(variant, variant.replace("preset:", "preset "))
        lines.append(f"| {words} | {' | '.join(cells)} | {len(results)} |")
    return "\n".join(lines)


def options_table(found: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Markdown: what each option changes against the same round without it, in points, seed by seed.

    The round without is the shortest plain+…; an option is what stands behind that name.
    """
    plain = sorted((v for v in found if v.startswith("plain+portions=")), key=len)
    if not plain:
        return ""
    base, lines = plain[0], []
    for variant in (v for v in found if v.startswith(f"{base}+")):
        common = sorted(set(found[variant]) & set(found[base]))
        change = [found[variant][s]["miou"] - found[base][s]["miou"] for s in common]
        if change:
            each = ", ".join(f"{100 * c:+.1f}" for c in change)
            lines.append(f"| `{variant.removeprefix(base + '+')}` | {spread(change)} | {each} |")
    if not lines:
        return ""
    told = spread([r["miou"] for r in found[base].values()])
    return "\n".join([f"| against `{base}` ({told}) | Δ mIoU | each seed |", "|---|---:|---|", *lines])


def near_table(found: dict[int, dict[str, Any]]) -> str:
    """Markdown: mIoU with each share of the parent's weights, mean ± deviation, and each seed."""
    heads = list(next(iter(found.values()))["near"])
    lines = [f"| parent's share | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for seed, result in sorted(found.items()):
        lines.append(f"| seed {seed} | " + " | ".join(spread([result["near"][h]]) for h in heads) + " |")
    cells = [spread([r["near"][h] for r in found.values()]) for h in heads]
    return "\n".join([*lines, f"| **mean** | {' | '.join(cells)} |"])


def label_table(found: dict[int, dict[str, Any]], classes: Sequence[str]) -> str:
    """Markdown: precision / recall of each class's pseudo-labels, percent, mean over seeds."""
    rules = list(next(iter(found.values()))["labels"])
    lines = [f"| | {' | '.join(rules)} |", "|---|" + "---:|" * len(rules)]

    def mean(rule: str, *keys: str) -> str:
        values: list[float] = []
        for result in found.values():
            value: Any = result["labels"][rule]
            for key in keys:
                value = value[key]
            if value is not None:
                values.append(value)
        return f"{100 * np.mean(values):.0f}" if values else "–"

    for words, key in (("pixels labelled", "labelled"), ("of them right", "right")):
        lines.append(f"| {words} | {' | '.join(mean(r, key) for r in rules)} |")
    for c in classes:
        cells = [f"{mean(r, 'precision', c)} / {mean(r, 'recall', c)}" for r in rules]
        lines.append(f"| {c} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m bench.ordering",
        description="Source only, AdaBN, ST, CBST, CBST-SP, CBST-SP + MST and the presets on one shift, for "
        "docs/results/ordering.md.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--shift", required=True, choices=SHIFTS, help="which shift")
    p.add_argument("--seeds", type=int, default=3, metavar="N", help="0..N-1 (3)")
    p.add_argument("--seed", type=int, metavar="S", help="this seed alone")
    p.add_argument("--variant", action="append", metavar="V", help="this one (again for more; all main rows)")
    p.add_argument(
        "--budget", type=float, default=0.0, metavar="S", help="start nothing after S seconds (0: none)"
    )
    p.add_argument(
        "--out", type=Path, default=Path("out/ordering"), metavar="DIR", help="cache (out/ordering)"
    )
    p.add_argument("--table", action="store_true", help="only print what is kept")
    arguments = p.parse_args(argv)
    if arguments.seeds < 1 or (arguments.seed is not None and arguments.seed < 0):
        p.error("--seeds is 1 or more, --seed 0 or more")
    import torch

    from adapt.round import RoundError

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start, before = time.monotonic(), machine.describe()
    out = arguments.out.resolve()
    place = out / arguments.shift.replace(":", "-")
    try:
        seeds = [arguments.seed] if arguments.seed is not None else range(arguments.seeds)
        for seed in () if arguments.table else seeds:
            folder, shift = place / f"seed{seed}", None
            for variant in arguments.variant or (*MAIN[:3], "labels", *MAIN[3:]):
                name = _file_name(variant)
                file = folder / "results" / f"{name}.json"
                if file.is_file() or (arguments.budget and time.monotonic() - start > arguments.budget):
                    continue
                if shift is None:
                    folder.mkdir(parents=True, exist_ok=True)
                    shift = open_shift(arguments.shift, seed, folder)
                begun = time.monotonic()
                found = measure(shift, variant, seed, folder)
                file.parent.mkdir(exist_ok=True)
                kept = {
                    "shift": arguments.shift,
                    "variant": variant,
                    "seed": seed,
                    "rare": shift.rare,
                    "took": round(time.monotonic() - begun, 1),
                }
                write_json(file, found | kept)
                words = f"{100 * found['miou']:.1f}" if "miou" in found else "done"
                stages = " ".join(f"{k}={100 * v:.1f}" for k, v in found.get("stages", {}).items())
                print(
                    f"{arguments.shift} seed {seed} {variant}: {words} {stages} ({kept['took']} s)",
                    file=sys.stderr,
                    flush=True,
                )
        everything = gather(out, arguments.shift)
        if not everything:
            raise RealError(f"{place} holds no result: run without --table")
    except (RealError, RoundError, OSError, ValueError) as error:
        print(f"bench.ordering: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    rare = next(iter(next(iter(everything.values())).values()))["rare"]
    print(machine.line(before | {"load_after": os.getloadavg()[0]}))
    rows = {v: kept for v, kept in everything.items() if v not in STUDIES}
    print(f"\n{arguments.shift}\n")
    if rows:
        print(table(rows, rare), "\n")
        options = options_table(rows)
        if options:
            print(options, "\n")
    if "near" in everything:
        print(near_table(everything["near"]), "\n")
    if "labels" in everything:
        first = next(iter(everything["labels"].values()))
        print(
            label_table(everything["labels"], list(next(iter(first["labels"].values()))["precision"])), "\n"
        )
    scores = {v: {s: round(r["miou"], 4) for s, r in sorted(kept.items())} for v, kept in rows.items()}
    print(json.dumps({"shift": arguments.shift, "miou": scores, "machine": before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
