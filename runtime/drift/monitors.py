"""One drift monitor a model, beside the answers: it follows the live version and tells the bus.

`runtime.drift` has the signals and the test.  This module says which classes and which reference a monitor
looks at: those of the version that is live.  Nothing here can delay or fail an answer.
"""

from __future__ import annotations

import io
import logging
import threading
from typing import Any

import numpy as np

from common import files
from runtime.drift.config import DriftConfig, DriftStatus, SourceStatus
from runtime.drift.monitor import DriftMonitor
from runtime.events import Bus, Event, State, Subscription
from runtime.repository.repository import Repository
from runtime.serving.served_model import ServedModel
from runtime.tensors import Array

log = logging.getLogger("roadworthy.drift")
REFERENCE = "reference.npz"
_LIMIT = 64 << 20  # bytes of a reference.npz
_PERIOD = 1.0  # seconds between two looks at which versions are live, where no event wakes it


class DriftMonitors:
    """`follow(host)` for each model; `status(model)` is None where nothing is watched."""

    def __init__(self, config: DriftConfig, repository: Repository, bus: Bus) -> None:
        self._config = config
        self._repository = repository
        self._bus = bus
        self._lock = threading.Lock()
        self._hosts: dict[str, ServedModel] = {}
        self._monitors: dict[str, tuple[DriftMonitor, int, int]] = {}  # monitor, classes, version
        self._refreshing = threading.Lock()
        self._closed = False
        self._events: Subscription = bus.subscribe(limit=1)
        self._thread: threading.Thread | None = None

    def follow(self, host: ServedModel) -> None:
        """From now on the model's live version is watched, whichever it is."""
        with self._lock:
            self._hosts[host.name] = host
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="drift-versions", daemon=True)
                self._thread.start()

    def status(self, model: str) -> tuple[DriftStatus, int] | None:
        """(what its monitor says, the version it watches); None where there is none."""
        with self._lock:
            found = self._monitors.get(model)
        return None if found is None else (found[0].status(), found[2])

    def why_not(self, model: str) -> str:
        """Why a model is not watched."""
        host = self._hosts.get(model)
        if not self._config.enabled:
            return "drift.enabled is false"
        if host is None or host.live is None:
            return "no version is live"
        return "the live version gives neither labels nor edges"

    def configure(self, config: DriftConfig) -> None:
        """Replaces the settings; every monitor starts again if they changed."""
        with self._lock:
            changed, self._config = config != self._config, config
            hosts = list(self._hosts.values())
        if changed:
            for host in hosts:
                self._refresh_monitor(host, restart=True)

    def close(self) -> None:
        self._closed = True
        self._bus.unsubscribe(self._events)
        with self._refreshing, self._lock:
            monitors, self._monitors = list(self._monitors.items()), {}
        for model, (monitor, _, _) in monitors:
            self._hosts[model].unobserve(monitor)
            monitor.close()

    # -- versions --------------------------------------------------------------------

    def _follow(self) -> None:
        """Events wake it; a version that comes to be live without one (at a start) is seen soon after."""
        while not self._events.closed:  # by `close`, or with the bus
            with self._lock:
                hosts = list(self._hosts.values())
            for host in hosts:
                try:
                    self._refresh_monitor(host)
                except Exception:
                    log.exception("drift of %s", host.name)
            self._events.get(timeout=_PERIOD)

    def _refresh_monitor(self, host: ServedModel, *, restart: bool = False) -> None:
        """Makes the monitor of the model watch its live version."""
        with self._refreshing:
            self._refresh_locked(host, restart)

    def _refresh_locked(self, host: ServedModel, restart: bool) -> None:
        if self._closed:
            return
        slot = host.live
        with self._lock:
            found = self._monitors.get(host.name)
        classes = 0 if slot is None else _classes(slot)
        if slot is None or not classes or not self._config.enabled:
            if found is not None:
                self._set(host, found, None)
            return
        if found is not None and found[2] == slot.version and not restart:
            return
        reference = self._reference(host.name, slot.version, classes)
        if found is not None and found[1] == classes and not restart:
            found[0].reset(f"version {slot.version} is live", reference=reference)
            with self._lock:
                self._monitors[host.name] = (found[0], classes, slot.version)
            return
        monitor = DriftMonitor(
            host.name, classes, reference, self._config, on_change=lambda status: self._tell(host, status)
        )
        self._set(host, found, (monitor, classes, slot.version))

    def _set(
        self,
        host: ServedModel,
        old: tuple[DriftMonitor, int, int] | None,
        new: tuple[DriftMonitor, int, int] | None,
    ) -> None:
        with self._lock:
            if new is None:
                self._monitors.pop(host.name, None)
            else:
                self._monitors[host.name] = new
        if new is not None:
            host.observe(new[0])
        if old is not None:
            host.unobserve(old[0])
            old[0].close()

    def _reference(self, model: str, version: int, classes: int) -> dict[str, Array] | None:
        """The version's reference statistics, where it brings any that fit."""
        path = self._repository.directory(model, version) / REFERENCE
        try:
            content = files.read_file(path, _LIMIT)
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                share, confidence = arrays["share"], arrays["confidence"]
        except FileNotFoundError:
            return None
        except Exception as error:  # the hashes of a version say nothing of what a reference is made of
            log.warning("%s version %s: %s cannot be used: %s", model, version, REFERENCE, error)
            return None
        if share.shape != (classes,) or confidence.shape != (classes, 256):
            log.warning("%s version %s: %s is of other classes", model, version, REFERENCE)
            return None
        return {"share": share.astype(np.float64), "confidence": confidence.astype(np.int64)}

    def _tell(self, host: ServedModel, status: SourceStatus) -> None:
        """Publishes an event to watchers and a line to the log; the history contains versions only."""
        live = host.live
        detail: dict[str, Any] = {
            "source": status.source,
            "state": status.state,
            "signals": [signal.name for signal in status.signals if signal.alarmed],
        }
        where = f" of '{status.source}'" if status.source else ""
        reason = f"frames{where} are {status.state}" + (f": {status.reason}" if status.reason else "")
        log.info("%s: %s", host.name, reason)
        version = live.version if live is not None else 0
        self._bus.publish(Event(host.name, version, State.NOTE, "drift", reason, detail))


def _classes(slot: Any) -> int:
    """How many classes a slot's answers have, 0 where the monitor has nothing to look at."""
    names = [output.name for output in slot.engine.spec.outputs]
    if "labels" in names:
        return len(slot.classes)
    edges = slot.manifest.get("edge_classes") or slot.manifest.get("classes") or []
    return len(edges) if "edge_bits" in names else 0
