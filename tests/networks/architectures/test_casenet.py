"""CASENet against the published layers written out, its size and cost, fusion for export, state dicts by
name.
"""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import networks
from networks.architectures.casenet import BLOCKS, CASENet, enlarge, read_checkpoint
from networks.architectures.casenet_light import CASENetLight
from networks.architectures.espnetv2_edges import ESPNetv2Edges
from networks.checkpoints.casenet import DEPTHS, from_resnet


def caffe_kernel(size):
    """The bilinear filler of Caffe's deconvolution."""
    f = size // 2
    c = (2 * f - 1) / (2.0 * f)
    return torch.tensor(
        [[(1 - abs(i / f - c)) * (1 - abs(j / f - c)) for j in range(size)] for i in range(size)]
    )


def caffe_deconvolution(x, factor):
    channels = x.shape[1]
    kernel = caffe_kernel(2 * factor).to(x)[None, None].repeat(channels, 1, 1, 1)
    return F.conv_transpose2d(x, kernel, stride=factor, padding=factor // 2, groups=channels)


def randomise(network, seed=0):
    """Weights and statistics that make every term count."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=g))
            elif name.startswith("ce_fusion") or "score" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=g))
        for name, b in network.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.2 * torch.randn(b.shape, generator=g))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g))
    return network.eval()


def small(classes=4):
    torch.manual_seed(1)
    return randomise(CASENet(classes=classes, depth=14, width=8))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_enlarging_is_caffes_deconvolution_borders_included(factor, size):
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(enlarge(x, factor), caffe_deconvolution(x, factor), atol=1e-5, rtol=1e-5)
    plain = F.interpolate(x, scale_factor=float(factor), mode="bilinear", align_corners=False)
    assert (plain - enlarge(x, factor)).abs().max() > 0.05  # interpolation alone is not the same map


def test_forward_is_the_published_graph_written_out():
    network, x = small(), torch.randn(2, 3, 32, 40)
    s = network.state_dict()

    def bn(y, name):
        y = (y - s[f"{name}.running_mean"][:, None, None]) / torch.sqrt(
            s[f"{name}.running_var"][:, None, None] + 1e-5
        )
        return y * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]

    def block(y, name, stride, dilation):
        z = F.relu(bn(F.conv2d(y, s[f"{name}.conv1.weight"], stride=stride), f"{name}.bn1"))
        z = F.conv2d(z, s[f"{name}.conv2.weight"], padding=dilation, dilation=dilation)
        z = F.relu(bn(z, f"{name}.bn2"))
        z = bn(F.conv2d(z, s[f"{name}.conv3.weight"]), f"{name}.bn3")
        short = bn(F.conv2d(y, s[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
        return F.relu(z + short)

    def score(y, name):
        return F.conv2d(y, s[f"{name}.weight"], s[f"{name}.bias"])

    stem = F.relu(bn(F.conv2d(x, s["conv1.weight"], padding=3), "bn_conv1"))
    # Caffe's pooling rounds up: pad below and right with what never wins
    pooled = F.max_pool2d(F.pad(stem, (0, 1, 0, 1), value=-torch.inf), 3, 2)
    two = block(pooled, "res2.0", 1, 2)
    three = block(two, "res3.0", 2, 2)
    five = block(block(three, "res4.0", 2, 2), "res5.0", 1, 4)
    assert [tuple(t.shape[2:]) for t in (stem, two, three, five)] == [(32, 40), (16, 20), (8, 10), (4, 5)]
    side1 = score(stem, "score_edge_side1")
    side2 = caffe_deconvolution(score(two, "score_edge_side2"), 2)
    side3 = caffe_deconvolution(score(three, "score_edge_side3"), 4)
    a5 = caffe_deconvolution(score(five, "score_cls_side5"), 8)
    fused = torch.cat(
        [
            sum(
                s["ce_fusion.weight"][k, i] * t[:, 0]
                for i, t in enumerate((a5[:, k : k + 1], side1, side2, side3))
            ).unsqueeze(1)
            + s["ce_fusion.bias"][k]
            for k in range(4)
        ],
        1,
    )
    with torch.inference_mode():
        ours_a5, ours = network.sides(x)
    torch.testing.assert_close(ours_a5, a5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, fused, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(network(x), fused, atol=1e-4, rtol=1e-4)


def macs(network, size):
    total = 0

    def count(module, _, out):
        nonlocal total
        kernel = module.kernel_size[0] * module.kernel_size[1]
        total += out.numel() * kernel * module.in_channels // module.groups

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    network(torch.empty(1, 3, *size, device="meta"))
    return total


@pytest.mark.parametrize(("depth", "parameters", "giga"), [(101, 42.5e6, 173.6), (50, 23.6e6, 107.7)])
def test_size_and_cost_are_the_measured_ones(depth, parameters, giga):
    with torch.device("meta"):
        network = networks.create("casenet", classes=19, depth=depth).eval()
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(parameters, rel=0.003)
    assert macs(network, (472, 472)) / 1e9 == pytest.approx(giga, rel=0.005)


@pytest.mark.parametrize("classes", [1, 4])
def test_the_dense_fusion_gives_the_same_answers(classes):
    for network in (small(classes), CASENetLight(classes=classes, scale=0.5).eval()):
        x = torch.randn(1, 3, 32, 48)
        dense = network.fused()
        with torch.inference_mode():
            torch.testing.assert_close(dense(x), network(x), atol=1e-5, rtol=1e-5)
        fusion = dense.ce_fusion if isinstance(dense, CASENet) else dense.edge_head.ce_fusion
        assert fusion.groups == 1
        assert fusion.in_channels == classes + 3


def test_fusion_starts_as_the_identity_on_a5():
    network = CASENet(classes=3, depth=14, width=8)
    weight = network.ce_fusion.weight.detach()[:, :, 0, 0]
    assert (weight[:, 0] == 1).all()
    assert weight[:, 1:].abs().max() < 0.1
    assert not network.ce_fusion.bias.any()


def test_a_ports_state_dict_loads_by_name_without_its_fixed_kernels():
    network = small()
    published = {f"module.{k}": v for k, v in network.state_dict().items()}
    published = {k: v for k, v in published.items() if not k.endswith("num_batches_tracked")}
    published["module.upsample_edge_side2.weight"] = caffe_kernel(4)[None, None]
    published["module.upsample_cls_side5.weight"] = caffe_kernel(16)[None, None].repeat(4, 1, 1, 1)
    state, arguments = read_checkpoint(published, 4)
    assert arguments == {"depth": 14, "width": 8}
    other = networks.create("casenet", classes=4, **arguments).eval()
    other.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(other(x), network(x))
    published["module.upsample_edge_side2.weight"] = torch.ones(1, 1, 4, 4)
    with pytest.raises(ValueError, match="learned deconvolutions"):
        read_checkpoint(published, 4)
    with pytest.raises(ValueError, match="4 classes, 5"):
        read_checkpoint(published, 5)
    with pytest.raises(ValueError, match="not CASENet's names"):
        read_checkpoint({"fc.weight": torch.ones(1)}, 4)


def to_caffe(state):
    """Blobs as an extraction script names them; the statistics carry a factor to be divided by."""
    blobs = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        stem, _, kind = name.rpartition(".")
        match = re.match(r"res(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)", stem)
        if match:
            stage, block = match[1], int(match[2])
            letter = "abc"[block] if stage in "25" else "a" if block == 0 else f"b{block}"
            branch = "1" if match[3] == "downsample." else "2" + "abc"[int(match[4]) - 1]
            conv = match[3] == "conv" or (match[3] == "downsample." and match[4] == "0")
            layer = f"{stage}{letter}_branch{branch}"
        else:
            conv, layer = stem != "bn_conv1", "_conv1"
        if conv:
            full = f"res{layer}" if match else stem
            blobs[f"{full}_{0 if kind == 'weight' else 1}"] = value
        elif kind.startswith("running"):
            blobs[f"bn{layer}_{0 if kind == 'running_mean' else 1}"] = value * 999.9
            blobs[f"bn{layer}_2"] = torch.tensor([999.9])
        else:
            blobs[f"scale{layer}_{0 if kind == 'weight' else 1}"] = value
    return blobs


def test_caffe_blobs_come_back_under_our_names():
    network = small()
    state, arguments = read_checkpoint(to_caffe(network.state_dict()), 4)
    other = networks.create("casenet", classes=4, **arguments).eval()
    other.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 24, 16)
    torch.testing.assert_close(other(x), network(x), atol=1e-5, rtol=1e-5)


def test_caffes_block_letters_of_a_deep_stage():
    with torch.device("meta"):
        names = list(networks.create("casenet", classes=2).state_dict())
    state = {n: torch.full((1,), float(i)) for i, n in enumerate(names)}
    blobs = to_caffe(state)
    assert "res4b22_branch2c_0" in blobs
    assert "scale3b3_branch2a_1" in blobs
    assert "res5c_branch2b_0" in blobs


def test_a_checkpoints_depth_is_that_of_the_network():
    assert {blocks[2]: depth for depth, blocks in BLOCKS.items()} == DEPTHS


def test_a_resnets_weights_start_the_backbone():
    network = small()
    theirs = {}
    for name, value in network.state_dict().items():
        if not name.startswith(CASENet.NEW):
            name = re.sub(r"^res(\d)", lambda m: f"layer{int(m[1]) - 1}", name)
            theirs[name.replace("bn_conv1", "bn1")] = value + 1
    before = {k: v.clone() for k, v in network.state_dict().items()}
    loaded = from_resnet(network, theirs | {"fc.weight": torch.ones(1)})
    for name, value in network.state_dict().items():
        expected = before[name] + 1 if name in loaded else before[name]
        assert torch.equal(value, expected)
    assert "conv1.weight" in loaded
    assert not any(n.startswith(("score", "ce_")) for n in loaded)
    del theirs["layer3.0.conv2.weight"]
    with pytest.raises(ValueError, match=r"layer3\.0\.conv2"):
        from_resnet(network, theirs)


def test_the_light_network_starts_from_a_segmentation_networks_encoder():
    segmentation = networks.create("espnetv2", classes=5, scale=0.5).eval()
    light = CASENetLight(classes=3, scale=0.5).eval()
    light.load_encoder(segmentation.state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert all(
            torch.equal(a, b) for a, b in zip(light.base_net(x), segmentation.base_net(x), strict=True)
        )
        assert light(x).shape == (1, 3, 32, 32)


def test_the_joint_network_segments_as_espnetv2_does_and_answers_edges_beside():
    segmentation = networks.create("espnetv2", classes=5, scale=0.5).eval()
    joint = ESPNetv2Edges(classes=5, scale=0.5, edge_classes=4).eval()
    missing, unexpected = joint.load_state_dict(segmentation.state_dict(), strict=False)
    assert not unexpected
    assert all(n.startswith("edge_head.") for n in missing)
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        both = joint.joint(x)
        assert torch.equal(joint(x), segmentation(x))
        assert torch.equal(both[0], segmentation(x))
        assert both[1].shape == both[2].shape == (1, 4, 32, 48)
        assert all(torch.equal(a, b) for a, b in zip(joint.sides(x), both[1:], strict=True))


def test_a_checkpoint_becomes_an_edge_pack(tmp_path):
    from networks.import_checkpoint import main
    from networks.pack import load_pack

    torch.save({"state_dict": small(19).state_dict()}, tmp_path / "casenet.pth")
    arguments = ["casenet", str(tmp_path / "casenet.pth"), "--classes", "cityscapes19", "--size", "64x96"]
    arguments += ["--channel-order", "bgr", "--mean", "0.40787,0.45753,0.48108"]
    arguments += ["--std", "0.0039216,0.0039216,0.0039216", "--out", str(tmp_path / "pack")]
    assert main(arguments) == 0
    pack = load_pack(tmp_path / "pack")
    assert pack.spec.task == "edges"
    assert pack.spec.channel_order == "bgr"
    x = torch.randn(1, 3, 16, 24)
    assert torch.equal(pack.network()(x), small(19)(x))


def test_unknown_depth_and_scale_are_named():
    with pytest.raises(ValueError, match="depth 34"):
        networks.create("casenet", classes=2, depth=34)
    with pytest.raises(ValueError, match="scale 3"):
        networks.create("casenet_light", classes=2, scale=3)
