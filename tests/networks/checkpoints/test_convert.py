"""Renaming of published weights, on state dicts made up here with the published names and shapes."""

from __future__ import annotations

import pytest
import torch

import networks
from networks import import_checkpoint
from networks.architectures.fcn8s import bilinear
from networks.checkpoints import convert
from networks.pack import load_pack


def fits(name, result):
    """The converted weights load strictly into the network their arguments describe."""
    state, arguments = result
    network = networks.create(name, classes=5, **arguments)
    network.load_state_dict(state, strict=True)
    return network


def normalisation(name, channels, style="torch"):
    if style == "torch":
        keys = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
        return {f"{name}.{key}": torch.full((channels,), value) for key, value in keys.items()}
    return {
        f"arg:{name}_gamma": torch.full((channels,), 3.0),
        f"arg:{name}_beta": torch.full((channels,), 4.0),
        f"aux:{name}_moving_mean": torch.full((channels,), 5.0),
        f"aux:{name}_moving_var": torch.full((channels,), 6.0),
    }


def basic(name, inputs, width, style="torch"):
    """A basic residual block under its published names."""
    state = {
        f"{name}.conv1.weight": torch.randn(width, inputs, 3, 3),
        f"{name}.conv2.weight": torch.randn(width, width, 3, 3),
        **normalisation(f"{name}.bn1", width),
        **normalisation(f"{name}.bn2", width),
    }
    if inputs != width:
        state[f"{name}.downsample.0.weight"] = torch.randn(width, inputs, 1, 1)
        state |= normalisation(f"{name}.downsample.1", width)
    return state


def bottleneck(name, inputs, width, expansion=2):
    outputs = expansion * width
    return {
        f"{name}.conv1.weight": torch.randn(width, inputs, 1, 1),
        f"{name}.conv2.weight": torch.randn(width, width, 3, 3),
        f"{name}.conv3.weight": torch.randn(outputs, width, 1, 1),
        **normalisation(f"{name}.bn1", width),
        **normalisation(f"{name}.bn2", width),
        **normalisation(f"{name}.bn3", outputs),
    }


def shortcut(name, inputs, outputs):
    return {
        f"{name}.downsample.0.weight": torch.randn(outputs, inputs, 1, 1),
        **normalisation(f"{name}.downsample.1", outputs),
    }


def unit(name, index, inputs, outputs, kernel=1):
    """A convolution and its normalisation at two places of a published Sequential."""
    return {
        f"{name}.{index}.weight": torch.randn(outputs, inputs, kernel, kernel),
        **normalisation(f"{name}.{index + 1}", outputs),
    }


def activated(name, index, inputs, outputs, kernel=1, groups=1):
    return {
        **normalisation(f"{name}.{index}", inputs),
        f"{name}.{index + 2}.weight": torch.randn(outputs, inputs // groups, kernel, kernel),
    }


def stem_and_head(w, head_inputs, head_width, classes):
    state = {}
    for index, inputs in ((0, 3), (3, w)):
        state |= unit("conv1", index, inputs, w, 3)
        state[f"conv1.{index}.bias"] = torch.randn(w)
    return state | classifier("final_layer", head_inputs, head_width, classes)


def classifier(name, inputs, width, classes):
    return {
        **normalisation(f"{name}.bn1", inputs),
        f"{name}.conv1.weight": torch.randn(width, inputs, 3, 3),
        **normalisation(f"{name}.bn2", width),
        f"{name}.conv2.weight": torch.randn(classes, width, 1, 1),
        f"{name}.conv2.bias": torch.randn(classes),
    }


def scales(inputs, width, outputs):
    state = activated("spp.scale0", 0, inputs, width)
    for i in (1, 2, 3, 4):
        state |= activated(f"spp.scale{i}", 1, inputs, width)
    state |= activated("spp.compression", 0, 5 * width, outputs)
    return state | activated("spp.shortcut", 0, inputs, outputs)


def both(w, blocks):
    """What DDRNet and PIDNet publish under the same names."""
    state = basic("layer1.0", w, w) | basic("layer1.1", w, w)
    for stage, inputs, outputs, count in (
        (2, w, 2 * w, 2),
        (3, 2 * w, 4 * w, blocks),
        (4, 4 * w, 8 * w, blocks),
    ):
        for i in range(count):
            state |= basic(f"layer{stage}.{i}", inputs if i == 0 else outputs, outputs)
    state |= bottleneck("layer5.0", 8 * w, 8 * w) | shortcut("layer5.0", 8 * w, 16 * w)
    for stage in ("layer3_", "layer4_"):
        state |= basic(f"{stage}.0", 2 * w, 2 * w) | basic(f"{stage}.1", 2 * w, 2 * w)
    state |= bottleneck("layer5_.0", 2 * w, 2 * w) | shortcut("layer5_.0", 2 * w, 4 * w)
    return state | unit("compression3", 0, 4 * w, 2 * w) | unit("compression4", 0, 8 * w, 2 * w)


def published_ddrnet(w=8, classes=5, pyramid=32):
    state = stem_and_head(w, 4 * w, 2 * w, classes) | both(w, 2) | scales(16 * w, pyramid, 4 * w)
    for i in (1, 2, 3, 4):
        state |= activated(f"spp.process{i}", 0, pyramid, pyramid, 3)
    state |= unit("down3", 0, 2 * w, 4 * w, 3) | unit("down4", 0, 2 * w, 4 * w, 3)
    state |= unit("down4", 3, 4 * w, 8 * w, 3)
    return state | classifier("seghead_extra", 2 * w, 2 * w, classes)


def published_pidnet(w=8, classes=5, pyramid=24, head=32):
    state = stem_and_head(w, 4 * w, head, classes) | both(w, 3) | scales(16 * w, pyramid, 4 * w)
    state |= activated("spp.scale_process", 0, 4 * pyramid, 4 * pyramid, 3, groups=4)
    state |= bottleneck("layer5.1", 16 * w, 8 * w)
    for name in ("pag3", "pag4"):
        state |= unit(f"{name}.f_x", 0, 2 * w, w) | unit(f"{name}.f_y", 0, 2 * w, w)
    state |= unit("dfm.conv_p", 0, 4 * w, 4 * w) | unit("dfm.conv_i", 0, 4 * w, 4 * w)
    state |= basic("layer3_d", 2 * w, w)
    state |= bottleneck("layer4_d.0", w, w) | shortcut("layer4_d.0", w, 2 * w)
    state |= bottleneck("layer5_d.0", 2 * w, 2 * w) | shortcut("layer5_d.0", 2 * w, 4 * w)
    state |= unit("diff3", 0, 4 * w, w, 3) | unit("diff4", 0, 8 * w, 2 * w, 3)
    return state | classifier("seghead_p", 2 * w, 4 * w, classes) | classifier("seghead_d", 2 * w, w, 1)


@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
@pytest.mark.parametrize(("name", "published"), [("ddrnet", published_ddrnet), ("pidnet", published_pidnet)])
def test_the_real_time_networks_load_under_their_authors_names(name, published, prefix):
    theirs = {prefix + key: value for key, value in published().items()}
    theirs[prefix.replace("model.", "") + "loss.criterion.weight"] = torch.ones(5)
    network = fits(name, getattr(convert, f"read_{name}")(theirs, 5))
    assert torch.equal(network.layer4[1].conv2.weight, theirs[prefix + "layer4.1.conv2.weight"])


def test_pidnet_l_is_refused():
    theirs = published_pidnet() | activated("spp.process1", 0, 24, 24, 3)
    with pytest.raises(ValueError, match="it is PIDNet-L"):
        convert.read_pidnet(theirs, 5)


@pytest.mark.parametrize(
    ("name", "published", "widths"),
    [
        ("ddrnet", published_ddrnet, {"pyramid": 24}),
        ("pidnet", published_pidnet, {"pyramid": 20, "head": 12}),
    ],
)
def test_the_widths_of_the_larger_forms_are_read_from_the_file(name, published, widths):
    state, arguments = getattr(convert, f"read_{name}")(published(**widths), 5)
    assert arguments == {"width": 8, **widths}
    fits(name, (state, arguments))


# torchvision's VGG-16, "features": index of each convolution, its inputs and outputs.
VGG = [
    (0, 3, 64),
    (2, 64, 64),
    (5, 64, 128),
    (7, 128, 128),
    (10, 128, 256),
    (12, 256, 256),
    (14, 256, 256),
    (17, 256, 512),
    (19, 512, 512),
    (21, 512, 512),
    (24, 512, 512),
    (26, 512, 512),
    (28, 512, 512),
]
CAFFE = ["1_1", "1_2", "2_1", "2_2", "3_1", "3_2", "3_3", "4_1", "4_2", "4_3", "5_1", "5_2", "5_3"]


def test_imagenet_vgg16_becomes_the_trunk_of_fcn8s():
    shrink = 16
    theirs = {}
    for index, inputs, outputs in VGG:
        inputs, outputs = inputs if inputs == 3 else inputs // shrink, outputs // shrink
        theirs[f"features.{index}.weight"] = torch.randn(outputs, inputs, 3, 3)
        theirs[f"features.{index}.bias"] = torch.randn(outputs)
    for index, inputs, outputs in ((0, 32 * 49, 256), (3, 256, 256), (6, 256, 1000)):
        theirs[f"classifier.{index}.weight"] = torch.randn(outputs, inputs)
        theirs[f"classifier.{index}.bias"] = torch.randn(outputs)
    state = convert.vgg16(theirs)
    network = networks.create("fcn8s", classes=5, width=4)
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {
        "score_fr",
        "score_pool4",
        "score_pool3",
        "upscore2",
        "upscore_pool4",
    }
    # The convolution answers at the centre of a 7x7 map what the fully connected layer answers for it.
    x = torch.randn(1, 32, 7, 7)
    with torch.inference_mode():
        ours = network.fc6(x)[0, :, 3, 3]
    linear = theirs["classifier.0.weight"] @ x.flatten() + theirs["classifier.0.bias"]
    assert torch.allclose(ours, linear, atol=1e-3)


def published_fcn8s(classes=5):
    """The names of the Caffe release, with VGG shrunk by 16."""
    theirs = {}
    for where, (_, inputs, outputs) in zip(CAFFE, VGG, strict=True):
        inputs, outputs = inputs if inputs == 3 else inputs // 16, outputs // 16
        theirs[f"conv{where}.weight"] = torch.randn(outputs, inputs, 3, 3)
        theirs[f"conv{where}.bias"] = torch.randn(outputs)
    for name, inputs, outputs, kernel in (
        ("fc6", 32, 256, 7),
        ("fc7", 256, 256, 1),
        ("score_fr", 256, classes, 1),
        ("score_pool4", 32, classes, 1),
        ("score_pool3", 16, classes, 1),
    ):
        theirs[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel)
        theirs[f"{name}.bias"] = torch.randn(outputs)
    for name, kernel in (("upscore2", 4), ("upscore_pool4", 4), ("upscore8", 16)):
        theirs[f"{name}.weight"] = torch.eye(classes)[:, :, None, None] * bilinear(kernel)
    return theirs


def test_fcn8s_loads_under_caffes_names():
    theirs = published_fcn8s()
    network = fits("fcn8s", convert.read_fcn8s(theirs, 5))
    assert torch.equal(network.features[14].weight, theirs["conv3_3.weight"])


def test_a_learned_last_enlargement_is_refused():
    theirs = published_fcn8s()
    theirs["upscore8.weight"][0, 1] += 0.5
    with pytest.raises(ValueError, match="not the fixed bilinear"):
        convert.read_fcn8s(theirs, 5)


def test_vgg16_with_batch_normalisation_is_refused():
    with pytest.raises(ValueError, match="with batch normalisation"):
        convert.vgg16(normalisation("features.1", 64))


def published_resnet38(w=4, classes=5):
    """mxnet's names: res2a, res2b1, …, res7a; within a unit, convolutions by branch."""
    theirs = {
        "arg:conv1a_weight": torch.randn(w, 3, 3, 3),
        "arg:conv6a_weight": torch.randn(8 * w, 64 * w, 3, 3),
        "arg:conv6a_bias": torch.randn(8 * w),
        f"arg:linear{classes}_weight": torch.randn(classes, 8 * w, 3, 3),
        f"arg:linear{classes}_bias": torch.randn(classes),
        **normalisation("bn7", 64 * w, "mxnet"),
    }
    inputs = w
    for stage, count, widths, kernels in (
        (2, 3, (2, 2), (3, 3)),
        (3, 3, (4, 4), (3, 3)),
        (4, 6, (8, 8), (3, 3)),
        (5, 3, (8, 16), (3, 3)),
        (6, 1, (8, 16, 32), (1, 3, 1)),
        (7, 1, (16, 32, 64), (1, 3, 1)),
    ):
        for i in range(count):
            name = f"{stage}a" if i == 0 else f"{stage}b{i}"
            channels = inputs
            for branch, factor, kernel in zip(("2a", "2b1", "2b2"), widths, kernels, strict=False):
                theirs |= normalisation(f"bn{name}_branch{branch}", channels, "mxnet")
                theirs[f"arg:res{name}_branch{branch}_weight"] = torch.randn(
                    factor * w, channels, kernel, kernel
                )
                channels = factor * w
            if i == 0:
                theirs[f"arg:res{name}_branch1_weight"] = torch.randn(channels, inputs, 1, 1)
            inputs = channels
    return theirs


def test_resnet38_loads_under_mxnets_names():
    theirs = published_resnet38()
    network = fits("resnet38", convert.read_resnet38(theirs, 5))
    assert torch.equal(network.b4_5.conv_branch2b1.weight, theirs["arg:res4b5_branch2b1_weight"])
    assert torch.equal(network.b6.conv_branch1.weight, theirs["arg:res6a_branch1_weight"])
    bn = network.b5_2.bn_branch2b1
    assert [v[0].item() for v in (bn.weight, bn.bias, bn.running_mean, bn.running_var)] == [3, 4, 5, 6]


def test_resnet38_loads_under_the_torch_ports_names():
    """b2, b2_1, … bn7, with an ImageNet classifier `fc8` that is left out."""
    theirs = networks.create("resnet38", classes=5, width=4).state_dict()
    known = {"b2.conv_branch1.weight", "b4_5.bn_branch2b1.running_var", "b7.conv_branch2b2.weight"}
    assert known <= set(theirs)
    fits("resnet38", convert.read_resnet38({**theirs, "fc8.weight": torch.zeros(1000, 256)}, 5))


def published_deeplabv2(w=4, classes=5, head="layer5"):
    theirs = {"conv1.weight": torch.randn(w, 3, 7, 7), **normalisation("bn1", w)}
    inputs = w
    for stage, (count, width) in enumerate(((3, w), (4, 2 * w), (23, 4 * w), (3, 8 * w)), start=1):
        for i in range(count):
            theirs |= bottleneck(f"layer{stage}.{i}", inputs, width, expansion=4)
            if i == 0:
                theirs |= shortcut(f"layer{stage}.0", inputs, 4 * width)
            inputs = 4 * width
    for i in range(4):
        theirs[f"{head}.conv2d_list.{i}.weight"] = torch.randn(classes, 32 * w, 3, 3)
        theirs[f"{head}.conv2d_list.{i}.bias"] = torch.randn(classes)
    return theirs


@pytest.mark.parametrize("prefix", ["", "Scale.", "module."])
def test_deeplabv2_loads_under_the_ports_names_and_without_step_counters(prefix):
    theirs = {prefix + key: value for key, value in published_deeplabv2().items()}
    assert not any("num_batches_tracked" in key for key in theirs)
    state, arguments = convert.read_deeplabv2(theirs, 5)
    assert arguments == {"depth": 101, "width": 4}
    fits("deeplabv2", (state, arguments))


def test_of_two_classifiers_the_one_on_the_last_stage_is_taken():
    theirs = published_deeplabv2(head="layer6")
    theirs["layer5.conv2d_list.0.weight"] = torch.randn(5, 64, 3, 3)
    network = fits("deeplabv2", convert.read_deeplabv2(theirs, 5))
    assert torch.equal(network.layer5.conv2d_list[2].weight, theirs["layer6.conv2d_list.2.weight"])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("ddrnet", published_ddrnet),
        ("pidnet", published_pidnet),
        ("fcn8s", published_fcn8s),
        ("resnet38", published_resnet38),
        ("deeplabv2", published_deeplabv2),
    ],
)
class TestEveryReader:
    def test_is_the_architectures_own(self, name, published):
        module = networks.architecture(name).__module__
        assert __import__(module, fromlist=["x"]).read_checkpoint is getattr(convert, f"read_{name}")

    def test_refuses_another_class_count(self, name, published):
        with pytest.raises(ValueError, match="head has 5 outputs, the label space 19 classes"):
            getattr(convert, f"read_{name}")(published(), 19)

    def test_refuses_another_network(self, name, published):
        with pytest.raises(ValueError, match=r"it is not a segmentation .*: it lacks "):
            getattr(convert, f"read_{name}")({"encoder.weight": torch.zeros(1)}, 5)


def test_two_names_that_would_become_one_are_refused():
    with pytest.raises(ValueError, match=r"would both become 'conv1.weight'"):
        convert.rename({"conv1.weight": torch.zeros(1), "module.conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("name", "published"), [("pidnet", published_pidnet), ("resnet38", published_resnet38)]
)
def test_a_released_file_becomes_a_pack_in_one_command(name, published, tmp_path, capsys):
    theirs = published(classes=19)
    file, pack = tmp_path / "file.pth", tmp_path / "pack"
    torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.items()}}, file)
    arguments = [name, str(file), "--classes", "cityscapes19", "--size", "64x96", "--out", str(pack)]
    assert import_checkpoint.main(arguments) == 0
    network = load_pack(pack).network()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 19, 8, 12)
