"""A TensorRT builder that records what it is told and enforces what the documentation says of it.

Derived from the stubs of the real bindings under a type checker, as fakes.py.  The network it parses is the
real ONNX graph's inputs, outputs and initialisers; the plan it builds is JSON.
"""

from __future__ import annotations

import enum
import json
import threading
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from onnx import ModelProto

from runtime.engines.tensorrt.library import Library
from tests.tensorrt import fakes
from tests.tensorrt.fakes import Severity, rule

if TYPE_CHECKING:
    from tensorrt import Builder as Builder_
    from tensorrt import IBuilderConfig as Config_
    from tensorrt import INetworkDefinition as Network_
    from tensorrt import IProgressMonitor as Monitor_
    from tensorrt import ITimingCache as Cache_
    from tensorrt import OnnxParser as Parser_
    from tensorrt import ParserError as Error_
    from tensorrt import TimingCacheKey as Key_
else:
    Key_ = object
    Builder_ = Config_ = Network_ = Monitor_ = Cache_ = Parser_ = Error_ = object


building = threading.Lock()  # held while a network is built


class BuilderFlag(enum.Enum):
    TF32, REFIT, REFIT_INDIVIDUAL, VERSION_COMPATIBLE, GPU_FALLBACK, EDITABLE_TIMING_CACHE = range(6)
    ERROR_ON_TIMING_CACHE_MISS = 6


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(enum.Enum):
    NONE, AMPERE_PLUS, SAME_COMPUTE_CAPABILITY = range(3)


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY, NONE, DETAILED = range(3)


class DeviceType(enum.Enum):
    GPU, DLA = range(2)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class IProgressMonitor(Monitor_):
    def __init__(self) -> None: ...


class Value:
    """An ITensor."""

    def __init__(self, value: Any) -> None:
        kind = value.type.tensor_type
        names = {1: "FLOAT", 2: "UINT8", 6: "INT32", 10: "HALF"}
        self.name = value.name
        self.dtype = fakes.DataType[names[kind.elem_type]]
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)


class Network(Network_):
    def __init__(self) -> None:
        self.onnx = ModelProto()
        self.marked: list[str] = []

    @property
    def num_inputs(self) -> int:
        return len(self.onnx.graph.input)

    @property
    def num_outputs(self) -> int:
        return len(self.onnx.graph.output)

    def get_input(self, index: Any) -> Any:
        return Value(self.onnx.graph.input[index])

    def get_output(self, index: Any) -> Any:
        return Value(self.onnx.graph.output[index])

    def mark_weights_refittable(self, name: str) -> bool:
        self.marked.append(name)
        return any(tensor.name == name for tensor in self.onnx.graph.initializer)

    def are_weights_marked_refittable(self, name: str) -> bool:
        return name in self.marked


class ParserError(Error_):
    def __init__(self) -> None: ...

    def desc(self) -> str:
        return "Unsupported\n operator"

    def node_name(self) -> str:
        return "odd"

    def node_operator(self) -> str:
        return "Det"


class OnnxParser(Parser_):
    def __init__(self, network: Network, logger: Any) -> None:
        self.network = network

    def parse(self, model: Any, path: str | None = None) -> bool:
        self.network.onnx = ModelProto.FromString(bytes(model))
        return all(node.op_type != "Det" for node in self.network.onnx.graph.node)

    @property
    def num_errors(self) -> int:
        return 2

    def get_error(self, index: Any) -> Any:
        return ParserError()


class Key(Key_):
    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


class TimingCache(Cache_):
    """Serialised as "kernel=tactic@time kernel=tactic@time": the time and the order differ each time."""

    written = 0

    def __init__(self, content: bytes, *, editable: bool) -> None:
        self.editable = editable
        entries = [entry.partition("@")[0].partition("=") for entry in content.decode().split()]
        self.tactics = {kernel: int(tactic) for kernel, _, tactic in entries}

    def serialize(self) -> Any:
        TimingCache.written += 1
        order = sorted(self.tactics, reverse=bool(TimingCache.written % 2))
        return " ".join(f"{kernel}={self.tactics[kernel]}@{TimingCache.written}" for kernel in order).encode()

    def queryKeys(self) -> Any:
        if not self.editable:
            raise RuntimeError("the cache was made before EDITABLE_TIMING_CACHE was set")
        return [Key(kernel) for kernel in self.tactics]

    def query(self, key: Any) -> Any:
        return SimpleNamespace(tacticHash=self.tactics[str(key)], timingMSec=0.5)


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self.shapes[input] = [list(min), list(opt), list(max)]


class Config(Config_):
    builder_optimization_level: Any = 3
    profiling_verbosity: Any = ProfilingVerbosity.LAYER_NAMES_ONLY
    hardware_compatibility_level: Any = HardwareCompatibilityLevel.NONE
    default_device_type: Any = DeviceType.GPU
    DLA_core: Any = -1
    progress_monitor: Any = None

    def __init__(self, log: Any) -> None:
        self.log = log
        self.set_flags = {BuilderFlag.TF32}  # TensorRT's default
        self.profiles: list[Profile] = []
        self.pools: dict[str, int] = {}
        self.cache: TimingCache | None = None

    def set_flag(self, flag: Any) -> None:
        self.set_flags.add(flag)
        rule(
            not {BuilderFlag.REFIT, BuilderFlag.REFIT_INDIVIDUAL} <= self.set_flags,
            "REFIT and REFIT_INDIVIDUAL exclude each other",
        )

    def clear_flag(self, flag: Any) -> None:
        self.set_flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: Any) -> None:
        self.pools[pool.name] = pool_size

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        if serialized_timing_cache.startswith(b"other"):
            self.log(Severity.ERROR, "timing cache of another device")
            return None
        if serialized_timing_cache.startswith(b"damaged"):
            self.log(Severity.ERROR, "magicTagRead == kMAGIC_TAG failed")
            serialized_timing_cache = b""
        editable = BuilderFlag.EDITABLE_TIMING_CACHE in self.set_flags
        return TimingCache(bytes(serialized_timing_cache), editable=editable)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        rule(not ignore_mismatch, "a cache of another device would be used silently")
        self.cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.cache


def library(version: str = "11.4.0.106", **quirks: Any) -> Library:
    """quirks: kernels (what the network needs timed), dla (cores), all_weights, fails, silent_miss,
    retimed (a kernel is chosen anew), pruned (an entry that goes)."""
    device = fakes.Device()
    runner = fakes.library(device, version, **quirks)
    built: list[dict[str, Any]] = []

    class Builder(Builder_):
        def __init__(self, logger: Any) -> None:
            self.logger_ = logger

        @property
        def num_DLA_cores(self) -> int:
            return int(quirks.get("dla", 0))

        def create_network(self, flags: Any = 0) -> Any:
            rule(flags == 2, "the network must be strongly typed")
            return Network()

        def create_builder_config(self) -> Any:
            return Config(self.logger_.log)

        def create_optimization_profile(self) -> Any:
            return Profile()

        def build_serialized_network(self, network: Any, config: Any) -> Any:  # type: ignore[override]
            rule(not building.locked(), "two builds at the same time")
            with building:
                return self._build(network, config)

        def _build(self, network: Any, config: Any) -> Any:
            needed = quirks.get("kernels", "conv")
            if quirks.get("fails"):
                self.logger_.log(Severity.ERROR, "no tactics to implement operation")
                return None
            device.touch("an engine was built")
            if config.cache is not None and needed not in config.cache.tactics:
                miss_is_error = BuilderFlag.ERROR_ON_TIMING_CACHE_MISS in config.set_flags
                if miss_is_error and not quirks.get("silent_miss"):
                    self.logger_.log(Severity.ERROR, "timing cache miss")
                    return None
                rule(BuilderFlag.EDITABLE_TIMING_CACHE in config.set_flags, "not recorded as editable")
                config.cache.tactics[needed] = 7
            if config.cache is not None and "retimed" in quirks:
                config.cache.tactics[needed] += 1
            if config.cache is not None and "pruned" in quirks:
                config.cache.tactics.pop(quirks["pruned"])
            if config.progress_monitor is not None:
                config.progress_monitor.phase_start("Building engine", None, 1)
                if not config.progress_monitor.step_complete("Building engine", 0):
                    self.logger_.log(Severity.ERROR, "BuildCanceled")
                    return None
                config.progress_monitor.phase_finish("Building engine")
            shown = {
                "flags": sorted(flag.name for flag in config.set_flags),
                "level": config.builder_optimization_level,
                "hardware": config.hardware_compatibility_level.name,
                "device": config.default_device_type.name,
                "dla": config.DLA_core,
                "pools": config.pools,
                "profiles": [profile.shapes for profile in config.profiles],
                "marked": network.marked,
            }
            built.append(shown)
            shape = [2, 4, 5, 3]
            runnable = {"shape": shape, "profile": [shape] * 3, "mix": [1, 1, 1], "host_code": False}
            return json.dumps({**runnable, **shown}).encode()

    module = ModuleType("tensorrt")
    vars(module).update(vars(runner.module))
    mine: list[type] = [BuilderFlag, MemoryPoolType, HardwareCompatibilityLevel, ProfilingVerbosity]
    mine += [DeviceType, NetworkDefinitionCreationFlag, IProgressMonitor, OnnxParser, Builder]
    for kind in mine:
        setattr(module, kind.__name__, kind)
    if "all_weights" in quirks:
        refitter = type("Refitter", (), {"__init__": lambda *a: None})
        refitter.get_all_weights = lambda self: list(quirks["all_weights"])  # type: ignore[attr-defined]
        module.Refitter = refitter  # type: ignore[attr-defined]
    return Library("tensorrt", module, runner.version)
