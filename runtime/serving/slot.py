"""A slot: one version with its engine, and the count of requests that hold it.

Knows an engine and its provenance; knows nothing of who is live.  A slot never changes:
a new version is a new slot, and what changes is one reference in the model host.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

from runtime.checks import task
from runtime.engines import Engine
from runtime.tensors import Array


@dataclass(frozen=True)
class Provenance:
    """The parameters of an answer that name its version."""

    pack: str
    engine: str
    precision: str
    round: str

    @classmethod
    def of(cls, manifest: dict[str, Any], engine: Engine) -> Provenance:
        pack = manifest.get("pack") or {}
        adaptation = manifest.get("adaptation") or {}
        return cls(
            pack=str(pack.get("sha256", "")),
            engine=engine.spec.kind,
            precision=engine.spec.precision,
            round=str(adaptation.get("round", "")),
        )

    def parameters(self) -> dict[str, str]:
        return {"pack": self.pack, "engine": self.engine, "precision": self.precision, "round": self.round}


class Slot:
    """Ref-counted: `hold` before a run, `release` after it; a retired slot closes after its last release."""

    def __init__(self, version: int, engine: Engine, manifest: dict[str, Any]) -> None:
        self.version = version
        self.engine = engine
        self.manifest = manifest
        self.provenance = Provenance.of(manifest, engine)
        self.task = task.of(engine.spec, manifest)  # None: a network that is foreign to the graph contract
        batching = manifest.get("batching")
        self.classes: tuple[str, ...] = tuple(manifest.get("classes") or ())
        self.run_ms: deque[float] = deque(maxlen=256)  # wall time of the last runs; appended without a lock
        self.cpu_ms: deque[float] = deque(maxlen=256)
        self.failures = 0  # requests that the engine failed
        self.failed_on: tuple[dict[str, Array], tuple[str, ...]] | None = None  # the last run that it failed
        #: Requests may share a run: rows out are rows in, and depend on no other row.  False if the build saw
        #: that they do (`batching.independent` of the manifest), or if verification or a run shows it.
        self.shares = not (isinstance(batching, dict) and batching.get("independent") is False)
        self.hung = False  # a run of it has not come back (runtime/serving/hung_runs.py)
        self._lock = threading.Lock()
        self._held = 0
        self._retired = False
        self._closed = threading.Event()

    def hold(self) -> bool:
        """Adds a reference; returns False if the slot is retired and must not be used."""
        with self._lock:
            if self._retired:
                return False
            self._held += 1
            return True

    def hold_again(self) -> None:
        """Adds a reference on behalf of a current holder; valid even after retirement."""
        with self._lock:
            assert self._held > 0, "the slot has no holder"
            self._held += 1

    def release(self) -> None:
        with self._lock:
            self._held -= 1
            close = self._retired and self._held == 0
        if close:
            self._close()

    def retire(self) -> None:
        """No new references; closes the engine when the last one is released."""
        with self._lock:
            if self._retired:
                return
            self._retired = True
            close = self._held == 0
        if close:
            self._close()

    def wait_closed(self, timeout: float) -> bool:
        return self._closed.wait(timeout)

    @property
    def held(self) -> int:
        with self._lock:
            return self._held

    def _close(self) -> None:
        self.engine.close()
        self._closed.set()
