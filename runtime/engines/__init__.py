"""Engines: what computes an answer.  One protocol, one module per library.

Nothing here knows of versions, slots or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from runtime.config import EngineConfig
from runtime.errors import Refused, Unjudged
from runtime.tensors import Array, EngineSpec


@runtime_checkable
class Engine(Protocol):
    """A loaded network.  `run` may be called from several threads at once."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def memory_bytes(self) -> int:
        """What it was declared to take, not what it was measured to take."""
        ...

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        """Computes the named outputs.  Raises whatever the library raises."""
        ...

    def with_serving_threads(self) -> Engine:
        """The same network with the live thread budget.

        A candidate is loaded with one thread, because a pool that is made by a thread of low
        priority keeps that priority for ever.  Called once, from a thread of normal priority.
        """
        ...

    def close(self) -> None: ...


def load(model: bytes, kind: str, precision: str, config: EngineConfig, *, candidate: bool) -> Engine:
    """Builds an engine from the bytes of its file.

    `candidate`: one thread, to be `with_serving_threads()` later.  Raises Refused("load", …).
    """
    if kind == "onnxruntime":
        from runtime.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine.load(model, precision, config, candidate=candidate)
    if kind == "tensorrt":
        from runtime.engines.tensorrt.engine import TensorRTEngine

        return TensorRTEngine.load(model, precision, config, candidate=candidate)
    if kind == "tensorrt-rtx":
        raise Refused("load", "a tensorrt-rtx plan was built for a check and is not served; build tensorrt")
    raise Unjudged("load", f"engine kind '{kind}' is not known to this server; known: onnxruntime, tensorrt")
