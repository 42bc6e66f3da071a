"""What both services share: status codes, guarded handlers, the limit on streams, events as messages."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from protos import roadworthy_pb2 as pb
from runtime.errors import Code, Refused, ServiceError
from runtime.events import Event
from runtime.repository.records import unicode
from runtime.swap.submissions import Submission

log = logging.getLogger("roadworthy.edge")
STATUS = {code: getattr(grpc.StatusCode, code.value) for code in Code}


def unary(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A handler whose ServiceError becomes its status."""

    def call(request: Any, context: Any) -> Any:
        try:
            return function(request, context)
        except ServiceError as error:
            context.abort(STATUS[error.code], _told(error.message))
        except Refused as refusal:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, _told(str(refusal)))

    return call


class Streams:
    """At most `limit` server streams of one kind: each holds a thread of the server."""

    def __init__(self, limit: int, setting: str = "streams") -> None:
        self._free = threading.Semaphore(limit)
        self._limit = limit
        self._setting = setting

    def stream(self, function: Callable[[Any, Any], Iterator[Any]]) -> Callable[[Any, Any], Iterator[Any]]:
        def call(request: Any, context: Any) -> Iterator[Any]:
            if not self._free.acquire(blocking=False):
                message = f"{self._limit} streams are open ({self._setting}); close one"
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
            try:
                yield from function(request, context)
            except ServiceError as error:
                context.abort(STATUS[error.code], _told(error.message))
            except Refused as refusal:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, _told(str(refusal)))
            finally:
                self._free.release()

        return call


_TOLD = 2000  # bytes of a refusal, which may be of three each on the wire: peers take 8 KiB of trailers


def _told(message: str) -> str:
    """A refusal names what a request named; one that is too long would arrive as another status."""
    return message.encode()[:_TOLD].decode(errors="ignore")


REASON = 500  # characters of a reason that somebody gives: it is written into histories and shown in tables


def check_reason(reason: str) -> None:
    """Raises ServiceError(INVALID_ARGUMENT) for one that is too long."""
    if len(reason) > REASON:
        message = f"a reason of {len(reason)} characters; at most {REASON}"
        raise ServiceError(Code.INVALID_ARGUMENT, message, "invalid")


def handler(name: str, methods: dict[str, Any]) -> Any:
    return grpc.method_handlers_generic_handler(name, methods)


def typed(function: Callable[[Any, Any], Any], request: Any, response: Any) -> Any:
    """A unary method on message classes."""
    return grpc.unary_unary_rpc_method_handler(
        unary(function),
        request_deserializer=request.FromString,
        response_serializer=response.SerializeToString,
    )


def streamed(streams: Streams, function: Any, request: Any, response: Any) -> Any:
    """A method on message classes that answers with a stream."""
    return grpc.unary_stream_rpc_method_handler(
        streams.stream(function),
        request_deserializer=request.FromString,
        response_serializer=response.SerializeToString,
    )


def followed(submission: Submission, context: Any) -> Iterator[pb.Event]:
    """The events of a submission to their end, as messages."""
    context.send_initial_metadata(())  # it is taken; its first event comes when it is its turn
    for event in submission.follow(context.is_active):
        yield wired(event)


def wired(event: Event) -> pb.Event:
    return wired_line(event.model, event.line())


def wired_line(model: str, line: dict[str, Any]) -> pb.Event:
    return pb.Event(
        time=float(line.get("time") or 0.0),
        model=model,
        version=int(line.get("version") or 0),
        state=str(line.get("state", "")),
        check=str(line.get("check", "")),
        reason=str(line.get("reason", "")),
        detail=unicode(json.dumps(line.get("detail") or {}, default=str, ensure_ascii=False)),
        group=str((line.get("detail") or {}).get("group", "")),
    )
