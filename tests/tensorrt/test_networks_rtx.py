"""Every network, exported as it is served, parsed and built by TensorRT-RTX on a CPU; nothing is executed."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import networks
from adapt.data.street import render
from export.half import to_half
from export.int8 import quantise
from export.tensorrt import BuildOptions, build_plan
from export.tensorrt_rtx import tensorrt_rtx
from export.writer import write
from networks.labels import STREET
from networks.pack import PackSpec
from runtime.engines.tensorrt_library import Library, Log, TensorRTError, logger

pytestmark = pytest.mark.peers
NAMES = networks.names()
SIZE = (64, 128)
ONNX_TO_TENSORRT = {
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.FLOAT: "FLOAT",
}


@pytest.fixture(scope="module")
def library() -> Library:
    try:
        return tensorrt_rtx()
    except TensorRTError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest) -> ModelProto:
    """Module scope, so that the tests of one network follow each other and it is exported once."""
    return exported(request.param)


def exported(name: str, batch: int | None = None) -> ModelProto:
    network = networks.create(name, classes=12).eval()
    spec = PackSpec(
        name="street",
        version="1.0.0",
        network=name,
        arguments={},
        classes=STREET.classes,
        colours=STREET.colours,
        size=SIZE,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        channel_order="rgb",
        training="none",
        licence="Apache-2.0",
    )
    return write(network, spec, size=SIZE, batch=batch, opset=18)


def test_it_builds_with_a_free_batch(library: Library, model: ModelProto) -> None:
    plan = build_plan(model.SerializeToString(), BuildOptions(batch=(1, 2, 4)), backend="tensorrt-rtx")
    assert [(t.name, t.dtype, t.shape) for t in plan.inputs] == [("frame", "UINT8", (-1, *SIZE, 3))]
    declared = {v.name: ONNX_TO_TENSORRT[v.type.tensor_type.elem_type] for v in model.graph.output}
    assert {t.name: t.dtype for t in plan.outputs} == declared
    assert all(t.shape[0] == -1 for t in plan.outputs)
    assert len(plan.data) > 100_000


def test_every_weight_can_be_addressed_by_its_name(library: Library, model: ModelProto) -> None:
    """Refit finds weights by the names the parser gave them: those of the state_dict."""
    trt = library.module
    log = Log()
    keep = logger(library, log)
    builder = trt.Builder(keep)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, keep)
    assert parser.parse(model.SerializeToString()), log.why()
    weights = [t.name for t in model.graph.initializer if not t.name.startswith("const.")]
    assert len(weights) > 10
    assert [weight for weight in weights if not network.mark_weights_refittable(weight)] == []


@pytest.mark.parametrize("name", [name for name in ("roadnet", "ddrnet", "pidnet") if name in NAMES])
def test_it_builds_in_half_and_with_a_fixed_batch(library: Library, name: str) -> None:
    half = to_half(exported(name, 1))
    plan = build_plan(half.SerializeToString(), BuildOptions(precision="fp16"), backend="tensorrt-rtx")
    assert plan.inputs[0].shape == (1, *SIZE, 3)
    assert {t.dtype for t in plan.outputs} <= {"UINT8", "FLOAT"}


@pytest.mark.parametrize("name", [name for name in ("roadnet", "ddrnet") if name in NAMES])
def test_it_builds_in_int8(library: Library, name: str) -> None:
    """Our own quantiser's Q/DQ graph, in the encoding for TensorRT."""
    frames = np.stack([render(seed, "day", SIZE)[0] for seed in range(4)])
    quantised = quantise(exported(name), frames, classes=12, target="tensorrt", count=4)
    options = BuildOptions(precision="int8", batch=(1, 2, 4))
    plan = build_plan(quantised.model.SerializeToString(), options, backend="tensorrt-rtx")
    assert {t.dtype for t in plan.outputs} <= {"UINT8", "FLOAT"}
    assert not [line for line in plan.warnings if "UINT8" in line]
