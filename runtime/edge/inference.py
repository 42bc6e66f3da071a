"""``inference.GRPCInferenceService``: KServe v2 with Triton's extensions, codes and words."""

from __future__ import annotations

import time
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from protos import inference_pb2 as pb
from runtime import wire
from runtime.edge.common import handler, typed, unary
from runtime.errors import Code, ServiceError
from runtime.host import Answer, InferRequest, InputTensor, OutputRequest, Parameter
from runtime.service import EXTENSIONS, Service, server_version
from runtime.tensors import DTYPES, Array, encode_bytes

SERVICE = "inference.GRPCInferenceService"
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class InferenceEdge:
    def __init__(self, service: Service) -> None:
        self._service = service

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
        return handler(SERVICE, methods)

    # -- server and models -----------------------------------------------------------

    def server_live(self, request: pb.ServerLiveRequest, context: Any) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    def server_ready(self, request: pb.ServerReadyRequest, context: Any) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._service.ready())

    def model_ready(self, request: pb.ModelReadyRequest, context: Any) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=self._service.model_ready(request.name, request.version))

    def server_metadata(self, request: pb.ServerMetadataRequest, context: Any) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="roadworthy", version=server_version(), extensions=EXTENSIONS)

    def model_metadata(self, request: pb.ModelMetadataRequest, context: Any) -> pb.ModelMetadataResponse:
        slot = self._service.slot(request.name, request.version)
        tensor = pb.ModelMetadataResponse.TensorMetadata
        spec = slot.engine.spec
        loaded = sorted(other.version for other in self._service.host(request.name).loaded())
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(slot.version)] if request.version else [str(version) for version in loaded],
            platform="onnxruntime_onnx",
            inputs=[tensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in spec.inputs],
            outputs=[tensor(name=t.name, datatype=t.datatype, shape=t.shape) for t in spec.outputs],
            properties=self._service.properties(slot),
        )

    # -- inference -------------------------------------------------------------------

    def model_infer(self, message: bytes, context: Any) -> bytes:
        remaining = context.time_remaining()
        # gRPC says "no deadline" with one that is centuries away
        deadline = None if remaining is None or remaining > 1e8 else time.monotonic() + remaining

        def on_job(cancel: Any) -> None:
            if not context.add_callback(cancel):
                cancel()

        return self.infer(message, deadline=deadline, on_job=on_job)

    def infer(self, message: bytes, *, deadline: float | None = None, on_job: Any = None) -> bytes:
        """A serialised ModelInferRequest to a serialised ModelInferResponse.  Raises ServiceError."""
        try:
            request = decode(message)
        except ServiceError as error:
            failure = error

            def refuse() -> Answer:
                raise failure

            self._service.accounted("", refuse)
            raise AssertionError from error
        return encode(self._service.infer(request, deadline=deadline, on_job=on_job))


def decode(message: bytes) -> InferRequest:
    """Raises ServiceError(INVALID_ARGUMENT) for anything that is not a whole ModelInferRequest."""
    try:
        head, raw = wire.split(message, wire.REQUEST_CONTENTS)
        request = pb.ModelInferRequest.FromString(head)
    except (wire.Malformed, DecodeError) as error:
        raise ServiceError(
            Code.INVALID_ARGUMENT, f"malformed ModelInferRequest: {error}", "malformed"
        ) from error
    label = f"[request id: {request.id or '<id_unknown>'}] "
    inputs: list[InputTensor] = []
    used = 0
    for tensor in request.inputs:
        data: bytes | memoryview | Array | None
        if raw:
            if tensor.HasField("contents"):
                raise _invalid(
                    f"{label}contents field must not be specified when using raw_input_contents for "
                    f"'{tensor.name}' for model '{request.model_name}'"
                )
            data = raw[used] if used < len(raw) else None
            used += 1
        else:
            data = _contents(tensor, label) if tensor.HasField("contents") else None
        inputs.append(InputTensor(tensor.name, tensor.datatype, tuple(tensor.shape), data))
    if raw and used < len(raw):
        raise _invalid(
            f"{label}expected {used} raw input contents, got {len(raw)}, for model '{request.model_name}'"
        )
    outputs = [_output(tensor, label) for tensor in request.outputs]
    return InferRequest(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        parameters={key: _parameter(value) for key, value in request.parameters.items()},
        inputs=inputs,
        outputs=outputs,
    )


def encode(answer: Answer) -> bytes:
    response = pb.ModelInferResponse(model_name=answer.model, model_version=str(answer.version), id=answer.id)
    for key, value in answer.parameters.items():
        response.parameters[key].string_param = value
    payloads: list[bytes | memoryview] = []
    for name, datatype, array in answer.outputs:
        response.outputs.add(name=name, datatype=datatype, shape=array.shape)
        payloads.append(_raw(datatype, array))
    return wire.join(response.SerializeToString(), wire.RESPONSE_CONTENTS, payloads)


def _raw(datatype: str, array: Array) -> bytes | memoryview:
    if datatype == "BYTES":
        return encode_bytes(array)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _contents(tensor: Any, label: str) -> Array | None:
    field = _CONTENTS.get(tensor.datatype)
    if field is None:
        raise _invalid(
            f"{label}datatype '{tensor.datatype[:80]}' of input '{tensor.name}' has no typed "
            f"contents; send it raw"
        )
    values = getattr(tensor.contents, field)
    if len(values) == 0:
        return None if any(size != 0 for size in tensor.shape) else np.empty(0, DTYPES[tensor.datatype])
    try:
        return np.array(values, dtype=DTYPES[tensor.datatype])
    except (OverflowError, ValueError) as error:
        raise _invalid(
            f"{label}contents of input '{tensor.name}' do not fit {tensor.datatype}: {error}"
        ) from error


def _output(tensor: Any, label: str) -> OutputRequest:
    return OutputRequest(tensor.name)


def _parameter(value: Any) -> Parameter:
    chosen = value.WhichOneof("parameter_choice")
    return "" if chosen is None else getattr(value, chosen)  # type: ignore[no-any-return]


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
