"""What goes into a build and what comes out of it: `BuildOptions` and `Plan`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from export.tensorrt.options import PlanOptions
from runtime.engines.tensorrt.library import RTX

__all__ = ["BACKENDS", "PRECISIONS", "BuildOptions", "Plan", "Shape", "Tensor", "parse_batch"]

Shape = tuple[int, ...]

BACKENDS = ("tensorrt", RTX)
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class BuildOptions(PlanOptions):
    """How to build a plan: `PlanOptions`, and what depends on the graph.

    precision           the precision of the graph; the build fails if the graph has another one
    batch               (min, opt, max) of a free first dimension
    profiles            further free dimensions: input name -> (min, opt, max) shapes; wins over `batch`
    refit               names of the weights that may change later: exactly these are marked refittable
    """

    precision: str = "fp32"
    batch: tuple[int, int, int] | None = None
    profiles: Mapping[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)
    refit: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}: use one of {', '.join(PRECISIONS)}")
        for name, shapes in {"batch": self.batch and [(n,) for n in self.batch], **self.profiles}.items():
            if shapes and not all(0 < a <= b <= c for a, b, c in zip(*shapes, strict=True)):
                raise ValueError(f"{name} {shapes}: 0 < min <= opt <= max must hold in every dimension")
        if self.dla is not None and self.precision == "fp32":
            raise ValueError("a DLA computes in fp16 and int8 only: choose one of these precisions")


@dataclass(frozen=True)
class Tensor:
    """An input or output of the built network; -1 in `shape` is a free size."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """A serialised engine and facts about it.  `layers` is {} if nothing could be deserialised here."""

    data: bytes
    backend: str
    library: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    refittable: tuple[str, ...]
    seconds: float
    options: dict[str, Any]
    warnings: tuple[str, ...] = ()
    layers: dict[str, Any] = field(default_factory=dict)

    def manifest(self) -> dict[str, Any]:
        """Return everything but the bytes and the layers as JSON values."""
        values = asdict(self)
        del values["data"], values["layers"]
        values["bytes"] = len(self.data)
        values["sha256"] = hashlib.sha256(self.data).hexdigest()
        values["checked"] = (
            "parsed and built by TensorRT-RTX on CPU; not executed"
            if self.backend == RTX
            else "built by TensorRT on this machine's device"
        )
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found


def parse_batch(text: str) -> tuple[int, int, int]:
    """Return (4, 4, 4) for "4" and (1, 4, 8) for "1:4:8".  Raises ValueError for any other form."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"batch '{text}': write N or min:opt:max, with whole numbers above 0")
    low, middle, high = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
    if not low <= middle <= high:
        raise ValueError(f"batch '{text}': min <= opt <= max must hold")
    return low, middle, high
