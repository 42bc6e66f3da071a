"""Shared makers of small packs.  One torch thread: the machine is shared and small."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import networks
from networks.labels import STREET
from networks.pack import PackSpec

torch.set_num_threads(1)


@pytest.fixture
def spec() -> PackSpec:
    return PackSpec(
        name="tiny",
        version="1.0.0",
        network="roadnet",
        arguments={"width": 8},
        classes=STREET.classes,
        colours=STREET.colours,
        size=(64, 96),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        training="random weights",
        licence="Apache-2.0",
    )


@pytest.fixture
def state(spec: PackSpec) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return networks.create(spec.network, classes=len(spec.classes), **spec.arguments).state_dict()


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
