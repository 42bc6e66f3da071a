"""A command that stops before it has begun: its modules are still being imported.

    from networks.launch import watch

    watch()   # in the __init__ of a package that has commands

`networks.command.finish` gives a running command its exit code and its one line.  What is raised earlier,
while `python -m package.command` imports torch or finds that a library is absent, reaches the interpreter's
own hook, which would print a traceback.  Knows the names of libraries; nothing of what commands do.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

#: Exit code of a command that Ctrl-C ended, as shells write it.
INTERRUPTED = 130
#: The extra that brings a library, by the name it is imported under.
EXTRAS = {
    "torch": "export", "onnx": "export", "safetensors": "export", "PIL": "export", "tomli_w": "export",
    "imagehash": "adapt", "jinja2": "adapt", "scipy": "adapt", "numba": "adapt",
    "av": "video", "mcap": "ros", "mcap_ros2": "ros", "rerun": "view", "pydensecrf": "crf",
    "cryptography": "signing", "onnxruntime": "cpu", "tensorrt": "tensorrt", "cuda": "tensorrt",
    "pycuda": "tensorrt", "grpc_reflection": "reflection", "opentelemetry": "tracing",
    "tensorrt_rtx_bindings": "rtx", "tritonclient": "test", "pytest": "test", "hypothesis": "test",
}  # fmt: skip
#: What a library is called on the index, where that is another name than the one it is imported under.
PACKAGES = {
    "PIL": "pillow", "tomli_w": "tomli-w", "mcap_ros2": "mcap-ros2-support", "rerun": "rerun-sdk",
    "cuda": "cuda-bindings", "grpc": "grpcio", "grpc_health": "grpcio-health-checking",
    "google": "protobuf", "prometheus_client": "prometheus-client", "imagehash": "imagehash",
    "grpc_reflection": "grpcio-reflection", "opentelemetry": "opentelemetry-sdk",
    "tritonclient": "tritonclient[grpc]",
}  # fmt: skip


def watch() -> None:
    """End this process in one line if it is a command and its imports fail or are interrupted.

    Does nothing for a package that is imported by another program: only while Python looks for the module of
    ``-m`` is the first argument that option itself.
    """
    if sys.argv[:1] == ["-m"] and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _end


def remedy(error: ImportError) -> str:
    """One line: which library a command lacks, and the command that installs it."""
    name = (error.name or "").split(".")[0]
    if not name:
        why = " ".join(str(error).split())[:300]
        return f"a library cannot be imported ({why}): pip install '.[all]' in a checkout brings all of them"
    package = PACKAGES.get(name, name)
    whole = f", or everything that this command needs: pip install '.[{EXTRAS[name]}]' in a checkout"
    absent = isinstance(error, ModuleNotFoundError)
    what = "is not installed" if absent else f"cannot be imported: {' '.join(str(error).split())[:200]}"
    how = "" if absent else " --force-reinstall"
    return f"{name} {what}: pip install{how} '{package}'{whole if name in EXTRAS else ''}"


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook.  Raises: SystemExit, whose code the process ends with."""
    cause: BaseException | None = error
    while cause is not None:  # an extension module makes an ImportError of an interrupt
        if isinstance(cause, KeyboardInterrupt):
            print("error: interrupted", file=sys.stderr, flush=True)
            os._exit(INTERRUPTED)  # Python would end itself by the signal, after lines of other libraries
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, ImportError) and not _ours(error):
        print(f"error: {remedy(error)}", file=sys.stderr)
        raise SystemExit(1)
    sys.__excepthook__(kind, error, trace)


def _ours(error: ImportError) -> bool:
    """Whether a module of this project is what is absent: a fault here, which its traceback shows."""
    name = (error.name or "").split(".")[0]
    return name in ("protos", "networks", "runtime", "export", "adapt", "bench", "tools", "tests")
