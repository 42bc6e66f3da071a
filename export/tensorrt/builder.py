"""ONNX in, TensorRT plan out: `build_plan(onnx_bytes, options) -> Plan`.

TensorRT 10.12 or newer and 11, always strongly typed: the plan computes in the types that are written in the
graph, so FP16 means a graph converted to float16 and INT8 a graph with Q/DQ nodes.  The same code builds with
TensorRT-RTX on a CPU (backend "tensorrt-rtx"), which is how it is tested: our graphs are parsed and built by
TensorRT-RTX on CPU; the TensorRT path is type- and API-checked against the bindings of 10.12 to 11.4 and
was not executed on a CUDA device (docs/tensorrt.md).

Nothing of TensorRT is imported with this module.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError, one_line
from export.files import read_file, write_whole
from export.progress import Bars
from export.tensorrt.options import PlanOptions, add_arguments, from_arguments
from networks.command import finish
from runtime.engines.cuda.gate import GATE
from runtime.engines.tensorrt.library import (
    BINDING_ERRORS,
    RTX,
    Library,
    Log,
    TensorRTError,
    ask,
    check,
    construct,
    logger,
    open_runtime,
    tensorrt,
)
from runtime.engines.tensorrt.plan import refit_engine
from runtime.tensors import Array

if TYPE_CHECKING:
    import tensorrt as trt

Shape = tuple[int, ...]
# progress(phase, step, steps): `phase` is the path of nested phases.  Answering False cancels the build.
Progress = Callable[[str, int, int], object]

#: One build at a time: builds beside each other disturb each other's timings, and with TensorRT 10.16 builds
#: that began with a timing cache have crashed and hung (lightvector/KataGo pull request 1225).
_building = threading.RLock()

BACKENDS = ("tensorrt", RTX)
PRECISIONS = ("fp32", "fp16", "int8")


class Cancelled(TensorRTError):
    """The progress callback asked for the build to stop."""


@dataclass(frozen=True)
class BuildOptions(PlanOptions):
    """How a plan is built: `PlanOptions`, and what depends on the graph.

    precision           what the graph is said to be; the build fails where the graph is something else
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
    """An input or output of the built network; -1 = free."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class Plan:
    """A serialised engine and what is known of it.  `layers` is {} where nothing could be deserialised."""

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
        """Everything but the bytes, as JSON values; `layers` is a file of its own."""
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
    """Reads "4" as (4, 4, 4) and "1:4:8" as (1, 4, 8).  ValueError otherwise."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"batch '{text}': write N or min:opt:max, with whole numbers above 0")
    low, middle, high = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
    if not low <= middle <= high:
        raise ValueError(f"batch '{text}': min <= opt <= max must hold")
    return low, middle, high


def open_library(backend: str) -> Library:
    """The library of a backend name.  Raises TensorRTError where it is absent, ValueError for the name."""
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
    progress: Progress | None = None,
    library: Library | None = None,
) -> Plan:
    """Parses an ONNX file and builds a plan from it.

    `progress(phase, step, steps)` is called while building; see `Progress`.  `library` is for tests.
    Raises TensorRTError (Cancelled when `progress` answered False), ValueError for options that do not fit
    the graph.
    """
    options = options or BuildOptions()
    precision_of(onnx, options.precision)
    found = library or open_library(backend)
    _refuse_what_is_not_there(found, options)
    try:
        with _building, GATE.change():
            return _Build(found, options, progress).run(onnx)
    except TensorRTError:
        raise
    except RuntimeError as error:  # what the binding makes of a C++ exception
        raise TensorRTError(f"{found.text} failed: {one_line(error)}; see the server's log") from error


def precision_of(onnx: bytes, claimed: str) -> None:
    """Compares the claimed precision with the types in the graph: strong typing uses what is there.

    Raises ValueError where they differ.
    """
    from google.protobuf.message import DecodeError
    from onnx import ModelProto, TensorProto

    try:
        model = ModelProto.FromString(onnx)
    except DecodeError as error:
        raise ValueError(f"it is not an ONNX file: {one_line(error)[:160]}") from error
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


def _refuse_what_is_not_there(library: Library, options: BuildOptions) -> None:
    """Options that this library, or this version of it, does not have."""
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
    """One build.  Logger, builder, network and parser are kept until it is over: TensorRT does not."""

    def __init__(self, library: Library, options: BuildOptions, progress: Progress | None) -> None:
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
        cache_before = self._open_timing_cache(config)
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
        self._close_timing_cache(config, cache_before)
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

    # ------------------------------------------------------------- network
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
                reasons.append(f"{node}: {' '.join(error.desc().split())}")
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

    # -------------------------------------------------------------- config
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

    def _open_timing_cache(self, config: trt.IBuilderConfig) -> dict[str, int]:
        """Gives the builder the recorded times; for a replay, returns the kernels that they choose."""
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        path = self.options.timing_cache
        if path is None:
            return {}
        try:
            recorded = path.read_bytes()
        except FileNotFoundError:
            if self.options.replay:
                raise TensorRTError(
                    f"timing cache {path} does not exist: record it by building once without replay"
                ) from None
            recorded = b""
        remedy = f"it is of another TensorRT version or GPU; delete {path} and record it here"
        # Before the cache is made, as in NVIDIA's sample: only then can the entries be read.
        config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
        said = self.log.errors(here=True)
        cache: trt.ITimingCache = ask(
            config.create_timing_cache, f"timing cache {path}", remedy, self.log, recorded
        )
        if more := self.log.errors(here=True)[len(said) :]:
            # A damaged file gives an empty cache and a line in the log; at the end it would be overwritten.
            raise TensorRTError(f"timing cache {path} cannot be used: {more[0]}; {remedy}")
        before: dict[str, int] = {}
        if self.options.replay:
            before = self._tactics(cache)
            config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
        self.check(config.set_timing_cache(cache, False), f"timing cache {path} was refused", remedy)
        return before

    def _tactics(self, cache: trt.ITimingCache) -> dict[str, int]:
        """Which kernel a timing cache chooses for each of its keys."""
        what = f"the entries of timing cache {self.options.timing_cache} cannot be read"
        keys: list[trt.TimingCacheKey] = ask(cache.queryKeys, what, "record it again", self.log)
        return {str(key): int(cache.query(key).tacticHash) for key in keys}

    def _close_timing_cache(self, config: trt.IBuilderConfig, before: Mapping[str, int]) -> None:
        path = self.options.timing_cache
        if path is None:
            return
        cache = check(config.get_timing_cache(), "the timing cache is gone", "record it again", self.log)
        if self.options.replay:
            # The flag alone has let misses through.  The serialised bytes are no measure: they hold times and
            # a description of the device as well, and their order is not promised.  The plan depends on the
            # kernel that is chosen for each key.  An entry that has gone was not used.
            after = self._tactics(cache)
            changed = [key for key, tactic in after.items() if before.get(key) != tactic]
            if changed:
                raise TensorRTError(
                    f"timing cache {path} lacked some of this network's kernels "
                    f"({len(changed)} of {len(after)} entries are new or differ): the plan would depend on "
                    "this build's timings; record the cache again with the same network and options"
                )
            return
        write_whole(path, bytes(check(cache.serialize(), "the timing cache", "record it again", self.log)))

    # ---------------------------------------------------------- inspection
    def _inspected(self, plan: Plan) -> Plan:
        """Deserialises the plan once: layer information, and what really can be refitted."""
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
        return Plan(**{**_fields(plan), "layers": layers, "refittable": refittable})


def compare_refittable(marked: Sequence[str], found: Sequence[str]) -> None:
    """What was marked must be what a refit takes.  Raises TensorRTError naming the first difference."""
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
    """A new plan with these weights, itself refittable; `plan` stays as it is.

    `weights` must be exactly the plan's refittable weights.  What is refitted is a copy that nobody runs.
    `host_code`: the plan may bring code for the host (a version-compatible one) and is trusted.
    Raises TensorRTError, also if TensorRT is older than 10.14.1: it writes plans that no refit can change.
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


def monitor(library: Library, progress: Progress, trouble: list[BaseException]) -> trt.IProgressMonitor:
    """TensorRT's progress monitor that calls `progress`.

    TensorRT swallows what a callback raises, so it is put into `trouble` and the build is cancelled.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = library.module
    lock = threading.Lock()
    phases: dict[str, tuple[str, int]] = {}

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # Any where the stubs are not made
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            def start() -> None:
                with lock:
                    above = phases.get(parent_phase or "")
                    path = f"{above[0]} / {phase_name}" if above else phase_name
                    phases[phase_name] = (path, num_steps)
                self.tell(phase_name, 0)

            self.kept(start)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self.kept(lambda: self.tell(phase_name, step + 1))

        def phase_finish(self, phase_name: str) -> None:
            def finish() -> None:
                with lock:
                    phases.pop(phase_name, None)

            self.kept(finish)

        def tell(self, phase_name: str, step: int) -> None:
            with lock:
                path, steps = phases.get(phase_name, (phase_name, step))
            if not trouble and progress(path, min(step, steps), steps) is False:
                raise Cancelled("the build was cancelled")

        def kept(self, work: Callable[[], None]) -> bool:
            """False once something went wrong: TensorRT then stops at its next step."""
            try:
                work()
            except BaseException as error:
                trouble.append(error)
            return not trouble

    return Monitor()


def _tensor(tensor: trt.ITensor) -> Tensor:
    return Tensor(tensor.name, tensor.dtype.name, tuple(tensor.shape))


def _fields(plan: Plan) -> dict[str, Any]:
    return {name: getattr(plan, name) for name in plan.__dataclass_fields__}


def _plain(options: BuildOptions) -> dict[str, Any]:
    """The options as JSON values."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export.tensorrt",
        description="Build a TensorRT plan from an ONNX file. A pack is published with "
        "python -m export.build; this is the single step from ONNX to plan.",
        epilog="examples:\n"
        "  python -m export.tensorrt model.onnx --out model.plan\n"
        "  python -m export.tensorrt model.onnx --out model.plan --batch 1:4:8 --timing-cache gpu.cache\n"
        "  python -m export.tensorrt model.onnx --backend tensorrt-rtx      parse and build on a CPU\n\n"
        "The backend tensorrt-rtx needs no GPU; its plans are for TensorRT-RTX and are not executed here.\n\n"
        "exit codes: 0 built, 1 failed, 2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("onnx", type=Path, metavar="FILE.onnx")
    parser.add_argument("--out", type=Path, metavar="FILE.plan", help="where the plan goes; default: nowhere")
    parser.add_argument("--backend", choices=BACKENDS, default="tensorrt")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="what the graph is (fp32)")
    parser.add_argument("--batch", metavar="N|min:opt:max", help="range of a free first dimension")
    parser.add_argument("--refit", metavar="NAME", nargs="+", default=[], help="weights that may change")
    parser.add_argument("--layers", type=Path, metavar="FILE.json", help="write layer information here")
    parser.add_argument("--json", action="store_true", help="print what was built as one JSON object")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        options = BuildOptions(
            precision=arguments.precision,
            batch=parse_batch(arguments.batch) if arguments.batch else None,
            refit=tuple(arguments.refit),
            **asdict(from_arguments(arguments)),
        )
    except ValueError as error:
        parser.error(str(error))
    return finish(lambda: _run(arguments, options), (TensorRTError, ExportError, ValueError))


def _run(arguments: argparse.Namespace, options: BuildOptions) -> int:
    content = read_file(arguments.onnx)
    with Bars(lines=False) as bars:
        plan = build_plan(content, options, backend=arguments.backend, progress=bars)
    if arguments.out:
        write_whole(arguments.out, plan.data)
    if arguments.layers:
        write_whole(arguments.layers, json.dumps(plan.layers, indent=1).encode())
    if arguments.json:
        print(json.dumps(plan.manifest()))
    else:
        checked = plan.manifest()["checked"]
        print(f"{len(plan.data) / 1e6:.2f} MB in {plan.seconds:.1f} s by {plan.library}: {checked}")
    return 0
