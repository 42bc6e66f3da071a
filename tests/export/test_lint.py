"""The static check, on graphs that TensorRT-RTX's parser was seen to take or refuse."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph.lint import lint

F32, U8, I8, I64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT64


def model(nodes, inputs, outputs, constants=None, opset=18):
    info = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "probe",
            [info(n, t, s) for n, t, s in inputs],
            [info(n, t, s) for n, t, s in outputs],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=9,
    )


def unary(
    op, constants=None, more=(), kind=F32, out=F32, shape=(1, 3, 8, 8), result=None, opset=18, **attributes
):
    node = helper.make_node(op, ["x", *more], ["y"], **attributes)
    return model([node], [("x", kind, shape)], [("y", out, result)], constants, opset)


LEGAL = {
    "relu": lambda: unary("Relu"),
    "uint8 cast to float": lambda: unary("Cast", kind=U8, to=F32),
    "float cast to uint8": lambda: unary("Cast", out=U8, to=U8),
    "resize linear": lambda: unary(
        "Resize", {"s": np.float32([1, 1, 2, 2])}, ["", "s"], mode="linear",
        coordinate_transformation_mode="half_pixel",
    ),
    "symmetric int8": lambda: unary(
        "QuantizeLinear", {"s": np.float32(0.1), "z": np.int8(0)}, ["s", "z"], out=I8
    ),
    "topk": lambda: model(
        [helper.make_node("TopK", ["x", "k"], ["v", "i"])],
        [("x", F32, (1, 5000))], [("v", F32, None), ("i", I64, None)], {"k": np.int64([10])},
    ),
}  # fmt: skip

ILLEGAL = {
    "operator not supported": lambda: unary("Det", shape=(8, 8), result=None),
    "only a Cast may": lambda: unary("Transpose", kind=U8, out=U8, perm=[0, 2, 3, 1]),
    "coordinate mode 'half_pixel_symmetric'": lambda: unary(
        "Resize", {"s": np.float32([1, 1, 2, 2])}, ["", "s"], mode="linear",
        coordinate_transformation_mode="half_pixel_symmetric", opset=19,
    ),
    "antialias": lambda: unary(
        "Resize", {"s": np.float32([1, 1, 2, 2])}, ["", "s"], mode="linear", antialias=1
    ),
    "mode 'cubic'": lambda: unary("Resize", {"s": np.float32([1, 1, 2, 2])}, ["", "s"], mode="cubic"),
    "dilated pooling": lambda: unary("MaxPool", kernel_shape=[3, 3], dilations=[2, 2]),
    "zero point must be 0": lambda: unary(
        "QuantizeLinear", {"s": np.float32(0.1), "z": np.int8(3)}, ["s", "z"], out=I8
    ),
    "UINT8 quantisation becomes INT8": lambda: unary(
        "QuantizeLinear", {"s": np.float32(0.1), "z": np.uint8(0)}, ["s", "z"], out=U8
    ),
    "K may be 3840 at most": lambda: model(
        [helper.make_node("TopK", ["x", "k"], ["v", "i"])],
        [("x", F32, (1, 5000))], [("v", F32, None), ("i", I64, None)], {"k": np.int64([4000])},
    ),
    "Indices output": lambda: model(
        [helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2])],
        [("x", F32, (1, 3, 8, 8))], [("y", F32, None), ("i", I64, None)],
    ),
    "opset 27": lambda: unary("Relu", opset=27),
    "domain 'com.microsoft'": lambda: model(
        [helper.make_node("FusedConv", ["x"], ["y"], domain="com.microsoft")],
        [("x", F32, (1, 3, 8, 8))], [("y", F32, None)],
    ),
    "UINT8 tensor 'c' inside the graph": lambda: model(
        [helper.make_node("Cast", ["x"], ["c"], to=U8), helper.make_node("Cast", ["c"], ["y"], to=F32)],
        [("x", F32, (1, 3))], [("y", F32, None)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEGAL)
def test_what_the_parser_takes_passes(case):
    found = lint(LEGAL[case]())
    assert found.errors == []


@pytest.mark.parametrize("reason", ILLEGAL)
def test_what_the_parser_refuses_is_named_with_the_reason(reason):
    found = lint(ILLEGAL[reason]())
    assert any(reason in error for error in found.errors)


@pytest.mark.parametrize("op", ["NonZero", "ScatterElements"])
def test_plugins_are_warned_of(op):
    if op == "NonZero":
        probe = unary(op, out=I64)
    else:
        probe = unary(
            op, {"i": np.zeros((1, 3, 8, 8), np.int64), "u": np.zeros((1, 3, 8, 8), np.float32)}, ["i", "u"]
        )
    found = lint(probe)
    assert any("plugin" in warning for warning in found.warnings)
    assert found.errors == []


def test_argmax_straight_to_uint8_is_warned_of():
    probe = model(
        [helper.make_node("ArgMax", ["x"], ["a"], axis=1), helper.make_node("Cast", ["a"], ["y"], to=U8)],
        [("x", F32, (1, 3, 8))], [("y", U8, None)],
    )  # fmt: skip
    assert any("INT64 to UINT8 is outside" in warning for warning in lint(probe).warnings)
