"""export.graph.half: the float16 graph against the float32 one, both computed by ONNX Runtime on the CPU."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

from export.errors import ExportError
from export.graph.half import to_half
from tests.tensorrt.graphs import Graph, segmentation, value


def run(model: ModelProto, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def frames(n: int = 2, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (n, 8, 16, 3))
    return np.kron(coarse, np.ones((1, 4, 4, 1))).astype(np.uint8)


def test_labels_agree_and_confidence_is_near() -> None:
    model = segmentation()
    full, half = run(model, frame=frames()), run(to_half(model), frame=frames())
    assert list(full) == list(half)
    assert (full["labels"] == half["labels"]).mean() > 0.995
    assert np.abs(full["confidence"].astype(int) - half["confidence"]).max() <= 3
    assert len(np.unique(full["labels"])) > 1


def test_names_inputs_and_outputs_stay() -> None:
    model = segmentation()
    half = to_half(model)
    names = [tensor.name for tensor in model.graph.initializer]
    assert [tensor.name for tensor in half.graph.initializer] == names
    assert list(half.graph.input) == list(model.graph.input)
    assert list(half.graph.output) == list(model.graph.output)
    assert all(tensor.data_type != TensorProto.FLOAT16 for tensor in model.graph.initializer)  # untouched


def test_the_network_is_half_and_its_surroundings_are_not() -> None:
    half = to_half(segmentation())
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    weights = ("stem.weight", "stem.bias", "head.weight", "head.bias")
    assert {kinds[name] for name in weights} == {TensorProto.FLOAT16}
    outside = ("const.mean", "const.scale", "const.scales", "const.255")
    assert {kinds[name] for name in outside} == {TensorProto.FLOAT}


def two_outputs() -> ModelProto:
    """The first output is read again inside; a constant is used inside and outside."""
    graph = Graph()
    shared = graph.const("shared", 0.5)
    x = graph.op("Mul", ["x", shared], "scaled")
    for name in ("a", "b"):
        weight = graph.const(f"{name}.weight", graph.random.normal(0, 0.5, (4, 4, 1, 1)))
        x = graph.op("Conv", [x, weight], name)
        if name == "a":
            graph.op("Mul", [x, shared], "a.scaled")
            x = "a.scaled"
    inputs = [value("x", TensorProto.FLOAT, [1, 4, 3, 3])]
    outputs = [value(name, TensorProto.FLOAT, [1, 4, 3, 3]) for name in ("a", "b")]
    return graph.model(inputs, outputs)


def test_an_output_in_the_middle_and_a_shared_constant() -> None:
    model = two_outputs()
    x = np.random.default_rng(1).normal(size=(1, 4, 3, 3)).astype(np.float32)
    full, half = run(model, x=x), run(to_half(model), x=x)
    for name in ("a", "b"):
        assert half[name].dtype == np.float32
        np.testing.assert_allclose(half[name], full[name], atol=2e-2)
    assert not np.array_equal(half["b"], full["b"])  # it does compute in half


def test_what_cannot_be_converted_is_named() -> None:
    model = segmentation()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] = 1e5
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    with pytest.raises(ExportError, match=r"'head\.weight' holds 100000"):
        to_half(model)
    graph = Graph()
    graph.op("Relu", ["x"], "y")
    plain = graph.model([value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])])
    with pytest.raises(ExportError, match="no convolution"):
        to_half(plain)


def test_a_constant_node_and_a_cast_inside_change_too() -> None:
    graph = Graph()
    weight = graph.const("weight", graph.random.normal(0, 0.5, (2, 2, 1, 1)))
    x = graph.op("Conv", ["x", weight], "first")
    number = helper.make_tensor("number", TensorProto.FLOAT, [], [2.0])
    graph.nodes.append(helper.make_node("Constant", [], ["two"], value=number, name="two"))
    x = graph.op("Mul", [x, "two"], "doubled")
    x = graph.op("Cast", [x], "cast", to=TensorProto.FLOAT)
    graph.op("Conv", [x, weight], "y")
    model = graph.model(
        [value("x", TensorProto.FLOAT, [1, 2, 2, 2])], [value("y", TensorProto.FLOAT, [1, 2, 2, 2])]
    )
    half = to_half(model)
    checker.check_model(half, full_check=True)
    x_value = np.ones((1, 2, 2, 2), np.float32)
    np.testing.assert_allclose(run(half, x=x_value)["y"], run(model, x=x_value)["y"], atol=1e-2)
