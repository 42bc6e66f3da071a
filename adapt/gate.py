"""The gate: may this candidate leave the adapter?  Decided without a single target label.

What is known without labels: what the source hold-out says, how the candidate divides the target hold-out
among the classes, whether it contradicts itself on a mirrored frame, how far it moved.  Every limit stands
in `Limits` with its reason; every check says what it saw, so that the report can show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapt import predict
from adapt.evaluate.segmentation import Confusion
from networks.pack import PackSpec

__all__ = ["Check", "Limits", "Measures", "better", "decide", "distance", "look", "measure", "source_score"]

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Limits:
    """Every threshold of the gate, with its reason."""

    # mIoU (0..1) the source hold-out may lose, judged with the source's own batch statistics: that is
    # forgetting in the weights.  Repeated measurements of one recipe differ by about 0.01.
    source_drop: float = 0.03
    # A class counts as shown when it covers this share of the target hold-out: under it, a handful of
    # pixels of one frame decide.
    shown: float = 0.003
    # Of its share a shown class must keep this much.  Good rounds move shares by 2, collapses by 100.
    kept: float = 0.15
    # exp(entropy of the class shares), the number of classes in effective use, must keep this part.
    variety: float = 0.6
    # No class may cover more of the hold-out than this, unless it already did before.
    largest: float = 0.85
    # Points (0..1) by which agreement with its own mirrored answer may fall.
    flip_drop: float = 0.04
    # Share of hold-out pixels that must still be answered as at the reference stage.
    agreement: float = 0.6
    # ‖w − w₀‖/‖w₀‖ over all weights that are trained.
    distance: float = 0.5
    # Frames that show nothing: a covered lens has a luma deviation of 0 to 2 levels, CamVid's dusk over 30.
    contrast: float = 4.0
    # Mean difference of neighbouring frames in levels: sensor noise alone gives 1 to 2, a moving car 5 to 30.
    motion: float = 0.5
    # Share of frames that may fail either.
    bad_frames: float = 0.25
    # Agreement with the mirrored answer that other batch statistics must gain to be taken (see `better`).
    statistics_gain: float = 0.0


@dataclass(frozen=True)
class Check:
    """One decision: what was measured, against what, and in words."""

    name: str
    value: float
    limit: float
    passed: bool
    reason: str


@dataclass
class Measures:
    """What is known of a network on the hold-outs, without target labels.

    share: float64 [C] of the target hold-out's pixels; confidence: mean max softmax; flip: share of pixels
    answered alike on the mirrored frame; variety: exp(entropy of share); information: entropy of the mean
    softmax minus mean entropy, in nats (high = sure of each pixel and varied over them); source: mIoU on the
    source hold-out, NaN without one; source_served: the same with the statistics that would be served.
    """

    share: np.ndarray
    confidence: float
    flip: float
    variety: float
    information: float
    source: float = float("nan")
    source_served: float = float("nan")
    labels: list[np.ndarray] = field(default_factory=list, repr=False)

    def numbers(self) -> dict[str, Any]:
        """For a report: plain Python numbers; what is not known (NaN) is left out."""
        plain = {
            "share": [round(float(v), 5) for v in self.share],
            **{
                k: round(float(getattr(self, k)), 5) for k in ("confidence", "flip", "variety", "information")
            },
        }
        for key in ("source", "source_served"):
            value = float(getattr(self, key))
            if np.isfinite(value):
                plain[key] = round(value, 5)
        return plain


def _entropy(share: np.ndarray) -> float:
    positive = share[share > 0]
    return float(-(positive * np.log(positive)).sum())


def look(frames: Sequence[np.ndarray], limits: Limits) -> list[Check]:
    """Are these frames of a road at all?  A covered lens and a stuck camera are declined before any work.

    Args:
        frames: uint8 [H,W,3] each, in order of time.
    """
    small = [f[::4, ::4].astype(np.float32).mean(-1) for f in frames]
    flat = float(np.mean([x.std() < limits.contrast for x in small]))
    still = float(np.mean([np.abs(a - b).mean() < limits.motion for a, b in pairwise(small)] or [0]))
    return [
        Check(
            "frames-contrast", round(flat, 5), limits.bad_frames, flat <= limits.bad_frames,
            f"{100 * flat:.0f}% of the frames show nothing (luma deviation under {limits.contrast:g})",
        ),
        Check(
            "frames-motion", round(still, 5), limits.bad_frames, still <= limits.bad_frames,
            f"{100 * still:.0f}% of the frames repeat the one before: is the camera stuck?",
        ),
    ]  # fmt: skip


def measure(network: nn.Module, spec: PackSpec, frames: Sequence[Any], *, batch: int = 4) -> Measures:
    """Look at unlabelled target frames uint8 [H,W,3]; the network stays as it is (evaluation mode)."""
    network.eval()
    classes = len(spec.classes)
    counts = np.zeros(classes, np.int64)
    mean = torch.zeros(classes, dtype=torch.float64)
    sure = same = entropy = 0.0
    pixels = 0
    labels: list[np.ndarray] = []
    for tensor in predict.batches(frames, batch):
        p = predict.probabilities(network, spec, tensor)
        mirrored = predict.probabilities(network, spec, tensor.flip(2)).flip(3)
        top, index = p.max(1)
        n = top.numel()
        counts += torch.bincount(index.reshape(-1), minlength=classes).numpy()
        mean += p.double().sum((0, 2, 3))
        sure += float(top.double().sum())
        same += float((index == mirrored.argmax(1)).double().sum())
        entropy += float(-(p * p.clamp_min(1e-12).log()).sum().double())
        pixels += n
        labels.extend(index.to(torch.uint8).numpy())
    if not pixels:
        raise ValueError("the gate got no target frame: put more frames aside (holdout)")
    share = counts / pixels
    return Measures(
        share=share, confidence=sure / pixels, flip=same / pixels, variety=float(np.exp(_entropy(share))),
        information=_entropy((mean / pixels).numpy()) - entropy / pixels, labels=labels,
    )  # fmt: skip


def source_score(network: nn.Module, spec: PackSpec, holdout: Sequence[Pair], *, batch: int = 4) -> float:
    """mIoU (0..1) on labelled source frames; NaN where there are none."""
    confusion = Confusion(len(spec.classes))
    for start in range(0, len(holdout), batch):
        pairs = [holdout[i] for i in range(start, min(start + batch, len(holdout)))]
        tensor = predict.as_tensor([x for x, _ in pairs])
        labels, _ = predict.labels_and_confidence(network, spec, tensor)
        for (_, truth), ours in zip(pairs, labels, strict=True):
            confusion.add(truth, ours)
    return confusion.miou()


def distance(state: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> float:
    """‖w − w₀‖/‖w₀‖ over floating-point weights; batch statistics are the domain's, not learnt: left out."""
    moved = norm = 0.0
    for name, before in parent.items():
        if not before.is_floating_point() or name.endswith(("running_mean", "running_var")):
            continue
        moved += float((state[name].double() - before.double()).square().sum())
        norm += float(before.double().square().sum())
    return float((moved / max(norm, 1e-30)) ** 0.5)


def better(one: Measures, other: Measures, limits: Limits) -> bool:
    """Is `one` the better guess of two sets of batch statistics?  Judged without labels.

    A network that uses far fewer classes has collapsed and is the worse one, however much it agrees with
    itself; otherwise agreement with the mirrored answer decides.  Measured on CamVid with the network
    trained on Cityscapes and statistics kept to 1, ½ and 0: agreement .859 .869 .833 with mIoU 42.1 45.8
    42.5 at dusk, and .921 .929 .914 with 53.3 57.6 52.1 by day.  Confidence and information always rise
    and tell nothing.
    """
    if one.variety < limits.variety * other.variety:
        return False
    if other.variety < limits.variety * one.variety:
        return True
    return one.flip > other.flip + limits.statistics_gain


def share_distance(share: np.ndarray, source: np.ndarray) -> float:
    """KL(source ‖ share) in nats between class shares float64 [C]; a class that vanished counts as 1e-4."""
    known = source > 0
    return float((source[known] * np.log(source[known] / np.maximum(share[known], 1e-4))).sum())


def nearer(one: Measures, other: Measures, source: np.ndarray, limits: Limits) -> bool:
    """Is `one` the better guess of two sets of batch statistics, by class shares?  Judged without labels.

    For roads of the same kind as the source's, where light or weather changed and not the town: the classes
    should then cover about what they covered there.  Agreement with the mirrored answer can mislead where a
    network is wrong with confidence: on rendered streets with statistics kept to 1, ½ and 0 it is .885 .872
    .874 at dusk with mIoU 42.9 54.8 59.9, and .932 .893 .833 in fog with 10.3 25.6 38.8; the distance of the
    shares is .404 .064 .014 and 2.155 .582 .028.  Where the scenery itself differs, use `better`.
    """
    if one.variety < limits.variety * other.variety:
        return False
    if other.variety < limits.variety * one.variety:
        return True
    return share_distance(one.share, source) < share_distance(other.share, source)


def decide(
    candidate: Measures,
    reference: Measures,
    parent: Measures,
    moved: float,
    spec: PackSpec,
    limits: Limits,
    *,
    source_share: np.ndarray | None = None,
) -> list[Check]:
    """All checks of a candidate.

    Args:
        candidate, parent: measured on the same hold-outs.
        reference: the stage before any weight moved (AdaBN's, or the parent where AdaBN was refused).
        moved: `distance` to the parent.
        source_share: float64 [C], class shares of source labels; classes it hardly has are not asked for.
    """
    checks = []

    def check(name: str, value: float, limit: float, passed: bool, reason: str) -> None:
        checks.append(Check(name, round(float(value), 5), limit, bool(passed), reason))

    finite = all(np.isfinite([candidate.confidence, candidate.flip, candidate.information, moved]))
    check(
        "finite",
        float(finite),
        1.0,
        finite,
        "every measure is a number" if finite else "the answers hold NaN",
    )
    if np.isfinite(parent.source):
        drop = parent.source - candidate.source
        check(
            "source-holdout", drop, limits.source_drop, drop <= limits.source_drop,
            f"source hold-out mIoU {100 * parent.source:.1f} -> {100 * candidate.source:.1f}",
        )  # fmt: skip
    gone, worst = [], 1.0
    for c, name in enumerate(spec.classes):
        asked = reference.share[c] >= limits.shown
        if source_share is not None:
            asked = asked and source_share[c] >= limits.shown
        if asked:
            ratio = candidate.share[c] / reference.share[c]
            worst = min(worst, ratio)
            if ratio < limits.kept:
                gone.append(f"{name} {100 * reference.share[c]:.1f}% -> {100 * candidate.share[c]:.2f}%")
    check(
        "class-vanished", worst, limits.kept, not gone,
        "vanished: " + ", ".join(gone) if gone else "every class that was shown still is",
    )  # fmt: skip
    kept = candidate.variety / max(reference.variety, 1e-9)
    check(
        "variety", kept, limits.variety, kept >= limits.variety,
        f"classes in effective use {reference.variety:.1f} -> {candidate.variety:.1f}",
    )  # fmt: skip
    top = int(candidate.share.argmax())
    bound = max(limits.largest, float(reference.share.max()) + 0.1)
    check(
        "one-class", candidate.share[top], bound, candidate.share[top] <= bound,
        f"the largest class, {spec.classes[top]}, covers {100 * candidate.share[top]:.0f}%",
    )  # fmt: skip
    drop = reference.flip - candidate.flip
    check(
        "flip-consistency", drop, limits.flip_drop, drop <= limits.flip_drop,
        f"agreement with the mirrored answer {reference.flip:.3f} -> {candidate.flip:.3f}",
    )  # fmt: skip
    agreement = agree(candidate, reference)
    check(
        "agreement", agreement, limits.agreement, agreement >= limits.agreement,
        f"{100 * agreement:.0f}% of hold-out pixels answered as before training",
    )  # fmt: skip
    check(
        "distance", moved, limits.distance, moved <= limits.distance,
        f"weights moved by {100 * moved:.1f}% of their norm",
    )  # fmt: skip
    return checks


def agree(a: Measures, b: Measures) -> float:
    """Share of hold-out pixels two networks answer alike; NaN where one kept no labels."""
    if not a.labels or len(a.labels) != len(b.labels):
        return float("nan")
    same = sum(int((x == y).sum()) for x, y in zip(a.labels, b.labels, strict=True))
    return same / sum(x.size for x in a.labels)


def as_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """For a manifest: {"passed": …, "failed": [names], "checks": [...]}."""
    return {
        "passed": all(c.passed for c in checks),
        "failed": [c.name for c in checks if not c.passed],
        "checks": [asdict(c) for c in checks],
    }
