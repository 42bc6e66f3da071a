"""The checks between SUBMITTED and VERIFIED: what a candidate must show before it sees a live frame.

In the order of docs/architecture.md: manifest, hash, signature, contract, memory, load,
finite, golden, collapse, latency.  Everything runs on a thread of low priority.
Knows the repository, engines and tasks; knows nothing of flips.
"""

from __future__ import annotations

import hashlib
import time
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime import engines
from runtime.checks import golden
from runtime.checks import task as checks_task
from runtime.checks.task import Task
from runtime.config import ServerConfig
from runtime.engines import Engine
from runtime.errors import Refused, Unjudged, of_the_machine
from runtime.repository.repository import Repository
from runtime.repository.signing import check_signature
from runtime.serving import sharing
from runtime.serving.memory_budget import MemoryBudget
from runtime.serving.served_model import ServedModel
from runtime.serving.slot import Slot
from runtime.swap.candidate import Candidate, Golden
from runtime.tensors import DTYPES, Array, EngineSpec, TensorSpec, datatype

GOLDEN_FRAMES = 4  # of those a version brings; more would only make swaps slower


class Verifier:
    """Turns a version of the repository into a candidate, or refuses it by the name of a check.

    `goldens`: what each loaded version answered on golden frames, by version.
    """

    def __init__(
        self, host: ServedModel, repository: Repository, config: ServerConfig, ledger: MemoryBudget
    ) -> None:
        self.host = host
        self.goldens: dict[int, Golden] = {}
        self._repository = repository
        self._config = config
        self._ledger = ledger
        self.model = host.name

    def configure(self, config: ServerConfig) -> None:
        self._config = config

    def verify(self, version: int, *, reference: Slot | None) -> Candidate:
        """Every check of VERIFIED, in the order of docs/architecture.md.  Raises Refused."""
        listed = self._repository.manifest(self.model, version)["files"]
        sizes = [entry.get("bytes") for entry in listed.values()]
        self._ledger.readable(sum(size for size in sizes if isinstance(size, int)))
        manifest, files = self._repository.read(self.model, version)
        check_signature(
            self._repository.directory(self.model, version), manifest, self._config.security.trusted_keys
        )
        described = manifest["engine"]
        model = files[described.get("file", "model.onnx")]
        _same_promise(manifest, reference)
        reservation = self._ledger.reserve(self.host, len(model))
        try:
            kind, precision = (
                str(described.get("kind", "onnxruntime")),
                str(described.get("precision", "fp32")),
            )
            engine = engines.load(model, kind, precision, self._config.engine, candidate=True)
        except BaseException:
            reservation.release()
            raise
        reservation.loaded()
        candidate = Candidate(version, engine, manifest, Golden(), reservation)
        weakref.finalize(candidate, reservation.release)  # of one that was given up while this went on
        try:
            _contract(candidate, reference)
            if candidate.task is not None:
                expected = self._golden_frames(files, candidate, candidate.task)
                self._look_at_golden(candidate, candidate.task, expected)
                self._compare_golden(candidate, candidate.task, reference)
            else:
                candidate.notes.append(
                    "outputs are not those of the graph contract: golden, collapse and "
                    "agreement were not checked"
                )
                _run_blind(candidate, files.get(golden.INPUTS), self._config.guard.golden_bytes)
            if candidate.engine.spec.batched:
                candidate.mixes = _mixes_rows(candidate)
                if candidate.mixes:
                    candidate.notes.append(f"requests do not share a run: {candidate.mixes}")
            self._latency(candidate, reference)
        except BaseException:
            candidate.close()
            raise
        candidate.report |= {
            "cost_ms": round(candidate.golden.cost_ms, 3),
            "golden_frames": len(candidate.frames),
        }
        return candidate

    def _golden_frames(
        self, files: dict[str, bytes], candidate: Candidate, task: Task
    ) -> dict[str, dict[str, Array]]:
        """Returns {hash of the frame: the exporter's answer}; fills candidate.frames."""
        if "golden.npz" not in files:
            if self._config.guard.require_golden:
                raise Refused(
                    "golden", "the version brings no golden.npz to be compared on; build it with export.build"
                )
            candidate.notes.append("no golden.npz: parity was not checked")
            frame = np.random.default_rng(0).integers(
                0, 256, _concrete(candidate.engine.spec.inputs[0]), np.uint8
            )
            candidate.frames[_hash(frame)] = frame
            return {}
        arrays = golden.read(
            files["golden.npz"], task.golden, frames=GOLDEN_FRAMES, limit=self._config.guard.golden_bytes
        )
        frames = arrays["frames"]
        _, height, width, _ = candidate.engine.spec.inputs[0].shape
        fits = frames.ndim == 4 and frames.shape[3] == 3
        if not fits or height not in (-1, frames.shape[1]) or width not in (-1, frames.shape[2]):
            raise Refused("golden", f"golden.npz holds frames {frames.shape} that this engine does not take")
        for head in task.heads:
            if not head.golden_fits(arrays):
                shapes = ", ".join(f"{name} {arrays[name].shape}" for name in ("frames", *head.golden))
                raise Refused("golden", f"golden.npz holds arrays that do not belong together: {shapes}")
        expected = {}
        for index, frame in enumerate(frames):
            key = _hash(frame)
            candidate.frames[key] = frame[None]
            expected[key] = task.expected(arrays, index)
        return expected

    def _look_at_golden(
        self, candidate: Candidate, task: Task, expected: dict[str, dict[str, Array]]
    ) -> None:
        names = task.required_outputs(candidate.engine.spec)
        costs: list[float] = []
        parities: list[dict[str, Any]] = []
        for key, frame in candidate.frames.items():
            answer, cost = timed(candidate.engine, {"frame": frame}, names)
            costs.append(cost)
            _as_declared(candidate.engine.spec, answer)
            _shapes(answer, frame)
            seen = candidate.golden.add(task, key, answer)
            if reason := task.not_finite(seen, answer):
                raise Refused("finite", reason)
            if reason := task.contract_violation(answer):
                raise Refused("contract", reason)
            if key in expected:
                parities.append(task.parity(answer, expected[key]))
        if len(costs) == 1:  # the first run of an engine is not typical
            costs.append(timed(candidate.engine, {"frame": next(iter(candidate.frames.values()))}, names)[1])
        candidate.golden.cost_ms = min(costs)
        parity, limits = checks_task.total(parities), self._config.guard
        candidate.report |= task.parity_report(parity)
        if reason := task.golden_mismatch(parity, limits):
            stats = checks_task.total(list(candidate.golden.stats.values()))
            if one := task.collapsed(stats, None, limits, limits.max_vanished):
                raise Refused("collapse", f"{one}; {reason}")
            raise Refused("golden", reason)

    def _compare_golden(self, candidate: Candidate, task: Task, reference: Slot | None) -> None:
        seen = checks_task.total(list(candidate.golden.stats.values()))
        other = None
        if reference is not None and reference.task is not None:
            known = self.reference_golden(reference, candidate)
            other = checks_task.total([known.stats[key] for key in candidate.frames])
        limits = self._config.guard
        if reason := task.collapsed(seen, other, limits, limits.max_vanished):
            raise Refused("collapse", reason)

    def reference_golden(self, reference: Slot, candidate: Candidate) -> Golden:
        """Returns the live version's answers on the candidate's golden frames; computes those that are not
        among its own.
        """
        known = self.goldens.setdefault(reference.version, Golden())
        task = reference.task
        assert task is not None
        for key, frame in candidate.frames.items():
            if key not in known.stats:
                known.add(task, key, held(reference, {"frame": frame}, list(task.outputs)))
        return known

    def _latency(self, candidate: Candidate, reference: Slot | None) -> None:
        known = self.goldens.get(reference.version) if reference is not None else None
        if known is None or known.cost_ms <= 0:
            return
        limits = self._config.guard
        limit = limits.max_latency_ratio * known.cost_ms + limits.latency_slack_ms
        if candidate.golden.cost_ms > limit:
            raise Refused(
                "latency",
                f"{candidate.golden.cost_ms:.1f} ms a frame, the live version took "
                f"{known.cost_ms:.1f} (limit {limit:.1f})",
            )

    def slot(self, candidate: Candidate) -> Slot:
        """Reloads the candidate with the serving thread count, runs it once, and returns its slot.

        Called on a thread of normal priority.  Raises Refused.
        """
        try:
            engine = candidate.engine.with_serving_threads()
            if engine is candidate.engine:
                return _slot(candidate)
            try:
                _same_tensors(candidate.engine.spec, engine.spec)
                if candidate.frames and candidate.task is not None:
                    self._as_judged(candidate, candidate.task, engine)
                elif candidate.blind:
                    _as_declared(engine.spec, engine.run(candidate.blind, _outputs(engine.spec)))
            except BaseException:
                engine.close()
                raise
        except Refused:
            raise
        except Exception as error:
            kind = Unjudged if of_the_machine(error) else Refused
            raise kind("load", f"the engine cannot be loaded with all threads: {error}") from error
        candidate.engine.close()
        candidate.engine = engine
        return _slot(candidate)

    def _as_judged(self, candidate: Candidate, task: Task, engine: Engine) -> None:
        """Refuses the serving engine if its answers differ from the judged one's, or exceed the budget."""
        key, frame = next(iter(candidate.frames.items()))
        names = list(task.outputs)
        same = task.pixel_agreement(engine.run({"frame": frame}, names), candidate.golden.answers[key])
        if same < 0.999:
            raise Refused(
                "golden", f"with all threads the engine gives other answers on {1 - same:.2%} of the pixels"
            )
        budget = self._config.guard.latency_budget_ms
        if budget > 0 and (took := _wall(engine, {"frame": frame}, names)) > budget:
            raise Refused("latency", f"{took:.1f} ms a frame, the budget is {budget:.1f}")


def _same_promise(manifest: dict[str, Any], reference: Slot | None) -> None:
    """Refuses a manifest that differs from the live one in a key that clients depend on."""
    if reference is None:
        return
    for key in checks_task.PROMISED:
        if (manifest.get(key) or None) != (reference.manifest.get(key) or None):
            raise Refused(
                "contract",
                f"{key} {manifest.get(key)!r}, the live version has {reference.manifest.get(key)!r}"[:400],
            )


def _contract(candidate: Candidate, reference: Slot | None) -> None:
    """The engine's tensors against the manifest and against the live engine's; sets the candidate's task."""
    spec, manifest = candidate.engine.spec, candidate.manifest
    candidate.task = task = checks_task.of(spec, manifest)
    if task is None and (tensors := checks_task.TENSORS.get(str(manifest.get("task")))):
        raise Refused(
            "contract",
            f"the tensors are not those of task '{manifest['task']}': frame uint8 [N,H,W,3] -> {tensors}",
        )
    if task is not None and (reason := task.contract(spec, manifest)):
        raise Refused("contract", reason)
    if reference is None:
        return
    live = reference.engine.spec
    for name, mine, theirs in (("inputs", spec.inputs, live.inputs), ("outputs", spec.outputs, live.outputs)):
        has, wanted = _described(mine), _described(theirs)
        if has != wanted:
            raise Refused("contract", f"{name} {', '.join(has)}; the live version has {', '.join(wanted)}")


def _same_tensors(judged: EngineSpec, promoted: EngineSpec) -> None:
    """The engine that will answer takes and gives what the one that was judged did: name and data type of
    all, shape of the inputs.
    """
    for what, mine, theirs in (
        ("inputs", _described(promoted.inputs), _described(judged.inputs)),
        ("outputs", _kinds(promoted.outputs), _kinds(judged.outputs)),
    ):
        if mine != theirs:
            words = f"{what} {', '.join(mine)}; the engine that was checked has {', '.join(theirs)}"
            raise Refused("contract", f"with all threads the engine has other tensors: {words}"[:400])


def _kinds(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return sorted(f"{t.name} {t.datatype}" for t in tensors)


def _outputs(spec: EngineSpec) -> list[str]:
    return [tensor.name for tensor in spec.outputs]


def _as_declared(spec: EngineSpec, answer: Mapping[str, Array]) -> None:
    """Refuses a run that contradicts the declared shapes and types: clients rely on them."""
    for name, value in answer.items():
        said = spec.output(name)
        if said is None:
            continue
        kind = datatype(value.dtype)
        if kind != said.datatype or not said.fits(value.shape):
            raise Refused(
                "contract",
                f"output '{name}' is declared {said.datatype} {list(said.shape)}, "
                f"a run gives {kind} {list(value.shape)}; correct the declaration and build it again",
            )


def _slot(candidate: Candidate) -> Slot:
    slot = Slot(candidate.version, candidate.engine, candidate.manifest)
    slot.shares = slot.shares and not candidate.mixes
    return slot


def _mixes_rows(candidate: Candidate) -> str:
    """Why requests must not share a run of the candidate; "" where they may."""
    if candidate.task is None:
        return sharing.foreign_mixes_rows(candidate.engine, candidate.blind)
    names = [head.required for head in candidate.task.heads]
    frames = list(candidate.frames.values())[:2]
    if len(frames) < 2:  # one golden frame: its mirror image is another
        frames.append(np.ascontiguousarray(frames[0][:, :, ::-1]))
    rows = [{"frame": frame} for frame in frames]
    try:
        alone = [candidate.engine.run(row, names) for row in rows]
    except Exception as error:  # each library raises its own
        return f"a mirrored frame does not run: {error}"[:200]
    return sharing.mixes_rows(candidate.engine, rows, alone)


def _described(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return sorted(f"{t.name} {t.datatype} {list(t.shape)}" for t in tensors)


def _run_blind(candidate: Candidate, stored: bytes | None, limit: int) -> None:
    """A foreign network on the inputs that its build ran (`stored`), else on numbers that mean nothing: it
    must run, give what it declares, and not turn them into NaN."""
    spec = candidate.engine.spec
    inputs = _made_up(spec) if stored is None else golden.inputs(stored, spec.inputs, limit=limit)
    candidate.blind = inputs
    costs = []
    for _ in range(2):
        answer, cost = timed(candidate.engine, inputs, _outputs(spec))
        costs.append(cost)
    _as_declared(spec, answer)
    for name, value in answer.items():
        if value.dtype.kind == "f" and not bool(np.isfinite(value).all()):
            raise Refused("finite", f"output '{name}' is NaN or infinite for finite inputs")
    candidate.golden.cost_ms = min(costs)


def _made_up(spec: EngineSpec) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = _concrete(tensor)
        if tensor.datatype in ("FP16", "FP32", "FP64"):
            inputs[tensor.name] = np.asarray(rng.random(shape), DTYPES[tensor.datatype])
        elif tensor.datatype == "BYTES":
            inputs[tensor.name] = np.full(shape, "", dtype=np.object_)
        else:
            inputs[tensor.name] = np.zeros(shape, DTYPES[tensor.datatype])
    return inputs


def timed(engine: Engine, inputs: dict[str, Array], names: list[str]) -> tuple[dict[str, Array], float]:
    """Returns (outputs, ms): CPU time of the thread if the engine computes on it, because wall time at low
    priority depends on the load of the machine.
    """
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        answer = engine.run(inputs, names)
    except Exception as error:
        kind = Unjudged if of_the_machine(error) else Refused
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise kind("load", f"the engine loads but does not run: {why}") from error
    spent = time.thread_time() - cpu if engine.spec.device == "cpu" else time.perf_counter() - wall
    return answer, spent * 1e3


def _wall(engine: Engine, inputs: dict[str, Array], names: list[str]) -> float:
    """Best of three, ms."""
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        engine.run(inputs, names)
        best = min(best, (time.perf_counter() - begun) * 1e3)
    return best


def held(slot: Slot, inputs: dict[str, Array], names: list[str]) -> dict[str, Array]:
    if not slot.hold():
        raise Refused(
            "superseded", f"version {slot.version} stopped being live during the checks; submit again"
        )
    try:
        return slot.engine.run(inputs, names)
    finally:
        slot.release()


def _concrete(tensor: TensorSpec) -> tuple[int, ...]:
    """A shape with the free dimensions filled: 1 for the batch, 64 for the sides of a frame."""
    frame = tensor.datatype == "UINT8" and len(tensor.shape) == 4
    return tuple(
        size if size >= 0 else (64 if frame and axis in (1, 2) else 1)
        for axis, size in enumerate(tensor.shape)
    )


def _shapes(answer: dict[str, Array], frame: Array) -> None:
    """Maps are of the frame's own size: clients lay them over it."""
    for name, value in answer.items():
        if name != "probabilities" and (len(value), *value.shape[-2:]) != frame.shape[:3]:
            raise Refused("contract", f"'{name}' is {list(value.shape)} for a frame {list(frame.shape)}")


def _hash(frame: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()
