"""A version between its load and its flip: its engine, its golden answers and its reserved memory.

Knows engines and tasks; knows nothing of how a candidate is judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.checks.task import Stats, Task
from runtime.engines import Engine
from runtime.serving.memory_budget import Reservation
from runtime.tensors import Array


@dataclass
class Golden:
    """A version's answers on its golden frames, stored as the reference for the next version."""

    answers: dict[str, dict[str, Array]] = field(default_factory=dict)  # hash of the frame -> outputs
    stats: dict[str, Stats] = field(default_factory=dict)
    cost_ms: float = 0.0  # of one frame on one thread of low priority: comparable between candidates

    def add(self, task: Task, key: str, answer: dict[str, Array]) -> Stats:
        """Stores the outputs that comparisons need, and the statistics of the answer."""
        self.answers[key] = {head.required: answer[head.required] for head in task.heads}
        self.stats[key] = task.summarize(answer)
        return self.stats[key]


@dataclass
class Candidate:
    """`reservation`: its memory, declared until it is live or closed."""

    version: int
    engine: Engine
    manifest: dict[str, Any]
    golden: Golden
    reservation: Reservation
    task: Task | None = None
    frames: dict[str, Array] = field(default_factory=dict)
    blind: dict[str, Array] = field(default_factory=dict)  # of a foreign network: the inputs that it ran on
    mixes: str = ""  # why its requests must not share a run
    notes: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def close(self) -> None:
        """Closes the engine and releases the memory of a candidate that will not be live."""
        self.engine.close()
        self.reservation.release()
