"""The gate: may this candidate leave the adapter?  Decided without a single target label.

What is known without labels: what the source hold-out says (as it is, and in the colours of the target), how
the candidate divides the target hold-out among the classes, whether it contradicts itself on a mirrored
frame, on the next one or its own mean along the training, how sure it has become, how far it moved.  A
labelled hold-out is used where somebody has one.  Every limit stands in `adapt.gate.limits.Limits` with its
reason; every check says what it saw, so that the report can show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapt import inference
from adapt.evaluate.segmentation import Calibration, Confusion
from adapt.gate.input_quality import look
from adapt.gate.layout_prior import Layout
from adapt.gate.limits import Check, Limits, as_dict
from networks.pack import PackSpec

__all__ = [
    "Check", "Limits", "Measures", "agree", "as_dict", "better", "cumulative", "decide", "distance", "look",
    "measure", "more_right", "nearer", "scores", "share_distance", "source_score", "steadiness", "translated",
]  # fmt: skip

Pair = tuple[np.ndarray, np.ndarray]
_SOMETIMES = ("source", "source_served", "temporal", "teacher", "translated", "calibration", "labelled")


@dataclass
class Measures:
    """What is known of a network on the hold-outs, without target labels.

    share: float64 [C] of the target hold-out's pixels; confidence: mean max softmax; flip: share of pixels
    answered alike on the mirrored frame; variety: exp(entropy of share); information: entropy of the mean
    softmax minus mean entropy, in nats (high = sure of each pixel and varied over them); temporal: share of
    pixels answered alike on the next frame where the picture stayed the same; teacher: share answered as the
    mean of the weights along the training answers; source: mIoU on the source hold-out; source_served: the
    same with the statistics that would be served; translated: mIoU on the source hold-out in the colours of
    the target; calibration: expected calibration error on the source hold-out; source_iou: [C], as `source`;
    labelled: mIoU on a labelled target hold-out; layouts: for each frame how likely its answer is where
    things are in the source's labels (`adapt.gate.layout_prior`).  NaN is "not known".
    """

    share: np.ndarray
    confidence: float
    flip: float
    variety: float
    information: float
    source: float = float("nan")
    source_served: float = float("nan")
    temporal: float = float("nan")
    teacher: float = float("nan")
    translated: float = float("nan")
    calibration: float = float("nan")
    labelled: float = float("nan")
    source_iou: np.ndarray | None = None
    layouts: np.ndarray | None = None
    labels: list[np.ndarray] = field(default_factory=list, repr=False)

    def numbers(self) -> dict[str, Any]:
        """For a report: plain Python numbers; what is not known (NaN) is left out."""
        plain = {
            "share": [round(float(v), 5) for v in self.share],
            **{
                k: round(float(getattr(self, k)), 5) for k in ("confidence", "flip", "variety", "information")
            },
        }
        for key in _SOMETIMES:
            value = float(getattr(self, key))
            if np.isfinite(value):
                plain[key] = round(value, 5)
        if self.layouts is not None:
            plain["layouts"] = [round(float(v), 3) for v in self.layouts]
        if self.source_iou is not None:
            plain["source_iou"] = [round(float(v), 5) if np.isfinite(v) else None for v in self.source_iou]
        return plain


def _entropy(share: np.ndarray) -> float:
    positive = share[share > 0]
    return float(-(positive * np.log(positive)).sum())


def measure(
    network: nn.Module,
    spec: PackSpec,
    frames: Sequence[Any],
    *,
    batch: int = 4,
    following: Sequence[np.ndarray | None] = (),
    limits: Limits | None = None,
) -> Measures:
    """Look at unlabelled target frames uint8 [H,W,3]; the network stays as it is (evaluation mode).

    following: for each frame the one after it in time, or None; then `temporal` is measured too.
    """
    network.eval()
    classes = len(spec.classes)
    counts = np.zeros(classes, np.int64)
    mean = torch.zeros(classes, dtype=torch.float64)
    sure = same = entropy = 0.0
    pixels = 0
    labels: list[np.ndarray] = []
    for tensor in inference.batches(frames, batch):
        p = inference.probabilities(network, spec, tensor)
        mirrored = inference.probabilities(network, spec, tensor.flip(2)).flip(3)
        top, index = p.max(1)
        n = top.numel()
        counts += torch.bincount(index.reshape(-1), minlength=classes).cpu().numpy()
        mean += p.double().sum((0, 2, 3)).cpu()
        sure += float(top.double().sum())
        same += float((index == mirrored.argmax(1)).double().sum())
        entropy += float(-(p * p.clamp_min(1e-12).log()).sum().double())
        pixels += n
        labels.extend(index.to(torch.uint8).cpu().numpy())
    if not pixels:
        raise ValueError("the gate got no target frame: put more frames aside (holdout)")
    share = counts / pixels
    found = Measures(
        share=share, confidence=sure / pixels, flip=same / pixels, variety=float(np.exp(_entropy(share))),
        information=_entropy((mean / pixels).numpy()) - entropy / pixels, labels=labels,
    )  # fmt: skip
    if following:
        after: list[np.ndarray | None] = []
        for frame in following:
            theirs = None
            if frame is not None:
                theirs = inference.labels_and_confidence(network, spec, inference.as_tensor([frame]))[0][0]
            after.append(theirs)
        found.temporal = steadiness(frames, labels, following, after, limits or Limits())
    return found


def scores(
    network: nn.Module, spec: PackSpec, pairs: Sequence[Pair], *, batch: int = 4
) -> tuple[Confusion, Calibration]:
    """Confusion and calibration on labelled frames of the pack's size."""
    confusion, calibration = Confusion(len(spec.classes)), Calibration()
    for start in range(0, len(pairs), batch):
        chunk = [pairs[i] for i in range(start, min(start + batch, len(pairs)))]
        tensor = inference.as_tensor([x for x, _ in chunk])
        labels, confidence = inference.labels_and_confidence(network, spec, tensor)
        for (_, truth), ours, sure in zip(chunk, labels, confidence, strict=True):
            confusion.add(truth, ours)
            calibration.add(truth, ours, sure)
    return confusion, calibration


def source_score(network: nn.Module, spec: PackSpec, holdout: Sequence[Pair], *, batch: int = 4) -> float:
    """mIoU (0..1) on labelled source frames; NaN where there are none."""
    return scores(network, spec, holdout, batch=batch)[0].miou()


def steadiness(
    frames: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    following: Sequence[np.ndarray | None],
    next_labels: Sequence[np.ndarray | None],
    limits: Limits,
) -> float:
    """Temporal consistency: of the pixels that look the same on the next frame, the share answered alike.

    No optical flow: a pixel takes part where both frames, averaged over 5×5, differ by less than
    `limits.same_colour` levels in every channel.  That leaves road, sky and façades that fill their place in
    both frames; a pair where fewer than `limits.same_share` of the pixels do says nothing.  NaN where no
    pair says anything.
    """
    same = total = 0
    for frame, ours, after, theirs in zip(frames, labels, following, next_labels, strict=True):
        if after is None or theirs is None:
            continue
        mask = np.abs(_blurred(frame) - _blurred(after)).max(-1) < limits.same_colour
        if mask.mean() < limits.same_share:
            continue
        same += int((ours == theirs)[mask].sum())
        total += int(mask.sum())
    return same / total if total else float("nan")


def _blurred(frame: np.ndarray, size: int = 5) -> np.ndarray:
    from scipy.ndimage import uniform_filter

    return np.asarray(uniform_filter(frame.astype(np.float32), (size, size, 0), mode="nearest"))


def translated(frame: np.ndarray, style: np.ndarray, *, beta: float = 0.02) -> np.ndarray:
    """A source frame in the colours of a target frame, uint8 [H,W,3]; what is where does not change.

    Each channel gets the target's mean and deviation, then the low frequencies' amplitude (a square of
    2·beta of each side) is the target's and the phase stays (Yang and Soatto, *FDA*, CVPR 2020).
    """
    x, y = frame.astype(np.float32), style.astype(np.float32)
    x = (x - x.mean((0, 1))) / np.maximum(x.std((0, 1)), 1.0) * y.std((0, 1)) + y.mean((0, 1))
    if y.shape != x.shape:
        raise ValueError(f"a frame of {frame.shape} cannot take the colours of one of {style.shape}")
    a, b = np.fft.fft2(x, axes=(0, 1)), np.fft.fft2(y, axes=(0, 1))
    rows, columns = (np.abs(np.fft.fftfreq(n)) <= beta for n in x.shape[:2])
    low = rows[:, None, None] & columns[None, :, None]
    amplitude = np.where(low, np.abs(b), np.abs(a))
    mixed = np.fft.ifft2(amplitude * np.exp(1j * np.angle(a)), axes=(0, 1)).real
    return np.asarray(np.clip(np.rint(mixed), 0, 255), np.uint8)


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


def more_right(one: Measures, other: Measures, limits: Limits) -> bool:
    """Is `one` the better guess of two sets of batch statistics, by source frames in the target's colours?

    Labels are known there, so this is the nearest thing to asking the target itself.  On rendered drives it
    was right about old and new statistics in 16 of 17 cases, where agreement with the mirrored answer was in
    9; statistics of what is no street mislead it (3 of 7 against 5 of 7): docs/results/gate.md.
    """
    if one.variety < limits.variety * other.variety:
        return False
    if other.variety < limits.variety * one.variety:
        return True
    return one.translated > other.translated


def decide(
    candidate: Measures,
    reference: Measures,
    parent: Measures,
    moved: float,
    spec: PackSpec,
    limits: Limits,
    *,
    source_share: np.ndarray | None = None,
    layout: Layout | None = None,
) -> list[Check]:
    """All checks of a candidate.

    Args:
        candidate, parent: measured on the same hold-outs.
        reference: the stage before any weight moved (AdaBN's, or the parent where AdaBN was refused).
        moved: `distance` to the parent.
        source_share: float64 [C], class shares of source labels; classes it hardly has are not asked for.
        layout: of the source, where `layouts` were measured with it.
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
    if source_share is not None:
        near, far = (share_distance(m.share, source_share) for m in (reference, candidate))
        check(
            "source-shares", far - near, limits.shares_rise, far - near <= limits.shares_rise,
            f"distance of the class shares to the source's {near:.3f} -> {far:.3f}",
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
    drop = parent.flip - candidate.flip
    check(
        "flip-parent", drop, limits.parent_flip_drop, drop <= limits.parent_flip_drop,
        f"the same against the parent {parent.flip:.3f} -> {candidate.flip:.3f}",
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
    jump = candidate.confidence - reference.confidence
    check(
        "confidence", jump, limits.confidence_jump, jump <= limits.confidence_jump,
        f"mean confidence {reference.confidence:.3f} -> {candidate.confidence:.3f}",
    )  # fmt: skip
    if np.isfinite(candidate.teacher):
        check(
            "teacher", candidate.teacher, limits.teacher, candidate.teacher >= limits.teacher,
            f"{100 * candidate.teacher:.0f}% of pixels answered as by the mean of the training's weights",
        )  # fmt: skip
    falls = (
        ("temporal", "temporal", reference, limits.temporal_drop, "agreement with the next frame"),
        ("source-translated", "translated", reference, limits.translated_drop,
         "mIoU on source hold-out frames in the target's colours"),
        ("parent-translated", "translated", parent, limits.translated_drop,
         "the same against the parent, batch statistics included:"),
        ("labelled-holdout", "labelled", reference, limits.labelled_drop, "mIoU on the labelled hold-out"),
    )  # fmt: skip
    for name, key, base, limit, words in falls:
        before, after = getattr(base, key), getattr(candidate, key)
        if np.isfinite(before):
            drop = before - after
            check(name, drop, limit, drop <= limit, f"{words} {before:.3f} -> {after:.3f}")
    if layout is not None and candidate.layouts is not None and parent.layouts is not None:
        odd = parent.layouts < layout.mean - limits.foreign_parent * layout.spread
        odd &= candidate.layouts < layout.mean - limits.foreign_candidate * layout.spread
        foreign = float(odd.mean())
        check(
            "layout", foreign, limits.foreign, foreign <= limits.foreign,
            f"{100 * foreign:.0f}% of the hold-out frames are laid out like no street of the source",
        )  # fmt: skip
    if np.isfinite(parent.calibration):
        rise = candidate.calibration - parent.calibration
        check(
            "calibration", rise, limits.calibration_rise, rise <= limits.calibration_rise,
            f"calibration error on source frames {parent.calibration:.3f} -> {candidate.calibration:.3f}",
        )  # fmt: skip
    return checks


def cumulative(candidate: Measures, released_source: float, moved: float, limits: Limits) -> list[Check]:
    """What all rounds since the released pack add up to; for a round whose parent is not the released pack.

    Args:
        released_source: mIoU of the released pack on the same source hold-out; NaN where there is none.
        moved: `distance` from the released pack's weights.
    """
    checks = [
        Check(
            "total-distance", round(moved, 5), limits.total_distance, moved <= limits.total_distance,
            f"weights are {100 * moved:.1f}% of their norm from the released pack's",
        )
    ]  # fmt: skip
    if np.isfinite(released_source):
        drop = released_source - candidate.source
        checks.append(
            Check(
                "total-source-holdout", round(drop, 5), limits.total_source_drop,
                bool(drop <= limits.total_source_drop),
                f"source mIoU {100 * released_source:.1f} as released -> {100 * candidate.source:.1f}",
            )
        )  # fmt: skip
    return checks


def agree(a: Measures, b: Measures) -> float:
    """Share of hold-out pixels two networks answer alike; NaN where one kept no labels."""
    if not a.labels or len(a.labels) != len(b.labels):
        return float("nan")
    same = sum(int((x == y).sum()) for x, y in zip(a.labels, b.labels, strict=True))
    return same / sum(x.size for x in a.labels)
