"""ESPNetv2 for segmentation (Mehta, Rastegari, Shapiro, Hajishirzi: "ESPNetv2: A Light-weight, Power
Efficient, and General Purpose Convolutional Neural Network", CVPR 2019), with the efficient pyramid
decoder of its authors (Mehta, Hajishirzi, Rastegari: "DiCENet", 2019, section on segmentation).

Attribute names are those of the released state_dicts, so that they load strictly by name.  The last
enlargement to the full frame is left to the graph contract.  Its adaptive average pooling is no operation
of any engine; `export.graph.writer` writes the same linear map with operations that all have.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.base import SegmentationNetwork, initialise

#: Channels of the encoder at 1/2, 1/4, 1/8 and 1/16 for each width of the paper.
CHANNELS: dict[float, tuple[int, int, int, int]] = {
    0.5: (16, 32, 64, 128),
    1.0: (32, 64, 128, 256),
    1.25: (32, 80, 160, 320),
    1.5: (32, 96, 192, 384),
    2.0: (32, 128, 256, 512),
}
BRANCHES = 4
#: Largest effective kernel of the dilated branches: when going down to 1/4, 1/8, 1/16; within 1/8, 1/16.
LIMIT_DOWN = (13, 11, 9)
LIMIT_STAGE = {3: 9, 4: 7}
REPEATS = {3: 3, 4: 7}
PYRAMID = (2.0, 1.5, 1.0, 0.5, 0.1)
SMALLEST_MAP = 5
DECODER_WIDTH = 16


class ConvBNAct(nn.Module):
    """Convolution, batch normalisation, PReLU (`act=False`: no PReLU)."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        if act:
            self.act = nn.PReLU(outputs)
        self.has_act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.act(x) if self.has_act else x


class BNAct(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class Dilated(nn.Module):
    """Depth-wise dilated 3x3 convolution: one branch of an EESP unit."""

    def __init__(self, channels: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, channels, 3, stride, dilation, dilation=dilation, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class EESP(nn.Module):
    """Extremely efficient spatial pyramid unit (paper, figure 1c): reduce, split, transform, merge.

    The outputs of the dilated branches are summed hierarchically (smallest dilation first) before they are
    concatenated, which removes the gridding of dilated convolutions.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, limit: int) -> None:
        super().__init__()
        width = outputs // BRANCHES
        if width * BRANCHES != outputs:
            raise ValueError(f"an EESP unit needs a multiple of {BRANCHES} channels, not {outputs}")
        kernels = sorted(k if k <= limit else 3 for k in (3 + 2 * i for i in range(BRANCHES)))
        self.stride = stride
        self.residual = stride == 1 and inputs == outputs
        self.proj_1x1 = ConvBNAct(inputs, width, 1, groups=BRANCHES)
        self.spp_dw = nn.ModuleList(Dilated(width, stride, (k - 1) // 2) for k in kernels)
        self.conv_1x1_exp = ConvBNAct(outputs, outputs, 1, groups=BRANCHES, act=False)
        self.br_after_cat = BNAct(outputs)
        # A strided unit returns before this activation; the released weights have it all the same.
        self.module_act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.proj_1x1(x)
        branches: list[Tensor] = []
        for convolve in self.spp_dw:
            branch = convolve(reduced)
            branches.append(branch + branches[-1] if branches else branch)
        merged = self.conv_1x1_exp(self.br_after_cat(torch.cat(branches, 1)))
        if self.stride == 2:
            return merged
        if self.residual:
            merged = merged + x
        return self.module_act(merged)


class Down(nn.Module):
    """Strided EESP (paper, figure 2): mean pooling beside an EESP unit, plus the shrunken input image."""

    def __init__(self, inputs: int, outputs: int, limit: int) -> None:
        super().__init__()
        self.eesp = EESP(inputs, outputs - inputs, 2, limit)
        self.inp_reinf = nn.Sequential(ConvBNAct(3, 3, 3), ConvBNAct(3, outputs, 1, act=False))
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor, image: Tensor) -> Tensor:
        merged = torch.cat([_halve(x), self.eesp(x)], 1)
        return self.act(merged + self.inp_reinf(image))


class Encoder(nn.Module):
    def __init__(self, channels: tuple[int, int, int, int]) -> None:
        super().__init__()
        c1, c2, c3, c4 = channels
        self.level1 = ConvBNAct(3, c1, 3, 2)
        self.level2_0 = Down(c1, c2, LIMIT_DOWN[0])
        self.level3_0 = Down(c2, c3, LIMIT_DOWN[1])
        self.level3 = nn.ModuleList(EESP(c3, c3, 1, LIMIT_STAGE[3]) for _ in range(REPEATS[3]))
        self.level4_0 = Down(c3, c4, LIMIT_DOWN[2])
        self.level4 = nn.ModuleList(EESP(c4, c4, 1, LIMIT_STAGE[4]) for _ in range(REPEATS[4]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps at 1/2, 1/4, 1/8 and 1/16."""
        image = _halve(_halve(x))
        half = self.level1(x)
        quarter = self.level2_0(half, image)
        image = _halve(image)
        eighth = self.level3_0(quarter, image)
        for unit in self.level3:
            eighth = unit(eighth)
        sixteenth = self.level4_0(eighth, _halve(image))
        for unit in self.level4:
            sixteenth = unit(sixteenth)
        return half, quarter, eighth, sixteenth


class _CBR(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        super().__init__()
        self.cbr = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.cbr(x)


class _BR(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.br = nn.Sequential(nn.BatchNorm2d(channels), nn.PReLU(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.br(x)


class Shuffle(nn.Module):
    """Channel shuffle: [g groups of n] -> [n groups of g]."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class PyramidPool(nn.Module):
    """Efficient pyramid pooling: the same map convolved at five sizes, then merged (DiCENet, section 4)."""

    def __init__(self, inputs: int, projection: int, outputs: int, last: bool = False) -> None:
        super().__init__()
        levels = len(PYRAMID)
        self.projection_layer = _CBR(inputs, projection, 1)
        self.stages = nn.ModuleList(
            nn.Conv2d(projection, projection, 3, 1, 1, groups=projection, bias=False) for _ in PYRAMID
        )
        self.merge_layer = nn.Sequential(
            _BR(projection * levels),
            Shuffle(levels),
            _CBR(projection * levels, projection, 3, groups=projection),
            nn.Conv2d(projection, outputs, 1, bias=last),
        )
        self.last = last
        if not last:
            self.br = _BR(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.projection_layer(x)
        height, width = x.shape[2], x.shape[3]
        maps = []
        for scale, stage in zip(PYRAMID, self.stages, strict=True):
            h, w = scaled(height, scale), scaled(width, scale)
            if scale > 1.0:
                maps.append(F.adaptive_avg_pool2d(stage(_stretch(x, h, w)), (height, width)))
            elif scale < 1.0:
                maps.append(_stretch(stage(F.adaptive_avg_pool2d(x, (h, w))), height, width))
            else:
                maps.append(stage(x))
        merged = self.merge_layer(torch.cat(maps, 1))
        return merged if self.last else self.br(merged)


class Bridge(nn.Module):
    """Encoder map to the decoder's width, weighted per channel by its global mean."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wt_layer = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, outputs, 1, bias=False), nn.Sigmoid()
        )
        self.expansion_layer = _CBR(inputs, outputs, 3, groups=math.gcd(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.expansion_layer(x) * self.wt_layer(x)


class ESPNetv2(SegmentationNetwork):
    """ESPNetv2 with its pyramid decoder.

    Args:
        classes: output channels.
        scale: width of the paper: 0.5, 1.0, 1.25, 1.5 or 2.0.
        projection: channels inside the decoder's pyramids; None: half the classes, at most 16, as the
            authors have it (the released Cityscapes files: 10, whatever head follows).
    Shape:
        float32 [N,3,H,W] -> logits float32 [N,classes,H/2,W/2]; H and W multiples of 32, at least 64.
    """

    output_stride = 2
    size_multiple = 32
    EXAMPLES = ({"scale": 0.5}, {"scale": 1.0, "projection": 10})
    UNUSED: ClassVar[tuple[str, ...]] = (r"level\d_0\.eesp\.module_act",)

    def __init__(self, *, classes: int, scale: float = 1.0, projection: int | None = None) -> None:
        super().__init__()
        if scale not in CHANNELS:
            raise ValueError(f"espnetv2: scale {scale!r} is unknown; choose one of: {sorted(CHANNELS)}")
        c1, c2, c3, c4 = CHANNELS[scale]
        p = projection if projection is not None else max(1, min(classes // 2, DECODER_WIDTH))
        d1, d2, d3 = 4 * DECODER_WIDTH, 3 * DECODER_WIDTH, 2 * DECODER_WIDTH
        self.base_net = Encoder(CHANNELS[scale])
        self.bu_dec_l1 = PyramidPool(c4, p, d1)
        self.bu_dec_l2 = PyramidPool(d1, p, d2)
        self.bu_dec_l3 = PyramidPool(d2, p, d3)
        self.bu_dec_l4 = PyramidPool(d3, p, classes, last=True)
        self.merge_enc_dec_l2 = Bridge(c3, d1)
        self.merge_enc_dec_l3 = Bridge(c2, d2)
        self.merge_enc_dec_l4 = Bridge(c1, d3)
        self.bu_br_l2 = nn.Sequential(nn.BatchNorm2d(d1), nn.PReLU(d1))
        self.bu_br_l3 = nn.Sequential(nn.BatchNorm2d(d2), nn.PReLU(d2))
        self.bu_br_l4 = nn.Sequential(nn.BatchNorm2d(d3), nn.PReLU(d3))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        half, quarter, eighth, sixteenth = self.base_net(x)
        y = self.bu_dec_l1(sixteenth)
        y = self.bu_dec_l2(self.bu_br_l2(self.merge_enc_dec_l2(eighth) + double(y)))
        y = self.bu_dec_l3(self.bu_br_l3(self.merge_enc_dec_l3(quarter) + double(y)))
        return self.bu_dec_l4(self.bu_br_l4(self.merge_enc_dec_l4(half) + double(y)))


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


@torch.fx.wrap
def scaled(side: int, scale: float) -> int:
    """Length of a pyramid level's side; never below `SMALLEST_MAP`."""
    return max(SMALLEST_MAP, math.ceil(side * scale))


def _stretch(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=True)


# --- released files --------------------------------------------------------------------------------


def read_checkpoint(state: dict[str, Tensor], classes: int) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and arguments from a released state_dict.

    The authors' Cityscapes files have a twentieth output, "background", which no pixel of the training labels
    carries: its row is dropped.  No other output is.

    Returns:
        the state_dict for `classes` outputs, and the arguments of the network.
    Raises:
        ValueError: not an ESPNetv2 file, or one with another number of classes.
    """
    first, deep, head = (
        "base_net.level1.conv.weight",
        "base_net.level4.0.module_act.weight",
        "bu_dec_l4.merge_layer.3",
    )
    if any(name not in state for name in (first, deep, f"{head}.weight", f"{head}.bias")):
        raise ValueError(f"it is not a segmentation ESPNetv2: it lacks one of {first}, {deep}, {head}.*")
    ends = (int(state[first].shape[0]), int(state[deep].shape[0]))
    scale = next((s for s, c in CHANNELS.items() if (c[0], c[3]) == ends), None)
    if scale is None:
        raise ValueError(f"its encoder has {ends[0]} to {ends[1]} channels, which is no width of ESPNetv2")
    outputs = int(state[f"{head}.weight"].shape[0])
    state = dict(state)
    if (outputs, classes) == (20, 19):
        for name in (f"{head}.weight", f"{head}.bias"):
            state[name] = state[name][:classes].clone()
    elif outputs != classes:
        raise ValueError(f"its head has {outputs} outputs, the label space {classes} classes; choose its own")
    projection = int(state["bu_dec_l1.stages.0.weight"].shape[0])
    return state, {"scale": scale, "projection": projection}
