"""AdaBN: the batch statistics of the domain the network is in (Li et al., *Revisiting Batch Normalization
for Practical Domain Adaptation*, 2016).

No weight is touched, only running means and variances.  It can help a lot (CamVid day → dusk) and it can
hurt, so whoever calls it compares before and after (``adapt.gate``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["freeze", "has_statistics", "layers", "load", "mix", "reestimate", "statistics"]


def layers(network: nn.Module) -> Iterator[_BatchNorm]:
    """Every batch normalisation with running statistics."""
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            yield module


def has_statistics(network: nn.Module) -> bool:
    """False for a network that AdaBN cannot change."""
    return next(layers(network), None) is not None


def statistics(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the running means and variances by state_dict name."""
    return {
        name: tensor.detach().clone()
        for name, tensor in network.state_dict().items()
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }


def load(network: nn.Module, statistics: Mapping[str, Tensor]) -> None:
    """Put back what `statistics` gave."""
    network.load_state_dict({**network.state_dict(), **statistics})


def mix(target: Mapping[str, Tensor], present: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """(1−keep)·target + keep·present, name by name; counters are the target's."""
    return {
        name: torch.lerp(tensor, present[name], keep) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in target.items()
    }


def freeze(network: nn.Module) -> None:
    """Put batch normalisations in evaluation mode, leaving the rest (dropout) as it is."""
    for module in layers(network):
        module.eval()


@torch.no_grad()
def reestimate(network: nn.Module, batches: Iterable[Tensor], *, keep: float = 0.0) -> nn.Module:
    """Replace running statistics by those of the target, averaged over `batches` with equal weight.

    Args:
        network: changed in place; evaluation mode afterwards.
        batches: normalised float32 [N,3,H,W], as the network takes them.
        keep: share of the old statistics that stays, 0..1 (0 = AdaBN, 1 = nothing changes).

    Returns:
        The network.

    Raises:
        ValueError: no batch came, or `keep` is outside 0..1.
    """
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep is {keep}: give the share of the old statistics to keep, 0..1")
    found = list(layers(network))
    before = [(m.running_mean, m.running_var) for m in found]
    old = [(a.clone(), b.clone()) for a, b in before if a is not None and b is not None]
    momenta = [m.momentum for m in found]
    network.eval()
    for module in found:
        module.reset_running_stats()
        module.momentum = None  # cumulative average: every batch weighs the same
        module.train()
    seen = 0
    try:
        for batch in batches:
            network(batch)
            seen += 1
    finally:
        for module, momentum in zip(found, momenta, strict=True):
            module.momentum = momentum
            module.eval()
        if not seen:
            _put_back(found, old)
    if not seen and found:
        raise ValueError("AdaBN got no batch: give target frames")
    if keep:
        for module, (mean, var) in zip(found, old, strict=True):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.lerp_(mean, keep)
            module.running_var.lerp_(var, keep)
    return network


def _put_back(found: list[_BatchNorm], old: list[tuple[Tensor, Tensor]]) -> None:
    for module, (mean, var) in zip(found, old, strict=True):
        assert module.running_mean is not None
        assert module.running_var is not None
        module.running_mean.copy_(mean)
        module.running_var.copy_(var)
