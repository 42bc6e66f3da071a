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

    def enlarge(source: str, target: str) -> list[Any]:
        # Reshape, Expand, Reshape: nearest-neighbour enlargement that every runtime does the same way.
        return [
            helper.make_node("Reshape", [source, "cells"], [f"{target}.cells"]),
            helper.make_node("Expand", [f"{target}.cells", "repeats"], [f"{target}.blocks"]),
            helper.make_node("Reshape", [f"{target}.blocks", "full"], [target]),
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
        *enlarge("small_labels", "labels"),
        *enlarge("small_confidence", "confidence"),
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
