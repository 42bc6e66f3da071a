"""The final scoring: the one place of the demo where target labels are known.

``Exam`` renders the hold-out (streets nobody drove), asks the served engine versions for their answers, and
trains the labelled upper bound.  It is made after the adapter has ended: nothing flows back from here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapt.evaluate.segmentation import Calibration, Confusion
from bench.demo import streets

Progress = Callable[..., None]
RANKS = (
    (0.0, "largest gain"),
    (0.25, "upper quarter"),
    (0.5, "median"),
    (0.75, "lower quarter"),
    (1.0, "smallest gain"),
)


@dataclass
class Sheet:
    """The answers of one version to one set of frames, and their score."""

    confusion: Confusion
    calibration: Calibration
    labels: np.ndarray = field(repr=False)
    versions: list[int]

    def numbers(self) -> dict[str, Any]:
        """miou, iou [C] (None where a class neither occurs nor is answered), ece, curve; 0..1."""
        return {
            "miou": round(self.confusion.miou(), 5),
            "iou": [None if np.isnan(v) else round(float(v), 5) for v in self.confusion.iou()],
            "accuracy": round(self.confusion.accuracy(), 5),
            "ece": round(self.calibration.ece(), 5),
            "curve": [{k: round(v, 5) for k, v in point.items()} for point in self.calibration.curve()],
        }


class Exam:
    """Held-out streets of one demo seed in the target domain, and the same streets by day."""

    def __init__(self, seed: int, domain: str, classes: int, count: int, progress: Progress) -> None:
        self.seed, self.domain, self.classes, self.progress = seed, domain, classes, progress
        self.frames, self.labels = streets.heldout(
            seed, domain, count, tick=lambda done, of: progress("render the hold-out", done, of)
        )
        self.day, self.day_labels = streets.heldout(
            seed, "day", count, tick=lambda done, of: progress("render it by day", done, of)
        )

    def served(self, client: Any, model: str, version: int, *, by_day: bool = False) -> Sheet:
        """Score a version that the server holds, by asking for it over gRPC."""
        frames, truth = (self.day, self.day_labels) if by_day else (self.frames, self.labels)
        stage = f"score version {version}" + (" by day" if by_day else "")
        confusion, calibration = Confusion(self.classes), Calibration()
        labels, versions = [], set()
        for i, frame in enumerate(frames):
            answer = client.infer(model, frame, version=version, source="exam", timeout=30.0)
            confusion.add(truth[i], answer.labels)
            calibration.add(truth[i], answer.labels, answer.confidence)
            labels.append(answer.labels)
            versions.add(answer.version)
            self.progress(stage, i + 1, len(frames))
        return Sheet(confusion, calibration, np.stack(labels), sorted(versions))

    def upper_bound(
        self,
        pack: Any,
        collected: Sequence[np.ndarray],
        config: Any,
        threads: int,
        stream: np.ndarray,
        drives: int,
    ) -> Any:
        """The state_dict that the same recipe reaches with true labels of the frames the adapter had.

        Args:
            pack: the released parent.
            collected: the frames uint8 [H,W,3] that the adapter kept; each must be one of the stream's.
            config: the `RoundConfig` of the round.
            stream: what the vehicle saw, uint8 [n,H,W,3].
            drives: streets in it.
        """
        import torch

        from adapt import batchnorm, inference
        from adapt.data.base import read_frame, read_label
        from adapt.train.augment import Augmentation
        from adapt.train.batches import BatchMix, sampler
        from adapt.train.segmentation import SegmentationTrainer
        from networks.pack import normalise

        torch.set_num_threads(threads)
        truth = streets.truth(self.seed, self.domain, drives=drives, frames=len(stream) // drives)
        place = {digest(frame): i for i, frame in enumerate(stream)}
        pairs = [(frame, truth[place[digest(frame)]]) for frame in collected]
        replay = [(read_frame(x), read_label(y)) for x, y in pack.replay("train")]
        size = tuple(config.crop) if config.crop else pack.spec.size
        light = Augmentation(
            size, tuple(config.scale), config.flip, brightness=config.brightness, colour=config.colour
        )
        mixture = BatchMix(config.source, config.target, light, rare=config.rare, classmix=config.classmix)
        last = len(config.portions) - 1
        network = pack.network()
        draw = sampler(replay, pairs, mixture, self.classes, config.seed, last)
        trainer = SegmentationTrainer(
            network, pack.spec, config.optimisation(last), draw, seed=config.seed * 101 + last
        )
        trainer.run(self.progress, "labelled upper bound")
        order = np.random.default_rng([config.seed, 31]).permutation(len(pairs))
        size_ = config.adabn_batch
        batches = [order[i : i + size_] for i in range(0, len(order) - 1, size_)]
        batchnorm.reestimate(
            network,
            (normalise(inference.as_tensor([pairs[i][0] for i in chosen]), pack.spec) for chosen in batches),
        )
        return network

    def in_torch(self, network: Any, spec: Any) -> Sheet:
        """Score a network that is not served (the upper bound), by the same graph contract."""
        from adapt import inference

        confusion, calibration, labels = Confusion(self.classes), Calibration(), []
        for start in range(0, len(self.frames), 8):
            stop = min(start + 8, len(self.frames))
            ours, sure = inference.labels_and_confidence(
                network, spec, inference.as_tensor(self.frames[start:stop])
            )
            confusion.add(self.labels[start:stop], ours)
            calibration.add(self.labels[start:stop], ours, sure)
            labels.append(ours)
            self.progress("score the upper bound", stop, len(self.frames))
        return Sheet(confusion, calibration, np.concatenate(labels), [])

    def pictures(self, before: Sheet, after: Sheet) -> list[dict[str, Any]]:
        """Frames for the report, chosen by rank of their gain so that good and bad ones are shown alike."""
        gain = []
        for i, truth in enumerate(self.labels):
            gain.append(float((after.labels[i] == truth).mean() - (before.labels[i] == truth).mean()))
        ranked = np.argsort(gain)[::-1]
        chosen = []
        for share, words in RANKS:
            i = int(ranked[round(share * (len(ranked) - 1))])
            chosen.append(
                {
                    "words": words,
                    "index": i,
                    "gain": gain[i],
                    "frame": self.frames[i],
                    "truth": self.labels[i],
                    "before": before.labels[i],
                    "after": after.labels[i],
                }
            )
        return chosen


def digest(frame: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).digest()


def collected_frames(workdir: Path) -> list[np.ndarray]:
    """The pictures in the adapter's frame store (lossless), in no particular order."""
    from PIL import Image

    out = []
    for file in sorted((workdir / "frames" / "frames").rglob("*.png")):
        with Image.open(file) as image:
            out.append(np.asarray(image.convert("RGB")))
    return out
