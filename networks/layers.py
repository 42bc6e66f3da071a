"""Residual blocks and the segmentation head shared by DDRNet and PIDNet.

Both papers (Hong et al., "Deep Dual-resolution Networks", 2021; Xu et al., "PIDNet", 2023) build on the
same two blocks of He et al. (2016), end most stages *without* the last ReLU, and classify with the same
pre-activated head.  Submodules carry the names under which the authors' weights are published
(`conv1`, `bn1`, `downsample.0`, …), so that a published state dict maps by name
(`networks.checkpoints.convert`).

Knows torch and nothing of any one architecture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded so that stride 1 does not change the size."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)


def project(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution and batch normalisation: the shortcuts and the links between branches."""
    return nn.Sequential(conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs))


def activate(inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> list[nn.Module]:
    """The pre-activated unit (normalise, ReLU, convolve) of the pyramid-pooling modules."""
    return [nn.BatchNorm2d(inputs), nn.ReLU(), conv(inputs, outputs, kernel, groups=groups)]


def resize_like(x: Tensor, reference: Tensor) -> Tensor:
    """Enlarge `x` to the reference's height and width: bilinear, half-pixel (`align_corners=False`)."""
    return F.interpolate(x, size=reference.shape[-2:], mode="bilinear", align_corners=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut; `relu=False` leaves the sum as it is."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int = 1, *, relu: bool = True) -> None:
        super().__init__()
        self.conv1 = conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or inputs != width:
            self.downsample = project(inputs, width, 1, stride)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + (x if self.downsample is None else self.downsample(x))
        return torch.relu(y) if self.relu else y


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 that doubles the width.  Both papers use it without a last ReLU."""

    expansion = 2

    def __init__(self, inputs: int, width: int, stride: int = 1, *, relu: bool = False) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = project(inputs, outputs, 1, stride)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x))
        return torch.relu(y) if self.relu else y


def basic_stage(inputs: int, width: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """`blocks` basic blocks (two or more), the first with the stride, the last without its ReLU."""
    layers = [BasicBlock(inputs, width, stride)]
    layers += [BasicBlock(width, width, relu=i < blocks - 1) for i in range(1, blocks)]
    return nn.Sequential(*layers)


def bottleneck_stage(inputs: int, width: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """`blocks` bottlenecks (one or two), the first with the stride, none with a last ReLU."""
    layers = [Bottleneck(inputs, width, stride)]
    layers += [Bottleneck(2 * width, width) for _ in range(1, blocks)]
    return nn.Sequential(*layers)


class Head(nn.Module):
    """Normalise, ReLU, 3x3; normalise, ReLU, 1x1 to the classes."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv(inputs, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(torch.relu(self.bn1(x)))
        logits: Tensor = self.conv2(torch.relu(self.bn2(x)))
        return logits


class PooledScale(nn.Sequential):
    """One scale of the pyramid: average pooling, then a pre-activated 1x1 convolution.

    The published kernels and strides are 5/2, 9/4 and 17/8 with half-kernel padding whose zeros count
    in the mean; `kernel=0` is the mean of the whole map.
    """

    def __init__(self, kernel: int, inputs: int, outputs: int) -> None:
        # AdaptiveAvgPool2d(1) is the only adaptive pool with an exact ONNX form: GlobalAveragePool.
        pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        if kernel:
            pool = nn.AvgPool2d(kernel, stride=kernel // 2, padding=kernel // 2)
        super().__init__(pool, *activate(inputs, outputs))


def stem(width: int) -> nn.Sequential:
    """Two 3x3 convolutions of stride 2 (with bias, as published): a quarter of the resolution."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 2, 1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )
