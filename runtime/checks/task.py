"""What a network answers, and how that is judged: segmentation, edges, or both at once.

A `Task` has one `OutputChecks` per head of the network.  Verification, shadow and watch window use tasks and
do not depend on the kind of output.  Knows nothing of versions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.checks.edges import EdgeChecks
from runtime.checks.segmentation import SegmentationChecks
from runtime.config import GuardConfig, ShadowConfig
from runtime.tensors import Array, EngineSpec, TensorSpec

Answer = Mapping[str, Array]  # the outputs of one run, by name
Stats = dict[str, Any]  # the statistics of each head that answered, by the head's name; `total` adds them


class OutputChecks(Protocol):
    """The checks of one head.  Judgements return a reason, or None if they find no fault.

    outputs: the answer to a request that names none.  required: the output without which nothing can be
    judged.  golden: {array of golden.npz: dtype}.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def outputs(self) -> tuple[str, ...]: ...
    @property
    def required(self) -> str: ...
    @property
    def golden(self) -> Mapping[str, str]: ...

    def required_outputs(self, spec: EngineSpec) -> tuple[str, ...]:
        """Returns the outputs that a candidate is judged by."""
        ...

    def contract(self, spec: EngineSpec) -> str | None:
        """Judges the engine's tensors against the manifest."""
        ...

    def contract_violation(self, answer: Answer) -> str | None:
        """Judges whether the answer has values that the contract does not allow."""
        ...

    def summarize(self, answer: Answer) -> Any:
        """Returns the statistics of an answer; statistics add."""
        ...

    def not_finite(self, stats: Any, answer: Answer, reference: Any) -> str | None:
        """Judges whether the engine computes NaN or infinity."""
        ...

    def collapsed(self, stats: Any, reference: Any, limits: GuardConfig, max_vanished: float) -> str | None:
        """Judges whether classes dominate or have vanished; `reference` may be None."""
        ...

    def golden_fits(self, golden: Mapping[str, Array]) -> bool:
        """Returns whether the arrays of golden.npz belong together."""
        ...

    def parity(self, answer: Answer, expected: Answer) -> Any:
        """Compares an answer with the exporter's; parities add."""
        ...

    def parity_report(self, parity: Any) -> dict[str, float]: ...

    def golden_mismatch(self, parity: Any, limits: GuardConfig) -> str | None:
        """Judges the parity."""
        ...

    def pixel_agreement(self, first: Answer, second: Answer) -> float:
        """Returns the share of equal pixels, 0..1."""
        ...

    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> Any:
        """Compares two versions on the same frames; comparisons add."""
        ...

    def disagrees(self, comparison: Any, stats: Any, reference: Any, limits: ShadowConfig) -> str | None:
        """Judges whether the candidate is unrelated to the live version."""
        ...

    def report(self, comparison: Any, stats: Any, reference: Any) -> dict[str, Any]: ...

    def mean_confidence(self, stats: Any) -> float | None:
        """Returns 0..255; None if the head has no confidence."""
        ...


@dataclass(frozen=True)
class Task:
    """The checks of all heads of an engine of the graph contract.

    A judgement uses the heads that answered: a request that names only some outputs shows only some heads.
    """

    name: str
    heads: tuple[OutputChecks, ...]

    @property
    def names(self) -> list[str]:
        """Names of the heads."""
        return [head.name for head in self.heads]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The answer to a request that names none: probabilities are large, and sent only if named."""
        return tuple(name for head in self.heads for name in head.outputs)

    def required_outputs(self, spec: EngineSpec) -> list[str]:
        """Returns the outputs that a candidate is judged by."""
        return [name for head in self.heads for name in head.required_outputs(spec)]

    def contract(self, spec: EngineSpec, manifest: Mapping[str, Any]) -> str | None:
        """Judges the engine's tensors against the manifest."""
        if (task := manifest.get("task")) and task != self.name:
            return f"the tensors are those of '{self.name}', the manifest says task {str(task)[:40]!r}"
        _, height, width, _ = spec.inputs[0].shape
        size = manifest.get("input") or {}
        for name, want, got in (("height", size.get("height"), height), ("width", size.get("width"), width)):
            if want is not None and got not in (-1, want):
                return f"the engine takes {name} {got}, the manifest says {want}"
        return _first(head.contract(spec) for head in self.heads)

    @property
    def golden(self) -> dict[str, str]:
        """{array of golden.npz: dtype}."""
        return {"frames": "uint8"} | {n: kind for head in self.heads for n, kind in head.golden.items()}

    def expected(self, golden: Mapping[str, Array], index: int) -> dict[str, Array]:
        """Returns the exporter's answer for a golden frame, each array with a first dimension of 1."""
        names = [n for head in self.heads for n in head.golden if index < len(golden[n])]
        return {name: golden[name][index : index + 1] for name in names}

    def has_outputs(self, answer: Answer) -> bool:
        """Returns whether an answer has an output that can be judged."""
        return any(head.required in answer for head in self.heads)

    def is_map(self, name: str) -> bool:
        """Returns whether an output has several classes per pixel, of which none is the highest."""
        return any(isinstance(head, EdgeChecks) and name in head.outputs for head in self.heads)

    def contract_violation(self, answer: Answer) -> str | None:
        """Judges whether the answer has values that the contract does not allow."""
        return _first(head.contract_violation(answer) for head in self.heads)

    def summarize(self, answer: Answer) -> Stats:
        """Returns the statistics of each head that answered."""
        return {head.name: head.summarize(answer) for head in self.heads if head.required in answer}

    def not_finite(self, stats: Stats, answer: Answer, reference: Stats | None = None) -> str | None:
        other = reference or {}
        return _first(
            head.not_finite(stats[head.name], answer, other.get(head.name)) for head in self._of(stats)
        )

    def collapsed(
        self, stats: Stats, reference: Stats | None, limits: GuardConfig, max_vanished: float
    ) -> str | None:
        """Judges the heads that the reference shows; all of them without a reference."""
        heads = self._of(stats) if reference is None else self._of(stats, reference)
        return _first(
            head.collapsed(stats[head.name], (reference or {}).get(head.name), limits, max_vanished)
            for head in heads
        )

    def parity(self, answer: Answer, expected: Answer) -> dict[str, Any]:
        heads = [head for head in self.heads if all(name in expected for name in head.golden)]
        return {head.name: head.parity(answer, expected) for head in heads}

    def parity_report(self, parity: Mapping[str, Any]) -> dict[str, float]:
        return {k: v for head in self._of(parity) for k, v in head.parity_report(parity[head.name]).items()}

    def golden_mismatch(self, parity: Mapping[str, Any], limits: GuardConfig) -> str | None:
        return _first(head.golden_mismatch(parity[head.name], limits) for head in self._of(parity))

    def pixel_agreement(self, first: Answer, second: Answer) -> float:
        """Returns the share of equal pixels of the head that differs most, 0..1."""
        return min(head.pixel_agreement(first, second) for head in self.heads)

    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> dict[str, Any]:
        heads = [head for head in self.heads if head.required in live]
        return {head.name: head.compare(live, candidate, limits) for head in heads}

    def disagrees(
        self, comparison: Mapping[str, Any], stats: Stats, reference: Stats, limits: ShadowConfig
    ) -> str | None:
        return _first(
            head.disagrees(comparison[head.name], stats[head.name], reference[head.name], limits)
            for head in self._of(comparison, stats, reference)
        )

    def report(self, comparison: Mapping[str, Any], stats: Stats, reference: Stats) -> dict[str, Any]:
        heads = self._of(comparison, stats, reference)
        return {
            key: value
            for head in heads
            for key, value in head.report(
                comparison[head.name], stats[head.name], reference[head.name]
            ).items()
        }

    def mean_confidence(self, stats: Stats) -> float | None:
        """Returns 0..255; None if no head has a confidence."""
        values = [head.mean_confidence(stats[head.name]) for head in self._of(stats)]
        return next((value for value in values if value is not None), None)

    def _of(self, *stats: Mapping[str, Any]) -> list[Any]:
        return [head for head in self.heads if all(head.name in each for each in stats)]


def recognise(spec: EngineSpec) -> tuple[str, ...]:
    """Returns the names of the heads whose tensors an engine has; () for a foreign network."""
    frame = spec.input("frame")
    if len(spec.inputs) != 1 or frame is None or not _is(frame, "UINT8", 4) or frame.shape[3] != 3:
        return ()
    found = []
    if all(_is(spec.output(name), "UINT8", 3) for name in SegmentationChecks.outputs):
        found.append(SegmentationChecks.name)
    if _is(spec.output("edge_bits"), "INT32", 3) and _is(spec.output("edges"), "UINT8", 4):
        found.append(EdgeChecks.name)
    return tuple(found)


def of(spec: EngineSpec, manifest: Mapping[str, Any]) -> Task | None:
    """Returns the task of an engine with the names of its manifest; None for a foreign network."""
    found = recognise(spec)
    if not found:
        return None
    heads: list[OutputChecks] = []
    name = found[0] if len(found) == 1 else "joint"
    if SegmentationChecks.name in found:
        heads.append(SegmentationChecks(_names(manifest, "classes")))
    if EdgeChecks.name in found:
        key = "edge_classes" if manifest.get("edge_classes") or name == "joint" else "classes"
        heads.append(EdgeChecks(_names(manifest, key), _numbers(manifest.get("edge_thresholds"))))
    return Task(name, tuple(heads))


#: Keys in which a version's manifest must equal the live one's: clients depend on them.
PROMISED = ("task", "classes", "edge_classes")
#: Tasks of the graph contract, by the name that a manifest gives them.
TENSORS = {
    "segmentation": "labels, confidence uint8 [N,H,W]",
    "edges": "edge_bits int32 [N,H,W], edges uint8 [N,K,H,W]",
    "joint": "labels, confidence uint8 [N,H,W], edge_bits int32 [N,H,W], edges uint8 [N,K,H,W]",
}


def total(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds statistics, comparisons or parities of several frames, head by head; {} if there are none."""
    sums: dict[str, Any] = {}
    for each in counts:
        for name, value in each.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums


def _is(tensor: TensorSpec | None, kind: str, rank: int) -> bool:
    return tensor is not None and tensor.datatype == kind and len(tensor.shape) == rank


def _names(manifest: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = manifest.get(key)
    return tuple(str(name) for name in value) if isinstance(value, list) else ()


def _numbers(value: Any) -> tuple[float, ...]:
    """Returns () for anything but a list of finite numbers; the contract then refuses it."""
    if not isinstance(value, list):
        return ()
    good = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    return tuple(float(x) for x in value) if good else ()


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)
