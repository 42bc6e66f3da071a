"""The real tritonserver, out of the nvidia-pytriton wheel: version 2.51, python backend alone.

There is no tritonserver package on PyPI; this wheel holds the C++ server.  Its one backend runs
`triton_model.py`, which runs the same model.onnx through ONNX Runtime.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.peers import environments
from bench.peers.process import Server, free_port, live

_BACKEND_FILES = ("libtriton_python.so", "triton_python_backend_utils.py")


@dataclass(frozen=True)
class Tensor:
    """A tensor of config.pbtxt; `dims` without the batch dimension where `max_batch_size` is not 0."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    labels: str = ""


@dataclass(frozen=True)
class Model:
    """What config.pbtxt says of a model; `extra` is appended as it is."""

    name: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    max_batch_size: int = 0
    extra: str = ""
    labels: Sequence[str] = field(default=())

    def config(self, *, platform: str = 'backend: "python"') -> str:
        """The text of config.pbtxt."""

        def block(tensor: Tensor) -> str:
            kind = "TYPE_STRING" if tensor.datatype == "BYTES" else f"TYPE_{tensor.datatype}"
            labels = f' label_filename: "{tensor.labels}"' if tensor.labels else ""
            return f'{{ name: "{tensor.name}" data_type: {kind} dims: {list(tensor.dims)}{labels} }}'

        return (
            f'name: "{self.name}"\n{platform}\nmax_batch_size: {self.max_batch_size}\n'
            f"input [{', '.join(map(block, self.inputs))}]\n"
            f"output [{', '.join(map(block, self.outputs))}]\n"
            f"instance_group [{{ kind: KIND_CPU count: 1 }}]\n{self.extra}\n"
        )


def add_version(repository: Path, model: Model, version: int, onnx: bytes) -> Path:
    """Writes `repository/MODEL/VERSION/{model.onnx, model.py}`, and config.pbtxt beside."""
    home = repository / model.name
    folder = home / str(version)
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(onnx)
    shutil.copy(Path(__file__).with_name("triton_model.py"), folder / "model.py")
    (home / "config.pbtxt").write_text(model.config())
    if model.labels:
        (home / "labels.txt").write_text("".join(f"{label}\n" for label in model.labels))
    return folder


def start(
    repository: Path,
    *,
    work: Path,
    models: Sequence[str] = (),
    threads: int = 1,
    shm_bytes: int = 64 << 20,
    arguments: Sequence[str] = (),
) -> Server:
    """Starts tritonserver in explicit mode with `models` loaded; raises environments.Absent.

    repository  Triton layout, see `add_version`
    work        folder for the assembled backend and the log
    shm_bytes   what the python backend reserves for passing tensors to its process
    """
    environment = environments.find("triton")
    site = environments.site_packages(environment)
    home = site / "pytriton" / "tritonserver"
    if not home.is_dir():
        raise environments.Absent(f"{home} is missing: install nvidia-pytriton==0.7.0 there")
    backends = work / "backends"
    python = backends / "python"
    if not python.is_dir():
        python.mkdir(parents=True)
        for name in _BACKEND_FILES:
            (python / name).symlink_to(home / "backends" / "python" / name)
        stub = f"{sys.version_info[0]}.{sys.version_info[1]}"
        (python / "triton_python_backend_stub").symlink_to(
            home / "python_backend_stubs" / stub / "triton_python_backend_stub"
        )
    port = free_port()
    target = f"127.0.0.1:{port}"
    return Server(
        "tritonserver",
        [
            str(home / "bin" / "tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={backends}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in models),
            f"--grpc-port={port}",
            "--grpc-address=127.0.0.1",
            "--allow-http=false",
            "--allow-metrics=false",
            f"--backend-config=python,shm-default-byte-size={shm_bytes}",
            *arguments,
        ],
        target=target,
        ready=live(target),
        log=work / "tritonserver.log",
        environment={
            "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{_python_library()}",
            "PYTHONPATH": str(site),
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "ROADWORTHY_THREADS": str(threads),
        },
    )


def _python_library() -> str:
    """Where this interpreter's libpython is: the stub must not take another patch version's (pytriton#51)."""
    import sysconfig

    return str(sysconfig.get_config_var("LIBDIR") or "")
