"""One round of adaptation, from the released pack and unlabelled frames to a refreshed pack, or to a refusal.

    batch statistics of the target (AdaBN)
    for p in portions:   label the frames (λ_c at portion p)  →  train from the parent, replay in every batch
                         →  batch statistics again
        →  gate: a stage that fails it ends the round, and the last stage that passed is the candidate
    pack (parent = the released pack, every number that decided something inside)

Always from the parent's weights.  The state lives in `out/`: a round that was killed continues there from
its last checkpoint and ends with the same weights (same machine, same number of threads).  This module
reads no target label, and does not know the service.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from adapt import batchnorm, inference
from adapt.data.base import DataError, read_frame, read_label, resize_frame, resize_label
from adapt.gate import segmentation
from adapt.gate.layout_prior import Layout
from adapt.labels import lrent
from adapt.labels.cbst import ClassHistograms, allowed_mask, pseudo_labels, st_threshold
from adapt.labels.published import CODES, PublishedThresholds, published_labels
from adapt.report.round import keep_pictures
from adapt.round.state import Record
from adapt.train.augment import Augmentation
from adapt.train.batches import Mixture, sampler
from adapt.train.trainer import Optimisation, Progress, Trainer, atomic_save, silent
from common.files import read_json, write_json
from networks.pack import Pack, load_pack, normalise, write_pack

__all__ = ["RoundConfig", "RoundError", "RoundPaused", "RoundResult", "adapt"]

IGNORE = 255
GOLDEN = 8  # golden frames of a pack at most
_COUNTS = {
    "source": 0, "target": 1, "adabn_batch": 1, "infer_batch": 1, "checkpoint_every": 1, "replay_limit": 0,
    "source_holdout": 0, "golden": 0, "ignore_bottom": 0, "ignore_border": 0, "threads": 0, "seed": 0,
}  # fmt: skip
_BY_SOURCE_FRAMES = ("translated", "veto")  # ways to choose statistics that need labelled source frames
Pair = tuple[np.ndarray, np.ndarray]
Tags = Collection[int] | Collection[str] | np.ndarray


class RoundError(Exception):
    """A round cannot be run.  One line: thing, reason, remedy."""


class RoundPaused(Exception):
    """Raised by a `progress` to stop a round: what is done is kept, and `adapt` on the same folder goes on
    from there to the same weights as if it had never stopped.  The text says why.
    """


@dataclass(frozen=True)
class RoundConfig:
    """Everything a round may be told; every count is here, so that a budget can be kept.

    Attributes:
        portions: p of each labelling, rising (self-paced).
        steps: optimiser steps of each training (one number for each portion, or one for all).
        source, target: replayed source frames and target frames in a batch.
        crop, scale, flip, brightness, colour, blur, noise: see `adapt.train.augment`; crop None = frame.
        rate, weight_decay, schedule, warm, bn, mrkld, ema, mic, clip, amp, compile, memory_mb: see
            `adapt.train.trainer.Optimisation`.
        rare, rare_target, classmix: see `adapt.train.batches.Mixture`.
        lrent: CRST's soft labels with this weight of the entropy (published: 0.25), 0 = CBST's.
        policy: "cbst" (λ_c a class) or "st" (one λ).
        compat: "cbst" or "crst" computes λ_c and labels as that published code does
            (`adapt.labels.published`); without prior and tags, which those codes do not have in this form.
        label_flip, label_scales: MST for the labelling.
        prior: use the pack's spatial prior (CBST-SP) where it has one.
        adabn: re-estimate batch statistics, adabn_batch frames at a time; adabn_keep: the shares of the
            present statistics that are tried, beside keeping them all; adabn_by: how they are compared,
            "mirror" (the best by agreement with the mirrored answer, `gate.better`), "shares" (the best by
            class shares near the source's, `gate.nearer`), "translated" (the best by mIoU on the source
            hold-out in the target's colours, `gate.more_right`), "veto" (the first of adabn_keep that does
            not lose by that measure against keeping all, decided once and applied after each training) or
            "auto": "veto" where the pack has a labelled hold-out, else "mirror".
        from_parent: every training starts from the parent's weights (False: from the last stage's).
        holdout: share of the target frames kept aside for the gate (at least 2).
        keep_parent: share of the parent's weights in the mean of parent's and student's that a training ends
            with, 0 = the student alone (WiSE-FT, Wortsman et al., CVPR 2022): what holds a student without
            replay near what it knew.
        source_free: True ignores a replay set; False demands one; None takes what there is.
        replay_limit: at most that many replay frames are read, 0 = all.
        source_holdout: at most that many hold-out frames of the source are scored at each stage, 0 = all.
        golden: hold-out frames that the new pack brings as golden ones, before its parent's: the server
            compares it with what is live on frames of its own road too, and not only on the source's, where
            a version for night may lack what it sees at night.  0: no frame of the road goes into a pack.
        judge: decay of the mean of the weights that the gate compares a student with (`Optimisation.judge`).
        absent: names of classes that cannot be here (a map, a geofence): no frame gets a label of them.
        ignore_bottom, ignore_border: rows at the bottom (own bonnet) and pixels at every edge without labels.
        checkpoint_every: steps between checkpoints.
        threads: torch threads, 0 = as they are.
        device: where the network labels, trains and is measured: "cpu", "cuda", "cuda:1".
        force: go through all stages and write the last one whatever the gate says (for measuring the gate).
    """

    portions: tuple[float, ...] = (0.2, 0.35, 0.5)
    steps: int | tuple[int, ...] = 60
    source: int = 3
    target: int = 3
    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.75, 1.6)
    flip: bool = True
    brightness: float = 1.0
    colour: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    rate: float = 5e-4
    weight_decay: float = 1e-2
    schedule: str = "one-cycle"
    warm: float = 0.3
    bn: str = "batch"
    mrkld: float = 0.0
    ema: float = 0.0
    mic: float = 0.0
    clip: float = 0.0
    amp: str = ""
    compile: bool = False
    memory_mb: float = 0.0
    judge: float = 0.98
    lrent: float = 0.0
    rare: float = 0.0
    rare_target: float = 0.0
    classmix: float = 0.0
    policy: str = "cbst"
    compat: str = ""
    label_flip: bool = False
    label_scales: tuple[float, ...] = (1.0,)
    prior: bool = False
    adabn: bool = True
    adabn_batch: int = 6
    adabn_keep: tuple[float, ...] = (0.25, 0.5)
    adabn_by: str = "auto"
    from_parent: bool = True
    holdout: float = 0.15
    keep_parent: float = 0.0
    source_free: bool | None = None
    replay_limit: int = 0
    source_holdout: int = 24
    golden: int = 2
    absent: tuple[str, ...] = ()
    ignore_bottom: int = 0
    ignore_border: int = 0
    infer_batch: int = 4
    checkpoint_every: int = 25
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    force: bool = False
    limits: segmentation.Limits = field(default_factory=segmentation.Limits)

    def __post_init__(self) -> None:
        try:
            self._check()
        except (TypeError, ValueError) as error:  # text where a number belongs, a number where a list does
            raise RoundError(str(error)) from error

    def _check(self) -> None:
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise RoundError(f"{name} {value!r}: give a whole number, {least} or more")
        for name, values, low, high in (
            ("portions", self.portions, 0.0, 1.0), ("label_scales", self.label_scales, 0.0, 4.0),
            ("holdout", (self.holdout,), 0.0, 0.9),
        ):  # fmt: skip
            if not all(low < v <= high for v in values):
                raise RoundError(f"{name} {getattr(self, name)}: more than {low:g} and at most {high:g}")
        if not self.label_scales or (self.adabn and not self.adabn_keep):
            raise RoundError(
                "label_scales and adabn_keep are not empty: [1.0] labels once, adabn=false is off"
            )
        if not all(0 <= keep <= 1 for keep in self.adabn_keep):
            raise RoundError(f"adabn_keep {self.adabn_keep}: shares of the present statistics, 0 to 1")
        if self.device != "cpu" and not re.fullmatch(r"cuda(:\d+)?", self.device):
            raise RoundError(f"device {self.device!r}: choose cpu, cuda or cuda:NUMBER")
        if self.adabn_by not in ("auto", "mirror", "shares", "translated", "veto"):
            raise RoundError(f"adabn_by {self.adabn_by!r}: choose auto, mirror, shares, translated or veto")
        if self.policy not in ("cbst", "st"):
            raise RoundError(f"policy {self.policy!r}: choose cbst or st")
        if self.compat and (self.compat not in CODES or self.prior):
            raise RoundError(f"compat {self.compat!r}: choose one of {', '.join(CODES)}, without prior")
        if self.compat and (self.ignore_bottom or self.ignore_border or self.absent):
            raise RoundError(f"compat {self.compat!r}: that code knows no absent classes and no masks")
        if isinstance(self.steps, tuple) and len(self.steps) != len(self.portions):
            raise RoundError(
                f"steps {self.steps}: give one number, or one for each of {len(self.portions)} portions"
            )
        if not 0 <= self.keep_parent < 1:
            raise RoundError(f"keep_parent {self.keep_parent}: a share of the weights, 0 to less than 1")
        if not 0 <= self.lrent < float("inf"):
            raise RoundError(f"lrent {self.lrent}: a weight of the entropy, 0 = off")
        for stage in range(len(self.portions)):
            if not isinstance(self.steps_of(stage), int):
                raise RoundError(f"steps {self.steps!r}: whole numbers")
            self.optimisation(stage)
        self.mixture(False)

    def steps_of(self, stage: int) -> int:
        """Optimiser steps of the training number `stage`."""
        return self.steps[stage] if isinstance(self.steps, tuple) else self.steps

    def optimisation(self, stage: int) -> Optimisation:
        return Optimisation(
            steps=self.steps_of(stage), rate=self.rate, weight_decay=self.weight_decay,
            schedule=self.schedule, warm=self.warm,
            bn=self.bn, mrkld=self.mrkld, ema=self.ema, mic=self.mic, clip=self.clip,
            judge=0.0 if self.ema else self.judge,
            amp=self.amp, compile=self.compile, memory_mb=self.memory_mb,
        )  # fmt: skip

    def mixture(self, source_free: bool, size: tuple[int, int] = (1, 1)) -> Mixture:
        """A batch, with crops of `size` where `crop` names none."""
        return Mixture(
            0 if source_free else self.source,
            self.target + (self.source if source_free else 0),
            Augmentation(
                self.crop or size, self.scale, self.flip, brightness=self.brightness, colour=self.colour,
                blur=self.blur, noise=self.noise,
            ),
            rare=self.rare, rare_target=self.rare_target, mic=bool(self.mic),
            classmix=0.0 if source_free else self.classmix,
        )  # fmt: skip


@dataclass(frozen=True)
class RoundResult:
    """pack: the refreshed pack, None where the round was refused.  report: every number, JSON-able."""

    pack: Pack | None
    accepted: bool
    report: dict[str, Any]


def adapt(
    pack: Pack,
    frames: Sequence[np.ndarray],
    *,
    config: RoundConfig | None = None,
    out: str | os.PathLike[str],
    progress: Progress = silent,
    allowed: Sequence[Tags | None] | None = None,
    labelled: Sequence[Pair] | None = None,
    name: str | None = None,
) -> RoundResult:
    """Run a round, or continue the one in `out`.

    Args:
        pack: the released parent.
        frames: unlabelled target frames uint8 [H,W,3] (resized to the pack's size where they differ).
        config: see `RoundConfig`.
        out: folder of this round: state, checkpoints, pseudo-labels, report.json and, if accepted, pack/.
        progress: told after every step; may raise RoundPaused, which goes to the caller.
        allowed: for each frame the classes that may be in it (image tags), as names, indices or a bool mask,
            or None.
        labelled: a labelled target hold-out for the gate where somebody has one, (frame uint8 [H,W,3], label
            uint8 [H,W]) each; nothing is learnt from it.
        name: version of the new pack; by default the parent's with ".r" and a hash of the inputs.

    Returns:
        RoundResult; report["chosen"]: the stage that became the pack ("statistics", "train-1" …); `accepted`
        is False where not even the batch statistics could be improved, report["gate"] says why.

    Raises:
        RoundError: too few frames, no replay where it is demanded, a target frame that is in a hold-out as
            well, or `out` holds another round.
    """
    config = config or RoundConfig()
    if config.threads:
        torch.set_num_threads(config.threads)
    return _Round(pack, frames, config, Path(out), progress, allowed, name, labelled or ()).run()


@dataclass
class _Stage:
    """A candidate: weights, what was measured of it and what the gate says."""

    name: str
    state: dict[str, torch.Tensor]
    measures: segmentation.Measures
    checks: list[segmentation.Check]
    moved: float

    @property
    def failed(self) -> list[str]:
        return [check.name for check in self.checks if not check.passed]


class _Round(Record):
    def __init__(
        self,
        pack: Pack,
        frames: Sequence[np.ndarray],
        config: RoundConfig,
        out: Path,
        progress: Progress,
        allowed: Sequence[Tags | None] | None,
        name: str | None,
        labelled: Sequence[Pair] = (),
    ) -> None:
        self.pack, self.spec, self.config, self.out, self.progress = pack, pack.spec, config, out, progress
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise RoundError(f"device {config.device}: torch sees no CUDA device here; use cpu")
        if len(frames) < 4:
            raise RoundError(f"a round needs at least 4 target frames, got {len(frames)}: collect more")
        if allowed is not None and len(allowed) != len(frames):
            raise RoundError(
                f"{len(allowed)} sets of tags for {len(frames)} frames: give one (or None) a frame"
            )
        size = pack.spec.size
        self.labelled = [(resize_frame(x, size), resize_label(y, size)) for x, y in labelled]
        self.sizes = [f.shape[:2] for f in frames]
        # In memory once, at the pack's size: 0.5 MB a frame at 352x480.
        self.frames = [np.ascontiguousarray(resize_frame(f, self.spec.size)) for f in frames]
        aside = max(2, round(config.holdout * len(self.frames)))
        chosen = np.unique(np.linspace(0, len(self.frames) - 1, aside + 2)[1:-1].round().astype(int))
        self.holdout = [self.frames[i] for i in chosen]
        self.following = [self.frames[i + 1] if i + 1 < len(self.frames) else None for i in chosen]
        keep = [i for i in range(len(self.frames)) if i not in set(chosen.tolist())]
        self.target = [self.frames[i] for i in keep]
        tags = [None] * len(keep) if allowed is None else [allowed[i] for i in keep]
        if config.compat and any(t is not None for t in tags):
            raise RoundError(f"compat {config.compat!r}: that code knows no image tags")
        self.allowed = [self._tags(t) for t in tags]
        self.replay = [] if config.source_free else self._read_replay("train")
        self.source_holdout = _spread(self._read_replay("holdout"), config.source_holdout)
        if config.source_free is False and not self.replay:
            raise RoundError("the pack has no replay frames and source_free is False: allow it or add replay")
        self.source_free = not self.replay
        self.adabn_by = config.adabn_by
        if config.adabn_by == "auto":
            self.adabn_by = "veto" if self.source_holdout else "mirror"
        self._refuse_evaluation_frames()
        self.layout = self._layout()
        self.valid = self._valid_mask()
        self.name = name
        self.seconds: dict[str, float] = {}
        self.state: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------ preparation
    def _tags(self, tags: Tags | None) -> list[int] | None:
        """Indices of the classes that may be in a frame, less those that cannot be here; None = all."""
        classes = self.spec.classes
        unknown = [c for c in self.config.absent if c not in classes]
        if unknown:
            raise RoundError(f"absent: the pack has no class {unknown[0]!r}; it has {', '.join(classes)}")
        if tags is None and not self.config.absent:
            return None
        given: Any = range(len(classes)) if tags is None else tags
        try:
            if not isinstance(given, np.ndarray):
                given = [classes.index(t) if isinstance(t, str) else t for t in given]
            mask = allowed_mask(given, len(classes))
        except (TypeError, ValueError) as error:
            raise RoundError(f"tags {tags!r}: {error}; the pack has {', '.join(classes)}") from error
        assert mask is not None
        return [i for i in np.flatnonzero(mask).tolist() if classes[i] not in self.config.absent]

    def _read_replay(self, split: str) -> list[Pair]:
        listed = self.pack.replay(split)
        if self.config.replay_limit:
            listed = listed[: self.config.replay_limit]
        pairs = []
        for i, (frame, label) in enumerate(listed):
            try:
                x, y = read_frame(frame), read_label(label)
            except DataError as error:
                raise RoundError(f"pack {self.pack.path}: {error}") from error
            known = y[y != 255]
            if known.size and int(known.max()) >= len(self.spec.classes):
                raise RoundError(
                    f"pack {self.pack.path}: replay label {label.name} holds class {int(known.max())}, the "
                    f"pack has {len(self.spec.classes)}: write the pack again"
                )
            pairs.append((resize_frame(x, self.spec.size), resize_label(y, self.spec.size)))
            self.progress(f"read replay ({split})", i + 1, len(listed))
        return pairs

    def _refuse_evaluation_frames(self) -> None:
        """A frame with labels that the gate judges by must not be among those that are learnt from."""
        seen = {_digest(x): i for i, x in enumerate(self.frames)}
        for words, pairs in (("labelled", self.labelled), ("source", self.source_holdout)):
            for i, (x, _) in enumerate(pairs):
                if _digest(x) in seen:
                    raise RoundError(
                        f"target frame {seen[_digest(x)]} is also frame {i} of the {words} hold-out: take it "
                        "out of one of them"
                    )

    def _valid_mask(self) -> np.ndarray | None:
        bottom, border = self.config.ignore_bottom, self.config.ignore_border
        if not bottom and not border:
            return None
        mask = np.ones(self.spec.size, bool)
        if border:
            mask[:border], mask[-border:], mask[:, :border], mask[:, -border:] = False, False, False, False
        if bottom:
            mask[-bottom:] = False
        if not mask.any():
            raise RoundError(
                f"ignore_bottom {bottom} and ignore_border {border} leave nothing of a frame of "
                f"{self.spec.size}: lower them"
            )
        return mask

    def _layout(self) -> Layout | None:
        """Where things are in the source's labels, from whatever the pack has of them."""
        labels = [y for _, y in [*self.replay, *self.source_holdout]]
        if labels:
            return Layout.of_labels(labels, len(self.spec.classes))
        prior, share = self.pack.prior(), self.pack.reference().get("share")
        return None if prior is None or share is None else Layout.of_prior(prior, share)

    def _identity(self) -> str:
        digest = hashlib.sha256()
        told = asdict(self.config)
        for key in ("threads", "force"):  # these do not change what is learnt
            told.pop(key)
        digest.update(json.dumps([self.pack.sha256, told], sort_keys=True, default=str).encode())
        for frame in self.frames:
            digest.update(hashlib.sha256(frame.tobytes()).digest())
        digest.update(json.dumps(self.allowed).encode())
        for frame, label in self.labelled:
            digest.update(hashlib.sha256(frame.tobytes() + label.tobytes()).digest())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------- state
    def _open(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.identity = self._identity()
        file = self.out / "state.json"
        try:
            kept = read_json(file)
            if not isinstance(kept, dict) or not isinstance(kept.get("stages", {}), dict):
                raise ValueError("it is no state of a round")
            if not isinstance(kept.get("resumed", -1), int):
                raise ValueError("resumed is no number")
        except FileNotFoundError:
            kept = None
        except (OSError, ValueError) as error:
            words = " ".join(str(error).split())[:200]
            raise RoundError(f"{file} is damaged ({words}): move {self.out} away to begin again") from error
        if kept is not None:
            self.state = kept
            if self.state.get("identity") != self.identity:
                raise RoundError(
                    f"{self.out} holds another round (other pack, frames or settings): give another folder"
                )
            self.seconds = self.state.get("seconds", {})
        else:
            self.state = {"identity": self.identity, "stages": {}, "resumed": -1}
        self.state["resumed"] = int(self.state.get("resumed", -1)) + 1
        self._save()

    # ------------------------------------------------------------------------------------------ stages
    def run(self) -> RoundResult:
        self._open()
        try:
            return self._run()
        except RoundPaused:
            self._save()
            raise

    def _run(self) -> RoundResult:
        done = self.state.get("report")
        if done is not None:
            path = self.out / "pack"
            kept = load_pack(path) if path.is_dir() else None
            return RoundResult(kept, bool(done["accepted"]), done)
        self.looked = segmentation.look(self.frames, self.config.limits, sizes=self.sizes)
        if not all(check.passed for check in self.looked) and not self.config.force:
            return self._decline(self.looked)
        parent = self.pack.network().to(self.config.device)
        self.parent_state = {k: v.detach().cpu().clone() for k, v in parent.state_dict().items()}
        self.parent_measures = self._timed("measure", lambda: self._measure(parent, "measure parent"))
        network, reference = self._statistics(parent)
        chosen = self._statistics_stage(network, reference)
        if chosen.failed and "changed" not in chosen.failed and not self.config.force:
            return self._finish(chosen, reference)  # not a street, or statistics that lose: learn nothing
        for stage, portion in enumerate(self.config.portions):
            labels = self._label(network, stage, portion)
            try:
                network, measures = self._train(network, labels, stage, portion)
            except FloatingPointError as error:
                self.state["stages"][f"train-{stage + 1}"] = {"portion": portion, "failed": [str(error)]}
                break
            found = self._judged(f"train-{stage + 1}", network, measures, reference)
            self.state["stages"][found.name]["failed"] = found.failed
            if found.failed:
                self.state["stages"][found.name]["refused"] = [
                    asdict(check) for check in found.checks if not check.passed
                ]
            if found.failed and not self.config.force:
                break  # the stopping rule: what fails the gate labels nothing and is not built upon
            chosen = found
        return self._finish(chosen, reference)

    def _judged(
        self, name: str, network: nn.Module, measures: segmentation.Measures, reference: segmentation.Measures
    ) -> _Stage:
        state = {k: v.detach().cpu().clone().contiguous() for k, v in network.state_dict().items()}
        moved = segmentation.distance(state, self.parent_state)
        checks = self.looked + segmentation.decide(
            measures, reference, self.parent_measures, moved, self.spec, self.config.limits,
            source_share=self._source_share(), layout=self.layout,
        )  # fmt: skip
        if self.spec.adaptation:  # the parent is a refreshed pack itself: judge the whole way, too
            before = self._released()
            checks += segmentation.cumulative(
                measures, before["source"], before["distance"] + moved, self.config.limits
            )
        return _Stage(name, state, measures, checks, moved)

    def _released(self) -> dict[str, float]:
        """What is known of the way from the released pack to this round's parent: the released one's source
        score on the same hold-out (NaN: unknown) and the sum of the distances, which bounds the true one.
        """
        told = self.spec.adaptation
        if not told:
            return {"source": self.parent_measures.source, "distance": 0.0}
        way = told.get("released") or {}
        first = (told.get("measures") or {}).get("parent") or {}
        source = way.get("source", first.get("source"))
        return {
            "source": float("nan") if source is None else float(source),
            "distance": float(way.get("distance", told.get("distance", 0.0))),
        }

    def _statistics_stage(self, network: nn.Module, reference: segmentation.Measures) -> _Stage:
        """Batch statistics alone, the first candidate: no weight has moved, `gate.better` has decided."""
        found = self._judged("statistics", network, reference, reference)
        kept = float(self.state["stages"]["adabn"]["kept"])
        words = (
            "new batch statistics agree better with the mirrored answer"
            if kept < 1
            else "nothing has changed"
        )
        found.checks.append(segmentation.Check("changed", 1.0 - kept, 0.0, kept < 1.0, words))
        return found

    def _measure(
        self, network: nn.Module, stage: str, twin: dict[str, torch.Tensor] | None = None
    ) -> segmentation.Measures:
        """Hold-outs only; the source's is scored as served and with the source's own statistics.

        twin: parameters to compare the network with: the mean of its weights along the training.
        """
        self.progress(stage, 0, 1)
        batch, limits = self.config.infer_batch, self.config.limits
        found = segmentation.measure(
            network, self.spec, self.holdout, batch=batch, following=self.following, limits=limits
        )
        if self.layout is not None:
            found.layouts = self.layout.scores(found.labels)
        kept = {k: v.clone() for k, v in network.state_dict().items()}
        if twin is not None:
            network.load_state_dict({**kept, **twin})
            found.teacher = segmentation.agree(
                found, segmentation.measure(network, self.spec, self.holdout, batch=batch)
            )
            network.load_state_dict(kept)
        if self.labelled:
            found.labelled = segmentation.source_score(network, self.spec, self.labelled, batch=batch)
        if self.source_holdout:
            served, calibration = segmentation.scores(network, self.spec, self.source_holdout, batch=batch)
            found.source = found.source_served = served.miou()
            found.calibration, found.source_iou = calibration.ece(), served.iou()
            found.translated = segmentation.source_score(network, self.spec, self._translated(), batch=batch)
            if self.config.adabn and batchnorm.has_statistics(network):
                known = self.replay or self.source_holdout
                unlabelled = [x for x, _ in _spread(known, 4 * self.config.adabn_batch)]
                batchnorm.reestimate(network, self._normalised(unlabelled))
                own, calibration = segmentation.scores(network, self.spec, self.source_holdout, batch=batch)
                found.source, found.source_iou = own.miou(), own.iou()
                found.calibration = calibration.ece()
                network.load_state_dict(kept)
        self.progress(stage, 1, 1)
        return found

    def _translated(self) -> list[Pair]:
        """The source hold-out in the colours of the target hold-out; the labels stay true."""
        return [
            (segmentation.translated(x, self.holdout[i % len(self.holdout)]), y)
            for i, (x, y) in enumerate(self.source_holdout)
        ]

    def _normalised(self, frames: Sequence[np.ndarray], stage: str | None = None) -> Iterator[torch.Tensor]:
        total = len(frames)
        for start in range(0, total, self.config.adabn_batch):
            chunk = frames[start : start + self.config.adabn_batch]
            if len(chunk) < 2 and start:
                break  # the variance of a single frame would weigh as much as that of a full batch
            yield normalise(inference.as_tensor(chunk).to(self.config.device), self.spec)
            if stage:
                self.progress(stage, min(start + len(chunk), total), total)

    def _choose_statistics(
        self, network: nn.Module, stage: str, before: segmentation.Measures | None = None
    ) -> float:
        """Target statistics, mixed with the present ones in each share of `adabn_keep`, or the present ones.

        `adabn_by` says what the choice is made by.  Returns the share of the present statistics in it (1 =
        nothing changed).
        """
        source = self._source_share() if self.adabn_by == "shares" else None
        if self.adabn_by == "shares" and source is None:
            raise RoundError("adabn_by is shares and the pack knows no class shares: use mirror")
        if self.adabn_by in _BY_SOURCE_FRAMES and not self.source_holdout:
            raise RoundError(f"adabn_by is {self.adabn_by} and the pack has no source hold-out: use mirror")

        def wins(found: segmentation.Measures, best: segmentation.Measures) -> bool:
            limits = self.config.limits
            if self.adabn_by in _BY_SOURCE_FRAMES:
                return segmentation.more_right(found, best, limits)
            if source is not None:
                return segmentation.nearer(found, best, source, limits)
            return segmentation.better(found, best, limits)

        present, target = batchnorm.statistics(network), self._of_target(network, stage)
        best = before or self._look(network, present)
        chosen, kept = present, 1.0
        for keep in self.config.adabn_keep:
            mixed = batchnorm.mix(target, present, keep)
            found = self._look(network, mixed)
            if wins(found, best):
                best, chosen, kept = found, mixed, keep
                if self.adabn_by == "veto":
                    break
        batchnorm.load(network, chosen)
        return kept

    def _of_target(self, network: nn.Module, stage: str) -> dict[str, torch.Tensor]:
        """Batch statistics of the target frames; the network has them afterwards."""
        # Mixed order, so that a batch is a sample and not one street.
        order = np.random.default_rng([self.config.seed, 31]).permutation(len(self.target))
        batchnorm.reestimate(network, self._normalised([self.target[i] for i in order], stage))
        return batchnorm.statistics(network)

    def _again(self, network: nn.Module, stage: str) -> float:
        """Batch statistics after a training; the share kept of those it ended with.

        What was found before any weight moved holds: the veto by translated frames compares with the old
        domain's statistics, and a training that mixes both domains has none of those.
        """
        if self.adabn_by != "veto":
            return self._choose_statistics(network, stage)
        kept = float(self.state["stages"]["adabn"]["kept"])
        if kept < 1:
            present = batchnorm.statistics(network)
            batchnorm.load(network, batchnorm.mix(self._of_target(network, stage), present, kept))
        return kept

    def _look(self, network: nn.Module, statistics: dict[str, torch.Tensor]) -> segmentation.Measures:
        batchnorm.load(network, statistics)
        batch = self.config.infer_batch
        found = segmentation.measure(network, self.spec, self.holdout, batch=batch)
        if self.adabn_by in _BY_SOURCE_FRAMES:
            found.translated = segmentation.source_score(network, self.spec, self._translated(), batch=batch)
        return found

    def _statistics(self, network: nn.Module) -> tuple[nn.Module, segmentation.Measures]:
        """Batch statistics of the target before anything else, where they do not make things worse."""
        self.use_statistics = self.config.adabn and batchnorm.has_statistics(network)
        if not self.use_statistics:
            self.state["stages"]["adabn"] = {"kept": 1.0, "reason": "switched off or no batch statistics"}
            self._save()
            return network, self.parent_measures
        before = self.parent_measures
        kept = self._timed("adabn", lambda: self._choose_statistics(network, "batch statistics", before))
        after = before
        if kept < 1.0:
            after = self._timed("measure", lambda: self._measure(network, "measure statistics"))
        words = (
            f"agreement with the mirrored answer {before.flip:.3f} -> {after.flip:.3f}, "
            f"classes in use {before.variety:.1f} -> {after.variety:.1f}"
        )
        if self.source_holdout:
            words += (
                f", mIoU on source frames in the target's colours {before.translated:.3f} -> "
                f"{after.translated:.3f}"
            )
        self.state["stages"]["adabn"] = {
            "kept": kept,
            "by": self.adabn_by,
            "reason": words,
            "measures": after.numbers(),
        }
        self._save()
        return network, after

    def _prior(self) -> np.ndarray | None:
        """q_c(y,x) float32 [C,H,W] at the pack's size, or None."""
        if not self.config.prior:
            return None
        prior = self.pack.prior()
        if prior is None:
            raise RoundError("prior is asked for and the pack has no prior.npz: switch it off")
        planes = [
            np.asarray(
                Image.fromarray(plane.astype(np.float32)).resize(
                    self.spec.size[::-1], Image.Resampling.BILINEAR
                )
            )
            for plane in prior
        ]
        return np.asarray(np.clip(np.stack(planes), 0.0, 1.0))

    def _softmax(self, network: nn.Module, stage: str) -> Iterator[tuple[int, Any]]:
        """(frame's number, softmax [C,H,W]): an array, or a tensor where the network is on a CUDA device."""
        position = 0
        for tensor in inference.batches(self.target, self.config.infer_batch):
            maps = inference.probabilities(
                network, self.spec, tensor, flip=self.config.label_flip, scales=self.config.label_scales
            )
            for p in maps if maps.is_cuda else maps.numpy():
                yield position, p
                position += 1
                self.progress(stage, position, len(self.target))

    def _label(self, network: nn.Module, stage: int, portion: float) -> list[np.ndarray]:
        """Two passes over the frames: histograms, then labels.  No softmax map is ever written."""
        folder = self.out / f"labels-{stage + 1}"
        listed = self.state["stages"].get(f"label-{stage + 1}")
        if listed is not None:
            return [read_label(folder / f"{i:05d}.png") for i in range(len(self.target))]
        start = time.monotonic()
        classes, prior = len(self.spec.classes), self._prior()
        histograms = ClassHistograms(classes)
        published = PublishedThresholds(classes, self.config.compat) if self.config.compat else None
        for i, p in self._softmax(network, f"thresholds p={portion:g}"):
            histograms.add(p, prior=prior, allowed=self.allowed[i], valid=self.valid)
            if published is not None:
                published.add(_array(p))
        lam = (
            st_threshold(histograms, portion)
            if self.config.policy == "st"
            else histograms.thresholds(portion)
        )
        if published is not None:
            lam = published.thresholds(portion, self.config.policy)
        folder.mkdir(exist_ok=True)
        labels, counts = [], np.zeros(classes, np.int64)
        for i, p in self._softmax(network, f"labels p={portion:g}"):
            if self.config.lrent:
                soft = lrent.compact_labels(
                    _array(p), lam, self.config.lrent, prior=prior, allowed=self.allowed[i], valid=self.valid
                )
                lrent.write(folder / f"{i:05d}.npz", soft)
                y = np.ascontiguousarray(soft[..., 0])
            elif published is not None:
                y = published_labels(_array(p), lam, self.config.compat)
            else:
                y = pseudo_labels(p, lam, prior=prior, allowed=self.allowed[i], valid=self.valid)
            counts += np.bincount(y.reshape(-1), minlength=256)[:classes]
            Image.fromarray(y).save(folder / f"{i:05d}.png", compress_level=1)
            labels.append(y)
        self.seconds["label"] = self.seconds.get("label", 0.0) + time.monotonic() - start
        total = sum(y.size for y in labels)
        self.state["stages"][f"label-{stage + 1}"] = {
            "portion": portion,
            "lambda": [round(float(v), 5) for v in lam],
            "labelled": round(float(counts.sum() / total), 5),
            "share": [round(float(v), 5) for v in counts / max(int(counts.sum()), 1)],
            "predicted_share": [round(float(v), 5) for v in histograms.shares()],
        }
        self._save()
        return labels

    def _soft(self, stage: int) -> list[np.ndarray]:
        """LRENT's labels as `_label` kept them."""
        folder = self.out / f"labels-{stage + 1}"
        return [lrent.read(folder / f"{i:05d}.npz") for i in range(len(self.target))]

    def _train(
        self, network: nn.Module, labels: list[np.ndarray], stage: int, portion: float
    ) -> tuple[nn.Module, segmentation.Measures]:
        config = self.config
        key = f"train-{stage + 1}"
        weights, aside = self.out / f"{key}.pt", self.out / f"{key}.twin.pt"
        kept = self.state["stages"].get(key)
        if kept is None:
            if config.from_parent:
                statistics = batchnorm.statistics(network)
                network.load_state_dict(self.parent_state)
                if config.bn == "frozen" and self.use_statistics:
                    network.load_state_dict({**network.state_dict(), **statistics})
            statistics_kept = 1.0
            pairs = list(zip(self.target, labels, strict=True))
            draw = sampler(
                self.replay, pairs, config.mixture(self.source_free, self.spec.size), len(self.spec.classes),
                config.seed, stage, soft=self._soft(stage) if config.lrent else None, valid=self.valid,
            )  # fmt: skip
            trainer = Trainer(
                network, self.spec, config.optimisation(stage), draw, seed=config.seed * 101 + stage,
                checkpoint=self.out / "checkpoint.pt", every=config.checkpoint_every,
                identity=f"{self.identity} {key}",
            )  # fmt: skip
            try:
                self._timed("train", lambda: trainer.run(self.progress, f"train p={portion:g}"))
            except RoundPaused:
                trainer.save()
                raise
            if config.keep_parent:
                self._towards_parent(network)
            if self.use_statistics and config.bn != "frozen":
                name = f"batch statistics p={portion:g}"
                statistics_kept = self._timed("adabn", lambda: self._again(network, name))
            if trainer.twin is not None:
                atomic_save(aside, trainer.twin)
            atomic_save(weights, network.state_dict())
            loss, cut = trainer.history, trainer.cut
        else:
            network.load_state_dict(torch.load(weights, weights_only=True))
        twin = torch.load(aside, weights_only=True) if aside.is_file() else None
        measures = self._timed("measure", lambda: self._measure(network, f"measure p={portion:g}", twin))
        if kept is None:
            tenth = max(1, len(loss) // 10)
            self.state["stages"][key] = {
                "portion": portion, "steps": config.steps_of(stage), "statistics_kept": statistics_kept,
                "loss_first": round(float(np.mean(loss[:tenth])), 4) if loss else 0.0,
                "loss_last": round(float(np.mean(loss[-tenth:])), 4) if loss else 0.0,
                "measures": measures.numbers(),
                **({"cut": cut.words()} if cut is not None else {}),
            }  # fmt: skip
            self._save()
        return network, measures

    @torch.no_grad()
    def _towards_parent(self, network: nn.Module) -> None:
        """Weights (not statistics) become keep_parent·parent + (1−keep_parent)·student."""
        for name, weight in network.named_parameters():
            weight.lerp_(self.parent_state[name].to(weight.device), self.config.keep_parent)

    # --------------------------------------------------------------------------------------- the verdict
    def _source_share(self) -> np.ndarray | None:
        labels = [y for _, y in (self.replay or self.source_holdout)]
        if not labels:
            share = self.pack.reference().get("share")
            return None if share is None else np.asarray(share, np.float64)
        counts = sum(np.bincount(y.reshape(-1), minlength=256)[: len(self.spec.classes)] for y in labels)
        return np.asarray(counts / max(int(np.sum(counts)), 1))

    def _finish(self, chosen: _Stage, reference: segmentation.Measures) -> RoundResult:
        verdict = segmentation.as_dict(chosen.checks)
        accepted = not chosen.failed
        report = {
            "accepted": accepted,
            "parent": self.pack.sha256,
            "round": self.identity[:12],
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "chosen": chosen.name,
            "source_free": self.source_free,
            "frames": {"target": len(self.target), "target_holdout": len(self.holdout),
                       "replay": len(self.replay), "source_holdout": len(self.source_holdout)},
            "config": json.loads(json.dumps(asdict(self.config))),
            "stages": self.state["stages"],
            "parent_measures": self.parent_measures.numbers(),
            "reference_measures": reference.numbers(),
            "candidate_measures": chosen.measures.numbers(),
            "distance": round(chosen.moved, 5), "released": self._way(chosen.moved),
            "gate": verdict,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "resumed": self.state["resumed"], **self._described(),
            "torch": torch.__version__, "threads": torch.get_num_threads(),
        }  # fmt: skip
        made = None
        if accepted or self.config.force:
            made = self._write(chosen.state, report)
            report["pack"] = made.sha256
        self._pictures(chosen)
        write_json(self.out / "report.json", report)
        self.state["report"] = report
        self._save()
        (self.out / "checkpoint.pt").unlink(missing_ok=True)
        return RoundResult(made, accepted, report)

    def _way(self, moved: float) -> dict[str, float]:
        """For the manifest: `_released` with this round added."""
        before = self._released()
        known = {"source": round(before["source"], 5)} if np.isfinite(before["source"]) else {}
        return {**known, "distance": round(before["distance"] + moved, 5)}

    def _decline(self, checks: list[segmentation.Check]) -> RoundResult:
        """The frames themselves are no good: nothing is learnt from them."""
        report = {
            "accepted": False, "parent": self.pack.sha256, "round": self.identity[:12],
            "gate": segmentation.as_dict(checks),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"), "stages": {}, "seconds": {},
            "frames": {"target": len(self.target), "target_holdout": len(self.holdout)},
            "resumed": self.state["resumed"], **self._described(),
        }  # fmt: skip
        keep_pictures(self.out / "pictures", self.holdout, {})
        write_json(self.out / "report.json", report)
        self.state["report"] = report
        self._save()
        return RoundResult(None, False, report)

    def _described(self) -> dict[str, Any]:
        """What a report needs to name and colour classes."""
        return {
            "name": self.spec.name, "version": self.spec.version, "classes": list(self.spec.classes),
            "colours": [list(c) for c in self.spec.colours],
        }  # fmt: skip

    def _pictures(self, chosen: _Stage) -> None:
        """A few frames with answers before and after and with their last pseudo-labels, for the report."""
        answers = {"before": self.parent_measures.labels, "after": chosen.measures.labels}
        last = max((int(k.split("-")[1]) for k in self.state["stages"] if k.startswith("label-")), default=0)
        files = sorted((self.out / f"labels-{last}").glob("*.png")) if last else []
        labels = [read_label(file) for file in files] if len(files) == len(self.target) else []
        learnt = (self.target, labels) if labels else ((), ())
        keep_pictures(self.out / "pictures", self.holdout, answers, learnt)

    def _domain(self, state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Statistics of the refreshed network on the frames it was adapted to; drift starts there."""
        network = self.pack.network()
        network.load_state_dict(state)
        network = network.to(self.config.device).eval()
        batch = self.config.infer_batch
        confidence = inference.confidence_histogram(network, self.spec, self.frames, batch=batch)
        return {"share": confidence.sum(1) / confidence.sum(), "confidence": confidence}

    def _golden(self) -> np.ndarray:
        """uint8 [n,H,W,3]: of this road first, because a server may look at the first few alone."""
        theirs = self.pack.golden()
        count = min(self.config.golden, len(self.holdout))
        chosen = np.linspace(0, len(self.holdout) - 1, count).round().astype(int)
        ours = [resize_frame(self.holdout[i], (theirs.shape[1], theirs.shape[2])) for i in chosen]
        return np.concatenate([np.stack(ours), theirs])[:GOLDEN] if ours else theirs

    def _write(self, state: dict[str, torch.Tensor], report: dict[str, Any]) -> Pack:
        path = self.out / "pack"
        if path.is_dir():  # killed between the rename and the report: the same content by construction
            return load_pack(path)
        spec = replace(
            self.spec,
            version=self.name or f"{self.spec.version}.r{self.identity[:8]}",
            parent=self.pack.sha256,
            adaptation=_for_manifest(report),
        )
        replay = (
            (read_frame(frame), read_label(label), split)
            for split in ("train", "holdout")
            for frame, label in self.pack.replay(split)
        )
        return write_pack(
            path, spec, state, golden=self._golden(), replay=replay,
            reference=self._domain(state),
            prior=self.pack.prior(),
        )  # fmt: skip


def _array(p: Any) -> np.ndarray:
    return p if isinstance(p, np.ndarray) else np.asarray(p.cpu().numpy())


def _digest(frame: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).digest()


def _spread(pairs: list[Pair], most: int) -> list[Pair]:
    """At most `most` of them, evenly over the list; all where `most` is 0."""
    if not most or len(pairs) <= most:
        return pairs
    return [pairs[i] for i in np.linspace(0, len(pairs) - 1, most).round().astype(int)]


def _for_manifest(report: dict[str, Any]) -> dict[str, Any]:
    """What goes into the pack and from there into the engine's manifest: decisions, no times."""
    keys = (
        "round",
        "chosen",
        "source_free",
        "frames",
        "config",
        "stages",
        "distance",
        "released",
        "gate",
        "torch",
        "threads",
    )
    kept: dict[str, Any] = {k: report[k] for k in keys}
    kept["measures"] = {k: report[f"{k}_measures"] for k in ("parent", "reference", "candidate")}
    return kept
