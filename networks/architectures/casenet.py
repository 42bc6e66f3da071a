"""CASENet: Yu, Feng, Liu and Ramalingam, "CASENet: Deep Category-Aware Semantic Edge Detection", CVPR 2017,
and the form of it that SEAL (ECCV 2018) trains.  The answer is one edge logit per class, not a segmentation.

A ResNet whose first convolution keeps full resolution (stride 1), dilated after that; four taps; one channel
from each of the first three, K from the last; "shared concatenation": every class is fused from its own last
channel and the three shared ones.

Attribute names are those of the published PyTorch ports, so their state dicts load by name;
``networks.checkpoints.casenet`` translates Caffe's names and torchvision's.  Two things differ in form, not
in value:

  * the fixed bilinear deconvolutions have no weights: they are a bilinear enlargement of the zero-padded map,
    which is the same linear map, its faded borders included (``enlarge``);
  * for export the slices, the concatenation of 4K channels and the grouped convolution become one dense 1x1
    convolution of K + 3 (``fused()``).

Input as published: BGR, 0..255, minus the mean.  A pack of it has channel_order "bgr", mean ``MEAN`` and std
``STD``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.base import SegmentationNetwork
from networks.checkpoints.casenet import read_casenet as read_checkpoint

__all__ = [
    "MEAN",
    "STD",
    "CASENet",
    "dense_fusion",
    "enlarge",
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
    """Make the grouped 1x1 convolution of the shared concatenation [A5_1, s1, s2, s3, A5_2, s1, s2, s3, …].

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
    """Return the same map as one dense 1x1 convolution of [A5, s1, s2, s3]: K + 3 channels instead of 4K.

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
        depth: 50, 101 (the published one) or 152; 14 has one block per stage and is for tests.
        width: channels of the stem, 64 as published.
    Shape:
        float32 [N,3,H,W] -> edge logits float32 [N,K,H,W]; H and W multiples of 8.  ``sides`` returns
        both supervised maps.  Probabilities are sigmoids: classes overlap.
    """

    output_stride = 1
    size_multiple = 8
    TASK = "edges"
    TASKS: ClassVar[Mapping[str, str]] = {"edges": "forward"}
    EXAMPLES = ({"depth": 14, "width": 8},)
    #: Parameters that are new for this task: published at ten times the learning rate (biases at twenty).
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
        """Return (A5, fused) logits, float32 [N,K,H,W] each: the two supervised maps, of equal weight."""
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
        """Return a copy whose fusion is one dense convolution: the same answers, for export."""
        return with_dense_fusion(self)


def with_dense_fusion(network: N) -> N:
    """Return a copy of any network with a ``ce_fusion``, in its dense form."""
    out = copy.deepcopy(network)
    fusion = out.ce_fusion
    assert isinstance(fusion, nn.Conv2d)
    if fusion.groups > 1:
        out.ce_fusion = dense_fusion(fusion)
    return out
