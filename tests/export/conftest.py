"""Small packs to export.  Random weights whose batch normalisations do something."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from networks.labels import STREET
from networks.pack import Pack, PackSpec, write_pack

SIZE = (64, 96)


def describe(**changes) -> PackSpec:
    fields = {
        "name": "tiny",
        "version": "1.0.0",
        "network": "roadnet",
        "arguments": {"width": 8},
        "classes": STREET.classes,
        "colours": STREET.colours,
        "size": SIZE,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "training": "random weights",
        "licence": "Apache-2.0",
    }
    return PackSpec(**{**fields, **changes})


def weights(spec: PackSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    network = spec.create()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network.state_dict()


def street_like(count: int = 3, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth frames, so that labels form regions with edges instead of noise."""
    rng = np.random.default_rng(0)
    frames = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), np.uint8))
        frames.append(np.array(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC)))
    return np.stack(frames)


@pytest.fixture(scope="session")
def pack(tmp_path_factory) -> Pack:
    spec = describe()
    return write_pack(tmp_path_factory.mktemp("packs") / "tiny", spec, weights(spec), golden=street_like())


@pytest.fixture
def make_pack(tmp_path):
    def make(name="other", *, golden=None, seed=0, **changes) -> Pack:
        spec = describe(**changes)
        return write_pack(tmp_path / name, spec, weights(spec, seed), golden=golden)

    return make
