"""The checks between SUBMITTED and VERIFIED: what a candidate must show before it sees a live frame.

In the order of docs/architecture.md: manifest, hash, signature, contract, memory, load,
finite, golden, collapse, latency.  Everything here runs on a thread of low priority.
Knows the repository and engines; knows nothing of flips.
"""

from __future__ import annotations

import hashlib
import io
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime import engines, guard
from runtime.config import ServerConfig
from runtime.engines import Engine
from runtime.errors import Refused
from runtime.host import ModelHost
from runtime.memory import Ledger
from runtime.repository import Repository
from runtime.signing import check_signature
from runtime.slot import Slot
from runtime.tensors import DTYPES, Array, TensorSpec

GOLDEN_FRAMES = 4  # of those a version brings; more would only make swaps slower


@dataclass
class Golden:
    """What a version answered on its golden frames, kept with its slot as the reference for the next one."""

    labels: dict[str, Array] = field(default_factory=dict)  # hash of the frame -> labels
    looks: dict[str, guard.Look] = field(default_factory=dict)
    cost_ms: float = 0.0  # of one frame on one thread of low priority: comparable between candidates


@dataclass
class Candidate:
    version: int
    engine: Engine
    manifest: dict[str, Any]
    golden: Golden
    frames: dict[str, Array] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest.get("classes") or ())


class Verifier:
    """Turns a version of the repository into a candidate, or refuses it by the name of a check.

    `goldens`: what each loaded version answered on golden frames, by version.
    """

    def __init__(self, host: ModelHost, repository: Repository, config: ServerConfig, ledger: Ledger) -> None:
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
        manifest, files = self._repository.read(self.model, version)
        check_signature(
            self._repository.directory(self.model, version), manifest, self._config.security.trusted_keys
        )
        described = manifest["engine"]
        model = files[described.get("file", "model.onnx")]
        _same_promise(manifest, reference)
        need = self._ledger.reserve(self.host, len(model))
        try:
            kind, precision = (
                str(described.get("kind", "onnxruntime")),
                str(described.get("precision", "fp32")),
            )
            engine = engines.load(model, kind, precision, self._config.engine, candidate=True)
        finally:
            self._ledger.release(need)
        candidate = Candidate(version, engine, manifest, Golden())
        try:
            _contract(candidate, reference)
            if engine.spec.segmentation:
                expected = self._golden_frames(files, candidate)
                self._look_at_golden(candidate, expected)
                self._compare_golden(candidate, reference)
            else:
                candidate.notes.append(
                    "outputs are not those of the graph contract: golden, collapse and "
                    "agreement were not checked"
                )
                _run_blind(candidate)
            self._latency(candidate, reference)
        except BaseException:
            engine.close()
            raise
        candidate.report |= {
            "cost_ms": round(candidate.golden.cost_ms, 3),
            "golden_frames": len(candidate.frames),
        }
        return candidate

    def _golden_frames(self, files: dict[str, bytes], candidate: Candidate) -> dict[str, tuple[Array, Array]]:
        """{hash of the frame: (expected labels, expected confidence)}; fills candidate.frames."""
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
        try:
            with np.load(io.BytesIO(files["golden.npz"]), allow_pickle=False) as archive:
                frames, labels, confidence = archive["frames"], archive["labels"], archive["confidence"]
        except Exception as error:
            raise Refused("golden", f"golden.npz cannot be read: {error}") from error
        _, height, width, _ = candidate.engine.spec.inputs[0].shape
        fits = (
            frames.dtype == labels.dtype == confidence.dtype == np.uint8
            and frames.ndim == 4
            and len(frames) > 0
        )
        fits = fits and frames.shape[3] == 3 and labels.shape == confidence.shape == frames.shape[:3]
        if not fits or height not in (-1, frames.shape[1]) or width not in (-1, frames.shape[2]):
            raise Refused("golden", f"golden.npz holds frames {frames.shape} that this engine does not take")
        expected = {}
        for frame, label, sure in list(zip(frames, labels, confidence, strict=True))[:GOLDEN_FRAMES]:
            key = _hash(frame)
            candidate.frames[key] = frame[None]
            expected[key] = (label, sure)
        return expected

    def _look_at_golden(self, candidate: Candidate, expected: dict[str, tuple[Array, Array]]) -> None:
        names = [
            name for name in ("labels", "confidence", "probabilities") if candidate.engine.spec.output(name)
        ]
        classes = class_count(candidate.manifest)
        costs: list[float] = []
        agreements: list[float] = []
        differences: list[float] = []
        for key, frame in candidate.frames.items():
            answer, cost = timed(candidate.engine, {"frame": frame}, names)
            costs.append(cost)
            seen = guard.look(answer["labels"], answer["confidence"], classes)
            if reason := guard.not_finite(seen, answer.get("probabilities")):
                raise Refused("finite", reason)
            if int(answer["labels"].max(initial=0)) >= classes:
                raise Refused(
                    "contract", f"label {int(answer['labels'].max())} is beyond the {classes} classes"
                )
            candidate.golden.labels[key] = answer["labels"]
            candidate.golden.looks[key] = seen
            if key in expected:
                label, sure = expected[key]
                agreements.append(float((answer["labels"][0] == label).mean()))
                differences.append(float(np.abs(answer["confidence"][0].astype(np.int16) - sure).mean()))
        if len(costs) == 1:  # the first run of an engine is not typical
            costs.append(timed(candidate.engine, {"frame": next(iter(candidate.frames.values()))}, names)[1])
        candidate.golden.cost_ms = min(costs)
        if agreements:
            agreement, difference = float(np.mean(agreements)), float(np.mean(differences))
            candidate.report |= {
                "golden_agreement": round(agreement, 6),
                "golden_confidence": round(difference, 3),
            }
            limits = self._config.guard
            if agreement < limits.min_golden_agreement:
                looks = total(list(candidate.golden.looks.values()))
                if one := guard.collapsed(looks, None, limits, candidate.classes, limits.max_vanished):
                    raise Refused("collapse", f"{one}; the manifest's labels are met on {agreement:.2%}")
                reason = (
                    f"labels equal the manifest's on {agreement:.2%} of the golden "
                    f"pixels, the limit is {limits.min_golden_agreement:.2%}"
                )
                raise Refused("golden", reason)
            if difference > limits.max_golden_confidence:
                reason = (
                    f"confidence differs from the manifest's by {difference:.1f} of 255 "
                    f"on average, the limit is {limits.max_golden_confidence}"
                )
                raise Refused("golden", reason)

    def _compare_golden(self, candidate: Candidate, reference: Slot | None) -> None:
        seen = total(list(candidate.golden.looks.values()))
        other = None
        if reference is not None and reference.engine.spec.segmentation:
            golden = self.reference_golden(reference, candidate)
            other = total([golden.looks[key] for key in candidate.frames])
        limits = self._config.guard
        if reason := guard.collapsed(seen, other, limits, candidate.classes, limits.max_vanished):
            raise Refused("collapse", reason)

    def reference_golden(self, reference: Slot, candidate: Candidate) -> Golden:
        """The live version's answers on the candidate's golden frames; computed where they are not those
        it came with.
        """
        golden = self.goldens.setdefault(reference.version, Golden())
        classes = class_count(reference.manifest)
        for key, frame in candidate.frames.items():
            if key not in golden.looks:
                answer = held(reference, {"frame": frame}, ["labels", "confidence"])
                golden.labels[key] = answer["labels"]
                golden.looks[key] = guard.look(answer["labels"], answer["confidence"], classes)
        return golden

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
        """The candidate with the live thread budget, run once.  On a thread of normal priority."""
        try:
            engine = candidate.engine.promoted()
            if engine is candidate.engine:
                return Slot(candidate.version, engine, candidate.manifest)
            try:
                if candidate.frames and engine.spec.segmentation:
                    key, frame = next(iter(candidate.frames.items()))
                    answer = engine.run({"frame": frame}, ["labels", "confidence"])
                    same = float((answer["labels"] == candidate.golden.labels[key]).mean())
                    if same < 0.999:
                        raise Refused(
                            "golden",
                            f"with all threads the engine gives other labels on {1 - same:.2%} of the pixels",
                        )
                budget = self._config.guard.latency_budget_ms
                if budget > 0 and candidate.frames:
                    took = _wall(
                        engine, {"frame": next(iter(candidate.frames.values()))}, ["labels", "confidence"]
                    )
                    if took > budget:
                        raise Refused("latency", f"{took:.1f} ms a frame, the budget is {budget:.1f}")
            except BaseException:
                engine.close()
                raise
        except Refused:
            raise
        except Exception as error:
            raise Refused("load", f"the engine cannot be loaded with all threads: {error}") from error
        candidate.engine.close()
        return Slot(candidate.version, engine, candidate.manifest)


def _same_promise(manifest: dict[str, Any], reference: Slot | None) -> None:
    """What the manifest says must equal what the live one's says: clients depend on it."""
    if reference is None:
        return
    for key in ("task", "classes"):
        if (manifest.get(key) or None) != (reference.manifest.get(key) or None):
            raise Refused(
                "contract",
                f"{key} {manifest.get(key)!r}, the live version has {reference.manifest.get(key)!r}"[:400],
            )


def _contract(candidate: Candidate, reference: Slot | None) -> None:
    """The engine's tensors against the manifest and against the live engine's."""
    spec, manifest = candidate.engine.spec, candidate.manifest
    task = manifest.get("task")
    if task == "segmentation" and not spec.segmentation:
        raise Refused(
            "contract",
            "the tensors are not those of a segmentation graph: frame uint8 [N,H,W,3] -> "
            "labels, confidence uint8 [N,H,W]",
        )
    if spec.segmentation:
        classes = class_count(manifest)
        if classes == 0:
            raise Refused("contract", "the manifest of a segmentation engine names no classes")
        _, height, width, _ = spec.inputs[0].shape
        size = manifest.get("input") or {}
        for name, want, got in (("height", size.get("height"), height), ("width", size.get("width"), width)):
            if want is not None and got not in (-1, want):
                raise Refused("contract", f"the engine takes {name} {got}, the manifest says {want}")
        probabilities = spec.output("probabilities")
        if (
            probabilities is not None
            and len(probabilities.shape) == 4
            and probabilities.shape[1] not in (-1, classes)
        ):
            raise Refused(
                "contract", f"the engine has {probabilities.shape[1]} classes, the manifest names {classes}"
            )
    if reference is None:
        return
    live = reference.engine.spec
    for name, mine, theirs in (("inputs", spec.inputs, live.inputs), ("outputs", spec.outputs, live.outputs)):
        has, wanted = _described(mine), _described(theirs)
        if has != wanted:
            raise Refused("contract", f"{name} {', '.join(has)}; the live version has {', '.join(wanted)}")


def _described(tensors: tuple[TensorSpec, ...]) -> list[str]:
    return sorted(f"{t.name} {t.datatype} {list(t.shape)}" for t in tensors)


def _run_blind(candidate: Candidate) -> None:
    """A foreign network on numbers that mean nothing: it must run, and not turn them into NaN."""
    spec = candidate.engine.spec
    rng = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        shape = _concrete(tensor)
        if tensor.datatype in ("FP16", "FP32", "FP64"):
            inputs[tensor.name] = rng.random(shape).astype(DTYPES[tensor.datatype])
        elif tensor.datatype == "BYTES":
            inputs[tensor.name] = np.full(shape, "", dtype=np.object_)
        else:
            inputs[tensor.name] = np.zeros(shape, DTYPES[tensor.datatype])
    names = [tensor.name for tensor in spec.outputs]
    costs = []
    for _ in range(2):
        answer, cost = timed(candidate.engine, inputs, names)
        costs.append(cost)
    for name, value in answer.items():
        if value.dtype.kind == "f" and not bool(np.isfinite(value).all()):
            raise Refused("finite", f"output '{name}' is NaN or infinite for finite inputs")
    candidate.golden.cost_ms = min(costs)


def timed(engine: Engine, inputs: dict[str, Array], names: list[str]) -> tuple[dict[str, Array], float]:
    """(outputs, ms).  CPU time of the one thread where the engine computes on it: wall time on a busy
    machine at low priority says nothing about the engine."""
    wall, cpu = time.perf_counter(), time.thread_time()
    try:
        answer = engine.run(inputs, names)
    except Exception as error:
        raise Refused(
            "load", f"the engine loads but does not run: {' '.join(str(error).split())[:300]}"
        ) from error
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


def class_count(manifest: dict[str, Any]) -> int:
    return len(manifest.get("classes") or ())


def _hash(frame: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()


def total(looks: list[guard.Look]) -> guard.Look:
    total = looks[0]
    for other in looks[1:]:
        total = total + other
    return total
