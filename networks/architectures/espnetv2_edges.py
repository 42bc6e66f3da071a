"""Segmentation and semantic edges from one ESPNetv2 encoder: two heads, one backbone.

``forward`` answers the segmentation, so that the network is trained and adapted as any other; served, it is
any of the three tasks (``TASKS``): a pack of task "joint" answers both from one run of the encoder.  Trained
with both losses the edge head sharpens the encoder at no cost when only the segmentation is asked for (SBCB,
Ishikawa and Aoki 2023).  Attribute names outside ``edge_head`` are ESPNetv2's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from networks.architectures.casenet import with_dense_fusion
from networks.architectures.casenet_light import EdgeHead
from networks.architectures.espnetv2 import CHANNELS, ESPNetv2, double

__all__ = ["ESPNetv2Edges"]


class ESPNetv2Edges(ESPNetv2):
    """ESPNetv2 with an edge head beside its decoder.

    Args:
        classes, scale, projection: as ``ESPNetv2``.
        edge_classes: K of the edge head; None: ``classes``.
    Shape:
        forward: float32 [N,3,H,W] -> segmentation logits float32 [N,classes,H/2,W/2];
        joint: -> (segmentation logits, A5, fused edge logits), all at 1/2.
    """

    TASKS: ClassVar[Mapping[str, str]] = {"segmentation": "forward", "edges": "edges", "joint": "both"}
    EXAMPLES = ({"scale": 0.5}, {"scale": 0.5, "edge_classes": 3})
    UNUSED: ClassVar[tuple[str, ...]] = (*ESPNetv2.UNUSED, r"edge_head\.")
    NEW = ("edge_head.",)

    def __init__(
        self,
        *,
        classes: int,
        scale: float = 1.0,
        projection: int | None = None,
        edge_classes: int | None = None,
    ) -> None:
        super().__init__(classes=classes, scale=scale, projection=projection)
        self.edge_head = EdgeHead(CHANNELS[scale], edge_classes or classes)

    def joint(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(segmentation logits, A5, fused edge logits), each float32 [N,·,H/2,W/2]."""
        half, quarter, eighth, sixteenth = self.base_net(x)
        y = self.bu_dec_l1(sixteenth)
        y = self.bu_dec_l2(self.bu_br_l2(self.merge_enc_dec_l2(eighth) + double(y)))
        y = self.bu_dec_l3(self.bu_br_l3(self.merge_enc_dec_l3(quarter) + double(y)))
        segmentation = self.bu_dec_l4(self.bu_br_l4(self.merge_enc_dec_l4(half) + double(y)))
        a5, fused = self.edge_head(half, quarter, eighth, sixteenth)
        return segmentation, a5, fused

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(A5, fused) edge logits alone, the interface of the edge networks."""
        half, quarter, eighth, sixteenth = self.base_net(x)
        a5, fused = self.edge_head(half, quarter, eighth, sixteenth)
        return a5, fused

    def edges(self, x: Tensor) -> Tensor:
        """Fused edge logits float32 [N,K,H/2,W/2] alone."""
        return self.sides(x)[1]

    def both(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(segmentation logits, fused edge logits): what a joint engine is made of."""
        segmentation, _, fused = self.joint(x)
        return segmentation, fused

    @property
    def edge_count(self) -> int:
        return self.edge_head.classes

    def fused(self) -> ESPNetv2Edges:
        """A copy whose edge fusion is one dense convolution: the same answers, for export."""
        out = copy.deepcopy(self)
        out.edge_head = with_dense_fusion(out.edge_head)
        return out
