"""What every network has in common, and the two layers nearly all of them are made of.

Architectures import this module; it imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn


class SegmentationNetwork(nn.Module):
    """Base of the architectures.

    Shape: `forward` takes float32 [N,3,H,W] with H and W multiples of `size_multiple`, and returns
    logits float32 [N,C,H/output_stride,W/output_stride].  It must be traceable by `torch.fx`, because
    `export` folds batch normalisation on the traced graph.
    """

    output_stride: int
    size_multiple: int
    #: What its packs are for unless they say otherwise: "segmentation", or "edges" where the logits are
    #: sigmoids of edge classes.
    TASK: ClassVar[str] = "segmentation"
    #: Tasks it can be served for, and the method that answers: one map of logits, for "joint" a pair
    #: (segmentation, edges).
    TASKS: ClassVar[Mapping[str, str]] = {"segmentation": "forward"}
    #: Keyword arguments besides `classes`, for documentation and tests: one small instance of each form.
    EXAMPLES: ClassVar[tuple[dict[str, object], ...]] = ({},)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def edge_count(self) -> int:
        """Edge classes it answers; 0 where it answers none."""
        return 0

    def fused(self) -> SegmentationNetwork:
        """The same answers in the form an engine is made of: itself, or a copy."""
        return self


class ConvBN(nn.Module):
    """Convolution without bias, batch normalisation, and (unless `relu=False`) a ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        relu: bool = True,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, padding, dilation=dilation, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return torch.relu(x) if self.relu else x


def initialise(network: nn.Module) -> None:
    """He initialisation of the convolutions, unit batch normalisation (He et al., 2015)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
