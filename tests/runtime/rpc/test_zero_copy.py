"""The slicing of messages against protobuf itself."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from runtime.rpc import zero_copy


@given(
    st.text(max_size=20),
    st.lists(st.binary(max_size=300), max_size=4),
    st.lists(st.tuples(st.text(max_size=5), st.lists(st.integers(-3, 2**40), max_size=4)), max_size=3),
)
def test_split_and_join_are_protobuf(name, payloads, inputs):
    message = pb.ModelInferRequest(model_name=name, raw_input_contents=payloads)
    for key, shape in inputs:
        message.inputs.add(name=key, datatype="UINT8", shape=shape)
    head, views = zero_copy.split(message.SerializeToString(), zero_copy.REQUEST_CONTENTS)
    assert [bytes(view) for view in views] == payloads
    rest = pb.ModelInferRequest.FromString(head)
    assert not rest.raw_input_contents
    assert pb.ModelInferRequest.FromString(zero_copy.join(head, zero_copy.REQUEST_CONTENTS, views)) == message


def test_split_does_not_copy():
    payload = bytes(range(256)) * 100
    message = pb.ModelInferRequest(raw_input_contents=[payload]).SerializeToString()
    _, (view,) = zero_copy.split(message, zero_copy.REQUEST_CONTENTS)
    assert view.obj is message


@given(st.binary(max_size=200))
def test_any_bytes_are_split_as_protobuf_reads_them_or_refused(message):
    try:
        head, views = zero_copy.split(message, zero_copy.REQUEST_CONTENTS)
    except zero_copy.Malformed:
        return
    try:
        parsed = pb.ModelInferRequest.FromString(message)
    except Exception:
        with pytest.raises(Exception):  # noqa: B017
            pb.ModelInferRequest.FromString(head)
        return
    assert [bytes(view) for view in views] == list(parsed.raw_input_contents)


@pytest.mark.parametrize(
    "message",
    [
        b"\x3a",
        b"\x3a\x05abc",
        b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x00",
        b"\x3b",
        b"\x09\x01",
        b"\xff" * 12,
    ],
)
def test_malformed_messages_are_refused(message):
    with pytest.raises(zero_copy.Malformed):
        zero_copy.split(message, zero_copy.REQUEST_CONTENTS)
