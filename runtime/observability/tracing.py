"""OpenTelemetry traces of inference requests, where `[tracing]` names an endpoint (extra "tracing").

One span a request, with a span each for queue, compute_input, compute_infer and compute_output inside it, as
long as the request's own clock says they took and laid out one after another.  A caller's W3C `traceparent`
decides whether its request is traced; of the others, `rate` of them are.  Spans are made after the answer, go
through a bounded queue and are dropped where it is full: a receiver that is slow or gone costs no answer.

Without an endpoint nothing of OpenTelemetry is imported and a request costs one comparison.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from runtime.config import TracingConfig
from runtime.errors import ConfigError, ServiceError
from runtime.serving.counters import Durations
from runtime.serving.request import Answer, InferRequest

log = logging.getLogger("roadworthy.tracing")
_STAGES = ("queue", "compute_input", "compute_infer", "compute_output")
_HEADERS = ("traceparent", "tracestate")
_TEXT = 200  # characters of an attribute that a caller chooses
_GOODBYE = 2.0  # seconds that what waits may take to be delivered when the server stops


class Tracing:
    """`exporter`: for tests; by default spans go to `config.endpoint` over OTLP/gRPC.

    Raises ConfigError: the packages are not installed.
    """

    def __init__(self, config: TracingConfig, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider, sampling
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(
                    endpoint=config.endpoint,
                    insecure=not config.endpoint.startswith("https://"),
                    timeout=config.timeout,  # type: ignore[arg-type]
                )
        except ImportError as error:
            raise ConfigError(
                f"tracing.endpoint: {error.name} is not installed; pip install 'roadworthy[tracing]'"
            ) from error
        self.rate = self.configured_rate = config.rate
        self.on = True
        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            sampler=sampling.ALWAYS_ON,  # decided here, before anything is made
            resource=Resource.create({"service.name": config.service}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=config.queue,
                max_export_batch_size=min(512, config.queue),
                export_timeout_millis=config.timeout * 1e3,
            )
        )
        self._tracer = self._provider.get_tracer("roadworthy")
        _quieten()

    @contextlib.contextmanager
    def request(self, metadata: Iterable[tuple[str, Any]] | None) -> Iterator[Trace | None]:
        """Around one request: its trace, or None where it is not traced."""
        parent = self._parent(metadata)
        if parent is None:
            yield None
            return
        trace = Trace(self, parent)
        try:
            yield trace
        except ServiceError as error:
            trace.failed(error.code.value, error.reason, error.message)
            raise
        finally:
            try:
                trace.finish()
            except Exception:  # whatever a tracer may do, an answer stays an answer
                log.debug("a trace was lost", exc_info=True)

    def _parent(self, metadata: Iterable[tuple[str, Any]] | None) -> Any:
        """The context under which a request is traced; None when it is not.  Never raises."""
        if not self.on:
            return None
        try:
            carrier = {key: value for key, value in metadata or () if key in _HEADERS}
            context = self._propagator.extract(carrier) if "traceparent" in carrier else None
            if context is not None:
                span = self._api.get_current_span(context).get_span_context()
                if span.is_valid:
                    return context if span.trace_flags.sampled else None
            return self._propagator.extract({}) if random.random() < self.rate else None
        except Exception:
            log.debug("metadata of a request could not be read", exc_info=True)
            return None

    def flush(self, seconds: float) -> bool:
        return bool(self._provider.force_flush(int(seconds * 1e3)))

    def close(self) -> None:
        """Delivers what waits, for a moment; a receiver that is gone does not hold up a stopping server."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing-shutdown", daemon=True)
        thread.start()
        thread.join(_GOODBYE)


class Trace:
    """One request that is traced."""

    def __init__(self, tracing: Tracing, parent: Any) -> None:
        self._tracing, self._parent = tracing, parent
        self._begun, self._clock = time.time_ns(), time.perf_counter_ns()
        self._attributes: dict[str, Any] = {}
        self._stages: Durations | None = None
        self._error = ""

    def asked(self, request: InferRequest) -> None:
        self._attributes |= {
            "model.name": request.model[:_TEXT],
            "request.id": request.id[:_TEXT],
            "request.source": str(request.parameters.get("source", ""))[:_TEXT],
        }
        if request.version:
            self._attributes["request.version"] = request.version[:_TEXT]

    def answered(self, answer: Answer) -> None:
        self._attributes["model.version"] = answer.version
        self._attributes |= {f"model.{key}": value for key, value in answer.parameters.items() if value}
        self._stages = answer.stages

    def failed(self, code: str, reason: str, message: str) -> None:
        self._attributes |= {"rpc.grpc.status": code, "request.rejected": reason}
        self._error = message[:_TEXT]

    def finish(self) -> None:
        tracer, api = self._tracing._tracer, self._tracing._api
        end = self._begun + time.perf_counter_ns() - self._clock
        span = tracer.start_span(
            "ModelInfer",
            context=self._parent,
            kind=api.SpanKind.SERVER,
            attributes=self._attributes,
            start_time=self._begun,
        )
        if self._error:
            span.set_status(api.Status(api.StatusCode.ERROR, self._error))
        if self._stages is not None:
            inside = api.set_span_in_context(span, self._parent)
            at = self._begun
            for name in _STAGES:
                until = min(end, at + int(getattr(self._stages, name)))
                tracer.start_span(name, context=inside, start_time=at).end(until)
                at = until
        span.end(end)


class _Seldom(logging.Filter):
    """At most one line a minute: an exporter whose receiver is gone says so for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 60.0
        return True


def _quieten() -> None:
    for name in (
        "opentelemetry.exporter.otlp.proto.grpc.exporter",
        "opentelemetry.sdk.trace.export",
        "opentelemetry.sdk._shared_internal",
    ):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Seldom) for each in logger.filters):
            logger.addFilter(_Seldom())


def make(config: TracingConfig) -> Tracing | None:
    """None where no endpoint is named."""
    return Tracing(config) if config.endpoint else None
