"""How edge networks are trained: settings, and the published recipes.

Source: Yu et al., *CASENet*, CVPR 2017 and *SEAL*, ECCV 2018.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from adapt.labels.seal import Gate

__all__ = ["PRESETS", "SCALES", "EdgeRecipe"]


@dataclass(frozen=True)
class EdgeRecipe:
    """The settings of a training of edges.

    Attributes:
        steps: of the optimiser.
        reweighted, reduction: of the loss (``adapt.train.losses.multilabel_edge_loss``).
        aligned: SEAL; the first ``unaligned`` rounds use the labels as they are.
        round: crops per round.  batch: crops per step.
        optimiser: "sgd" (the published: momentum .9, decay 5e-4, new layers ×10, their biases ×20) or "adamw"
            (new layers ×1).
        rate: learning rate; it falls by ``gamma`` every ``every`` steps (0: never).
        frozen_bn: batch statistics stay.  frozen_affine: weights and biases of batch normalisation stay, too
            (the published Scale layers have lr_mult 0).
        parts: prefixes of the parameters that move, () = all.
        alignment, solver: parameters of ``adapt.labels.seal.align``.  gate: None is SEAL as published.
        segmentation: weight of the segmentation loss of joint networks.

    Raises:
        ValueError: a setting is out of its range.
    """

    steps: int
    reweighted: bool = False
    reduction: str = "mean"
    aligned: bool = False
    unaligned: int = 1
    round: int = 400
    batch: int = 10
    optimiser: str = "adamw"
    rate: float = 1e-3
    gamma: float = 0.2
    every: int = 0
    frozen_bn: bool = True
    frozen_affine: bool = False
    parts: tuple[str, ...] = ()
    alignment: dict[str, float] = field(
        default_factory=lambda: {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0, "smoothness": 0.02}
    )
    solver: str = "auction"
    gate: Gate | None = field(default_factory=Gate)
    segmentation: float = 1.0

    def __post_init__(self) -> None:
        if self.optimiser not in ("sgd", "adamw"):
            raise ValueError(f"optimiser {self.optimiser!r}: choose sgd or adamw")
        if self.steps < 0 or self.batch < 1 or self.round < self.batch or self.rate <= 0:
            raise ValueError(f"{self}: steps >= 0, 1 <= batch <= round and a positive rate are needed")


_CITYSCAPES = {"sigma_x": 1.0, "sigma_y": 3.0, "max_cost": 2.0, "smoothness": 0.02}
_SBD = {"sigma_x": 1.0, "sigma_y": 4.0, "max_cost": 4.5, "smoothness": 0.02}

#: The published recipes, NAME-cityscapes and NAME-sbd: crops of 472, mirrored; the loss is a sum, hence the
#: rates; batch normalisation is frozen, so that they start from a pretrained network.  S, C and SEAL start
#: from a short warm-up with the unweighted loss; C is S on labels a dense CRF refined (``adapt.labels.crf``).
#: Ours, NAME-scratch: the same losses, labels and alignment for a network with random weights: AdamW, the
#: mean loss, live batch statistics; SEAL behind the gate.
PRESETS: dict[str, EdgeRecipe] = {
    f"{name}-{data}": replace(
        EdgeRecipe(
            steps,
            reduction="caffe_sum",
            optimiser="sgd",
            round=crops,
            every=every,
            gamma=gamma,
            alignment=alignment,
            gate=None,
            solver="exact",
            frozen_affine=True,
        ),
        reweighted=name == "casenet",
        aligned=name == "seal",
        rate=rate if name == "casenet" else rate / 2,
    )
    for data, steps, crops, every, gamma, rate, alignment in (
        ("cityscapes", 28000, 400, 20000, 0.2, 5e-8, _CITYSCAPES),
        ("sbd", 22000, 300, 10000, 0.1, 1e-7, _SBD),
    )
    for name in ("casenet", "casenet-s", "casenet-c", "seal")
} | {
    f"{name}-scratch": EdgeRecipe(
        4000,
        every=2700,
        frozen_bn=False,
        reweighted=name == "casenet",
        aligned=name == "seal",
        unaligned=40 if name == "seal" else 1,  # two fifths: a student that sees nothing moves labels badly
    )
    for name in ("casenet", "casenet-s", "casenet-c", "seal")
}

#: The magnifications of the published training sets.
SCALES: dict[str, tuple[float, ...]] = {
    "cityscapes": (1.0,),
    "sbd": (0.5, 0.75, 1.0, 1.25, 1.5),
}
