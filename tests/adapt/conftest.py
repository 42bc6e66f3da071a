"""Small packs and frames for the tests of adaptation: seconds, one thread, no file outside tmp_path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import networks
from networks.labels import STREET
from networks.pack import Pack, PackSpec, write_pack

SIZE = (32, 64)
CLASSES = 4


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def toy_scene(seed: int, *, dark: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Four bands of one colour each at heights that vary, with noise; `dark` is another domain.

    frame uint8 [32,64,3], label uint8 [32,64] of four classes.
    """
    rng = np.random.default_rng(seed)
    label = np.zeros(SIZE, np.uint8)
    edges = np.sort(rng.choice(np.arange(4, 28), 3, replace=False))
    label[edges[0] :], label[edges[1] :] = 1, 2
    x = rng.integers(4, 50)
    label[edges[0] : edges[2], x : x + 10] = 3
    colours = np.array([[120, 160, 220], [90, 140, 60], [110, 110, 115], [200, 60, 50]], float)
    frame = colours[label] + rng.normal(0, 12, (*SIZE, 3))
    if dark:
        frame = frame * np.array([0.35, 0.3, 0.4]) + 6
    return np.clip(frame, 0, 255).astype(np.uint8), label


def toy_spec() -> PackSpec:
    return PackSpec(
        name="toy",
        version="1.0.0",
        network="roadnet",
        arguments={"width": 8},
        classes=STREET.classes[:CLASSES],
        colours=STREET.colours[:CLASSES],
        size=SIZE,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        training="bands by day",
        licence="Apache-2.0",
    )


@pytest.fixture(scope="session")
def toy_pack(tmp_path_factory) -> Pack:
    """A tiny network that knows the bands by day, with replay and hold-out."""
    from adapt.train import supervised
    from adapt.train.augment import Augmentation

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spec = toy_spec()
    network = networks.create("roadnet", classes=CLASSES, width=8)
    pairs = [toy_scene(i) for i in range(24)]
    recipe = supervised.Recipe(epochs=15, batch=6, augmentation=Augmentation(SIZE, (0.9, 1.1)), rate=4e-3)
    supervised.train(network, spec, pairs, recipe, seed=0)
    replay = [(*pairs[i], "train") for i in range(16)] + [(*toy_scene(100 + i), "holdout") for i in range(6)]
    return write_pack(
        tmp_path_factory.mktemp("packs") / "toy",
        spec,
        network.state_dict(),
        replay=replay,
        golden=np.stack([pairs[0][0]]),
        prior=np.full((CLASSES, 8, 16), 0.5, np.float16),
    )


@pytest.fixture(scope="session")
def toy_pack_without_replay(toy_pack, tmp_path_factory) -> Pack:
    path = tmp_path_factory.mktemp("packs") / "bare"
    return write_pack(path, replace(toy_pack.spec, name="bare"), toy_pack.state())


@pytest.fixture(scope="session")
def dark_frames() -> list[np.ndarray]:
    return [toy_scene(200 + i, dark=True)[0] for i in range(14)]


@pytest.fixture(scope="session")
def joint_pack(tmp_path_factory) -> Pack:
    """A tiny network that knows the bands and their edges by day, with replay and hold-out."""
    from tests.adapt import edges_toys

    torch.set_num_threads(1)
    return edges_toys.joint_pack(tmp_path_factory.mktemp("packs") / "joint")
