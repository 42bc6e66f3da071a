"""RoadNet: the project's own network of about one million parameters, for the demo and the tests.

Two branches, as in Fast-SCNN (Poudel et al., 2019) and DDRNet (Hong et al., 2021): a shallow one that
keeps detail at a quarter of the resolution, and a deep one that goes down to 1/32 for context.  Only
plain 3x3 and 1x1 convolutions with batch normalisation and ReLU, fixed-factor bilinear enlargement and
a global mean: everything exports, quantises and folds, and it is fast on one CPU core (depthwise
convolutions would have fewer multiplications and still be slower there).
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.base import ConvBN, SegmentationNetwork, initialise


class Residual(nn.Module):
    """Basic residual block (He et al., 2016): two 3x3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first = ConvBN(inputs, outputs, 3, stride)
        self.second = ConvBN(outputs, outputs, 3, relu=False)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = ConvBN(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(x)) + self.shortcut(x))


class Context(nn.Module):
    """Pyramid of three receptive fields over the coarsest map: local, a 5x5 mean, and the whole frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.local = ConvBN(channels, channels, 1)
        self.near = ConvBN(channels, channels, 1)
        # A map of one value per image cannot be batch-normalised when the batch is one: bias instead.
        self.whole = nn.Conv2d(channels, channels, 1)
        self.merge = ConvBN(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        near = self.near(F.avg_pool2d(x, 5, stride=1, padding=2))
        whole = torch.relu(self.whole(x.mean((2, 3), keepdim=True)))
        return self.merge(self.local(x) + near + whole)


class RoadNet(SegmentationNetwork):
    """Two-branch real-time network.

    Args:
        classes: output channels.
        width: channels of the first stage; the others are multiples of it.  32 gives about 1 M parameters.
    Shape:
        float32 [N,3,H,W] -> logits float32 [N,classes,H/4,W/4]; H and W multiples of 32.
    """

    output_stride = 4
    size_multiple = 32
    EXAMPLES = ({}, {"width": 16})

    def __init__(self, *, classes: int, width: int = 32) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(ConvBN(3, w // 2, 3, 2), ConvBN(w // 2, w, 3, 2))  # 1/4
        self.detail = nn.Sequential(Residual(w, w))
        self.down8 = nn.Sequential(Residual(w, 2 * w, 2))
        self.down16 = nn.Sequential(Residual(2 * w, 4 * w, 2))
        self.down32 = nn.Sequential(Residual(4 * w, 4 * w, 2))
        self.context = Context(4 * w)
        self.reduce32 = ConvBN(4 * w, 2 * w, 1, relu=False)
        self.reduce16 = ConvBN(4 * w, 2 * w, 1, relu=False)
        self.reduce8 = ConvBN(2 * w, 2 * w, 1, relu=False)
        self.to_detail = ConvBN(2 * w, w, 1, relu=False)
        self.fuse = ConvBN(w, 2 * w, 3)
        self.classify = nn.Conv2d(2 * w, classes, 1)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        quarter = self.stem(x)
        eighth = self.down8(quarter)
        sixteenth = self.down16(eighth)
        deep = self.context(self.down32(sixteenth))
        # Enlarge by fixed factors: sizes stay constants in the exported graph whatever the batch.
        deep = torch.relu(_enlarge(self.reduce32(deep)) + self.reduce16(sixteenth))
        deep = torch.relu(_enlarge(deep) + self.reduce8(eighth))
        detail = torch.relu(self.detail(quarter) + _enlarge(self.to_detail(deep)))
        return self.classify(self.fuse(detail))


def _enlarge(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
