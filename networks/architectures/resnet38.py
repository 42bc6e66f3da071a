"""ResNet-38, model A1: Wu, Shen and van den Hengel, "Wider or Deeper: Revisiting the ResNet Model for
Visual Recognition", 2016 (arXiv 1611.10080), in its segmentation form.

One of the two networks in the tables of class-balanced self-training (Zou et al., ECCV 2018).  Wide,
shallow, pre-activated (normalise, ReLU, convolve).  A1 halves the resolution by strided convolutions, not
by pooling; for segmentation the last two of the five are replaced by dilation, which leaves a stride of
8.  The classifier is the paper's "2 conv": 3x3 to 512, ReLU, and 3x3 to the classes, both with bias and
dilated by 12.

The normalisations that follow a sum cannot be folded into a convolution and stay in the graph.

Knows torch and the common base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.base import SegmentationNetwork, initialise
from networks.checkpoints.convert import read_resnet38 as read_checkpoint

__all__ = ["ResNet38", "read_checkpoint"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation=dilation, bias=False)


class Wide(nn.Module):
    """Residual unit of two 3x3 convolutions.

    Where the shape changes, the shortcut is a 1x1 convolution of the *activated* input.  In the first unit
    of a stage whose stride became dilation, the first convolution keeps the dilation of the stage before.
    """

    def __init__(
        self, inputs: int, width: int, outputs: int, *, stride: int = 1, dilations: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv(inputs, width, 3, stride, dilations[0])
        self.bn_branch2b1 = nn.BatchNorm2d(width)
        self.conv_branch2b1 = _conv(width, outputs, 3, 1, dilations[1])
        self.conv_branch1 = None
        if stride != 1 or inputs != outputs:
            self.conv_branch1 = _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn_branch2a(x))
        y = self.conv_branch2a(active)
        y = self.conv_branch2b1(torch.relu(self.bn_branch2b1(y)))
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(active)
        total: Tensor = shortcut + y
        return total


class WideBottleneck(nn.Module):
    """Residual unit of 1x1, 3x3 and 1x1 convolutions, with a quarter, a half and all of the channels."""

    def __init__(self, inputs: int, outputs: int, *, dilation: int) -> None:
        super().__init__()
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = _conv(inputs, outputs // 4, 1)
        self.bn_branch2b1 = nn.BatchNorm2d(outputs // 4)
        self.conv_branch2b1 = _conv(outputs // 4, outputs // 2, 3, 1, dilation)
        self.bn_branch2b2 = nn.BatchNorm2d(outputs // 2)
        self.conv_branch2b2 = _conv(outputs // 2, outputs, 1)
        self.conv_branch1 = _conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn_branch2a(x))
        y = self.conv_branch2a(active)
        y = self.conv_branch2b1(torch.relu(self.bn_branch2b1(y)))
        y = self.conv_branch2b2(torch.relu(self.bn_branch2b2(y)))
        total: Tensor = self.conv_branch1(active) + y
        return total


class ResNet38(SegmentationNetwork):
    """ResNet-38 A1 for segmentation, 124.0 M parameters with 19 classes (published as about 125 M).

    Args:
        classes: output channels.
        width: channels of the first convolution; 64 is the paper's, and the others are multiples of it.
    Shape:
        float32 [N,3,H,W] -> logits float32 [N,classes,H/8,W/8]; H and W multiples of 8.
    """

    output_stride = 8
    size_multiple = 8
    EXAMPLES = ({"width": 4},)

    def __init__(self, *, classes: int, width: int = 64) -> None:
        super().__init__()
        w = width
        self.conv1a = _conv(3, w, 3)
        self._units: list[str] = []
        # Names b2, b2_1, b2_2, b3, … are those under which the weights circulate for torch.
        for stage, (inputs, outputs, count) in enumerate(((1, 2, 3), (2, 4, 3), (4, 8, 6)), start=2):
            self._add(f"b{stage}", Wide(inputs * w, outputs * w, outputs * w, stride=2))
            for i in range(1, count):
                self._add(f"b{stage}_{i}", Wide(outputs * w, outputs * w, outputs * w))
        self._add("b5", Wide(8 * w, 8 * w, 16 * w, dilations=(1, 2)))
        for i in (1, 2):
            self._add(f"b5_{i}", Wide(16 * w, 8 * w, 16 * w, dilations=(2, 2)))
        self._add("b6", WideBottleneck(16 * w, 32 * w, dilation=4))
        self._add("b7", WideBottleneck(32 * w, 64 * w, dilation=4))
        self.bn7 = nn.BatchNorm2d(64 * w)
        self.conv6a = nn.Conv2d(64 * w, 8 * w, 3, padding=12, dilation=12)
        self.classify = nn.Conv2d(8 * w, classes, 3, padding=12, dilation=12)
        initialise(self)

    def _add(self, name: str, unit: nn.Module) -> None:
        self.add_module(name, unit)
        self._units.append(name)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1a(x)
        for name in self._units:
            x = getattr(self, name)(x)
        x = torch.relu(self.bn7(x))
        logits: Tensor = self.classify(torch.relu(self.conv6a(x)))
        return logits
