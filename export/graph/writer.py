"""Write a traced network as an ONNX graph under the graph contract.

Why not torch's exporters: the old one renames what it folds, reshapes and constant-folds (a PReLU slope, a
normalisation) and is deprecated; the new one takes seconds and a second package.  A refit, in an engine
of any kind, is addressed by initialiser names, so they are the contract here: every initialiser that holds
weights has the name it has in the state_dict, every other begins with "const.".  An operation that is not
written here is refused by name, never approximated.

Knows torch graphs and ONNX; nothing of engines.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from export.errors import ExportError, one_line
from export.graph import heads
from export.graph.contract import INPUT, Contract
from export.graph.fold import Folding
from networks.base import SegmentationNetwork
from networks.images import MOST_PIXELS
from networks.pack import PackSpec

OPSETS = (17, 18, 19, 20)
DEFAULT_OPSET = 18
_IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9}
#: Traced with this many frames, so that a dimension of one is never mistaken for the batch.
_TRACED_BATCH = 2

Handler = Callable[["_Emitter", fx.Node, Any], str]


class Graph:
    """Nodes and initialisers of an ONNX graph under construction."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Name of an initialiser that is no weight; equal ones are shared."""
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype)).reshape(np.shape(value))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const.{len(self._constants)}"
            self._constants[key] = name
            self.initialisers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, name: str, array: np.ndarray) -> str:
        self.initialisers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def node(self, op: str, inputs: Iterable[str], *, output: str = "", **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        if not output:
            index = self._counts.get(op, 0)
            self._counts[op] = index + 1
            output = f"{op.lower()}.{index}"
        attributes = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def split(self, x: str, count: int) -> list[str]:
        """The `count` channels of [N,count,…], each [N,1,…]."""
        outputs = [f"split.{self._counts.get('Split', 0)}.{k}" for k in range(count)]
        self._counts["Split"] = self._counts.get("Split", 0) + 1
        sizes = self.constant([1] * count, np.int64)
        self.nodes.append(helper.make_node("Split", [x, sizes], outputs, name=outputs[0], axis=1))
        return outputs

    def reduce(self, op: str, x: str, axes: list[int], keepdims: bool) -> str:
        """ReduceMax, ReduceMean or ReduceSum; their axes moved from attribute to input with opset 18 (13)."""
        if self.opset >= 18 or op == "ReduceSum":
            return self.node(op, [x, self.constant(axes, np.int64)], keepdims=int(keepdims))
        return self.node(op, [x], axes=axes, keepdims=int(keepdims))

    def resize(self, x: str, before: tuple[int, int], after: tuple[int, int], aligned: bool) -> str:
        """Bilinear enlargement.  By scales, not sizes, so that the batch stays open at any opset."""
        if before == after:
            return x
        scales = self.constant([1.0, 1.0, *(_scale(a, b) for a, b in zip(before, after, strict=True))])
        mode = "align_corners" if aligned else "half_pixel"
        return self.node(
            "Resize", [x, "", scales], mode="linear", coordinate_transformation_mode=mode, nearest_mode=None
        )


def _scale(before: int, after: int) -> float:
    """The float32 s nearest to after/before with floor(before * s) == after in any precision."""
    scale = np.float32(after / before)
    while float(scale) * before < after:
        scale = np.nextafter(scale, np.float32(np.inf))
    return float(scale)


class _Emitter:
    """Walks the traced network on shapes alone (meta tensors) and writes one ONNX node after another."""

    def __init__(self, folding: Folding, graph: Graph, weights: dict[str, np.ndarray]) -> None:
        self.folding = folding
        self.out = graph
        self.weights = weights
        self.env: dict[fx.Node, Any] = {}
        self.names: dict[fx.Node, str] = {}

    def write(self, x: str, example: Tensor) -> list[tuple[str, Tensor]]:
        """Write the network applied to the value `x`; returns the name and the meta tensor of each answer."""
        for node in self.folding.graph.nodes:
            if node.op == "output":
                break
            result = self.env[node] = self._evaluate(node, example)
            if node.op == "placeholder":
                self.names[node] = x
            elif isinstance(result, Tensor):
                self.names[node] = self._emit(node, result)
        answers = node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],)
        if not all(isinstance(a, fx.Node) and isinstance(self.env[a], Tensor) for a in answers):
            raise ExportError("the network must return tensors of logits")
        return [(self.names[a], self.env[a]) for a in answers if isinstance(a, fx.Node)]

    def _evaluate(self, node: fx.Node, example: Tensor) -> Any:
        args, kwargs = self.value(node.args), self.value(dict(node.kwargs))
        target: Any = node.target
        try:
            if node.op == "placeholder":
                return example
            if node.op == "get_attr":
                value: Any = self.folding.modules[""]
                for part in target.split("."):
                    value = getattr(value, part)
                return value.to("meta") if isinstance(value, Tensor) else value
            if node.op == "call_module":
                return _meta_call(self.folding.modules[target], args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ExportError(f"{node.name} fails at this size: {one_line(error)[:200]}") from error

    # -- what handlers ask --

    def name(self, argument: Any) -> str:
        """ONNX name of an argument: a tensor's own, or a constant's."""
        if isinstance(argument, fx.Node):
            if argument in self.names:
                return self.names[argument]
            argument = self.env[argument]
        if isinstance(argument, (int, float)):
            return self.out.constant(float(argument))
        raise ExportError(f"argument {argument!r} has no ONNX form")

    def value(self, argument: Any) -> Any:
        """Concrete value (numbers, sizes; meta tensors for tensors) of an argument."""
        return fx.map_arg(argument, lambda node: self.env[node])

    def shape(self, argument: Any) -> tuple[int, ...]:
        return tuple(self.env[argument].shape)

    def arguments(self, node: fx.Node, *names: str, **defaults: Any) -> dict[str, Any]:
        """Concrete arguments of a call by name, in the order of `names` (the first is the input tensor)."""
        values = dict(zip(names, self.value(node.args), strict=False))
        return {**defaults, **values, **self.value(dict(node.kwargs))}

    def parameter(self, path: str, shape: tuple[int, ...] | None = None) -> str:
        array = self.weights[path]
        return self.out.weight(path, array if shape is None else array.reshape(shape))

    def _emit(self, node: fx.Node, result: Tensor) -> str:
        handler: Handler | None = None
        if node.op == "call_module":
            module = self.folding.modules[str(node.target)]
            handler = next((h for kind, h in _MODULES.items() if type(module) is kind), None)
            what = f"module {type(module).__name__} at {node.target!r}"
        elif node.op == "get_attr":
            return self.parameter(str(node.target))
        else:
            handler = _CALLS.get(node.target)
            what = f"operation {getattr(node.target, '__name__', node.target)!r} in {node.name!r}"
        if handler is None:
            raise ExportError(
                f"{what} has no ONNX form here; add it to export/graph/writer.py or rewrite the network"
            )
        try:
            return handler(self, node, result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # A handler reads the arguments that networks use; others are refused, not guessed.
            raise ExportError(f"{what} is called in a way that has no ONNX form here: {error!r}") from error


def _meta_call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The module applied to meta tensors, without moving or copying its weights."""
    state = {k: v.to("meta") for k, v in [*module.named_parameters(), *module.named_buffers()]}
    return torch.func.functional_call(module, state, args, kwargs)


# -- modules ------------------------------------------------------------------------------------------


def _pair(value: Any) -> list[int]:
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)] * 2


def _conv(e: _Emitter, node: fx.Node, _: Tensor) -> str:
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


def _batch_norm(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    # Scale and shift, not BatchNormalization: engines fold that one into weights of names of their own.
    path = str(node.target)
    scaled = e.out.node("Mul", [e.name(node.args[0]), e.parameter(f"{path}.weight", (-1, 1, 1))])
    return e.out.node("Add", [scaled, e.parameter(f"{path}.bias", (-1, 1, 1))])


def _prelu(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    # Not PRelu: ONNX Runtime's is scalar code, a quarter of ESPNetv2's time (docs/export.md).
    x, slope = e.name(node.args[0]), e.parameter(f"{node.target}.weight", (-1, 1, 1))
    below = e.out.node("Mul", [e.out.node("Min", [x, e.out.constant(0.0)]), slope])
    return e.out.node("Add", [e.out.node("Relu", [x]), below])


def _same(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    return e.name(node.args[0])


def _pool_module(op: str) -> Handler:
    def emit(e: _Emitter, node: fx.Node, result: Tensor) -> str:
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
    e: _Emitter,
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


def _adaptive_module(e: _Emitter, node: fx.Node, result: Tensor) -> str:
    return adaptive_mean(e.out, e.name(node.args[0]), e.shape(node.args[0]), tuple(result.shape[2:]))


# -- adaptive average pooling -------------------------------------------------------------------------


def adaptive_mean(graph: Graph, x: str, shape: tuple[int, ...], size: tuple[int, ...]) -> str:
    """`adaptive_avg_pool2d` from [N,C,h,w] to [N,C,*size], exactly, in operations that every engine has.

    Four cases of the same linear map: the whole map is a global mean; whole windows are a mean pooling;
    three to two is four strided poolings, interleaved; anything else is a product with one small constant
    matrix a side.
    """
    (h, w), (height, width) = shape[2:], size
    if (height, width) == (1, 1):
        return graph.node("GlobalAveragePool", [x])
    if (height, width) == (h, w):
        return x
    if h % height == 0 and w % width == 0:
        kernel = [h // height, w // width]
        return graph.node("AveragePool", [x], kernel_shape=kernel, strides=kernel)
    if 2 * h == 3 * height and 2 * w == 3 * width:
        return _three_to_two(graph, x, shape)
    # Rows first: it leaves the least to do for the columns.
    y = graph.node("MatMul", [graph.constant(pooling_matrix(h, height)), x])
    return graph.node("MatMul", [y, graph.constant(pooling_matrix(w, width).T)])


def _three_to_two(graph: Graph, x: str, shape: tuple[int, ...]) -> str:
    """Windows of two, starting at 0, 1, 3, 4, 6, 7, ...: even outputs at 3k, odd ones at 3k + 1."""
    h, w = shape[2:]
    parts = []
    for dy in (0, 1):
        for dx in (0, 1):
            part = x
            if dy or dx:
                part = _slice(graph, x, {2: (dy, h), 3: (dx, w)})
            parts.append(graph.node("AveragePool", [part], kernel_shape=[2, 2], strides=[3, 3]))
    together = graph.node("Concat", parts, axis=1)
    # Concatenation put the phase before the channel, which is what DepthToSpace in mode DCR expects.
    return graph.node("DepthToSpace", [together], blocksize=2, mode="DCR")


def pooling_matrix(inputs: int, outputs: int) -> np.ndarray:
    """float32 [outputs, inputs]: row i averages floor(i*inputs/outputs) to ceil((i+1)*inputs/outputs)."""
    matrix = np.zeros((outputs, inputs), np.float32)
    for i in range(outputs):
        start, stop = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        matrix[i, start:stop] = 1.0 / (stop - start)
    return matrix


def _slice(graph: Graph, x: str, ranges: dict[int, tuple[int, int]]) -> str:
    axes = sorted(ranges)
    starts, ends = ([ranges[a][i] for a in axes] for i in (0, 1))
    return graph.node("Slice", [x, *(graph.constant(v, np.int64) for v in (starts, ends, axes))])


# -- functions and methods ----------------------------------------------------------------------------


def _unary(op: str) -> Handler:
    return lambda e, node, _: e.out.node(op, [e.name(node.args[0])])


def _binary(op: str, swap: bool = False) -> Handler:
    def emit(e: _Emitter, node: fx.Node, _: Tensor) -> str:
        a, b = (e.name(argument) for argument in node.args[:2])
        if node.kwargs:
            raise ExportError(f"{node.name}: {op} with {sorted(node.kwargs)} has no ONNX form here")
        return e.out.node(op, [b, a] if swap else [a, b])

    return emit


def _interpolate(e: _Emitter, node: fx.Node, result: Tensor) -> str:
    a = e.arguments(node, "input", "size", "scale_factor", "mode", "align_corners", mode="nearest")
    if a["mode"] != "bilinear" or a.get("antialias"):
        raise ExportError(f"{node.name}: interpolation {a['mode']!r} has no ONNX form here; use bilinear")
    before, after = e.shape(node.args[0])[2:], tuple(result.shape[2:])
    return e.out.resize(e.name(node.args[0]), before, after, bool(a.get("align_corners")))  # type: ignore[arg-type]


def _pad(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    a = e.arguments(node, "input", "pad", "mode", "value", mode="constant", value=None)
    if a["mode"] != "constant" or a["value"]:
        raise ExportError(f"{node.name}: only padding with zeros has an ONNX form here, not {a['mode']!r}")
    rank = len(e.shape(node.args[0]))
    before, after = [0] * rank, [0] * rank
    for i, (low, high) in enumerate(zip(a["pad"][::2], a["pad"][1::2], strict=True)):
        before[rank - 1 - i], after[rank - 1 - i] = int(low), int(high)
    pads = e.out.constant(before + after, np.int64)
    return e.out.node("Pad", [e.name(node.args[0]), pads], mode="constant")


def _avg_pool(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    a = e.arguments(
        node, "input", "kernel", "stride", "padding", "ceil", "count_include_pad", "divisor", stride=None
    )
    renamed = {"kernel_size": "kernel", "ceil_mode": "ceil", "divisor_override": "divisor"}
    a = {renamed.get(k, k): v for k, v in a.items() if k != "input"}
    return _pool(e, node, "AveragePool", **a)


def _cat(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    tensors = node.args[0] if node.args else node.kwargs["tensors"]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return e.out.node("Concat", [e.name(t) for t in tensors], axis=int(e.value(axis)))  # type: ignore[union-attr]


def _reduce(op: str) -> Handler:
    def emit(e: _Emitter, node: fx.Node, result: Tensor) -> str:
        a = e.arguments(node, "input", "dim", "keepdim", keepdim=False)
        rank = len(e.shape(node.args[0]))
        dims = a["dim"] if isinstance(a["dim"], (tuple, list)) else [a["dim"]]
        return e.out.reduce(op, e.name(node.args[0]), sorted(int(d) % rank for d in dims), bool(a["keepdim"]))

    return emit


def _softmax(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    axis = e.arguments(node, "input", "dim")["dim"]
    return e.out.node("Softmax", [e.name(node.args[0])], axis=int(axis))


def _reshape(e: _Emitter, node: fx.Node, result: Tensor) -> str:
    before, after = e.shape(node.args[0]), tuple(result.shape)
    if before[0] != _TRACED_BATCH or after[0] != before[0]:
        raise ExportError(f"{node.name}: a reshape that touches the batch dimension cannot be exported")
    target = e.out.constant([0, *after[1:]], np.int64)  # 0: as it is
    return e.out.node("Reshape", [e.name(node.args[0]), target])


def _permute(e: _Emitter, node: fx.Node, result: Tensor) -> str:
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


def _getitem(e: _Emitter, node: fx.Node, result: Tensor) -> str:
    index = e.value(node.args[1])
    index = index if isinstance(index, tuple) else (index,)
    shape = e.shape(node.args[0])
    if not all(isinstance(i, slice) and i.step in (None, 1) for i in index):
        raise ExportError(f"{node.name}: only slices without a step can be exported, not {index!r}")
    ranges = {a: i.indices(shape[a])[:2] for a, i in enumerate(index) if i != slice(None)}
    if 0 in ranges:
        raise ExportError(f"{node.name}: a slice of the batch dimension cannot be exported")
    return _slice(e.out, e.name(node.args[0]), ranges)


def _pixel_shuffle(e: _Emitter, node: fx.Node, _: Tensor) -> str:
    factor = e.arguments(node, "input", "upscale_factor")["upscale_factor"]
    return e.out.node("DepthToSpace", [e.name(node.args[0])], blocksize=int(factor), mode="CRD")


_MODULES: dict[type[nn.Module], Handler] = {
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

_CALLS: dict[Any, Handler] = {
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


# -- the whole graph ----------------------------------------------------------------------------------


def write(
    network: SegmentationNetwork,
    spec: PackSpec,
    *,
    size: tuple[int, int],
    batch: int | None = 1,
    opset: int = DEFAULT_OPSET,
    metadata: dict[str, str] | None = None,
    contract: Contract | None = None,
    form: str = "whole",
) -> onnx.ModelProto:
    """The network under the graph contract, as ONNX.

    Args:
        size: (height, width) of the frames.
        batch: frames a call; None leaves the batch dimension open ("N").
        opset: one of `OPSETS`.
        metadata: goes into `metadata_props`.
        contract: what is answered; None: what the pack is for.
        form: how the answers are computed from logits, one of `heads.FORMS`; they are the same.
    Raises:
        ExportError: an operation without an ONNX form, a size that is no multiple of the network's, an
            opset outside `OPSETS`, a task that the network does not have.
    """
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not written here; choose one of {', '.join(map(str, OPSETS))}")
    contract = contract or Contract.of(spec, network)
    height, width = size
    multiple = network.size_multiple
    if height % multiple or width % multiple or height <= 0 or width <= 0:
        raise ExportError(f"size {height}x{width} must be a multiple of {multiple} for {spec.network}")
    if (batch or 1) * height * width > MOST_PIXELS:
        raise ExportError(
            f"{batch or 1} of {height}x{width} are more than {MOST_PIXELS} pixels a call: "
            "take fewer frames or smaller ones"
        )
    graph = Graph(opset)
    served = network.fused()
    folding = Folding(served, served.TASKS[contract.task])
    x = _preprocess(graph, spec)
    emitter = _Emitter(folding, graph, folding.weights(served.state_dict()))
    example = torch.empty(_TRACED_BATCH, 3, height, width, device="meta")
    with torch.no_grad():
        answers = emitter.write(x, example)
    channels = [len(names) for names in (contract.classes, contract.edge_classes) if names]
    if len(answers) != len(channels):
        found = f"{len(answers)} tensors of logits, promised {len(channels)}"
        raise ExportError(f"{spec.network} answers {found}")
    for (_, shape), wanted in zip(answers, channels, strict=True):
        _check_logits(network, spec, tuple(shape.shape), (wanted, height, width))
    outputs: list[onnx.ValueInfoProto] = []
    n: int | str = "N" if batch is None else batch
    for (name, tensor), kind in zip(answers, contract.heads, strict=True):
        c, h, w = tensor.shape[1:]
        outputs += heads.write_head(graph, kind, heads.Logits(name, (c, h, w), size, n), contract, form)
    return _model(graph, spec, outputs, size, n, metadata or {})


def _check_logits(
    network: SegmentationNetwork, spec: PackSpec, shape: tuple[int, ...], wanted: tuple[int, int, int]
) -> None:
    stride = network.output_stride
    promised = [wanted[0], wanted[1] // stride, wanted[2] // stride]
    if shape != (_TRACED_BATCH, *promised):
        raise ExportError(f"{spec.network} answers logits of {list(shape[1:])}, promised {promised}")


def _preprocess(graph: Graph, spec: PackSpec) -> str:
    # Cast first: TensorRT lets nothing but a cast read uint8.
    x = graph.node("Cast", [INPUT], to=TensorProto.FLOAT)
    x = graph.node("Transpose", [x], perm=[0, 3, 1, 2])
    if spec.channel_order == "bgr":
        x = graph.node("Gather", [x, graph.constant([2, 1, 0], np.int64)], axis=1)
    scale = np.array([1.0 / (255.0 * s) for s in spec.std]).reshape(1, 3, 1, 1)
    offset = np.array([-m / s for m, s in zip(spec.mean, spec.std, strict=True)]).reshape(1, 3, 1, 1)
    return graph.node("Add", [graph.node("Mul", [x, graph.constant(scale)]), graph.constant(offset)])


def _model(
    graph: Graph,
    spec: PackSpec,
    outputs: list[onnx.ValueInfoProto],
    size: tuple[int, int],
    n: int | str,
    metadata: dict[str, str],
) -> onnx.ModelProto:
    frame = helper.make_tensor_value_info(INPUT, TensorProto.UINT8, [n, *size, 3])
    model = helper.make_model(
        helper.make_graph(graph.nodes, spec.name, [frame], outputs, list(graph.initialisers.values())),
        opset_imports=[helper.make_opsetid("", graph.opset)],
        ir_version=_IR_VERSION[graph.opset],
        producer_name="roadworthy",
    )
    helper.set_model_props(model, metadata)
    check(model)
    return model


def check(model: onnx.ModelProto) -> None:
    """`onnx.checker` and strict shape inference.  Raises: ExportError."""
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX: {one_line(error)[:300]}") from error
