"""Whether the requests of several clients may share a run of an engine.

A free first side does not say that it is a batch: a graph may mix its rows (a mean over them, indices that
reach into another request's rows) or give fewer rows than it takes.  Hence two rows are run alone and
together, and what each is answered must not depend on the other.  Knows engines and tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from runtime.engines import Engine
from runtime.tensors import DTYPES, Array, EngineSpec, TensorSpec

_FLOAT = 1e-2  # largest difference, as a share of the largest magnitude: kernels differ by the batch size
_EQUAL = 0.99  # share of equal elements of an output of whole numbers, which may be rounded floats


def mixes_rows(
    engine: Engine, rows: Sequence[Mapping[str, Array]], alone: Sequence[Mapping[str, Array]]
) -> str:
    """Why the engine must run each request alone; "" where requests may share a run.

    Args:
        engine: takes and gives tensors with a free first side each.
        rows: the inputs of some requests by name, with first sides that are equal within a request.
        alone: what the engine answered each of them alone, by output; these outputs are compared.
    """
    together = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    sizes = [len(next(iter(row.values()))) for row in rows]
    try:
        answer = engine.run(together, list(alone[0]))
    except Exception as error:  # each library raises its own
        return f"{sum(sizes)} rows do not run together: {' '.join(str(error).split())[:200]}"
    for name, value in answer.items():
        if value.shape[:1] != (sum(sizes),):
            return f"output '{name}' is {list(value.shape)} for {sum(sizes)} rows of input"
        offset = 0
        for size, own in zip(sizes, alone, strict=True):
            if own[name].shape[:1] != (size,):
                return f"output '{name}' is {list(own[name].shape)} for {size} rows of input"
            if not _alike(own[name], value[offset : offset + size]):
                return f"output '{name}' of a row depends on the other rows of its run"
            offset += size
    return ""


def foreign_mixes_rows(engine: Engine, takes: Mapping[str, Array]) -> str:
    """`mixes_rows` for an engine of which nothing is known but its tensors.

    Args:
        takes: inputs that it runs on.  Their own rows are compared where there are two, else rows of their
            shape, made up.  Numbers that it does not take (indices that are too high) are made smaller, down
            to zeros.
    """
    spec = engine.spec
    names = [tensor.name for tensor in spec.outputs]
    reason = "it runs on none of the numbers that were tried"
    own = [{name: array[i : i + 1] for name, array in takes.items()} for i in range(2)]
    whole = all(len(array) >= 2 for array in takes.values())
    for high in (*((0,) if whole else ()), 100, 2, 1):
        rng = np.random.default_rng(0)
        rows = own if high == 0 else [_made_up(rng, spec, takes, high) for _ in range(2)]
        try:
            alone = [engine.run(row, names) for row in rows]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            continue
        if all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0]):
            reason = "no two different rows were found that it takes"
            continue
        # The first row once more at the end: sorted rows are then in another order, whichever is larger.
        return mixes_rows(engine, [*rows, rows[0]], [*alone, alone[0]])
    return f"not known to keep its rows apart: {reason}"


def _made_up(
    rng: np.random.Generator, spec: EngineSpec, takes: Mapping[str, Array], high: int
) -> dict[str, Array]:
    return {t.name: _numbers(rng, t, (1, *takes[t.name].shape[1:]), high) for t in spec.inputs}


def _numbers(rng: np.random.Generator, tensor: TensorSpec, shape: tuple[int, ...], high: int) -> Array:
    if tensor.datatype in ("FP16", "FP32", "FP64"):
        return rng.random(shape).astype(DTYPES[tensor.datatype])
    if tensor.datatype == "BYTES":
        words = np.array([str(n) for n in rng.integers(0, high, shape).reshape(-1)], np.object_)
        return words.reshape(shape)
    return rng.integers(0, min(high, 2) if tensor.datatype == "BOOL" else high, shape).astype(
        DTYPES[tensor.datatype]
    )


def _alike(first: Array, second: Array) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    if first.dtype.kind != "f":
        return not first.size or float((first == second).mean()) >= _EQUAL
    known = np.isfinite(first)
    if not np.array_equal(known, np.isfinite(second)):
        return False
    one, other = first[known].astype(np.float64), second[known].astype(np.float64)
    scale = float(np.abs(one).max(initial=0.0))
    return bool((np.abs(one - other) <= _FLOAT * scale).all())
