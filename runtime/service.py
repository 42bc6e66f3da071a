"""The service, without a transport: what a call means.

Everything here takes and gives plain Python values and raises ServiceError; the gRPC
edge only converts.  Knows no protobuf.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.adapter_registry import Adapters
from runtime.config import ServerConfig, unlikely
from runtime.drift.monitors import Monitors
from runtime.engines import scratch
from runtime.errors import Code, ConfigError, Refused, ServiceError
from runtime.events import Bus, Event
from runtime.labels import Labels
from runtime.listen import is_local
from runtime.observability import tracing
from runtime.repository.lock import Exclusive
from runtime.repository.repository import Repository
from runtime.repository.signing import public_key
from runtime.serving import batching
from runtime.serving.counters import Account
from runtime.serving.frame_group import FrameGroup
from runtime.serving.hung_runs import Hangs
from runtime.serving.memory_budget import Ledger
from runtime.serving.served_model import Answer, InferRequest, ModelHost, parse_version
from runtime.serving.slot import Slot
from runtime.serving.tap import Tap
from runtime.shared_memory.system import Memory, Place, Regions
from runtime.swap.controller import SwapController, Ticket, steer
from runtime.swap.group_controller import GroupController, GroupTicket
from runtime.swap.scope import Free, Ties
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


@dataclass(frozen=True)
class ModelStatus:
    model: str
    ready: bool
    reason: str
    live: int
    previous: int
    pinned: bool
    frozen: bool
    frozen_reason: str
    candidate: int
    candidate_state: str
    watching: bool
    memory_bytes: int
    account: Account


class Service:
    """The models of one repository."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.repository = Repository(config.repository, read_only=config.read_only)
        self._exclusive: Exclusive | None = None
        self.account = Account()
        self.bus = Bus()
        self.tap = Tap(config.tap)
        memory = config.shared_memory
        allowed = memory.allow == "on" or (memory.allow == "auto" and is_local(config.host))
        self.regions = Regions(allowed=allowed, prefix=memory.prefix)
        self.ledger = Ledger(config.guard)
        self.adapters = Adapters()
        self.monitors = Monitors(config.drift, self.repository, self.bus)
        self.tracing: tracing.Tracing | None = None
        self._overrides: dict[str, Any] = {}
        self.started = time.monotonic()
        self.draining = False
        self._lock = threading.Lock()
        self._hosts: dict[str, ModelHost] = {}
        self._controllers: dict[str, SwapController] = {}
        self._hangs = Hangs(lambda: self.hosts().values(), config.engine.hang or 1e9, self._tell_hang)
        self._groups = {
            name: GroupController(name, members, self.repository, config, self.bus)
            for name, members in config.groups.items()
        }

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Sweeps what killed writers left and brings up the last live version of every model.

        Raises ConfigError when a trusted key cannot be read, or when another server has the repository.
        """
        if not self.config.read_only:
            self._exclusive = Exclusive.take(self.repository.path)
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
        for name in scratch.sweep():
            log.info("swept %s from /dev/shm", name)
        models = self.repository.models()
        self._check_chosen(models)
        for name, group in self._groups.items():
            if name in models:  # whoever can publish could keep the server from starting otherwise
                log.error("the model '%s' has the name of a group and is not served; rename the group", name)
                models.remove(name)
            for model in group.members:
                if model in models and self._chosen_to_serve(model):
                    self._open(model)
            group.start()
        for model in models:
            if self._chosen_to_serve(model) and model not in self._controllers:
                self._open(model).start()
        if self.config.engine.hang > 0:
            self._hangs.start()

    def _check_chosen(self, there: list[str]) -> None:
        """A name of the configuration that is not in the repository may be published later, or mistyped.

        Raises ConfigError where a model of nearly that name is there and is not named itself.
        """
        members = [member for group in self._groups.values() for member in group.members]
        named = {*self.config.models, *members}
        for name in sorted(named - set(there)):
            key = "models" if name in self.config.models else "groups"
            near = difflib.get_close_matches(name, [other for other in there if other not in named], n=1)
            if near:
                raise ConfigError(
                    f"{key}: '{name}' is not in the repository '{self.config.repository}'; "
                    f"did you mean '{near[0]}'?"
                )
            log.warning("%s: '%s' is not in the repository; it is served when it is published", key, name)

    def _warn(self) -> None:
        for line in unlikely(self.config):
            log.warning("%s", line)

    def _tell_hang(self, model: str, version: int, what: str) -> None:
        self.controllers()[model].note(version, "hang", what)

    def configure(self, config: ServerConfig) -> list[str]:
        """Takes [guard], [shadow], [watch], [swap], [drift] and keep_versions, and reads every config.pbtxt
        again.

        Returns the other keys that differ: they need a new start.
        """
        taken = ("guard", "shadow", "watch", "swap", "drift", "keep_versions")
        names = [field.name for field in dataclasses.fields(config)]
        different = [n for n in names if n not in taken and getattr(config, n) != getattr(self.config, n)]
        self.config = dataclasses.replace(self.config, **{name: getattr(config, name) for name in taken})
        self._warn()
        self.ledger.configure(config.guard)
        self.monitors.configure(config.drift)
        for group in self._groups.values():
            group.configure(self.config)
        for name, host in self.hosts().items():
            self._configure(name, host)
        for controller in self.controllers().values():
            controller.configure(self.config)
        return different

    def declared(self, model: str) -> Any | None:
        """What the model's last load gave, else its config.pbtxt; None where neither can be used."""
        if model in self._overrides:
            return self._overrides[model]
        return batching.declared(self.repository.path / model / "config.pbtxt")

    def _configure(self, model: str, host: ModelHost) -> None:
        declared = self.declared(model)
        files = batching.label_files(declared)
        labels = Labels(self.repository.path / model, files)
        host.configure(batching.plan(declared, self.config.queue), labels)

    def override(self, model: str, config: Any | None) -> None:
        """A configuration in the place of config.pbtxt, until the next load or start; None ends it."""
        had = self._overrides.pop(model, None)
        if config is not None:
            self._overrides[model] = config
        if config is not None or had is not None:
            self._configure(model, self.host(model))

    def drain(self, timeout: float) -> bool:
        """Refuses what is new and waits for what is in flight; False when it did not finish in time."""
        self.draining = True
        for group in self._groups.values():
            group.stop()
        for controller in self.controllers().values():
            controller.stop()
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
        for host in self.hosts().values():
            host.unload("the server has stopped")
        if self._exclusive is not None:
            self._exclusive.release()

    @property
    def extensions(self) -> tuple[str, ...]:
        """What ServerMetadata names."""
        memory = () if self.regions.allowed else ("system_shared_memory", "cuda_shared_memory")
        return tuple(name for name in EXTENSIONS if name not in memory)

    # -- models ----------------------------------------------------------------------

    def hosts(self) -> dict[str, ModelHost]:
        with self._lock:
            return dict(self._hosts)

    def controllers(self) -> dict[str, SwapController]:
        with self._lock:
            return dict(self._controllers)

    def groups(self) -> dict[str, GroupController]:
        return dict(self._groups)

    def group(self, name: str) -> GroupController:
        """Raises ServiceError(NOT_FOUND)."""
        if name not in self._groups:
            known = ", ".join(self._groups) or "none; [groups] in the configuration makes one"
            raise ServiceError(
                Code.NOT_FOUND, f"there is no group '{name[:200]}'; groups: {known}", "unknown-model"
            )
        return self._groups[name]

    def served(self) -> dict[str, ModelHost | FrameGroup]:
        """Everything that answers requests, by the name that a request gives."""
        return {**self.hosts(), **{name: group.host for name, group in self._groups.items()}}

    def answering(self, name: str) -> ModelHost | FrameGroup:
        """The model or group of that name.  Raises ServiceError(NOT_FOUND)."""
        group = self._groups.get(name)
        return group.host if group is not None else self.host(name)

    def host(self, model: str) -> ModelHost:
        host = self._hosts.get(model)
        if host is None:
            raise ServiceError(
                Code.NOT_FOUND, f"Request for unknown model: '{model[:200]}' is not found", "unknown-model"
            )
        return host

    def controller(self, model: str) -> SwapController:
        """The controller of a served model, or of one that has appeared in the repository since the start."""
        controller = self._controllers.get(model)
        if controller is not None:
            return controller
        if model in self._groups:
            message = f"'{model}' is a frame group: submit its members' versions, to it or to one of them"
            raise ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
        try:
            known = bool(self.repository.versions(model))
        except ValueError as error:
            raise ServiceError(Code.INVALID_ARGUMENT, str(error), "invalid") from error
        if not known or not self._chosen_to_serve(model):
            raise ServiceError(
                Code.NOT_FOUND,
                f"'{model}' is not in the repository; publish a version first",
                "unknown-model",
            )
        return self._open(model)

    def _chosen_to_serve(self, model: str) -> bool:
        return not self.config.models or model in self.config.models

    def _open(self, model: str) -> SwapController:
        with self._lock:
            if model not in self._controllers:
                group = next((g for g in self._groups.values() if model in g.members), None)
                ties: Ties = group or Free()
                host = ModelHost(model, self.config, ties.slots)
                self._configure(model, host)
                host.observe(self.tap)
                self.monitors.follow(host)
                self._hosts[model] = host
                self.ledger.add(host)
                self._controllers[model] = SwapController(
                    host, self.repository, self.config, self.bus, self.ledger, ties
                )
                if group is not None:
                    group.join(self._controllers[model])
            return self._controllers[model]

    # -- requests --------------------------------------------------------------------

    def infer(
        self,
        request: InferRequest,
        *,
        deadline: float | None = None,
        on_job: Callable[[Callable[[], None]], None] | None = None,
    ) -> Answer:
        """One request, accounted for whatever happens.  Raises ServiceError."""
        return self.accounted(request.model, lambda: self._answer(request, deadline, on_job))

    def _answer(
        self,
        request: InferRequest,
        deadline: float | None,
        on_job: Callable[[Callable[[], None]], None] | None,
    ) -> Answer:
        parse_version(request.version)
        host = self.answering(request.model)
        held: list[Memory] = []
        try:
            for tensor in request.inputs:
                if isinstance(tensor.data, Place):
                    region = self.regions.hold(tensor.data)
                    held.append(region)
                    tensor.data = region.read(tensor.data)
            places: dict[str, tuple[Place, Memory]] = {}
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
        """Runs `answer` inside the accounts of the server and, where it is known, of the model."""
        group = self._groups.get(model)
        host = group.host if group is not None else self._hosts.get(model)
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
        """Every model (and there is at least one) has a live version that answers, or was unloaded on
        somebody's word, as Triton has it; and the server is not draining.
        """
        hosts = self.served().values()
        well = all(host.is_unloaded or (host.live is not None and not host.stuck) for host in hosts)
        return bool(hosts) and not self.draining and well

    def model_ready(self, model: str, version: str) -> bool:
        """As Triton: an unknown model is not ready, which is no error; a malformed version is."""
        parse_version(version)
        host = self.served().get(model)
        if host is None or self.draining:
            return False
        try:
            return not host.slot(version).hung and not host.stuck
        except ServiceError:
            return False

    def slot(self, model: str, version: str) -> Slot:
        """The slot that would answer; raises ServiceError in Triton's order: version, model, loaded."""
        parse_version(version)
        return self.answering(model).slot(version)

    def properties(self, slot: Slot) -> dict[str, str]:
        """What ModelMetadata says beyond Triton: classes, colours, lineage."""
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

    # -- control ---------------------------------------------------------------------

    def status(self, model: str = "") -> list[ModelStatus]:
        controllers = self.controllers()
        if model in self._groups:
            controllers = {n: c for n, c in controllers.items() if n in self._groups[model].members}
        elif model:
            controllers = {model: self.controller(model)}
        return [_status(controller, self.ledger) for _, controller in sorted(controllers.items())]

    def submit(self, model: str, version: int, *, shadow: bool = True) -> Ticket:
        if self.draining:
            raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
        if version < 1:
            raise ServiceError(Code.INVALID_ARGUMENT, f"version {version}: versions count from 1", "invalid")
        return self.controller(model).submit(version, shadow=shadow)

    def submit_group(self, group: str, members: Mapping[str, int], *, shadow: bool = True) -> GroupTicket:
        """Versions of some or all members, to become live together or not at all.  Raises ServiceError."""
        if self.draining:
            raise ServiceError(Code.UNAVAILABLE, "the server is shutting down", "draining")
        controller = self.group(group)
        for model in members:
            if model in controller.members:
                self.controller(model)  # one that has appeared since the start
        return controller.submit(members, shadow=shadow)

    def rollback(self, model: str) -> Event:
        return self.controller(model).rollback()

    def reset(self, model: str) -> Ticket:
        """Back to the released pack: the newest version that no round of adaptation made and that was neither
        refused nor rolled back, made live on an operator's word.  Raises ServiceError when there is none.
        """
        out = self.controller(model).out()
        for number in reversed(self.repository.versions(model)):
            try:
                adapted = bool(self.repository.manifest(model, number).get("adaptation"))
            except Refused:
                continue
            if not adapted and number not in out:
                return self.submit(model, number, shadow=False)
        message = (
            f"'{model}' has no version built of a released pack that was not refused or rolled back; "
            "build one with export.build, or promote one by its number"
        )
        raise ServiceError(Code.FAILED_PRECONDITION, message, "state")

    def prune(self, model: str, keep: int = 0) -> list[int]:
        """Deletes old versions that rounds of adaptation made (`SwapController.prune`); returns their
        numbers.  `keep`: 0 = as configured.  Raises ServiceError.
        """
        keep = keep or self.config.keep_versions
        if keep < 1:
            message = f"to keep {keep} versions: say how many, at least 1 (or set keep_versions)"
            raise ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
        try:
            return self.controller(model).prune(keep)
        except OSError as error:
            message = f"versions of '{model}' cannot be deleted: {error.strerror or error}"
            raise ServiceError(Code.INTERNAL, message, "record") from error

    def freeze(self, model: str, reason: str) -> None:
        if model in self._groups:
            self._groups[model].freeze(reason)
        else:
            steer(self._chosen(model), lambda controller: controller.freeze(reason))

    def unfreeze(self, model: str) -> None:
        if model in self._groups:
            self._groups[model].unfreeze()
        else:
            steer(self._chosen(model), SwapController.unfreeze)

    def pin(self, model: str, version: int) -> None:
        """Of a group: its generation, and so every member."""
        self._steered(model).pin(version)

    def unpin(self, model: str) -> None:
        self._steered(model).unpin()

    def _steered(self, model: str) -> SwapController | GroupController:
        group = self._groups.get(model)
        return group if group is not None else self.controller(model)

    def _chosen(self, model: str) -> Sequence[SwapController]:
        return [self.controller(model)] if model else list(self.controllers().values())

    def versions(self, model: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """([what is known of each version], history).  A version that cannot be read is listed with the
        reason.  A group has no versions, but a history.
        """
        self._steered(model)
        history = self.repository.history(model)
        last = {e.get("version"): e for e in history if e.get("state") != "NOTE"}
        result = []
        for number in self.repository.versions(model):
            entry = last.get(number, {})
            info = {"version": number, "state": entry.get("state", ""), "reason": entry.get("reason", "")}
            try:
                info["manifest"] = self.repository.manifest(model, number)
            except Refused as refusal:
                info |= {"manifest": {}, "reason": str(refusal)}
            result.append(info)
        return result, history


def _status(controller: SwapController, ledger: Ledger) -> ModelStatus:
    host = controller.host
    live, previous, ticket = host.live, host.previous, controller.current
    return ModelStatus(
        model=host.name,
        ready=live is not None and not host.stuck,
        reason=host.stuck if live is not None else host.reason,
        live=live.version if live is not None else 0,
        previous=previous.version if previous is not None else 0,
        pinned=controller.pinned,
        frozen=controller.frozen,
        frozen_reason=controller.frozen_reason,
        candidate=ticket.version if ticket is not None else 0,
        candidate_state=ticket.state if ticket is not None else "",
        watching=controller.watching,
        memory_bytes=sum(ledger.need(slot.engine.memory_bytes) for slot in host.loaded()),
        account=host.account,
    )


def _write(region: Memory, place: Place, name: str, content: bytes | memoryview) -> None:
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
