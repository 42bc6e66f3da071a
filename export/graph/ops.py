"""The ONNX form of each operation that our networks use: one handler per module class or function.

A handler takes the context, the traced node and its meta tensor, appends nodes, and returns the name of the
answer.  An operation that is not in `MODULES` or `CALLS` has no ONNX form here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from export.errors import ExportError
from export.graph.fold import Folding
from export.graph.onnx_graph import Graph
from export.graph.pooling import adaptive_mean

__all__ = ["CALLS", "MODULES", "TRACED_BATCH", "Context", "Handler"]

#: Networks are traced with this many frames, so that a dimension of one is never mistaken for the batch.
TRACED_BATCH = 2


class Context:
    """What a handler may ask while the network is walked: names, values and shapes of arguments, and weights.

    out         the graph that the handler appends nodes to
    folding     the traced network
    values      the value of each traced node: a number, a size, or a meta tensor
    names       the ONNX name of each traced node that is a tensor
    """

    def __init__(self, folding: Folding, graph: Graph, weights: dict[str, np.ndarray]) -> None:
        self.folding = folding
        self.out = graph
        self.weights = weights
        self.values: dict[fx.Node, Any] = {}
        self.names: dict[fx.Node, str] = {}

    def name(self, argument: Any) -> str:
        """Return the ONNX name of an argument: that of a tensor, or of a constant.  Raises ExportError."""
        if isinstance(argument, fx.Node):
            if argument in self.names:
                return self.names[argument]
            argument = self.values[argument]
        if isinstance(argument, (int, float)):
            return self.out.constant(float(argument))
        raise ExportError(f"argument {argument!r} has no ONNX form")

    def value(self, argument: Any) -> Any:
        """Return the concrete value of an argument: a number, a size, or a meta tensor."""
        return fx.map_arg(argument, lambda node: self.values[node])

    def shape(self, argument: Any) -> tuple[int, ...]:
        """Return the shape of a tensor argument."""
        return tuple(self.values[argument].shape)

    def arguments(self, node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any]:
        """Return the concrete arguments of a call by name.  `names` is their order, the input first."""
        values = dict(zip(names, self.value(node.args), strict=False))
        return {**defaults, **values, **self.value(dict(node.kwargs))}

    def parameter(self, path: str, shape: tuple[int, ...] | None = None) -> str:
        """Add a weight of the network to the graph, in this shape, and return its name."""
        array = self.weights[path]
        return self.out.weight(path, array if shape is None else array.reshape(shape))


Handler = Callable[[Context, fx.Node, Any], str]


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * 2


def _conv(e: Context, node: fx.Node, _: Tensor) -> str:
    path, conv = str(node.target), e.folding.modules[str(node.target)]
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise ExportError(f"{path}: padding {conv.padding_mode} {conv.padding!r} has no ONNX form here")
    inputs = [e.name(node.args[0]), e.parameter(f"{path}.weight")]
    if conv.bias is not None:
        inputs.append(e.parameter(f"{path}.bias"))
    elif path in e.folding.bias_names:
        inputs.append(e.parameter(e.folding.bias_names[path]))
    attributes: dict[str, Any] = {
        "kernel_shape": _pair(conv.kernel_size),
        "strides": _pair(conv.stride),
        "pads": _pair(conv.padding) * 2,
        "dilations": _pair(conv.dilation),
        "group": conv.groups,
    }
    if isinstance(conv, nn.ConvTranspose2d):
        return e.out.node("ConvTranspose", inputs, output_padding=_pair(conv.output_padding), **attributes)
    return e.out.node("Conv", inputs, **attributes)


def _batch_norm(e: Context, node: fx.Node, _: Tensor) -> str:
    # Scale and shift, not BatchNormalization: engines fold that one into weights of names of their own.
    path = str(node.target)
    scaled = e.out.node("Mul", [e.name(node.args[0]), e.parameter(f"{path}.weight", (-1, 1, 1))])
    return e.out.node("Add", [scaled, e.parameter(f"{path}.bias", (-1, 1, 1))])


def _prelu(e: Context, node: fx.Node, _: Tensor) -> str:
    # Not PRelu: ONNX Runtime's is scalar code, a quarter of ESPNetv2's time (docs/export.md).
    x, slope = e.name(node.args[0]), e.parameter(f"{node.target}.weight", (-1, 1, 1))
    below = e.out.node("Mul", [e.out.node("Min", [x, e.out.constant(0.0)]), slope])
    return e.out.node("Add", [e.out.node("Relu", [x]), below])


def _same(e: Context, node: fx.Node, _: Tensor) -> str:
    return e.name(node.args[0])


def _pool_module(op: str) -> Handler:
    def emit(e: Context, node: fx.Node, result: Tensor) -> str:
        pool: Any = e.folding.modules[str(node.target)]
        return _pool(
            e,
            node,
            op,
            kernel=pool.kernel_size,
            stride=pool.stride,
            padding=pool.padding,
            ceil=pool.ceil_mode,
            dilation=getattr(pool, "dilation", 1),
            count_include_pad=getattr(pool, "count_include_pad", True),
            divisor=getattr(pool, "divisor_override", None),
        )

    return emit


def _pool(
    e: Context,
    node: fx.Node,
    op: str,
    *,
    kernel: Any,
    stride: Any,
    padding: Any = 0,
    ceil: bool = False,
    dilation: Any = 1,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> str:
    if divisor is not None or _pair(dilation) != [1, 1]:
        raise ExportError(
            f"{node.name}: pooling with a divisor or dilation has no form that every engine takes"
        )
    return e.out.node(
        op,
        [e.name(node.args[0])],
        kernel_shape=_pair(kernel),
        strides=_pair(kernel if stride is None else stride),
        pads=_pair(padding) * 2,
        ceil_mode=int(ceil),
        count_include_pad=int(count_include_pad) if op == "AveragePool" else None,
    )


def _adaptive_module(e: Context, node: fx.Node, result: Tensor) -> str:
    return adaptive_mean(e.out, e.name(node.args[0]), e.shape(node.args[0]), tuple(result.shape[2:]))


def _unary(op: str) -> Handler:
    return lambda e, node, _: e.out.node(op, [e.name(node.args[0])])


def _binary(op: str, swap: bool = False) -> Handler:
    def emit(e: Context, node: fx.Node, _: Tensor) -> str:
        a, b = (e.name(argument) for argument in node.args[:2])
        if node.kwargs:
            raise ExportError(f"{node.name}: {op} with {sorted(node.kwargs)} has no ONNX form here")
        return e.out.node(op, [b, a] if swap else [a, b])

    return emit


def _interpolate(e: Context, node: fx.Node, result: Tensor) -> str:
    a = e.arguments(node, "input", "size", "scale_factor", "mode", "align_corners", mode="nearest")
    if a["mode"] != "bilinear" or a.get("antialias"):
        raise ExportError(f"{node.name}: interpolation {a['mode']!r} has no ONNX form here; use bilinear")
    before, after = e.shape(node.args[0])[2:], tuple(result.shape[2:])
    return e.out.resize(e.name(node.args[0]), before, after, bool(a.get("align_corners")))  # type: ignore[arg-type]


def _pad(e: Context, node: fx.Node, _: Tensor) -> str:
    a = e.arguments(node, "input", "pad", "mode", "value", mode="constant", value=None)
    if a["mode"] != "constant" or a["value"]:
        raise ExportError(f"{node.name}: only padding with zeros has an ONNX form here, not {a['mode']!r}")
    rank = len(e.shape(node.args[0]))
    before, after = [0] * rank, [0] * rank
    for i, (low, high) in enumerate(zip(a["pad"][::2], a["pad"][1::2], strict=True)):
        before[rank - 1 - i], after[rank - 1 - i] = int(low), int(high)
    pads = e.out.constant(before + after, np.int64)
    return e.out.node("Pad", [e.name(node.args[0]), pads], mode="constant")


def _avg_pool(e: Context, node: fx.Node, _: Tensor) -> str:
    a = e.arguments(
        node, "input", "kernel", "stride", "padding", "ceil", "count_include_pad", "divisor", stride=None
    )
    renamed = {"kernel_size": "kernel", "ceil_mode": "ceil", "divisor_override": "divisor"}
    a = {renamed.get(k, k): v for k, v in a.items() if k != "input"}
    return _pool(e, node, "AveragePool", **a)


def _cat(e: Context, node: fx.Node, _: Tensor) -> str:
    tensors = node.args[0] if node.args else node.kwargs["tensors"]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return e.out.node("Concat", [e.name(t) for t in tensors], axis=int(e.value(axis)))  # type: ignore[union-attr]


def _reduce(op: str) -> Handler:
    def emit(e: Context, node: fx.Node, result: Tensor) -> str:
        a = e.arguments(node, "input", "dim", "keepdim", keepdim=False)
        rank = len(e.shape(node.args[0]))
        dims = a["dim"] if isinstance(a["dim"], (tuple, list)) else [a["dim"]]
        return e.out.reduce(op, e.name(node.args[0]), sorted(int(d) % rank for d in dims), bool(a["keepdim"]))

    return emit


def _softmax(e: Context, node: fx.Node, _: Tensor) -> str:
    axis = e.arguments(node, "input", "dim")["dim"]
    return e.out.node("Softmax", [e.name(node.args[0])], axis=int(axis))


def _reshape(e: Context, node: fx.Node, result: Tensor) -> str:
    before, after = e.shape(node.args[0]), tuple(result.shape)
    if before[0] != TRACED_BATCH or after[0] != before[0]:
        raise ExportError(f"{node.name}: a reshape that touches the batch dimension cannot be exported")
    target = e.out.constant([0, *after[1:]], np.int64)  # 0: as it is
    return e.out.node("Reshape", [e.name(node.args[0]), target])


def _permute(e: Context, node: fx.Node, result: Tensor) -> str:
    rank = len(e.shape(node.args[0]))
    order = list(range(rank))
    values = [int(v) for v in _flat(e.value(node.args[1:]))]
    if node.target in ("transpose", torch.transpose):
        a, b = (v % rank for v in values)
        order[a], order[b] = order[b], order[a]
    else:
        order = [v % rank for v in values]
    return e.out.node("Transpose", [e.name(node.args[0])], perm=order)


def _flat(values: Any) -> list[Any]:
    return [v for item in values for v in (_flat(item) if isinstance(item, (tuple, list)) else [item])]


def _getitem(e: Context, node: fx.Node, result: Tensor) -> str:
    index = e.value(node.args[1])
    index = index if isinstance(index, tuple) else (index,)
    shape = e.shape(node.args[0])
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        raise ExportError(f"{node.name}: only slices without a step can be exported, not {index!r}")
    ranges = {a: i.indices(shape[a])[:2] for a, i in enumerate(index) if i != slice(None)}
    if 0 in ranges:
        raise ExportError(f"{node.name}: a slice of the batch dimension cannot be exported")
    return e.out.slice(e.name(node.args[0]), ranges)


def _pixel_shuffle(e: Context, node: fx.Node, _: Tensor) -> str:
    factor = e.arguments(node, "input", "upscale_factor")["upscale_factor"]
    return e.out.node("DepthToSpace", [e.name(node.args[0])], blocksize=int(factor), mode="CRD")


MODULES: dict[type[nn.Module], Handler] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _conv,
    nn.BatchNorm2d: _batch_norm,
    nn.PReLU: _prelu,
    nn.ReLU: _unary("Relu"),
    nn.Sigmoid: _unary("Sigmoid"),
    nn.Identity: _same,
    nn.Dropout: _same,
    nn.Dropout2d: _same,
    nn.MaxPool2d: _pool_module("MaxPool"),
    nn.AvgPool2d: _pool_module("AveragePool"),
    nn.AdaptiveAvgPool2d: _adaptive_module,
}

CALLS: dict[Any, Handler] = {
    torch.relu: _unary("Relu"),
    F.relu: lambda e, node, _: e.out.node("Relu", [e.name(node.args[0])]),
    "relu": _unary("Relu"),
    torch.sigmoid: _unary("Sigmoid"),
    "sigmoid": _unary("Sigmoid"),
    torch.exp: _unary("Exp"),
    "contiguous": _same,
    operator.add: _binary("Add"),
    operator.iadd: _binary("Add"),
    torch.add: _binary("Add"),
    operator.sub: _binary("Sub"),
    torch.sub: _binary("Sub"),
    operator.mul: _binary("Mul"),
    torch.mul: _binary("Mul"),
    operator.truediv: _binary("Div"),
    torch.maximum: _binary("Max"),
    torch.matmul: _binary("MatMul"),
    F.interpolate: _interpolate,
    F.avg_pool2d: _avg_pool,
    F.adaptive_avg_pool2d: _adaptive_module,
    F.pixel_shuffle: _pixel_shuffle,
    F.pad: _pad,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.softmax: _softmax,
    F.softmax: _softmax,
    "softmax": _softmax,
    "mean": _reduce("ReduceMean"),
    torch.mean: _reduce("ReduceMean"),
    "sum": _reduce("ReduceSum"),
    torch.sum: _reduce("ReduceSum"),
    "amax": _reduce("ReduceMax"),
    torch.amax: _reduce("ReduceMax"),
    "reshape": _reshape,
    "view": _reshape,
    torch.reshape: _reshape,
    "transpose": _permute,
    torch.transpose: _permute,
    "permute": _permute,
    torch.permute: _permute,
    operator.getitem: _getitem,
}
