"""SEAL's alignment of many crops: one after the other, or in processes of their own.

The crops of a round are independent of each other, so the labels are the same with any number of processes.
This module imports no torch, so that a worker starts in about a second.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapt.labels.edge_codec import pack, unpack
from adapt.labels.seal import Gate, align

__all__ = ["Aligners", "align_bits"]

Work = tuple[NDArray[np.uint32], NDArray[np.floating]]


def align_bits(
    bits: NDArray[np.uint32],
    probability: NDArray[np.floating],
    solver: str,
    gate: Gate | None,
    parameters: dict[str, float],
) -> NDArray[np.uint32]:
    """A crop's bit field uint32 [C,h,w] with each class's label aligned to float [K,h,w] probabilities.

    Ignored pixels stay ignored.  Raises EdgeError as ``align`` does.
    """
    edges, ignore = unpack(bits, len(probability))
    for k in np.flatnonzero(edges.any((1, 2))):
        edges[k] = align(edges[k], probability[k], solver=solver, gate=gate, **parameters)  # type: ignore[arg-type]
    return pack(edges, ignore)


class Aligners:
    """Aligns crops in order; use it as a context manager.

    jobs: 1 aligns in this process, n in n processes, 0 in one per core.  The processes start with the first
    crop and end with the context.
    """

    def __init__(self, jobs: int, solver: str, gate: Gate | None, parameters: dict[str, float]) -> None:
        if jobs < 0:
            raise ValueError(f"alignment: {jobs} jobs; give 1 or more, or 0 for all cores")
        self.jobs = jobs or len(os.sched_getaffinity(0))
        self.how: tuple[Any, ...] = (solver, gate, parameters)
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Aligners:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def aligned(self, work: Iterable[Work]) -> Iterator[NDArray[np.uint32]]:
        """The aligned bit field of each (bit field, probabilities), in the order given."""
        if self.jobs == 1:
            for bits, probability in work:
                yield align_bits(bits, probability, *self.how)
            return
        if self._pool is None:
            # Not forked: torch's threads would be copied in whatever state they are.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.jobs, mp_context=context)
        waiting: deque[Future[NDArray[np.uint32]]] = deque()
        for bits, probability in work:
            waiting.append(self._pool.submit(align_bits, bits, probability, *self.how))
            while len(waiting) > 2 * self.jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
