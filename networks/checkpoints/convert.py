"""Published state dicts, renamed to this project's names.

Most submodules carry their authors' names already, so the rules here are few: wrappers taken off, the
training-only heads left out, other releases' names (mxnet's ResNet-38, the ImageNet VGG-16) translated.
Each `read_…` is the `read_checkpoint` of its architecture; `networks.import_checkpoint` calls it.

Known for certain, because they follow from the published definitions of the networks: the names of DDRNet
and PIDNet, of torchvision's VGG and ResNet, of ResNet-38 in mxnet and in its ports to torch.  Not checked
against a downloaded file: which prefixes a given release put before them, hence all known ones are taken off.

This module knows tensors by name; nothing of the networks themselves.  `load_state_dict` checks whether the
result is complete and every shape fits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Result = tuple[dict[str, Tensor], dict[str, object]]

#: Prefixes that trainers put before every name: data-parallel, a "network plus loss" module, DeepLab's
#: multi-scale wrapper.
_WRAPPERS = ("module.", "model.", "Scale.")
_TRAINING_ONLY = (r"(sem_|bd_)?loss\.", r"criterion\.")


def rename(
    state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]] = (), drop: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Take wrappers off, leave out what matches `drop`, and apply the first rule that matches each name.

    Args:
        state: names to tensors, as published.
        rules: (pattern, replacement) of regular expressions on whole names.
        drop: regular expressions matched at the beginning of a name.
    Returns:
        The renamed state dict.  Files older than torch 0.4.1 lack the step counters of batch
        normalisation (which evaluation ignores): they are added as zeros.
    Raises:
        ValueError: two names become one.
    """
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for published, value in state.items():
        name = published
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if any(re.match(pattern, name) for pattern in (*_TRAINING_ONLY, *drop)):
            continue
        for pattern, replacement in rules:
            new, matches = re.subn(rf"\A(?:{pattern})\Z", replacement, name)
            if matches:
                name = new
                break
        if name in result:
            raise ValueError(f"{published!r} and {origin[name]!r} would both become {name!r}")
        result[name], origin[name] = value, published
    for name in list(result):
        counter = name.removesuffix("running_var") + "num_batches_tracked"
        if name.endswith(".running_var") and counter not in result:
            result[counter] = torch.zeros((), dtype=torch.int64)
    return result


def _width(state: Mapping[str, Tensor], first: str, head: str, classes: int, what: str) -> int:
    """Channels of the first convolution, once the file is known to be that network with that many outputs."""
    for name in (first, head):
        if name not in state:
            raise ValueError(f"it is not a segmentation {what}: it lacks {name!r}")
    outputs = int(state[head].shape[0])
    if outputs != classes:
        raise ValueError(f"its head has {outputs} outputs, the label space {classes} classes")
    return int(state[first].shape[0])


def _outputs(state: Mapping[str, Tensor], name: str) -> int:
    """Return the output channels of a convolution.  Raises ValueError if it is missing."""
    if name not in state:
        raise ValueError(f"it lacks {name!r}")
    return int(state[name].shape[0])


def read_ddrnet(state: Mapping[str, Tensor], classes: int) -> Result:
    """DDRNet-23-slim or -23 as its authors publish it; the auxiliary head `seghead_extra` is left out."""
    state = rename(state, drop=[r"seghead_extra\."])
    width = _width(state, "conv1.0.weight", "final_layer.conv2.weight", classes, "DDRNet")
    return state, {"width": width, "pyramid": _outputs(state, "spp.scale0.2.weight")}


def read_pidnet(state: Mapping[str, Tensor], classes: int) -> Result:
    """PIDNet-S or -M as its authors publish it; the auxiliary heads `seghead_p`, `seghead_d` are left out."""
    state = rename(state, drop=[r"seghead_[pd]\."])
    width = _width(state, "conv1.0.weight", "final_layer.conv2.weight", classes, "PIDNet")
    if "spp.process1.0.weight" in state:
        raise ValueError("it is PIDNet-L, whose pyramid and boundary branch are others; S and M are built")
    pyramid, head = (_outputs(state, f"{name}.weight") for name in ("spp.scale0.2", "final_layer.conv1"))
    return state, {"width": width, "pyramid": pyramid, "head": head}


# Convolutions of VGG-16 in order: (stage, position) to the index in torchvision's flat list.
_VGG = dict(
    zip(
        [(s, i) for s, count in enumerate((2, 2, 3, 3, 3), start=1) for i in range(1, count + 1)],
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        strict=True,
    )
)


def vgg16(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VGG-16 under torchvision's names (`features.N`, `classifier.N`) or Caffe's (`conv1_1`, …, `fc6`).

    The fully connected layers become the convolutions of FCN (7x7 and 1x1), the ImageNet classifier is
    left out: a start for training, not yet a segmentation network.
    Raises:
        ValueError: VGG-16 with batch normalisation.
    """
    if any(name.endswith("features.1.running_mean") for name in state):
        raise ValueError("it is VGG-16 with batch normalisation; FCN-8s is built on the plain one")
    rules = [(rf"conv{s}_{i}\.(.*)", rf"features.{n}.\1") for (s, i), n in _VGG.items()]
    rules += [(r"classifier\.0\.(.*)", r"fc6.\1"), (r"classifier\.3\.(.*)", r"fc7.\1")]
    result = rename(state, rules, drop=[r"classifier\.6\.", r"fc8\."])
    for name, kernel in (("fc6.weight", 7), ("fc7.weight", 1)):
        if name in result and result[name].ndim == 2:
            outputs, inputs = result[name].shape
            result[name] = result[name].reshape(outputs, inputs // kernel**2, kernel, kernel)
    return result


def read_fcn8s(state: Mapping[str, Tensor], classes: int) -> Result:
    """FCN-8s under the names of the Caffe release and its ports to torch (`conv1_1`, …, `upscore8`).

    The last enlargement `upscore8` is left out: the graph contract enlarges.  A file in which it was
    learned instead of kept bilinear cannot be represented and is refused.
    """
    last = {name: value for name, value in rename(state).items() if name.startswith("upscore8.")}
    for value in last.values():
        taps = 1 - (torch.arange(16) - 7.5).abs() / 8
        kernel = taps[:, None] * taps[None, :]
        plain = torch.eye(value.shape[0])[:, :, None, None] * kernel
        if value.shape != plain.shape or not torch.allclose(value.float(), plain, atol=1e-4):
            raise ValueError("its 'upscore8' is not the fixed bilinear enlargement by 8; it cannot be kept")
    result = {name: value for name, value in vgg16(state).items() if not name.startswith("upscore8.")}
    return result, {"width": _width(result, "features.0.weight", "score_fr.weight", classes, "FCN-8s")}


_MXNET_BN = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


def _resnet38_rules() -> list[tuple[str, str]]:
    rules = [
        (r"(?:arg:)?(conv1a|conv6a)_(weight|bias)", r"\1.\2"),
        (r"(?:arg:)?linear\d+_(weight|bias)", r"classify.\1"),
    ]
    # Units: "2a" is the first of its stage, "2b1" the second, …; here b2, b2_1, …
    rules += [
        (r"(?:arg:)?res(\d)a_(branch\w+)_weight", r"b\1.conv_\2.weight"),
        (r"(?:arg:)?res(\d)b(\d)_(branch\w+)_weight", r"b\1_\2.conv_\3.weight"),
    ]
    for theirs, ours in _MXNET_BN.items():
        rules += [
            (rf"(?:arg:|aux:)?bn7_{theirs}", rf"bn7.{ours}"),
            (rf"(?:arg:|aux:)?bn(\d)a_(branch[^_]+)_{theirs}", rf"b\1.bn_\2.{ours}"),
            (rf"(?:arg:|aux:)?bn(\d)b(\d)_(branch[^_]+)_{theirs}", rf"b\1_\2.bn_\3.{ours}"),
        ]
    return rules


def read_resnet38(state: Mapping[str, Tensor], classes: int) -> Result:
    """ResNet-38 A1 under mxnet's names (`res2a_branch2a_weight`, `arg:` or not) or the torch ports'."""
    state = rename(state, _resnet38_rules(), drop=[r"fc8\.", r"(?:arg:)?linear1000_"])
    return state, {"width": _width(state, "conv1a.weight", "classify.weight", classes, "ResNet-38")}


def read_deeplabv2(state: Mapping[str, Tensor], classes: int) -> Result:
    """DeepLab-v2 under the names of its ports to torch (torchvision's ResNet, then `layer5.conv2d_list.N`).

    Files of two-level training hold a second classifier, `layer6`, on the last stage: it is the one taken.
    """
    result = rename(state, drop=[r"fc\."])
    if "layer6.conv2d_list.0.weight" in result:
        result = {k: v for k, v in result.items() if not k.startswith("layer5.")}
        result = {re.sub(r"\Alayer6\.", "layer5.", k): v for k, v in result.items()}
    width = _width(result, "conv1.weight", "layer5.conv2d_list.0.weight", classes, "DeepLab-v2")
    blocks = {name.split(".")[1] for name in result if name.startswith("layer3.")}
    depth = {6: 50, 23: 101}.get(len(blocks))
    if depth is None:
        raise ValueError(f"its third stage has {len(blocks)} units; ResNet-50 has 6 and ResNet-101 has 23")
    return result, {"depth": depth, "width": width}
