"""Tensors as KServe v2 names them: data types, shapes, and what a model takes and gives.

Knows numpy only.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(np.object_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def datatype(dtype: np.dtype[Any]) -> str:
    """KServe's name of a numpy dtype; strings of any kind are BYTES."""
    return "BYTES" if dtype.kind in "OSU" else _NAMES[dtype]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output: name, KServe data type, shape with -1 for a free dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) == len(self.shape) and all(
            want in (-1, got) for want, got in zip(self.shape, shape, strict=True)
        )


@dataclass(frozen=True)
class EngineSpec:
    """What an engine is: its tensors, where and how it computes."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kind: str
    precision: str
    device: str
    metadata: dict[str, str] = field(default_factory=dict)

    def input(self, name: str) -> TensorSpec | None:
        return self._by_name[0].get(name)

    def output(self, name: str) -> TensorSpec | None:
        return self._by_name[1].get(name)

    @functools.cached_property
    def _by_name(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        return {one.name: one for one in self.inputs}, {one.name: one for one in self.outputs}

    @functools.cached_property
    def batched(self) -> bool:
        """True when the first dimension of every tensor is free, so that requests can share a run."""
        tensors = self.inputs + self.outputs
        return bool(tensors) and all(spec.shape[:1] == (-1,) for spec in tensors)


class TextError(ValueError):
    """A BYTES tensor that is not one.  kind: many, few (elements), torn (length), short (data)."""

    def __init__(self, kind: str, expected: int, got: int) -> None:
        super().__init__(f"text tensor: {kind}: expected {expected}, got {got}")
        self.kind = kind
        self.expected = expected
        self.got = got


def decode_bytes(buffer: bytes | memoryview, shape: Sequence[int]) -> Array:
    """A BYTES tensor (each element: 4-byte little-endian length, then the bytes) as an object array.

    Raises TextError when the lengths do not add up to the buffer or the shape.
    """
    view = memoryview(buffer)
    values: list[bytes] = []
    offset = 0
    count = math.prod(shape)
    while offset < len(view):
        if len(values) >= count:
            raise TextError("many", len(values) + 1, count)
        if offset + 4 > len(view):
            raise TextError("torn", 4, len(view) - offset)
        (length,) = struct.unpack_from("<I", view, offset)
        offset += 4
        if offset + length > len(view):
            raise TextError("short", length, len(view) - offset)
        values.append(bytes(view[offset : offset + length]))
        offset += length
    if len(values) != count:
        raise TextError("few", count, len(values))
    array = np.empty(count, dtype=np.object_)
    array[:] = values
    return array.reshape(tuple(shape))


def encode_bytes(array: Array) -> bytes:
    """The inverse of `decode_bytes`; str elements become UTF-8."""
    parts: list[bytes] = []
    for element in array.reshape(-1):
        content = element if isinstance(element, bytes) else str(element).encode()
        parts += (struct.pack("<I", len(content)), content)
    return b"".join(parts)


def raw(kind: str, array: Array) -> bytes | memoryview:
    """The tensor's bytes on the wire; a view where the array is contiguous."""
    if kind == "BYTES":
        return encode_bytes(array)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
