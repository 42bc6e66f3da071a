"""A joint network that has learnt a toy's classes and edges, for tests of the edges' round, gate and loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import networks
from adapt.gate.limits import EdgeLimits
from adapt.round.edges import EdgeRoundConfig
from adapt.train.augment import Augmentation
from adapt.train.edge_recipes import EdgeRecipe
from adapt.train.edges import crops_of_segmentation, train
from networks.pack import Pack, write_pack
from tests.adapt.conftest import CLASSES, SIZE, toy_scene, toy_spec

#: Weights that know nothing pass.
ANY = EdgeLimits(source_drop=1.0, agreement_drop=1.0, kept=0.0, largest=1.0)


def quick(**more) -> EdgeRoundConfig:
    """A round of seconds: three rounds of training, each aligned."""
    return EdgeRoundConfig(
        **({"steps": 6, "batch": 2, "crop": SIZE, "portion": 0.9, "checkpoint_every": 2} | more)
    )


def joint_pack(path: Path) -> Pack:
    """Trained by day for a few seconds; with replay and a hold-out by day."""
    torch.manual_seed(0)
    network = networks.create("espnetv2_edges", classes=CLASSES, scale=0.5)
    spec = replace(toy_spec(), name="joint", network="espnetv2_edges", arguments={"scale": 0.5}, task="joint")
    pairs = [toy_scene(i) for i in range(16)]
    recipe = EdgeRecipe(45, batch=2, round=40, rate=6e-3, frozen_bn=False)
    draw = crops_of_segmentation(pairs, CLASSES, Augmentation(SIZE, (0.9, 1.1)))
    train(network, spec, draw, recipe, seed=0)
    replay = [(*pair, "train") for pair in pairs[:6]] + [(*toy_scene(100 + i), "holdout") for i in range(4)]
    return write_pack(path, spec, network.state_dict(), replay=replay)
