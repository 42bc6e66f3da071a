"""Triton's model configuration, so that the same repository can be given to Triton Inference Server.

Written from the tensors of a graph, or checked against them; knows nothing of what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx
from google.protobuf import text_format
from onnx import TensorProto

from common.text import shorten
from export.errors import ExportError
from protos import model_config_pb2 as pb
from runtime.serving.batching import check

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
        if not value.name.isprintable():
            raise ExportError(f"tensor {value.name!r} has a name that config.pbtxt cannot hold; rename it")
        # ONNX Runtime takes any negative side for an open one.
        shape = tuple(max(d.dim_value, -1) if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        result.append(Tensor(value.name, _TYPES[kind.elem_type], shape))
    return result


def batched(tensors: Sequence[Tensor]) -> bool:
    """Whether every tensor's first side is open, so that it may be a batch of independent rows."""
    return all(tensor.shape[:1] == (-1,) for tensor in tensors)


def config(
    model: str, kind: str, inputs: list[Tensor], outputs: list[Tensor], *, independent: bool = True
) -> str:
    """config.pbtxt.

    Where every tensor has an open first dimension and rows are `independent` it becomes Triton's batch, else
    the dimensions are given as they are.  No `label_filename`: Triton looks names up by position in an
    output, not by its values.
    """
    backend, platform = _PLATFORMS[kind]
    rows = independent and batched([*inputs, *outputs])
    lines = [
        f'name: "{model}"',
        f'backend: "{backend}"',
        f'platform: "{platform}"',
        f"max_batch_size: {MAX_BATCH if rows else 0}",
    ]
    for field, group in (("input", inputs), ("output", outputs)):
        for tensor in group:
            dims = tensor.shape[1:] if rows else tensor.shape
            lines += [f"{field} {{", f"  name: {_quoted(tensor.name)}", f"  data_type: {tensor.type}"]
            lines.append(f"  dims: [ {', '.join(map(str, dims))} ]")
            lines.append("}")
    if rows:
        lines.append("dynamic_batching { }")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def asked(given: str, file: str) -> int:
    """Return the max_batch_size of a given config.pbtxt; 0 if it has none.  Raises ExportError."""
    return int(_parsed(given, file).max_batch_size)


def _parsed(given: str, file: str) -> pb.ModelConfig:
    try:
        mine = text_format.Parse(given, pb.ModelConfig())
        check(mine)
    except (text_format.ParseError, ValueError) as error:
        raise ExportError(f"{file!r} is no config.pbtxt of Triton: {shorten(error, 200)}") from error
    return mine  # type: ignore[no-any-return]


def merged(given: str, file: str, generated: str, *, dependence: str = "") -> str:
    """Return a given config.pbtxt, completed from the graph as Triton completes it.

    Args:
        given: the text of `file`.
        generated: `config` of the same graph.
        dependence: why its rows may not share a run; "" where they may.
    Raises:
        ExportError: no ModelConfig, or one that is of another model, engine or graph.
    """
    mine = _parsed(given, file)
    graph = text_format.Parse(generated, pb.ModelConfig())
    for field in ("name", "backend", "platform"):
        declared, true = getattr(mine, field), getattr(graph, field)
        if declared not in ("", true):
            raise ExportError(f"{file!r} says {field} {declared!r}, this model's is {true!r}; change it")
        setattr(mine, field, true)
    tensors_named = mine.input or mine.output
    if mine.max_batch_size and dependence:
        raise ExportError(
            f"{file!r} says max_batch_size {mine.max_batch_size}, but rows may not share a run: {dependence}"
            "; say 0, or export a graph whose rows are independent"
        )
    if mine.max_batch_size and not graph.max_batch_size:
        raise ExportError(
            f"{file!r} says max_batch_size {mine.max_batch_size}, but not every tensor's first dimension is "
            "open; say 0, or export the graph with an open batch"
        )
    if not tensors_named and not mine.max_batch_size and not mine.HasField("dynamic_batching"):
        mine.max_batch_size = graph.max_batch_size
    lead = [-1] if graph.max_batch_size and not mine.max_batch_size else []
    for field in ("input", "output"):
        true = {t.name: t for t in getattr(graph, field)}
        for tensor in getattr(mine, field):
            if tensor.name not in true:
                raise ExportError(f"{file!r} names {field} {tensor.name!r}; the graph has {', '.join(true)}")
            whole = true.pop(tensor.name)
            dims = [*lead, *whole.dims]
            fits = len(dims) == len(tensor.dims) and all(
                is_ in (-1, was) or was == -1 for is_, was in zip(tensor.dims, dims, strict=True)
            )
            if tensor.data_type != whole.data_type or not fits:
                kind = pb.DataType.Name(tensor.data_type)
                raise ExportError(
                    f"{file!r} says {field} {tensor.name!r} is {kind} {list(tensor.dims)}, the graph's is "
                    f"{pb.DataType.Name(whole.data_type)} {dims}; correct it or leave it out"
                )
        for left in true.values():
            added = getattr(mine, field).add()
            added.CopyFrom(left)
            added.dims[:] = [*lead, *left.dims]
    return str(text_format.MessageToString(mine))
