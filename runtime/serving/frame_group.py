"""A frame group: models that answer one frame together, never one by an old version and one by a new.

To a client it is a model like any other (Triton would call it an ensemble): it takes the members' inputs and
answers with the union of their outputs, of two of one name the first one's.  Its version is the generation,
a number for one version of each member.  A request holds every member's slot at one instant, under the lock
under which they flip (`runtime/swap/scope.py`), and is then run member by member through their own queues.
Knows hosts and slots; how generations come to be is in `runtime/swap/group_controller.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.errors import Code, ServiceError
from runtime.serving import request as serving_request
from runtime.serving.counters import Durations, RequestCounters, Statistics
from runtime.serving.request import Answer, InferRequest, OutputRequest, parse_version
from runtime.serving.served_model import UNLOADED, ServedModel
from runtime.serving.slot import Slot
from runtime.tensors import Array, EngineSpec, TensorSpec


@dataclass(frozen=True)
class Generation:
    """A number, and the version of each member that it stands for."""

    number: int
    members: Mapping[str, int]


class GroupError(Exception):
    """The members do not make a group: what does not fit."""


class _Together:
    """Stands for an engine where only its tensors are asked for."""

    memory_bytes = 0  # counted by the members

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        raise NotImplementedError("a group is run member by member")

    def with_serving_threads(self) -> _Together:
        return self

    def close(self) -> None:
        return


class GroupSlot(Slot):
    """One generation: its number for a version, the members' slots under it.  Holds all of them or none."""

    def __init__(self, number: int, members: Mapping[str, Slot]) -> None:
        super().__init__(number, _Together(_spec(members)), _manifest(members))
        self.members = dict(members)

    def hold(self) -> bool:
        held: list[Slot] = []
        for slot in self.members.values():
            if not slot.hold():
                for other in held:
                    other.release()
                return False
            held.append(slot)
        return True

    def release(self) -> None:
        for slot in self.members.values():
            slot.release()

    def parameters(self) -> dict[str, str]:
        """The provenance of every member, under its name."""
        return {
            f"{model}.{key}": value
            for model, slot in self.members.items()
            for key, value in {"version": str(slot.version), **slot.provenance.parameters()}.items()
        }


class FrameGroup:
    """`slots`: the lock that the members' hosts share.  `join` adds a member when its host is there."""

    def __init__(self, name: str, members: Sequence[str], slots: threading.RLock) -> None:
        self.name = name
        self.names = tuple(members)
        self.account = RequestCounters()
        self.unloaded = False
        self.generation: Generation | None = None
        self.before: Generation | None = None  # what a rollback goes back to
        self._slots = slots
        self._hosts: dict[str, ServedModel] = {}
        self._cached: dict[int, GroupSlot] = {}
        self._statistics: dict[int, Statistics] = {}

    # -- the members -------------------------------------------------------------------

    def join(self, host: ServedModel) -> None:
        self._hosts[host.name] = host

    def flip(self, generation: Generation | None, before: Generation | None) -> None:
        """The members' live slots are this generation.  Under `slots`, with the flips themselves."""
        self.generation, self.before = generation, before

    @property
    def reason(self) -> str:
        """Why the group does not answer; "" when it does."""
        with self._slots:
            if self.unloaded:
                return UNLOADED
            for name in self.names:
                host = self._hosts.get(name)
                if host is None:
                    return f"member '{name}' is not in the repository"
                if host.live is None:
                    return f"member '{name}': {host.reason}"
            try:
                return "" if self._current() is not None else "its members are not up yet"
            except GroupError as error:
                return str(error)

    @property
    def is_unloaded(self) -> bool:
        return self.unloaded

    @property
    def stuck(self) -> str:
        """Why a group with a live generation does not answer; "" when it does."""
        found = ((name, self._hosts[name].stuck) for name in self.names if name in self._hosts)
        return next((f"member '{name}': {stuck}" for name, stuck in found if stuck), "")

    def loaded(self) -> list[GroupSlot]:
        """The generations that answer requests: the live one first, then the one before while it is warm."""
        with self._slots:
            if self.unloaded:
                return []
            found = []
            for generation in (self.generation, self.before):
                try:
                    slot = None if generation is None else self._slot(generation)
                except GroupError:
                    slot = None
                if slot is not None:
                    found.append(slot)
                elif generation is self.generation:
                    return []
            return found

    @property
    def live(self) -> GroupSlot | None:
        return next(iter(self.loaded()), None)

    @property
    def pending(self) -> int:
        return 0  # requests wait in the members' queues

    def slot(self, version: str) -> GroupSlot:
        """The generation that would answer a request for `version` ("" = the live one)."""
        number = parse_version(version)
        for slot in self.loaded():
            if number in (None, slot.version):
                return slot
        if number is None:
            why = self.reason
            raise ServiceError(
                Code.NOT_FOUND,
                f"Request for unknown model: '{self.name}' has no available versions: {why}",
                "not-loaded",
            )
        raise ServiceError(
            Code.NOT_FOUND,
            f"Request for unknown model: '{self.name}' version {number} is not found",
            "unknown-version",
        )

    def _current(self) -> GroupSlot | None:
        return None if self.generation is None else self._slot(self.generation)

    def _slot(self, generation: Generation) -> GroupSlot | None:
        """Returns a generation made of the members' slots; None if one is not loaded.  Raises GroupError.

        The caller holds the flip lock.
        """
        members: dict[str, Slot] = {}
        for name in self.names:
            host, wanted = self._hosts.get(name), generation.members.get(name)
            there = host.loaded() if host is not None else []
            found = next((slot for slot in there if slot.version == wanted), None)
            if found is None:
                return None
            members[name] = found
        cached = self._cached.get(generation.number)
        if cached is None or cached.members != members:
            cached = GroupSlot(generation.number, members)
            keep = {g.number for g in (self.generation, self.before) if g is not None}
            self._cached = {n: slot for n, slot in self._cached.items() if n in keep}
            self._cached[generation.number] = cached
        return cached

    # -- statistics --------------------------------------------------------------------

    def statistics(self) -> dict[int, Statistics]:
        with self._slots:
            return dict(self._statistics)

    def statistics_of(self, version: int) -> Statistics:
        with self._slots:
            return self._statistics.setdefault(version, Statistics())

    # -- requests ----------------------------------------------------------------------

    def infer(
        self,
        request: InferRequest,
        *,
        deadline: float | None = None,
        on_job: Callable[[Callable[[], None]], None] | None = None,
    ) -> Answer:
        """Answers one request by exactly one generation.  Raises ServiceError.

        Members of whose outputs the request names none are not run.  The first member that refuses ends it.
        """
        begun = time.monotonic_ns()
        slot = self._pin(request.version)
        try:
            names = serving_request.names(request, slot, self.name)
            arrays = serving_request.inputs(request, slot.engine.spec, self.name)
            checked = time.monotonic_ns()
            outputs: dict[str, tuple[str, Array]] = {}
            stages = Durations(compute_input=checked - begun)
            for model, part in self._parts(request, slot, names, arrays).items():
                answer = self._hosts[model].infer(
                    part, deadline=deadline, on_job=on_job, pinned=slot.members[model]
                )
                outputs |= {name: (kind, array) for name, kind, array in answer.outputs}
                stages += answer.stages
        except ServiceError:
            self.statistics_of(slot.version).failed(time.monotonic_ns() - begun)
            raise
        finally:
            slot.release()
        now = time.monotonic_ns()
        statistics = self.statistics_of(slot.version)
        statistics.executed(1, stages)
        statistics.succeeded(now - begun, stages, 1)
        return Answer(
            model=self.name,
            version=slot.version,
            id=request.id,
            outputs=[(name, *outputs[name]) for name in names],
            parameters=slot.parameters(),
            stages=stages,
        )

    def _pin(self, version: str) -> GroupSlot:
        """A generation, held: every member at one instant."""
        with self._slots:
            slot = self.slot(version)
            if not slot.hold():
                raise ServiceError(
                    Code.UNAVAILABLE,
                    f"'{self.name}' version {slot.version} is not at ready state",
                    "not-loaded",
                )
            return slot

    def _parts(
        self, request: InferRequest, slot: GroupSlot, names: Sequence[str], arrays: Mapping[str, Array]
    ) -> dict[str, InferRequest]:
        """The request that each member gets, with tensors that are decoded already."""
        asked = {output.name: output for output in request.outputs}
        parts: dict[str, InferRequest] = {}
        left = list(names)
        for model, member in slot.members.items():
            spec = member.engine.spec
            mine = [name for name in left if spec.output(name) is not None]
            left = [name for name in left if name not in mine]
            wanted = [asked.get(name) or OutputRequest(name) for name in mine]
            if wanted:
                inputs = [
                    replace(tensor, data=arrays[tensor.name])
                    for tensor in request.inputs
                    if spec.input(tensor.name) is not None
                ]
                parts[model] = replace(request, model=model, version="", inputs=inputs, outputs=wanted)
        return parts


def _spec(members: Mapping[str, Slot]) -> EngineSpec:
    """The tensors of a group: inputs of one name are one input.  Raises GroupError where they do not fit."""
    inputs: dict[str, tuple[str, TensorSpec]] = {}
    outputs: dict[str, tuple[str, TensorSpec]] = {}  # of two with the same name the first member's
    for model, slot in members.items():
        for tensor in slot.engine.spec.inputs:
            first = inputs.setdefault(tensor.name, (model, tensor))
            inputs[tensor.name] = (first[0], _one(tensor, model, *first))
        for tensor in slot.engine.spec.outputs:
            outputs.setdefault(tensor.name, (model, tensor))
    engines = [slot.engine.spec for slot in members.values()]
    return EngineSpec(
        inputs=tuple(tensor for _, tensor in inputs.values()),
        outputs=tuple(tensor for _, tensor in outputs.values()),
        kind="group",
        precision="+".join(dict.fromkeys(spec.precision for spec in engines)),
        device="+".join(dict.fromkeys(spec.device for spec in engines)),
    )


def _one(mine: TensorSpec, model: str, other_model: str, other: TensorSpec) -> TensorSpec:
    """An input that two members share, as narrow as both."""
    same = mine.datatype == other.datatype and len(mine.shape) == len(other.shape)
    pairs = list(zip(mine.shape, other.shape, strict=True)) if same else []
    if not same or any(a != b and -1 not in (a, b) for a, b in pairs):
        raise GroupError(
            f"members '{other_model}' and '{model}' take different frames: '{mine.name}' is "
            f"{other.datatype} {list(other.shape)} and {mine.datatype} {list(mine.shape)}"
        )
    return TensorSpec(mine.name, mine.datatype, tuple(max(a, b) for a, b in pairs))


def _manifest(members: Mapping[str, Slot]) -> dict[str, Any]:
    """What the members' manifests say together, as far as clients read it."""
    joint: dict[str, Any] = {"members": {model: slot.version for model, slot in members.items()}}
    names = {part for slot in members.values() if slot.task is not None for part in slot.task.names}
    for slot in members.values():
        manifest = dict(slot.manifest)
        if slot.task is not None and slot.task.name == "edges":
            manifest.setdefault("edge_classes", manifest.get("classes"))
            if len(names) > 1:
                manifest.pop("classes", None)
        for key in ("classes", "colours", "edge_classes", "edge_thresholds"):
            if manifest.get(key):
                joint.setdefault(key, manifest[key])
    return joint | {"task": "joint" if len(names) > 1 else "".join(names)}
