"""The baselines do what their papers say and touch nothing else."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from adapt import batchnorm, inference
from adapt.baselines import BatchStatistics, Frozen, Tent, entropy
from networks.pack import normalise
from tests.adapt.conftest import toy_scene


def norm_parameters(network) -> set[str]:
    found = set()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            found |= {f"{name}.weight", f"{name}.bias"}
    return found


def state(network) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in network.named_parameters()}


def test_entropy_of_known_distributions():
    uniform = torch.zeros(1, 4, 2, 2)
    assert float(entropy(uniform)) == pytest.approx(math.log(4))
    sure = torch.zeros(1, 4, 2, 2)
    sure[:, 0] = 60
    assert float(entropy(sure)) == pytest.approx(0, abs=1e-9)
    p = np.array([0.7, 0.2, 0.1])
    logits = torch.tensor(np.log(p), dtype=torch.float64).reshape(1, 3, 1, 1)
    assert float(entropy(logits)) == pytest.approx(float(-(p * np.log(p)).sum()))


def test_tent_lowers_entropy_and_moves_scale_and_shift_alone(toy_pack, dark_frames):
    tent = Tent(toy_pack, rate=1e-3)
    untouched = state(tent.network)
    for _ in range(8):
        labels = tent.answer(dark_frames[:6])
    assert labels.shape == (6, 32, 64)
    assert labels.dtype == np.uint8
    assert all(after < before for before, after in pairwise(tent.entropies))
    moved = {name for name, p in tent.network.named_parameters() if not torch.equal(p, untouched[name])}
    assert moved
    assert moved <= norm_parameters(tent.network)
    tent.reset()
    assert all(torch.equal(p, untouched[name]) for name, p in tent.network.named_parameters())


def test_tent_answers_before_it_steps(toy_pack, dark_frames):
    """A huge rate ruins the next answer, not this one."""
    one, other = Tent(toy_pack, rate=1e-9), Tent(toy_pack, rate=10.0)
    np.testing.assert_array_equal(one.answer(dark_frames[:4]), other.answer(dark_frames[:4]))
    assert (one.answer(dark_frames[:4]) != other.answer(dark_frames[:4])).any()


def test_batch_statistics_move_statistics_alone(toy_pack, dark_frames):
    method = BatchStatistics(toy_pack, momentum=0.5)
    before, old = state(method.network), batchnorm.statistics(method.network)
    method.answer(dark_frames[:6])
    assert all(torch.equal(p, before[name]) for name, p in method.network.named_parameters())
    fresh = toy_pack.network()
    batch = normalise(inference.as_tensor(dark_frames[:6]), toy_pack.spec)
    batchnorm.reestimate(fresh, [batch])
    name = next(k for k in old if k.endswith("running_mean"))
    half = 0.5 * old[name] + 0.5 * batchnorm.statistics(fresh)[name]
    torch.testing.assert_close(batchnorm.statistics(method.network)[name], half)


def test_momentum_nought_is_frozen(toy_pack, dark_frames):
    still = BatchStatistics(toy_pack, momentum=0.0)
    for _ in range(2):
        answer = still.answer(dark_frames[:4])
    np.testing.assert_array_equal(answer, Frozen(toy_pack).answer(dark_frames[:4]))
    with pytest.raises(ValueError, match=r"0\.\.1"):
        BatchStatistics(toy_pack, momentum=2)


def test_batch_statistics_help_in_the_dark(toy_pack):
    scenes = [toy_scene(700 + i, dark=True) for i in range(18)]
    frozen, follow = Frozen(toy_pack), BatchStatistics(toy_pack)
    right = {"frozen": 0.0, "follow": 0.0}
    for i in range(0, 18, 6):
        frames, truth = [x for x, _ in scenes[i : i + 6]], np.stack([y for _, y in scenes[i : i + 6]])
        right["frozen"] += (frozen.answer(frames) == truth).mean()
        right["follow"] += (follow.answer(frames) == truth).mean()
    assert right["follow"] > right["frozen"]
