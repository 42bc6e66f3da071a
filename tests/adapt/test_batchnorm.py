"""Batch statistics of a network, estimated, mixed and loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adapt import batchnorm


def network_with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5)).eval()


def test_statistics_are_those_of_the_data():
    network = network_with_statistics()
    batches = [torch.randn(4, 3, 8, 8) * (i + 1) for i in range(3)]
    weights = {n: p.clone() for n, p in network.named_parameters()}
    batchnorm.reestimate(network, batches)
    with torch.no_grad():
        means = torch.stack([network[0](x).mean((0, 2, 3)) for x in batches]).mean(0)
        variances = torch.stack([network[0](x).transpose(0, 1).flatten(1).var(1) for x in batches]).mean(0)
    torch.testing.assert_close(network[1].running_mean, means)
    torch.testing.assert_close(network[1].running_var, variances)
    assert not network.training
    assert not network[1].training
    assert network[1].momentum == 0.1
    assert all(torch.equal(p, weights[n]) for n, p in network.named_parameters())


def test_a_part_of_the_old_statistics_can_stay():
    network, other = network_with_statistics(), network_with_statistics()
    batches = [torch.randn(4, 3, 8, 8) + 3]
    present = batchnorm.statistics(network)
    batchnorm.reestimate(network, batches)
    target = batchnorm.statistics(network)
    batchnorm.reestimate(other, batches, keep=0.25)
    mixed = batchnorm.mix(target, present, 0.25)
    torch.testing.assert_close(other[1].running_mean, mixed["1.running_mean"])
    torch.testing.assert_close(
        mixed["1.running_mean"], 0.75 * target["1.running_mean"] + 0.25 * present["1.running_mean"]
    )
    batchnorm.load(other, present)
    torch.testing.assert_close(other[1].running_var, present["1.running_var"])
    with pytest.raises(ValueError, match=r"0\.\.1"):
        batchnorm.reestimate(other, batches, keep=2)


def test_no_batch_leaves_the_statistics_alone():
    network = network_with_statistics()
    network[1].running_mean.fill_(2.0)
    with pytest.raises(ValueError, match="no batch"):
        batchnorm.reestimate(network, [])
    assert (network[1].running_mean == 2).all()
    assert not batchnorm.has_statistics(nn.Conv2d(3, 3, 1))
