"""A float32 graph as one whose network computes in float16: what TensorRT needs for an FP16 plan.

Strongly typed engines compute in the types that are written in the graph, so somebody must write them.
What lies between the first and the last weighted layer (convolution, matrix product) computes in half; the
pre-processing before it and the head after it (bilinear enlargement, argmax, exp, sum) stay float32, because
there half costs accuracy and saves little.  Initialisers keep their names, so weights still find their place.

Knows ONNX; nothing of torch or of engines.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from common.text import one_line
from export.errors import ExportError

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Inputs that stay float32 whatever the node computes in.
_STAY = {"Resize": {1, 2}, "Upsample": {1}}
_LARGEST = float(np.finfo(np.float16).max)


def to_half(model: ModelProto) -> ModelProto:
    """A new graph with the same inputs, outputs and initialiser names.

    Raises ExportError: nothing weighted in the graph, a weight beyond float16's range, subgraphs.
    """
    found = ModelProto()
    found.CopyFrom(model)
    return _Conversion(found).run()


class _Conversion:
    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.graph = model.graph
        try:
            inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph
        except onnx.shape_inference.InferenceError as error:
            raise ExportError(f"float16: the graph's types cannot be inferred: {one_line(error)}") from error
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self.types = {value.name: value.type.tensor_type.elem_type for value in values}
        self.initialisers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.types.update({name: tensor.data_type for name, tensor in self.initialisers.items()})
        self.half: set[str] = set()  # tensors that are float16 afterwards
        self.read_as_float: set[str] = set()
        self.casts: dict[tuple[str, int], NodeProto] = {}

    def run(self) -> ModelProto:
        inside = self._inside()
        if not inside:
            raise ExportError("float16: the graph has no convolution or matrix product; nothing would change")
        for node in self.graph.node:
            if any(attribute.HasField("g") for attribute in node.attribute):
                raise ExportError(f"float16: '{node.name}' ({node.op_type}) has a subgraph; leave it out")
            if node.output[0] in inside:
                self.half.update(name for name in node.output if self._is_float(name))
            for index, name in enumerate(node.input):
                if node.output[0] not in inside or index in _STAY.get(node.op_type, ()):
                    self.read_as_float.add(name)
        nodes: list[NodeProto] = []
        for node in self.graph.node:
            computes_half = node.output[0] in inside
            for index, name in enumerate(node.input):
                if self._is_float(name):
                    stays = index in _STAY.get(node.op_type, ())
                    node.input[index] = self._as(name, computes_half and not stays, nodes)
            if computes_half:
                _retype(node)
            nodes.append(node)
        for value in self.graph.output:
            if value.name in self.half:  # an output keeps its name and its type
                producer = next(node for node in nodes if value.name in node.output)
                self._output_cast(producer, value.name, nodes)
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        del self.graph.value_info[:]
        self._drop_unused_initialisers()
        onnx.checker.check_model(self.model, full_check=True)
        return self.model

    def _inside(self) -> set[str]:
        """First outputs of the nodes from the first weighted layer to the last one."""
        after: set[str] = set()  # tensors that depend on a weighted layer
        for node in self.graph.node:
            if node.op_type in WEIGHTED or after.intersection(node.input):
                after.update(node.output)
        before: set[str] = set()  # tensors that a weighted layer depends on
        inside: set[str] = set()
        for node in reversed(self.graph.node):
            weighted = node.op_type in WEIGHTED
            if weighted or before.intersection(node.output):
                before.update(node.input)
                if node.output[0] in after:
                    inside.add(node.output[0])
        return inside

    def _is_float(self, name: str) -> bool:
        return self.types.get(name) == TensorProto.FLOAT

    def _as(self, name: str, half: bool, nodes: list[NodeProto]) -> str:
        """The name under which float tensor `name` can be read as half or float32; casts where needed."""
        tensor = self.initialisers.get(name)
        if tensor is not None and half and name not in self.half and name not in self.read_as_float:
            _halve(tensor)
            self.half.add(name)
        if (name in self.half) == half:
            return name
        kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        key = (name, kind)
        if key not in self.casts:
            target = f"{name}.{'half' if half else 'float'}"
            self.casts[key] = helper.make_node("Cast", [name], [target], name=target, to=kind)
            nodes.append(self.casts[key])
        return str(self.casts[key].output[0])

    def _output_cast(self, producer: NodeProto, name: str, nodes: list[NodeProto]) -> None:
        inner = f"{name}.half"
        for node in nodes:
            for names in (node.input, node.output):
                for index, used in enumerate(names):
                    if used == name:
                        names[index] = inner
        at = nodes.index(producer) + 1
        cast = helper.make_node("Cast", [inner], [name], name=f"{name}.float", to=TensorProto.FLOAT)
        nodes.insert(at, cast)

    def _drop_unused_initialisers(self) -> None:
        used = {name for node in self.graph.node for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def _halve(tensor: TensorProto) -> None:
    """A float32 initialiser becomes float16 in place.  Raises ExportError where a value does not fit."""
    values = numpy_helper.to_array(tensor)
    largest = float(np.abs(values).max(initial=0.0))
    if not largest <= _LARGEST:
        raise ExportError(
            f"float16: weight '{tensor.name}' holds {largest:g}, float16 ends at {_LARGEST:g}; build fp32"
        )
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))


def _retype(node: NodeProto) -> None:
    """Float32 written in a node's attributes becomes float16."""
    for attribute in _of(node, ("to", "dtype")):
        if attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
    for attribute in _of(node, ("value",)):
        if attribute.t.data_type == TensorProto.FLOAT:
            _halve(attribute.t)


def _of(node: NodeProto, names: Iterable[str]) -> list[onnx.AttributeProto]:
    return [attribute for attribute in node.attribute if attribute.name in names]
