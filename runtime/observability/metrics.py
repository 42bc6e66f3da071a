"""Prometheus metrics, read from the server's own counters when they are requested.

Nothing is counted twice and nothing costs the answer path.  Names of what Triton has are
Triton's (`nv_inference_*`); ours begin with `roadworthy_`.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from runtime.events import Event, Subscription
from runtime.service import Service
from runtime.serving.counters import RequestCounters

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

_DRIFT = {"learning": 0.0, "in-domain": 1.0, "drifting": 2.0}
_REPORTED = {  # of the adapter's last report
    "adapter_report_timestamp_seconds": "When the adapter was heard last",
    "round": "The round of adaptation that is under way",
    "round_progress": "0..1 of it",
    "round_loss": "Its training loss now",
    "collection_on": "1 when the adapter keeps frames",
    "collection_frames": "Frames in its store",
    "collection_bytes": "Bytes of its store",
    "collection_dropped": "Frames that it lost or refused",
    "pseudo_label_share": "Share of the pixels that became pseudo-labels in the latest labelling",
}


class Metrics:
    """A collector; `serve` exports it over HTTP."""

    def __init__(self, service: Service, refused: Callable[[], dict[str, int]] = dict) -> None:
        """`refused`: {reason: calls that were refused before they reached the service}."""
        self._service = service
        self._refused = refused
        self._transitions: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()
        self._events: Subscription = service.bus.subscribe(limit=65536)

    def collect(self) -> Iterator[Metric]:
        yield from self._accounts()
        yield from self._statistics()
        yield from self._models()
        yield from self._swaps()
        yield from self._groups()
        yield from self._drift()
        yield from self._adaptation()

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
        accounts: list[tuple[str, RequestCounters]] = [("", self._service.account)]  # "" = the whole server
        accounts += [(name, host.account) for name, host in self._service.models.served().items()]
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
        refused = CounterMetricFamily(
            "roadworthy_calls_refused", "Calls that never reached the service, by reason", labels=("reason",)
        )
        for reason, count in self._refused().items():
            refused.add_metric((reason,), count)
        yield refused

    def _statistics(self) -> Iterator[Metric]:
        # "unknown" because Triton's names lack the suffix that the library gives to counters
        families = {name: Metric(name, text, "unknown") for name, text in _TRITON}
        for model, host in self._service.models.served().items():
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

        ready = gauge("roadworthy_model_ready", "1 when a version is live and answers")
        live = gauge("roadworthy_live_version", "The live version; 0 = none")
        previous = gauge("roadworthy_previous_version", "The version kept warm; 0 = none")
        frozen = gauge("roadworthy_frozen", "1 when flips are frozen")
        pinned = gauge("roadworthy_pinned", "1 when the live version is pinned")
        watching = gauge("roadworthy_watching", "1 inside the watch window of a flip")
        pending = gauge("nv_inference_pending_request_count", "Requests that wait for an engine")
        memory = gauge("roadworthy_declared_memory_bytes", "Memory declared for the loaded versions")
        hung = gauge("roadworthy_hung", "1 when a run of a loaded version has not come back (engine.hang)")
        longest = gauge("roadworthy_longest_run_seconds", "Age of the oldest run in progress; 0 = none")
        families = (ready, live, previous, frozen, pinned, watching, pending, memory, hung, longest)
        for status in self._service.admin.status():
            host = self._service.models.host(status.model)
            oldest = min((job.started for job, _ in host.runs()), default=None)
            values = (
                status.ready,
                status.live,
                status.previous,
                status.frozen,
                status.pinned,
                status.watching,
                host.pending,
                status.memory_bytes,
                any(slot.hung for slot in host.loaded()),
                (time.monotonic_ns() - oldest) / 1e9 if oldest is not None else 0.0,
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

    def _groups(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("roadworthy_group_ready", "1 when the group answers", labels=("group",))
        generation = GaugeMetricFamily(
            "roadworthy_group_generation", "The live generation of a frame group; 0 = none", labels=("group",)
        )
        for name, group in self._service.models.groups().items():
            status = group.status()
            ready.add_metric((name,), float(status.ready))
            generation.add_metric((name,), status.generation)
        yield from (ready, generation)

    def _drift(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "roadworthy_drift_state", "0 learning, 1 in-domain, 2 drifting", labels=("model", "source")
        )
        ratio = GaugeMetricFamily(
            "roadworthy_drift_statistic_ratio",
            "The drift test's statistic over its threshold: an alarm from 1 on",
            labels=("model", "source", "signal"),
        )
        names = ("model",)
        alarms = CounterMetricFamily("roadworthy_drift_alarms", "Alarms of the drift monitor", labels=names)
        looked = CounterMetricFamily("roadworthy_drift_frames", "Answers it looked at", labels=names)
        dropped = CounterMetricFamily("roadworthy_drift_dropped", "Answers it was too slow for", labels=names)
        for model in self._service.models.hosts():
            found = self._service.monitors.status(model)
            if found is None:
                continue
            status, _ = found
            alarms.add_metric((model,), status.alarms)
            looked.add_metric((model,), status.frames)
            dropped.add_metric((model,), status.dropped)
            for source in status.sources:
                state.add_metric((model, source.source), _DRIFT[source.state])
                for signal in source.signals:
                    if signal.threshold > 0:
                        labels = (model, source.source, signal.name)
                        ratio.add_metric(labels, signal.statistic / signal.threshold)
        yield from (state, ratio, alarms, looked, dropped)

    def _adaptation(self) -> Iterator[Metric]:
        connected = GaugeMetricFamily(
            "roadworthy_adapter_connected", "1 when an adapter of the model is connected", labels=("model",)
        )
        said = {
            key: GaugeMetricFamily(f"roadworthy_{key}", text, labels=("model",))
            for key, text in _REPORTED.items()
        }
        thresholds = GaugeMetricFamily(
            "roadworthy_pseudo_label_threshold",
            "The confidence from which a pixel of the class is a pseudo-label",
            labels=("model", "class"),
        )
        for model in self._service.models.hosts():
            adapter = self._service.adapters.connected(model)
            connected.add_metric((model,), float(adapter is not None))
            if adapter is None:
                continue
            report = adapter.report
            collection, labels = report.get("collection", {}), report.get("pseudo_labels", {})
            values = {
                "adapter_report_timestamp_seconds": adapter.reported,
                "round": report.get("round", {}).get("round"),
                "round_progress": report.get("round", {}).get("progress"),
                "round_loss": report.get("round", {}).get("loss"),
                "collection_on": collection.get("on", False) if collection else None,
                "collection_frames": collection.get("kept", 0) if collection else None,
                "collection_bytes": collection.get("bytes", 0) if collection else None,
                "collection_dropped": collection.get("dropped", 0) if collection else None,
                "pseudo_label_share": labels.get("labelled", 0.0) if labels else None,
            }
            for key, value in values.items():
                if value is not None:
                    said[key].add_metric((model,), float(value))
            classes = labels.get("classes", [])
            by_class = {each.get("name", ""): each.get("threshold", 0.0) for each in classes}
            for label, threshold in by_class.items():
                thresholds.add_metric((model, label), threshold)
        finished = CounterMetricFamily(
            "roadworthy_rounds_finished", "Rounds of adaptation, by outcome", labels=("model", "state")
        )
        for outcome, count in self._service.adapters.finished().items():
            finished.add_metric(outcome, count)
        yield from (connected, *said.values(), thresholds, finished)

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
