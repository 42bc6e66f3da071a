"""Labels for a round: labellers, and the folder that stores their labels.

    ClassBalancedLabels   the network's own answers, confident ones alone (CBST, CRST)
    GivenLabels           labels that a person made: the labelled bound of a round
    CorruptedLabels       the labels of another labeller, changed on purpose: for measuring the gate

Knows networks and frames; knows no round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import nn

from adapt import inference
from adapt.data.base import DataError, read_label
from adapt.labels import lrent
from adapt.labels.cbst import ClassHistograms, pseudo_labels, st_threshold
from adapt.labels.published import PublishedThresholds, published_labels
from adapt.round.config import RoundConfig
from common.progress import Progress, no_progress
from networks.pack import PackSpec

__all__ = [
    "ClassBalancedLabels",
    "CorruptedLabels",
    "GivenLabels",
    "LabelFolder",
    "LabelTask",
    "Labeller",
    "Labels",
]

IGNORE = 255


@dataclass(frozen=True)
class LabelTask:
    """What is to be labelled.

    Attributes:
        network: in evaluation mode; not changed.
        frames: uint8 [H,W,3], all of one size.
        portion: p of the labelling, over 0 to 1.
        allowed: per frame the indices of the classes that may be in it, or None = all.
        valid: bool [H,W], False = a pixel that gets no label; None = all may have one.
        progress: called per frame.  suffix: appended to the stages' names.
    """

    network: nn.Module
    spec: PackSpec
    frames: Sequence[np.ndarray]
    portion: float
    allowed: Sequence[Sequence[int] | None] | None = None
    valid: np.ndarray | None = None
    progress: Progress = no_progress
    suffix: str = ""


@dataclass(frozen=True)
class Labels:
    """Labels of the frames of a task.

    Attributes:
        maps: uint8 [H,W] per frame, 255 = no label.
        soft: LRENT's labels uint8 [H,W,2K] per frame (`adapt.labels.lrent`), or None.
        record: what the state and the report store of them; can be written as JSON.
    """

    maps: Sequence[np.ndarray]
    soft: Sequence[np.ndarray] | None = None
    record: dict[str, Any] = field(default_factory=dict)


class Labeller(Protocol):
    """Labels frames.  `key` is part of the identity of a round; "" for the labeller of the settings."""

    key: str

    def label(self, task: LabelTask) -> Labels: ...


@dataclass(frozen=True)
class ClassBalancedLabels:
    """Class-balanced pseudo-labels (Zou et al., *CBST*, ECCV 2018), in two passes over the frames.

    The first pass collects one histogram of confidence per class, from which λ_c follows; the second labels.
    No softmax map is stored.

    Attributes:
        policy: "cbst" (one λ per class) or "st" (one λ).
        compat: compute as that published code does ("cbst" or "crst"), or "".
        soft_weight: weight of LRENT's entropy, 0 = hard labels alone.
        prior: q_c(y,x) float32 [C,H,W] of CBST-SP, or None.
        flip, scales: multi-scale test-time augmentation of the answers.
        batch: frames per forward pass.
    """

    policy: str = "cbst"
    compat: str = ""
    soft_weight: float = 0.0
    prior: np.ndarray | None = None
    flip: bool = False
    scales: Sequence[float] = (1.0,)
    batch: int = 1
    key = ""

    @classmethod
    def of(cls, config: RoundConfig, prior: np.ndarray | None = None) -> ClassBalancedLabels:
        """The labeller that these settings describe."""
        return cls(
            config.policy,
            config.compat,
            config.lrent,
            prior,
            config.label_flip,
            config.label_scales,
            config.infer_batch,
        )

    def label(self, task: LabelTask) -> Labels:
        histograms, thresholds = self._thresholds(task)
        maps: list[np.ndarray] = []
        soft: list[np.ndarray] = []
        for i, p in self._softmax(task, f"labels{task.suffix}"):
            allowed = task.allowed[i] if task.allowed is not None else None
            if self.soft_weight:
                planes = lrent.compact_labels(
                    _array(p),
                    thresholds,
                    self.soft_weight,
                    prior=self.prior,
                    allowed=allowed,
                    valid=task.valid,
                )
                soft.append(planes)
                maps.append(np.ascontiguousarray(planes[..., 0]))
            elif self.compat:
                maps.append(published_labels(_array(p), thresholds, self.compat))
            else:
                maps.append(pseudo_labels(p, thresholds, prior=self.prior, allowed=allowed, valid=task.valid))
        classes = len(task.spec.classes)
        counts = sum(
            (np.bincount(y.reshape(-1), minlength=256)[:classes] for y in maps), np.zeros(classes, int)
        )
        total = sum(y.size for y in maps)
        record = {
            "portion": task.portion,
            "lambda": [round(float(v), 5) for v in thresholds],
            "labelled": round(float(counts.sum() / total), 5),
            "share": [round(float(v), 5) for v in counts / max(int(counts.sum()), 1)],
            "predicted_share": [round(float(v), 5) for v in histograms.shares()],
        }
        return Labels(maps, soft if self.soft_weight else None, record)

    def _thresholds(self, task: LabelTask) -> tuple[ClassHistograms, np.ndarray]:
        classes = len(task.spec.classes)
        histograms = ClassHistograms(classes)
        published = PublishedThresholds(classes, self.compat) if self.compat else None
        for i, p in self._softmax(task, f"thresholds{task.suffix}"):
            allowed = task.allowed[i] if task.allowed is not None else None
            histograms.add(p, prior=self.prior, allowed=allowed, valid=task.valid)
            if published is not None:
                published.add(_array(p))
        if published is not None:
            return histograms, published.thresholds(task.portion, self.policy)
        if self.policy == "st":
            return histograms, st_threshold(histograms, task.portion)
        return histograms, histograms.thresholds(task.portion)

    def _softmax(self, task: LabelTask, stage: str) -> Iterator[tuple[int, Any]]:
        """Yield (number, softmax [C,H,W]) per frame: an array, or a tensor if the network is on a GPU."""
        position = 0
        for tensor in inference.batches(task.frames, self.batch):
            maps = inference.probabilities(
                task.network, task.spec, tensor, flip=self.flip, scales=self.scales
            )
            for p in maps if maps.is_cuda else maps.numpy():
                yield position, p
                position += 1
                task.progress(stage, position, len(task.frames))


@dataclass(frozen=True)
class GivenLabels:
    """Labels from a table: what a round would reach if its frames had been labelled.

    Attributes:
        truth: label uint8 [H,W] by the bytes of its frame.
    """

    truth: Mapping[bytes, np.ndarray]
    key = "given"

    def label(self, task: LabelTask) -> Labels:
        """Raises KeyError if a frame has no label."""
        maps = [self.truth[frame.tobytes()] for frame in task.frames]
        labelled = float(np.mean([(y != IGNORE).mean() for y in maps]))
        return Labels(maps, None, {"portion": task.portion, "labelled": round(labelled, 5)})


@dataclass(frozen=True)
class CorruptedLabels:
    """Labels of another labeller, each passed through `corrupt`, uint8 [H,W] -> uint8 [H,W]."""

    inner: Labeller
    corrupt: Callable[[np.ndarray], np.ndarray]
    key = "corrupted"

    def label(self, task: LabelTask) -> Labels:
        labels = self.inner.label(task)
        return Labels([self.corrupt(y) for y in labels.maps], None, labels.record)


@dataclass(frozen=True)
class LabelFolder:
    """Labels on disk: NNNNN.png per frame, and NNNNN.npz for soft ones."""

    folder: Path

    def write(self, labels: Labels) -> None:
        self.folder.mkdir(exist_ok=True)
        for i, y in enumerate(labels.maps):
            Image.fromarray(y).save(self.folder / f"{i:05d}.png", compress_level=1)
            if labels.soft is not None:
                lrent.write(self.folder / f"{i:05d}.npz", labels.soft[i])

    def read(self, count: int, record: dict[str, Any]) -> Labels:
        """The labels of `count` frames.  Raises DataError if a file is missing or damaged."""
        maps = [read_label(self.folder / f"{i:05d}.png") for i in range(count)]
        if not (self.folder / "00000.npz").is_file():
            return Labels(maps, None, record)
        try:
            return Labels(maps, [lrent.read(self.folder / f"{i:05d}.npz") for i in range(count)], record)
        except Exception as error:  # zip, zlib, numpy: missing or damaged
            raise DataError(
                f"{self.folder}: damaged soft labels ({error}): label the frames again"
            ) from error


def _array(p: Any) -> np.ndarray:
    return p if isinstance(p, np.ndarray) else np.asarray(p.cpu().numpy())
