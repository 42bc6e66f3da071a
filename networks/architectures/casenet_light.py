"""A real-time CASENet: the same head on ESPNetv2's encoder, everything at half resolution.

What makes CASENet slow is its stem: 64 channels at full resolution.  Here the stem has stride 2 and the head
answers at 1/2, which is where the Cityscapes edge benchmark scores.  Taps: 1/2, 1/4, 1/8 for the shared
sides; the last one sees 1/8 and the enlarged 1/16 together.

Encoder attribute names are ESPNetv2's, so a trained segmentation network starts it by name
(``load_encoder``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.architectures.casenet import enlarge, fuse, shared_fusion, with_dense_fusion
from networks.architectures.espnetv2 import CHANNELS, Encoder
from networks.base import SegmentationNetwork, initialise

__all__ = ["CASENetLight", "EdgeHead"]


class EdgeHead(nn.Module):
    """CASENet's head on four encoder maps at 1/2, 1/4, 1/8, 1/16; answers (A5, fused) at 1/2.

    Shape: [N,c1,H/2,W/2], …, [N,c4,H/16,W/16] -> two of float32 [N,classes,H/2,W/2].
    """

    def __init__(self, channels: tuple[int, int, int, int], classes: int) -> None:
        super().__init__()
        c1, c2, c3, c4 = channels
        self.classes = classes
        self.score_edge_side1 = nn.Conv2d(c1, 1, 1)
        self.score_edge_side2 = nn.Conv2d(c2, 1, 1)
        self.score_edge_side3 = nn.Conv2d(c3, 1, 1)
        self.context = nn.Sequential(nn.Conv2d(c3 + c4, 64, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        self.score_cls_side5 = nn.Conv2d(64, classes, 1)
        initialise(self)
        for score in (
            self.score_edge_side1,
            self.score_edge_side2,
            self.score_edge_side3,
            self.score_cls_side5,
        ):
            nn.init.normal_(score.weight, std=0.01)
        self.ce_fusion = shared_fusion(classes)

    def forward(
        self, half: Tensor, quarter: Tensor, eighth: Tensor, sixteenth: Tensor
    ) -> tuple[Tensor, Tensor]:
        deep = F.interpolate(sixteenth, scale_factor=2.0, mode="bilinear", align_corners=False)
        a5 = enlarge(self.score_cls_side5(self.context(torch.cat([eighth, deep], 1))), 4)
        side1 = self.score_edge_side1(half)
        side2 = enlarge(self.score_edge_side2(quarter), 2)
        side3 = enlarge(self.score_edge_side3(eighth), 4)
        return a5, fuse(self.ce_fusion, a5, side1, side2, side3, self.classes)


class CASENetLight(SegmentationNetwork):
    """ESPNetv2's encoder under CASENet's head.

    Args:
        classes: edge classes K.
        scale: width of ESPNetv2: 0.5, 1.0, 1.25, 1.5 or 2.0.
    Shape:
        float32 [N,3,H,W] -> edge logits float32 [N,K,H/2,W/2]; H and W multiples of 16.
    """

    output_stride = 2
    size_multiple = 16
    TASK = "edges"
    TASKS: ClassVar[Mapping[str, str]] = {"edges": "forward"}
    EXAMPLES = ({"scale": 0.5},)
    UNUSED = (r"level\d_0\.eesp\.module_act",)
    NEW = ("edge_head.",)

    def __init__(self, *, classes: int, scale: float = 1.0) -> None:
        super().__init__()
        if scale not in CHANNELS:
            raise ValueError(f"casenet_light: scale {scale!r} is unknown; choose one of: {sorted(CHANNELS)}")
        self.base_net = Encoder(CHANNELS[scale])
        initialise(self.base_net)
        self.edge_head = EdgeHead(CHANNELS[scale], classes)

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A5, fused) logits, float32 [N,K,H/2,W/2] each."""
        half, quarter, eighth, sixteenth = self.base_net(x)
        a5, fused = self.edge_head(half, quarter, eighth, sixteenth)
        return a5, fused

    def forward(self, x: Tensor) -> Tensor:
        return self.sides(x)[1]

    @property
    def edge_count(self) -> int:
        return self.edge_head.classes

    def fused(self) -> CASENetLight:
        """A copy whose fusion is one dense convolution: the same answers, for export."""
        out = copy.deepcopy(self)
        out.edge_head = with_dense_fusion(out.edge_head)
        return out

    def load_encoder(self, state: Mapping[str, Tensor]) -> None:
        """Start from a trained ESPNetv2 of the same width.  Raises RuntimeError where a tensor does not
        fit.
        """
        self.base_net.load_state_dict(
            {k.removeprefix("base_net."): v for k, v in state.items() if k.startswith("base_net.")}
        )
