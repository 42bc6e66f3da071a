"""FCN-8s on VGG-16: Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation",
CVPR 2015 (arXiv 1411.4038), on Simonyan and Zisserman's configuration D (arXiv 1409.1556).

One of the two networks in the tables of class-balanced self-training (Zou et al., ECCV 2018).

Two deviations, neither of which touches a weight.  The authors pad the frame by 100 pixels and crop each
sum, so that any size works; with sizes that are multiples of 32, padding `fc6` by 3 and the transposed
convolutions by 1 keeps the three scores aligned without the border of 100 (samples then lie at 8k + 3.5 and
not, as with the crops, at 8k + 0.5; answers are not shifted in either).  And the last enlargement by 8,
which the authors keep fixed to bilinear weights, is not the network's business here.

Knows torch and the common base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from networks.base import SegmentationNetwork, initialise
from networks.checkpoints.convert import read_fcn8s as read_checkpoint

__all__ = ["FCN8s", "read_checkpoint"]

#: Convolutions of each of VGG-16's five stages, and their width in units of the first.
_STAGES = ((2, 1), (2, 2), (3, 4), (3, 8), (3, 8))


def bilinear(kernel: int) -> Tensor:
    """The kernel [k,k] with which a transposed convolution of stride k/2 enlarges bilinearly."""
    factor = kernel // 2
    # Distance of each tap from the kernel's centre, in units of the stride.
    taps = 1 - (torch.arange(kernel, dtype=torch.float32) - (kernel - 1) / 2).abs() / factor
    return taps[:, None] * taps[None, :]


class FCN8s(SegmentationNetwork):
    """FCN-8s, 134.3 M parameters with 19 classes (the paper: "134M" for FCN-VGG16).

    Args:
        classes: output channels.
        width: channels of the first stage; 64 is VGG-16, whose `fc6` and `fc7` have 64 times as many.
        dropout: after `fc6` and `fc7`, in training.
    Shape:
        float32 [N,3,H,W] -> logits float32 [N,classes,H/8,W/8]; H and W multiples of 32.
    """

    output_stride = 8
    size_multiple = 32
    EXAMPLES = ({"width": 4},)

    def __init__(self, *, classes: int, width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        # One flat list with a ReLU after each convolution and a pool after each stage: the indices are
        # those of the widely published VGG-16 weights (features.0, features.2, features.5, …).
        layers: list[nn.Module] = []
        inputs = 3
        for count, factor in _STAGES:
            for _ in range(count):
                layers += [nn.Conv2d(inputs, factor * width, 3, padding=1), nn.ReLU()]
                inputs = factor * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Conv2d(inputs, 64 * width, 7, padding=3)
        self.fc7 = nn.Conv2d(64 * width, 64 * width, 1)
        self.dropout = nn.Dropout(dropout)
        self.score_fr = nn.Conv2d(64 * width, classes, 1)
        self.score_pool4 = nn.Conv2d(8 * width, classes, 1)
        self.score_pool3 = nn.Conv2d(4 * width, classes, 1)
        self.upscore2 = nn.ConvTranspose2d(classes, classes, 4, 2, 1, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(classes, classes, 4, 2, 1, bias=False)
        initialise(self)
        for enlarge in (self.upscore2, self.upscore_pool4):  # learned, from bilinear and class by class
            with torch.no_grad():
                enlarge.weight.zero_()
                for c in range(classes):
                    enlarge.weight[c, c] = bilinear(4)

    def forward(self, x: Tensor) -> Tensor:
        pools = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pools.append(x)
        _, _, pool3, pool4, pool5 = pools
        deep = self.dropout(torch.relu(self.fc6(pool5)))
        deep = self.dropout(torch.relu(self.fc7(deep)))
        deep = self.upscore2(self.score_fr(deep)) + self.score_pool4(pool4)
        logits: Tensor = self.upscore_pool4(deep) + self.score_pool3(pool3)
        return logits
