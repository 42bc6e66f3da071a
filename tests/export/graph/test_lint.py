"""The static check, on graphs that TensorRT-RTX's parser was seen to take or refuse."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.graph.lint import lint

F32, U8, I8, I64 = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT8, TensorProto.INT64
node, array = helper.make_node, numpy_helper.from_array


def model(nodes, inputs, outputs, constants=None, opset=18):
    info = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes,
            "probe",
            [info(n, t, s) for n, t, s in inputs],
            [info(n, t, s) for n, t, s in outputs],
            [array(np.asarray(v), k) for k, v in (constants or {}).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=9,
    )


def unary(
    op, constants=None, more=(), kind=F32, out=F32, shape=(1, 3, 8, 8), result=None, opset=18, **attributes
):
    made = node(op, ["x", *more], ["y"], **attributes)
    return model([made], [("x", kind, shape)], [("y", out, result)], constants, opset)


def function(name, nodes, opset=18):
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("my", 1)]
    return helper.make_function("my", name, ["a"], ["b"], nodes, opsets)


def calls(name, *functions):
    made = model([node(name, ["x"], ["y"], domain="my")], [("x", F32, (4, 4))], [("y", F32, None)])
    made.opset_import.append(helper.make_opsetid("my", 1))
    made.functions.extend(functions)
    return made


def reduced(nodes=(), axes="a", constants=None, inputs=()):
    return model(
        [*nodes, node("ReduceMean", ["x", axes], ["y"])],
        [("x", F32, (1, 4)), *inputs],
        [("y", F32, None)],
        {"i": np.int64([1]), **(constants or {})},
    )


def sparse(read):
    made = unary("Add", {}, ["S"]) if read else unary("Relu")
    values = array(np.float32([1, 2]), "S")
    places = array(np.int64([0, 2]), "places")
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [8]))
    return made


RELU = node("Relu", ["a"], ["b"])

LEGAL = {
    "local function": lambda: calls("Mine", function("Mine", [RELU])),
    "local functions inside each other": lambda: calls(
        "Outer",
        function("Outer", [node("Mine", ["a"], ["c"], domain="my"), node("Neg", ["c"], ["b"])]),
        function("Mine", [RELU]),
    ),
    "axes": lambda: reduced(axes="i"),
    "axes of a Constant": lambda: reduced([node("Constant", [], ["a"], value_ints=[1])]),
    "axes by another name": lambda: reduced([node("Identity", ["i"], ["a"])]),
    "float64": lambda: unary("Cast", kind=TensorProto.DOUBLE, to=F32),
    "sparse values that nothing reads": lambda: sparse(False),
    "relu": lambda: unary("Relu"),
    "uint8 cast to float": lambda: unary("Cast", kind=U8, to=F32),
    "float cast to uint8": lambda: unary("Cast", out=U8, to=U8),
    "resize linear": lambda: unary(
        "Resize",
        {"s": np.float32([1, 1, 2, 2])},
        ["", "s"],
        mode="linear",
        coordinate_transformation_mode="half_pixel",
    ),
    "symmetric int8": lambda: unary(
        "QuantizeLinear", {"s": np.float32(0.1), "z": np.int8(0)}, ["s", "z"], out=I8
    ),
    "topk": lambda: model(
        [node("TopK", ["x", "k"], ["v", "i"])],
        [("x", F32, (1, 5000))],
        [("v", F32, None), ("i", I64, None)],
        {"k": np.int64([10])},
    ),
}

ILLEGAL = {
    "operator not supported by TensorRT's parser": lambda: calls(
        "Mine", function("Mine", [node("Det", ["a"], ["b"])])
    ),
    "has the name of an operator": lambda: calls("Det", function("Det", [RELU])),
    "is sparse": lambda: sparse(True),
    "sparse_value is refused": lambda: model(
        [
            node(
                "Constant",
                [],
                ["c"],
                sparse_value=helper.make_sparse_tensor(
                    array(np.float32([1]), "v"), array(np.int64([1]), "p"), [4]
                ),
            ),
            node("Add", ["x", "c"], ["y"]),
        ],
        [("x", F32, (4,))],
        [("y", F32, None)],
    ),
    "is of the type STRING": lambda: model(
        [
            node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.STRING, [1], [b"a"])),
            node("Gather", ["c", "x"], ["y"]),
        ],
        [("x", I64, (1,))],
        [("y", TensorProto.STRING, None)],
    ),
    "'unread' is of the type INT16": lambda: unary("Relu", {"unread": np.int16([1])}),
    "'c' is of the type UINT32": lambda: model(
        [node("Cast", ["x"], ["c"], to=TensorProto.UINT32), node("Cast", ["c"], ["y"], to=F32)],
        [("x", F32, (1, 3))],
        [("y", F32, None)],
    ),
    "axes must be an initialiser": lambda: reduced(inputs=[("a", I64, (1,))]),
    "the parser computes none": lambda: reduced([node("Neg", ["i"], ["a"])]),
    "axes that come with a request": lambda: model(
        [node("Unsqueeze", ["x", "a"], ["y"])],
        [("x", F32, (4,)), ("a", I64, (1,))],
        [("y", F32, None)],
    ),
    "scales that come with a request": lambda: model(
        [node("Resize", ["x", "", "s"], ["y"])],
        [("x", F32, (1, 1, 4, 4)), ("s", F32, (4,))],
        [("y", F32, None)],
    ),
    "only its first output is taken": lambda: model(
        [node("LayerNormalization", ["x", "s"], ["y", "m"])],
        [("x", F32, (1, 4))],
        [("y", F32, None), ("m", F32, None)],
        {"s": np.ones(4, np.float32)},
    ),
    "p must be 1 or 2": lambda: unary("LpPool", kernel_shape=[2, 2], p=3),
    "a reduction is refused": lambda: unary(
        "ScatterElements",
        {"i": np.zeros((1, 3, 8, 8), np.int64), "u": np.zeros((1, 3, 8, 8), np.float32)},
        ["i", "u"],
        reduction="max",
    ),
    "activation 'Affine' is refused": lambda: model(
        [node("LSTM", ["x", "w", "r"], ["y"], hidden_size=2, activations=["Affine", "Tanh", "Tanh"])],
        [("x", F32, (3, 1, 4))],
        [("y", F32, None)],
        {"w": np.ones((1, 8, 4), np.float32), "r": np.ones((1, 8, 2), np.float32)},
    ),
    "fractions need fmod=1": lambda: unary("Mod", more=["x"]),
    "training_mode must be an initialiser": lambda: model(
        [node("Dropout", ["x", "r", "t"], ["y"])],
        [("x", F32, (1, 4)), ("t", TensorProto.BOOL, ())],
        [("y", F32, None)],
        {"r": np.float32(0.5)},
    ),
    "operator not supported": lambda: unary("Det", shape=(8, 8), result=None),
    "only a Cast may": lambda: unary("Transpose", kind=U8, out=U8, perm=[0, 2, 3, 1]),
    "coordinate mode 'half_pixel_symmetric'": lambda: unary(
        "Resize",
        {"s": np.float32([1, 1, 2, 2])},
        ["", "s"],
        mode="linear",
        coordinate_transformation_mode="half_pixel_symmetric",
        opset=19,
    ),
    "antialias": lambda: unary(
        "Resize", {"s": np.float32([1, 1, 2, 2])}, ["", "s"], mode="linear", antialias=1
    ),
    "dilated pooling": lambda: unary("MaxPool", kernel_shape=[3, 3], dilations=[2, 2]),
    "zero point must be 0": lambda: unary(
        "QuantizeLinear", {"s": np.float32(0.1), "z": np.int8(3)}, ["s", "z"], out=I8
    ),
    "K may be 3840 at most": lambda: model(
        [node("TopK", ["x", "k"], ["v", "i"])],
        [("x", F32, (1, 5000))],
        [("v", F32, None), ("i", I64, None)],
        {"k": np.int64([4000])},
    ),
    "Indices output": lambda: model(
        [node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2])],
        [("x", F32, (1, 3, 8, 8))],
        [("y", F32, None), ("i", I64, None)],
    ),
    "domain 'com.microsoft'": lambda: model(
        [node("FusedConv", ["x"], ["y"], domain="com.microsoft")],
        [("x", F32, (1, 3, 8, 8))],
        [("y", F32, None)],
    ),
    "UINT8 tensor 'c' inside the graph": lambda: model(
        [node("Cast", ["x"], ["c"], to=U8), node("Cast", ["c"], ["y"], to=F32)],
        [("x", F32, (1, 3))],
        [("y", F32, None)],
    ),
}


#: Taken, and named because it is not documented or becomes something else.
WARNED = {
    "mode 'cubic'": lambda: unary("Resize", {"s": np.float32([1, 1, 2, 2])}, ["", "s"], mode="cubic"),
    "UINT8 quantisation becomes INT8": lambda: unary(
        "QuantizeLinear", {"s": np.float32(0.1), "z": np.uint8(0)}, ["s", "z"], out=U8
    ),
    "opset 27": lambda: unary("Relu", opset=27),
}


@pytest.mark.parametrize("reason", WARNED)
def test_what_the_parser_takes_undocumented_is_warned_of(reason):
    found = lint(WARNED[reason]())
    assert found.errors == []
    assert any(reason in warning for warning in found.warnings)


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
        [node("ArgMax", ["x"], ["a"], axis=1), node("Cast", ["a"], ["y"], to=U8)],
        [("x", F32, (1, 3, 8))],
        [("y", U8, None)],
    )
    assert any("INT64 to UINT8 is outside" in warning for warning in lint(probe).warnings)
