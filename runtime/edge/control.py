"""``roadworthy.v1.Roadworthy``: the control service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from protos import roadworthy_pb2 as pb
from runtime.accounts import Account
from runtime.edge.adaptation import AdaptationEdge
from runtime.edge.common import Streams, check_reason, handler, typed
from runtime.events import Event
from runtime.plain import clean
from runtime.service import Service, server_version
from runtime.swap import Ticket
from runtime.tensors import Array

SERVICE = "roadworthy.v1.Roadworthy"


COMMANDS = 8  # swaps that may be followed by who asked for them
ADAPTERS = 16  # connections of adapters


class ControlEdge:
    """`streams`: of watchers.  Swaps and adapters have limits of their own: who only looks on cannot keep out
    who steers.
    """

    def __init__(self, service: Service, streams: Streams) -> None:
        self._service = service
        self._streams = streams
        self._commands = Streams(COMMANDS)
        self._adaptation = AdaptationEdge(service, streams, Streams(ADAPTERS))

    def handler(self) -> Any:
        methods = {
            "Status": typed(self.status, pb.StatusRequest, pb.StatusResponse),
            "Versions": typed(self.versions, pb.VersionsRequest, pb.VersionsResponse),
            "Rollback": typed(self.rollback, pb.ModelRequest, pb.Event),
            "Pin": typed(self.pin, pb.PinRequest, pb.StatusResponse),
            "Unpin": typed(self.unpin, pb.ModelRequest, pb.StatusResponse),
            "Freeze": typed(self.freeze, pb.FreezeRequest, pb.StatusResponse),
            "Unfreeze": typed(self.unfreeze, pb.ModelRequest, pb.StatusResponse),
            "Submit": _stream(self._commands, self.submit, pb.SubmitRequest, pb.Event),
            "Promote": _stream(self._commands, self.promote, pb.PromoteRequest, pb.Event),
            "Reset": _stream(self._commands, self.reset, pb.ModelRequest, pb.Event),
            "Watch": _stream(self._streams, self.watch, pb.WatchRequest, pb.Event),
            "SubscribeFrames": _stream(self._streams, self.frames, pb.FramesRequest, pb.TappedFrame),
        }
        return handler(SERVICE, methods | self._adaptation.methods())

    # -- unary -----------------------------------------------------------------------

    def status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        return self._status(request.model)

    def versions(self, request: pb.VersionsRequest, context: Any) -> pb.VersionsResponse:
        versions, history = self._service.versions(request.model)
        response = pb.VersionsResponse()
        for info in versions:
            manifest = info["manifest"]
            pack = manifest.get("pack") or {}
            response.versions.add(
                version=info["version"],
                state=str(info["state"]),
                reason=str(info["reason"]),
                created=str(manifest.get("created", "")),
                pack=str(pack.get("sha256", "")),
                parent=str(pack.get("parent", "")),
                round=str((manifest.get("adaptation") or {}).get("round", "")),
                manifest=json.dumps(manifest, ensure_ascii=False),
            )
        for entry in history:
            response.history.append(_line(request.model, entry))
        return response

    def rollback(self, request: pb.ModelRequest, context: Any) -> pb.Event:
        return _event(self._service.rollback(request.model))

    def pin(self, request: pb.PinRequest, context: Any) -> pb.StatusResponse:
        self._service.controller(request.model).pin(request.version)
        return self._status(request.model)

    def unpin(self, request: pb.ModelRequest, context: Any) -> pb.StatusResponse:
        self._service.controller(request.model).unpin()
        return self._status(request.model)

    def freeze(self, request: pb.FreezeRequest, context: Any) -> pb.StatusResponse:
        check_reason(request.reason)
        self._service.freeze(request.model, clean(request.reason))
        return self._status(request.model)

    def unfreeze(self, request: pb.ModelRequest, context: Any) -> pb.StatusResponse:
        self._service.unfreeze(request.model)
        return self._status(request.model)

    # -- streams ---------------------------------------------------------------------

    def submit(self, request: pb.SubmitRequest, context: Any) -> Iterator[pb.Event]:
        yield from _followed(self._service.submit(request.model, request.version), context)

    def promote(self, request: pb.PromoteRequest, context: Any) -> Iterator[pb.Event]:
        yield from _followed(self._service.submit(request.model, request.version, shadow=False), context)

    def reset(self, request: pb.ModelRequest, context: Any) -> Iterator[pb.Event]:
        yield from _followed(self._service.reset(request.model), context)

    def watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Event]:
        subscription = self._service.bus.subscribe(request.model)
        try:
            if context.add_callback(subscription.close):
                context.send_initial_metadata(())
                for event in subscription:
                    yield _event(event)
        finally:
            self._service.bus.unsubscribe(subscription)

    def frames(self, request: pb.FramesRequest, context: Any) -> Iterator[pb.TappedFrame]:
        self._service.host(request.model)
        subscription = self._service.tap.subscribe(
            request.model, source=request.source, max_fps=request.max_fps
        )
        try:
            if context.add_callback(subscription.close):
                context.send_initial_metadata(())
                for seen in subscription:
                    for index in range(len(seen.frame)):
                        _, height, width, _ = seen.frame.shape
                        yield pb.TappedFrame(
                            time=seen.time,
                            source=seen.source,
                            model=seen.model,
                            version=seen.version,
                            height=height,
                            width=width,
                            frame=_bytes(seen.frame, index),
                            labels=_bytes(seen.labels, index),
                            confidence=_bytes(seen.confidence, index),
                            edge_bits=_bytes(seen.edge_bits, index),
                            dropped=subscription.dropped,
                        )
        finally:
            self._service.tap.unsubscribe(subscription)

    # -- conversions -----------------------------------------------------------------

    def _status(self, model: str) -> pb.StatusResponse:
        response = pb.StatusResponse(
            server="roadworthy",
            version=server_version(),
            uptime_seconds=time.monotonic() - self._service.started,
            draining=self._service.draining,
            account=_account(self._service.account),
        )
        for status in self._service.status(model):
            values = {**vars(status), "account": _account(status.account)}
            watched = self._service.monitors.status(status.model)
            if watched is not None:
                values |= {"drift": watched[0].state, "drift_since": watched[0].since}
            adapter = self._service.adapters.connected(status.model)
            if adapter is not None:
                report = adapter.report
                values |= {"adapter": adapter.name, "phase": report.get("phase", "")}
                values |= {"progress": report.get("progress", 0.0)}
                values |= {"collection": report.get("collection", {}).get("on", False)}
            response.models.add(**values)
        return response


def _stream(streams: Streams, function: Any, request: Any, response: Any) -> Any:
    return grpc.unary_stream_rpc_method_handler(
        streams.stream(function),
        request_deserializer=request.FromString,
        response_serializer=response.SerializeToString,
    )


def _bytes(array: Array | None, index: int) -> bytes:
    return b"" if array is None else np.ascontiguousarray(array[index]).tobytes()


def _followed(ticket: Ticket, context: Any) -> Iterator[pb.Event]:
    context.send_initial_metadata(())  # it is taken; its first event comes when it is its turn
    for event in ticket.follow(context.is_active):
        yield _event(event)


def _account(account: Account) -> pb.Account:
    now = account.snapshot()
    return pb.Account(
        accepted=now.accepted, answered=now.answered, rejected=now.rejected, in_flight=now.in_flight
    )


def _event(event: Event) -> pb.Event:
    return _line(event.model, event.line())


def _line(model: str, line: dict[str, Any]) -> pb.Event:
    return pb.Event(
        time=float(line.get("time") or 0.0),
        model=model,
        version=int(line.get("version") or 0),
        state=str(line.get("state", "")),
        check=str(line.get("check", "")),
        reason=str(line.get("reason", "")),
        detail=json.dumps(line.get("detail") or {}, default=str, ensure_ascii=False),
        group=str((line.get("detail") or {}).get("group", "")),
    )
