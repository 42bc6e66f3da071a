"""PIDNet-S: Xu, Xiong and Bhattacharyya, "PIDNet: A Real-time Semantic Segmentation Network Inspired by
PID Controllers", CVPR 2023 (arXiv 2206.02066).

Three branches: detail (P) at 1/8, context (I) down to 1/64, boundaries (D) at 1/8, which decides pixel by
pixel whether detail or context is believed.  This is the network as it is deployed: the two auxiliary
heads of the authors' training are not part of it.

Resampling inside is bilinear with half-pixel centres (`align_corners=False`), as published.

Knows torch and the shared residual blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.base import SegmentationNetwork, initialise
from networks.checkpoints.convert import read_pidnet as read_checkpoint
from networks.layers import (
    BasicBlock,
    Head,
    PooledScale,
    activate,
    basic_stage,
    bottleneck_stage,
    project,
    resize_like,
    stem,
)

__all__ = ["PIDNet", "read_checkpoint"]


class Pag(nn.Module):
    """Pixel-attention guidance: the detail map takes over context where the two resemble each other.

    Shape: detail [N,C,H,W], context [N,C,h,w] -> [N,C,H,W].
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.f_x = project(channels, width)
        self.f_y = project(channels, width)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        # Project the coarse map before it is enlarged: 1x1 convolutions commute with bilinear enlarging.
        key, query = self.f_x(detail), resize_like(self.f_y(context), detail)
        sigma = torch.sigmoid((key * query).sum(1, keepdim=True))
        mixed: Tensor = (1 - sigma) * detail + sigma * resize_like(context, detail)
        return mixed


class LightBag(nn.Module):
    """Boundary-attention guidance: on boundaries detail is believed, inside objects context.

    Shape: three maps [N,C,H,W] -> [N,C,H,W].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_p = project(channels, channels)
        self.conv_i = project(channels, channels)

    def forward(self, detail: Tensor, context: Tensor, boundary: Tensor) -> Tensor:
        sigma = torch.sigmoid(boundary)
        mixed: Tensor = self.conv_p((1 - sigma) * context + detail) + self.conv_i(context + sigma * detail)
        return mixed


class PAPPM(nn.Module):
    """Parallel aggregation pyramid pooling: DAPPM with the four scales convolved at once, in four groups.

    Shape: [N,inputs,h,w] -> [N,outputs,h,w].
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.scale0 = nn.Sequential(*activate(inputs, width))
        self.scale1 = PooledScale(5, inputs, width)
        self.scale2 = PooledScale(9, inputs, width)
        self.scale3 = PooledScale(17, inputs, width)
        self.scale4 = PooledScale(0, inputs, width)
        self.scale_process = nn.Sequential(*activate(4 * width, 4 * width, 3, groups=4))
        self.compression = nn.Sequential(*activate(5 * width, outputs))
        self.shortcut = nn.Sequential(*activate(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y0 = self.scale0(x)
        scales = [
            resize_like(self.scale1(x), x) + y0,
            resize_like(self.scale2(x), x) + y0,
            resize_like(self.scale3(x), x) + y0,
            self.scale4(x) + y0,  # enlarging a single value is broadcasting it
        ]
        together = self.scale_process(torch.cat(scales, 1))
        y: Tensor = self.compression(torch.cat([y0, together], 1)) + self.shortcut(x)
        return y


class PIDNet(SegmentationNetwork):
    """PIDNet-S, 7.6 M parameters (the paper's figure; 7.63 M here with 19 classes).

    Args:
        classes: output channels.
        width: channels of the stem; 32 is the published S.
        pyramid: channels of a scale of PAPPM; None: 3 times the width, as in S.
        head: channels inside the head; None: 4 times the width, as in S.
            PIDNet-M is width 64 with 96 and 128; PIDNet-L has other modules and is not built here.
    Shape:
        float32 [N,3,H,W] -> logits float32 [N,classes,H/8,W/8]; H and W multiples of 8.  Training needs
        two frames or more in a batch: the whole-map mean is batch-normalised, as published.
    """

    output_stride = 8
    size_multiple = 8
    EXAMPLES = ({}, {"width": 8})

    def __init__(
        self, *, classes: int, width: int = 32, pyramid: int | None = None, head: int | None = None
    ) -> None:
        super().__init__()
        w = width
        self.conv1 = stem(w)
        self.layer1 = basic_stage(w, w, 2)
        self.layer2 = basic_stage(w, 2 * w, 2, 2)  # 1/8
        # I: context.
        self.layer3 = basic_stage(2 * w, 4 * w, 3, 2)
        self.layer4 = basic_stage(4 * w, 8 * w, 3, 2)
        self.layer5 = bottleneck_stage(8 * w, 8 * w, 2, 2)  # 1/64
        self.spp = PAPPM(16 * w, pyramid or 3 * w, 4 * w)
        # P: detail.
        self.layer3_ = basic_stage(2 * w, 2 * w, 2)
        self.layer4_ = basic_stage(2 * w, 2 * w, 2)
        self.layer5_ = bottleneck_stage(2 * w, 2 * w, 1)
        self.compression3 = project(4 * w, 2 * w)
        self.compression4 = project(8 * w, 2 * w)
        self.pag3 = Pag(2 * w, w)
        self.pag4 = Pag(2 * w, w)
        # D: boundaries.
        self.layer3_d = BasicBlock(2 * w, w, relu=False)
        self.layer4_d = bottleneck_stage(w, w, 1)
        self.layer5_d = bottleneck_stage(2 * w, 2 * w, 1)
        self.diff3 = project(4 * w, w, 3)
        self.diff4 = project(8 * w, 2 * w, 3)
        self.dfm = LightBag(4 * w)
        self.final_layer = Head(4 * w, head or 4 * w, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.layer2(torch.relu(self.layer1(self.conv1(x)))))
        detail, boundary = self.layer3_(x), self.layer3_d(x)

        x = torch.relu(self.layer3(x))
        detail = self.pag3(detail, self.compression3(x))
        boundary = boundary + resize_like(self.diff3(x), detail)

        x = torch.relu(self.layer4(x))
        detail, boundary = self.layer4_(torch.relu(detail)), self.layer4_d(torch.relu(boundary))
        detail = self.pag4(detail, self.compression4(x))
        boundary = boundary + resize_like(self.diff4(x), detail)

        detail, boundary = self.layer5_(torch.relu(detail)), self.layer5_d(torch.relu(boundary))
        context = resize_like(self.spp(self.layer5(x)), detail)
        logits: Tensor = self.final_layer(self.dfm(detail, context, boundary))
        return logits
