"""A command that stops before it has begun, while Python still imports its modules.

    from common.launch import watch

    watch()   # in the __init__ of a package that has commands

`common.cli.run_command` gives a running command its exit code and its one line.  What is raised earlier,
while `python -m package.command` imports torch or finds that a library is absent, reaches the hook of the
interpreter, which would print a traceback.  This module knows the names of libraries and nothing of what
commands do.  It imports nothing outside the standard library.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

from common.cli import INTERRUPTED
from common.text import shorten

__all__ = ["remedy", "watch"]

#: The extra that brings a library, by the name that a program imports.
EXTRAS = {
    "torch": "export",
    "onnx": "export",
    "safetensors": "export",
    "PIL": "export",
    "tomli_w": "export",
    "imagehash": "adapt",
    "jinja2": "adapt",
    "scipy": "adapt",
    "numba": "adapt",
    "av": "video",
    "mcap": "ros",
    "mcap_ros2": "ros",
    "rerun": "view",
    "pydensecrf": "crf",
    "cryptography": "signing",
    "onnxruntime": "cpu",
    "tensorrt": "tensorrt",
    "cuda": "tensorrt",
    "pycuda": "tensorrt",
    "grpc_reflection": "reflection",
    "opentelemetry": "tracing",
    "tensorrt_rtx_bindings": "rtx",
    "tritonclient": "test",
    "pytest": "test",
    "hypothesis": "test",
}
#: The name of a library on the package index, if it is not the name that a program imports.
PACKAGES = {
    "PIL": "pillow",
    "tomli_w": "tomli-w",
    "mcap_ros2": "mcap-ros2-support",
    "rerun": "rerun-sdk",
    "cuda": "cuda-bindings",
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "google": "protobuf",
    "prometheus_client": "prometheus-client",
    "grpc_reflection": "grpcio-reflection",
    "opentelemetry": "opentelemetry-sdk",
    "tritonclient": "tritonclient[grpc]",
}
#: The packages of this project.
OURS = ("common", "protos", "networks", "runtime", "export", "adapt", "bench", "tools", "tests")


def watch() -> None:
    """End this process with one line if it is a command and its imports fail or are interrupted.

    A package that another program imports changes nothing: the hook is set only while Python looks for the
    module of ``-m``, when the first argument is that option itself.
    """
    if sys.argv[:1] == ["-m"] and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _end


def remedy(error: ImportError) -> str:
    """Return one line: the library that a command lacks, and the command that installs it."""
    name = (error.name or "").split(".")[0]
    if not name:
        why = shorten(error, 300)
        return f"a library cannot be imported ({why}): pip install '.[all]' in a checkout brings all of them"
    package = PACKAGES.get(name, name)
    extra = ""
    if name in EXTRAS:
        extra = f", or everything that this command needs: pip install '.[{EXTRAS[name]}]' in a checkout"
    absent = isinstance(error, ModuleNotFoundError)
    what = "is not installed" if absent else f"cannot be imported: {shorten(error, 200)}"
    force = "" if absent else " --force-reinstall"
    return f"{name} {what}: pip install{force} '{package}'{extra}"


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook.  Raises SystemExit with the exit code of the process."""
    cause: BaseException | None = error
    while cause is not None:  # an extension module makes an ImportError of an interrupt
        if isinstance(cause, KeyboardInterrupt):
            print("error: interrupted", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)  # Python would end itself by the signal, after lines of other libraries
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ImportError) and not _is_ours(error):
        print(f"error: {remedy(error)}", file=sys.stderr)
        raise SystemExit(1)
    sys.__excepthook__(kind, error, trace)


def _is_ours(error: ImportError) -> bool:
    """Whether the absent module is one of this project: a fault here, which its traceback shows."""
    return (error.name or "").split(".")[0] in OURS
