"""Read ONNX files from any source: with a bound on their size, and refused with the reason if damaged.

This module knows the file format.  It knows nothing of what a graph computes.
"""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, Message
from onnx import TensorProto

from common.text import shorten
from export.errors import ExportError
from export.graph.functions import check_functions

__all__ = ["MAX_FILE_BYTES", "external_tensors", "parse_onnx", "read_file", "read_onnx"]

#: Bytes of an ONNX file at most: what protobuf can hold.
MAX_FILE_BYTES = (2 << 30) - 1


def read_file(path: Path, what: str = "an ONNX file", largest: int = MAX_FILE_BYTES) -> bytes:
    """Return the bytes of a plain file.

    Args:
        what: the kind of file, for the message.
        largest: the limit in bytes.
    Raises:
        ExportError: the file is absent, not a plain file, larger than `largest`, or cannot be read.
    """
    try:
        if not path.is_file():  # reading a pipe or a device may never end
            raise ExportError(f"{str(path)!r} " + ("is no plain file" if path.exists() else "does not exist"))
        if path.stat().st_size > largest:
            raise ExportError(f"{str(path)!r} has more than {largest >> 20} MiB, too many for {what}")
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read the graph alone: weights in other files are not read.  Raises ExportError."""
    return parse_onnx(read_file(path), path)


def parse_onnx(content: bytes, path: Path) -> onnx.ModelProto:
    """Return the graph in the bytes of `path`.  Raises ExportError if the file is not an ONNX graph."""
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except (DecodeError, ValueError) as error:
        raise ExportError(f"{str(path)!r} is not an ONNX file: {shorten(error, 160)}") from error
    if not _is_text(model):
        raise ExportError(f"{str(path)!r} is damaged: it holds names that are not UTF-8")
    if not model.graph.node or not model.opset_import:
        raise ExportError(f"{str(path)!r} is not an ONNX file: it holds no graph")
    try:
        check_functions(model)
    except ExportError as error:
        raise ExportError(f"{str(path)!r} cannot be read: {error}") from error
    return model


def _is_text(message: Message) -> bool:
    """Whether every text field is UTF-8: protobuf lets other bytes through."""
    try:
        fields = message.ListFields()
    except UnicodeDecodeError:
        return False
    for field, value in fields:
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        repeated = not isinstance(value, (str, bytes, Message))
        for one in value if repeated else [value]:
            if isinstance(one, bytes) or (isinstance(one, Message) and not _is_text(one)):
                return False
    return True


def external_tensors(model: onnx.ModelProto) -> list[str]:
    """Names of the tensors whose values are in other files: initialisers and constants, also of subgraphs."""
    graphs = [model.graph]
    found: list[str] = []
    for graph in graphs:  # grows: each subgraph is visited in its turn
        held = [*graph.initializer, *(t for s in graph.sparse_initializer for t in (s.values, s.indices))]
        for node in (*graph.node, *(n for f in model.functions for n in f.node if graph is model.graph)):
            for a in node.attribute:
                sparse = [a.sparse_tensor, *a.sparse_tensors]
                held += [a.t, *a.tensors, *(t for s in sparse for t in (s.values, s.indices))]
                graphs += [g for g in (a.g, *a.graphs) if g.node or g.initializer]
        found += [t.name for t in held if t.data_location == TensorProto.EXTERNAL or t.external_data]
    return found
