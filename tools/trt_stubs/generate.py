"""A stub package from an imported TensorRT bindings module: `stub(module) -> str`.

What pybind11 writes is not yet a Python type.  The corrections made here, each because mypy would otherwise
miss a mistake or refuse right code:

* integers arrive as `typing.SupportsInt`, but the binding refuses floats and strings: `typing.SupportsIndex`;
* `Dims` and `Weights` parameters also take sequences and arrays (implicit conversions);
* where C++ may answer a null pointer the return is `X | None` (`NULLABLE`), so an unchecked one is an error;
* methods that TensorRT calls on a Python subclass (`CALLBACKS`) take what TensorRT passes: int, float, str;
* `bool` inside the module is a DataType: the type is `builtins.bool`;
* names of C++ types that pybind11 could not resolve (`nvinfer1::X`);
* methods that exist only in the C++ trampoline (`EXTRA`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from types import ModuleType

from tools.trt_stubs.signatures import Parameter, Signature, from_docstring, parse

# C++ interface -> Python class, where dropping the namespace is not enough.
RENAMED = {
    "IBuilder": "Builder",
    "IRuntime": "Runtime",
    "IRefitter": "Refitter",
    "IEngineInspector": "EngineInspector",
    "IParser": "OnnxParser",
    "IParserError": "ParserError",
}
# Calls that answer None where the C++ function returns a null pointer.
NULLABLE = {
    "Builder": (
        "create_network create_builder_config create_optimization_profile "
        "build_serialized_network build_engine_with_config"
    ),
    "IBuilderConfig": "create_timing_cache get_timing_cache",
    "Runtime": "deserialize_cuda_engine load_runtime",
    "ICudaEngine": (
        "create_execution_context serialize serialize_with_config create_engine_inspector "
        "create_serialization_config create_runtime_config get_tensor_name get_aliased_input_tensor"
    ),
    "ITimingCache": "serialize",
    "IExecutionContext": "get_output_allocator get_debug_listener",
    "EngineInspector": "get_layer_information get_engine_information",
    "OnnxParser": "get_layer_output_tensor get_error",
    "INetworkDefinition": "get_input get_output get_layer",
    "ILayer": "get_input get_output",
}
# Classes that a Python program subclasses: their methods are called by TensorRT.
CALLBACKS = {
    *("ILogger", "Logger", "IProgressMonitor", "IProfiler", "Profiler", "IErrorRecorder", "IGpuAllocator"),
    *("IGpuAsyncAllocator", "IOutputAllocator", "IStreamReaderV2", "IStreamWriter", "IDebugListener"),
}
# Members that no docstring shows.
EXTRA = {
    "Dims": ["def __iter__(self) -> typing.Iterator[int]: ..."],
    "IHostMemory": ["def __buffer__(self, flags: int, /) -> memoryview: ..."],
    "IStreamWriter": ["def write(self, data: bytes) -> int: ..."],
    "IOutputAllocator": [
        "def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int: ...",
        "def reallocate_output_async("
        "self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int: ...",
        "def notify_shape(self, tensor_name: str, shape: Dims) -> None: ...",
    ],
}
# What tensorrt/__init__.py adds in Python.
PYTHON_LAYER = """
__version__: str
def volume(iterable: collections.abc.Iterable[int]) -> int: ...
def nptype(trt_type: DataType) -> type[numpy.generic]: ...
"""
# The bindings break Liskov's rule in five plugin and layer classes; that is not the reader's mistake.
HEADER = """# mypy: ignore-errors
# Made by `python -m tools.trt_stubs` from the bindings {version}: signatures only.
import builtins
import collections.abc
import typing

import numpy

_DimsLike: typing.TypeAlias = "Dims | collections.abc.Sequence[typing.SupportsIndex] | _IntegerArray"
_IntegerArray: typing.TypeAlias = numpy.ndarray[typing.Any, numpy.dtype[numpy.integer[typing.Any]]]
_WeightsLike: typing.TypeAlias = "Weights | numpy.ndarray[typing.Any, typing.Any]"
"""
_SKIP = {"__doc__", "__module__", "__dict__", "__weakref__", "__entries", "__members__", "__setstate__"}
# What the pybind11 of 10.12 and older writes instead of the names that the newer one writes.
_OLDER = {
    "List": "list",
    "Dict": "dict",
    "Tuple": "tuple",
    "Callable": "collections.abc.Callable",
    "Iterable": "collections.abc.Iterable",
    "buffer": "collections.abc.Buffer",
    "capsule": "typing_extensions.CapsuleType",
}
_BARE = {
    "list": "list[typing.Any]",
    "dict": "dict[typing.Any, typing.Any]",
    "tuple": "tuple[typing.Any, ...]",
    "numpy.ndarray": "numpy.ndarray[typing.Any, typing.Any]",
    "collections.abc.Callable": "collections.abc.Callable[..., typing.Any]",
    "collections.abc.Iterable": "collections.abc.Iterable[typing.Any]",
    "object": "typing.Any",
    "bool": "builtins.bool",
}


def is_enum(cls: type) -> bool:
    return hasattr(cls, "__members__")


class Generator:
    """Writes one module.  `module` is the extension module itself (tensorrt_bindings.tensorrt)."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.prefix = module.__name__ + "."
        self.classes = {
            name: value for name, value in sorted(vars(module).items()) if isinstance(value, type)
        }

    # ------------------------------------------------------------------ types
    def type_(self, text: str, owner: str, *, parameter: bool, callback: bool = False) -> str:
        """A pybind11 annotation as a Python one, seen from class `owner`."""
        text = text.replace(self.prefix, "")
        text = re.sub(r"\b(?:nvinfer1|nvonnxparser)::(?:\w+::)*(\w+)", self._unresolved, text)
        if "::" in text:
            return "typing.Any"
        if parameter and not callback:
            text = re.sub(r"\bList\[", "collections.abc.Sequence[", text)
        for old, new in _OLDER.items():
            text = re.sub(rf"(?<![\w.]){old}(?!\w)", new, text)
        text = text.replace("typing_extensions.Buffer", "collections.abc.Buffer")
        text = text.replace("typing_extensions.CapsuleType", "int" if callback else "typing.Any")
        text = text.replace("typing.SupportsInt", "int" if callback else "typing.SupportsIndex")
        if callback:
            text = text.replace("typing.SupportsFloat", "float")
        text = text.replace("collections.abc.Buffer", "Buffer")
        if parameter and text == "tuple" and owner != "INetworkDefinition":
            return "tuple[typing.SupportsIndex, ...]"
        if parameter and text == "list":
            return "list[int]"
        text = re.sub(
            r"(?<![\w.])(numpy\.ndarray|collections\.abc\.(?:Callable|Iterable)|object|bool|list|dict|tuple)(?![\w\[.])",
            lambda match: _BARE[match[1]],
            text,
        )
        if parameter and not callback:
            text = re.sub(r"(?<![\w.])(Dims|Weights)(?![\w.])", r"_\1Like", text)
        return text

    def _unresolved(self, match: re.Match[str]) -> str:
        name = RENAMED.get(match[1], match[1])
        return name if name in self.classes else "typing.Any"

    # -------------------------------------------------------------- functions
    def function(self, name: str, signatures: Iterable[Signature], owner: str) -> list[str]:
        """One `def`, or overloads without repetitions."""
        callback = owner in CALLBACKS and name != "__init__"
        nullable = name in NULLABLE.get(owner, "").split()
        lines: list[str] = []
        signatures = list(signatures)
        if len(signatures) > 1 and any("Dims" in p.annotation for s in signatures for p in s.parameters):
            # An overload for Dims already takes what those for a bare tuple or list take.
            bare = {"tuple", "list"}
            signatures = [s for s in signatures if not bare & {p.annotation for p in s.parameters}]
        for signature in signatures:
            written = self._parameters(signature.parameters, owner, name, callback)
            returns = self.type_(signature.returns, owner, parameter=False, callback=callback)
            if nullable and "None" not in returns:
                returns += " | None"
            line = f"def {name}({', '.join(written)}) -> {returns}: ..."
            if line not in lines:
                lines.append(line)
        if len(lines) > 1:
            return [part for line in lines for part in ("@typing.overload", line)]
        return lines

    def _parameters(
        self, parameters: tuple[Parameter, ...], owner: str, name: str, callback: bool
    ) -> list[str]:
        written: list[str] = []
        defaulted = False
        slash = 0
        for index, parameter in enumerate(parameters):
            if owner and index == 0:
                written.append("self")
                continue
            annotation = self.type_(parameter.annotation, owner, parameter=True, callback=callback)
            if callback and parameter.name == "parent_phase":
                annotation = "str | None"
            if parameter.default == "None" and "None" not in annotation and annotation != "typing.Any":
                annotation += " | None"
            # C++ allows a required parameter after a defaulted one; Python's grammar does not.
            defaulted = defaulted or bool(parameter.default)
            written.append(f"{parameter.name}: {annotation}" + (" = ..." if defaulted else ""))
            if parameter.positional:
                slash = len(written)
        if slash:
            written.insert(slash, "/")
        return written

    # ---------------------------------------------------------------- classes
    def class_(self, name: str, cls: type) -> list[str]:
        bases = [base.__name__ for base in cls.__bases__ if base.__name__ in self.classes]
        body: list[str] = []
        if type(vars(cls).get("__init__")).__name__ == "wrapper_descriptor":  # made by TensorRT only
            body.append("def __init__(self, made_by_tensorrt_only: typing.NoReturn, /) -> None: ...")
        for key, value in vars(cls).items():
            if key in _SKIP or key.startswith(("__pybind11", "_pybind11")):
                continue
            body += self._member(name, cls, key, value)
        written = "\n".join(body)
        body += [line for line in EXTRA.get(name, ()) if f"def {line.split('(')[0][4:]}(" not in written]
        head = f"class {name}({', '.join(bases)}):" if bases else f"class {name}:"
        return [head, *(f"    {line}" for line in body or ["..."])]

    def _member(self, owner: str, cls: type, key: str, value: object) -> list[str]:
        if is_enum(cls):
            if key in cls.__members__:  # type: ignore[attr-defined]
                return [f"{key}: typing.ClassVar[{owner}]"]
            if key in ("name", "value"):
                kind = "str" if key == "name" else "int"
                return ["@property", f"def {key}(self) -> {kind}: ..."]
        if key in ("__eq__", "__ne__"):
            return [f"def {key}(self, other: object, /) -> builtins.bool: ..."]
        if key == "__hash__":
            return [] if value is None else ["def __hash__(self) -> int: ..."]
        if isinstance(value, type):
            return self._nested(owner, key, value)
        kind = type(value).__name__
        if isinstance(value, property):
            static = kind != "property"
            return self._property(owner, key, value, static)
        doc = inspect.getattr_static(value, "__doc__", None) if kind == "instancemethod" else None
        if signatures := from_docstring(getattr(value, "__doc__", None) or doc, key):
            return self.function(key, signatures, owner)
        if kind == "function" and key == "__enter__":
            return [f"def __enter__(self) -> {owner}: ..."]
        if kind == "function" and key == "__exit__":
            return ["def __exit__(self, *arguments: object) -> None: ..."]
        severity = self.classes["ILogger"].Severity  # type: ignore[attr-defined]
        if isinstance(value, severity):
            return [f"{key}: typing.ClassVar[ILogger.Severity]"]
        return []

    def _nested(self, owner: str, key: str, value: type) -> list[str]:
        if owner != "ILogger" and value is getattr(self.classes["ILogger"], key, None):
            return [f"{key}: typing.TypeAlias = ILogger.{key}"]
        lines = [f"class {key}:"]
        for name, member in vars(value).items():
            if name in _SKIP or name.startswith(("__pybind11", "_pybind11")):
                continue
            nested = f"{owner}.{key}"
            lines += [f"    {line}" for line in self._member(nested, value, name, member)]
        return lines

    def _property(self, owner: str, key: str, value: property, static: bool) -> list[str]:
        getter = parse((value.fget.__doc__ or "").split("\n")[0]) if value.fget else None
        setter = parse((value.fset.__doc__ or "").split("\n")[0]) if value.fset else None
        read = self.type_(getter.returns, owner, parameter=False) if getter else "typing.Any"
        if static:
            return [f"{key}: typing.ClassVar[{read}]"]
        if key == "itemsize":
            read = "float"  # int4 and fp4 take half a byte
        lines = ["@property", f"def {key}(self) -> {read}: ..."]
        if value.fset:
            write = "typing.Any"
            if setter:
                write = self.type_(setter.parameters[-1].annotation, owner, parameter=True)
            lines += [f"@{key}.setter", f"def {key}(self, value: {write}) -> None: ..."]
        return lines

    # ----------------------------------------------------------------- module
    def module_level(self) -> list[str]:
        lines: list[str] = []
        for name, value in sorted(vars(self.module).items()):
            if name.startswith("_") or isinstance(value, type | ModuleType):
                continue
            owner = type(value).__name__
            if owner in self.classes:
                lines.append(f"{name}: {owner}")
            else:
                lines += self.function(name, from_docstring(value.__doc__, name), "")
        return lines

    def write(self, version: str) -> str:
        # typing_extensions.Buffer: collections.abc.Buffer exists from Python 3.12 on.
        parts = [HEADER.format(version=version) + "from typing_extensions import Buffer\n"]
        for name, cls in self.classes.items():
            parts.append("\n".join(self.class_(name, cls)))
        parts.append("\n".join(self.module_level()))
        return "\n\n".join(parts) + "\n" + PYTHON_LAYER


def stub(module: ModuleType, version: str) -> str:
    """The text of tensorrt/__init__.pyi for an imported bindings module."""
    return Generator(module).write(version)


def names(module: ModuleType) -> dict[str, list[str]]:
    """What exists: class name -> its attributes (inherited ones included), module-level names with []."""
    found: dict[str, list[str]] = {}
    for name, value in vars(module).items():
        if not name.startswith("_"):
            found[name] = sorted(dir(value)) if isinstance(value, type) else []
    return found
