"""Small ONNX graphs under the graph contract: uint8 NHWC in, uint8 labels and confidence out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

OPSET = 18


class Graph:
    """Collects nodes and weights; `model` checks and serialises."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.random = np.random.default_rng(seed)

    def const(self, name: str, value: Any, dtype: Any = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any], opset: int = OPSET) -> ModelProto:
        graph = helper.make_graph(self.nodes, "graph", list(inputs), list(outputs), self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        checker.check_model(model, full_check=True)
        return model


def value(name: str, kind: int, shape: Sequence[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def segmentation(
    *, batch: int | str = "N", height: int = 32, width: int = 64, classes: int = 5, qdq: bool = False
) -> ModelProto:
    """Cast, normalise, two convolutions at stride 2, bilinear resize, argmax and 1/sum(exp(x - max))."""
    graph = Graph()
    x = graph.op("Cast", ["frame"], "float", to=TensorProto.FLOAT)
    x = graph.op("Transpose", [x], "nchw", perm=[0, 3, 1, 2])
    x = graph.op("Sub", [x, graph.const("const.mean", np.full((1, 3, 1, 1), 127.5))], "centred")
    x = graph.op("Mul", [x, graph.const("const.scale", np.full((1, 3, 1, 1), 1 / 60))], "normal")
    for name, inward, outward, stride in (("stem", 3, 8, 2), ("head", 8, classes, 1)):
        weight = graph.random.normal(0, 0.3, (outward, inward, 3, 3))
        w = graph.const(f"{name}.weight", weight)
        if qdq:
            x = _qdq(graph, x, f"{name}.in", 0.05)
            w = _qdq(graph, w, f"{name}.weight", np.abs(weight).max((1, 2, 3)) / 127, axis=0)
        bias = graph.const(f"{name}.bias", graph.random.normal(0, 0.1, outward))
        x = graph.op("Conv", [x, w, bias], f"{name}.out", strides=[stride] * 2, pads=[1] * 4)
        if name == "stem":
            x = graph.op("Relu", [x], "relu")
    sizes = graph.const("const.scales", [1, 1, 2, 2])
    full = graph.op(
        "Resize",
        [x, "", sizes],
        "full",
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    )
    index = graph.op("ArgMax", [full], "index", axis=1, keepdims=0)
    index = graph.op("Cast", [index], "index.float", to=TensorProto.FLOAT)
    graph.op("Cast", [index], "labels", to=TensorProto.UINT8)
    axes = graph.const("const.axes", [1], np.int64)
    largest = graph.op("ReduceMax", [full, axes], "largest", keepdims=1)
    power = graph.op("Exp", [graph.op("Sub", [full, largest], "shifted")], "power")
    total = graph.op("ReduceSum", [power, axes], "total", keepdims=0)
    share = graph.op("Div", [graph.const("const.255", 255.0), total], "share")
    graph.op("Cast", [share], "confidence", to=TensorProto.UINT8)
    frame = value("frame", TensorProto.UINT8, [batch, height, width, 3])
    outputs = [value(name, TensorProto.UINT8, [batch, height, width]) for name in ("labels", "confidence")]
    return graph.model([frame], outputs)


def _qdq(graph: Graph, x: str, name: str, scale: Any, axis: int | None = None) -> str:
    """Signed int8, symmetric: the one recipe that TensorRT's parser and ONNX Runtime both take."""
    s = graph.const(f"const.{name}.s", scale)
    zero = graph.const(f"const.{name}.z", np.zeros(np.shape(scale)), np.int8)
    more = {} if axis is None else {"axis": axis}
    q = graph.op("QuantizeLinear", [x, s, zero], f"{name}.q", **more)
    return graph.op("DequantizeLinear", [q, s, zero], f"{name}.dq", **more)
