"""``grpc.health.v1``: what a load balancer, a supervisor and gRPC's own clients ask.

A `Watch` holds no thread while nothing changes.  Threads of this module send its messages, one at a time per
watcher, and under no lock: gRPC calls back from its one serving thread when a call ends, and a lock that a
sender holds would stop the whole server there.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from runtime.rpc.thread_pool import RpcThreadPool

log = logging.getLogger("roadworthy.health")
SERVICE = "grpc.health.v1.Health"
WATCHERS = 4096
OF_ONE = 64  # watchers of one connection; gRPC's own health checking needs one
SENDERS = 256  # threads; made when they are needed, and that is while watchers do not take their messages
STALL = 3.0  # seconds after which a watcher that does not take its message is sent away
_Response = health_pb2.HealthCheckResponse


class _Watcher:
    def __init__(self, service: str, context: Any, send: Callable[[Any], None]) -> None:
        self.service = service
        self.context = context
        self.send = send
        self.peer = str(context.peer())
        self.sent: int | None = None
        self.sending = 0.0  # since when, in time.monotonic(); 0.0 = nothing is on its way
        self.lock = threading.Lock()
        self.busy = False
        self.again = False


class Health:
    """The status of each of `services` ("" is the whole server) and those who watch it."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = tuple(services)
        self._lock = threading.Lock()
        self._statuses: dict[str, int] = dict.fromkeys(self._services, _Response.NOT_SERVING)
        self._watchers: dict[_Watcher, None] = {}  # its single operations are atomic
        self._senders = RpcThreadPool(SENDERS, "grpc_health_send")
        self._draining = False
        self._ended = False

    def handler(self) -> Any:
        def watch(request: Any, context: Any, send: Callable[[Any], None]) -> None:
            self.watch(request, context, send)

        watch.experimental_non_blocking = True  # type: ignore[attr-defined]
        methods = {
            "Check": grpc.unary_unary_rpc_method_handler(
                self.check, health_pb2.HealthCheckRequest.FromString, _Response.SerializeToString
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                watch, health_pb2.HealthCheckRequest.FromString, _Response.SerializeToString
            ),
        }
        if hasattr(health_pb2, "HealthListRequest"):
            methods["List"] = grpc.unary_unary_rpc_method_handler(
                self.list,
                health_pb2.HealthListRequest.FromString,
                health_pb2.HealthListResponse.SerializeToString,
            )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    # -- calls -----------------------------------------------------------------------

    def check(self, request: Any, context: Any) -> Any:
        status = self._statuses.get(request.service)
        if status is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "")
        return _Response(status=status)

    def list(self, request: Any, context: Any) -> Any:
        statuses = {name: _Response(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    def watch(self, request: Any, context: Any, send: Callable[[Any], None]) -> None:
        """The status now, and then each that differs from the one before."""
        watcher = _Watcher(request.service, context, send)
        others = list(self._watchers)
        if len(others) >= WATCHERS:
            message = f"{WATCHERS} clients watch the health of this server; use Check"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        # Clients of a socket of the file system cannot be told from one another.
        told_apart = not watcher.peer.startswith("unix")
        if told_apart and sum(other.peer == watcher.peer for other in others) >= OF_ONE:
            message = f"{OF_ONE} calls of this connection watch the health of this server; close one"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._watchers[watcher] = None
        if not context.add_callback(lambda: self._watchers.pop(watcher, None)):
            self._watchers.pop(watcher, None)
            return
        self._serve(watcher)

    # -- the server's side -----------------------------------------------------------

    def set(self, serving: bool) -> None:
        """The status of every service, until `drain`."""
        with self._lock:
            if not self._draining:
                self._change(serving)
        self._serve_all()

    def drain(self) -> None:
        """NOT_SERVING from now on."""
        with self._lock:
            self._draining = True
            self._change(False)
        self._serve_all()

    def close(self, timeout: float) -> None:
        """Ends every Watch with UNAVAILABLE, after its last status; waits for that at most `timeout` s."""
        self._ended = True
        self._serve_all()
        until = time.monotonic() + timeout
        while self._watchers and time.monotonic() < until:
            time.sleep(0.005)
        self._senders.shutdown()

    def look(self, now: float) -> None:
        """Sends away the watchers that do not take what was sent to them."""
        for watcher in list(self._watchers):
            if watcher.sending and now - watcher.sending > STALL:
                watcher.context.cancel()

    def _change(self, serving: bool) -> None:
        status = _Response.SERVING if serving else _Response.NOT_SERVING
        self._statuses = dict.fromkeys(self._services, status)

    # -- sending ---------------------------------------------------------------------

    def _serve_all(self) -> None:
        for watcher in list(self._watchers):
            self._serve(watcher)

    def _serve(self, watcher: _Watcher) -> None:
        """Has what is new sent, by the thread that sends to the watcher already or by another one."""
        with watcher.lock:
            watcher.again = True
            if watcher.busy:
                return
            watcher.busy = True
        with contextlib.suppress(RuntimeError):  # the senders have ended
            self._senders.submit(self._send, watcher)

    def _send(self, watcher: _Watcher) -> None:
        while True:
            with watcher.lock:
                if not watcher.again:
                    watcher.busy = False
                    return
                watcher.again = False
            ended = self._ended  # read before the status, which must be the last one when the Watch ends
            status = self._statuses.get(watcher.service, _Response.SERVICE_UNKNOWN)
            watcher.sending = time.monotonic()
            try:
                if status != watcher.sent:
                    watcher.send(_Response(status=status))
                    watcher.sent = status
                if ended:
                    watcher.context.set_code(grpc.StatusCode.UNAVAILABLE)
                    watcher.context.set_details("the server is shutting down")
                    watcher.send(None)
                    return
            except Exception as error:  # the call has ended meanwhile
                log.debug("a watcher of the health: %s", error)
                return
            finally:
                watcher.sending = 0.0
