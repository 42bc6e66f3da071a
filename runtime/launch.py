"""A command of this package that stops before it has begun: its modules are still being imported.

`networks.launch` is the same for packages that bring training libraries; this one must not import it.
"""

from __future__ import annotations

import os
import sys
from types import TracebackType

#: What a library is called on the index, where that is another name than the one it is imported under.
PACKAGES = {
    "grpc": "grpcio",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
    "google": "protobuf",
    "prometheus_client": "prometheus-client",
    "opentelemetry": "opentelemetry-sdk",
}


def watch() -> None:
    """End this process in one line if it is a command and its imports fail or are interrupted.

    Does nothing for a package that is imported by another program: only while Python looks for the module of
    ``-m`` is the first argument that option itself.
    """
    if sys.argv[:1] == ["-m"] and sys.excepthook is sys.__excepthook__:
        sys.excepthook = _end


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An excepthook.  Raises: SystemExit, whose code the process ends with."""
    cause: BaseException | None = error
    while cause is not None:  # an extension module makes an ImportError of an interrupt
        if isinstance(cause, KeyboardInterrupt):
            print("error: interrupted", file=sys.stderr, flush=True)
            os._exit(130)  # Python would end itself by the signal, after lines of other libraries
        cause = cause.__cause__ or cause.__context__
    name = (getattr(error, "name", None) or "").split(".")[0]
    if not isinstance(error, ImportError) or name in ("protos", "runtime"):
        sys.__excepthook__(kind, error, trace)  # a fault of ours: its traceback shows where
        return
    why = " ".join(str(error).split())[:300]
    package = PACKAGES.get(name, name) or "roadworthy"
    print(f"error: {why}: pip install '{package}'", file=sys.stderr)
    raise SystemExit(1)
