"""A pretrained ResNet under CASENet's backbone: torchvision's names, Caffe's, or CASENet's own checkpoint.

``start`` finds out which of them a state dict is, loads what belongs to the backbone, and returns how its
inputs are normalised, because torchvision's networks see RGB by mean and deviation and Caffe's see BGR minus
the mean.  Source of the names: torchvision's ``ResNet`` and He et al.'s published Caffe models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.architectures.casenet import MEAN, STD, CASENet
from networks.checkpoints.casenet import from_caffe, from_resnet, read_casenet

__all__ = ["Start", "start"]

_WRAPPERS = ("module.", "backbone.", "encoder.", "resnet.", "model.")


@dataclass(frozen=True)
class Start:
    """names: the weights that were loaded; the rest: how a pack of them normalises its input."""

    names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    channel_order: str
    kind: str


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict without the prefixes that trainers put before a backbone's names."""
    out = dict(state)
    while True:
        backbone = [n for n in out if re.search(r"(^|\.)(layer1\.|res2|conv1[._])", n)]
        found = next((w for w in _WRAPPERS if backbone and all(n.startswith(w) for n in backbone)), None)
        if found is None:
            return out
        out = {n.removeprefix(found): v for n, v in out.items()}


def _refuse_rest(state: Mapping[str, Tensor], used: set[str], pattern: str) -> None:
    """Raise ValueError if blocks of the backbone are left over: the ResNet is deeper than the network."""
    rest = sorted(n for n in state if re.match(pattern, n) and n not in used)
    if rest:
        raise ValueError(f"{len(rest)} of its tensors have no place, such as {rest[0]}: another depth?")


def _as_blobs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caffe's layers by number of blob, whichever way a converter wrote them.

    ``res2a_branch2a.weight`` becomes ``res2a_branch2a_0``.  A batch normalisation that a converter merged
    with its scale layer (weight, bias, running_mean, running_var under bn…) is taken apart again.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, _, part = name.rpartition(".")
        if not layer:
            out[name] = value
        elif part in ("running_mean", "running_var"):
            out[f"{layer}_{0 if part == 'running_mean' else 1}"] = value
        elif part in ("weight", "bias"):
            scale = layer.replace("bn", "scale", 1) if layer.startswith("bn") else layer
            out[f"{scale}_{0 if part == 'weight' else 1}"] = value
    return out


def _without_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fold the bias that Caffe's first convolution may have into the mean of the statistics after it."""
    bias = state.pop("conv1.bias", None)
    if bias is not None and "bn_conv1.running_mean" in state:
        state["bn_conv1.running_mean"] = state["bn_conv1.running_mean"] - bias
    return state


def start(network: CASENet, state: Mapping[str, Tensor]) -> Start:
    """Load a backbone (or a whole CASENet) into ``network``, in place.

    Raises:
        ValueError: the names are none of the known ones, or a tensor of the backbone is missing or has
            another shape (another depth or width).
    """
    from networks.import_checkpoint import IMAGENET_MEAN, IMAGENET_STD

    state = _unwrapped(state)
    names = set(state)
    if any(n.startswith("layer1.") for n in names):
        loaded = from_resnet(network, state)
        used = {re.sub(r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", n) for n in loaded}
        _refuse_rest({n: v for n, v in state.items() if v.ndim}, used, r"layer\d\.")
        return Start(tuple(loaded), IMAGENET_MEAN, IMAGENET_STD, "rgb", "torchvision's ResNet")
    caffe = any(re.match(r"res2a_branch2a[._]", n) for n in names)
    if "score_cls_side5.weight" in names or "score_cls_side5_0" in names:
        found, _ = read_casenet(_as_blobs(state) if caffe else state, network.classes)
        network.load_state_dict(found)
        return Start(tuple(found), MEAN, STD, "bgr", "CASENet")
    if not caffe:
        shown = ", ".join(sorted(names)[:3])
        raise ValueError(
            f"its names ({shown}, …) are neither torchvision's ResNet (layer1.0.conv1.weight), Caffe's "
            "(res2a_branch2a) nor CASENet's (score_cls_side5)"
        )
    found = _without_bias(from_caffe(_as_blobs(state)))
    own = network.state_dict()
    loaded = []
    with torch.no_grad():
        for name, tensor in own.items():
            if name.startswith(network.NEW) or name.endswith("num_batches_tracked"):
                continue
            if name not in found or found[name].shape != tensor.shape:
                have = list(found[name].shape) if name in found else "none"
                raise ValueError(
                    f"it has {have} for {name}, {list(tensor.shape)} is needed: another depth or width?"
                )
            tensor.copy_(found[name])
            loaded.append(name)
    _refuse_rest(found, set(loaded), r"res\d\.")
    return Start(tuple(loaded), MEAN, STD, "bgr", "Caffe's ResNet")
