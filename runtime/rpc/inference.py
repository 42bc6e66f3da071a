"""``inference.GRPCInferenceService``: KServe v2 with Triton's extensions, codes and words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from protos import inference_pb2 as pb
from runtime.errors import Code, ServiceError
from runtime.observability.tracing import Trace
from runtime.rpc import zero_copy
from runtime.rpc.base import Streams, handler, typed, unary
from runtime.rpc.call_ends import when_ended
from runtime.rpc.inference_admin import RepositoryEdge, platform
from runtime.service import Service, server_version
from runtime.serving.request import Answer, InferRequest, InputTensor, OutputRequest, Parameter
from runtime.shared_memory.system import ShmRef
from runtime.tensors import DTYPES, Array, raw

SERVICE = "inference.GRPCInferenceService"
_CONTENTS = {  # field -> (the type that Triton's messages give it, the types it may carry)
    "bool_contents": ("BOOL", ("BOOL",)),
    "int_contents": ("INT32", ("INT8", "INT16", "INT32")),
    "int64_contents": ("INT64", ("INT64",)),
    "uint_contents": ("UINT32", ("UINT8", "UINT16", "UINT32")),
    "uint64_contents": ("UINT64", ("UINT64",)),
    "fp32_contents": ("FP32", ("FP32",)),
    "fp64_contents": ("FP64", ("FP64",)),
    "bytes_contents": ("BYTES", ("BYTES",)),
}
_RESERVED = "triton_enable_empty_final_response"


class InferenceEdge:
    def __init__(self, service: Service, streams: Streams | None = None) -> None:
        self._service = service
        self._streams = streams or Streams(1)

    def handler(self) -> Any:
        methods = {
            name: typed(function, getattr(pb, f"{name}Request"), getattr(pb, f"{name}Response"))
            for name, function in (
                ("ServerLive", self.server_live),
                ("ServerReady", self.server_ready),
                ("ModelReady", self.model_ready),
                ("ServerMetadata", self.server_metadata),
                ("ModelMetadata", self.model_metadata),
            )
        }
        # Bytes in, bytes out: protobuf would copy every frame twice.
        methods["ModelInfer"] = grpc.unary_unary_rpc_method_handler(unary(self.model_infer))
        stream = self._streams.stream(self.model_stream_infer)
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(stream)
        return handler(SERVICE, methods | RepositoryEdge(self._service).methods())

    # -- server and models -----------------------------------------------------------

    def server_live(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def server_ready(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._service.ready())

    def model_ready(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._service.model_ready(request.name, request.version))

    def server_metadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        extensions = self._service.extensions
        return pb.ServerMetadataResponse(name="roadworthy", version=server_version(), extensions=extensions)

    def model_metadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        slot = self._service.slot(request.name, request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        spec = slot.engine.spec
        loaded = sorted(other.version for other in self._service.models.answering(request.name).loaded())
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(slot.version)] if request.version else [str(version) for version in loaded],
            platform=platform(spec.kind),
            inputs=[tensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in spec.inputs],
            outputs=[tensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in spec.outputs],
            properties=self._service.properties(slot),
        )

    # -- inference -------------------------------------------------------------------

    def model_infer(self, message: bytes, context: Any) -> bytes:
        jobs: list[Callable[[], None]] = []  # how to cancel the request, while it is under way

        def end() -> None:
            for cancel in tuple(jobs):
                cancel()

        def on_job(cancel: Callable[[], None]) -> None:
            jobs.append(cancel)
            if not when_ended(context, end, lambda: jobs):  # an answered request needs nothing
                cancel()

        try:
            return self.infer(message, deadline=_deadline(context), on_job=on_job, context=context)
        finally:
            jobs.clear()

    def model_stream_infer(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Requests answered in the order they come; a refusal is an answer and does not end the stream.  One
        that waits when the stream ends is dropped.
        """
        deadline = _deadline(context)
        waiting: list[Callable[[], None]] = []  # how to cancel the request that is under way

        def end() -> None:
            for cancel in tuple(waiting):
                cancel()

        def on_job(cancel: Callable[[], None]) -> None:
            waiting[:] = [cancel]
            if not context.is_active():
                cancel()

        when_ended(context, end)
        for message in messages:
            try:
                yield self._streamed(message, context, deadline, on_job)
            except ServiceError as error:
                refusal = pb.ModelStreamInferResponse(error_message=error.message)
                refusal.infer_response.id = _id(message)
                yield refusal.SerializeToString()

    def _streamed(self, message: bytes, context: Any, deadline: float | None, on_job: Any) -> bytes:
        # Each answer is whole, and says so.  Serialised messages merge when they are joined.
        answer = self.infer(message, deadline=deadline, on_job=on_job, context=context)
        final = pb.ModelInferResponse()
        final.parameters["triton_final_response"].bool_param = True
        return zero_copy.join(b"", 2, [answer + final.SerializeToString()])

    def infer(
        self, message: bytes, *, deadline: float | None = None, on_job: Any = None, context: Any = None
    ) -> bytes:
        """A serialised ModelInferRequest to a serialised ModelInferResponse.  Raises ServiceError."""
        tracing = self._service.tracing
        if tracing is None or context is None:
            return self._infer(message, deadline, on_job, None)
        with tracing.request(context.invocation_metadata()) as trace:
            return self._infer(message, deadline, on_job, trace)

    def _infer(self, message: bytes, deadline: float | None, on_job: Any, trace: Trace | None) -> bytes:
        try:
            request = decode(message)
        except ServiceError as error:
            failure = error

            def refuse() -> Answer:
                raise failure

            self._service.accounted("", refuse)
            raise AssertionError from error
        if trace is not None:
            trace.asked(request)
        answer = self._service.infer(request, deadline=deadline, on_job=on_job)
        if trace is not None:
            trace.answered(answer)
        return encode(answer)


def _deadline(context: Any) -> float | None:
    """A time.monotonic(); gRPC says "no deadline" with one that is centuries away."""
    remaining = context.time_remaining()
    return None if remaining is None or remaining > 1e8 else time.monotonic() + remaining


def _id(message: bytes) -> str:
    try:
        return pb.ModelInferRequest.FromString(zero_copy.split(message, zero_copy.REQUEST_CONTENTS)[0]).id
    except (zero_copy.Malformed, DecodeError):
        return ""


def decode(message: bytes) -> InferRequest:
    """Raises ServiceError(INVALID_ARGUMENT) for anything that is not a whole ModelInferRequest."""
    try:
        head, raw_contents = zero_copy.split(message, zero_copy.REQUEST_CONTENTS)
        request = pb.ModelInferRequest.FromString(head)
    except (zero_copy.Malformed, DecodeError) as error:
        raise ServiceError(
            Code.INVALID_ARGUMENT, f"malformed ModelInferRequest: {error}", "malformed"
        ) from error
    model, label = request.model_name, f"[request id: {request.id or '<id_unknown>'}] "
    inputs: list[InputTensor] = []
    used = places = 0
    for tensor in request.inputs:
        data: bytes | memoryview | Array | ShmRef | None = _place(tensor) if tensor.parameters else None
        if data is not None:
            places += 1
        elif raw_contents:
            if tensor.HasField("contents"):
                raise _invalid(
                    "contents field must not be specified when using raw_input_contents for "
                    f"'{tensor.name}' for model '{model}'"
                )
            data = raw_contents[used] if used < len(raw_contents) else None
            used += 1
        elif tensor.HasField("contents"):
            data = _contents(tensor, model, label)
        inputs.append(InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    if used < len(raw_contents) and not places and inputs:
        raise _invalid(
            f"{label}expected {used} raw input contents, got {len(raw_contents)}, for model '{model}'"
        )
    return InferRequest(
        model=model,
        version=request.model_version,
        id=request.id,
        parameters=_parameters(request.parameters) if request.parameters else {},
        inputs=inputs,
        outputs=[_output(tensor) for tensor in request.outputs],
    )


def encode(answer: Answer) -> bytes:
    """A serialised ModelInferResponse; outputs that lie in shared memory are named, not sent."""
    response = pb.ModelInferResponse(model_name=answer.model, model_version=str(answer.version), id=answer.id)
    for key, value in answer.parameters.items():
        response.parameters[key].string_param = value
    payloads: list[bytes | memoryview] = []
    for name, datatype, array in answer.outputs:
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        # one entry an output, empty where the tensor is in shared memory
        payloads.append(b"" if name in answer.places else raw(datatype, array))
    return zero_copy.join(response.SerializeToString(), zero_copy.RESPONSE_CONTENTS, payloads)


def _contents(tensor: Any, model: str, label: str) -> Array | None:
    """The typed contents as an array of the tensor's type; None when there are none."""
    values: Any = None
    for field, (kind, carries) in _CONTENTS.items():
        these = getattr(tensor.contents, field)
        if len(these) == 0:
            continue
        if tensor.datatype not in carries:
            raise _invalid(
                f"unexpected explicit tensor data for input tensor '{tensor.name}' for model '{model}' "
                f"of type '{kind}', expected datatype '{tensor.datatype}'"
            )
        values = these
    if values is None:
        return (
            np.empty(0, DTYPES[tensor.datatype]) if tensor.datatype in DTYPES and 0 in tensor.shape else None
        )
    try:
        return np.array(values, dtype=DTYPES[tensor.datatype])
    except (OverflowError, ValueError) as error:
        raise _invalid(
            f"{label}contents of input '{tensor.name}' do not fit {tensor.datatype}: {error}"
        ) from error


def _place(tensor: Any) -> ShmRef | None:
    """Where in shared memory a tensor lies, from its parameters; None when it does not."""
    parameters = tensor.parameters
    if "shared_memory_region" not in parameters:
        if "shared_memory_byte_size" in parameters:
            raise _invalid(
                "'shared_memory_byte_size' can not be specified without 'shared_memory_region' parameter "
                f"for tensor '{tensor.name}'"
            )
        return None
    region = _typed(parameters, "shared_memory_region", "string_param", tensor.name)
    if "shared_memory_byte_size" not in parameters:
        raise _invalid(
            "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter "
            f"for tensor '{tensor.name}'"
        )
    size = _typed(parameters, "shared_memory_byte_size", "int64_param", tensor.name)
    offset = 0
    if "shared_memory_offset" in parameters:
        offset = _typed(parameters, "shared_memory_offset", "int64_param", tensor.name)
    return ShmRef(region, offset, size)


def _typed(parameters: Any, key: str, kind: str, tensor: str) -> Any:
    if parameters[key].WhichOneof("parameter_choice") != kind:
        raise _invalid(f"invalid value type for '{key}' parameter for tensor '{tensor}', expected {kind}.")
    return getattr(parameters[key], kind)


def _output(tensor: Any) -> OutputRequest:
    if not tensor.parameters:
        return OutputRequest(tensor.name)
    count = 0
    if "classification" in tensor.parameters:
        if tensor.parameters["classification"].WhichOneof("parameter_choice") != "int64_param":
            raise _invalid("invalid value type for 'classification' parameter, expected int64_param")
        count = tensor.parameters["classification"].int64_param
        if count <= 0:
            raise _invalid("invalid value for 'classification' parameter, expected >= 0")
    return OutputRequest(tensor.name, count, _place(tensor))


def _parameters(parameters: Any) -> dict[str, Parameter]:
    """The request's parameters, those that mean something checked."""
    values: dict[str, Parameter] = {}
    for key, value in parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if key == "timeout" and kind != "int64_param":
            raise _invalid("invalid value type for 'timeout' parameter, expected int64_param.")
        if key == "priority":
            if kind not in ("int64_param", "uint64_param"):
                raise _invalid(
                    "invalid value type for 'priority' parameter, expected int64_param or uint64_param."
                )
            if getattr(value, kind) < 0:
                raise _invalid("invalid value for 'priority', expected value >= 0.")
        if key.startswith("triton_") and key != _RESERVED:
            raise _invalid(
                "parameter keys starting with 'triton_' are reserved for Triton usage. "
                f"Only the following keys starting with 'triton_' are allowed: {_RESERVED}"
            )
        values[key] = "" if kind is None else getattr(value, kind)
    return values


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
