"""What goes over the wire and what comes back: requests put together and answers read, for both clients.

Knows the messages and shared-memory segments; calls nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from protos import inference_pb2, roadworthy_pb2
from runtime.client.shm_segments import ShmSegment
from runtime.repository.records import unicode
from runtime.rpc import zero_copy
from runtime.rpc.message_dict import message_to_dict
from runtime.tensors import DTYPES, Array, datatype, decode_bytes, encode_bytes

Scalar = bool | int | float | str
WORTH = 1 << 16  # bytes from which shared memory is worth its registration
SHORT = 5.0  # seconds that a call of the KServe service may take, inference aside
DEADLINE = 30.0  # seconds that a call of the control service may take, or a stream until it stands
KSERVE = "/inference.GRPCInferenceService/"
_SEGMENT_BYTES = {
    "labels": 1,
    "confidence": 1,
    "edge_bits": 4,
}  # per pixel: outputs that fit a segment
_STREAMED = 2  # the field of ModelStreamInferResponse that holds the answer
_REFUSALS = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.ALREADY_EXISTS,
}


class Rejected(Exception):
    """The server refused the request; `reason` is what it said, `code` the name of the status."""

    def __init__(self, reason: str, code: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.reason = reason
        self.code = code


class Silence(grpc.RpcError):  # type: ignore[misc]
    """Nothing came within the time allowed."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"DEADLINE_EXCEEDED: no answer within {seconds:g} s")
        self._seconds = seconds

    def code(self) -> Any:
        return grpc.StatusCode.DEADLINE_EXCEEDED

    def details(self) -> str:
        return f"no answer within {self._seconds:g} s"


@dataclass(frozen=True)
class Answer:
    """One answer.  labels, confidence: uint8 [H,W] for a frame [H,W,3], [N,H,W] for [N,H,W,3]; None when
    not asked for.  outputs: every tensor by its name, `edges` and `edge_bits` too.
    """

    version: int
    labels: Array | None
    confidence: Array | None
    outputs: dict[str, Array]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """One transition of a version, see docs/architecture.md.  `state` is its name, `detail` what was
    measured, `group` the frame group whose swap it is part of ("" = none).
    """

    time: float
    model: str
    version: int
    state: str
    check: str
    reason: str
    detail: dict[str, Any]
    group: str = ""


@dataclass(frozen=True)
class TappedFrame:
    """A live frame uint8 [H,W,3] with its answer: labels, confidence uint8 [H,W], edge_bits int32 [H,W].

    Each is None when the frame's client did not ask for it or the model has no such output; `dropped` is how
    many frames this subscriber has lost so far because it was slow.  collect: what its request said of
    keeping it; place: (latitude, longitude) it named, or None.
    """

    time: float
    source: str
    model: str
    version: int
    frame: Array
    labels: Array | None
    confidence: Array | None
    dropped: int
    edge_bits: Array | None = None
    collect: bool | None = None
    place: tuple[float, float] | None = None


# ------------------------------------------------------------------------------------------- inference


def check_frame(frame: Any) -> None:
    """Raises ValueError for what is neither a frame [H,W,3] nor a batch [N,H,W,3], with the remedy: a grey
    picture would be taken for as many requests as it has rows.
    """
    if not hasattr(frame, "ndim") or not hasattr(frame, "shape"):
        given = type(frame).__name__
        raise ValueError(f"a frame is an array uint8 [H,W,3], not {given}; make it one: numpy.asarray(frame)")
    if frame.ndim in (3, 4) and frame.shape[-1] == 3:
        return
    remedy = "infer_tensors takes any shape"
    if frame.ndim == 2 or (frame.ndim == 3 and frame.shape[-1] > 4 and frame.shape[0] not in (1, 3)):
        remedy = "make a grey picture one of three channels: numpy.repeat(grey[..., None], 3, -1)"
    elif frame.ndim in (3, 4) and frame.shape[-1] == 1:
        remedy = "make a grey picture one of three channels: numpy.repeat(grey, 3, -1)"
    elif frame.ndim in (3, 4) and frame.shape[-1] == 4:
        remedy = "leave out the fourth channel: frame[..., :3]"
    elif frame.ndim in (3, 4) and frame.shape[-3] == 3:
        remedy = "put the channels last: numpy.moveaxis(frame, -3, -1)"
    raise ValueError(f"a frame is uint8 [H,W,3], a batch [N,H,W,3]; this is {list(frame.shape)}: {remedy}")


class Inference:
    """One request for frames: as a message, through a segment or without, and its answer.

    Args:
        frame: uint8 [H,W,3], or a batch [N,H,W,3].
    Raises:
        ValueError: another shape, or what no message can carry (`check_frame`, `_request`).
    """

    def __init__(
        self,
        model: str,
        frame: Array,
        outputs: Sequence[str],
        *,
        source: str = "",
        version: int = 0,
        request_id: str = "",
        collect: bool | None = None,
        place: tuple[float, float] | None = None,
    ) -> None:
        check_frame(frame)
        self._single = frame.ndim == 3
        self._batch = np.ascontiguousarray(frame[None] if self._single else frame)
        self._outputs = tuple(outputs)
        parameters: dict[str, Scalar] = {"source": source} if source else {}
        if collect is not None:
            parameters["collect"] = collect
        if place is not None:
            parameters["latitude"], parameters["longitude"] = (float(part) for part in place)
        self._head = (model, version, request_id, parameters)
        self._places: dict[str, tuple[int, int]] = {}  # output -> (offset, bytes) in the segment
        offset = -(-self._batch.nbytes // 8) * 8
        for name in self._outputs:
            if name in _SEGMENT_BYTES and name not in self._places:
                size = int(np.prod(self._batch.shape[:3])) * _SEGMENT_BYTES[name]
                self._places[name] = (offset, size)
                offset += -(-size // 8) * 8
        self.size = offset  # bytes of the segment that it needs

    @property
    def fits_segment(self) -> bool:
        return self._batch.dtype == np.uint8 and self._batch.ndim == 4 and self._batch.nbytes >= WORTH

    def plain(self) -> bytes:
        model, version, request_id, parameters = self._head
        return tensors(
            model, {"frame": self._batch}, self._outputs, parameters, version=version, request_id=request_id
        )

    def through(self, segment: ShmSegment) -> bytes:
        """Puts the frame into the segment and gives the message that names it."""
        segment.put(self._batch)
        request = _request(*self._head)
        tensor = request.inputs.add(name="frame", datatype="UINT8", shape=self._batch.shape)
        _place(tensor, segment.name, 0, self._batch.nbytes)
        for name in self._outputs:
            output = request.outputs.add(name=name)
            if name in self._places:
                _place(output, segment.name, *self._places[name])
        return request.SerializeToString()

    def answer(self, message: bytes | memoryview, segment: ShmSegment | None = None) -> Answer:
        """Reads the server's answer; the segment is free after that."""
        elsewhere: dict[str, bytes] = {}
        if segment is not None:
            elsewhere = {name: segment.take(*place) for name, place in self._places.items()}
        answer = read(message, elsewhere)
        if not self._single:
            return answer
        named = {name: value[0] for name, value in answer.outputs.items()}
        return Answer(answer.version, named.get("labels"), named.get("confidence"), named, answer.parameters)


def tensors(
    model: str,
    inputs: dict[str, Array],
    outputs: Sequence[str],
    parameters: dict[str, Scalar],
    *,
    version: int = 0,
    request_id: str = "",
) -> bytes:
    """A serialised ModelInferRequest."""
    request = _request(model, version, request_id, parameters)
    payloads: list[bytes | memoryview] = []
    for name, array in inputs.items():
        kind = datatype(array.dtype)
        request.inputs.add(name=name, datatype=kind, shape=array.shape)
        payloads.append(encode_bytes(array) if kind == "BYTES" else _view(array))
    for name in outputs:
        request.outputs.add(name=name)
    return zero_copy.join(request.SerializeToString(), zero_copy.REQUEST_CONTENTS, payloads)


def read(message: bytes | memoryview, elsewhere: dict[str, bytes] | None = None) -> Answer:
    """A serialised ModelInferResponse; `elsewhere`: outputs that came through shared memory."""
    head, payloads = zero_copy.split(bytes(message), zero_copy.RESPONSE_CONTENTS)
    response = inference_pb2.ModelInferResponse.FromString(head)
    outputs: dict[str, Array] = {}
    for tensor, raw in zip(response.outputs, payloads, strict=True):
        shape = tuple(tensor.shape)
        if tensor.datatype == "BYTES":
            outputs[tensor.name] = decode_bytes(raw, shape)
            continue
        content: bytes | memoryview = raw
        if elsewhere and tensor.name in elsewhere:
            content = elsewhere[tensor.name]
        outputs[tensor.name] = np.frombuffer(content, DTYPES[tensor.datatype]).reshape(shape)
    parameters = {
        key: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for key, value in response.parameters.items()
    }
    return Answer(
        int(response.model_version), outputs.get("labels"), outputs.get("confidence"), outputs, parameters
    )


def streamed(message: bytes) -> memoryview | Rejected:
    """The answer inside a serialised ModelStreamInferResponse, or the refusal."""
    head, payloads = zero_copy.split(message, _STREAMED)
    error = inference_pb2.ModelStreamInferResponse.FromString(head).error_message
    if error or not payloads:
        return Rejected(error or "an empty answer", "INVALID_ARGUMENT")
    return payloads[0]


def registration(segment: ShmSegment) -> bytes:
    request = inference_pb2.SystemSharedMemoryRegisterRequest(
        name=segment.name, key=segment.key, byte_size=segment.size
    )
    return request.SerializeToString()


def unregistration(segment: ShmSegment) -> bytes:
    return inference_pb2.SystemSharedMemoryUnregisterRequest(name=segment.name).SerializeToString()


def segment_is_unknown(refusal: Rejected) -> bool:
    """A server that has been started again knows no segments."""
    return "shared memory region" in refusal.reason


def is_local(target: str) -> bool:
    """Whether the target is this machine by name; whether it really is, the server's shared memory shows."""
    return target.startswith(("unix:", "127.", "localhost:", "[::1]:"))


def options(max_message: int) -> tuple[tuple[str, int], ...]:
    """Of a channel: size limits, a connection that is soon there again, a dead peer that is noticed."""
    return (
        ("grpc.max_receive_message_length", max_message),
        ("grpc.max_send_message_length", max_message),
        # Not min_reconnect_backoff_ms: gRPC gives up a connection that takes longer, and its calls fail.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5000),
        ("grpc.keepalive_time_ms", 30000),
        ("grpc.keepalive_timeout_ms", 10000),
        ("grpc.http2.max_pings_without_data", 0),
    )


def had_no_time(error: Exception, timeout: float | None) -> bool:
    """Whether a registration failed because its caller gave it less than SHORT seconds."""
    late = isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    return late and timeout is not None and timeout < SHORT


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def _request(
    model: str, version: int, request_id: str, parameters: dict[str, Any]
) -> inference_pb2.ModelInferRequest:
    for what, text in (("model", model), ("request_id", request_id), *_texts(parameters)):
        _check_text(what, text)
    request = inference_pb2.ModelInferRequest(
        model_name=model, model_version=str(version) if version else "", id=request_id
    )
    for key, value in parameters.items():
        _set(request.parameters[key], value, key)
    return request


def _texts(parameters: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in parameters.items():
        yield "a parameter's name", key
        if isinstance(value, str):
            yield f"parameter '{unicode(key)}'", value


def _check_text(what: str, text: str) -> None:
    if not isinstance(text, str) or text != unicode(text):
        raise ValueError(f"{what} is {text!r}: no text that a message can carry; give it in Unicode")


def _place(tensor: Any, region: str, offset: int, size: int) -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def _set(parameter: inference_pb2.InferParameter, value: Scalar, name: str) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"parameter '{name}' = {value}: a whole number has 64 bits; send it as text")
        if value < 1 << 63:
            parameter.int64_param = value
        else:
            parameter.uint64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def _view(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


# --------------------------------------------------------------------------------------------- refusals


def refusal(error: grpc.RpcError) -> Rejected | None:
    """The refusal that a status is, if it is one; the others are no answer."""
    code = error.code()
    details = error.details() or ""
    # UNAVAILABLE is gRPC's own word for a lost connection; the server says it for these only.
    ours = ("shutting down", "Request timeout expired", "a late frame", "the request was not run")
    said = code is grpc.StatusCode.UNAVAILABLE and any(words in details for words in ours)
    return Rejected(details, code.name) if code in _REFUSALS or said else None


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """A status that is a refusal becomes Rejected; the rest stays an RpcError."""
    try:
        yield
    except grpc.RpcError as error:
        refused = refusal(error)
        if refused is None:
            raise
        raise refused from error


# ---------------------------------------------------------------------------------------------- control


def ask_statistics(model: str) -> bytes:
    return inference_pb2.ModelStatisticsRequest(name=model).SerializeToString()


def read_statistics(message: bytes) -> list[dict[str, Any]]:
    """One dictionary a version, as ModelStatistics has them."""
    return [whole(one) for one in inference_pb2.ModelStatisticsResponse.FromString(message).model_stats]


@dataclass(frozen=True)
class Ask:
    """One call of the control service: its name, its request, and how its answer is read."""

    call: str
    request: Any
    read: Callable[[Any], Any]


def status(model: str) -> Ask:
    return Ask("Status", roadworthy_pb2.StatusRequest(model=model), _status)


def versions(model: str) -> Ask:
    return Ask("Versions", roadworthy_pb2.VersionsRequest(model=model), _versions)


def history(model: str) -> Ask:
    def read(response: Any) -> list[Event]:
        return [event(line) for line in response.history]

    return Ask("Versions", roadworthy_pb2.VersionsRequest(model=model), read)


def submit(model: str, version: int) -> Ask:
    return Ask("Submit", roadworthy_pb2.SubmitRequest(model=model, version=version), event)


def promote(model: str, version: int) -> Ask:
    return Ask("Promote", roadworthy_pb2.PromoteRequest(model=model, version=version), event)


def reset(model: str) -> Ask:
    return Ask("Reset", roadworthy_pb2.ModelRequest(model=model), event)


def rollback(model: str) -> Ask:
    return Ask("Rollback", roadworthy_pb2.ModelRequest(model=model), event)


def pin(model: str, version: int) -> Ask:
    return Ask("Pin", roadworthy_pb2.PinRequest(model=model, version=version), _status)


def prune(model: str, keep: int) -> Ask:
    def read(response: Any) -> dict[str, list[int]]:
        return {"deleted": list(response.deleted), "kept": list(response.kept)}

    return Ask("Prune", roadworthy_pb2.PruneRequest(model=model, keep=keep), read)


def unpin(model: str) -> Ask:
    return Ask("Unpin", roadworthy_pb2.ModelRequest(model=model), _status)


def freeze(model: str, reason: str) -> Ask:
    return Ask("Freeze", roadworthy_pb2.FreezeRequest(model=model, reason=reason), _status)


def unfreeze(model: str) -> Ask:
    return Ask("Unfreeze", roadworthy_pb2.ModelRequest(model=model), _status)


def watch(model: str) -> Ask:
    return Ask("Watch", roadworthy_pb2.WatchRequest(model=model), event)


def frames(model: str, max_fps: float, source: str) -> Ask:
    request = roadworthy_pb2.FramesRequest(model=model, max_fps=max_fps, source=source)
    return Ask("SubscribeFrames", request, _tapped)


def submit_group(group: str, members: dict[str, int]) -> Ask:
    request = roadworthy_pb2.SubmitGroupRequest(group=group)
    for model, version in members.items():
        request.members.add(model=model, version=version)
    return Ask("SubmitGroup", request, event)


def rollback_group(group: str) -> Ask:
    return Ask("RollbackGroup", roadworthy_pb2.GroupRequest(group=group), event)


def groups(group: str) -> Ask:
    return Ask("Groups", roadworthy_pb2.GroupsRequest(group=group), _groups)


def drift(model: str) -> Ask:
    return Ask("Drift", roadworthy_pb2.ModelRequest(model=model), whole)


def adaptation(model: str) -> Ask:
    return Ask("Adaptation", roadworthy_pb2.ModelRequest(model=model), _adaptation)


def start_round(model: str, reason: str) -> Ask:
    return Ask("StartRound", roadworthy_pb2.StartRoundRequest(model=model, reason=reason), _adaptation)


def cancel_round(model: str) -> Ask:
    return Ask("CancelRound", roadworthy_pb2.ModelRequest(model=model), _adaptation)


def set_collection(model: str, on: bool) -> Ask:
    return Ask("SetCollection", roadworthy_pb2.CollectionRequest(model=model, on=on), _adaptation)


def watch_round(model: str) -> Ask:
    return Ask("WatchRound", roadworthy_pb2.ModelRequest(model=model), report)


def whole(message: Any) -> dict[str, Any]:
    """Every field of a message by its name, nested."""
    return message_to_dict(message, whole=True)


def report(message: roadworthy_pb2.AdapterReport) -> dict[str, Any]:
    """Every field; `detail` as the object it is."""
    return {**whole(message), "detail": json.loads(message.detail or "{}")}


def event(message: roadworthy_pb2.Event) -> Event:
    detail = json.loads(message.detail) if message.detail else {}
    return Event(
        message.time,
        message.model,
        message.version,
        message.state,
        message.check,
        message.reason,
        detail,
        message.group,
    )


def _versions(response: roadworthy_pb2.VersionsResponse) -> list[dict[str, Any]]:
    return [{**whole(v), "manifest": json.loads(v.manifest or "{}")} for v in response.versions]


def _adaptation(response: roadworthy_pb2.AdaptationResponse) -> dict[str, Any]:
    values = whole(response)
    states = [*zip(values["adapters"], response.adapters, strict=True)]
    if "last" in values:
        states.append((values["last"], response.last))
    for state, message in states:
        if "report" in state:
            state["report"] = report(message.report)
    return values


def _tapped(seen: roadworthy_pb2.TappedFrame) -> TappedFrame:
    shape = (seen.height, seen.width)

    def plane(content: bytes, dtype: Any = np.uint8) -> Array | None:
        return np.frombuffer(content, dtype).reshape(shape) if content else None

    return TappedFrame(
        time=seen.time,
        source=seen.source,
        model=seen.model,
        version=seen.version,
        frame=np.frombuffer(seen.frame, np.uint8).reshape(*shape, 3),
        labels=plane(seen.labels),
        confidence=plane(seen.confidence),
        dropped=seen.dropped,
        edge_bits=plane(seen.edge_bits, "<i4"),
        collect=seen.collect if seen.HasField("collect") else None,
        place=(seen.latitude, seen.longitude) if seen.HasField("latitude") else None,
    )


def _status(response: roadworthy_pb2.StatusResponse) -> dict[str, Any]:
    values = whole(response)
    values["models"] = {model.pop("model"): model for model in values["models"]}
    values["groups"] = {group.pop("group"): group for group in values["groups"]}
    for part in (values, *values["models"].values()):
        part.setdefault("account", {"accepted": 0, "answered": 0, "rejected": {}, "in_flight": 0})
    return values


def _groups(response: roadworthy_pb2.GroupsResponse) -> dict[str, dict[str, Any]]:
    values: list[dict[str, Any]] = whole(response)["groups"]
    return {group.pop("group"): group for group in values}
