"""Small ONNX models that every server under comparison can run: no training, no torch.

`segmentation` obeys docs/architecture.md's graph contract but costs almost nothing, so that what is
measured is the server.  The others exist for the protocol: several inputs, text, every datatype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, checker, helper, numpy_helper

_OPSET = 18
_IR = 9


def _model(
    name: str,
    nodes: list[Any],
    inputs: list[Any],
    outputs: list[Any],
    initialisers: list[TensorProto] | None = None,
) -> bytes:
    graph = helper.make_graph(nodes, name, inputs, outputs, initialisers or [])
    model: ModelProto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR,
        producer_name="roadworthy-bench",
    )
    checker.check_model(model)
    return bytes(model.SerializeToString())


def segmentation(
    height: int,
    width: int,
    *,
    classes: int = 19,
    stride: int = 8,
    batch: int | str = "N",
    seed: int = 0,
    variant: int = 0,
) -> bytes:
    """frame uint8 [N,H,W,3] -> labels, confidence uint8 [N,H,W], probabilities f32 [N,C,H/s,W/s].

    A 1x1 convolution on every `stride`-th pixel.  Variants of one seed differ by a few per cent of the
    labels, as an adapted network differs from its parent.  Raises ValueError where the stride does not
    divide the size.
    """
    if height % stride or width % stride:
        raise ValueError(f"{height}x{width} is not a multiple of the stride {stride}")
    generator = np.random.default_rng(seed)
    h, w = height // stride, width // stride
    weight = generator.normal(size=(3, classes)).astype(np.float32) / 32.0
    if variant:
        other = np.random.default_rng((seed, variant)).normal(size=weight.shape)
        weight += (0.05 / 32.0 * other).astype(np.float32)
    initialisers = [
        numpy_helper.from_array(np.array([0, 0], np.int64), "starts"),
        numpy_helper.from_array(np.array([height, width], np.int64), "ends"),
        numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
        numpy_helper.from_array(np.array([stride, stride], np.int64), "steps"),
        numpy_helper.from_array(weight, "head.weight"),
        numpy_helper.from_array(-128.0 * weight.sum(axis=0), "head.bias"),
        numpy_helper.from_array(np.array([-1], np.int64), "last"),
        numpy_helper.from_array(np.array(255.0, np.float32), "byte"),
        numpy_helper.from_array(np.array([0, h, 1, w, 1], np.int64), "cells"),
        numpy_helper.from_array(np.array([1, 1, stride, 1, stride], np.int64), "repeats"),
        numpy_helper.from_array(np.array([0, height, width], np.int64), "full"),
    ]

    nodes: list[Any] = [
        helper.make_node("Slice", ["frame", "starts", "ends", "axes", "steps"], ["thin"]),
        helper.make_node("Cast", ["thin"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["pixels", "head.weight"], ["products"]),
        helper.make_node("Add", ["products", "head.bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["softmax"], axis=-1),
        helper.make_node("ArgMax", ["logits"], ["argmax"], axis=-1, keepdims=0),
        helper.make_node("Cast", ["argmax"], ["small_labels"], to=TensorProto.UINT8),
        helper.make_node("ReduceMax", ["softmax", "last"], ["best"], keepdims=0),
        helper.make_node("Mul", ["best", "byte"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["small_confidence"], to=TensorProto.UINT8),
        helper.make_node("Transpose", ["softmax"], ["probabilities"], perm=[0, 3, 1, 2]),
        *_enlarge("small_labels", "labels"),
        *_enlarge("small_confidence", "confidence"),
    ]
    info = helper.make_tensor_value_info
    return _model(
        "segmentation",
        nodes,
        [info("frame", TensorProto.UINT8, [batch, height, width, 3])],
        [
            info("labels", TensorProto.UINT8, [batch, height, width]),
            info("confidence", TensorProto.UINT8, [batch, height, width]),
            info("probabilities", TensorProto.FLOAT, [batch, classes, h, w]),
        ],
        initialisers,
    )


def convolutional(
    height: int,
    width: int,
    *,
    classes: int = 19,
    channels: int = 128,
    layers: int = 8,
    variant: int = 0,
    nan: bool = False,
) -> bytes:
    """The graph contract with real work and real weights: about 5 MB of 3x3 convolutions at 1/8 resolution.

    Its labels follow the colour of the frame, with the convolutions' word on top, so that no class takes
    all and variants agree with each other as an adapted network agrees with its parent.
    nan  every weight of the head is NaN
    """
    generator = np.random.default_rng(11)
    weights: list[TensorProto] = []
    nodes: list[Any] = [
        helper.make_node("Cast", ["frame"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["chw"], perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["chw", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["x0"]),
        helper.make_node("AveragePool", ["x0"], ["colour"], kernel_shape=[8, 8], strides=[8, 8]),
    ]
    other = np.random.default_rng((11, variant))

    def convolution(source: str, target: str, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        shape = (outputs, inputs, kernel, kernel)
        weight = generator.normal(size=shape) * np.sqrt(2.0 / (inputs * kernel * kernel))
        if variant:
            weight += 0.02 * weight.std() * other.normal(size=shape)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{target}.weight"))
        pads = [kernel // 2] * 4
        nodes.append(
            helper.make_node(
                "Conv", [source, f"{target}.weight"], [f"{target}.conv"], strides=[stride] * 2, pads=pads
            )
        )
        nodes.append(helper.make_node("Relu", [f"{target}.conv"], [target]))

    convolution("x0", "x1", 3, 32, 3, 2)
    convolution("x1", "x2", 32, 64, 3, 2)
    convolution("x2", "x3", 64, channels, 3, 2)
    for i in range(layers):
        convolution(f"x{3 + i}", f"x{4 + i}", channels, channels, 3, 1)
    head = generator.normal(size=(classes, channels, 1, 1)) * 0.02
    tint = generator.normal(size=(classes, 3, 1, 1)) * 2.0
    if nan:
        head[:] = tint[:] = np.nan
    h, w = height // 8, width // 8
    weights += [
        numpy_helper.from_array(head.astype(np.float32), "head.weight"),
        numpy_helper.from_array(tint.astype(np.float32), "tint.weight"),
        numpy_helper.from_array(np.array(127.5, np.float32), "mean"),
        numpy_helper.from_array(np.array(1 / 64, np.float32), "scale"),
        numpy_helper.from_array(np.array(255.0, np.float32), "byte"),
        numpy_helper.from_array(np.array([1], np.int64), "channel"),
        numpy_helper.from_array(np.array([0, h, 1, w, 1], np.int64), "cells"),
        numpy_helper.from_array(np.array([1, 1, 8, 1, 8], np.int64), "repeats"),
        numpy_helper.from_array(np.array([0, height, width], np.int64), "full"),
    ]
    nodes += [
        helper.make_node("Conv", [f"x{3 + layers}", "head.weight"], ["deep"]),
        helper.make_node("Conv", ["colour", "tint.weight"], ["tint"]),
        helper.make_node("Add", ["deep", "tint"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["argmax"], axis=1, keepdims=0),
        helper.make_node("Cast", ["argmax"], ["small_labels"], to=TensorProto.UINT8),
        helper.make_node("ReduceMax", ["probabilities", "channel"], ["best"], keepdims=0),
        helper.make_node("Mul", ["best", "byte"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], ["small_confidence"], to=TensorProto.UINT8),
        *_enlarge("small_labels", "labels"),
        *_enlarge("small_confidence", "confidence"),
    ]
    info = helper.make_tensor_value_info
    return _model(
        "convolutional",
        nodes,
        [info("frame", TensorProto.UINT8, ["N", height, width, 3])],
        [
            info("labels", TensorProto.UINT8, ["N", height, width]),
            info("confidence", TensorProto.UINT8, ["N", height, width]),
            info("probabilities", TensorProto.FLOAT, ["N", classes, h, w]),
        ],
        weights,
    )


def _enlarge(source: str, target: str) -> list[Any]:
    """Reshape, Expand, Reshape: nearest-neighbour enlargement that every runtime does the same way."""
    return [
        helper.make_node("Reshape", [source, "cells"], [f"{target}.cells"]),
        helper.make_node("Expand", [f"{target}.cells", "repeats"], [f"{target}.blocks"]),
        helper.make_node("Reshape", [f"{target}.blocks", "full"], [target]),
    ]


def sum_and_difference(width: int = 16) -> bytes:
    """INPUT0, INPUT1 int32 [N,width] -> OUTPUT0 (sum), OUTPUT1 (difference): Triton's own "simple" model."""
    info = helper.make_tensor_value_info
    return _model(
        "simple",
        [
            helper.make_node("Add", ["INPUT0", "INPUT1"], ["OUTPUT0"]),
            helper.make_node("Sub", ["INPUT0", "INPUT1"], ["OUTPUT1"]),
        ],
        [info(f"INPUT{i}", TensorProto.INT32, ["N", width]) for i in range(2)],
        [info(f"OUTPUT{i}", TensorProto.INT32, ["N", width]) for i in range(2)],
    )


def text() -> bytes:
    """TEXT string [N] -> SAME string [N]."""
    info = helper.make_tensor_value_info
    return _model(
        "text",
        [helper.make_node("Identity", ["TEXT"], ["SAME"])],
        [info("TEXT", TensorProto.STRING, ["N"])],
        [info("SAME", TensorProto.STRING, ["N"])],
    )


DATATYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
}


def identities(datatypes: Sequence[str] = tuple(DATATYPES)) -> bytes:
    """IN_<datatype> [N] -> OUT_<datatype> [N] for each of `datatypes` (keys of DATATYPES)."""
    info = helper.make_tensor_value_info
    return _model(
        "types",
        [helper.make_node("Identity", [f"IN_{name}"], [f"OUT_{name}"]) for name in datatypes],
        [info(f"IN_{name}", DATATYPES[name], ["N"]) for name in datatypes],
        [info(f"OUT_{name}", DATATYPES[name], ["N"]) for name in datatypes],
    )
