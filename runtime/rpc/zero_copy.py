"""Protobuf messages whose large fields are not copied.

A KServe v2 message carries its tensors as length-delimited entries of one top-level
field (7 in a request, 6 in a response).  `split` cuts them out of the received bytes as
views and leaves the small rest to protobuf; `join` puts such a message together.  The
bytes on the wire are those of any protobuf implementation.
"""

from __future__ import annotations

from collections.abc import Sequence

REQUEST_CONTENTS = 7
RESPONSE_CONTENTS = 6
Buffer = bytes | memoryview


class Malformed(ValueError):
    """Bytes that are not a protobuf message."""


def split(message: bytes, field: int) -> tuple[bytes, list[memoryview]]:
    """(the message without its `field` entries, views of those entries in order).  Raises Malformed."""
    view = memoryview(message)
    size = len(view)
    rest: list[memoryview] = []
    payloads: list[memoryview] = []
    position = kept = 0
    while position < size:
        start = position
        tag, position = _varint(view, position, size)
        kind = tag & 7
        if tag >> 3 == 0:
            raise Malformed("field number 0")
        if kind == 2:
            length, position = _varint(view, position, size)
            end = position + length
            if end > size:
                raise Malformed("a field is longer than the message")
            if tag >> 3 == field:
                rest.append(view[kept:start])
                payloads.append(view[position:end])
                kept = end
            position = end
        elif kind == 0:
            _, position = _varint(view, position, size)
        elif kind == 1:
            position += 8
        elif kind == 5:
            position += 4
        else:  # groups: neither KServe nor Triton has any
            raise Malformed(f"wire type {kind}")
    if position > size:
        raise Malformed("the message ends inside a field")
    if not payloads:
        return message, []
    rest.append(view[kept:])
    return b"".join(rest), payloads


def join(head: bytes, field: int, payloads: Sequence[Buffer]) -> bytes:
    """`head` (a serialised message without `field` entries) with `payloads` as its `field`."""
    parts: list[Buffer] = [head]
    tag = varint(field << 3 | 2)
    for payload in payloads:
        parts += (tag, varint(len(payload)), payload)
    return b"".join(parts)


def varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _varint(view: memoryview, position: int, size: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= size:
            raise Malformed("the message ends inside a number")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise Malformed("a number of more than 10 bytes")
