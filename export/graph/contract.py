"""The graph contract, in torch: what every engine must answer, and what parity is measured against.

    frame uint8 [N,H,W,3] RGB

    segmentation  labels uint8 [N,H,W]
                  confidence uint8 [N,H,W]        255 times the largest softmax, truncated
                  probabilities float32 [N,C,h,w] softmax at the logits' own resolution
    edges         edge_bits int32 [N,H,W]         bit k: class k at or over its threshold
                  edges uint8 [N,K,H,W]           255 times the sigmoid, rounded
    joint         both, from one run of the backbone

Confidence is 1/sum(exp(x - max x)) of the enlarged logits: the largest softmax without ever computing a
full-resolution softmax.  Thresholds are compared on logits, before any rounding.  `export.graph.writer`
writes the same graph as ONNX.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.errors import ExportError
from networks.base import SegmentationNetwork
from networks.pack import TASKS, PackSpec, normalise

INPUT = "frame"
#: Of each head, in the graph's order.  `COMPARED` are what parity and golden.npz hold.
OUTPUTS = {"segmentation": ("labels", "confidence", "probabilities"), "edges": ("edge_bits", "edges")}
COMPARED = {"segmentation": ("labels", "confidence"), "edges": ("edges", "edge_bits")}
#: edge_bits is one int32, its sign left alone.
MOST_EDGES = 31
DEFAULT_THRESHOLD = 0.5


@dataclass(frozen=True)
class Contract:
    """What an engine answers: its task, the names of its classes, and from where an edge is one.

    `classes` are those of the segmentation (empty for edges), `edge_classes` and `thresholds` those of the
    edges (empty for a segmentation); a threshold is a probability.
    """

    task: str
    classes: tuple[str, ...]
    edge_classes: tuple[str, ...] = ()
    thresholds: tuple[float, ...] = ()

    @classmethod
    def of(
        cls,
        spec: PackSpec,
        network: SegmentationNetwork,
        *,
        task: str | None = None,
        thresholds: float | Sequence[float] | None = None,
    ) -> Contract:
        """The contract of a pack.

        Args:
            task: what it is served for; None: what the pack says.
            thresholds: one, or one for each edge class; None: the pack's, else a half.
        Raises:
            ExportError: a task that the network does not have, edge classes without names, more than 31,
                thresholds that are no probabilities or not as many as classes.
        """
        task = task or spec.task
        if task not in network.TASKS:
            others = ", ".join(t for t in TASKS if t in network.TASKS)
            raise ExportError(f"{spec.network} cannot be served for {task!r}; it has: {others}")
        if task == "segmentation":
            if thresholds is not None:
                raise ExportError("edge thresholds are given, but what is served is a segmentation")
            return cls(task, spec.classes)
        names = spec.edge_classes or spec.classes
        if len(names) != network.edge_count:
            raise ExportError(
                f"{spec.network} answers {network.edge_count} edge classes and the pack names {len(names)}; "
                "name them in its edge_classes"
            )
        if len(names) > MOST_EDGES:
            raise ExportError(
                f"{len(names)} edge classes: edge_bits is one int32, {MOST_EDGES} fit; split the head"
            )
        limits = _thresholds(thresholds, spec, len(names))
        return cls(task, spec.classes if task == "joint" else (), names, limits)

    @property
    def heads(self) -> tuple[str, ...]:
        return ("segmentation", "edges") if self.task == "joint" else (self.task,)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(name for head in self.heads for name in OUTPUTS[head])

    @property
    def compared(self) -> tuple[str, ...]:
        return tuple(name for head in self.heads for name in COMPARED[head])

    @property
    def labels(self) -> tuple[str, ...]:
        """What labels.txt and the manifest's "classes" hold."""
        return self.classes or self.edge_classes

    @property
    def limits(self) -> np.ndarray:
        """float32 [K]: thresholds of logits.  sigmoid(x) >= t is x >= log(t / (1 - t))."""
        values = np.asarray(self.thresholds, np.float64)
        limits: np.ndarray = np.log(values / (1 - values)).astype(np.float32)
        return limits


def _thresholds(given: float | Sequence[float] | None, spec: PackSpec, count: int) -> tuple[float, ...]:
    if given is None:
        given = spec.edge_thresholds or DEFAULT_THRESHOLD
    values = (float(given),) * count if isinstance(given, (int, float)) else tuple(map(float, given))
    if len(values) == 1:
        values *= count
    # Written so that NaN is refused too.
    if len(values) != count or not all(0 < value < 1 for value in values):
        shown = ", ".join(f"{value:g}" for value in values)
        raise ExportError(
            f"edge thresholds {shown}: give one, or one for each of the {count} edge classes, between 0 and 1"
        )
    return values


class ServingGraph(nn.Module):
    """A network with its pre- and post-processing: uint8 frames in, the contract's outputs out, in order."""

    def __init__(
        self, network: SegmentationNetwork, spec: PackSpec, contract: Contract | None = None
    ) -> None:
        """Make the module that serves a network; `contract` None: that of the pack.  Raises ExportError."""
        super().__init__()
        self.network = network.eval()
        self.spec = spec
        self.contract = contract or Contract.of(spec, network)

    def forward(self, frame: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N,H,W,3] RGB -> the tensors named by `contract.outputs`."""
        return self.answers(self.logits(frame), (frame.shape[1], frame.shape[2]))

    def logits(self, frame: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N,H,W,3] RGB -> float32 [N,C,h,w], one for each head of the contract."""
        answer = getattr(self.network, self.network.TASKS[self.contract.task])(normalise(frame, self.spec))
        return answer if isinstance(answer, tuple) else (answer,)

    def answers(self, logits: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, ...]:
        """What `logits` gave, enlarged to (height, width) -> the tensors named by `contract.outputs`."""
        parts: tuple[Tensor, ...] = ()
        for head, part in zip(self.contract.heads, logits, strict=True):
            full = F.interpolate(part, size=size, mode="bilinear", align_corners=False)
            parts += _segmentation(part, full) if head == "segmentation" else self._edges(full)
        return parts

    def _edges(self, full: Tensor) -> tuple[Tensor, Tensor]:
        limits = torch.from_numpy(self.contract.limits).to(full.device)
        powers = torch.tensor([1 << k for k in range(len(limits))], dtype=torch.int32, device=full.device)
        on = (full >= limits[:, None, None]).to(torch.int32)
        bits = (on * powers[:, None, None]).sum(1, dtype=torch.int32)
        return bits, (full.sigmoid() * 255 + 0.5).to(torch.uint8)


def _segmentation(logits: Tensor, full: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest = full.amax(1, keepdim=True)
    confidence = 255.0 / torch.exp(full - largest).sum(1)
    return full.argmax(1).to(torch.uint8), confidence.to(torch.uint8), torch.softmax(logits, 1)
