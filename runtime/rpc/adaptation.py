"""The part of the control service that is about adaptation: drift, the adapters' own connections, rounds.

Converts and bounds; the registry is `runtime.adapter_registry`, the monitors are `runtime.drift.monitors`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from protos import roadworthy_pb2 as pb
from runtime import adapter_registry as registry
from runtime.adapter_registry import Adapter, AdapterState, Command, Pace
from runtime.errors import Code, ServiceError
from runtime.repository.manifest import check_name
from runtime.repository.records import parse
from runtime.rpc.base import Streams, check_reason, typed
from runtime.rpc.message_dict import clean, message_to_dict
from runtime.service import Service, server_version

log = logging.getLogger("roadworthy.adapters")
REPORT = 256 << 10  # bytes of a report
TEXT, ITEMS, DETAIL = 500, 512, 16 << 10  # in it: characters of a text and of `detail`, entries of a list
ARRIVING = 1024  # connections of adapters
FIRST = 10.0  # seconds in which a connection must register
ANSWER = 5.0  # seconds that an operator's call waits for the adapter's answer


class AdaptationEdge:
    """`adapters`: the streams of adapters; a limit of their own, so that watchers cannot keep them out."""

    def __init__(self, service: Service, watchers: Streams, adapters: Streams) -> None:
        self._service = service
        self._watchers = watchers
        self._streams = adapters

    def methods(self) -> dict[str, Any]:
        # Those that have not registered take no places of those that have; admission bounds their threads.
        adapter = Streams(ARRIVING, "adapters that have not registered").stream(self.adapter)
        adapter.reads_by_itself = True  # type: ignore[attr-defined]  # it has a time limit for the first report
        return {
            "Drift": typed(self.drift, pb.ModelRequest, pb.DriftResponse),
            "Adaptation": typed(self.adaptation, pb.ModelRequest, pb.AdaptationResponse),
            "StartRound": typed(self.start_round, pb.StartRoundRequest, pb.AdaptationResponse),
            "CancelRound": typed(self.cancel_round, pb.ModelRequest, pb.AdaptationResponse),
            "SetCollection": typed(self.set_collection, pb.CollectionRequest, pb.AdaptationResponse),
            "WatchRound": grpc.unary_stream_rpc_method_handler(
                self._watchers.stream(self.watch_round),
                request_deserializer=pb.ModelRequest.FromString,
                response_serializer=pb.AdapterReport.SerializeToString,
            ),
            # Bytes: a report that is too large or no message is refused in our words.
            "Adapter": grpc.stream_stream_rpc_method_handler(
                adapter,
                response_serializer=pb.AdapterCommand.SerializeToString,
            ),
        }

    # -- drift -----------------------------------------------------------------------

    def drift(self, request: pb.ModelRequest, context: Any) -> pb.DriftResponse:
        self._service.models.host(request.model)
        found = self._service.monitors.status(request.model)
        response = pb.DriftResponse(model=request.model)
        if found is None:
            response.reason = self._service.monitors.why_not(request.model)
            return response
        status, version = found
        response.state, response.since, response.version = status.state, status.since, version
        response.reason, response.reference = status.reason, status.compared
        response.frames, response.dropped, response.alarms = status.frames, status.dropped, status.alarms
        response.ignored, response.failed = status.ignored, status.failed
        response.false_alarm_hours = status.false_alarm_hours
        for source in status.sources:
            response.sources.add(
                source=clean(source.source),
                state=source.state,
                since=source.since,
                frames=source.frames,
                alarms=source.alarms,
                reason=source.reason,
                signals=[pb.DriftSignal(**vars(signal)) for signal in source.signals],
            )
        return response

    # -- the operator's side ---------------------------------------------------------

    def adaptation(self, request: pb.ModelRequest, context: Any) -> pb.AdaptationResponse:
        self._service.models.host(request.model)
        return self._response(request.model)

    def start_round(self, request: pb.StartRoundRequest, context: Any) -> pb.AdaptationResponse:
        check_reason(request.reason)
        return self._command(request.model, "start_round", {"reason": clean(request.reason)}, context)

    def cancel_round(self, request: pb.ModelRequest, context: Any) -> pb.AdaptationResponse:
        return self._command(request.model, "cancel_round", {}, context)

    def set_collection(self, request: pb.CollectionRequest, context: Any) -> pb.AdaptationResponse:
        return self._command(request.model, "set_collection", {"on": request.on}, context)

    def watch_round(self, request: pb.ModelRequest, context: Any) -> Iterator[pb.AdapterReport]:
        self._service.models.host(request.model)
        context.send_initial_metadata(())
        for report in self._service.adapters.watch(request.model, context.is_active):
            yield pb.AdapterReport(**report)

    def _command(self, model: str, kind: str, values: dict[str, Any], context: Any) -> pb.AdaptationResponse:
        self._service.models.host(model)
        remaining = context.time_remaining()
        wait = ANSWER if remaining is None else max(0.0, min(ANSWER, remaining - 0.5))
        command = self._service.adapters.command(model, kind, values, wait=wait, alive=context.is_active)
        response = self._response(model)
        response.command.id, response.command.reason = command.id, clean(command.reason)
        response.command.accepted = command.accepted is True
        response.waiting = command.accepted is None
        return response

    def _response(self, model: str) -> pb.AdaptationResponse:
        response = pb.AdaptationResponse(model=model)
        connected, last = self._service.adapters.connected(model), self._service.adapters.last(model)
        if connected is not None:
            response.adapters.append(_state(connected))
            response.collection = bool(connected.report.get("collection", {}).get("on", False))
        elif last is not None:
            response.last.CopyFrom(_state(last))
        return response

    # -- the adapter's side ----------------------------------------------------------

    def adapter(self, reports: Iterator[bytes], context: Any) -> Iterator[pb.AdapterCommand]:
        connection = _Connection(self._service, reports, context)
        try:
            connection.first()
            yield from self._streams.stream(self._registered)(connection, context)
        finally:
            connection.close()

    def _registered(self, connection: _Connection, context: Any) -> Iterator[pb.AdapterCommand]:
        adapter = connection.first()
        yield pb.AdapterCommand(
            time=adapter.connected,
            welcome=pb.Welcome(
                server=f"roadworthy {server_version()}",
                interval=registry.INTERVAL,
            ),
        )
        for command in self._service.adapters.outgoing(adapter, context.is_active):
            yield _wired(command)
        if adapter.replaced:
            message = f"'{adapter.model}' has a new connection from an adapter named '{adapter.name}'"
            context.abort(grpc.StatusCode.ABORTED, f"{message}; only one can be: end this one")
        if connection.error is not None:
            raise connection.error
        if self._service.draining:
            raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")


class _Connection:
    """Reads an adapter's reports on a thread of its own, because its stream is written to meanwhile."""

    def __init__(self, service: Service, reports: Iterator[bytes], context: Any) -> None:
        self._service = service
        self._reports = reports
        self._peer = clean(str(context.peer()), 100)
        self._registered = threading.Event()
        self._adapter: Adapter | None = None
        self.error: ServiceError | None = None
        # Its iterator ends with the stream, however that ends: a process that was killed is noticed there.
        threading.Thread(target=self._read, name="adapter-reports", daemon=True).start()

    def first(self) -> Adapter:
        """Waits for the report that registers."""
        if not self._registered.wait(FIRST):
            message = f"an adapter registers with its first report within {FIRST:.0f} s"
            raise ServiceError(Code.DEADLINE_EXCEEDED, message, "adapter")
        if self._adapter is None:
            raise self.error or ServiceError(Code.CANCELLED, "the stream has ended", "cancelled")
        return self._adapter

    def close(self) -> None:
        if self._adapter is not None:
            reason = "its connection ended" if self.error is None else self.error.message
            self._service.adapters.unregister(self._adapter, clean(reason, registry.REASON))
        self._registered.set()

    def _read(self) -> None:
        pace = Pace()
        try:
            for message in self._reports:
                pace.wait()
                report = _report(message)
                if self._adapter is None:
                    self._adapter = self._register(report)
                    self._registered.set()
                self._service.adapters.report(self._adapter, report)
        except ServiceError as error:
            self.error = error
        except grpc.RpcError:
            pass  # the stream ended
        except Exception as error:  # gRPC's iterator says "cancelled" with a bare exception
            log.debug("reports of an adapter: %s", error)
        finally:
            self.close()

    def _register(self, report: dict[str, Any]) -> Adapter:
        model, name = report.get("model", ""), report.get("name", "")
        if not model or not name:
            raise _invalid("the first report of an adapter names its `model` and its `name`")
        try:
            check_name(model)
        except ValueError as error:
            raise _invalid(str(error)) from error
        self._service.models.controller(model)  # a model of the repository, served or not yet
        return self._service.adapters.register(model, name, report.get("pid", 0), self._peer)


def _report(message: bytes) -> dict[str, Any]:
    """A report as plain values, bounded.  Raises ServiceError(INVALID_ARGUMENT)."""
    if len(message) > REPORT:
        raise _invalid(f"a report of {len(message)} bytes; at most {REPORT}")
    try:
        received = pb.AdapterReport.FromString(message)
    except DecodeError as error:
        raise _invalid(f"malformed AdapterReport: {error}") from error
    detail = received.detail
    received.ClearField("detail")
    report = message_to_dict(received, text=TEXT, items=ITEMS)
    if detail:
        try:
            if len(detail) > DETAIL or not isinstance(parse(detail, finite=False), dict):
                raise ValueError("not an object")
        except ValueError:
            raise _invalid(f"`detail` of a report is a JSON object of at most {DETAIL} characters") from None
        report["detail"] = detail
    for part in (report, report.get("round", {})):
        if "progress" in part:
            part["progress"] = min(1.0, max(0.0, part["progress"]))
    return report


def _wired(command: Command) -> pb.AdapterCommand:
    message = pb.AdapterCommand(id=command.id, time=command.time)
    part = getattr(message, command.kind)
    part.SetInParent()
    for key, value in command.values.items():
        setattr(part, key, value)
    return message


def _state(state: AdapterState) -> pb.AdapterState:
    return pb.AdapterState(**{**vars(state), "report": pb.AdapterReport(**state.report)})


def _invalid(message: str) -> ServiceError:
    return ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
