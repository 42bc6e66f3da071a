"""One round of adaptation, from the released pack and unlabelled frames to a refreshed pack, or to a refusal.

    batch statistics of the target (AdaBN)
    for p in portions:   label the frames (λ_c at portion p)  →  train from the parent, replay in every batch
                         →  batch statistics again
        →  gate: a stage that fails it ends the round, and the last stage that passed is the candidate
    pack (parent = the released pack, every number that decided something inside)

A training starts from the parent's weights.  The state lives in `out/`: a round that was killed continues
there from its last checkpoint and ends with the same weights (same machine, same number of threads).  This
module reads no target label, and does not know the service.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adapt import batchnorm
from adapt.data.base import read_label, resize_frame
from adapt.gate.checks import Check, as_dict
from adapt.gate.measures import Measures, weight_distance
from adapt.round.base import AdaptationRound, Pair
from adapt.round.batch_statistics import BY_SOURCE_FRAMES, TargetStatistics, resolve_choice
from adapt.round.config import RoundConfig
from adapt.round.inputs import RoundInputs, Tags
from adapt.round.judge import Baseline, Candidate, GateJudge, Judge
from adapt.round.labelling import ClassBalancedLabels, Labeller, Labels, LabelTask
from adapt.round.lineage import distance_from_release, for_manifest, release_baseline
from adapt.round.measurement import HoldoutMeasurement
from adapt.round.outcome import RoundError, RoundResult
from adapt.round.pictures import keep_pictures
from adapt.round.student import first_and_last, train_student
from adapt.train.trainer import atomic_save
from common.progress import Progress, no_progress
from networks.pack import Pack

__all__ = ["SegmentationRound", "adapt"]

GOLDEN = 8  # golden frames of a pack at most


def adapt(
    pack: Pack,
    frames: Sequence[np.ndarray],
    *,
    config: RoundConfig | None = None,
    out: str | os.PathLike[str],
    progress: Progress = no_progress,
    allowed: Sequence[Tags | None] | None = None,
    labelled: Sequence[Pair] | None = None,
    name: str | None = None,
    labeller: Labeller | None = None,
    judge: Judge | None = None,
) -> RoundResult:
    """Run a round, or continue the one in `out`.

    Args:
        pack: the released parent.
        frames: unlabelled target frames uint8 [H,W,3], resized to the pack's size.
        config: see `RoundConfig`.
        out: folder of this round: state, checkpoints, pseudo-labels, report.json and, if accepted, pack/.
        progress: called after every step; may raise RoundPaused, which reaches the caller.
        allowed: per frame the classes that may be in it (image tags), as names, indices or a bool mask, or
            None.
        labelled: a labelled target hold-out for the gate, (frame uint8 [H,W,3], label uint8 [H,W]) each;
            nothing is learnt from it.
        name: version of the new pack; by default the parent's with ".r" and a hash of the inputs.
        labeller: labels the frames; by default as `config` describes.
        judge: decides what passes; by default the gate with `config.limits`.

    Returns:
        RoundResult.  report["chosen"] is the stage that became the pack ("statistics", "train-1" …).  It is
        not accepted if not even the batch statistics could be improved; report["gate"] gives the reason.

    Raises:
        RoundError: too few frames, no replay though it is demanded, a target frame that is in a hold-out as
            well, or `out` holds another round.
    """
    return SegmentationRound(
        pack,
        frames,
        config or RoundConfig(),
        Path(out),
        progress,
        allowed,
        name,
        labelled or (),
        labeller,
        judge,
    ).run()


@dataclass
class _Stage:
    """A candidate and the gate's decision."""

    candidate: Candidate
    checks: list[Check]

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if not check.passed]


class SegmentationRound(AdaptationRound):
    """A round in the making; the arguments are those of `adapt`.

    Attributes:
        inputs: frames and labels at the pack's size.
        baseline: what candidates are compared with; set once the parent is measured.
    """

    NOT_LEARNT = ("threads", "force")

    def __init__(
        self,
        pack: Pack,
        frames: Sequence[np.ndarray],
        config: RoundConfig,
        out: Path,
        progress: Progress = no_progress,
        allowed: Sequence[Tags | None] | None = None,
        name: str | None = None,
        labelled: Sequence[Pair] = (),
        labeller: Labeller | None = None,
        judge: Judge | None = None,
    ) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise RoundError(f"device {config.device}: torch sees no CUDA device here; use cpu")
        self.inputs = inputs = RoundInputs(pack, frames, config, progress, allowed, labelled)
        super().__init__(pack, inputs.frames, config, out, progress)
        self.name, self.labeller = name, labeller
        self.judge = judge or GateJudge(config.limits)
        self.source_free = not inputs.replay
        self.measurement = HoldoutMeasurement(inputs, config, progress)
        choice = resolve_choice(config.adabn_by, source_holdout=bool(inputs.source_holdout))
        self.statistics = TargetStatistics(
            inputs.target,
            self.spec,
            config,
            choice,
            lambda network: self.measurement.quick(network, translated=choice in BY_SOURCE_FRAMES),
            source_share=inputs.source_share() if choice == "shares" else None,
            source_holdout=bool(inputs.source_holdout),
            progress=progress,
        )
        self.uses_statistics = False
        self.parent_state: dict[str, torch.Tensor] = {}
        self.frame_checks: list[Check] = []
        self.baseline: Baseline | None = None

    # --------------------------------------------------------------------------------------------- open
    def _extend_identity(self, digest: Any) -> None:
        digest.update(json.dumps(self.inputs.allowed).encode())
        for frame, label in self.inputs.labelled:
            digest.update(hashlib.sha256(frame.tobytes() + label.tobytes()).digest())
        if self.labeller is not None:
            digest.update(self.labeller.key.encode())

    def _replace_other_round(self) -> None:
        if self.state.damage:
            raise RoundError(
                f"{self.state.file} is damaged ({self.state.damage}): move {self.out} away to begin again"
            )
        if self.state.file.is_file():
            raise RoundError(
                f"{self.out} holds another round (other pack, frames or settings): give another folder"
            )

    # ---------------------------------------------------------------------------------------------- run
    def _stages(self) -> RoundResult:
        self.frame_checks = self.judge.frames(self.frames, self.inputs.sizes)
        if not all(check.passed for check in self.frame_checks) and not self.config.force:
            return self._reject_frames()
        network = self.pack.network().to(self.config.device)
        self.baseline = self._measure_parent(network)
        reference = self._adapt_statistics(network)
        chosen = self._statistics_candidate(network, reference)
        if chosen.failed and "changed" not in chosen.failed and not self.config.force:
            return self._finish(chosen, reference)  # not a street, or statistics that lose: learn nothing
        for stage, portion in enumerate(self.config.portions):
            key = f"train-{stage + 1}"
            labels = self._label(network, stage, portion)
            try:
                measures = self._train(network, labels, stage, portion)
            except FloatingPointError as error:
                self.state.stages[key] = {"portion": portion, "failed": [str(error)]}
                break
            found = self._evaluate_candidate(key, network, measures, reference)
            self.state.stages[key]["failed"] = found.failed
            if found.failed:
                refused = [asdict(check) for check in found.checks if not check.passed]
                self.state.stages[key]["refused"] = refused
                if not self.config.force:
                    break  # the stopping rule: what fails the gate labels nothing and is not built upon
            chosen = found
        return self._finish(chosen, reference)

    def _measure_parent(self, network: nn.Module) -> Baseline:
        self.parent_state = {k: v.detach().cpu().clone() for k, v in network.state_dict().items()}
        with self.state.timed("measure"):
            measures = self.measurement.full(network, "measure parent")
        source, distance = release_baseline(self.spec.adaptation, measures.source)
        return Baseline(
            self.spec,
            measures,
            self.inputs.source_share(),
            self.inputs.layout,
            bool(self.spec.adaptation),
            source,
            distance,
        )

    def _adapt_statistics(self, network: nn.Module) -> Measures:
        """Load batch statistics of the target unless they make things worse; returns the new measures."""
        assert self.baseline is not None
        before = after = self.baseline.parent
        self.uses_statistics = self.config.adabn and batchnorm.has_statistics(network)
        if not self.uses_statistics:
            self.state.stages["adabn"] = {"kept": 1.0, "reason": "switched off or no batch statistics"}
            self.state.save()
            return after
        with self.state.timed("adabn"):
            kept = self.statistics.choose(network, "batch statistics", before)
        if kept < 1.0:
            with self.state.timed("measure"):
                after = self.measurement.full(network, "measure statistics")
        reason = (
            f"agreement with the mirrored answer {before.flip:.3f} -> {after.flip:.3f}, "
            f"classes in use {before.variety:.1f} -> {after.variety:.1f}"
        )
        if self.inputs.source_holdout:
            reason += (
                f", mIoU on source frames in the target's colours {before.translated:.3f} -> "
                f"{after.translated:.3f}"
            )
        self.state.stages["adabn"] = {
            "kept": kept,
            "by": self.statistics.choice,
            "reason": reason,
            "measures": after.numbers(),
        }
        self.state.save()
        return after

    def _statistics_candidate(self, network: nn.Module, reference: Measures) -> _Stage:
        """Batch statistics alone, the first candidate: no weight has moved."""
        found = self._evaluate_candidate("statistics", network, reference, reference)
        kept = float(self.state.stages["adabn"]["kept"])
        changed = kept < 1.0
        reason = (
            "new batch statistics agree better with the mirrored answer" if changed else "nothing has changed"
        )
        found.checks.append(Check("changed", 1.0 - kept, 0.0, changed, reason))
        return found

    def _evaluate_candidate(
        self, name: str, network: nn.Module, measures: Measures, reference: Measures
    ) -> _Stage:
        assert self.baseline is not None
        state = {k: v.detach().cpu().clone().contiguous() for k, v in network.state_dict().items()}
        candidate = Candidate(name, state, measures, weight_distance(state, self.parent_state))
        checks = self.judge.candidate(candidate, reference, self.baseline)
        return _Stage(candidate, self.frame_checks + checks)

    def _label(self, network: nn.Module, stage: int, portion: float) -> Labels:
        inputs, suffix = self.inputs, f" p={portion:g}"
        task = LabelTask(
            network, self.spec, inputs.target, portion, inputs.allowed, inputs.valid, self.progress, suffix
        )
        key = f"label-{stage + 1}"
        folder = self.out / f"labels-{stage + 1}"
        labeller = self.labeller or ClassBalancedLabels.of(self.config, inputs.prior())
        return self._stored_labels(key, folder, len(inputs.target), lambda: labeller.label(task))

    def _train(self, network: nn.Module, labels: Labels, stage: int, portion: float) -> Measures:
        """Train, or load what was trained, and measure it."""
        key, config = f"train-{stage + 1}", self.config
        weights, comparison = self.out / f"{key}.pt", self.out / f"{key}.twin.pt"
        record: dict[str, Any] = {}
        freeze_point: dict[str, Any] = {}
        if "measures" in self.state.stages.get(key, {}):
            network.load_state_dict(torch.load(weights, weights_only=True))
        else:
            with self.state.timed("train"):
                trainer = train_student(
                    network,
                    labels,
                    stage,
                    inputs=self.inputs,
                    config=config,
                    parent=self.parent_state,
                    keep_statistics=config.bn == "frozen" and self.uses_statistics,
                    checkpoint=self.out / "checkpoint.pt",
                    identity=self.identity,
                    progress=self.progress,
                    name=f"train p={portion:g}",
                )
            record = {
                "portion": portion,
                "steps": config.steps_of(stage),
                "statistics_kept": self._update_statistics(network, f"batch statistics p={portion:g}"),
                **first_and_last(trainer.history),
            }
            freeze_point = {} if trainer.freeze_point is None else {"cut": trainer.freeze_point.words()}
            if trainer.comparison_weights is not None:
                atomic_save(comparison, trainer.comparison_weights)
            atomic_save(weights, network.state_dict())
        other = torch.load(comparison, weights_only=True) if comparison.is_file() else None
        with self.state.timed("measure"):
            measures = self.measurement.full(network, f"measure p={portion:g}", other)
        if record:
            self.state.stages[key] = {**record, "measures": measures.numbers(), **freeze_point}
            self.state.save()
        return measures

    def _update_statistics(self, network: nn.Module, stage: str) -> float:
        """Update batch statistics after a training; returns the share that stays of those it ended with."""
        if not self.uses_statistics or self.config.bn == "frozen":
            return 1.0
        before = float(self.state.stages["adabn"]["kept"])
        with self.state.timed("adabn"):
            return self.statistics.after_training(network, stage, before)

    # -------------------------------------------------------------------------------------------- finish
    def _finish(self, chosen: _Stage, reference: Measures) -> RoundResult:
        inputs, baseline, candidate = self.inputs, self.baseline, chosen.candidate
        assert baseline is not None
        accepted = not chosen.failed
        report = {
            "accepted": accepted,
            "parent": self.pack.sha256,
            "round": self.identity[:12],
            "finished": self._now(),
            "chosen": candidate.name,
            "source_free": self.source_free,
            "frames": {
                "target": len(inputs.target),
                "target_holdout": len(inputs.holdout),
                "replay": len(inputs.replay),
                "source_holdout": len(inputs.source_holdout),
            },
            "config": json.loads(json.dumps(asdict(self.config))),
            "stages": self.state.stages,
            "parent_measures": baseline.parent.numbers(),
            "reference_measures": reference.numbers(),
            "candidate_measures": candidate.measures.numbers(),
            "distance": round(candidate.weight_distance, 5),
            "released": distance_from_release(
                baseline.released_source, baseline.released_distance + candidate.weight_distance
            ),
            "gate": as_dict(chosen.checks),
            "seconds": self._seconds(),
            "resumed": self.state.resumed,
            **self._description(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        pack = self._write(candidate, report) if accepted or self.config.force else None
        self._keep_pictures(baseline.parent, candidate.measures)
        return self._conclude(report, pack)

    def _reject_frames(self) -> RoundResult:
        """The frames themselves are no good: nothing is learnt from them."""
        report = {
            "accepted": False,
            "parent": self.pack.sha256,
            "round": self.identity[:12],
            "gate": as_dict(self.frame_checks),
            "finished": self._now(),
            "stages": {},
            "seconds": {},
            "frames": {"target": len(self.inputs.target), "target_holdout": len(self.inputs.holdout)},
            "resumed": self.state.resumed,
            **self._description(),
        }
        keep_pictures(self.out / "pictures", self.inputs.holdout, {})
        return self._conclude(report, None)

    def _description(self) -> dict[str, Any]:
        """What a report needs to name and colour classes."""
        return {
            "name": self.spec.name,
            "version": self.spec.version,
            "classes": list(self.spec.classes),
            "colours": [list(c) for c in self.spec.colours],
        }

    def _keep_pictures(self, parent: Measures, candidate: Measures) -> None:
        """Store a few frames with answers before and after, and with their last pseudo-labels."""
        answers = {"before": parent.labels, "after": candidate.labels}
        last = max((int(k.split("-")[1]) for k in self.state.stages if k.startswith("label-")), default=0)
        files = sorted((self.out / f"labels-{last}").glob("*.png")) if last else []
        labels = [read_label(file) for file in files] if len(files) == len(self.inputs.target) else []
        learnt = (self.inputs.target, labels) if labels else ((), ())
        keep_pictures(self.out / "pictures", self.inputs.holdout, answers, learnt)

    def golden(self) -> np.ndarray:
        """uint8 [n,H,W,3], frames of this road first: a server may compare the first few alone."""
        of_parent, holdout = self.pack.golden(), self.inputs.holdout
        count = min(self.config.golden, len(holdout))
        chosen = np.linspace(0, len(holdout) - 1, count).round().astype(int)
        of_road = [resize_frame(holdout[i], (of_parent.shape[1], of_parent.shape[2])) for i in chosen]
        return np.concatenate([np.stack(of_road), of_parent])[:GOLDEN] if of_road else of_parent

    def _write(self, candidate: Candidate, report: dict[str, Any]) -> Pack:
        def make() -> dict[str, Any]:
            return {
                "spec": replace(
                    self.spec,
                    version=self.name or f"{self.spec.version}.r{self.identity[:8]}",
                    parent=self.pack.sha256,
                    adaptation=for_manifest(report),
                ),
                "state": candidate.state,
                "golden": self.golden(),
                "replay": self._parents_replay(),
                "reference": self.measurement.confidence(candidate.state, self.pack.network()),
            }

        return self._write_pack(make)
