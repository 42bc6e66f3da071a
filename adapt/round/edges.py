"""Semantic edges in a new domain: the edge head of a joint network follows its segmentation there.

    label   class-balanced pseudo-segmentation of the target frames (λ_c, see ``labels.cbst``); its edges,
            none along pixels without a label
    align   SEAL on the student's own ridges, gated: pseudo-edges are imprecise, but an untrained head must
            not align them
    train   the edge head alone, with source replay; encoder and segmentation stay bit for bit
    gate    `adapt.gate.edges`: MF on the hold-outs, no class vanishes or floods; else refused

Run it after ``adapt.round`` on the pack that came out.  No target label is learnt from.  The state lives in
``out``: a round that was paused or killed continues there and ends with the same weights (same machine, same
number of threads).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapt.data.base import read_frame, read_label, resize_frame, resize_label
from adapt.gate.checks import Check, as_dict
from adapt.gate.edges import EdgeMeasures, decide, measure
from adapt.gate.limits import EdgeLimits
from adapt.labels.seal import Gate
from adapt.round.base import AdaptationRound, array_digest, refuse_evaluation_frames, spread
from adapt.round.labelling import ClassBalancedLabels, Labeller, LabelTask
from adapt.round.outcome import RoundPaused, RoundResult
from adapt.train.augment import Augmentation
from adapt.train.edge_recipes import EdgeRecipe
from adapt.train.edges import Draw, EdgeTrainer, Sample, crops_of_segmentation
from adapt.train.trainer import atomic_save
from common.progress import Progress, no_progress
from networks.pack import Pack

__all__ = ["EdgeRound", "EdgeRoundConfig", "EdgeRoundError", "adapt_edges", "check_pack"]

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


class EdgeRoundError(Exception):
    """A round cannot be run.  The text is one line: thing, reason, remedy."""


@dataclass(frozen=True)
class EdgeRoundConfig:
    """The settings of a round of edges.

    Attributes:
        portion: p of the pseudo-labels.
        steps, batch, crop, scale, rate: of the training.
        replay: share of source crops in it.
        alignment: align pseudo-edges to the student's ridges; ``gate`` limits which (None: all).
        holdout: share of the target frames that only the round's gate sees.
        source_holdout: at most that many hold-out frames of the source are scored, 0 = all.
        max_distance: of the benchmark, as a fraction of the diagonal.
        limits: of the round's gate.
        checkpoint_every: steps between checkpoints.
        force: write the pack whatever the gate decides (for measuring the gate).
    """

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


def adapt_edges(
    pack: Pack,
    frames: Sequence[NDArray[np.uint8]],
    *,
    config: EdgeRoundConfig | None = None,
    out: Path,
    progress: Progress = no_progress,
    labelled: Sequence[Pair] | None = None,
    labeller: Labeller | None = None,
) -> RoundResult:
    """Run a round on unlabelled frames, or the rest of the one in ``out``.

    Args:
        pack: with an edge head beside its segmentation, of the same classes.
        frames: uint8 [H,W,3], one size, multiples of the network's.
        out: folder of this round: state, checkpoint, pseudo-labels, report.json and, if accepted, pack/
            (parent = ``pack``).  If it holds this very round, finished, the stored result is returned; if it
            holds another round (other frames, pack or settings), the files of that round are removed.
        progress: called after every frame, crop and step; may raise `adapt.round.RoundPaused`, which reaches
            the caller, and what was done is kept.
        labelled: a labelled target hold-out for the gate, (frame uint8 [H,W,3], class map uint8 [H,W]) each,
            resized to the frames' size; nothing is learnt from it.
        labeller: labels the frames; by default class-balanced pseudo-segmentation at `config.portion`.

    Raises:
        EdgeRoundError: a pack without an edge head, too few frames, frames of a size it cannot take, or a
            frame that is in a hold-out as well.
    """
    config = config or EdgeRoundConfig()
    return EdgeRound(pack, frames, config, Path(out), progress, labelled or (), labeller).run()


def check_pack(pack: Pack) -> int:
    """The number that the sides of frames must be multiples of.

    Raises:
        EdgeRoundError: the pack has no edge head, or one with other classes than its segmentation.
    """
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


class EdgeRound(AdaptationRound):
    """A round in the making; the arguments are those of `adapt_edges`."""

    def __init__(
        self,
        pack: Pack,
        frames: Sequence[NDArray[np.uint8]],
        config: EdgeRoundConfig,
        out: Path,
        progress: Progress = no_progress,
        labelled: Sequence[Pair] = (),
        labeller: Labeller | None = None,
    ) -> None:
        def named(stage: str, done: int, total: int, **numbers: float) -> None:
            progress(f"edges: {stage}", done, total, **numbers)

        super().__init__(pack, frames, config, out, named)
        self.labeller = labeller
        self._check_frames()
        size = frames[0].shape[:2]
        self.labelled = [(resize_frame(x, size), resize_label(y, size)) for x, y in labelled]
        self.replay = [(read_frame(f), read_label(y)) for f, y in pack.replay("train")]
        holdout = [(read_frame(f), read_label(y)) for f, y in pack.replay("holdout")]
        self.source = spread(holdout, config.source_holdout)
        holdouts = {"labelled": self.labelled, "source": self.source}
        refuse_evaluation_frames(frames, holdouts, EdgeRoundError)

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

    # --------------------------------------------------------------------------------------------- open
    def _extend_identity(self, digest: Any) -> None:
        for frame, label in self.labelled:
            digest.update(array_digest(frame) + array_digest(label))
        if self.labeller is not None:
            digest.update(self.labeller.key.encode())

    def _replace_other_round(self) -> None:
        for folder in ("pack", "labels-1", "checkpoint.pt.labels"):
            shutil.rmtree(self.out / folder, ignore_errors=True)
        for file in ("report.json", "checkpoint.pt", "train.pt"):
            (self.out / file).unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------- run
    def _stages(self) -> RoundResult:
        pairs = self._label(self.pack.network())
        held = _held_out(len(pairs), self.config.holdout)
        learnt = [pair for i, pair in enumerate(pairs) if i not in held]
        target = [pairs[i] for i in sorted(held)]
        before = self._measure("parent", self.pack.network(), target)
        network = self.pack.network()
        try:
            with self.state.timed("train"):
                losses = self._train(network, learnt)
        except FloatingPointError as error:
            failed = [Check("edges-finite", 0.0, 1.0, False, str(error))]
            return self._finish(network, before, None, failed, [])
        after = self._measure("candidate", network, target)
        checks = decide(after, before, self.config.limits, self.spec.classes)
        return self._finish(network, before, after, checks, losses)

    def _label(self, network: Any) -> list[Pair]:
        """Every frame with its class map uint8 [H,W], 255 = no label."""
        task = LabelTask(network, self.spec, self.frames, self.config.portion, progress=self.progress)
        labeller = self.labeller or ClassBalancedLabels()
        labels = self._stored_labels(
            "label", self.out / "labels-1", len(self.frames), lambda: labeller.label(task)
        )
        return list(zip(self.frames, labels.maps, strict=True))

    def _measure(self, name: str, network: Any, target: Sequence[Pair]) -> EdgeMeasures:
        stored = self.state.stages.get(name)
        if stored is not None:
            return EdgeMeasures.of(stored)
        with self.state.timed("measure"):
            measures = measure(
                network,
                self.spec,
                source=self.source,
                target=target,
                labelled=self.labelled,
                max_distance=self.config.max_distance,
                limits=self.config.limits,
                progress=self.progress,
                stage=f"measure {name}",
            )
        self.state.stages[name] = measures.numbers()
        self.state.save()
        return measures

    def _train(self, network: Any, learnt: Sequence[Pair]) -> list[float]:
        """Train the edge head; returns the mean of the first losses and that of the last ones."""
        config, weights = self.config, self.out / "train.pt"
        stored = self.state.stages.get("train")
        if stored is not None:
            try:
                network.load_state_dict(torch.load(weights, weights_only=True))
                return list(stored["loss"])
            except Exception:  # damaged weights: they are made again
                self.state.stages.pop("candidate", None)
        classes = len(self.spec.classes)
        augmentation = Augmentation(config.crop, scale=config.scale)
        source = crops_of_segmentation(self.replay, classes, augmentation) if self.replay else None
        draw = _mixed(source, crops_of_segmentation(learnt, classes, augmentation), config.replay)
        recipe = EdgeRecipe(
            config.steps,
            batch=config.batch,
            round=max(config.batch, config.batch * config.steps // 3),
            rate=config.rate,
            aligned=config.alignment,
            unaligned=0,
            gate=config.gate,
            parts=("edge_head.",),
        )
        trainer = EdgeTrainer(
            network,
            self.spec,
            draw,
            recipe,
            seed=config.seed,
            checkpoint=self.out / "checkpoint.pt",
            every=config.checkpoint_every,
            identity=self.identity,
        )
        try:
            history = trainer.run(self.progress)
        except RoundPaused:
            trainer.save()
            raise
        atomic_save(weights, network.state_dict())
        loss = [float(np.mean(history[:5])), float(np.mean(history[-5:]))] if history else []
        self.state.stages["train"] = {"steps": config.steps, "loss": loss}
        self.state.save()
        return loss

    # -------------------------------------------------------------------------------------------- finish
    def _finish(
        self,
        network: Any,
        before: EdgeMeasures,
        after: EdgeMeasures | None,
        checks: list[Check],
        loss: list[float],
    ) -> RoundResult:
        held = len(_held_out(len(self.frames), self.config.holdout))
        verdict = as_dict(checks)
        report: dict[str, Any] = {
            "accepted": bool(verdict["passed"]),
            "identity": self.identity,
            "parent": self.pack.sha256,
            "finished": self._now(),
            "config": json.loads(json.dumps(asdict(self.config))),
            "frames": {
                "target": len(self.frames) - held,
                "target_holdout": held,
                "labelled": len(self.labelled),
                "replay": len(self.replay),
                "source_holdout": len(self.source),
            },
            "labelled_share": self.state.stages["label"]["labelled"],
            "loss": loss,
            "parent_measures": before.numbers(),
            "candidate_measures": {} if after is None else after.numbers(),
            "gate": verdict,
            "classes": list(self.spec.classes),
            "seconds": self._seconds(),
            "resumed": self.state.resumed,
        }
        wanted = report["accepted"] or (self.config.force and after is not None)
        return self._conclude(report, self._write(network) if wanted else None)

    def _write(self, network: Any) -> Pack:
        adaptation = {
            "kind": "edges",
            "frames": len(self.frames),
            "seed": self.config.seed,
            "steps": self.config.steps,
        }
        version = f"{self.spec.version}-edges"
        spec = replace(self.spec, version=version, parent=self.pack.sha256, adaptation=adaptation)
        return self._write_pack(
            lambda: {  # the segmentation has not moved: what is known of it still holds
                "spec": spec,
                "state": network.state_dict(),
                "golden": self.pack.golden(),
                "replay": self._parents_replay() if self.pack.replay() else None,
                "reference": self.pack.reference() or None,
            }
        )


def _held_out(count: int, share: float) -> set[int]:
    """Indices of the frames that only the gate sees: spread evenly, at least one."""
    aside = max(1, round(share * count))
    return set(range(0, count, count // aside)[:aside])


def _mixed(source: Draw | None, target: Draw, share: float) -> Draw:
    """Draw from the source with probability `share`, else from the target; no crop brings class labels."""

    def draw(rng: np.random.Generator) -> Sample:
        sample = (source if source is not None and rng.random() < share else target)(rng)
        return replace(sample, labels=None)

    return draw
