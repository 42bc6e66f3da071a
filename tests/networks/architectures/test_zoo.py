"""The published figures of the published networks: parameters, multiplications, strides, geometry.

Whole networks are built on torch's "meta" device, which computes shapes and no values, so that the
largest cost nothing here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import networks
from networks.architectures.fcn8s import bilinear


def outline(name, **arguments):
    with torch.device("meta"):
        return networks.create(name, classes=19, **arguments).eval()


# Parameters in millions as published: the papers' tables for the first three, ResNet-101 and the ASPP of
# 19 classes (42.5 + 1.4) for DeepLab, Table 1's convolutions and the "2 conv" classifier for ResNet-38.
@pytest.mark.parametrize(
    ("name", "arguments", "millions", "tolerance"),
    [
        ("ddrnet", {}, 5.7, 0.05),
        ("ddrnet", {"width": 64, "pyramid": 128}, 20.1, 0.05),  # DDRNet-23
        ("pidnet", {}, 7.6, 0.05),
        ("fcn8s", {}, 134, 0.5),
        ("resnet38", {}, 125, 1.5),
        ("deeplabv2", {}, 43.9, 0.1),
    ],
)
def test_parameters_are_as_many_as_published(name, arguments, millions, tolerance):
    count = sum(p.numel() for p in outline(name, **arguments).parameters()) / 1e6
    assert abs(count - millions) < tolerance


# Giga multiply-accumulates of a 1024x2048 frame, from the tables of the two papers.
@pytest.mark.parametrize(("name", "giga"), [("ddrnet", 36.3), ("pidnet", 47.6)])
def test_multiplications_are_as_many_as_published(name, giga):
    counter = FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        outline(name)(torch.empty(1, 3, 1024, 2048, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga, rel=0.02)


@pytest.mark.parametrize("name", ["ddrnet", "pidnet", "fcn8s", "resnet38", "deeplabv2"])
def test_whole_networks_answer_at_an_eighth_of_a_real_frame(name):
    network = outline(name)
    assert network.output_stride == 8
    for size in ((1024, 2048), (384, 480), (352, 608)):
        y = network(torch.empty(1, 3, *size, device="meta"))
        assert y.shape == (1, 19, size[0] // 8, size[1] // 8)


@pytest.mark.parametrize("name", ["ddrnet", "pidnet"])
def test_the_real_time_networks_take_a_camvid_frame(name):
    """360 rows are not a multiple of 64: the coarse maps have 23, 12 and 6 rows."""
    network = outline(name)
    seen = {}
    for stage in ("layer3", "layer4", "layer5"):
        getattr(network, stage).register_forward_hook(
            lambda m, x, y, stage=stage: seen.update({stage: tuple(y.shape[-2:])})
        )
    assert network(torch.empty(1, 3, 360, 480, device="meta")).shape == (1, 19, 45, 60)
    assert seen == {"layer3": (23, 30), "layer4": (12, 15), "layer5": (6, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn8s", "resnet38", "deeplabv2"])
def test_whole_heavy_networks_run_on_a_small_frame(name):
    torch.manual_seed(0)
    network = networks.create(name, classes=19).eval()
    with torch.inference_mode():
        y = network(torch.randn(1, 3, 64, 64))
    assert y.shape == (1, 19, 8, 8)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize(("kernel", "factor"), [(4, 2), (16, 8)])
def test_bilinear_taps_enlarge_like_half_pixel_interpolation(kernel, factor):
    x = torch.randn(1, 1, 6, 7)
    ours = F.conv_transpose2d(x, bilinear(kernel)[None, None], stride=factor, padding=factor // 2)
    theirs = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    assert ours.shape == theirs.shape
    # Zeros are outside the frame for the one, the border is repeated for the other.
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    assert torch.allclose(ours[inner], theirs[inner], atol=1e-6)


def test_fcn8s_sums_its_three_scores_bilinearly_before_any_training():
    torch.manual_seed(0)
    network = networks.create("fcn8s", classes=3, width=4).eval()
    for score in (network.score_pool4, network.score_pool3):
        torch.nn.init.zeros_(score.weight)
    scores = []
    network.score_fr.register_forward_hook(lambda m, x, y: scores.append(y))
    with torch.inference_mode():
        y = network(torch.randn(1, 3, 160, 192))
        up = F.interpolate(scores[0], scale_factor=2, mode="bilinear", align_corners=False)
        up = F.interpolate(up, scale_factor=2, mode="bilinear", align_corners=False)
    inner = (..., slice(4, -4), slice(4, -4))
    assert torch.allclose(y[inner], up[inner], atol=1e-5)


def test_resnet38_dilates_where_it_no_longer_strides():
    """The unit after a removed stride keeps the old dilation in its first convolution (A1, stride 8)."""
    network = outline("resnet38")
    found = {
        name: (m.stride[0], m.dilation[0])
        for name, m in network.named_modules()
        if isinstance(m, torch.nn.Conv2d) and m.kernel_size[0] == 3
    }
    assert [found[f"b{i}.conv_branch2a"] for i in (2, 3, 4, 5)] == [(2, 1), (2, 1), (2, 1), (1, 1)]
    assert found["b5.conv_branch2b1"] == found["b5_1.conv_branch2a"] == found["b5_2.conv_branch2b1"] == (1, 2)
    assert found["b6.conv_branch2b1"] == found["b7.conv_branch2b1"] == (1, 4)
    assert found["conv6a"] == found["classify"] == (1, 12)


def test_deeplabv2_strides_on_the_first_1x1_as_in_caffe():
    network = outline("deeplabv2")
    unit = network.layer2[0]
    assert (unit.conv1.stride, unit.conv2.stride, unit.downsample[0].stride) == ((2, 2), (1, 1), (2, 2))
    for stage, dilation in ((network.layer3, 2), (network.layer4, 4)):
        assert {u.conv2.dilation[0] for u in stage} == {dilation}
        assert {u.conv1.stride[0] for u in stage} == {1}
    assert [c.dilation[0] for c in network.layer5.conv2d_list] == [6, 12, 18, 24]


def test_deeplabv2_of_an_unknown_depth_is_refused():
    with pytest.raises(ValueError, match=r"depth must be one of \[50, 101\], not 34"):
        networks.create("deeplabv2", classes=3, depth=34)
