"""Published weights for CASENet: PyTorch ports, extracted Caffe blobs, and torchvision's ResNet.

This module knows tensors by name; nothing of the network itself.  `load_state_dict` checks whether the result
is complete and every shape fits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DEPTHS", "from_caffe", "from_resnet", "read_casenet"]

#: Depth of a ResNet by the number of blocks of its fourth stage; 14 is for tests.
DEPTHS = {1: 14, 6: 50, 23: 101, 36: 152}


class ResNetBackbone(Protocol):
    """A network with a ResNet in it; `NEW` are the prefixes of the parameters that a ResNet lacks."""

    @property
    def NEW(self) -> tuple[str, ...]: ...

    def state_dict(self) -> Mapping[str, Tensor]: ...


def _caffe_block(letter: str) -> int:
    """Return the index of a Caffe ResNet block: a, b, c, … or a, b1, b2, …."""
    return int(letter[1:]) if len(letter) > 1 else ord(letter) - ord("a")


_BRANCH = {"1": "downsample", "2a": "1", "2b": "2", "2c": "3"}


def from_caffe(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Caffe blobs, which extraction scripts name ``layer_0``, ``layer_1``, …, to our names.

    Caffe splits batch normalisation into two layers: bn* has the mean, the variance and a common factor to
    divide both by; scale* has weight and bias.

    Raises ValueError if a factor is 0.
    """
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, _, blob = name.rpartition("_")
        if layer.startswith("upsample_") or (layer.startswith("bn") and blob == "2"):
            continue
        kind = "scale" if layer.startswith("scale") else "bn" if layer.startswith("bn") else "conv"
        match = re.fullmatch(r"(?:res|bn|scale)([2-5])([a-z]\d*)_branch(1|2[abc])", layer)
        if match:
            stage, block, branch = match[1], _caffe_block(match[2]), _BRANCH[match[3]]
            stem = f"res{stage}.{block}."
            if branch == "downsample":
                stem += f"downsample.{0 if kind == 'conv' else 1}"
            else:
                stem += f"{'conv' if kind == 'conv' else 'bn'}{branch}"
        elif layer in ("bn_conv1", "scale_conv1"):
            stem = "bn_conv1"
        else:
            stem = layer
        if kind == "bn":
            factor = state.get(f"{layer}_2")
            scale = float(factor.flatten()[0]) if factor is not None else 1.0
            if scale == 0:
                raise ValueError(f"{layer}_2 is 0: the batch statistics were never gathered")
            out[f"{stem}.{'running_mean' if blob == '0' else 'running_var'}"] = value.flatten() / scale
        else:
            value = value.reshape(-1) if blob == "1" or kind == "scale" else value
            out[f"{stem}.{'weight' if blob == '0' else 'bias'}"] = value
    return out


def read_casenet(state: Mapping[str, Tensor], classes: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Rename a published state dict, and find the arguments of its network.

    Accepted are the PyTorch ports (our names; their fixed ``upsample_*`` weights are checked and dropped) and
    extracted Caffe blobs (``res2a_branch2a_0``, …), both with or without the wrapper ``module.``.

    Returns:
        The state dict under our names, and the arguments of `networks.create("casenet", …)`.
    Raises:
        ValueError: another class count, learned deconvolutions, an unknown depth, or other names.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "conv1_0" in state:
        state = from_caffe(state)
    if "score_cls_side5.weight" not in state:
        raise ValueError("no score_cls_side5.weight: these are not CASENet's names")
    found = state["score_cls_side5.weight"].shape[0]
    if found != classes:
        raise ValueError(f"its head has {found} classes, {classes} were asked for")
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith("upsample_"):
            if not torch.allclose(value.float(), _bilinear(value.shape), atol=1e-3):
                raise ValueError(f"{name} is no bilinear kernel: learned deconvolutions are another network")
            continue
        out[name] = value
    if "ce_fusion.weight" in out:
        out["ce_fusion.weight"] = out["ce_fusion.weight"].reshape(classes, 4, 1, 1)
    for name in [n for n in out if n.endswith("running_var")]:
        out.setdefault(name.replace("running_var", "num_batches_tracked"), torch.zeros((), dtype=torch.int64))
    blocks = 1 + max(int(m[1]) for n in out if (m := re.match(r"res4\.(\d+)\.", n)))
    if blocks not in DEPTHS:
        raise ValueError(f"res4 has {blocks} blocks; known are {sorted(DEPTHS)}")
    arguments: dict[str, object] = {"depth": DEPTHS[blocks]}
    width = out["conv1.weight"].shape[0]
    if width != 64:
        arguments["width"] = width
    return out, arguments


def _bilinear(shape: torch.Size) -> Tensor:
    """Return Caffe's bilinear filler for every output channel."""
    k = shape[-1]
    f = k // 2
    c = (2 * f - 1) / (2 * f)
    line = 1 - (torch.arange(k) / f - c).abs()
    return (line[:, None] * line[None]).expand(shape)


def from_resnet(network: ResNetBackbone, state: Mapping[str, Tensor]) -> list[str]:
    """Load the weights of a torchvision-style ResNet of the same depth into the backbone.

    Returns:
        The names of the loaded weights.
    Raises:
        ValueError: a tensor of the backbone is missing or has another shape.
    """
    own = network.state_dict()
    loaded = []
    with torch.no_grad():
        for name, tensor in own.items():
            if name.startswith(network.NEW):
                continue
            theirs = re.sub(r"^res(\d)\.", lambda m: f"layer{int(m[1]) - 1}.", name)
            theirs = theirs.replace("bn_conv1.", "bn1.") if theirs.startswith("bn_conv1.") else theirs
            if theirs not in state or state[theirs].shape != tensor.shape:
                if name.endswith("num_batches_tracked"):
                    continue
                raise ValueError(f"the ResNet has no {theirs} of shape {list(tensor.shape)}: another depth?")
            tensor.copy_(state[theirs])
            loaded.append(name)
    return loaded
