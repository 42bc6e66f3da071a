"""``roadworthy.v1.Roadworthy``: the control service."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from protos import roadworthy_pb2 as pb
from runtime.config import ServerConfig
from runtime.rpc.adaptation import AdaptationEdge
from runtime.rpc.base import Streams, check_reason, followed, handler, streamed, typed, wired, wired_line
from runtime.rpc.call_ends import when_ended
from runtime.rpc.groups import GroupEdge, statuses
from runtime.rpc.message_dict import clean
from runtime.service import Service, server_version
from runtime.serving.counters import RequestCounters
from runtime.tensors import Array

SERVICE = "roadworthy.v1.Roadworthy"
COMMANDS = 8  # swaps that callers may follow at the same time
ADAPTERS = 16  # connections of adapters


def taps(config: ServerConfig) -> int:
    """Returns the limit of tap streams: a few more than subscribers, so that the tap itself refuses."""
    return config.tap.subscribers + 4


class ControlEdge:
    """`streams`: the limit of streams per kind.  Watchers cannot exhaust the streams of operators."""

    def __init__(self, service: Service, streams: int) -> None:
        self._service = service
        self._watchers = Streams(streams)
        self._frames = Streams(taps(service.config))
        self._commands = Streams(COMMANDS, "swaps that are followed")
        self._adaptation = AdaptationEdge(service, Streams(streams), Streams(ADAPTERS, "adapters"))
        self._groups = GroupEdge(service, self._commands)

    def handler(self) -> Any:
        methods = {
            "Status": typed(self.status, pb.StatusRequest, pb.StatusResponse),
            "Versions": typed(self.versions, pb.VersionsRequest, pb.VersionsResponse),
            "Rollback": typed(self.rollback, pb.ModelRequest, pb.Event),
            "Prune": typed(self.prune, pb.PruneRequest, pb.PruneResponse),
            "Pin": typed(self.pin, pb.PinRequest, pb.StatusResponse),
            "Unpin": typed(self.unpin, pb.ModelRequest, pb.StatusResponse),
            "Freeze": typed(self.freeze, pb.FreezeRequest, pb.StatusResponse),
            "Unfreeze": typed(self.unfreeze, pb.ModelRequest, pb.StatusResponse),
            "Submit": streamed(self._commands, self.submit, pb.SubmitRequest, pb.Event),
            "Promote": streamed(self._commands, self.promote, pb.PromoteRequest, pb.Event),
            "Reset": streamed(self._commands, self.reset, pb.ModelRequest, pb.Event),
            "Watch": streamed(self._watchers, self.watch, pb.WatchRequest, pb.Event),
            "SubscribeFrames": streamed(self._frames, self.frames, pb.FramesRequest, pb.TappedFrame),
        }
        return handler(SERVICE, methods | self._adaptation.methods() | self._groups.methods())

    # -- unary -----------------------------------------------------------------------

    def status(self, request: pb.StatusRequest, context: Any) -> pb.StatusResponse:
        return self._status(request.model)

    def versions(self, request: pb.VersionsRequest, context: Any) -> pb.VersionsResponse:
        versions, history = self._service.admin.versions(request.model)
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
            response.history.append(wired_line(request.model, entry))
        return response

    def rollback(self, request: pb.ModelRequest, context: Any) -> pb.Event:
        return wired(self._service.admin.rollback(request.model))

    def prune(self, request: pb.PruneRequest, context: Any) -> pb.PruneResponse:
        deleted = self._service.admin.prune(request.model, request.keep)
        return pb.PruneResponse(deleted=deleted, kept=self._service.repository.versions(request.model))

    def pin(self, request: pb.PinRequest, context: Any) -> pb.StatusResponse:
        self._service.admin.pin(request.model, request.version)
        return self._status(request.model)

    def unpin(self, request: pb.ModelRequest, context: Any) -> pb.StatusResponse:
        self._service.admin.unpin(request.model)
        return self._status(request.model)

    def freeze(self, request: pb.FreezeRequest, context: Any) -> pb.StatusResponse:
        check_reason(request.reason)
        self._service.admin.freeze(request.model, clean(request.reason))
        return self._status(request.model)

    def unfreeze(self, request: pb.ModelRequest, context: Any) -> pb.StatusResponse:
        self._service.admin.unfreeze(request.model)
        return self._status(request.model)

    # -- streams ---------------------------------------------------------------------

    def submit(self, request: pb.SubmitRequest, context: Any) -> Iterator[pb.Event]:
        yield from followed(self._service.admin.submit(request.model, request.version), context)

    def promote(self, request: pb.PromoteRequest, context: Any) -> Iterator[pb.Event]:
        yield from followed(self._service.admin.submit(request.model, request.version, shadow=False), context)

    def reset(self, request: pb.ModelRequest, context: Any) -> Iterator[pb.Event]:
        yield from followed(self._service.admin.reset(request.model), context)

    def watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Event]:
        if request.model and request.model not in self._service.models.groups():
            # Raises ServiceError for a mistyped name, which would never have an event.
            self._service.models.controller(request.model)
        subscription = self._service.bus.subscribe(request.model)
        try:
            if when_ended(context, subscription.close):
                context.send_initial_metadata(())
                for event in subscription:
                    yield wired(event)
        finally:
            self._service.bus.unsubscribe(subscription)

    def frames(self, request: pb.FramesRequest, context: Any) -> Iterator[pb.TappedFrame]:
        self._service.models.host(request.model)
        subscription = self._service.tap.subscribe(
            request.model, source=request.source, max_fps=request.max_fps
        )
        try:
            if when_ended(context, subscription.close):
                context.send_initial_metadata(())
                for seen in subscription:
                    for index in range(len(seen.frame)):
                        _, height, width, _ = seen.frame.shape
                        message = pb.TappedFrame(
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
                        if seen.collect is not None:
                            message.collect = seen.collect
                        if seen.place is not None:
                            message.latitude, message.longitude = seen.place
                        yield message
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
        for status in self._service.admin.status(model):
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
            groups = self._service.models.groups().items()
            values["groups"] = [name for name, group in groups if status.model in group.members]
            response.models.add(**values)
        if not model or model in self._service.models.groups():
            response.groups.extend(statuses(self._service, model))
        return response


def _bytes(array: Array | None, index: int) -> bytes:
    return b"" if array is None else np.ascontiguousarray(array[index]).tobytes()


def _account(account: RequestCounters) -> pb.Account:
    now = account.snapshot()
    return pb.Account(
        accepted=now.accepted, answered=now.answered, rejected=now.rejected, in_flight=now.in_flight
    )
