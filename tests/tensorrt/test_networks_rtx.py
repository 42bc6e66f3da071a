"""Every network, exported for every task it is served for, parsed and built by TensorRT-RTX on a CPU.

Nothing is executed.  The small form of each network is in the default tests; the published forms, whose
graphs are hundreds of megabytes, are marked slow.
"""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

import networks
from adapt.data.street.scenes import render
from export.graph.half import to_half
from export.graph.writer import write
from export.quantize.int8 import quantise
from export.tensorrt import BuildOptions, build_plan
from networks.labels import STREET
from networks.pack import PackSpec
from runtime.engines.tensorrt.library import Library, Log, logger

SIZE = (64, 128)
ONNX_TO_TENSORRT = {
    TensorProto.UINT8: "UINT8",
    TensorProto.INT32: "INT32",
    TensorProto.FLOAT: "FLOAT",
}
#: (network, arguments, task): one small form of each, and the published ones.
SMALL = [
    (name, networks.architecture(name).EXAMPLES[-1], task)
    for name in networks.names()
    for task in networks.architecture(name).TASKS
]
WHOLE = [(name, {}, task) for name, _, task in SMALL]


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, id=f"{case[0]}-{case[2]}") for case in SMALL]
    + [pytest.param(case, id=f"{case[0]}-{case[2]}-whole", marks=pytest.mark.slow) for case in WHOLE],
)
def model(request: pytest.FixtureRequest) -> ModelProto:
    """Module scope, so that the tests of one network follow each other and it is exported once."""
    return exported(*request.param)


def exported(
    name: str, arguments: dict[str, object], task: str = "segmentation", batch: int | None = None
) -> ModelProto:
    network = networks.create(name, classes=12, **arguments).eval()
    spec = PackSpec(
        name="street",
        version="1.0.0",
        network=name,
        task=task,
        arguments=arguments,
        classes=STREET.classes,
        colours=STREET.colours,
        size=SIZE,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        channel_order="rgb",
        training="none",
        licence="Apache-2.0",
        edge_classes=tuple(f"e{k}" for k in range(network.edge_count)),
    )
    return write(network, spec, size=SIZE, batch=batch, opset=18)


def test_it_builds_with_a_free_batch(library: Library, model: ModelProto) -> None:
    plan = build_plan(model.SerializeToString(), BuildOptions(batch=(1, 2, 4)), backend="tensorrt-rtx")
    assert [(t.name, t.dtype, t.shape) for t in plan.inputs] == [("frame", "UINT8", (-1, *SIZE, 3))]
    declared = {v.name: ONNX_TO_TENSORRT[v.type.tensor_type.elem_type] for v in model.graph.output}
    assert {t.name: t.dtype for t in plan.outputs} == declared
    assert all(t.shape[0] == -1 for t in plan.outputs)
    assert len(plan.data) > 50_000


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


HALF = [
    ("roadnet", {"width": 16}, "segmentation"),
    ("pidnet", {"width": 8}, "segmentation"),
    pytest.param("espnetv2_edges", {"scale": 0.5}, "joint", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "arguments", "task"), HALF)
def test_it_builds_in_half_and_with_a_fixed_batch(library: Library, name, arguments, task) -> None:
    half = to_half(exported(name, arguments, task, 1))
    plan = build_plan(half.SerializeToString(), BuildOptions(precision="fp16"), backend="tensorrt-rtx")
    assert plan.inputs[0].shape == (1, *SIZE, 3)
    assert {t.dtype for t in plan.outputs} <= {"UINT8", "INT32", "FLOAT"}


@pytest.mark.parametrize(("name", "arguments", "task"), HALF)
def test_it_builds_in_int8(library: Library, name, arguments, task) -> None:
    """Our own quantiser's Q/DQ graph, in the encoding for TensorRT."""
    frames = np.stack([render(seed, "day", SIZE)[0] for seed in range(4)])
    quantised = quantise(exported(name, arguments, task), frames, classes=12, target="tensorrt", count=4)
    options = BuildOptions(precision="int8", batch=(1, 2, 4))
    plan = build_plan(quantised.model.SerializeToString(), options, backend="tensorrt-rtx")
    assert {t.dtype for t in plan.outputs} <= {"UINT8", "INT32", "FLOAT"}
    assert not [line for line in plan.warnings if "UINT8" in line]
