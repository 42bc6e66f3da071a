"""What a gate can measure of a segmentation network without target labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapt import inference
from adapt.evaluate.segmentation import Calibration, Confusion
from adapt.gate.limits import Limits
from networks.pack import PackSpec

__all__ = [
    "Measures",
    "measure",
    "pixel_agreement",
    "scores",
    "share_distance",
    "source_score",
    "temporal_consistency",
    "translated",
    "weight_distance",
]

Pair = tuple[np.ndarray, np.ndarray]
_SOMETIMES = ("source", "source_served", "temporal", "teacher", "translated", "calibration", "labelled")


@dataclass
class Measures:
    """What is known of a network on the hold-outs, without target labels.  NaN = not known.

    Attributes:
        share: float64 [C], share of the target hold-out's pixels per class.
        confidence: mean max softmax.
        flip: share of pixels with the same answer on the mirrored frame.
        variety: exp(entropy of share), the number of classes in effective use.
        information: entropy of the mean softmax minus mean entropy, in nats: high if the network is sure of
            each pixel and varied over them.
        temporal: share of pixels with the same answer on the next frame, of those whose picture stayed.
        teacher: share of pixels with the same answer as the mean of the weights along the training.
        source: mIoU on the source hold-out, with the source's own batch statistics.
        source_served: the same with the statistics that would be served.
        translated: mIoU on the source hold-out in the colours of the target.
        calibration: expected calibration error on the source hold-out.
        labelled: mIoU on a labelled target hold-out.
        source_iou: float64 [C], per class, as `source`.
        layouts: per frame how likely its answer is under the layout of the source's labels
            (`adapt.gate.layout_prior`).
        labels: the answers uint8 [H,W] themselves.
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
        """For a report: plain Python numbers; values that are not known are left out."""
        plain: dict[str, Any] = {"share": [round(float(v), 5) for v in self.share]}
        for key in ("confidence", "flip", "variety", "information"):
            plain[key] = round(float(getattr(self, key)), 5)
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
    """Measure a network on unlabelled target frames; it is afterwards in evaluation mode, else unchanged.

    Args:
        frames: uint8 [H,W,3] each.
        batch: frames per forward pass.
        following: per frame the one after it in time, or None; if given, `temporal` is measured too.
        limits: of `temporal_consistency`.

    Raises:
        ValueError: there is no frame.
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
        share=share,
        confidence=sure / pixels,
        flip=same / pixels,
        variety=float(np.exp(_entropy(share))),
        information=_entropy((mean / pixels).numpy()) - entropy / pixels,
        labels=labels,
    )
    if following:
        after = [None if frame is None else _answer(network, spec, frame) for frame in following]
        found.temporal = temporal_consistency(frames, labels, following, after, limits or Limits())
    return found


def _answer(network: nn.Module, spec: PackSpec, frame: np.ndarray) -> np.ndarray:
    labels, _ = inference.labels_and_confidence(network, spec, inference.as_tensor([frame]))
    return np.asarray(labels[0])


def scores(
    network: nn.Module, spec: PackSpec, pairs: Sequence[Pair], *, batch: int = 4
) -> tuple[Confusion, Calibration]:
    """Confusion and calibration on labelled frames of the pack's size."""
    confusion, calibration = Confusion(len(spec.classes)), Calibration()
    for start in range(0, len(pairs), batch):
        chunk = [pairs[i] for i in range(start, min(start + batch, len(pairs)))]
        tensor = inference.as_tensor([x for x, _ in chunk])
        labels, confidence = inference.labels_and_confidence(network, spec, tensor)
        for (_, truth), answer, sure in zip(chunk, labels, confidence, strict=True):
            confusion.add(truth, answer)
            calibration.add(truth, answer, sure)
    return confusion, calibration


def source_score(network: nn.Module, spec: PackSpec, holdout: Sequence[Pair], *, batch: int = 4) -> float:
    """mIoU (0..1) on labelled source frames; NaN if there is none."""
    return scores(network, spec, holdout, batch=batch)[0].miou()


def temporal_consistency(
    frames: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    following: Sequence[np.ndarray | None],
    next_labels: Sequence[np.ndarray | None],
    limits: Limits,
) -> float:
    """Of the pixels that stay the same from one frame to the next, the share with the same answer.

    No optical flow: a pixel takes part where both frames, averaged over 5×5, differ by less than
    `limits.same_colour` levels in every channel.  That leaves road, sky and façades that fill their place in
    both frames.  A pair is skipped if fewer than `limits.same_share` of the pixels take part.

    Args:
        frames, labels: uint8 [H,W,3] and the answers to them, uint8 [H,W].
        following, next_labels: per frame the next one in time and its answer, or None.

    Returns:
        0..1, or NaN if every pair is skipped.
    """
    same = total = 0
    for frame, label, after, next_label in zip(frames, labels, following, next_labels, strict=True):
        if after is None or next_label is None:
            continue
        mask = np.abs(_blurred(frame) - _blurred(after)).max(-1) < limits.same_colour
        if mask.mean() < limits.same_share:
            continue
        same += int((label == next_label)[mask].sum())
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


def weight_distance(state: Mapping[str, Tensor], parent: Mapping[str, Tensor]) -> float:
    """‖w − w₀‖/‖w₀‖ over floating-point weights; batch statistics are the domain's, not learnt: left out."""
    change = norm = 0.0
    for name, before in parent.items():
        if not before.is_floating_point() or name.endswith(("running_mean", "running_var")):
            continue
        change += float((state[name].double() - before.double()).square().sum())
        norm += float(before.double().square().sum())
    return float((change / max(norm, 1e-30)) ** 0.5)


def share_distance(share: np.ndarray, source: np.ndarray) -> float:
    """KL(source ‖ share) in nats between class shares float64 [C]; a class that vanished counts as 1e-4."""
    known = source > 0
    return float((source[known] * np.log(source[known] / np.maximum(share[known], 1e-4))).sum())


def pixel_agreement(a: Measures, b: Measures) -> float:
    """Share of hold-out pixels with the same answer of two networks; NaN if one has no labels stored."""
    if not a.labels or len(a.labels) != len(b.labels):
        return float("nan")
    same = sum(int((x == y).sum()) for x, y in zip(a.labels, b.labels, strict=True))
    return same / sum(x.size for x in a.labels)
