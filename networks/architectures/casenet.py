"""CASENet: Yu, Feng, Liu and Ramalingam, "CASENet: Deep Category-Aware Semantic Edge Detection", CVPR 2017,
and the form of it that SEAL (ECCV 2018) trains.  Answers an edge logit a class, not a segmentation.

A ResNet whose first convolution keeps full resolution (stride 1), dilated after that; four taps; one channel
from each of the first three, K from the last; "shared concatenation": every class is fused from its own last
channel and the three shared ones.

Attribute names are those of the published PyTorch ports, so their state dicts load by name; Caffe's names and
torchvision's ResNet are translated by ``read_checkpoint``.  Two things differ in form, not in value:

  * the fixed bilinear deconvolutions hold no weights: they are a bilinear enlargement of the zero-padded map,
    which is the same linear map, its faded borders included (``enlarge``);
  * for export the slices, the concatenation of 4K channels and the grouped convolution become one dense 1x1
    convolution of K + 3 (``fused()``).

Input as published: BGR, 0..255, minus the mean: a pack says channel_order "bgr", mean ``MEAN`` and std
``STD``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.base import SegmentationNetwork

__all__ = [
    "MEAN",
    "STD",
    "CASENet",
    "dense_fusion",
    "enlarge",
    "from_resnet",
    "fuse",
    "read_checkpoint",
    "shared_fusion",
]

#: In a pack's units (channel values scaled to 0..1), BGR.
MEAN = (104.008 / 255, 116.669 / 255, 122.675 / 255)
STD = (1 / 255, 1 / 255, 1 / 255)

N = TypeVar("N", bound=nn.Module)

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    14: (1, 1, 1, 1),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Caffe's fixed bilinear deconvolution (kernel 2s, stride s, padding s/2): [N,C,h,w] -> [N,C,s·h,s·w].

    Inside it is half-pixel bilinear interpolation; within s/2 pixels of the border it fades towards the zero
    padding, which ``F.interpolate`` alone does not.
    """
    padded = F.pad(x, (1, 1, 1, 1))
    y = F.interpolate(padded, scale_factor=float(factor), mode="bilinear", align_corners=False)
    return y[:, :, factor:-factor, factor:-factor]


class Bottleneck(nn.Module):
    """ResNet's bottleneck in Caffe's form: the first 1x1 convolution carries the stride."""

    def __init__(self, inputs: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def shared_fusion(classes: int) -> nn.Conv2d:
    """Shared concatenation [A5_1, s1, s2, s3, A5_2, s1, s2, s3, …]'s grouped 1x1 convolution.

    weight: [K,4,1,1] as published; the slot of A5 starts at 1, so that fusion starts as the identity on A5.
    (A plain Conv2d, not a subclass: torch.fx would trace into one.)
    """
    out = nn.Conv2d(4 * classes, classes, 1, groups=classes)
    nn.init.normal_(out.weight, std=0.01)
    assert out.bias is not None
    nn.init.zeros_(out.bias)
    with torch.no_grad():
        out.weight[:, 0] = 1
    return out


def dense_fusion(fusion: nn.Conv2d) -> nn.Conv2d:
    """The same map as one dense 1x1 convolution of [A5, s1, s2, s3]: no slices, K + 3 channels instead of 4K.

    W = [diag(w_A5), w_1, w_2, w_3].
    """
    k = fusion.out_channels
    out = nn.Conv2d(k + 3, k, 1).to(fusion.weight)
    assert out.bias is not None
    assert fusion.bias is not None
    with torch.no_grad():
        out.weight.zero_()
        out.weight[:, :k, 0, 0] = torch.diag(fusion.weight[:, 0, 0, 0])
        out.weight[:, k:] = fusion.weight[:, 1:]
        out.bias.copy_(fusion.bias)
    return out


def fuse(fusion: nn.Conv2d, a5: Tensor, side1: Tensor, side2: Tensor, side3: Tensor, classes: int) -> Tensor:
    """Apply either form of the fusion: float32 [N,K,H,W] and three [N,1,H,W] -> [N,K,H,W]."""
    shared = [side1, side2, side3]
    if fusion.groups == 1:
        parts = [a5, *shared]
    else:
        parts = [t for k in range(classes) for t in (a5[:, k : k + 1], *shared)]
    out: Tensor = fusion(torch.cat(parts, 1))
    return out


class CASENet(SegmentationNetwork):
    """CASENet.

    Args:
        classes: edge classes K.
        depth: 50, 101 (the published one) or 152; 14 has one block a stage and is for tests.
        width: channels of the stem, 64 as published.
    Shape:
        float32 [N,3,H,W] -> edge logits float32 [N,K,H,W]; H and W multiples of 8.  ``sides`` gives both
        supervised maps.  Probabilities are sigmoids: classes overlap.
    """

    output_stride = 1
    size_multiple = 8
    TASK = "edges"
    TASKS: ClassVar[Mapping[str, str]] = {"edges": "forward"}
    EXAMPLES = ({"depth": 14, "width": 8},)
    #: Parameters made for this task: the published recipe moves them ten times as fast (biases twenty).
    NEW = ("score_", "ce_fusion")

    def __init__(self, *, classes: int, depth: int = 101, width: int = 64) -> None:
        super().__init__()
        self.classes = classes
        if depth not in BLOCKS:
            raise ValueError(f"casenet: depth {depth!r} is unknown; choose one of: {sorted(BLOCKS)}")
        self.conv1 = nn.Conv2d(3, width, 7, 1, 3, bias=False)
        self.bn_conv1 = nn.BatchNorm2d(width)
        self.pool1 = nn.MaxPool2d(3, 2, 0, ceil_mode=True)
        inputs = width
        stages: list[nn.Sequential] = []
        for i, (blocks, stride, dilation) in enumerate(
            zip(BLOCKS[depth], (1, 2, 2, 1), (2, 2, 2, 4), strict=True)
        ):
            w = width << i
            stage = [Bottleneck(inputs, w, stride, dilation)]
            stage += [Bottleneck(4 * w, w, 1, dilation) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            inputs = 4 * w
        self.res2, self.res3, self.res4, self.res5 = stages
        self.score_edge_side1 = nn.Conv2d(width, 1, 1)
        self.score_edge_side2 = nn.Conv2d(4 * width, 1, 1)
        self.score_edge_side3 = nn.Conv2d(8 * width, 1, 1)
        self.score_cls_side5 = nn.Conv2d(32 * width, classes, 1)
        self.ce_fusion = shared_fusion(classes)
        self._initialise()

    def _initialise(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and name != "ce_fusion":
                if name.startswith(self.NEW):
                    nn.init.normal_(module.weight, std=0.01)
                    assert module.bias is not None
                    nn.init.zeros_(module.bias)
                else:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A5, fused) logits, float32 [N,K,H,W] each: the two maps that are supervised, with equal weight."""
        x = torch.relu(self.bn_conv1(self.conv1(x)))
        side1 = self.score_edge_side1(x)
        x = self.res2(self.pool1(x))
        side2 = enlarge(self.score_edge_side2(x), 2)
        x = self.res3(x)
        side3 = enlarge(self.score_edge_side3(x), 4)
        a5 = enlarge(self.score_cls_side5(self.res5(self.res4(x))), 8)
        return a5, fuse(self.ce_fusion, a5, side1, side2, side3, self.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.sides(x)[1]

    @property
    def edge_count(self) -> int:
        return self.classes

    def fused(self) -> CASENet:
        """A copy whose fusion is one dense convolution: the same answers, for export."""
        return with_dense_fusion(self)


def with_dense_fusion(network: N) -> N:
    """A copy of any network with a ``ce_fusion`` in its dense form."""
    out = copy.deepcopy(network)
    fusion = out.ce_fusion
    assert isinstance(fusion, nn.Conv2d)
    if fusion.groups > 1:
        out.ce_fusion = dense_fusion(fusion)
    return out


# ------------------------------------------------------------------------------------ published state dicts
def _caffe_block(letter: str) -> int:
    """Index of a Caffe ResNet block: a, b, c, … or a, b1, b2, …."""
    return int(letter[1:]) if len(letter) > 1 else ord(letter) - ord("a")


_BRANCH = {"1": "downsample", "2a": "1", "2b": "2", "2c": "3"}


def _from_caffe(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Caffe blobs, named ``layer_0``, ``layer_1``, … as extraction scripts write them, to our names.

    Caffe splits batch normalisation in two layers: bn* holds mean, variance and a common factor to divide by,
    scale* weight and bias.
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


def read_checkpoint(state: Mapping[str, Tensor], classes: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """A published state dict under our names, and the depth it was made for.

    Taken: the PyTorch ports (our names; their fixed ``upsample_*`` weights are dropped after a look),
    extracted Caffe blobs (``res2a_branch2a_0``, …), either with the wrapper ``module.``.

    Raises:
        ValueError: another class count, learned deconvolutions, or names of none of these.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if "conv1_0" in state:
        state = _from_caffe(state)
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
    depth = next((d for d, b in BLOCKS.items() if b[2] == blocks), None)
    if depth is None:
        raise ValueError(f"res4 has {blocks} blocks; known are {sorted(b[2] for b in BLOCKS.values())}")
    arguments: dict[str, object] = {"depth": depth}
    width = out["conv1.weight"].shape[0]
    if width != 64:
        arguments["width"] = width
    return out, arguments


def _bilinear(shape: torch.Size) -> Tensor:
    """Caffe's bilinear filler, for every output channel."""
    k = shape[-1]
    f = k // 2
    c = (2 * f - 1) / (2 * f)
    line = 1 - (torch.arange(k) / f - c).abs()
    return (line[:, None] * line[None]).expand(shape)


def from_resnet(network: CASENet, state: Mapping[str, Tensor]) -> list[str]:
    """Start the backbone from a torchvision-style ResNet of the same depth; returns what was loaded.

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
