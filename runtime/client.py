"""A small client for both services: frames in, answers with their provenance out; the guarded swap by name.

Speaks plain KServe v2, so it works against any such server for `infer`; the rest needs
Roadworthy's control service.  A `Client` may be used from several threads.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import numpy as np

from protos import inference_pb2, roadworthy_pb2, roadworthy_pb2_grpc
from runtime import wire
from runtime.lanes import Lanes
from runtime.tensors import DTYPES, Array, datatype, decode_bytes, encode_bytes

RpcError = grpc.RpcError
T = TypeVar("T")
_WORTH = 1 << 16  # bytes from which shared memory is worth its registration

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


@dataclass(frozen=True)
class Answer:
    """One answer.  labels, confidence: uint8 [H,W] for a frame [H,W,3], [N,H,W] for [N,H,W,3]; None when
    not asked for.
    """

    version: int
    labels: Array | None
    confidence: Array | None
    outputs: dict[str, Array]
    parameters: dict[str, Any]


@dataclass(frozen=True)
class Event:
    """One transition of a version, see docs/architecture.md.  `state` is its name, `detail` what was
    measured.
    """

    time: float
    model: str
    version: int
    state: str
    check: str
    reason: str
    detail: dict[str, Any]


@dataclass(frozen=True)
class TappedFrame:
    """A live frame uint8 [H,W,3] with its answer: labels uint8 [H,W]; confidence uint8 [H,W] or None.

    confidence is None when the frame's client did not ask for it; `dropped` is how many frames this
    subscriber has lost so far because it was slow.
    """

    time: float
    source: str
    model: str
    version: int
    frame: Array
    labels: Array
    confidence: Array | None
    dropped: int


class Client:
    """`with Client("127.0.0.1:8001") as client: client.infer("road", frame)`.

    token: sent as "authorization: Bearer …".  credentials: grpc.ssl_channel_credentials(…) for TLS.
    shared_memory: frames and answers go through memory that both sides see.  None (the default) does so where
    the target is this machine and the server can open the memory; True insists; False never does.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str = "",
        credentials: Any = None,
        shared_memory: bool | None = None,
        max_message: int = 256 << 20,
    ) -> None:
        options = (
            ("grpc.max_receive_message_length", max_message),
            ("grpc.max_send_message_length", max_message),
        )
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._infer = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        self._insist = shared_memory is True
        wanted = _local(target) if shared_memory is None else shared_memory
        self._lanes: Lanes | None = Lanes(self._register, self._unregister) if wanted else None
        self._control: Any = roadworthy_pb2_grpc.RoadworthyStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lanes is not None:
            self._lanes.close()
        self._channel.close()

    def wait_ready(self, timeout: float = 10.0) -> None:
        """Waits for the connection; grpc.FutureTimeoutError after `timeout` seconds."""
        grpc.channel_ready_future(self._channel).result(timeout)

    # -- frames ----------------------------------------------------------------------

    def infer(
        self,
        model: str,
        frame: Array,
        *,
        outputs: Sequence[str] = ("labels", "confidence"),
        source: str = "",
        timeout: float | None = None,
        version: int = 0,
        request_id: str = "",
    ) -> Answer:
        """Sends one frame uint8 [H,W,3] (or a batch [N,H,W,3]) and waits for its answer.

        `version` 0 is the live one.  Raises Rejected when the server refuses it with a reason,
        RpcError when there is no answer.
        """
        single = frame.ndim == 3
        batch = frame[None] if single else frame
        request = _request(model, version, request_id, {"source": source} if source else {})
        answer = None
        if self._lanes is not None and batch.dtype == np.uint8 and batch.ndim == 4 and batch.nbytes >= _WORTH:
            answer = self._through_lane(request, batch, outputs, timeout)
        if answer is None:
            answer = self._plain(request, {"frame": batch}, outputs, timeout)
        if not single:
            return answer
        named = {name: value[0] for name, value in answer.outputs.items()}
        return Answer(answer.version, named.get("labels"), named.get("confidence"), named, answer.parameters)

    def infer_tensors(
        self,
        model: str,
        inputs: dict[str, Array],
        *,
        outputs: Sequence[str] = (),
        parameters: dict[str, bool | int | float | str] | None = None,
        timeout: float | None = None,
        version: int = 0,
        request_id: str = "",
    ) -> Answer:
        """Any model: named arrays in, named arrays out.  Raises as `infer`."""
        request = _request(model, version, request_id, parameters or {})
        return self._plain(request, inputs, outputs, timeout)

    def _plain(
        self,
        request: inference_pb2.ModelInferRequest,
        inputs: dict[str, Array],
        outputs: Sequence[str],
        timeout: float | None,
    ) -> Answer:
        payloads: list[bytes | memoryview] = []
        for name, array in inputs.items():
            kind = datatype(array.dtype)
            request.inputs.add(name=name, datatype=kind, shape=array.shape)
            payloads.append(encode_bytes(array) if kind == "BYTES" else _view(array))
        for name in outputs:
            request.outputs.add(name=name)
        message = wire.join(request.SerializeToString(), wire.REQUEST_CONTENTS, payloads)
        with _translated():
            return _answer(self._infer(message, timeout=timeout, metadata=self._metadata))

    # -- shared memory ---------------------------------------------------------------

    def _through_lane(
        self,
        request: inference_pb2.ModelInferRequest,
        batch: Array,
        outputs: Sequence[str],
        timeout: float | None,
    ) -> Answer | None:
        """The answer, or None when shared memory does not work here and the plain way must be taken."""
        assert self._lanes is not None
        batch = np.ascontiguousarray(batch)
        shape = batch.shape[:3]
        pixels = shape[0] * shape[1] * shape[2]
        maps = [name for name in outputs if name in ("labels", "confidence")]
        try:
            lane = self._lanes.borrow(batch.nbytes + len(maps) * pixels)
        except (OSError, grpc.RpcError):
            if self._insist:
                raise
            self._lanes = None
            return None
        lane.put(batch)
        sent = inference_pb2.ModelInferRequest()
        sent.CopyFrom(request)
        tensor = sent.inputs.add(name="frame", datatype="UINT8", shape=batch.shape)
        _place(tensor, lane.name, 0, batch.nbytes)
        for name in outputs:
            output = sent.outputs.add(name=name)
            if name in maps:
                _place(output, lane.name, batch.nbytes + maps.index(name) * pixels, pixels)
        try:
            with _translated():
                message = self._infer(sent.SerializeToString(), timeout=timeout, metadata=self._metadata)
        except Rejected as refusal:
            if (
                "shared memory region" in refusal.reason
            ):  # a server that has been started again knows no lanes
                self._lanes.drop(lane)
                return None
            self._lanes.give_back(lane)
            raise
        except BaseException:
            # The server may still write into it: it is not used again.
            self._lanes.drop(lane)
            raise
        content = {name: lane.take(batch.nbytes + maps.index(name) * pixels, pixels) for name in maps}
        self._lanes.give_back(lane)
        return _answer(
            message, {name: np.frombuffer(c, np.uint8).reshape(shape) for name, c in content.items()}
        )

    def _register(self, name: str, key: str, size: int) -> None:
        request = inference_pb2.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=size)
        self._call("SystemSharedMemoryRegister", request)

    def _unregister(self, name: str) -> None:
        with contextlib.suppress(grpc.RpcError, ValueError):  # a server that is gone has forgotten it anyway
            self._call(
                "SystemSharedMemoryUnregister", inference_pb2.SystemSharedMemoryUnregisterRequest(name=name)
            )

    def _call(self, name: str, request: Any) -> None:
        call = self._channel.unary_unary(f"/inference.GRPCInferenceService/{name}")
        call(request.SerializeToString(), timeout=5.0, metadata=self._metadata)

    # -- control ---------------------------------------------------------------------

    def status(self, model: str = "") -> dict[str, Any]:
        """{"server", "version", "uptime_seconds", "draining", "account", "models": {name: {…}}}."""
        with _translated():
            return _status(
                self._control.Status(roadworthy_pb2.StatusRequest(model=model), metadata=self._metadata)
            )

    def versions(self, model: str) -> list[dict[str, Any]]:
        """One dictionary a version: version, state, reason, created, pack, parent, round, manifest."""
        with _translated():
            response = self._control.Versions(
                roadworthy_pb2.VersionsRequest(model=model), metadata=self._metadata
            )
        names = ("version", "state", "reason", "created", "pack", "parent", "round")
        return [
            {**{name: getattr(v, name) for name in names}, "manifest": json.loads(v.manifest or "{}")}
            for v in response.versions
        ]

    def history(self, model: str) -> list[Event]:
        """Every transition of every version of the model, oldest first."""
        with _translated():
            response = self._control.Versions(
                roadworthy_pb2.VersionsRequest(model=model), metadata=self._metadata
            )
        return [_event(event) for event in response.history]

    def submit(self, model: str, version: int, *, timeout: float | None = None) -> Iterator[Event]:
        """Offers a version to the guarded swap; its events until LIVE or REJECTED.

        The swap is under way when this returns, and goes on if the iterator is dropped.
        """
        request = roadworthy_pb2.SubmitRequest(model=model, version=version)
        return _events(self._control.Submit(request, timeout=timeout, metadata=self._metadata))

    def promote(self, model: str, version: int, *, timeout: float | None = None) -> Iterator[Event]:
        """Like `submit`, without the shadow: an operator's word."""
        request = roadworthy_pb2.PromoteRequest(model=model, version=version)
        return _events(self._control.Promote(request, timeout=timeout, metadata=self._metadata))

    def rollback(self, model: str) -> Event:
        """Back to the previous version.  Raises Rejected when there is none or the model is pinned."""
        with _translated():
            return _event(
                self._control.Rollback(roadworthy_pb2.ModelRequest(model=model), metadata=self._metadata)
            )

    def pin(self, model: str, version: int = 0) -> dict[str, Any]:
        with _translated():
            request = roadworthy_pb2.PinRequest(model=model, version=version)
            return _status(self._control.Pin(request, metadata=self._metadata))

    def unpin(self, model: str) -> dict[str, Any]:
        with _translated():
            return _status(
                self._control.Unpin(roadworthy_pb2.ModelRequest(model=model), metadata=self._metadata)
            )

    def freeze(self, model: str = "", reason: str = "") -> dict[str, Any]:
        with _translated():
            request = roadworthy_pb2.FreezeRequest(model=model, reason=reason)
            return _status(self._control.Freeze(request, metadata=self._metadata))

    def unfreeze(self, model: str = "") -> dict[str, Any]:
        with _translated():
            return _status(
                self._control.Unfreeze(roadworthy_pb2.ModelRequest(model=model), metadata=self._metadata)
            )

    def watch(self, model: str = "") -> Stream[Event]:
        """Every event from now on; the subscription stands when this returns.  Close it (or leave its
        `with`) to end it.
        """
        call = self._control.Watch(roadworthy_pb2.WatchRequest(model=model), metadata=self._metadata)
        return Stream(call, _event)

    def frames(self, model: str, *, max_fps: float = 0.0, source: str = "") -> Stream[TappedFrame]:
        """The tap: live frames with their answers; the subscription stands when this returns.  Close it
        to end it.
        """
        request = roadworthy_pb2.FramesRequest(model=model, max_fps=max_fps, source=source)
        return Stream(self._control.SubscribeFrames(request, metadata=self._metadata), _tapped)


class Stream(Generic[T]):
    """An iterator over a server stream that can be closed from any thread; closing ends the iteration
    quietly.
    """

    def __init__(self, call: Any, convert: Callable[[Any], T]) -> None:
        self._call = call
        self._convert = convert
        self._closed = False
        with _translated():
            call.initial_metadata()  # waits for the server's word that the subscription stands
            # a call that was refused has its status already; one that stands has none
            if call.done() and call.code() is not grpc.StatusCode.OK:
                raise call

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self._convert(next(self._call))
        except grpc.RpcError:
            if self._closed:
                raise StopIteration from None
            raise

    def close(self) -> None:
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """A status that is a refusal becomes Rejected; the rest stays an RpcError."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code()
        details = error.details() or ""
        draining = code is grpc.StatusCode.UNAVAILABLE and _ours(details)
        if code in _REFUSALS or draining:
            raise Rejected(details, code.name) from error
        raise


def _ours(details: str) -> bool:
    """UNAVAILABLE is gRPC's own word for a lost connection; the server says it for these only."""
    return "shutting down" in details or "Request timeout expired" in details or "a late frame" in details


def _events(call: Any) -> Iterator[Event]:
    def follow() -> Iterator[Event]:
        with _translated():
            for event in call:
                yield _event(event)

    return follow()


def _request(
    model: str, version: int, request_id: str, parameters: dict[str, bool | int | float | str]
) -> inference_pb2.ModelInferRequest:
    request = inference_pb2.ModelInferRequest(
        model_name=model, model_version=str(version) if version else "", id=request_id
    )
    for key, value in parameters.items():
        _set(request.parameters[key], value)
    return request


def _place(tensor: Any, region: str, offset: int, size: int) -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def _local(target: str) -> bool:
    """Whether the target is this machine by name; whether it really is, the server's shared memory shows."""
    return target.startswith(("unix:", "127.", "localhost:", "[::1]:"))


def _answer(message: bytes, elsewhere: dict[str, Array] | None = None) -> Answer:
    """`elsewhere`: outputs that came through shared memory; their entries in the message are empty."""
    head, payloads = wire.split(message, wire.RESPONSE_CONTENTS)
    response = inference_pb2.ModelInferResponse.FromString(head)
    outputs: dict[str, Array] = {}
    for tensor, raw in zip(response.outputs, payloads, strict=True):
        shape = tuple(tensor.shape)
        if elsewhere and tensor.name in elsewhere:
            outputs[tensor.name] = elsewhere[tensor.name]
            continue
        if tensor.datatype == "BYTES":
            outputs[tensor.name] = decode_bytes(raw, shape)
        else:
            outputs[tensor.name] = np.frombuffer(raw, DTYPES[tensor.datatype]).reshape(shape)
    parameters = {
        key: getattr(value, value.WhichOneof("parameter_choice") or "string_param")
        for key, value in response.parameters.items()
    }
    return Answer(
        int(response.model_version), outputs.get("labels"), outputs.get("confidence"), outputs, parameters
    )


def _set(parameter: inference_pb2.InferParameter, value: bool | int | float | str) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, float):
        parameter.double_param = value
    else:
        parameter.string_param = value


def _view(array: Array) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _event(event: roadworthy_pb2.Event) -> Event:
    detail = json.loads(event.detail) if event.detail else {}
    return Event(event.time, event.model, event.version, event.state, event.check, event.reason, detail)


def _tapped(seen: roadworthy_pb2.TappedFrame) -> TappedFrame:
    shape = (seen.height, seen.width)
    return TappedFrame(
        time=seen.time,
        source=seen.source,
        model=seen.model,
        version=seen.version,
        frame=np.frombuffer(seen.frame, np.uint8).reshape(*shape, 3),
        labels=np.frombuffer(seen.labels, np.uint8).reshape(shape),
        confidence=np.frombuffer(seen.confidence, np.uint8).reshape(shape) if seen.confidence else None,
        dropped=seen.dropped,
    )


def _status(response: roadworthy_pb2.StatusResponse) -> dict[str, Any]:
    names: tuple[str, ...] = ("ready", "reason", "live", "previous", "pinned", "frozen", "frozen_reason")
    names += ("candidate", "candidate_state", "watching", "memory_bytes")
    return {
        "server": response.server,
        "version": response.version,
        "uptime_seconds": response.uptime_seconds,
        "draining": response.draining,
        "account": _account(response.account),
        "models": {
            m.model: {**{name: getattr(m, name) for name in names}, "account": _account(m.account)}
            for m in response.models
        },
    }


def _account(account: roadworthy_pb2.Account) -> dict[str, Any]:
    return {
        "accepted": account.accepted,
        "answered": account.answered,
        "rejected": dict(account.rejected),
        "in_flight": account.in_flight,
    }
