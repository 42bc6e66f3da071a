"""ONNX in, TensorRT plan out: `build_plan(onnx_bytes, options) -> Plan`.

TensorRT 10.12 or newer and 11, always strongly typed: the plan computes in the types that are written in the
graph, so FP16 means a graph converted to float16 and INT8 a graph with Q/DQ nodes.  The same code builds with
TensorRT-RTX on a CPU (backend "tensorrt-rtx"), which is how it is tested: our graphs are parsed and built by
TensorRT-RTX on CPU; the TensorRT path is type- and API-checked against the bindings of 10.12 to 11.4 and
was not executed on a CUDA device (docs/tensorrt.md).

Nothing of TensorRT is imported with this module.
"""

from __future__ import annotations

import difflib
import json
import threading
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from common.progress import StepCallback
from common.text import one_line, shorten
from export.tensorrt.monitor import Cancelled, monitor
from export.tensorrt.plan import BACKENDS, BuildOptions, Plan, Shape, Tensor
from export.tensorrt.refit import compare_refittable
from export.tensorrt.timing_cache import TimingCacheFile
from runtime.engines.cuda.gate import GATE
from runtime.engines.tensorrt.library import (
    RTX,
    Library,
    Log,
    TensorRTError,
    check,
    construct,
    logger,
    open_runtime,
    tensorrt,
)

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["build_plan", "open_library", "precision_of"]

#: One build at a time: builds beside each other disturb each other's timings, and with TensorRT 10.16 builds
#: that began with a timing cache have crashed and hung (lightvector/KataGo pull request 1225).
_building = threading.RLock()


def open_library(backend: str) -> Library:
    """Return the library of a backend.  Raises TensorRTError if absent, ValueError for an unknown name."""
    if backend == "tensorrt":
        return tensorrt()
    if backend == RTX:
        from export.tensorrt.rtx import tensorrt_rtx

        return tensorrt_rtx()
    raise ValueError(f"backend '{backend}': use one of {', '.join(BACKENDS)}")


def build_plan(
    onnx: bytes,
    options: BuildOptions | None = None,
    *,
    backend: str = "tensorrt",
    progress: StepCallback | None = None,
    library: Library | None = None,
) -> Plan:
    """Parse an ONNX file and build a plan from it.

    Args:
        progress: called with (phase, step, steps) during the build; see `export.tensorrt.monitor`.
        library: for tests.
    Raises:
        TensorRTError: the build failed.
        Cancelled: `progress` returned False.
        ValueError: the options do not fit the graph.
    """
    options = options or BuildOptions()
    precision_of(onnx, options.precision)
    found = library or open_library(backend)
    _refuse_unsupported(found, options)
    try:
        with _building, GATE.change():
            return _Build(found, options, progress).run(onnx)
    except TensorRTError:
        raise
    except RuntimeError as error:  # what the binding makes of a C++ exception
        raise TensorRTError(f"{found.text} failed: {one_line(error)}; see the server's log") from error


def precision_of(onnx: bytes, claimed: str) -> None:
    """Compare the claimed precision with the types in the graph, which are what strong typing uses.

    Raises ValueError if they differ.
    """
    from google.protobuf.message import DecodeError
    from onnx import ModelProto, TensorProto

    try:
        model = ModelProto.FromString(onnx)
    except DecodeError as error:
        raise ValueError(f"it is not an ONNX file: {shorten(error, 160)}") from error
    quantised = any(node.op_type == "QuantizeLinear" for node in model.graph.node)
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    halves = any(tensor.data_type == TensorProto.FLOAT16 for tensor in weights)
    actual = "int8" if quantised else "fp16" if halves else "fp32"
    if actual == claimed:
        return
    remedy = {
        "fp16": "convert it first (export.graph.half.to_half)",
        "int8": "quantise it first (Q/DQ nodes with signed int8, symmetric)",
        "fp32": f"say precision='{actual}'",
    }[claimed]
    raise ValueError(
        f"the graph is {actual}, not {claimed}: TensorRT computes in the types written in it; {remedy}"
    )


def _refuse_unsupported(library: Library, options: BuildOptions) -> None:
    """Refuse options that this library, or this version of it, does not have.  Raises TensorRTError."""
    if library.name == RTX:
        asked = {
            "refit": bool(options.refit),
            "version_compatible": options.version_compatible,
            "timing_cache": options.timing_cache is not None,
            "hardware": options.hardware != "none",
            "dla": options.dla is not None,
        }
        if missing := [name for name, wanted in asked.items() if wanted]:
            raise TensorRTError(
                f"{library.text} cannot do {', '.join(missing)} on a CPU: "
                "leave it out here, or build with --backend tensorrt on the device"
            )
    elif options.dla is not None and (11,) <= library.version < (11, 4, 1):
        raise TensorRTError(
            f"{library.text} has no DLA: use TensorRT 10, or 11.4.1 and newer on a Jetson AGX Orin"
        )


class _Build:
    """One build.  It keeps logger, builder, network and parser alive, because TensorRT does not."""

    def __init__(self, library: Library, options: BuildOptions, progress: StepCallback | None) -> None:
        self.library, self.options, self.progress = library, options, progress
        self.log = Log()
        self.logger = logger(library, self.log)

    def check(self, answer: Any, what: str, remedy: str) -> None:
        check(answer, what, remedy, self.log)

    def run(self, onnx: bytes) -> Plan:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        started = time.monotonic()
        remedy = "check the driver with `nvidia-smi`"
        builder: trt.Builder = construct(trt.Builder, "no builder", remedy, self.log, self.logger)
        if errors := self.log.errors(here=True):
            raise TensorRTError(f"{self.library.text} cannot start: {errors[0]}; {remedy}")
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = check(builder.create_network(flags), "no network", "free host memory", self.log)
        config = check(builder.create_builder_config(), "no builder config", "free host memory", self.log)
        parser = self._parse(onnx, network)
        self._configure(builder, config)
        self._profiles(builder, network, config)
        self._mark(network, config, onnx)
        timing_cache = TimingCacheFile(self.library, self.options, self.log)
        cache_before = timing_cache.open(config)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        outputs = [network.get_output(i) for i in range(network.num_outputs)]

        trouble: list[BaseException] = []
        watch = None
        if self.progress is not None:
            watch = monitor(self.library, self.progress, trouble)
            config.progress_monitor = watch
        memory = builder.build_serialized_network(network, config)
        if trouble:
            if isinstance(trouble[0], Cancelled) or not isinstance(trouble[0], Exception):
                raise trouble[0]  # as it is: it was asked for, by the callback or by Ctrl-C
            raised = f"the progress callback raised {type(trouble[0]).__name__}: {trouble[0]}"
            raise TensorRTError(f"the build was stopped: {raised}") from trouble[0]
        memory = check(
            memory,
            f"{self.library.text} could not build the network",
            "see the ONNX file with: python -m export.inspect FILE.onnx",
            self.log,
        )
        data = bytes(memory)
        timing_cache.close(config, cache_before)
        plan = Plan(
            data=data,
            backend=self.library.name,
            library=self.library.text,
            inputs=tuple(_tensor(tensor) for tensor in inputs if tensor is not None),
            outputs=tuple(_tensor(tensor) for tensor in outputs if tensor is not None),
            refittable=self.options.refit,
            seconds=round(time.monotonic() - started, 3),
            options=_plain(self.options),
            warnings=tuple(self.log.lines("WARNING")),
        )
        del parser, watch
        return plan if self.library.name == RTX else self._inspected(plan)

    def _parse(self, onnx: bytes, network: trt.INetworkDefinition) -> trt.OnnxParser:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        parser: trt.OnnxParser = construct(
            trt.OnnxParser, "no ONNX parser", "free host memory", self.log, network, self.logger
        )
        if parser.parse(onnx):
            return parser
        reasons = []
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            if error is not None:
                node = f"node '{error.node_name()}' ({error.node_operator()})"
                reasons.append(f"{node}: {one_line(error.desc())}")
        first = reasons[0] if reasons else self.log.why()
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        raise TensorRTError(
            f"{self.library.text} cannot parse the ONNX graph: {first}{more}; "
            "what is supported: python -m export.inspect FILE.onnx"
        )

    def _profiles(
        self, builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig
    ) -> None:
        free: dict[str, Shape] = {}
        for index in range(network.num_inputs):
            tensor = check(network.get_input(index), f"input {index}", "check the ONNX graph", self.log)
            if -1 in (shape := tuple(tensor.shape)):
                free[tensor.name] = shape
        if unknown := sorted(set(self.options.profiles) - set(free)):
            raise ValueError(f"profile for '{unknown[0]}': no input of that name has free sizes")
        if not free:
            if self.options.batch and self.options.batch[0] != self.options.batch[2]:
                raise ValueError("batch min:opt:max: the graph's batch is fixed; export it with a free batch")
            return
        profile = check(
            builder.create_optimization_profile(), "no optimisation profile", "free host memory", self.log
        )
        for name, shape in free.items():
            profile.set_shape(name, *self._range(name, shape))
        self.check(
            config.add_optimization_profile(profile),
            "the optimisation profile was refused",
            "min <= opt <= max must hold, and fixed dimensions must be the graph's",
        )

    def _range(self, name: str, shape: Shape) -> tuple[Shape, Shape, Shape]:
        """(min, opt, max) of one input with free dimensions."""
        if name in self.options.profiles:
            low, middle, high = self.options.profiles[name]
            for given in (low, middle, high):
                fits = len(given) == len(shape) and all(
                    want in (-1, got) for want, got in zip(shape, given, strict=True)
                )
                if not fits:
                    raise ValueError(f"profile of '{name}': {list(given)} does not fit {list(shape)}")
            return low, middle, high
        if self.options.batch is None or -1 in shape[1:]:
            raise ValueError(
                f"input '{name}' has the free shape {list(shape)}: give its range "
                "(--batch min:opt:max for the first dimension, profiles for others)"
            )
        low, middle, high = ((size, *shape[1:]) for size in self.options.batch)
        return low, middle, high

    def _mark(self, network: trt.INetworkDefinition, config: trt.IBuilderConfig, onnx: bytes) -> None:
        """REFIT_INDIVIDUAL: the marked weights stay changeable, the others keep their fusions."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        if not self.options.refit:
            return
        from onnx import ModelProto

        known = [tensor.name for tensor in ModelProto.FromString(onnx).graph.initializer]
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        for name in self.options.refit:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"refit: the graph has no weight '{name}'"
                    + (f"; did you mean '{close[0]}'?" if close else f"; it has {len(known)}")
                )
            self.check(
                network.mark_weights_refittable(name) and network.are_weights_marked_refittable(name),
                f"refit: '{name}' cannot be made refittable",
                "leave it out, or build again for each new set of weights",
            )

    def _configure(self, builder: trt.Builder, config: trt.IBuilderConfig) -> None:
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        options = self.options
        config.builder_optimization_level = options.optimisation_level
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.tf32:
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)  # on by default
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware == "ampere+":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        elif options.hardware == "same-capability":
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
        if options.dla is not None:
            cores = builder.num_DLA_cores
            if options.dla >= cores:
                raise TensorRTError(
                    f"DLA core {options.dla} is not there: this device has {cores}; build for the GPU instead"
                )
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = options.dla
            if options.gpu_fallback:
                config.set_flag(trt.BuilderFlag.GPU_FALLBACK)

    def _inspected(self, plan: Plan) -> Plan:
        """Deserialise the plan once for the layer information and for what a refit really takes."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        runtime = open_runtime(self.library, Log(), host_code=self.options.version_compatible)
        engine = check(
            runtime.deserialize_cuda_engine(plan.data),
            "the plan just built cannot be loaded",
            "free device memory; a plan for a DLA or another device must be tried there",
            self.log,
        )
        inspector = check(engine.create_engine_inspector(), "no inspector", "free device memory", self.log)
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        layers = json.loads(check(text, "no layer information", "build with a newer TensorRT", self.log))
        refittable: tuple[str, ...] = ()
        if self.options.refit:
            refitter: trt.Refitter = construct(
                trt.Refitter, "no refitter", "free host memory", self.log, engine, self.logger
            )
            refittable = tuple(sorted(refitter.get_all_weights()))
            compare_refittable(self.options.refit, refittable)
        return replace(plan, layers=layers, refittable=refittable)


def _tensor(tensor: trt.ITensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype.name, tuple(tensor.shape))


def _plain(options: BuildOptions) -> dict[str, Any]:
    """The options as JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    return found
