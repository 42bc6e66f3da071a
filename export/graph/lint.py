"""Does TensorRT's parser take an ONNX graph?

A lint without dependencies beyond onnx: it runs at every export and names the node and the reason.  An error
is what TensorRT-RTX 1.7's parser was seen to refuse.  A warning is what it takes although it is not
documented, what it takes with another meaning, and what needs a plugin.  Local functions are looked at as the
parser does: each call is replaced by the function's body.

The data is in `tensorrt_parser.toml`; the real parser has the last word (tests/tensorrt/test_lint_rtx.py).
Passing is no claim that anything runs on TensorRT, and a graph can be refused for its sizes alone.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from common.text import shorten
from export.errors import ExportError
from export.graph.functions import check_functions

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass
class Findings:
    """`errors`: the parser refuses it.  `warnings`: undocumented, of another meaning, or a plugin's."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@functools.cache
def _rules() -> dict[str, Any]:
    text = resources.files("export.graph").joinpath("tensorrt_parser.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def lint(model: onnx.ModelProto) -> Findings:
    """Check every node, type and attribute of a graph; never raises for a valid model."""
    found = Findings()
    try:
        model = _inlined(model, found)
    except ExportError as error:
        found.errors.append(str(error))
        return found
    _check_opsets(model, found)
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception:  # onnx raises several types, some of them for valid models
        inferred = model.graph
        found.warnings.append("shape inference failed; types inside the graph are unknown")
    graph = _Facts(inferred)
    _check_types(graph, found)
    for node in graph.nodes:
        _check_node(node, graph, found)
    return found


def _inlined(model: onnx.ModelProto, found: Findings) -> onnx.ModelProto:
    """Return the graph with local functions expanded.  Raises ExportError if they cannot be expanded."""
    if not model.functions:
        return model
    check_functions(model)
    for function in model.functions:
        # The parser asks for the name alone before it looks for a function.
        if function.name in _rules()["unsupported"]:
            found.errors.append(
                f"local function {function.domain}::{function.name} has the name of an operator that "
                "TensorRT's parser does not support"
            )
    try:
        return onnx.inliner.inline_local_functions(model)
    except Exception as error:  # onnx raises several types
        raise ExportError(f"the local functions cannot be expanded: {shorten(error, 160)}") from error


class _Facts:
    """Types and constants of a graph by name."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        for node in self.nodes:  # grows: what is inside an If or a Loop is parsed as well
            for a in node.attribute:
                self.nodes += [n for g in (a.g, *a.graphs) for n in g.node]
        inside = [g for n in self.nodes for a in n.attribute for g in (a.g, *a.graphs)]
        held = [i for g in (graph, *inside) for i in g.initializer]
        self.constants = {i.name: i for i in held}
        self.constants |= {
            n.output[0]: a.t
            for n in self.nodes
            for a in n.attribute
            if n.op_type == "Constant" and a.name == "value"
        }
        self.types = {
            v.name: v.type.tensor_type.elem_type
            for g in (graph, *inside)
            for v in (*g.input, *g.value_info, *g.output)
        }
        self.others = [
            v.name
            for v in (*graph.input, *graph.output)
            if v.type.WhichOneof("value") not in (None, "tensor_type")
        ]
        self.read = {name for n in self.nodes for name in n.input} | {o.name for o in graph.output}
        self.sparse = [i.values.name for g in (graph, *inside) for i in g.sparse_initializer]
        self.inputs = {v.name for v in graph.input} - set(self.constants)
        #: What the parser resolves to a number: it folds no arithmetic.
        self.resolved = set(self.constants) | {n.output[0] for n in self.nodes if n.op_type == "Constant"}
        for node in self.nodes:
            if node.op_type in ("Identity", "Cast") and node.input[0] in self.resolved:
                self.resolved.add(node.output[0])
        self.types.update({name: i.data_type for name, i in self.constants.items()})
        self.outputs = {o.name for o in graph.output}
        self.quantised = {y for n in graph.node if n.op_type == "QuantizeLinear" for y in n.output}

    def type_name(self, name: str) -> str:
        return str(TensorProto.DataType.Name(self.types.get(name, TensorProto.UNDEFINED)))


def _check_opsets(model: onnx.ModelProto, found: Findings) -> None:
    low, high = _rules()["opsets"]
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx"):
            if not low <= entry.version <= high:
                found.warnings.append(
                    f"opset {entry.version}: TensorRT documents {low} to {high}; export with opset 18"
                )
        elif entry.domain not in _rules()["known_domains"]:
            found.warnings.append(f"domain {entry.domain!r}: needs a TensorRT plugin")


def _check_types(graph: _Facts, found: Findings) -> None:
    """Tensors of types that TensorRT lacks, initialisers that nothing reads included; sparse ones that are
    read."""
    lacking = set(_rules()["types"])
    found.errors += [f"{name!r} is no tensor, which TensorRT's parser does not read" for name in graph.others]
    for name, kind in graph.types.items():
        text = str(TensorProto.DataType.Name(kind))
        if text in lacking:
            found.errors.append(f"tensor {name!r} is of the type {text}, which TensorRT does not have")
    found.errors += [
        f"initialiser {name!r} is sparse, which TensorRT's parser does not read; store it dense"
        for name in graph.sparse
        if name in graph.read
    ]


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
    found.warnings += [f"{where}: {reason}" for reason in _differs(node, attributes, graph)]


def _check_uint8(node: onnx.NodeProto, where: str, graph: _Facts, found: Findings) -> None:
    """UINT8 lives only at the borders: inputs are cast to float at once, outputs are cast from float last."""
    for name in node.input:
        if graph.types.get(name) != TensorProto.UINT8 or name in graph.constants:
            continue
        back = node.op_type == "DequantizeLinear" and name in graph.quantised
        if node.op_type == "Equal" and not set(node.input) & set(graph.constants):
            continue
        if node.op_type == "QuantizeLinear" and name == node.input[2]:
            continue
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


def _differs(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    """What the parser takes although it is not documented, or takes as something else."""
    if node.op_type == "Resize" and a.get("mode", "nearest") not in _rules()["resize"]["modes"]:
        return [f"mode {a['mode']!r} is not documented; use linear or nearest"]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and zero.data_type == TensorProto.UINT8:
            return ["UINT8 quantisation becomes INT8 and changes the range; quantise with INT8"]
        if zero is None and node.op_type == "QuantizeLinear":
            return ["no zero point: quantised as INT8 whatever was meant"]
    return []


def _reduce(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    axes = node.input[1] if len(node.input) > 1 else ""
    if axes and axes not in graph.resolved:
        return ["axes must be an initialiser or a Constant; the parser computes none"]
    return []


def _axes(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    given = len(node.input) > 1 and node.input[1] in graph.inputs
    return ["axes that come with a request are refused; make them an initialiser"] if given else []


def _mod(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    fractions = graph.types.get(node.input[0]) in (*_FLOATS, TensorProto.BFLOAT16, TensorProto.DOUBLE)
    return ["fractions need fmod=1"] if fractions and not a.get("fmod", 0) else []


def _range(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    kind = graph.types.get(node.input[0], TensorProto.FLOAT)
    taken = (TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64)
    return [] if kind in taken else [f"type {graph.type_name(node.input[0])} is refused"]


def _one_output(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    return ["only its first output is taken"] if any(node.output[1:]) else []


def _attention(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    reasons = _one_output(node, a, graph)
    reasons += [f"{key} is refused" for key in ("softcap", "softmax_precision") if a.get(key)]
    return reasons


def _dropout(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    mode = node.input[2] if len(node.input) > 2 else ""
    return ["training_mode must be an initialiser"] if mode and mode not in graph.resolved else []


def _constant(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    return [f"{key} is refused" for key in ("sparse_value", "value_string", "value_strings") if key in a]


def _recurrent(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    names = [_text(name) for name in a.get("activations", [])]
    if wrong := [name for name in names if name not in _rules()["recurrent"]["activations"]]:
        return [f"activation {wrong[0]!r} is refused"]
    return []


def _tensor_scatter(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    return [] if a.get("mode", "linear") == "linear" else [f"mode {a['mode']!r} is refused; use linear"]


def _lp_pool(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    reasons = _pool(node, a, graph)
    return reasons if a.get("p", 2) in (1, 2) else [*reasons, "p must be 1 or 2"]


def _stft(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    return [] if node.input[1] in graph.constants else ["frame_step must be an initialiser"]


def _resize(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    rules, reasons = _rules()["resize"], []
    if len(node.input) > 2 and node.input[2] in graph.inputs:
        reasons.append("scales that come with a request are refused; make them an initialiser")
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
    too_many = k is not None and any(int(value) > largest for value in _values(k)[:1])
    return [f"K may be {largest} at most"] if too_many else []


def _quantise(node: onnx.NodeProto, a: dict[str, Any], graph: _Facts) -> list[str]:
    zero = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if zero is not None and _values(zero).any():
        return ["the zero point must be 0; quantise symmetrically"]
    return []


def _values(tensor: TensorProto) -> np.ndarray:
    """The values of a constant; none where it is damaged or in another file."""
    try:
        return numpy_helper.to_array(tensor).ravel()
    except Exception:  # onnx raises several types
        return np.zeros(0)


_CHECKS = {
    "Resize": _resize,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "LpPool": _lp_pool,
    "ScatterND": _scatter,
    "ScatterElements": _scatter,
    **dict.fromkeys(
        (
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
        ),
        _reduce,
    ),
    "Attention": _attention,
    "Constant": _constant,
    "Dropout": _dropout,
    "GRU": _recurrent,
    "LSTM": _recurrent,
    "LayerNormalization": _one_output,
    "RNN": _recurrent,
    "Mod": _mod,
    "Range": _range,
    "STFT": _stft,
    "Squeeze": _axes,
    "Unsqueeze": _axes,
    "TensorScatter": _tensor_scatter,
    "BatchNormalization": _batch_norm,
    "TopK": _topk,
    "QuantizeLinear": _quantise,
    "DequantizeLinear": _quantise,
}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
