"""The settings of a round of segmentation."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from adapt.gate.limits import Limits
from adapt.labels.published import CODES
from adapt.round.outcome import RoundError
from adapt.train.augment import Augmentation
from adapt.train.batches import BatchMix
from adapt.train.segmentation import TrainConfig

__all__ = ["RoundConfig"]

#: Settings that are whole numbers, and the least value of each.
_COUNTS = {
    "source": 0,
    "target": 1,
    "adabn_batch": 1,
    "infer_batch": 1,
    "checkpoint_every": 1,
    "replay_limit": 0,
    "source_holdout": 0,
    "golden": 0,
    "ignore_bottom": 0,
    "ignore_border": 0,
    "threads": 0,
    "seed": 0,
}


@dataclass(frozen=True)
class RoundConfig:
    """The settings of a round.  Every count is here, so that a budget can be kept.

    It stays flat and spelled as it is: the identity of a round, and so the name of its pack, is a hash of
    these fields.

    Attributes:
        portions: p of each labelling, rising (self-paced).
        steps: optimiser steps of each training: one number per portion, or one for all.
        source, target: replayed source frames and target frames in a batch.
        crop, scale, flip, brightness, colour, blur, noise: see `adapt.train.augment`; crop None = frame.
        rate, weight_decay, schedule, warm, bn, mrkld, ema, mic, clip, amp, compile, memory_mb: see
            `adapt.train.segmentation.TrainConfig`.
        rare, rare_target, classmix: see `adapt.train.batches.BatchMix`.
        lrent: CRST's soft labels with this weight of the entropy (published: 0.25), 0 = CBST's.
        policy: "cbst" (one λ_c per class) or "st" (one λ).
        compat: "cbst" or "crst" computes λ_c and labels as that published code does
            (`adapt.labels.published`), without prior and tags, which those codes do not have in this form.
        label_flip, label_scales: test-time augmentation (MST) for the labelling.
        prior: use the pack's spatial prior (CBST-SP).
        adabn: re-estimate batch statistics, adabn_batch frames at a time.
        adabn_keep: the shares of the present statistics that are tried, in addition to keeping them all.
        adabn_by: how they are compared (`adapt.gate.segmentation`): "mirror" takes the best by agreement with
            the mirrored answer, "shares" the best by class shares near the source's, "translated" the best by
            mIoU on the source hold-out in the target's colours, "veto" the first of adabn_keep that does not
            lose by that measure against keeping all (decided once, and applied after each training), "auto"
            is "veto" if the pack has a labelled hold-out, else "mirror".
        from_parent: every training starts from the parent's weights (False: from the last stage's).
        holdout: share of the target frames that only the gate sees (at least 2 frames).
        keep_parent: share of the parent's weights in the mean of parent and student that a training ends
            with, 0 = the student alone (WiSE-FT, Wortsman et al., CVPR 2022).  It holds a student that has no
            replay near what the parent knew.
        source_free: True ignores a replay set, False demands one, None takes one if the pack has it.
        replay_limit: at most that many replay frames are read, 0 = all.
        source_holdout: at most that many hold-out frames of the source are scored at each stage, 0 = all.
        golden: hold-out frames that the new pack brings as golden ones, before its parent's; 0: no frame of
            the road goes into a pack.  The server then compares a version with the live one on frames of its
            own road too: on the source's frames alone a version for night may lack what it sees at night.
        judge: decay of the mean of the weights that the gate compares a student with (`TrainConfig.judge`).
        absent: names of classes that cannot be here (a map, a geofence): no frame gets a label of them.
        ignore_bottom, ignore_border: rows at the bottom (own bonnet) and pixels at every edge without labels.
        checkpoint_every: steps between checkpoints.
        threads: torch threads, 0 = unchanged.
        device: where the network labels, trains and is measured: "cpu", "cuda", "cuda:1".
        force: run all stages and write the last one whatever the gate decides (for measuring the gate).
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
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        try:
            self._validate()
        except (TypeError, ValueError) as error:  # such as text for a number, a number for a list
            raise RoundError(str(error)) from error

    def _validate(self) -> None:
        for name, least in _COUNTS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise RoundError(f"{name} {value!r}: give a whole number, {least} or more")
        for name, values, low, high in (
            ("portions", self.portions, 0.0, 1.0),
            ("label_scales", self.label_scales, 0.0, 4.0),
            ("holdout", (self.holdout,), 0.0, 0.9),
        ):
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

    def optimisation(self, stage: int) -> TrainConfig:
        """The optimisation of the training number `stage`."""
        return TrainConfig(
            steps=self.steps_of(stage),
            rate=self.rate,
            weight_decay=self.weight_decay,
            schedule=self.schedule,
            warm=self.warm,
            bn=self.bn,
            mrkld=self.mrkld,
            ema=self.ema,
            mic=self.mic,
            clip=self.clip,
            judge=0.0 if self.ema else self.judge,
            amp=self.amp,
            compile=self.compile,
            memory_mb=self.memory_mb,
        )

    def mixture(self, source_free: bool, size: tuple[int, int] = (1, 1)) -> BatchMix:
        """What a batch is made of, with crops of `size` if `crop` is None."""
        return BatchMix(
            0 if source_free else self.source,
            self.target + (self.source if source_free else 0),
            Augmentation(
                self.crop or size,
                self.scale,
                self.flip,
                brightness=self.brightness,
                colour=self.colour,
                blur=self.blur,
                noise=self.noise,
            ),
            rare=self.rare,
            rare_target=self.rare_target,
            mic=bool(self.mic),
            classmix=0.0 if source_free else self.classmix,
        )
