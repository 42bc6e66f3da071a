"""The service without a transport: the answers to requests, and the metadata of models.

Every function takes and returns plain Python values and raises ServiceError; `runtime/rpc` only converts.
What operators do is in `runtime/admin.py`.  Knows no protobuf.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from runtime.adapter_registry import Adapters
from runtime.admin import Admin
from runtime.config import ServerConfig, unlikely
from runtime.drift.monitors import DriftMonitors
from runtime.errors import Code, ServiceError
from runtime.events import Bus
from runtime.listen import is_local
from runtime.model_registry import ModelRegistry
from runtime.observability import tracing
from runtime.repository.lock import RepositoryLock
from runtime.repository.repository import Repository
from runtime.repository.signing import public_key
from runtime.serving.counters import RequestCounters
from runtime.serving.hung_runs import HungRunDetector
from runtime.serving.memory_budget import MemoryBudget
from runtime.serving.request import Answer, InferRequest, parse_version
from runtime.serving.served_model import ServedModel
from runtime.serving.slot import Slot
from runtime.serving.tap import Tap
from runtime.shared_memory.sweep import sweep
from runtime.shared_memory.system import Memory, ShmRef, ShmRegistry
from runtime.tensors import raw

log = logging.getLogger("roadworthy.service")
EXTENSIONS = (
    "classification",
    "model_repository",
    "model_configuration",
    "system_shared_memory",
    "cuda_shared_memory",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
    "roadworthy.v1",
)


class Service:
    """Serves the models of one repository.  `models`: all of them by name.  `admin`: what operators do."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.repository = Repository(config.repository, read_only=config.read_only)
        self._exclusive: RepositoryLock | None = None
        self.account = RequestCounters()
        self.bus = Bus()
        self.tap = Tap(config.tap)
        memory = config.shared_memory
        allowed = memory.allow == "on" or (memory.allow == "auto" and is_local(config.host))
        self.regions = ShmRegistry(allowed=allowed, prefix=memory.prefix)
        self.ledger = MemoryBudget(config.guard)
        self.adapters = Adapters()
        self.monitors = DriftMonitors(config.drift, self.repository, self.bus)
        self.tracing: tracing.Tracing | None = None
        self.started = time.monotonic()
        self.draining = False
        self.models = ModelRegistry(config, self.repository, self.bus, self.ledger, self._observe)
        self.admin = Admin(self.models, self.repository, self.ledger, lambda: self.draining)
        self._hangs = HungRunDetector(
            lambda: self.models.hosts().values(), config.engine.hang or 1e9, self._report_hang
        )

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Deletes what killed writers left, and loads the last live version of every model.

        Raises ConfigError if a trusted key cannot be read, or if another server has the repository.
        """
        if not self.config.read_only:
            self._exclusive = RepositoryLock.acquire(self.repository.path)
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self._warn()
        self.tracing = tracing.make(self.config.tracing)
        for key in self.config.security.trusted_keys:
            public_key(key)
        for path in [] if self.config.read_only else self.repository.sweep():
            log.info("swept %s", path.name)
        for name in sweep():
            log.info("swept %s from /dev/shm", name)
        self.models.start()
        if self.config.engine.hang > 0:
            self._hangs.start()

    def _warn(self) -> None:
        for line in unlikely(self.config):
            log.warning("%s", line)

    def _observe(self, host: ServedModel) -> None:
        host.observe(self.tap)
        self.monitors.follow(host)

    def _report_hang(self, model: str, version: int, what: str) -> None:
        self.models.controllers()[model].note(version, "hang", what)

    def configure(self, config: ServerConfig) -> list[str]:
        """Applies [guard], [shadow], [watch], [swap], [drift] and keep_versions, and reads every config.pbtxt
        again.

        Returns the other keys that differ: they need a restart.
        """
        taken = ("guard", "shadow", "watch", "swap", "drift", "keep_versions")
        names = [field.name for field in dataclasses.fields(config)]
        different = [n for n in names if n not in taken and getattr(config, n) != getattr(self.config, n)]
        self.config = dataclasses.replace(self.config, **{name: getattr(config, name) for name in taken})
        self._warn()
        self.ledger.configure(config.guard)
        self.monitors.configure(config.drift)
        self.models.configure(self.config)
        return different

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits for those in flight; returns False if time runs out."""
        self.draining = True
        self.models.stop()
        self.adapters.close()
        idle = self.account.wait_idle(timeout)
        self.tap.close()
        self.bus.close()
        return idle

    def close(self) -> None:
        self._hangs.stop()
        self.monitors.close()
        self.regions.close()
        if self.tracing is not None:
            self.tracing.close()
        for host in self.models.hosts().values():
            host.unload("the server has stopped")
        if self._exclusive is not None:
            self._exclusive.release()

    @property
    def extensions(self) -> tuple[str, ...]:
        """The extensions that ServerMetadata lists."""
        memory = () if self.regions.allowed else ("system_shared_memory", "cuda_shared_memory")
        return tuple(name for name in EXTENSIONS if name not in memory)

    # -- requests --------------------------------------------------------------------

    def infer(
        self,
        request: InferRequest,
        *,
        deadline: float | None = None,
        on_job: Callable[[Callable[[], None]], None] | None = None,
    ) -> Answer:
        """Answers one request and counts it, however it ends.  Raises ServiceError."""
        return self.accounted(request.model, lambda: self._answer(request, deadline, on_job))

    def _answer(
        self,
        request: InferRequest,
        deadline: float | None,
        on_job: Callable[[Callable[[], None]], None] | None,
    ) -> Answer:
        parse_version(request.version)
        host = self.models.answering(request.model)
        held: list[Memory] = []
        try:
            for tensor in request.inputs:
                if isinstance(tensor.data, ShmRef):
                    region = self.regions.hold(tensor.data)
                    held.append(region)
                    tensor.data = region.read(tensor.data)
            places: dict[str, tuple[ShmRef, Memory]] = {}
            for output in request.outputs:
                if output.place is not None:
                    region = self.regions.hold(output.place)
                    held.append(region)
                    places[output.name] = (output.place, region)
            answer = host.infer(request, deadline=deadline, on_job=on_job)
            for name, kind, array in answer.outputs:
                if name in places:
                    place, region = places[name]
                    _write(region, place, name, raw(kind, array))
                    answer.places[name] = place
            return answer
        finally:
            for region in held:
                region.release()

    def accounted(self, model: str, answer: Callable[[], Answer]) -> Answer:
        """Runs `answer` and counts its end for the server and, if it is known, for the model."""
        host = self.models.find(model)
        accounts = [self.account] if host is None else [self.account, host.account]
        for account in accounts:
            account.accept()
        reason = "internal"
        try:
            if self.draining:
                raise ServiceError(
                    Code.UNAVAILABLE, "the server is shutting down; send to another", "draining"
                )
            result = answer()
        except ServiceError as error:
            reason = error.reason
            raise
        except Exception as error:
            log.exception("request for %s", model[:80])
            raise ServiceError(Code.INTERNAL, f"{type(error).__name__}: {error}"[:400], "internal") from error
        else:
            reason = ""
            return result
        finally:
            for account in accounts:
                account.reject(reason) if reason else account.answer()

    # -- metadata --------------------------------------------------------------------

    def ready(self) -> bool:
        """Returns whether every model (at least one) has a live version that answers, or was unloaded on
        request (as Triton defines it), and the server is not draining.
        """
        hosts = self.models.served().values()
        well = all(host.is_unloaded or (host.live is not None and not host.stuck) for host in hosts)
        return bool(hosts) and not self.draining and well

    def model_ready(self, model: str, version: str) -> bool:
        """Returns whether the version answers.  As with Triton, an unknown model is no error; a malformed
        version raises ServiceError.
        """
        parse_version(version)
        host = self.models.served().get(model)
        if host is None or self.draining:
            return False
        try:
            return not host.slot(version).hung and not host.stuck
        except ServiceError:
            return False

    def slot(self, model: str, version: str) -> Slot:
        """Returns the slot that would answer.  Raises ServiceError (as Triton: version, model, loaded)."""
        parse_version(version)
        return self.models.answering(model).slot(version)

    def properties(self, slot: Slot) -> dict[str, str]:
        """Returns the properties of ModelMetadata beyond Triton's: classes, colours, lineage."""
        manifest = slot.manifest
        pack = manifest.get("pack") or {}
        adaptation = manifest.get("adaptation") or {}
        values: dict[str, Any] = {
            "classes": list(slot.classes),
            "colours": manifest.get("colours") or [],
            "task": manifest.get("task", ""),
            "edge_classes": manifest.get("edge_classes") or "",
            "edge_thresholds": manifest.get("edge_thresholds") or "",
            "members": manifest.get("members") or "",
            "pack": pack.get("sha256", ""),
            "pack_name": pack.get("name", ""),
            "parent": pack.get("parent", ""),
            "round": adaptation.get("round", ""),
            "precision": slot.provenance.precision,
            "digest": manifest.get("digest", ""),
        }
        return {
            k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for k, v in values.items()
            if v != ""
        }


def _write(region: Memory, place: ShmRef, name: str, content: bytes | memoryview) -> None:
    if len(content) > place.byte_size:
        raise ServiceError(
            Code.INTERNAL,
            f"shared memory size specified with the request for output '{name}' ({place.byte_size} bytes) "
            f"should be at least {len(content)} bytes to hold the results",
            "shared-memory",
        )
    region.write(place, content)


def server_version() -> str:
    try:
        return importlib.metadata.version("roadworthy")
    except importlib.metadata.PackageNotFoundError:
        return "0"
