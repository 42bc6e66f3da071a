"""Fold batch normalisation into the convolution before it, keeping every name.

A `Folding` is made once per architecture and is a pure function of the weights afterwards: the same map
turns the weights of the first export and those of every later refit into what the engine holds.  Names
stay those of the state_dict:

    conv.weight                  the convolution's weight times the normalisation's scale
    conv.bias                    its bias, where the convolution has one, ...
    bn.bias                      ... and else the shift goes under the name of the normalisation's bias
    bn.weight, bn.bias           scale and shift of a normalisation that follows no convolution

Knows torch graphs; nothing of ONNX.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from common.text import one_line
from export.errors import ExportError


@dataclass(frozen=True)
class _Norm:
    """One batch normalisation: its path, its epsilon, and the convolution it folds into ("": none)."""

    path: str
    eps: float
    conv: str
    conv_has_bias: bool
    #: A transposed convolution has its output channels in the second dimension of the weight.
    transposed: bool
    groups: int


class Folding:
    """The traced network without normalisations that fold, and the map of weights that goes with it.

    Attributes:
        graph: the traced network; normalisations that fold are gone from it.
    """

    def __init__(self, network: nn.Module, method: str = "forward") -> None:
        """Trace one method of a network.  Raises ExportError if torch.fx cannot."""
        graph = _trace(network, method)
        modules = dict(network.named_modules())
        self._norms = _plan(graph, modules)
        self.folded = {norm.path for norm in self._norms if norm.conv}
        self.graph = _without(graph, self.folded)
        self.modules = modules
        #: Where a folded convolution without a bias of its own finds one: convolution path -> name.
        self.bias_names = {n.conv: f"{n.path}.bias" for n in self._norms if n.conv and not n.conv_has_bias}

    def weights(self, state: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The engine's weights, float32, by state_dict name.  Folded in float64, rounded once."""
        exact = {k: v.detach().cpu().double() for k, v in state.items() if v.is_floating_point()}
        result = dict(exact)
        for norm in self._norms:
            stats = {k: exact[f"{norm.path}.{k}"] for k in ("running_mean", "running_var")}
            channels = stats["running_var"].shape[0]
            gamma = exact.get(f"{norm.path}.weight", torch.ones(channels, dtype=torch.float64))
            beta = exact.get(f"{norm.path}.bias", torch.zeros(channels, dtype=torch.float64))
            scale = gamma / torch.sqrt(stats["running_var"] + norm.eps)
            shift = beta - stats["running_mean"] * scale
            for key in ("weight", "bias", "running_mean", "running_var"):
                result.pop(f"{norm.path}.{key}", None)
            if not norm.conv:
                result[f"{norm.path}.weight"], result[f"{norm.path}.bias"] = scale, shift
                continue
            weight = exact[f"{norm.conv}.weight"]
            if norm.transposed:
                parts = scale.reshape(norm.groups, 1, -1).expand(-1, weight.shape[0] // norm.groups, -1)
                result[f"{norm.conv}.weight"] = weight * parts.reshape(weight.shape[0], -1, 1, 1)
            else:
                result[f"{norm.conv}.weight"] = weight * scale.reshape(-1, 1, 1, 1)
            if norm.conv_has_bias:
                result[f"{norm.conv}.bias"] = exact[f"{norm.conv}.bias"] * scale + shift
            else:
                result[f"{norm.path}.bias"] = shift
        return {k: v.to(torch.float32).numpy() for k, v in result.items()}


def _trace(network: nn.Module, method: str) -> fx.Graph:
    """Traced as it is when it infers; the modes of its modules are as before afterwards."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    tracer = fx.Tracer()
    tracer.traced_func_name = method
    try:
        return tracer.trace(network)
    except Exception as error:  # fx raises whatever the network's own code raises on a proxy
        raise ExportError(
            f"network {type(network).__name__} cannot be traced: {one_line(error)}; "
            "control flow may not depend on the input, wrap what depends on its size in torch.fx.wrap"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode


def _plan(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[_Norm]:
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    norms = []
    for node in graph.nodes:
        norm = modules[node.target] if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        if norm.running_mean is None:
            raise ExportError(
                f"{node.target} keeps no running statistics; an engine cannot normalise by batch"
            )
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        folds = (
            isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
            and len(before.users) == 1
            # A module that is applied twice has one weight for two normalisations.
            and calls[before.target] == 1
            and calls[node.target] == 1
        )
        norms.append(
            _Norm(
                path=str(node.target),
                eps=float(norm.eps),
                conv=str(before.target) if folds else "",
                conv_has_bias=folds and conv.bias is not None,  # type: ignore[union-attr]
                transposed=isinstance(conv, nn.ConvTranspose2d),
                groups=conv.groups if folds else 1,  # type: ignore[union-attr,arg-type]
            )
        )
    return norms


def _without(graph: fx.Graph, folded: set[str]) -> fx.Graph:
    graph = copy.deepcopy(graph)
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in folded:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.lint()
    return graph
