"""The models and groups that a server serves, by name, and their swap controllers.

A model that appears in the repository after the start is added when it is first asked for.  Knows the
repository and the configuration; knows nothing of requests.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Callable
from typing import Any

from runtime.config import ServerConfig
from runtime.errors import Code, ConfigError, ServiceError
from runtime.events import Bus
from runtime.repository.repository import Repository
from runtime.serving import batching
from runtime.serving.frame_group import FrameGroup
from runtime.serving.labels import Labels
from runtime.serving.memory_budget import MemoryBudget
from runtime.serving.served_model import ServedModel
from runtime.swap.controller import SwapController
from runtime.swap.group_controller import GroupController
from runtime.swap.scope import SingleModelScope, SwapScope

log = logging.getLogger("roadworthy.service")


class ModelRegistry:
    """`on_open` is called with each model before it is served."""

    def __init__(
        self,
        config: ServerConfig,
        repository: Repository,
        bus: Bus,
        ledger: MemoryBudget,
        on_open: Callable[[ServedModel], None],
    ) -> None:
        self.config = config
        self._repository = repository
        self._bus = bus
        self._ledger = ledger
        self._on_open = on_open
        self._lock = threading.Lock()
        self._hosts: dict[str, ServedModel] = {}
        self._controllers: dict[str, SwapController] = {}
        self._overrides: dict[str, Any] = {}
        self._groups = {
            name: GroupController(name, members, repository, config, bus)
            for name, members in config.groups.items()
        }

    # -- life ------------------------------------------------------------------------

    def start(self) -> None:
        """Loads the last live version of every model.  Raises ConfigError for a mistyped name."""
        models = self._repository.models()
        self._check_chosen(models)
        for name, group in self._groups.items():
            if name in models:  # not an error: any publisher could keep the server from starting
                log.error("the model '%s' has the name of a group and is not served; rename the group", name)
                models.remove(name)
            for model in group.members:
                if model in models and self._is_chosen(model):
                    self._open(model)
            group.start()
        for model in models:
            if self._is_chosen(model) and model not in self._controllers:
                self._open(model).startup.run()

    def _check_chosen(self, published: list[str]) -> None:
        """A name of the configuration that is not in the repository may be published later, or mistyped.

        Raises ConfigError if a model of a similar name is there and is not named itself.
        """
        members = [member for group in self._groups.values() for member in group.members]
        named = {*self.config.models, *members}
        for name in sorted(named - set(published)):
            key = "models" if name in self.config.models else "groups"
            near = difflib.get_close_matches(name, [other for other in published if other not in named], n=1)
            if near:
                raise ConfigError(
                    f"{key}: '{name}' is not in the repository '{self.config.repository}'; "
                    f"did you mean '{near[0]}'?"
                )
            log.warning("%s: '%s' is not in the repository; it is served when it is published", key, name)

    def configure(self, config: ServerConfig) -> None:
        """Replaces the limits of the next swaps, and reads every config.pbtxt again."""
        self.config = config
        for group in self._groups.values():
            group.configure(config)
        for name, host in self.hosts().items():
            self._configure(name, host)
        for controller in self.controllers().values():
            controller.configure(config)

    def stop(self) -> None:
        """Starts no further swap."""
        for group in self._groups.values():
            group.stop()
        for controller in self.controllers().values():
            controller.stop()

    # -- lookups ---------------------------------------------------------------------

    def hosts(self) -> dict[str, ServedModel]:
        with self._lock:
            return dict(self._hosts)

    def controllers(self) -> dict[str, SwapController]:
        with self._lock:
            return dict(self._controllers)

    def groups(self) -> dict[str, GroupController]:
        return dict(self._groups)

    def group(self, name: str) -> GroupController:
        """Returns the group of that name.  Raises ServiceError(NOT_FOUND)."""
        if name not in self._groups:
            known = ", ".join(self._groups) or "none; [groups] in the configuration makes one"
            raise ServiceError(
                Code.NOT_FOUND, f"there is no group '{name[:200]}'; groups: {known}", "unknown-model"
            )
        return self._groups[name]

    def served(self) -> dict[str, ServedModel | FrameGroup]:
        """Returns everything that answers requests, by the name that a request gives."""
        return {**self.hosts(), **{name: group.host for name, group in self._groups.items()}}

    def answering(self, name: str) -> ServedModel | FrameGroup:
        """Returns the model or group of that name.  Raises ServiceError(NOT_FOUND)."""
        group = self._groups.get(name)
        return group.host if group is not None else self.host(name)

    def find(self, name: str) -> ServedModel | FrameGroup | None:
        """Returns the model or group of that name, or None."""
        group = self._groups.get(name)
        return group.host if group is not None else self._hosts.get(name)

    def host(self, model: str) -> ServedModel:
        """Returns the served model of that name.  Raises ServiceError(NOT_FOUND)."""
        host = self._hosts.get(model)
        if host is None:
            raise ServiceError(
                Code.NOT_FOUND, f"Request for unknown model: '{model[:200]}' is not found", "unknown-model"
            )
        return host

    def controller(self, model: str) -> SwapController:
        """Returns the controller of a served model; begins to serve one that was published since the start.

        Raises ServiceError: NOT_FOUND, INVALID_ARGUMENT for a group or a malformed name.
        """
        controller = self._controllers.get(model)
        if controller is not None:
            return controller
        if model in self._groups:
            message = f"'{model}' is a frame group: submit its members' versions, to it or to one of them"
            raise ServiceError(Code.INVALID_ARGUMENT, message, "invalid")
        try:
            known = bool(self._repository.versions(model))
        except ValueError as error:
            raise ServiceError(Code.INVALID_ARGUMENT, str(error), "invalid") from error
        if not known or not self._is_chosen(model):
            raise ServiceError(
                Code.NOT_FOUND,
                f"'{model}' is not in the repository; publish a version first",
                "unknown-model",
            )
        return self._open(model)

    def _is_chosen(self, model: str) -> bool:
        return not self.config.models or model in self.config.models

    def _open(self, model: str) -> SwapController:
        with self._lock:
            if model not in self._controllers:
                group = next((g for g in self._groups.values() if model in g.members), None)
                scope: SwapScope = group.scope if group is not None else SingleModelScope()
                host = ServedModel(model, self.config, scope.flip_lock)
                self._configure(model, host)
                self._on_open(host)
                self._hosts[model] = host
                self._ledger.add(host)
                self._controllers[model] = SwapController(
                    host, self._repository, self.config, self._bus, self._ledger, scope
                )
                if group is not None:
                    group.scope.join(self._controllers[model])
            return self._controllers[model]

    # -- config.pbtxt ----------------------------------------------------------------

    def declared(self, model: str) -> Any | None:
        """Returns the configuration of the last load, else config.pbtxt; None if neither is usable."""
        if model in self._overrides:
            return self._overrides[model]
        return batching.declared(self._repository.path / model / "config.pbtxt")

    def override(self, model: str, config: Any | None) -> None:
        """Replaces config.pbtxt by a configuration until the next load or restart; None ends that."""
        had = self._overrides.pop(model, None)
        if config is not None:
            self._overrides[model] = config
        if config is not None or had is not None:
            self._configure(model, self.host(model))

    def _configure(self, model: str, host: ServedModel) -> None:
        declared = self.declared(model)
        files = batching.label_files(declared)
        labels = Labels(self._repository.path / model, files)
        host.configure(batching.plan(declared, self.config.queue), labels)
