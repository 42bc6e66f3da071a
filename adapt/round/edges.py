"""Semantic edges in a new domain: the edge head of a joint network follows its segmentation there.

    label   class-balanced pseudo-segmentation of the target frames (λ_c, see ``labels.cbst``); its edges,
            nothing along pixels without a label
    align   SEAL on the student's own ridges, gated: such labels are off by construction, but a head that sees
            nothing yet must not move them
    train   the edge head alone, source replay beside; encoder and segmentation stay bit for bit
    gate    `adapt.gate.edges`: MF on the hold-outs there are, no class vanishes or floods; else refused

Run it after ``adapt.round`` on the pack that came out.  No target label is learnt from.  The state lives in
``out``: a round that was paused or killed goes on there and ends with the same weights (same machine, same
number of threads).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from adapt import inference
from adapt.data.base import DataError, read_frame, read_label, resize_frame, resize_label
from adapt.gate.edges import EdgeMeasures, decide, measure
from adapt.gate.limits import Check, EdgeLimits, as_dict
from adapt.labels.cbst import ClassHistograms, pseudo_labels
from adapt.labels.seal import Gate
from adapt.round.segmentation import RoundPaused
from adapt.round.state import Record
from adapt.train.augment import Augmentation
from adapt.train.edges import Draw, EdgeRecipe, EdgeTrainer, Sample, crops_of_segmentation
from adapt.train.trainer import Progress, atomic_save, silent
from common.files import read_json, write_json
from networks.pack import Pack, PackError, load_pack, write_pack

__all__ = ["EdgeRoundConfig", "EdgeRoundError", "EdgeRoundResult", "adapt_edges", "check_pack"]

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class EdgeRoundError(Exception):
    """A round cannot be run.  One line: thing, reason, remedy."""


@dataclass(frozen=True)
class EdgeRoundConfig:
    """Everything a round of edge adaptation may be told.

    portion: p of the pseudo-labels; steps, batch, crop, rate: the training; replay: share of source crops
    in it; alignment: pseudo-edges are aligned to the student's ridges, ``gate`` says which; holdout: share of
    the target frames kept aside for the round's gate; source_holdout: at most that many hold-out frames of
    the source are scored, 0 = all; max_distance: of the benchmark, as a fraction of the diagonal; limits: of
    the round's gate; checkpoint_every: steps between checkpoints; force: write the pack whatever the gate
    says (for measuring the gate)."""

    portion: float = 0.5
    steps: int = 60
    batch: int = 6
    crop: tuple[int, int] = (160, 192)
    scale: tuple[float, float] = (0.75, 1.25)
    rate: float = 1e-3
    replay: float = 0.5
    alignment: bool = True
    gate: Gate | None = field(default_factory=Gate)
    holdout: float = 0.15
    source_holdout: int = 24
    max_distance: float = 0.0075
    limits: EdgeLimits = field(default_factory=EdgeLimits)
    checkpoint_every: int = 10
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        shares = (self.portion, self.holdout, self.replay)
        if not (0 < shares[0] <= 1 and 0 < shares[1] <= 0.5 and 0 <= shares[2] <= 1):
            raise EdgeRoundError(
                f"portion {shares[0]}, holdout {shares[1]}, replay {shares[2]}: give a portion over 0 and at "
                "most 1, a holdout over 0 and at most .5, a replay of 0 to 1"
            )
        whole = (self.steps, self.batch - 1, self.checkpoint_every - 1, self.source_holdout)
        if min(whole) < 0 or not 0 < self.rate < float("inf") or not 0 < self.max_distance <= 1:
            raise EdgeRoundError(
                f"steps {self.steps}, batch {self.batch}, rate {self.rate}, max_distance "
                f"{self.max_distance}, checkpoint_every {self.checkpoint_every}, source_holdout "
                f"{self.source_holdout}: no count is negative, batch and checkpoint_every are 1 at least, "
                "the others above 0"
            )


@dataclass(frozen=True)
class EdgeRoundResult:
    """pack: the refreshed pack, None where refused; report: every number that decided something."""

    pack: Pack | None
    accepted: bool
    report: dict[str, Any]


def adapt_edges(
    pack: Pack,
    frames: Sequence[NDArray[np.uint8]],
    *,
    config: EdgeRoundConfig | None = None,
    out: Path,
    progress: Progress = silent,
    labelled: Sequence[Pair] | None = None,
) -> EdgeRoundResult:
    """One round on unlabelled frames, or the rest of the one in ``out``.

    Args:
        pack: with an edge head beside its segmentation, of the same classes.
        frames: uint8 [H,W,3], one size, multiples of the network's.
        out: folder of this round: state, checkpoint, pseudo-labels, report.json and, if accepted, pack/
            (parent = ``pack``).  Where it holds this very round, finished, its result is given again; where
            it holds another one (other frames, pack or settings), that one's files are removed.
        progress: told after every frame, crop and step; may raise `adapt.round.RoundPaused`, which goes to
            the caller: what was done is kept.
        labelled: a labelled target hold-out for the gate where somebody has one, (frame uint8 [H,W,3], class
            map uint8 [H,W]) each, brought to the frames' size; nothing is learnt from it.

    Raises:
        EdgeRoundError: a pack without an edge head, too few frames, frames of a size it cannot take, or a
            frame that is in a hold-out as well.
    """
    return _Round(pack, frames, config or EdgeRoundConfig(), Path(out), progress, labelled or ()).run()


def check_pack(pack: Pack) -> int:
    """What the sides of frames must be multiples of.  Raises EdgeRoundError for a pack no round can move."""
    with torch.device("meta"):
        network: Any = pack.spec.create()
    if not hasattr(network, "joint"):
        raise EdgeRoundError(
            f"{pack.path} is {pack.spec.network}, which has no edge head; use espnetv2_edges"
        )
    if network.edge_head.classes != len(pack.spec.classes):
        raise EdgeRoundError(
            f"{pack.path} has {network.edge_head.classes} edge classes and {len(pack.spec.classes)} of "
            "segmentation; pseudo-edges need the same"
        )
    return int(network.size_multiple)


class _Round(Record):
    def __init__(
        self,
        pack: Pack,
        frames: Sequence[NDArray[np.uint8]],
        config: EdgeRoundConfig,
        out: Path,
        progress: Progress,
        labelled: Sequence[Pair],
    ) -> None:
        self.pack, self.frames, self.config, self.out = pack, frames, config, out
        self._tell = progress
        self._check_frames()
        size = frames[0].shape[:2]
        self.labelled = [(resize_frame(x, size), resize_label(y, size)) for x, y in labelled]
        self.replay = [(read_frame(f), read_label(y)) for f, y in pack.replay("train")]
        self.source = _spread(
            [(read_frame(f), read_label(y)) for f, y in pack.replay("holdout")], config.source_holdout
        )
        self._refuse_evaluation_frames()
        self.seconds: dict[str, float] = {}
        self.state: dict[str, Any] = {}

    def progress(self, stage: str, done: int, total: int, **numbers: float) -> None:
        self._tell(f"edges: {stage}", done, total, **numbers)

    def _check_frames(self) -> None:
        frames, config = self.frames, self.config
        multiple = check_pack(self.pack)
        if len(frames) < 4:
            raise EdgeRoundError(
                f"{len(frames)} frames of the target: 4 at least are needed, some are kept aside"
            )
        odd = next((f for f in frames if f.shape != frames[0].shape or f.dtype != np.uint8), None)
        if odd is not None or frames[0].ndim != 3 or frames[0].shape[2] != 3:
            wrong = frames[0] if odd is None else odd
            raise EdgeRoundError(
                f"a frame is {wrong.dtype} {list(wrong.shape)}, the first {list(frames[0].shape)}: all are "
                "uint8 [H,W,3] of one size"
            )
        if any(side % multiple for side in frames[0].shape[:2]):
            raise EdgeRoundError(f"frames are {frames[0].shape[:2]}: sides must be multiples of {multiple}")
        if any(side % multiple for side in config.crop):
            raise EdgeRoundError(f"crop {config.crop}: sides must be multiples of {multiple}")

    def _refuse_evaluation_frames(self) -> None:
        """What the gate judges by must not be among what is learnt from."""
        seen = {_digest(frame): i for i, frame in enumerate(self.frames)}
        for words, pairs in (("labelled", self.labelled), ("source", self.source)):
            for i, (frame, _) in enumerate(pairs):
                if (at := seen.get(_digest(frame))) is not None:
                    raise EdgeRoundError(
                        f"target frame {at} is also frame {i} of the {words} hold-out: take it out of one of "
                        "them"
                    )

    def _identity(self) -> str:
        told = asdict(self.config)
        told.pop("force")  # it changes nothing that is learnt
        digest = hashlib.sha256(json.dumps([self.pack.sha256, told], sort_keys=True).encode())
        for frame in self.frames:
            digest.update(_digest(frame))
        for frame, label in self.labelled:
            digest.update(_digest(frame) + _digest(label))
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------- state
    def _open(self) -> None:
        """What ``out`` holds of this round; what it holds of another one goes."""
        self.identity = self._identity()
        try:
            state = read_json(self.out / "state.json")
            ours = state["identity"] == self.identity and isinstance(state["stages"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            state = {"identity": self.identity, "stages": {}, "resumed": -1}
            for folder in ("pack", "labels-1", "checkpoint.pt.labels"):
                shutil.rmtree(self.out / folder, ignore_errors=True)
            for file in ("report.json", "checkpoint.pt", "train.pt"):
                (self.out / file).unlink(missing_ok=True)
        self.out.mkdir(parents=True, exist_ok=True)
        self.state = state
        self.seconds = dict(state.get("seconds", {}))
        self.state["resumed"] = int(state.get("resumed", -1)) + 1
        self._save()

    def _finished(self) -> EdgeRoundResult | None:
        """The result, where this round came to its end."""
        report = self.state.get("report")
        if report is None:
            return None
        try:
            wanted = report["accepted"] or self.config.force
            made = load_pack(self.out / "pack") if wanted else None
        except (PackError, OSError):
            return None
        write_json(self.out / "report.json", report)
        return EdgeRoundResult(made, bool(report["accepted"]), report)

    # ------------------------------------------------------------------------------------------ stages
    def run(self) -> EdgeRoundResult:
        self._open()
        done = self._finished()
        if done is not None:
            return done
        try:
            return self._run()
        except RoundPaused:
            self._save()
            raise

    def _run(self) -> EdgeRoundResult:
        parent = self.pack.network()
        labels = self._timed("label", lambda: self._labels(parent))
        pairs = list(zip(self.frames, labels, strict=True))
        held = _held_out(len(pairs), self.config.holdout)
        learnt = [pair for i, pair in enumerate(pairs) if i not in held]
        target = [pairs[i] for i in sorted(held)]
        before = self._measures("parent", parent, target)
        network = self.pack.network()
        try:
            losses = self._timed("train", lambda: self._train(network, learnt))
        except FloatingPointError as error:
            failed = [Check("edges-finite", 0.0, 1.0, False, str(error))]
            return self._finish(network, before, None, failed, [])
        after = self._measures("candidate", network, target)
        checks = decide(after, before, self.config.limits, self.pack.spec.classes)
        return self._finish(network, before, after, checks, losses)

    def _labels(self, network: Any) -> list[NDArray[np.uint8]]:
        """Class-balanced pseudo-labels uint8 [H,W] of every frame, by the network's segmentation."""
        folder = self.out / "labels-1"
        paths = [folder / f"{i:05d}.png" for i in range(len(self.frames))]
        if "label" in self.state["stages"]:
            try:
                return [read_label(path) for path in paths]
            except DataError:  # a damaged file: they are made again
                del self.state["stages"]["label"]
        histograms = ClassHistograms(len(self.pack.spec.classes))
        for i, frame in enumerate(self.frames):
            histograms.add(_softmax(network, self.pack, frame))
            self.progress("thresholds", i + 1, len(self.frames))
        limits = histograms.thresholds(self.config.portion)
        folder.mkdir(exist_ok=True)
        labels = []
        for i, frame in enumerate(self.frames):
            y = pseudo_labels(_softmax(network, self.pack, frame), limits)
            Image.fromarray(y).save(paths[i], compress_level=1)
            labels.append(y)
            self.progress("labels", i + 1, len(self.frames))
        self.state["stages"]["label"] = {
            "portion": self.config.portion,
            "lambda": [round(float(v), 5) for v in limits],
            "labelled": round(float(np.mean([(y != 255).mean() for y in labels])), 5),
        }
        self._save()
        return labels

    def _measures(self, name: str, network: Any, target: Sequence[Pair]) -> EdgeMeasures:
        kept = self.state["stages"].get(name)
        if kept is not None:
            return EdgeMeasures.of(kept)
        found: EdgeMeasures = self._timed(
            "measure",
            lambda: measure(
                network, self.pack.spec, source=self.source, target=target, labelled=self.labelled,
                max_distance=self.config.max_distance, limits=self.config.limits, progress=self.progress,
                stage=f"measure {name}",
            ),
        )  # fmt: skip
        self.state["stages"][name] = found.numbers()
        self._save()
        return found

    def _train(self, network: Any, learnt: Sequence[Pair]) -> list[float]:
        """Move the edge head; the mean of the first and of the last losses."""
        config, weights = self.config, self.out / "train.pt"
        kept = self.state["stages"].get("train")
        if kept is not None:
            try:
                network.load_state_dict(torch.load(weights, weights_only=True))
                return list(kept["loss"])
            except Exception:  # damaged weights: they are made again
                self.state["stages"].pop("candidate", None)
        classes = len(self.pack.spec.classes)
        augmentation = Augmentation(config.crop, scale=config.scale)
        source = crops_of_segmentation(self.replay, classes, augmentation) if self.replay else None
        draw = _mixed(source, crops_of_segmentation(learnt, classes, augmentation), config.replay)
        recipe = EdgeRecipe(
            config.steps, batch=config.batch,
            round=max(config.batch, config.batch * config.steps // 3),
            rate=config.rate, aligned=config.alignment, unaligned=0, gate=config.gate, parts=("edge_head.",),
        )  # fmt: skip
        trainer = EdgeTrainer(
            network, self.pack.spec, draw, recipe, seed=config.seed, checkpoint=self.out / "checkpoint.pt",
            every=config.checkpoint_every, identity=self.identity,
        )  # fmt: skip
        try:
            history = trainer.run(self.progress)
        except RoundPaused:
            trainer.save()
            raise
        atomic_save(weights, network.state_dict())
        loss = [float(np.mean(history[:5])), float(np.mean(history[-5:]))] if history else []
        self.state["stages"]["train"] = {"steps": config.steps, "loss": loss}
        self._save()
        return loss

    def _finish(
        self,
        network: Any,
        before: EdgeMeasures,
        after: EdgeMeasures | None,
        checks: list[Check],
        loss: list[float],
    ) -> EdgeRoundResult:
        config, spec = self.config, self.pack.spec
        verdict = as_dict(checks)
        accepted = bool(verdict["passed"])
        report: dict[str, Any] = {
            "accepted": accepted,
            "identity": self.identity,
            "parent": self.pack.sha256,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": json.loads(json.dumps(asdict(config))),
            "frames": {
                "target": len(self.frames) - len(_held_out(len(self.frames), config.holdout)),
                "target_holdout": len(_held_out(len(self.frames), config.holdout)),
                "labelled": len(self.labelled), "replay": len(self.replay),
                "source_holdout": len(self.source),
            },
            "labelled_share": self.state["stages"]["label"]["labelled"],
            "loss": loss,
            "parent_measures": before.numbers(),
            "candidate_measures": {} if after is None else after.numbers(),
            "gate": verdict,
            "classes": list(spec.classes),
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "resumed": self.state["resumed"],
        }  # fmt: skip
        made = None
        if accepted or (config.force and after is not None):
            made = self._write(network)
            report["pack"] = made.sha256
        self.state["report"] = report
        self._save()
        write_json(self.out / "report.json", report)
        (self.out / "checkpoint.pt").unlink(missing_ok=True)
        shutil.rmtree(self.out / "checkpoint.pt.labels", ignore_errors=True)
        return EdgeRoundResult(made, accepted, report)

    def _write(self, network: Any) -> Pack:
        config, spec = self.config, self.pack.spec
        path = self.out / "pack"
        if path.is_dir():  # killed between the rename and the report: the same content by construction
            return load_pack(path)
        made = replace(
            spec,
            version=f"{spec.version}-edges",
            parent=self.pack.sha256,
            adaptation={
                "kind": "edges", "frames": len(self.frames), "seed": config.seed, "steps": config.steps,
            },
        )  # fmt: skip
        replay = [
            (read_frame(frame), read_label(label), split)
            for split in ("train", "holdout")
            for frame, label in self.pack.replay(split)
        ]
        return write_pack(  # the segmentation has not moved: what is known of it still holds
            path, made, network.state_dict(), golden=self.pack.golden(), replay=replay or None,
            reference=self.pack.reference() or None, prior=self.pack.prior(),
        )  # fmt: skip


def _softmax(network: Any, pack: Pack, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(inference.probabilities(network, pack.spec, inference.as_tensor([frame]))[0].numpy())


def _held_out(count: int, share: float) -> set[int]:
    """Which of ``count`` frames are kept for the gate: spread evenly, at least one."""
    aside = max(1, round(share * count))
    return set(range(0, count, count // aside)[:aside])


def _mixed(source: Draw | None, target: Draw, share: float) -> Draw:
    def draw(rng: np.random.Generator) -> Sample:
        sample = (source if source is not None and rng.random() < share else target)(rng)
        return replace(sample, labels=None)

    return draw


def _spread(pairs: list[Pair], most: int) -> list[Pair]:
    """At most ``most`` of them, evenly over the list; all where ``most`` is 0."""
    if not most or len(pairs) <= most:
        return pairs
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, most).round().astype(int)]


def _digest(array: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
