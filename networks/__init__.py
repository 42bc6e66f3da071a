"""Segmentation architectures by name, their label spaces and the model pack.

This package knows torch and what a network is.  It knows nothing of engines, servers or adaptation:
`export` and `adapt` import it, it imports neither.  Importing `networks` costs nothing: each
architecture is imported when it is first asked for.

A network is an `nn.Module` with

    forward(x float32 [N,3,H,W], normalised) -> logits float32 [N,C,H/s,W/s]

and the attributes `output_stride` (s) and `size_multiple` (H and W must be multiples of it).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from common.launch import watch

if TYPE_CHECKING:
    from networks.base import SegmentationNetwork

watch()

__all__ = ["architecture", "create", "names"]

_NETWORKS = {
    "espnetv2": ("networks.architectures.espnetv2", "ESPNetv2"),
    "ddrnet": ("networks.architectures.ddrnet", "DDRNet"),
    "deeplabv2": ("networks.architectures.deeplabv2", "DeepLabV2"),
    "fcn8s": ("networks.architectures.fcn8s", "FCN8s"),
    "pidnet": ("networks.architectures.pidnet", "PIDNet"),
    "resnet38": ("networks.architectures.resnet38", "ResNet38"),
    "roadnet": ("networks.architectures.roadnet", "RoadNet"),
    "casenet": ("networks.architectures.casenet", "CASENet"),
    "casenet_light": ("networks.architectures.casenet_light", "CASENetLight"),
    "espnetv2_edges": ("networks.architectures.espnetv2_edges", "ESPNetv2Edges"),
}


def names() -> list[str]:
    """The names `create` accepts, sorted."""
    return sorted(_NETWORKS)


def architecture(name: str) -> type[SegmentationNetwork]:
    """The class behind a name: its strides and examples without building it (some hold 500 MB of weights).

    Raises:
        ValueError: unknown name.
    """
    if name not in _NETWORKS:
        raise ValueError(f"network {name!r} is unknown; choose one of: {', '.join(names())}")
    module, attribute = _NETWORKS[name]
    cls: type[SegmentationNetwork] = getattr(importlib.import_module(module), attribute)
    return cls


def create(name: str, *, classes: int, **arguments: Any) -> SegmentationNetwork:
    """Build a freshly initialised network.

    Args:
        name: one of `names()`.
        classes: number of output channels, 1 to 255 (a class index fits a byte and 255 means "ignore").
        arguments: keyword arguments of that architecture, for example `scale=1.0` of `espnetv2`.
    Raises:
        ValueError: unknown name, class count out of range, or arguments the architecture refuses.
    """
    cls = architecture(name)
    if not isinstance(classes, int) or not 1 <= classes <= 255:
        raise ValueError(f"network {name!r}: classes must be an integer from 1 to 255, not {classes!r}")
    try:
        network: SegmentationNetwork = cls(classes=classes, **arguments)
    except (TypeError, RuntimeError, ArithmeticError, LookupError) as error:  # torch's, for impossible sizes
        raise ValueError(f"network {name!r} refuses its arguments {arguments}: {error}") from error
    return network
