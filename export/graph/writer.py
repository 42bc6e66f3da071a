"""Write a traced network as an ONNX graph under the graph contract.

Why not torch's exporters: the old one renames what it folds, reshapes and constant-folds (a PReLU slope, a
normalisation) and is deprecated; the new one takes seconds and a second package.  A refit, in an engine
of any kind, is addressed by initialiser names, so they are the contract here: every initialiser that holds
weights has the name that it has in the state_dict, every other begins with "const.".  An operation without a
handler in `export.graph.ops` is refused by name, never approximated.

This module knows torch graphs and ONNX; nothing of engines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from common.text import shorten
from export.errors import ExportError
from export.graph import heads
from export.graph.contract import INPUT, Contract
from export.graph.fold import Folding
from export.graph.onnx_graph import Graph
from export.graph.ops import CALLS, MODULES, TRACED_BATCH, Context, Handler
from networks.base import SegmentationNetwork
from networks.images import MOST_PIXELS
from networks.pack import PackSpec

__all__ = ["DEFAULT_OPSET", "OPSETS", "check", "write"]

OPSETS = (17, 18, 19, 20)
DEFAULT_OPSET = 18
_IR_VERSION = {17: 8, 18: 8, 19: 9, 20: 9}


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
    """Write the network under the graph contract as ONNX.

    Args:
        size: (height, width) of the frames.
        batch: frames per call; None leaves the batch dimension open ("N").
        opset: one of `OPSETS`.
        metadata: entries of `metadata_props`.
        contract: the answers of the graph; None: those that the pack is for.
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
    walk = _Walk(Context(folding, graph, folding.weights(served.state_dict())))
    example = torch.empty(TRACED_BATCH, 3, height, width, device="meta")
    with torch.no_grad():
        answers = walk.write(x, example)
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
    if shape != (TRACED_BATCH, *promised):
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
    """Run `onnx.checker` and strict shape inference.  Raises ExportError."""
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the graph is not valid ONNX: {shorten(error, 300)}") from error


class _Walk:
    """Walk the traced network on shapes alone (meta tensors) and write one ONNX node after another."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def write(self, x: str, example: Tensor) -> list[tuple[str, Tensor]]:
        """Write the network applied to the value `x`; return the name and the meta tensor of each answer."""
        for node in self.context.folding.graph.nodes:
            if node.op == "output":
                break
            result = self.context.values[node] = self._evaluate(node, example)
            if node.op == "placeholder":
                self.context.names[node] = x
            elif isinstance(result, Tensor):
                self.context.names[node] = self._emit(node, result)
        answers = node.args[0] if isinstance(node.args[0], tuple) else (node.args[0],)
        if not all(isinstance(a, fx.Node) and isinstance(self.context.values[a], Tensor) for a in answers):
            raise ExportError("the network must return tensors of logits")
        return [(self.context.names[a], self.context.values[a]) for a in answers if isinstance(a, fx.Node)]

    def _evaluate(self, node: fx.Node, example: Tensor) -> Any:
        args, kwargs = self.context.value(node.args), self.context.value(dict(node.kwargs))
        target: Any = node.target
        try:
            if node.op == "placeholder":
                return example
            if node.op == "get_attr":
                value: Any = self.context.folding.modules[""]
                for part in target.split("."):
                    value = getattr(value, part)
                return value.to("meta") if isinstance(value, Tensor) else value
            if node.op == "call_module":
                return _meta_call(self.context.folding.modules[target], args, kwargs)
            if node.op == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ExportError(f"{node.name} fails at this size: {shorten(error, 200)}") from error

    def _emit(self, node: fx.Node, result: Tensor) -> str:
        handler: Handler | None = None
        if node.op == "call_module":
            module = self.context.folding.modules[str(node.target)]
            handler = next((h for kind, h in MODULES.items() if type(module) is kind), None)
            what = f"module {type(module).__name__} at {node.target!r}"
        elif node.op == "get_attr":
            return self.context.parameter(str(node.target))
        else:
            handler = CALLS.get(node.target)
            what = f"operation {getattr(node.target, '__name__', node.target)!r} in {node.name!r}"
        if handler is None:
            raise ExportError(
                f"{what} has no ONNX form here; add it to export/graph/ops.py or rewrite the network"
            )
        try:
            return handler(self.context, node, result)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # A handler reads the arguments that networks use; it refuses others instead of guessing.
            raise ExportError(f"{what} is called in a way that has no ONNX form here: {error!r}") from error


def _meta_call(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Apply a module to meta tensors without moving or copying its weights."""
    state = {k: v.to("meta") for k, v in [*module.named_parameters(), *module.named_buffers()]}
    return torch.func.functional_call(module, state, args, kwargs)
