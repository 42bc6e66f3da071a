"""Triton's model configuration, so that the same repository can be given to Triton Inference Server.

Written from the tensors of a graph; knows nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from export.errors import ExportError

#: Largest batch that Triton may form from requests where the graph leaves the batch open.
MAX_BATCH = 8

_TYPES: dict[int, str] = {
    TensorProto.BOOL: "TYPE_BOOL",
    TensorProto.UINT8: "TYPE_UINT8",
    TensorProto.UINT16: "TYPE_UINT16",
    TensorProto.UINT32: "TYPE_UINT32",
    TensorProto.UINT64: "TYPE_UINT64",
    TensorProto.INT8: "TYPE_INT8",
    TensorProto.INT16: "TYPE_INT16",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.STRING: "TYPE_STRING",
}

_PLATFORMS = {"onnxruntime": ("onnxruntime", "onnxruntime_onnx"), "tensorrt": ("tensorrt", "tensorrt_plan")}


@dataclass(frozen=True)
class Tensor:
    """One input or output; -1 is an open dimension."""

    name: str
    type: str
    shape: tuple[int, ...]


def tensors(values: Sequence[onnx.ValueInfoProto]) -> list[Tensor]:
    """Raises: ExportError for a type or structure that no request can carry."""
    result = []
    for value in values:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type not in _TYPES:
            raise ExportError(
                f"tensor {value.name!r} is of a type that no request can carry; cast it in the graph"
            )
        if not kind.HasField("shape"):
            raise ExportError(f"tensor {value.name!r} has no rank; run onnx.shape_inference on the file")
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        result.append(Tensor(value.name, _TYPES[kind.elem_type], shape))
    return result


def config(model: str, kind: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    """config.pbtxt.

    Where every tensor has an open first dimension it becomes Triton's batch, else the dimensions are given
    as they are.  No `label_filename`: Triton looks names up by position in an output, not by its values.
    """
    backend, platform = _PLATFORMS[kind]
    batched = all(t.shape[:1] == (-1,) for t in (*inputs, *outputs))
    lines = [
        f'name: "{model}"',
        f'backend: "{backend}"',
        f'platform: "{platform}"',
        f"max_batch_size: {MAX_BATCH if batched else 0}",
    ]
    for field, group in (("input", inputs), ("output", outputs)):
        for tensor in group:
            dims = tensor.shape[1:] if batched else tensor.shape
            lines += [f"{field} {{", f'  name: "{tensor.name}"', f"  data_type: {tensor.type}"]
            lines.append(f"  dims: [ {', '.join(map(str, dims))} ]")
            lines.append("}")
    if batched:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"
