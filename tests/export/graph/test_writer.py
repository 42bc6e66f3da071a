"""The ONNX writer, operation by operation, against torch; and what it refuses."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import nn

from export.errors import ExportError
from export.graph import writer
from export.graph.contract import ServingGraph
from export.graph.onnx_graph import Graph
from export.graph.pooling import adaptive_mean
from export.graph.writer import write
from networks.base import SegmentationNetwork
from networks.labels import STREET
from networks.pack import PackSpec


def run(model, *outputs, **inputs):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(list(outputs) or None, inputs)


def alone(graph: Graph, shape, result: str):
    """A model of the nodes written so far, from "x" to `result`."""
    info = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "alone",
            [info("x", TensorProto.FLOAT, ["N", *shape[1:]])],
            [info(result, TensorProto.FLOAT, ["N", "C", "H", "W"])],
            list(graph.initialisers.values()),
        ),
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=8,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ((12, 18), (8, 12)),  # 3 to 2: ESPNetv2's pyramid at 1.5
        ((16, 32), (8, 16)),  # whole windows
        ((32, 64), (5, 7)),  # the coarsest level of a 512x1024 frame
        ((256, 512), (26, 52)),
        ((8, 16), (5, 8)),
        ((5, 5), (4, 4)),
        ((12, 16), (8, 5)),  # one side 3 to 2, the other not
        ((7, 9), (1, 1)),
        ((7, 9), (7, 9)),
        ((4, 4), (6, 6)),  # a map that grows
    ],
)
def test_adaptive_mean_is_torchs(inside, outside):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *inside)
    graph = Graph(18)
    result = adaptive_mean(graph, "x", tuple(x.shape), outside)
    wanted = F.adaptive_avg_pool2d(x, outside).numpy()
    if result == "x":
        ours = x.numpy()
    else:
        (ours,) = run(alone(graph, x.shape, result), x=x.numpy())
    assert ours.shape == wanted.shape
    assert np.allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((9, 7), (88, 61)),
        ((8, 16), (64, 128)),
        ((5, 5), (8, 16)),
        ((26, 52), (256, 512)),
        ((1, 1), (4, 4)),
        ((11, 15), (22, 30)),
    ],
)
def test_resize_is_torchs_interpolation(before, after, aligned):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *before)
    graph = Graph(18)
    result = graph.resize("x", before, after, aligned)
    (ours,) = run(alone(graph, x.shape, result), x=x.numpy())
    wanted = F.interpolate(x, after, mode="bilinear", align_corners=aligned).numpy()
    assert ours.shape == wanted.shape
    assert np.allclose(ours, wanted, atol=2e-5)


class Operations(SegmentationNetwork):
    """One of everything the writer knows."""

    output_stride = 4
    size_multiple = 8

    def __init__(self, classes):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.biased = nn.Conv2d(8, 8, 3, 1, 2, dilation=2, groups=2)
        self.norm_biased = nn.BatchNorm2d(8)
        self.lonely = nn.BatchNorm2d(8)
        self.slope = nn.PReLU(8)
        self.drop = nn.Dropout(0.5)
        self.same = nn.Identity()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.mean = nn.AvgPool2d(2, ceil_mode=True)
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1, groups=2, bias=False)
        self.norm_up = nn.BatchNorm2d(4)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.classify = nn.Conv2d(12, classes, 1)

    def forward(self, x):
        x = torch.relu(self.norm(self.plain(x)))
        x = self.slope(self.norm_biased(self.biased(x)))
        x = self.lonely(x) * self.scale
        x = self.pool(self.drop(self.same(x)))
        x = x * self.gate(x) + (1 - torch.sigmoid(x)) / 2.0
        small = self.mean(x)
        up = F.relu(self.norm_up(self.up(small)))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = x - x.mean((2, 3), keepdim=True) + F.softmax(x, dim=1) * x.sum(1, keepdim=True)
        x = F.avg_pool2d(x, 3, stride=1, padding=1) + F.adaptive_avg_pool2d(x, (h, w))
        x = x[:, :, 1:, :-1]
        x = F.interpolate(x, size=up.shape[-2:], mode="bilinear", align_corners=True)
        return self.classify(torch.cat([x, up], dim=1))


def describe(classes=12, order="rgb"):
    return PackSpec(
        name="t",
        version="1",
        network="roadnet",
        classes=STREET.classes[:classes],
        colours=STREET.colours[:classes],
        size=(32, 48),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        channel_order=order,
    )


@pytest.fixture
def operations():
    torch.manual_seed(0)
    network = Operations(12).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return network


def frames(n, h=32, w=48):
    return np.random.default_rng(0).integers(0, 256, (n, h, w, 3), np.uint8)


@pytest.mark.parametrize("opset", writer.OPSETS)
@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_every_operation_at_every_opset_is_torchs(operations, opset, order):
    spec = describe(order=order)
    model = write(operations, spec, size=(32, 48), batch=None, opset=opset)
    assert model.opset_import[0].version == opset
    x = frames(3)
    with torch.inference_mode():
        wanted = [y.numpy() for y in ServingGraph(operations, spec)(torch.from_numpy(x))]
    labels, confidence, probabilities = run(model, "labels", "confidence", "probabilities", frame=x)
    assert np.allclose(probabilities, wanted[2], atol=2e-5)
    assert (labels == wanted[0]).mean() > 0.999
    assert np.abs(confidence.astype(int) - wanted[1]).max() <= 1


def test_every_weight_keeps_its_name(operations):
    model = write(operations, describe(), size=(32, 48))
    state = operations.state_dict()
    held = {i.name for i in model.graph.initializer if not i.name.startswith("const.")}
    assert held <= set(state)
    # Scale of a folded normalisation is in the convolution; everything else that trains is there by name.
    folded = {"norm.weight", "norm_biased.weight", "norm_biased.bias", "norm_up.weight"}
    assert held == {name for name, _ in operations.named_parameters()} - folded


def test_writing_a_network_in_training_leaves_its_modes_as_they_were(operations):
    operations.train()
    operations.lonely.eval()
    write(operations, describe(), size=(32, 48))
    assert operations.training
    assert operations.drop.training
    assert not operations.lonely.training


def test_a_fixed_batch_is_fixed_and_an_open_one_is_open(operations):
    for batch, dim in ((2, "2"), (None, "N")):
        graph = write(operations, describe(), size=(32, 48), batch=batch).graph
        for value in (*graph.input, *graph.output):
            first = value.type.tensor_type.shape.dim[0]
            assert (first.dim_param or str(first.dim_value)) == dim


def test_confidence_and_labels_of_hand_made_logits():
    """255 * max softmax, truncated; computed here with numpy in float64."""

    class Fixed(SegmentationNetwork):
        output_stride = 1
        size_multiple = 1

        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(3, 4, 1, bias=False)
            nn.init.zeros_(self.mix.weight)
            self.mix.weight.data[:3, :, 0, 0] = torch.eye(3)

        def forward(self, x):
            return self.mix(x)

    spec = describe(4)
    model = write(Fixed().eval(), spec, size=(32, 48), batch=1)
    x = frames(1)
    labels, confidence = run(model, "labels", "confidence", frame=x)
    logits = ((x[0] / 255.0 - spec.mean) / spec.std).transpose(2, 0, 1)
    logits = np.concatenate([logits, np.zeros((1, 32, 48))])
    softmax = np.exp(logits) / np.exp(logits).sum(0)
    # Pixels at a channel's mean tie with the constant fourth class, and either label is right.
    clear = np.diff(np.sort(logits, 0)[-2:], axis=0)[0] > 1e-5
    assert clear.mean() > 0.95
    assert np.array_equal(labels[0][clear], logits.argmax(0)[clear])
    assert np.abs(confidence[0].astype(int) - np.floor(255 * softmax.max(0))).max() <= 1
    assert (confidence[0] == np.floor(255 * softmax.max(0))).mean() > 0.99


def test_weights_and_metadata_survive(operations):
    model = write(operations, describe(), size=(32, 48), metadata={"roadworthy.pack": "x"})
    assert {p.key: p.value for p in model.metadata_props} == {"roadworthy.pack": "x"}


class TestRefusals:
    def build(self, forward, **changes):
        class Net(SegmentationNetwork):
            output_stride = 1
            size_multiple = 1

            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 12, 1)

        Net.forward = forward
        return write(Net().eval(), describe(), **{"size": (32, 48), **changes})

    def test_an_unknown_operation_is_named(self):
        with pytest.raises(ExportError, match=r"operation 'erfinv' in .* has no ONNX form here"):
            self.build(lambda self, x: torch.erfinv(self.conv(x)))

    def test_an_unknown_module_is_named(self):
        def forward(self, x):
            return F.gelu(self.conv(x))

        with pytest.raises(ExportError, match="operation 'gelu'"):
            self.build(forward)

    def test_a_known_operation_called_otherwise_is_named(self):
        with pytest.raises(ExportError, match=r"operation 'sum' .* is called in a way that has no ONNX form"):
            self.build(lambda self, x: self.conv(x) * x.sum())

    def test_control_flow_on_the_input_is_refused(self):
        def forward(self, x):
            return self.conv(x) if x.sum() > 0 else self.conv(-x)

        with pytest.raises(ExportError, match="cannot be traced"):
            self.build(forward)

    def test_logits_of_another_shape_than_promised(self):
        with pytest.raises(ExportError, match=r"answers logits of \[12, 16, 24\], promised \[12, 32, 48\]"):
            self.build(lambda self, x: F.avg_pool2d(self.conv(x), 2))

    def test_two_outputs(self):
        with pytest.raises(ExportError, match="answers 2 tensors of logits, promised 1"):
            self.build(lambda self, x: (self.conv(x), x))

    @pytest.mark.parametrize("opset", [16, 21, 99])
    def test_an_opset_too_old_or_too_new(self, opset):
        with pytest.raises(
            ExportError, match=f"opset {opset} is not written here; choose one of 17, 18, 19, 20"
        ):
            self.build(lambda self, x: self.conv(x), opset=opset)

    def test_nearest_interpolation(self):
        with pytest.raises(ExportError, match="interpolation 'nearest' has no ONNX form here; use bilinear"):
            self.build(lambda self, x: F.interpolate(self.conv(x), scale_factor=2.0))

    def test_a_reshape_of_the_batch(self):
        with pytest.raises(ExportError, match="touches the batch dimension"):
            self.build(lambda self, x: self.conv(x).reshape(1, 24, 32, 48))

    def test_a_size_that_does_not_fit(self, operations):
        with pytest.raises(ExportError, match="size 33x48 must be a multiple of 8"):
            write(operations, describe(), size=(33, 48))
