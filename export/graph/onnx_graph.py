"""An ONNX graph under construction: nodes, weights and shared constants.

Every initialiser that holds weights has the name that it has in the state_dict, every other begins with
"const.": a refit addresses weights by these names.  This module knows ONNX; nothing of networks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["Graph"]


class Graph:
    """Nodes and initialisers of an ONNX graph under construction.

    The methods return the names of values.  `opset` is the version of the operator set.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._counts: dict[str, int] = {}

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Return the name of an initialiser that is no weight.  Equal ones are shared."""
        array = np.ascontiguousarray(np.asarray(value, dtype=dtype)).reshape(np.shape(value))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const.{len(self._constants)}"
            self._constants[key] = name
            self.initialisers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def weight(self, name: str, array: np.ndarray) -> str:
        """Add an initialiser that holds a weight and return its name."""
        self.initialisers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def node(self, op: str, inputs: Iterable[str], *, output: str = "", **attributes: Any) -> str:
        """Append a node with one output and return the name of the output."""
        if not output:
            index = self._counts.get(op, 0)
            self._counts[op] = index + 1
            output = f"{op.lower()}.{index}"
        attributes = {k: v for k, v in attributes.items() if v is not None}
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def split(self, x: str, count: int) -> list[str]:
        """Return the `count` channels of [N,count,…], each [N,1,…]."""
        outputs = [f"split.{self._counts.get('Split', 0)}.{k}" for k in range(count)]
        self._counts["Split"] = self._counts.get("Split", 0) + 1
        sizes = self.constant([1] * count, np.int64)
        self.nodes.append(helper.make_node("Split", [x, sizes], outputs, name=outputs[0], axis=1))
        return outputs

    def slice(self, x: str, ranges: dict[int, tuple[int, int]]) -> str:
        """The part of a value from start to end (exclusive) of each axis in `ranges`."""
        axes = sorted(ranges)
        starts, ends = ([ranges[a][i] for a in axes] for i in (0, 1))
        return self.node("Slice", [x, *(self.constant(v, np.int64) for v in (starts, ends, axes))])

    def reduce(self, op: str, x: str, axes: list[int], keepdims: bool) -> str:
        """ReduceMax, ReduceMean or ReduceSum.  Opset 18 (ReduceSum: 13) moved the axes to an input."""
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
