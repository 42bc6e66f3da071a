"""The server as an object: a service, its gRPC edge, health and metrics, started and drained in the right
order.
"""

from __future__ import annotations

import logging
import threading
from concurrent import futures
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos._pool import POOL
from runtime.config import ServerConfig
from runtime.errors import ConfigError
from runtime.observability import metrics as metrics_module
from runtime.rpc import auth
from runtime.rpc.base import Streams, handler
from runtime.rpc.control import ADAPTERS, COMMANDS, ControlEdge
from runtime.rpc.control import SERVICE as CONTROL
from runtime.rpc.inference import SERVICE as INFERENCE
from runtime.rpc.inference import InferenceEdge
from runtime.rpc.thread_pool import Pool
from runtime.service import Service

log = logging.getLogger("roadworthy.server")
REFLECTIONS = 4  # streams of reflection: each holds a thread


class Server:
    """`with Server(config) as server: …` serves on `server.target` until the block ends, and drains."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.service = Service(config)
        self.port = 0
        self.metrics_port = 0
        self._metrics_server: Any = None
        self._grpc: Any = None
        self._pool: Pool | None = None
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=futures.ThreadPoolExecutor(2, "health")
        )
        self._stopped = threading.Event()

    @property
    def target(self) -> str:
        """What a client connects to."""
        if self.config.host.startswith("unix:"):
            return self.config.host
        host = "127.0.0.1" if self.config.host in ("0.0.0.0", "") else self.config.host
        return f"{host}:{self.port}"

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Server:
        """Loads the last live versions, then listens.  Raises ConfigError when the address cannot be had."""
        config = self.config
        metrics = metrics_module.Metrics(self.service)
        self.service.start()
        threads = 2 * config.engine.concurrency + config.queue.limit * max(1, len(self.service.hosts()))
        streams = config.streams + COMMANDS + ADAPTERS + REFLECTIONS  # each holds one
        threads = min(512, threads + streams + 16)
        self._pool = Pool(threads, "grpc")
        self._grpc = grpc.server(
            self._pool,
            interceptors=auth.interceptors(config.security),
            maximum_concurrent_rpcs=threads,  # beyond it gRPC itself answers RESOURCE_EXHAUSTED
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
            ),
        )
        limited = Streams(config.streams)
        self._grpc.add_generic_rpc_handlers(
            (
                InferenceEdge(self.service, limited).handler(),
                ControlEdge(self.service, limited).handler(),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self._reflect()
        self._listen()
        self._grpc.start()
        if config.metrics_port >= 0:
            try:
                host = "127.0.0.1" if config.host.startswith("unix:") else config.host
                self.metrics_port, self._metrics_server = metrics_module.serve(
                    metrics, host, config.metrics_port
                )
            except OSError as error:
                self._grpc.stop(None)
                self._pool.shutdown()
                raise ConfigError(
                    f"metrics port {config.metrics_port} cannot be had: {error.strerror}; choose another"
                ) from error
        threading.Thread(target=self._keep_health, name="health-keeper", daemon=True).start()
        return self

    def _listen(self) -> None:
        config = self.config
        address = config.host if config.host.startswith("unix:") else f"{config.host}:{config.port}"
        try:
            credentials = auth.credentials(config.security)
            if credentials is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {address}; is another server there? choose another port"
            ) from error

    def _reflect(self) -> None:
        """Server reflection, where grpcio-reflection is installed."""
        try:
            from grpc_reflection.v1alpha import reflection, reflection_pb2
        except ImportError:
            return
        for file in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
            POOL.AddSerializedFile(file.serialized_pb)
        names = (INFERENCE, CONTROL, health.SERVICE_NAME, reflection.SERVICE_NAME)
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
            self._set_health(self.service.ready())
            events.get(timeout=1.0)

    def _set_health(self, serving: bool) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", INFERENCE, CONTROL):
            self._health.set(name, status)

    def stop(self) -> bool:
        """Drains: health first, then new requests are refused, then what is in flight finishes.

        Returns False when something was still in flight after `drain` seconds.
        """
        if self._stopped.is_set():
            return True
        self._stopped.set()
        self._health.enter_graceful_shutdown()
        idle = self.service.drain(self.config.drain)
        if self._grpc is not None:
            self._grpc.stop(1.0 if idle else 0.0).wait()
        if self._pool is not None:
            self._pool.shutdown()
        if self._metrics_server is not None:
            self._metrics_server.shutdown()
            self._metrics_server.server_close()
        self.service.close()
        return idle
