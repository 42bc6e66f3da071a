"""What a network answers, and how that is judged: one place for segmentation, edges, and both at once.

A `Task` is made of parts, one a head of the network; each part knows its tensors, its classes, how to look at
an answer and what a look must show.  Verification, shadow and watch window work with tasks and do not ask
what they are about.  What is judged is in `guard` and `guard_edges`; nothing here knows of versions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from runtime.checks import edges as checks_edges
from runtime.checks import segmentation
from runtime.config import GuardConfig, ShadowConfig
from runtime.tensors import Array, EngineSpec, TensorSpec

Answer = Mapping[str, Array]  # the outputs of one run by name
Looks = dict[str, Any]  # of each part that was answered, by the part's name; they add by `total`


class Part(Protocol):
    """One head.  `outputs`: what a request gets that names none; `needs`: without these nothing is seen;
    `golden`: {array of golden.npz: dtype}.  Judgements return a reason, or None."""

    name: str
    classes: tuple[str, ...]
    outputs: tuple[str, ...]
    needs: str
    golden: Mapping[str, str]

    def asked(self, spec: EngineSpec) -> tuple[str, ...]: ...
    def contract(self, spec: EngineSpec) -> str | None: ...
    def fits(self, golden: Mapping[str, Array]) -> bool: ...
    def beyond(self, answer: Answer) -> str | None: ...
    def look(self, answer: Answer) -> Any: ...
    def not_finite(self, look: Any, answer: Answer, reference: Any) -> str | None: ...
    def collapsed(
        self, look: Any, reference: Any, limits: GuardConfig, max_vanished: float
    ) -> str | None: ...
    def parity(self, answer: Answer, expected: Answer) -> Any: ...
    def parity_figures(self, parity: Any) -> dict[str, float]: ...
    def missed(self, parity: Any, limits: GuardConfig) -> str | None: ...
    def same(self, first: Answer, second: Answer) -> float: ...
    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> Any: ...
    def disagrees(self, comparison: Any, look: Any, reference: Any, limits: ShadowConfig) -> str | None: ...
    def figures(self, comparison: Any, look: Any, reference: Any) -> dict[str, Any]: ...
    def confidence(self, look: Any) -> float | None: ...


@dataclass(frozen=True)
class LabelPart:
    """Segmentation: labels, confidence uint8 [N,H,W], and probabilities float [N,C,h,w] where it has them."""

    classes: tuple[str, ...]
    name = "segmentation"
    outputs = ("labels", "confidence")
    needs = "labels"
    golden = {"labels": "uint8", "confidence": "uint8"}  # noqa: RUF012

    def asked(self, spec: EngineSpec) -> tuple[str, ...]:
        return (*self.outputs, "probabilities") if spec.output("probabilities") else self.outputs

    def contract(self, spec: EngineSpec) -> str | None:
        if not self.classes:
            return "the manifest of a segmentation engine names no classes"
        probabilities = spec.output("probabilities")
        count = len(self.classes)
        if probabilities is None or len(probabilities.shape) != 4 or probabilities.shape[1] in (-1, count):
            return None
        return f"the engine has {probabilities.shape[1]} classes, the manifest names {count}"

    def fits(self, golden: Mapping[str, Array]) -> bool:
        return all(golden[name].shape == golden["frames"].shape[:3] for name in self.golden)

    def beyond(self, answer: Answer) -> str | None:
        top = int(answer["labels"].max(initial=0))
        return f"label {top} is beyond the {len(self.classes)} classes" if top >= len(self.classes) else None

    def look(self, answer: Answer) -> segmentation.Look:
        return segmentation.look(answer["labels"], answer.get("confidence"), len(self.classes))

    def not_finite(self, look: segmentation.Look, answer: Answer, reference: segmentation.Look | None) -> str | None:
        return segmentation.not_finite(look, answer.get("probabilities"))

    def collapsed(
        self, look: segmentation.Look, reference: segmentation.Look | None, limits: GuardConfig, max_vanished: float
    ) -> str | None:
        return segmentation.collapsed(look, reference, limits, self.classes, max_vanished)

    def parity(self, answer: Answer, expected: Answer) -> Array:
        """[agreement, mean absolute difference of confidence, frames]; parities add."""
        difference = np.abs(answer["confidence"].astype(np.int16) - expected["confidence"]).mean()
        return np.array([(answer["labels"] == expected["labels"]).mean(), difference, 1.0])

    def parity_figures(self, parity: Array) -> dict[str, float]:
        agreement, difference, frames = (float(x) for x in parity)
        return {
            "golden_agreement": round(agreement / frames, 6),
            "golden_confidence": round(difference / frames, 3),
        }

    def missed(self, parity: Array, limits: GuardConfig) -> str | None:
        agreement, difference, frames = (float(x) for x in parity)
        if agreement / frames < limits.min_golden_agreement:
            return (
                f"labels equal the manifest's on {agreement / frames:.2%} of the golden "
                f"pixels, the limit is {limits.min_golden_agreement:.2%}"
            )
        if difference / frames > limits.max_golden_confidence:
            return (
                f"confidence differs from the manifest's by {difference / frames:.1f} of 255 "
                f"on average, the limit is {limits.max_golden_confidence}"
            )
        return None

    def same(self, first: Answer, second: Answer) -> float:
        return float((first["labels"] == second["labels"]).mean())

    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> segmentation.Comparison:
        return segmentation.compare(live["labels"], candidate["labels"], len(self.classes))

    def disagrees(
        self, comparison: segmentation.Comparison, look: segmentation.Look, reference: segmentation.Look, limits: ShadowConfig
    ) -> str | None:
        # a live answer without confidence (not asked for) sums to 0 and limits nothing
        return segmentation.disagrees(comparison, look, reference, limits)

    def figures(
        self, comparison: segmentation.Comparison, look: segmentation.Look, reference: segmentation.Look
    ) -> dict[str, Any]:
        return {
            "agreement": round(comparison.agreement, 4),
            "kappa": round(comparison.kappa, 4),
            "speckle": [round(reference.speckle, 4), round(look.speckle, 4)],
            "confidence": [round(reference.mean_confidence, 1), round(look.mean_confidence, 1)],
            "shares": [[round(float(x), 4) for x in each.shares] for each in (reference, look)],
        }

    def confidence(self, look: segmentation.Look) -> float | None:
        return look.mean_confidence


@dataclass(frozen=True)
class EdgePart:
    """Semantic edges: edge_bits int32 [N,H,W], edges uint8 [N,K,H,W]; `thresholds` are the manifest's."""

    classes: tuple[str, ...]
    thresholds: tuple[float, ...]
    name = "edges"
    outputs = ("edge_bits", "edges")
    needs = "edge_bits"
    golden = {"edge_bits": "int32", "edges": "uint8"}  # noqa: RUF012

    def asked(self, spec: EngineSpec) -> tuple[str, ...]:
        return self.outputs

    def contract(self, spec: EngineSpec) -> str | None:
        edges, count = spec.output("edges"), len(self.classes)
        assert edges is not None, "recognised by it"
        if not 1 <= count <= checks_edges.MAX_CLASSES:
            return f"the manifest names {count} edge_classes; edge_bits holds 1 to {checks_edges.MAX_CLASSES}"
        if edges.shape[1] not in (-1, count):
            return f"the engine has {edges.shape[1]} edge classes, the manifest names {count}"
        if len(self.thresholds) != count or not all(0 < t < 1 for t in self.thresholds):
            return f"edge_thresholds must be {count} numbers between 0 and 1, one for each edge class"
        return None

    def fits(self, golden: Mapping[str, Array]) -> bool:
        """Maybe of fewer frames than there are: of each class a map is large."""
        frames, bits, edges = golden["frames"], golden["edge_bits"], golden["edges"]
        return (
            bits.ndim == 3
            and len(bits) <= len(frames)
            and bits.shape[1:] == frames.shape[1:3]
            and edges.shape == (len(bits), len(self.classes), *frames.shape[1:3])
        )

    def beyond(self, answer: Answer) -> str | None:
        bits, edges = answer["edge_bits"], answer["edges"]
        if edges.shape != (len(bits), len(self.classes), *bits.shape[1:]):
            return f"edges {list(edges.shape)} and edge_bits {list(bits.shape)} are not of one frame"
        if stray := checks_edges.look(bits, None, len(self.classes)).stray:
            return f"edge_bits carries bits beyond the {len(self.classes)} classes on {stray} pixels"
        return checks_edges.inconsistent(bits, edges, self.thresholds)

    def look(self, answer: Answer) -> checks_edges.EdgeLook:
        return checks_edges.look(answer["edge_bits"], answer.get("edges"), len(self.classes))

    def not_finite(
        self, look: checks_edges.EdgeLook, answer: Answer, reference: checks_edges.EdgeLook | None
    ) -> str | None:
        return checks_edges.not_finite(look, reference)

    def collapsed(
        self,
        look: checks_edges.EdgeLook,
        reference: checks_edges.EdgeLook | None,
        limits: GuardConfig,
        max_vanished: float,
    ) -> str | None:
        return checks_edges.collapsed(look, reference, limits, self.classes, max_vanished)

    def parity(self, answer: Answer, expected: Answer) -> checks_edges.Parity:
        return checks_edges.parity(
            answer["edge_bits"],
            answer["edges"],
            expected["edge_bits"],
            expected["edges"],
            len(self.classes),
        )

    def parity_figures(self, parity: checks_edges.Parity) -> dict[str, float]:
        return {
            "golden_bits": round(parity.bits_equal, 6),
            "golden_overlap": round(parity.overlap, 4),
            "golden_edges": round(parity.mean_difference, 3),
        }

    def missed(self, parity: checks_edges.Parity, limits: GuardConfig) -> str | None:
        return checks_edges.missed(parity, limits)

    def same(self, first: Answer, second: Answer) -> float:
        return float((first["edge_bits"] == second["edge_bits"]).mean())

    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> checks_edges.EdgeComparison:
        return checks_edges.compare(
            live["edge_bits"], candidate["edge_bits"], len(self.classes), limits.edge_tolerance
        )

    def disagrees(
        self, comparison: checks_edges.EdgeComparison, look: Any, reference: Any, limits: ShadowConfig
    ) -> str | None:
        return checks_edges.disagrees(comparison, limits)

    def figures(
        self,
        comparison: checks_edges.EdgeComparison,
        look: checks_edges.EdgeLook,
        reference: checks_edges.EdgeLook,
    ) -> dict[str, Any]:
        return {
            "edges_found": round(comparison.found, 4),
            "edges_kept": round(comparison.kept, 4),
            "edges_mixed": round(comparison.mixed, 4),
            "edge_share": [round(reference.share, 5), round(look.share, 5)],
            "edge_shares": [[round(float(x), 5) for x in each.shares] for each in (reference, look)],
        }

    def confidence(self, look: Any) -> float | None:
        return None  # how many edges there are depends on the scene


@dataclass(frozen=True)
class Task:
    """What an engine of the graph contract answers, by its heads.

    A judgement takes what the parts answered: a request that names only some outputs shows only some parts.
    """

    name: str
    parts: tuple[LabelPart | EdgePart, ...]

    @property
    def names(self) -> list[str]:
        """Of the parts."""
        return [part.name for part in self.parts]

    @property
    def outputs(self) -> tuple[str, ...]:
        """What a request gets that names none: probabilities are large, and sent only where named."""
        return tuple(name for part in self.parts for name in part.outputs)

    def asked(self, spec: EngineSpec) -> list[str]:
        """What is asked of a candidate that is judged."""
        return [name for part in self.parts for name in part.asked(spec)]

    def contract(self, spec: EngineSpec, manifest: Mapping[str, Any]) -> str | None:
        """The engine's tensors against what its manifest says."""
        if (said := manifest.get("task")) and said != self.name:
            return f"the tensors are those of '{self.name}', the manifest says task {str(said)[:40]!r}"
        _, height, width, _ = spec.inputs[0].shape
        size = manifest.get("input") or {}
        for name, want, got in (("height", size.get("height"), height), ("width", size.get("width"), width)):
            if want is not None and got not in (-1, want):
                return f"the engine takes {name} {got}, the manifest says {want}"
        return _first(part.contract(spec) for part in self.parts)

    @property
    def golden(self) -> dict[str, str]:
        """{array of golden.npz: dtype}."""
        return {"frames": "uint8"} | {n: kind for part in self.parts for n, kind in part.golden.items()}

    def expected(self, golden: Mapping[str, Array], index: int) -> dict[str, Array]:
        """What the exporter's network said of a golden frame, each with a first dimension of 1."""
        names = [n for part in self.parts for n in part.golden if index < len(golden[n])]
        return {name: golden[name][index : index + 1] for name in names}

    def seen(self, answer: Answer) -> bool:
        """Whether an answer shows anything that can be judged."""
        return any(part.needs in answer for part in self.parts)

    def is_map(self, name: str) -> bool:
        """Whether an output is a map of several classes a pixel, of which there is no highest."""
        return any(isinstance(part, EdgePart) and name in part.outputs for part in self.parts)

    def beyond(self, answer: Answer) -> str | None:
        """Values that the contract does not know."""
        return _first(part.beyond(answer) for part in self.parts)

    def look(self, answer: Answer) -> Looks:
        return {part.name: part.look(answer) for part in self.parts if part.needs in answer}

    def not_finite(self, looks: Looks, answer: Answer, reference: Looks | None = None) -> str | None:
        other = reference or {}
        return _first(
            part.not_finite(looks[part.name], answer, other.get(part.name))
            for part in self._of(looks)
        )

    def collapsed(
        self, looks: Looks, reference: Looks | None, limits: GuardConfig, max_vanished: float
    ) -> str | None:
        """With a reference, parts that it does not show are not judged."""
        parts = self._of(looks) if reference is None else self._of(looks, reference)
        return _first(
            part.collapsed(looks[part.name], (reference or {}).get(part.name), limits, max_vanished)
            for part in parts
        )

    def parity(self, answer: Answer, expected: Answer) -> dict[str, Any]:
        parts = [part for part in self.parts if all(name in expected for name in part.golden)]
        return {part.name: part.parity(answer, expected) for part in parts}

    def parity_figures(self, parity: Mapping[str, Any]) -> dict[str, float]:
        return {k: v for p in self._of(parity) for k, v in p.parity_figures(parity[p.name]).items()}

    def missed(self, parity: Mapping[str, Any], limits: GuardConfig) -> str | None:
        return _first(part.missed(parity[part.name], limits) for part in self._of(parity))

    def same(self, first: Answer, second: Answer) -> float:
        """Share of the pixels on which two answers say the same."""
        return min(part.same(first, second) for part in self.parts)

    def compare(self, live: Answer, candidate: Answer, limits: ShadowConfig) -> dict[str, Any]:
        parts = [part for part in self.parts if part.needs in live]
        return {part.name: part.compare(live, candidate, limits) for part in parts}

    def disagrees(
        self, comparison: Mapping[str, Any], looks: Looks, reference: Looks, limits: ShadowConfig
    ) -> str | None:
        return _first(
            part.disagrees(comparison[part.name], looks[part.name], reference[part.name], limits)
            for part in self._of(comparison, looks, reference)
        )

    def figures(self, comparison: Mapping[str, Any], looks: Looks, reference: Looks) -> dict[str, Any]:
        parts = self._of(comparison, looks, reference)
        return {
            key: value
            for part in parts
            for key, value in part.figures(
                comparison[part.name], looks[part.name], reference[part.name]
            ).items()
        }

    def confidence(self, looks: Looks) -> float | None:
        """Mean confidence 0..255, where a part has one."""
        values = [part.confidence(looks[part.name]) for part in self._of(looks)]
        return next((value for value in values if value is not None), None)

    def _of(self, *looks: Mapping[str, Any]) -> list[Any]:
        return [part for part in self.parts if all(part.name in each for each in looks)]


def recognise(spec: EngineSpec) -> tuple[str, ...]:
    """The parts whose tensors an engine has, by name; () for one that is foreign to the graph contract."""
    frame = spec.input("frame")
    if len(spec.inputs) != 1 or frame is None or not _is(frame, "UINT8", 4) or frame.shape[3] != 3:
        return ()
    found = []
    if all(_is(spec.output(name), "UINT8", 3) for name in LabelPart.outputs):
        found.append(LabelPart.name)
    if _is(spec.output("edge_bits"), "INT32", 3) and _is(spec.output("edges"), "UINT8", 4):
        found.append(EdgePart.name)
    return tuple(found)


def of(spec: EngineSpec, manifest: Mapping[str, Any]) -> Task | None:
    """The task of an engine with the names of its manifest; None for a foreign network."""
    found = recognise(spec)
    if not found:
        return None
    parts: list[LabelPart | EdgePart] = []
    name = found[0] if len(found) == 1 else "joint"
    if LabelPart.name in found:
        parts.append(LabelPart(_names(manifest, "classes")))
    if EdgePart.name in found:
        key = "edge_classes" if manifest.get("edge_classes") or name == "joint" else "classes"
        parts.append(EdgePart(_names(manifest, key), _numbers(manifest.get("edge_thresholds"))))
    return Task(name, tuple(parts))


#: What the manifest of a version must have in common with the live one's: clients depend on it.
PROMISED = ("task", "classes", "edge_classes")
#: Tasks of the graph contract, by the name that a manifest gives them.
TENSORS = {
    "segmentation": "labels, confidence uint8 [N,H,W]",
    "edges": "edge_bits int32 [N,H,W], edges uint8 [N,K,H,W]",
    "joint": "labels, confidence uint8 [N,H,W], edge_bits int32 [N,H,W], edges uint8 [N,K,H,W]",
}


def total(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Looks, comparisons or parities of several frames as one, part by part; {} of none."""
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
    """() for anything that is not a list of finite numbers, which the contract then refuses."""
    if not isinstance(value, list):
        return ()
    good = all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value
    )
    return tuple(float(x) for x in value) if good else ()


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)
