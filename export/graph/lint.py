"""Does an ONNX graph stay inside what TensorRT's parser documents?

A lint without dependencies beyond onnx: it runs at every export and names the node and the reason.  The
data is in `tensorrt_parser.toml`; the real parser has the last word (tests/peers).  Passing it is no claim
that anything runs on TensorRT.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass
class Findings:
    """`errors`: the parser refuses it.  `warnings`: undocumented, or a plugin's."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@functools.cache
def _rules() -> dict[str, Any]:
    text = resources.files("export.graph").joinpath("tensorrt_parser.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def lint(model: onnx.ModelProto) -> Findings:
    """Check every node, type and attribute of a graph; never raises for a valid model."""
    found = Findings()
    _check_opsets(model, found)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        inferred = model.graph
        found.warnings.append("shape inference failed; types inside the graph are unknown")
    graph = _Facts(inferred)
    for node in graph.nodes:
        _check_node(node, graph, found)
    return found


class _Facts:
    """Types and constants of a graph by name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        for node in self.nodes:  # grows: what is inside an If or a Loop is parsed as well
            for a in node.attribute:
                self.nodes += [n for g in (a.g, *a.graphs) for n in g.node]
        self.constants = {i.name: i for i in graph.initializer}
        self.types = {
            v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)
        }
        self.types.update({i.name: i.data_type for i in graph.initializer})
        self.outputs = {o.name for o in graph.output}
        self.quantised = {y for n in graph.node if n.op_type == "QuantizeLinear" for y in n.output}

    def type_name(self, name: str) -> str:
        return str(TensorProto.DataType.Name(self.types.get(name, TensorProto.UNDEFINED)))


def _check_opsets(model: onnx.ModelProto, found: Findings) -> None:
    low, high = _rules()["opsets"]
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            if not low <= entry.version <= high:
                found.errors.append(
                    f"opset {entry.version}: TensorRT documents {low} to {high}; export with opset 18"
                )
        else:
            found.warnings.append(f"domain {entry.domain!r}: needs a TensorRT plugin")


def _check_node(node: onnx.NodeProto, graph: _Facts, found: Findings) -> None:
    where = f"{node.op_type} {node.name or (node.output[0] if node.output else '')!r}"
    if node.domain not in ("", "ai.onnx"):
        found.errors.append(f"{where}: operator of the domain {node.domain!r}, which TensorRT does not have")
        return
    rules = _rules()
    if node.op_type in rules["unsupported"]:
        found.errors.append(f"{where}: operator not supported by TensorRT's parser")
        return
    if node.op_type in rules["plugin"]:
        found.warnings.append(f"{where}: implemented by a TensorRT plugin")
    _check_uint8(node, where, graph, found)
    attributes = {a.name: _text(helper.get_attribute_value(a)) for a in node.attribute}
    check = _CHECKS.get(node.op_type)
    if check is not None:
        found.errors += [f"{where}: {reason}" for reason in check(node, attributes, graph)]


def _check_uint8(node: onnx.NodeProto, where: str, graph: _Facts, found: Findings) -> None:
    """UINT8 lives only at the borders: inputs are cast to float at once, outputs are cast from float last."""
    for name in node.input:
        if graph.types.get(name) != TensorProto.UINT8 or name in graph.constants:
            continue
        back = node.op_type == "DequantizeLinear" and name in graph.quantised
        if node.op_type not in ("Cast", "Identity") and not back:
            found.errors.append(
                f"{where}: reads the UINT8 tensor {name!r}; only a Cast may, cast it to FLOAT first"
            )
    for name in node.output:
        inside = graph.types.get(name) == TensorProto.UINT8 and name not in graph.outputs
        if inside and node.op_type not in ("Constant", "QuantizeLinear"):
            found.errors.append(f"{where}: UINT8 tensor {name!r} inside the graph; only outputs may be UINT8")
    if node.op_type == "Cast":
        source, target = node.input[0], node.output[0]
        pair = (graph.types.get(source), graph.types.get(target))
        if TensorProto.UINT8 in pair and not any(kind in _FLOATS for kind in pair):
            found.warnings.append(
                f"{where}: cast {graph.type_name(source)} to {graph.type_name(target)} is outside the "
                "documented UINT8 and FLOAT pair"
            )


def _resize(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    rules, reasons = _rules()["resize"], []
    if a.get("mode", "nearest") not in rules["modes"]:
        reasons.append(f"mode {a['mode']!r} is not documented; use linear or nearest")
    if a.get("coordinate_transformation_mode", "half_pixel") not in rules["transforms"]:
        reasons.append(f"coordinate mode {a['coordinate_transformation_mode']!r} is refused; use half_pixel")
    if a.get("antialias", 0):
        reasons.append("antialias is refused")
    if a.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        reasons.append("only the aspect policy 'stretch' is taken")
    return reasons


def _pool(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    reasons = []
    if any(d != 1 for d in a.get("dilations", [])):
        reasons.append("dilated pooling is refused")
    if len(node.output) > 1 and node.output[1]:
        reasons.append("the Indices output is refused")
    return reasons


def _scatter(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    return [] if a.get("reduction", "none") == "none" else ["a reduction is refused"]


def _batch_norm(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    return ["training_mode is refused"] if a.get("training_mode", 0) else []


def _topk(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    largest = int(_rules()["topk"]["largest"])
    k = graph.constants.get(node.input[1])
    too_many = k is not None and int(numpy_helper.to_array(k).ravel()[0]) > largest
    return [f"K may be {largest} at most"] if too_many else []


def _quantise(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is None:
        return (
            ["no zero point: quantised as INT8 whatever was meant"]
            if node.op_type == "QuantizeLinear"
            else []
        )
    if numpy_helper.to_array(zero).any():
        return ["the zero point must be 0; quantise symmetrically"]
    if zero.data_type == TensorProto.UINT8:
        return ["UINT8 quantisation becomes INT8 and changes the range; quantise with INT8"]
    return []


_CHECKS = {
    "Resize": _resize,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _pool,
    "ScatterND": _scatter,
    "BatchNormalization": _batch_norm,
    "TopK": _topk,
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _quantise,
}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
