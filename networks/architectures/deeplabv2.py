"""DeepLab-v2 on ResNet-101: Chen, Papandreou, Kokkinos, Murphy and Yuille, "DeepLab: Semantic Image
Segmentation with Deep Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", TPAMI 2018 (arXiv
1606.00915), on He et al.'s ResNet (arXiv 1512.03385).

The network of confidence-regularised self-training (Zou et al., ICCV 2019) and of most papers on adaptation
from GTA5 to Cityscapes.  Single scale, without the CRF.  The residual units are those of the Caffe release,
whose weights everyone starts from: the stride sits on the first 1x1 convolution.  Stages 4 and 5 are
dilated by 2 and 4 instead of strided; the classifier is ASPP-L, four 3x3 convolutions to the classes dilated
by 6, 12, 18 and 24, summed.

One deviation, which touches no weight.  The Caffe pool rounds up and yields H/8 + 1 rows at multiples of 8;
here it rounds down to H/8.  The rows that both have lie on the same pixels (multiples of 8), so the papers'
`align_corners=True` enlargement and the half-pixel one of the graph contract differ by a shift of at most
half an output step (3.5 pixels); it concerns weights trained elsewhere, not those trained or adapted here.

Knows torch and the common base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.base import SegmentationNetwork, initialise
from networks.checkpoints.convert import read_deeplabv2 as read_checkpoint

__all__ = ["DeepLabV2", "read_checkpoint"]

_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
_ATROUS_RATES = (6, 12, 18, 24)


class CaffeBottleneck(nn.Module):
    """1x1 (with the stride), 3x3 (with the dilation), 1x1 to four times the width, around a shortcut."""

    def __init__(
        self, inputs: int, width: int, *, stride: int = 1, dilation: int = 1, project: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if project:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class ASPP(nn.Module):
    """Atrous spatial pyramid: the sum of four dilated 3x3 classifiers.

    Shape: [N,inputs,h,w] -> [N,classes,h,w].
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            nn.Conv2d(inputs, classes, 3, padding=rate, dilation=rate) for rate in _ATROUS_RATES
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.conv2d_list
        logits: Tensor = a(x) + b(x) + c(x) + d(x)
        return logits


class DeepLabV2(SegmentationNetwork):
    """DeepLab-v2, 43.9 M parameters with ResNet-101 and 19 classes (published as 43 to 44 M).

    Args:
        classes: output channels.
        depth: 101 (the papers') or 50.
        width: channels of the first convolution; 64 is ResNet's.
    Shape:
        float32 [N,3,H,W] -> logits float32 [N,classes,H/8,W/8]; H and W multiples of 8.
    Raises:
        ValueError: another depth.
    """

    output_stride = 8
    size_multiple = 8
    EXAMPLES = ({"depth": 50, "width": 8},)

    def __init__(self, *, classes: int, depth: int = 101, width: int = 64) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise ValueError(f"network 'deeplabv2': depth must be one of {sorted(_DEPTHS)}, not {depth}")
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        counts = _DEPTHS[depth]
        self.layer1 = self._stage(width, width, counts[0])
        self.layer2 = self._stage(4 * width, 2 * width, counts[1], stride=2)
        self.layer3 = self._stage(8 * width, 4 * width, counts[2], dilation=2)
        self.layer4 = self._stage(16 * width, 8 * width, counts[3], dilation=4)
        self.layer5 = ASPP(32 * width, classes)
        initialise(self)

    @staticmethod
    def _stage(inputs: int, width: int, count: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
        units = [CaffeBottleneck(inputs, width, stride=stride, dilation=dilation, project=True)]
        units += [CaffeBottleneck(4 * width, width, dilation=dilation) for _ in range(1, count)]
        return nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.layer5(x)
        return logits
