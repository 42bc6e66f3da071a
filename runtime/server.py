"""The server as an object: a service, its gRPC edge, health and metrics, started and drained in the right
order.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from protos._pool import POOL
from runtime import listen
from runtime.config import ServerConfig
from runtime.errors import ConfigError
from runtime.observability import metrics as metrics_module
from runtime.rpc import auth, health
from runtime.rpc.admission import Admission, Lane, Refusals
from runtime.rpc.base import Streams, handler
from runtime.rpc.control import ADAPTERS, COMMANDS, ControlEdge, taps
from runtime.rpc.control import SERVICE as CONTROL
from runtime.rpc.inference import SERVICE as INFERENCE
from runtime.rpc.inference import InferenceEdge
from runtime.rpc.thread_pool import RpcThreadPool
from runtime.service import Service

log = logging.getLogger("roadworthy.server")
REFLECTIONS = 4  # streams of reflection: each holds a thread
BRIEF = 128  # threads of calls that are answered at once: health, and control; made when they are needed
LOADS = 32  # calls of RepositoryModelLoad and -Unload, each of which may wait for a swap
GRACE = 1.0  # seconds that calls have for their end when the server stops
_HEALTH = tuple(f"/{INFERENCE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady"))


class Server:
    """`with Server(config) as server: …` serves on `server.target` until the block ends, and drains."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.service = Service(config)
        self.port = 0
        self.metrics_port = 0
        self._metrics_server: Any = None
        self._grpc: Any = None
        self._pool: RpcThreadPool | None = None
        self._health = health.Health(("", INFERENCE, CONTROL))
        self._refusals = Refusals()
        self._admission: Admission | None = None
        self._tokens = auth.Tokens(config.security)
        self._certificates = auth.certificates(config.security)
        self._stopped = threading.Event()

    @property
    def target(self) -> str:
        """What a client connects to."""
        return listen.target(self.config.host, self.port)

    @property
    def metrics_target(self) -> str:
        """HOST:PORT of the metrics; "none" without them."""
        if self.config.metrics_port < 0:
            return "none"
        return listen.target(listen.beside(self.config.host), self.metrics_port)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Server:
        """Loads the last live versions, then listens.  Raises ConfigError when the address cannot be had."""
        listen.check(self.config.host, self.config.port)
        self.service.start()
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        config = self.config
        metrics = metrics_module.Metrics(self.service, self._refusals.snapshot)
        self._pool = RpcThreadPool(2, "grpc")  # each call has a lane, and its threads
        self._admission = Admission(
            self._lanes(), self._tokens.refusal, self._refusals, config.message_timeout
        )
        self._grpc = grpc.server(
            self._pool,
            interceptors=(self._admission,),
            options=(
                ("grpc.max_receive_message_length", config.max_message),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
                ("grpc.keepalive_permit_without_calls", 1),
                # A machine that is gone without a word is noticed: its adapter, its watchers.
                ("grpc.keepalive_time_ms", 30000),
                ("grpc.keepalive_timeout_ms", 10000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
                # A connection that never says what it wants holds a descriptor.
                ("grpc.server_handshake_timeout_ms", 20000),
            ),
        )
        self._grpc.add_generic_rpc_handlers(
            (
                InferenceEdge(self.service, Streams(config.streams)).handler(),
                ControlEdge(self.service, config.streams).handler(),
                self._health.handler(),
            )
        )
        self._reflect()
        self._listen()
        self._grpc.start()
        self._admission.start(self._health.look)
        if config.metrics_port >= 0:
            try:
                self.metrics_port, self._metrics_server = metrics_module.serve(
                    metrics, listen.beside(config.host), config.metrics_port
                )
            except OSError as error:
                raise ConfigError(
                    f"metrics port {config.metrics_port} cannot be had: {error.strerror}; choose another"
                ) from error
        if warning := auth.exposed(config.security, config.host):
            log.warning("%s", warning)
        threading.Thread(target=self._keep_health, name="health-keeper", daemon=True).start()

    def _lanes(self) -> Callable[[str], Lane]:
        """Which threads a call gets, by its method."""
        config = self.config
        models = max(1, len(self.service.models.hosts()))
        inference = 2 * config.engine.concurrency + config.queue.limit * models
        watching = 2 * config.streams + taps(config) + COMMANDS + ADAPTERS  # streams hold one each
        infer = Lane("infer", min(512, inference + 16))
        streams, control = Lane("streams", config.streams + 16), Lane("control", watching + BRIEF)
        brief, loads, reflection = Lane("health", BRIEF), Lane("loads", LOADS), Lane("reflection", 16)

        def choose(method: str) -> Lane:
            service, _, call = method.rpartition("/")
            if service == f"/{health.SERVICE}" or method in _HEALTH:
                return brief
            if service == f"/{INFERENCE}":
                named = {"ModelInfer": infer, "ModelStreamInfer": streams}
                loading = call in ("RepositoryModelLoad", "RepositoryModelUnload")
                return loads if loading else named.get(call, control)
            return control if service == f"/{CONTROL}" else reflection

        return choose

    def _listen(self) -> None:
        config = self.config
        address = listen.joined(config.host, config.port)
        try:
            if self._certificates is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, self._certificates.credentials())
        except RuntimeError as error:
            raise listen.why_not(config.host, config.port) from error

    def configure(self, config: ServerConfig) -> list[str]:
        """Takes a configuration that was read again: `Service.configure`, the tokens and the certificates.

        Returns the keys that need a new start.  Raises ConfigError, and changes nothing, for tokens and
        certificates that cannot be used.
        """
        certificates, before = auth.certificates(config.security), self.config.security
        if (self._certificates is None) != (certificates is None):
            raise ConfigError("security.certificate: TLS is switched on and off at a start; start again")
        if before.client_ca and not config.security.client_ca:
            raise ConfigError("security.client_ca: clients need certificates until the next start")
        self._tokens.replace(config.security)
        if self._certificates is not None and certificates is not None:
            self._certificates.take(certificates)
        taken = {key: getattr(config.security, key) for key in ("certificate", "key", "client_ca", "tokens")}
        self.config = dataclasses.replace(self.config, security=dataclasses.replace(before, **taken))
        needs_start = self.service.configure(config)
        if config.security.trusted_keys == before.trusted_keys and "security" in needs_start:
            needs_start.remove("security")
        return needs_start

    def _reflect(self) -> None:
        """Server reflection, where grpcio-reflection is installed."""
        try:
            from grpc_reflection.v1alpha import reflection, reflection_pb2
        except ImportError:
            return
        for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
            POOL.AddSerializedFile(file.serialized_pb)
        names = (INFERENCE, CONTROL, health.SERVICE, reflection.SERVICE_NAME)
        servicer = reflection.ReflectionServicer(names, POOL)
        info = grpc.stream_stream_rpc_method_handler(
            Streams(REFLECTIONS).stream(servicer.ServerReflectionInfo),
            request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
            response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
        # v1 differs from v1alpha in its name alone, and some clients know no other.
        services = (reflection.SERVICE_NAME, "grpc.reflection.v1.ServerReflection")
        self._grpc.add_generic_rpc_handlers(
            tuple(handler(service, {"ServerReflectionInfo": info}) for service in services)
        )

    def _keep_health(self) -> None:
        """Health follows readiness, which changes only with events."""
        events = self.service.bus.subscribe(limit=16)
        while not self._stopped.is_set():
            self._health.set(self.service.ready())
            events.get(timeout=1.0)

    def stop(self) -> bool:
        """Drains: health first, then new requests are refused, then what is in flight finishes.

        Returns False when something was still in flight after `drain` seconds.
        """
        if self._stopped.is_set():
            return True
        self._stopped.set()
        self._health.drain()
        idle = self.service.drain(self.config.drain)
        self._health.close(GRACE)
        if self._admission is not None:
            self._admission.drain()
        if self._grpc is not None and not self._grpc.stop(GRACE if idle else 0.0).wait(30.0):
            log.error("gRPC has not ended its calls within 30 s")
            idle = False
        if self._admission is not None:
            self._admission.stop()
        if self._pool is not None:
            self._pool.shutdown()
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        self.service.close()
        return idle
