"""The nodes after the network: logits at their own resolution become the answers of the contract.

Two forms that give the same answers to the last bit.  *Whole* treats all classes as one tensor: few nodes,
which TensorRT fuses.  *Per class* treats each class as an image of its own: ONNX Runtime's reductions over
the channels of one tensor jump through memory, while the same comparisons and sums of whole images are
vectorised, so that it costs about half (`python -m bench.export`, docs/export.md).

This module knows ONNX nodes; nothing of networks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from export.graph.contract import Contract
from export.graph.onnx_graph import Graph

FORMS = ("whole", "per-class")
_info = helper.make_tensor_value_info


@dataclass(frozen=True)
class Logits:
    """The name of a network's answer, its shape [C,h,w], and the frames it is enlarged to: [n, *size]."""

    name: str
    shape: tuple[int, int, int]
    size: tuple[int, int]
    n: int | str


def write_head(
    graph: Graph, kind: str, logits: Logits, contract: Contract, form: str
) -> list[ValueInfoProto]:
    """Append the nodes of one head, "segmentation" or "edges", and return its outputs."""
    if kind == "segmentation":
        return _segmentation(graph, logits, form)
    return _edges(graph, logits, contract.limits, form)


def _segmentation(graph: Graph, logits: Logits, form: str) -> list[ValueInfoProto]:
    _softmax_by_hand(graph, logits.name)
    decide = _decide_per_class if form == "per-class" else _decide_whole
    index, total = decide(graph, logits)
    # uint8 may only be cast from float: the documented way to a uint8 output.
    graph.node("Cast", [index], to=TensorProto.UINT8, output="labels")
    share = graph.node("Div", [graph.constant(255.0), total])
    graph.node("Cast", [share], to=TensorProto.UINT8, output="confidence")
    return [
        _info("labels", TensorProto.UINT8, [logits.n, *logits.size]),
        _info("confidence", TensorProto.UINT8, [logits.n, *logits.size]),
        _info("probabilities", TensorProto.FLOAT, [logits.n, *logits.shape]),
    ]


def _softmax_by_hand(graph: Graph, logits: str) -> None:
    # Not Softmax: over channels ONNX Runtime transposes for it, twice the time of these five.
    shifted = graph.node("Sub", [logits, graph.reduce("ReduceMax", logits, [1], True)])
    powers = graph.node("Exp", [shifted])
    graph.node("Div", [powers, graph.reduce("ReduceSum", powers, [1], True)], output="probabilities")


def _decide_whole(graph: Graph, logits: Logits) -> tuple[str, str]:
    """(float index of the largest logit, Σexp(x − max)), each [n,H,W]."""
    full = graph.resize(logits.name, logits.shape[1:], logits.size, aligned=False)
    index = graph.node("ArgMax", [full], axis=1, keepdims=0)  # int64
    largest = graph.reduce("ReduceMax", full, [1], keepdims=True)
    total = graph.reduce("ReduceSum", graph.node("Exp", [graph.node("Sub", [full, largest])]), [1], False)
    return graph.node("Cast", [index], to=TensorProto.FLOAT), total


def _decide_per_class(graph: Graph, logits: Logits) -> tuple[str, str]:
    images = _images(graph, logits)
    largest, count = _chain(graph, "Max", images), len(images)
    powers = [graph.node("Exp", [graph.node("Sub", [image, largest])]) for image in images]
    total = _squeezed(graph, _chain(graph, "Add", powers))
    if count == 1:  # nothing to compare with
        return _squeezed(graph, graph.node("Mul", [largest, graph.constant(0.0)])), total
    # The first class that equals the largest has the highest score.  The last one needs no comparison: 1 is
    # what remains, also if nothing equals anything (NaN).
    scores = [graph.constant(1.0)]
    for k, image in enumerate(images[:-1]):
        equal = graph.node("Cast", [graph.node("GreaterOrEqual", [image, largest])], to=TensorProto.FLOAT)
        scores.append(graph.node("Mul", [equal, graph.constant(float(count - k))]))
    index = graph.node("Sub", [graph.constant(float(count)), _chain(graph, "Max", scores)])
    return _squeezed(graph, index), total


def _edges(graph: Graph, logits: Logits, limits: np.ndarray, form: str) -> list[ValueInfoProto]:
    if form == "per-class":
        images = _images(graph, logits)
        bits = [
            _bit(graph, image, graph.constant(limit), graph.constant(1 << k, np.int32))
            for k, (image, limit) in enumerate(zip(images, limits, strict=True))
        ]
        total = _chain(graph, "Add", bits)
        graph.node("Squeeze", [total, graph.constant([1], np.int64)], output="edge_bits")
        # Joined before the cast: inside a graph TensorRT takes no uint8.
        levels = graph.node("Concat", [_level(graph, image) for image in images], axis=1)
    else:
        full = graph.resize(logits.name, logits.shape[1:], logits.size, aligned=False)
        powers = graph.constant([[[1 << k]] for k in range(len(limits))], np.int32)
        all_bits = _bit(graph, full, graph.constant(limits[:, None, None]), powers)
        graph.node("ReduceSum", [all_bits, graph.constant([1], np.int64)], keepdims=0, output="edge_bits")
        levels = _level(graph, full)
    graph.node("Cast", [levels], to=TensorProto.UINT8, output="edges")
    return [
        _info("edge_bits", TensorProto.INT32, [logits.n, *logits.size]),
        _info("edges", TensorProto.UINT8, [logits.n, logits.shape[0], *logits.size]),
    ]


def _bit(graph: Graph, x: str, limit: str, power: str) -> str:
    on = graph.node("GreaterOrEqual", [x, limit])
    return graph.node("Mul", [graph.node("Cast", [on], to=TensorProto.INT32), power])


def _level(graph: Graph, x: str) -> str:
    scaled = graph.node("Mul", [graph.node("Sigmoid", [x]), graph.constant(255.0)])
    # Casting to uint8 truncates: half a step is added, so that an edge is an 8-bit image rounded as usual.
    return graph.node("Add", [scaled, graph.constant(0.5)])


def _images(graph: Graph, logits: Logits) -> list[str]:
    """Each class at full resolution, [n,1,H,W].  Split before they are enlarged: there they are small."""
    parts = graph.split(logits.name, logits.shape[0])
    return [graph.resize(part, logits.shape[1:], logits.size, aligned=False) for part in parts]


def _chain(graph: Graph, op: str, values: list[str]) -> str:
    """A op B op C …, from the left, two at a time: faster than one node of many inputs."""
    result = values[0]
    for value in values[1:]:
        result = graph.node(op, [result, value])
    return result


def _squeezed(graph: Graph, x: str) -> str:
    return graph.node("Squeeze", [x, graph.constant([1], np.int64)])
