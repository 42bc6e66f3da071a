"""Prometheus metrics, read from the server's own counters when somebody asks.

Nothing is counted twice and nothing costs the answer path.  Names of what Triton has are
Triton's (`nv_inference_*`); ours begin with `roadworthy_`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.accounts import Account
from runtime.events import Event, Subscription
from runtime.service import Service

_TRITON = (
    ("nv_inference_request_success", "Number of successful inference requests"),
    ("nv_inference_count", "Number of inferences performed"),
    ("nv_inference_exec_count", "Number of model executions performed"),
    ("nv_inference_request_duration_us", "Cumulative inference request duration in microseconds"),
    ("nv_inference_queue_duration_us", "Cumulative inference queuing duration in microseconds"),
    ("nv_inference_compute_input_duration_us", "Cumulative compute input duration in microseconds"),
    ("nv_inference_compute_infer_duration_us", "Cumulative compute inference duration in microseconds"),
    ("nv_inference_compute_output_duration_us", "Cumulative compute output duration in microseconds"),
)


class Metrics:
    """A collector; `serve` exports it over HTTP."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._transitions: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()
        self._events: Subscription = service.bus.subscribe(limit=65536)

    def collect(self) -> Iterator[Metric]:
        yield from self._accounts()
        yield from self._statistics()
        yield from self._models()
        yield from self._swaps()

    def _accounts(self) -> Iterator[Metric]:
        names = ("model",)
        accepted = CounterMetricFamily(
            "roadworthy_requests_accepted", "Requests that reached the service", labels=names
        )
        answered = CounterMetricFamily(
            "roadworthy_requests_answered", "Requests that were answered", labels=names
        )
        rejected = CounterMetricFamily(
            "roadworthy_requests_rejected",
            "Requests that were refused, by reason",
            labels=("model", "reason"),
        )
        in_flight = GaugeMetricFamily(
            "roadworthy_requests_in_flight", "accepted - answered - rejected", labels=names
        )
        failure = Metric("nv_inference_request_failure", "Number of failed inference requests", "unknown")
        accounts: list[tuple[str, Account]] = [("", self._service.account)]  # "" = the whole server
        accounts += [(name, host.account) for name, host in self._service.served().items()]
        for name, account in accounts:
            now = account.snapshot()
            accepted.add_metric((name,), now.accepted)
            answered.add_metric((name,), now.answered)
            in_flight.add_metric((name,), now.in_flight)
            failures: Counter[str] = Counter()
            for reason, count in now.rejected.items():
                rejected.add_metric((name, reason), count)
                failures[_triton_reason(reason)] += count
            for reason, count in failures.items():
                if name:
                    failure.add_sample(failure.name, {"model": name, "version": "", "reason": reason}, count)
        yield from (accepted, answered, rejected, in_flight, failure)

    def _statistics(self) -> Iterator[Metric]:
        # "unknown" because Triton's names lack the suffix that the library gives to counters
        families = {name: Metric(name, text, "unknown") for name, text in _TRITON}
        for model, host in self._service.served().items():
            for version, statistics in host.statistics().items():
                now = statistics.snapshot()
                values = (
                    now.success,
                    now.inferences,
                    now.executions,
                    now.success_ns / 1e3,
                    now.stages.queue / 1e3,
                    now.stages.compute_input / 1e3,
                    now.stages.compute_infer / 1e3,
                    now.stages.compute_output / 1e3,
                )
                for (name, _), value in zip(_TRITON, values, strict=True):
                    families[name].add_sample(name, {"model": model, "version": str(version)}, value)
        yield from families.values()

    def _models(self) -> Iterator[Metric]:
        def gauge(name: str, text: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(name, text, labels=("model",))

        ready = gauge("roadworthy_model_ready", "1 when a version is live")
        live = gauge("roadworthy_live_version", "The live version; 0 = none")
        previous = gauge("roadworthy_previous_version", "The version kept warm; 0 = none")
        frozen = gauge("roadworthy_frozen", "1 when flips are frozen")
        pinned = gauge("roadworthy_pinned", "1 when the live version is pinned")
        watching = gauge("roadworthy_watching", "1 inside the watch window of a flip")
        pending = gauge("nv_inference_pending_request_count", "Requests that wait for an engine")
        memory = gauge("roadworthy_declared_memory_bytes", "Memory declared for the loaded versions")
        families = (ready, live, previous, frozen, pinned, watching, pending, memory)
        for status in self._service.status():
            waiting = self._service.host(status.model).pending
            values = (
                status.ready,
                status.live,
                status.previous,
                status.frozen,
                status.pinned,
                status.watching,
                waiting,
                status.memory_bytes,
            )
            for family, value in zip(families, values, strict=True):
                family.add_metric((status.model,), float(value))
        yield from families
        dropped = CounterMetricFamily("roadworthy_tap_dropped", "Frames that tap subscribers lost")
        dropped.add_metric((), sum(s.dropped for s in self._service.tap.subscriptions))
        subscribers = GaugeMetricFamily("roadworthy_tap_subscribers", "Subscribers of the tap")
        subscribers.add_metric((), len(self._service.tap.subscriptions))
        yield from (dropped, subscribers)

    def _swaps(self) -> Iterator[Metric]:
        with self._lock:
            while (event := self._next()) is not None:
                self._transitions[(event.model, event.state.value, event.check)] += 1
            counts = dict(self._transitions)
        family = CounterMetricFamily(
            "roadworthy_swap_transitions",
            "Transitions of versions, by state and, for refusals, by check",
            labels=("model", "state", "check"),
        )
        for key, count in counts.items():
            family.add_metric(key, count)
        yield family

    def _next(self) -> Event | None:
        return self._events.get(timeout=0)


def _triton_reason(reason: str) -> str:
    if reason in ("queue-full", "timeout", "stale", "draining", "deadline"):
        return "REJECTED"
    return {"cancelled": "CANCELED", "engine": "BACKEND"}.get(reason, "OTHER")


def serve(metrics: Metrics, host: str, port: int) -> tuple[int, object]:
    """Starts the HTTP exporter; returns (port, server) where server.shutdown() ends it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics)
    server, _thread = start_http_server(port, host, registry)
    return server.server_port, server
