"""DDRNet-23-slim: Hong, Pan, Sun and Jia, "Deep Dual-resolution Networks for Real-time and Accurate
Semantic Segmentation of Road Scenes", 2021 (arXiv 2101.06085).

A branch kept at 1/8 of the resolution and a deep one that goes down to 1/64, joined twice in both
directions; DAPPM gathers context on the coarsest map.  This is the network as it is deployed: the
auxiliary head of the authors' training is not part of it.

Resampling inside is bilinear with half-pixel centres (`align_corners=False`), as published.

Knows torch and the shared residual blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.base import SegmentationNetwork, initialise
from networks.checkpoints.convert import read_ddrnet as read_checkpoint
from networks.layers import (
    Head,
    PooledScale,
    activate,
    basic_stage,
    bottleneck_stage,
    conv,
    project,
    resize_like,
    stem,
)

__all__ = ["DDRNet", "read_checkpoint"]


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: each coarser mean is enlarged, added to the finer one, convolved.

    Shape: [N,inputs,h,w] -> [N,outputs,h,w].
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.scale0 = nn.Sequential(*activate(inputs, width))
        self.scale1 = PooledScale(5, inputs, width)
        self.scale2 = PooledScale(9, inputs, width)
        self.scale3 = PooledScale(17, inputs, width)
        self.scale4 = PooledScale(0, inputs, width)
        self.process1 = nn.Sequential(*activate(width, width, 3))
        self.process2 = nn.Sequential(*activate(width, width, 3))
        self.process3 = nn.Sequential(*activate(width, width, 3))
        self.process4 = nn.Sequential(*activate(width, width, 3))
        self.compression = nn.Sequential(*activate(5 * width, outputs))
        self.shortcut = nn.Sequential(*activate(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y0 = self.scale0(x)
        y1 = self.process1(resize_like(self.scale1(x), x) + y0)
        y2 = self.process2(resize_like(self.scale2(x), x) + y1)
        y3 = self.process3(resize_like(self.scale3(x), x) + y2)
        # Enlarging a single value is broadcasting it.
        y4 = self.process4(self.scale4(x) + y3)
        y: Tensor = self.compression(torch.cat([y0, y1, y2, y3, y4], 1)) + self.shortcut(x)
        return y


class DDRNet(SegmentationNetwork):
    """DDRNet-23-slim, 5.7 M parameters (the paper's figure; 5.70 M here with 19 classes).

    Args:
        classes: output channels.
        width: channels of the stem; 32 is the published "slim".
        pyramid: channels inside DAPPM; None: 4 times the width, as in slim.  DDRNet-23 is width 64 with 128.
    Shape:
        float32 [N,3,H,W] -> logits float32 [N,classes,H/8,W/8]; H and W multiples of 8.  Training needs
        two frames or more in a batch: the whole-map mean is batch-normalised, as published.
    """

    output_stride = 8
    size_multiple = 8
    EXAMPLES = ({}, {"width": 8})

    def __init__(self, *, classes: int, width: int = 32, pyramid: int | None = None) -> None:
        super().__init__()
        w = width
        self.conv1 = stem(w)
        self.layer1 = basic_stage(w, w, 2)
        self.layer2 = basic_stage(w, 2 * w, 2, 2)  # 1/8
        # The deep branch …
        self.layer3 = basic_stage(2 * w, 4 * w, 2, 2)
        self.layer4 = basic_stage(4 * w, 8 * w, 2, 2)
        self.layer5 = bottleneck_stage(8 * w, 8 * w, 1, 2)  # 1/64
        self.spp = DAPPM(16 * w, pyramid or 4 * w, 4 * w)
        # … the one of high resolution (names with an underscore, as published) …
        self.layer3_ = basic_stage(2 * w, 2 * w, 2)
        self.layer4_ = basic_stage(2 * w, 2 * w, 2)
        self.layer5_ = bottleneck_stage(2 * w, 2 * w, 1)
        # … and what passes between them.
        self.compression3 = project(4 * w, 2 * w)
        self.compression4 = project(8 * w, 2 * w)
        self.down3 = project(2 * w, 4 * w, 3, 2)
        self.down4 = nn.Sequential(
            conv(2 * w, 4 * w, 3, 2),
            nn.BatchNorm2d(4 * w),
            nn.ReLU(),
            conv(4 * w, 8 * w, 3, 2),
            nn.BatchNorm2d(8 * w),
        )
        self.final_layer = Head(4 * w, 2 * w, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        eighth = torch.relu(self.layer2(torch.relu(self.layer1(self.conv1(x)))))

        deep, fine = self.layer3(eighth), self.layer3_(eighth)
        # Both directions use the two branches as they were before the exchange.
        bridge = resize_like(self.compression3(torch.relu(deep)), fine)
        deep = deep + self.down3(torch.relu(fine))
        fine = fine + bridge

        deep, fine = self.layer4(torch.relu(deep)), self.layer4_(torch.relu(fine))
        bridge = resize_like(self.compression4(torch.relu(deep)), fine)
        deep = deep + self.down4(torch.relu(fine))
        fine = fine + bridge

        fine = self.layer5_(torch.relu(fine))
        context = self.spp(self.layer5(torch.relu(deep)))
        logits: Tensor = self.final_layer(resize_like(context, fine) + fine)
        return logits
