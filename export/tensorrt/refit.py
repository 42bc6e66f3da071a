"""New weights for a plan: the same kernels, without a build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from common.text import one_line
from runtime.engines.cuda.gate import GATE
from runtime.engines.tensorrt.library import (
    BINDING_ERRORS,
    Library,
    Log,
    TensorRTError,
    check,
    open_runtime,
    tensorrt,
)
from runtime.engines.tensorrt.plan import refit_engine
from runtime.tensors import Array

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["compare_refittable", "refit_plan"]


def compare_refittable(marked: Sequence[str], found: Sequence[str]) -> None:
    """Refuse a plan whose refittable weights are not the marked ones.  Raises TensorRTError."""
    if lost := sorted(set(marked) - set(found)):
        raise TensorRTError(
            f"refit: TensorRT folded '{lost[0]}' into others ({len(lost)} such), so no refit can change it; "
            "leave it out of refit and build again when it changes"
        )
    if added := sorted(set(found) - set(marked)):
        raise TensorRTError(
            f"refit: the plan also wants '{added[0]}' at every refit ({len(added)} such); name it in refit"
        )


def refit_plan(
    plan: bytes,
    weights: Mapping[str, Array],
    *,
    host_code: bool = False,
    library: Library | None = None,
) -> bytes:
    """Return a new plan with these weights, itself refittable; `plan` stays as it is.

    Args:
        weights: exactly the refittable weights of the plan.  The refit changes a copy that no server runs.
        host_code: the plan may bring code for the host (a version-compatible plan does) and is trusted.
        library: for tests.
    Raises:
        TensorRTError: the weights do not fit, or TensorRT is older than 10.14.1, which writes plans that no
            refit can change.
    """
    found = library or tensorrt()
    # TensorRT has it from 10.14.1 on.
    flag = getattr(found.module.SerializationFlag, "INCLUDE_REFIT", None)
    if flag is None:
        raise TensorRTError(
            f"{found.text} writes a refitted plan that no refit can change again: 10.14.1 or newer is "
            "needed; pip install --upgrade tensorrt-cu13, or build the version again from the pack"
        )
    try:
        with GATE.change():
            return _refitted(found, plan, weights, host_code, flag)
    except TensorRTError:
        raise
    except BINDING_ERRORS as error:
        raise TensorRTError(f"{found.text} failed: {one_line(error)}; build the plan again") from error


def _refitted(
    library: Library, plan: bytes, weights: Mapping[str, Array], host_code: bool, flag: trt.SerializationFlag
) -> bytes:
    log = Log()
    runtime = open_runtime(library, log, host_code=host_code)
    loaded = runtime.deserialize_cuda_engine(plan)
    engine = check(loaded, "the plan cannot be loaded", "build it again on this device", log)
    refit_engine(library, engine, log, weights)
    config = check(engine.create_serialization_config(), "no serialisation config", "free host memory", log)
    check(config.set_flag(flag), "the plan could not be kept refittable", "build it again", log)
    return bytes(
        check(engine.serialize_with_config(config), "the plan was not written", "free host memory", log)
    )
