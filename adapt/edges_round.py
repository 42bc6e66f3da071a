"""Semantic edges in a new domain: the edge head of a joint network follows its segmentation there.

    label   class-balanced pseudo-segmentation of the target frames (λ_c, see ``labels.cbst``); its edges,
            nothing along pixels without a label
    align   SEAL on the student's own ridges, gated: such labels are off by construction, but a head that sees
            nothing yet must not move them
    train   the edge head alone, source replay beside; encoder and segmentation stay bit for bit
    gate    source hold-out MF, agreement with the confident pseudo-edges, no class vanishes; else refused

Run it after ``adapt.round`` on the pack that came out.  No target label is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapt import predict
from adapt.data.base import read_frame, read_label
from adapt.evaluate.edges import EdgeCounts
from adapt.files import write_json
from adapt.labels.cbst import ClassHistograms, pseudo_labels
from adapt.labels.edges import category_edges
from adapt.labels.ridges import edge_probability
from adapt.labels.seal import Gate
from adapt.train.augment import Augmentation
from adapt.train.edges import Draw, EdgeRecipe, Sample, crops_of_segmentation, train
from adapt.train.loop import Progress, silent
from networks.pack import Pack, load_pack, write_pack

__all__ = ["EdgeRoundConfig", "EdgeRoundError", "EdgeRoundResult", "adapt_edges", "edge_score", "gate"]

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class EdgeRoundError(Exception):
    """A round cannot be run.  One line: thing, reason, remedy."""


@dataclass(frozen=True)
class EdgeRoundConfig:
    """Everything a round of edge adaptation may be told.

    portion: p of the pseudo-labels; steps, batch, crop, rate: the training; replay: share of source crops
    in it; alignment: pseudo-edges are aligned to the student's ridges, ``gate`` says which; source_drop:
    how far the source hold-out's MF may fall; agreement_drop: how far MF against the confident pseudo-edges
    may; vanish: smallest part of a class's mean probability that must be left (edge probabilities are small
    and uncalibrated, so nothing is counted over a threshold); force: write the pack whatever the gate says
    (for measuring the gate)."""

    portion: float = 0.5
    steps: int = 60
    batch: int = 6
    crop: tuple[int, int] = (160, 208)
    scale: tuple[float, float] = (0.75, 1.25)
    rate: float = 1e-3
    replay: float = 0.5
    alignment: bool = True
    gate: Gate | None = field(default_factory=Gate)
    holdout: float = 0.15
    source_drop: float = 0.02
    agreement_drop: float = 0.0
    vanish: float = 0.25
    max_distance: float = 0.0075
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class EdgeRoundResult:
    """pack: the refreshed pack, None where refused; report: every number that decided something."""

    pack: Pack | None
    accepted: bool
    report: dict[str, Any]


def edge_score(
    network: Any, spec: Any, pairs: Sequence[Pair], classes: int, max_distance: float = 0.0075
) -> EdgeCounts:
    """Thin counts of a network's edges against the category edges (radius 1) of class maps; 255 is no
    edge."""
    table = EdgeCounts(max_distance, thin=True, classes=classes)
    for frame, label in pairs:
        p = edge_probability(network, spec, frame)
        known = ~_near_unknown(label)
        table.add_classes(p * known, category_edges(label, classes, 1))
    return table


def _near_unknown(label: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels within 2 of one without a label: what happens there counts for nobody."""
    from scipy.ndimage import binary_dilation

    return np.asarray(binary_dilation(label == 255, np.ones((3, 3)), iterations=2))


def label_frames(
    network: Any, pack: Pack, frames: Sequence[NDArray[np.uint8]], portion: float
) -> list[NDArray[np.uint8]]:
    """Class-balanced pseudo-labels uint8 [H,W] of every frame, by the network's segmentation."""
    classes = len(pack.spec.classes)
    histograms = ClassHistograms(classes)
    for frame in frames:
        histograms.add(_softmax(network, pack, frame))
    limits = histograms.thresholds(portion)
    return [pseudo_labels(_softmax(network, pack, frame), limits) for frame in frames]


def _softmax(network: Any, pack: Pack, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(predict.probabilities(network, pack.spec, predict.as_tensor([frame]))[0].numpy())


def held_out(count: int, share: float) -> set[int]:
    """Which of ``count`` frames are kept for the gate: spread evenly, at least one."""
    aside = max(1, round(share * count))
    return set(range(0, count, count // aside)[:aside])


def _mixed(source: Draw | None, target: Draw, share: float) -> Draw:
    def draw(rng: np.random.Generator) -> Sample:
        sample = (source if source is not None and rng.random() < share else target)(rng)
        return replace(sample, labels=None)

    return draw


def _check_frames(pack: Pack, frames: Sequence[NDArray[np.uint8]], config: EdgeRoundConfig) -> None:
    network: Any = pack.network()
    if not hasattr(network, "joint"):
        raise EdgeRoundError(
            f"{pack.path} is {pack.spec.network}, which has no edge head; use espnetv2_edges"
        )
    if network.edge_head.classes != len(pack.spec.classes):
        raise EdgeRoundError(
            f"{pack.path} has {network.edge_head.classes} edge classes and "
            f"{len(pack.spec.classes)} of segmentation; "
            "pseudo-edges need the same"
        )
    if len(frames) < 4:
        raise EdgeRoundError(
            f"{len(frames)} frames of the target: 4 at least are needed, some are kept aside"
        )
    if any(side % network.size_multiple for side in frames[0].shape[:2]):
        raise EdgeRoundError(
            f"frames are {frames[0].shape[:2]}: sides must be multiples of {network.size_multiple}"
        )
    if any(side % network.size_multiple for side in config.crop):
        raise EdgeRoundError(f"crop {config.crop}: sides must be multiples of {network.size_multiple}")


def adapt_edges(
    pack: Pack,
    frames: Sequence[NDArray[np.uint8]],
    *,
    config: EdgeRoundConfig | None = None,
    out: Path,
    progress: Progress = silent,
) -> EdgeRoundResult:
    """One round on unlabelled frames uint8 [H,W,3] (one size, multiples of the network's).

    Writes out/report.json and, where the gate is passed, out/pack (parent = ``pack``).  Where ``out`` holds
    this very round, finished, its result is given again; what a killed one left is made anew.
    Raises EdgeRoundError for packs without an edge head or too few frames.
    """
    config = config or EdgeRoundConfig()
    _check_frames(pack, frames, config)
    classes = len(pack.spec.classes)
    identity = _identity(pack, frames, config)
    done = _finished(out, identity)
    if done is not None:
        return done
    shutil.rmtree(out / "pack", ignore_errors=True)  # killed between the pack and its report
    network, parent = pack.network(), pack.network()
    out.mkdir(parents=True, exist_ok=True)
    labels = label_frames(network, pack, frames, config.portion)
    progress("label", len(frames), len(frames))
    held = held_out(len(frames), config.holdout)
    pairs = [(f, y) for i, (f, y) in enumerate(zip(frames, labels, strict=True)) if i not in held]
    target_holdout = [(frames[i], labels[i]) for i in sorted(held)]
    augmentation = Augmentation(config.crop, scale=config.scale)
    replay = [(read_frame(f), read_label(y)) for f, y in pack.replay("train")]
    source_holdout = [(read_frame(f), read_label(y)) for f, y in pack.replay("holdout")]
    source = crops_of_segmentation(replay, classes, augmentation) if replay else None
    draw = _mixed(source, crops_of_segmentation(pairs, classes, augmentation), config.replay)
    recipe = EdgeRecipe(
        config.steps, batch=config.batch, round=max(config.batch, config.batch * config.steps // 3),
        rate=config.rate, aligned=config.alignment, unaligned=0, gate=config.gate, parts=("edge_head.",),
    )  # fmt: skip
    history = train(network, pack.spec, draw, recipe, seed=config.seed, progress=progress)
    checks = gate(parent, network, pack, source_holdout, target_holdout, config)
    accepted = all(c["passed"] for c in checks)
    report: dict[str, Any] = {
        "accepted": accepted,
        "identity": identity,
        "config": asdict(config),
        "frames": len(frames),
        "labelled_share": float(np.mean([(y != 255).mean() for y in labels])),
        "loss": [float(np.mean(history[:5])), float(np.mean(history[-5:]))] if history else [],
        "gate": checks,
    }
    refreshed = None
    if accepted or config.force:
        spec = replace(
            pack.spec,
            version=f"{pack.spec.version}-edges",
            parent=pack.sha256,
            adaptation={"kind": "edges", "frames": len(frames), "seed": config.seed, "steps": config.steps},
        )
        held_pairs = [(f, y, "train") for f, y in replay] + [(f, y, "holdout") for f, y in source_holdout]
        refreshed = write_pack(
            out / "pack", spec, network.state_dict(), golden=pack.golden(), replay=held_pairs or None
        )
    write_json(out / "report.json", report)
    return EdgeRoundResult(refreshed, accepted, report)


def _identity(pack: Pack, frames: Sequence[NDArray[np.uint8]], config: EdgeRoundConfig) -> str:
    digest = hashlib.sha256(json.dumps([pack.sha256, asdict(config)], sort_keys=True).encode())
    for frame in frames:
        digest.update(hashlib.sha256(np.ascontiguousarray(frame).tobytes()).digest())
    return digest.hexdigest()


def _finished(out: Path, identity: str) -> EdgeRoundResult | None:
    """The round in ``out``, where it is this one and came to its end."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        if report["identity"] != identity:
            return None
        made = load_pack(out / "pack") if report["accepted"] or report["config"]["force"] else None
        return EdgeRoundResult(made, bool(report["accepted"]), report)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shares(network: Any, pack: Pack, pairs: Sequence[Pair]) -> NDArray[np.float64]:
    """Mean edge probability of each class: how many edge pixels it expects a pixel, float64 [K]."""
    return np.asarray(
        np.mean([edge_probability(network, pack.spec, f).mean((1, 2), np.float64) for f, _ in pairs], 0)
    )


def gate(
    parent: Any,
    child: Any,
    pack: Pack,
    source: Sequence[Pair],
    target: Sequence[Pair],
    config: EdgeRoundConfig,
) -> list[dict[str, Any]]:
    """The checks by name: value, limit, passed."""
    checks = []

    def check(name: str, value: float, limit: float) -> None:
        checks.append({"name": name, "value": value, "limit": limit, "passed": bool(value >= limit)})

    def scored(network: Any, pairs: Sequence[Pair]) -> float:
        return edge_score(network, pack.spec, pairs, len(pack.spec.classes), config.max_distance).ods()

    finite = all(bool(torch.isfinite(v).all()) for v in child.state_dict().values() if v.is_floating_point())
    check("finite", float(finite), 1.0)
    if not finite:
        return checks
    if source:
        check("source-mf", scored(child, source), scored(parent, source) - config.source_drop)
    check("pseudo-agreement", scored(child, target), scored(parent, target) - config.agreement_drop)
    before, after = _shares(parent, pack, target), _shares(child, pack, target)
    seen = before > 1e-4
    check("vanish", float((after[seen] / before[seen]).min()) if seen.any() else 1.0, config.vanish)
    return checks
