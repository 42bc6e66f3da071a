"""ONNX Runtime behind the engine protocol.

Measured facts that shaped it (docs/serving.md): pool threads must not spin where
adaptation shares the cores; a pool made by a niced thread stays niced; a model saved
after optimisation loads in half the time.  Hence a candidate is one thread, saves its
optimised model, and is promoted by loading that with the full thread budget.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.config import EngineConfig
from runtime.engines import scratch
from runtime.errors import Refused, Unjudged, of_the_machine
from runtime.tensors import Array, EngineSpec, TensorSpec, datatype

log = logging.getLogger("roadworthy.engines")
_TYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


def threads(config: EngineConfig) -> int:
    """Intra-op threads of one live engine run: the budget divided by the runs at the same time."""
    budget = config.threads or min(4, len(os.sched_getaffinity(0)))
    return max(1, budget // config.concurrency)


class OnnxRuntimeEngine:
    """One InferenceSession."""

    def __init__(
        self,
        session: Any,
        precision: str,
        config: EngineConfig,
        memory_bytes: int,
        optimised: bytes | None,
        model: bytes | None = None,
    ) -> None:
        """`optimised`: what ONNX Runtime saved; `model`: the file, of a candidate that is to be promoted."""
        self._session = session
        self._config = config
        self._optimised = optimised
        self._model = model
        self._memory_bytes = memory_bytes
        on_gpu = "CUDAExecutionProvider" in session.get_providers()
        self._spec = EngineSpec(
            inputs=tuple(_spec(value) for value in session.get_inputs()),
            outputs=tuple(_spec(value) for value in session.get_outputs()),
            kind="onnxruntime",
            precision=precision,
            device="cuda" if on_gpu else "cpu",
            metadata=dict(session.get_modelmeta().custom_metadata_map),
        )

    @classmethod
    def load(
        cls, model: bytes, precision: str, config: EngineConfig, *, candidate: bool
    ) -> OnnxRuntimeEngine:
        count = threads(config)
        # Graphs optimised for a GPU provider cannot be saved and reloaded in general.
        save = candidate and count > 1 and config.device == "cpu"
        optimised: bytes | None = None
        try:
            if save:
                session, optimised = _saved(model, config)
            else:
                session = _session(model, config, 1 if candidate else count)
            return cls(session, precision, config, len(model), optimised, model if save else None)
        except Refused:
            raise
        except Exception as error:  # the library raises its own, undocumented classes
            raise _refusal(error) from error

    @property
    def spec(self) -> EngineSpec:
        return self._spec

    @property
    def memory_bytes(self) -> int:
        return self._memory_bytes

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], *, limit: float | None = None
    ) -> dict[str, Array]:
        """`limit`: seconds after which the run is given up, between two operators: it then raises."""
        feed = {name: _text(value) if value.dtype.kind == "O" else value for name, value in inputs.items()}
        if limit is None:
            return dict(zip(outputs, self._session.run(list(outputs), feed), strict=True))
        import onnxruntime as ort

        options = ort.RunOptions()
        timer = threading.Timer(limit, lambda: setattr(options, "terminate", True))
        timer.start()
        try:
            return dict(zip(outputs, self._session.run(list(outputs), feed, options), strict=True))
        finally:
            timer.cancel()

    def with_serving_threads(self) -> OnnxRuntimeEngine:
        if self._model is None:
            return self
        if self._optimised is not None:
            engine = self._with_all_threads(self._optimised, optimised=True)
            if _names(engine.spec) == _names(self._spec):
                return engine
            # Files of IR 3 have their weights among the inputs; where two are equal, optimising makes them
            # one and changes which of them are inputs.
            engine.close()
        return self._with_all_threads(self._model, optimised=False)

    promoted = with_serving_threads  # the name until 0.2, which programs outside the project call

    def _with_all_threads(self, model: bytes, *, optimised: bool) -> OnnxRuntimeEngine:
        try:
            session = _session(model, self._config, threads(self._config), optimised=optimised)
        except Refused:
            raise
        except Exception as error:  # as in `load`
            raise _refusal(error) from error
        return OnnxRuntimeEngine(session, self._spec.precision, self._config, self._memory_bytes, None)

    def close(self) -> None:
        self._session = None
        self._optimised = None
        self._model = None


def _session(
    model: bytes, config: EngineConfig, count: int, *, save_to: Path | None = None, optimised: bool = False
) -> Any:
    ort = _library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = count
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it says it also raises
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    if config.device == "cpu" and _shared_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    if optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    providers = ["CPUExecutionProvider"]
    if config.device == "cuda":
        if "CUDAExecutionProvider" not in ort.get_available_providers():
            raise Unjudged(
                "load", "engine.device is 'cuda' but this onnxruntime has no CUDA; install onnxruntime-gpu"
            )
        providers.insert(0, "CUDAExecutionProvider")
    return ort.InferenceSession(model, options, providers=providers)


def _library() -> Any:
    """ONNX Runtime's module.  Raises ImportError for one that is not there, and for one that is broken."""
    try:
        import onnxruntime
    except ImportError:
        raise
    except Exception as error:  # a part of it is missing, or of another version
        raise ImportError(f"{type(error).__name__}: {error}") from error
    return onnxruntime


@functools.cache
def _shared_arena() -> bool:
    """One arena for the activations of all sessions of this process: the live one runs, the one kept warm and
    the candidate hardly ever do, and an arena of their own each would keep what its largest run took
    (measured: 80 MB instead of 20 for three sessions of a 5 MB network; docs/results/serving.md).
    False where this ONNX Runtime cannot, or where somebody has registered one already.
    """
    import onnxruntime as ort

    try:
        place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(place, ort.OrtArenaCfg(0, 0, -1, -1))
    except Exception:  # the library raises its own, undocumented classes
        return False
    return True


def _ir_version(model: bytes) -> int:
    """IR version of an ONNX file that begins with it, as protobuf writes one; 0 for any other."""
    return model[1] if model[:1] == b"\x08" and len(model) > 1 and model[1] < 128 else 0


def _spec(value: Any) -> TensorSpec:
    kind = _TYPES.get(value.type)
    if kind is None:
        raise Refused(
            "contract", f"tensor '{value.name}' has the type {value.type}, which KServe v2 cannot carry"
        )
    shape = tuple(size if isinstance(size, int) and size >= 0 else -1 for size in value.shape)
    return TensorSpec(value.name, kind, shape)


def _text(array: Array) -> Array:
    """ONNX strings are UTF-8 text; undecodable bytes are an error of the caller, not of the engine."""
    return np.array(
        [v.decode() if isinstance(v, bytes) else str(v) for v in array.reshape(-1)], dtype=np.object_
    ).reshape(array.shape)


def _names(spec: EngineSpec) -> list[list[str]]:
    return [[tensor.name for tensor in tensors] for tensors in (spec.inputs, spec.outputs)]


def _saved(model: bytes, config: EngineConfig) -> tuple[Any, bytes | None]:
    """A session of one thread, and the optimised model as it saved it; None where that cannot be saved: a
    full memory file system must not keep a version from being served.
    """
    try:
        with scratch.nameless() as path:
            session = _session(model, config, 1, save_to=Path(path))
            optimised = Path(path).read_bytes()
        if optimised:
            return session, optimised
    except Refused:
        raise
    except ImportError:
        raise
    except Exception as error:  # by its place or by its model: without a place it is told
        log.debug("no optimised model: %s", _line(error))
    return _session(model, config, 1), None


def _refusal(error: Exception) -> Refused:
    """What kept an engine from being loaded: its file, or this machine."""
    if isinstance(error, ImportError):
        extra = "pip install 'roadworthy[cpu]' (or onnxruntime; on a GPU onnxruntime-gpu), then start again"
        return Unjudged("load", f"ONNX Runtime cannot be imported ({_line(error)}): {extra}")
    if of_the_machine(error):
        why = _line(error) or type(error).__name__
        return Unjudged("load", f"this machine cannot load the engine now: {why}; give it what it lacks")
    return Refused("load", f"ONNX Runtime cannot load the engine: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


__all__ = ["OnnxRuntimeEngine", "datatype", "threads"]
