"""Where the other servers and benchmarks are installed: one virtual environment each, outside the repository.

Knows versions and pins, with the reason for each pin; starts nothing.  ROADWORTHY_PEERS names the
folder that holds the environments; without it the folder `peers` beside the repository is looked at.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path


class Absent(Exception):
    """A peer that is not installed here; the message says how to get it."""


@dataclass(frozen=True)
class Environment:
    """One virtual environment.  `requirements` go to pip as they are; `why` explains the pins."""

    name: str
    requirements: tuple[str, ...]
    why: str


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "triton",
            ("nvidia-pytriton==0.7.0", "onnxruntime", "numpy<2"),
            "the wheel holds a whole tritonserver 2.51, python backend alone; pytriton pins numpy < 2",
        ),
        Environment(
            "mlserver",
            ("mlserver==1.7.1", "uvloop<0.22", "onnxruntime"),
            "with uvloop 0.22 MLServer's workers die on start (SeldonIO/MLServer#2286)",
        ),
        Environment("kserve", ("kserve==0.21.0", "onnxruntime"), "the KServe SDK's own model server"),
        Environment("bentoml", ("bentoml==1.4.39", "onnxruntime"), "1.4.40 wants a certifi that is not out"),
        Environment(
            "litserve",
            ("litserve==0.2.19", "onnxruntime", "python-multipart"),
            "its fastest way is a form, which Starlette reads with python-multipart",
        ),
        Environment(
            "perf",
            ("tritonclient[all]==2.41.0", "nvidia-cuda-runtime-cu12"),
            "the last tritonclient wheel that holds perf_analyzer; it also wants Debian's libb64-0d",
        ),
        Environment(
            "edges",
            ("pyEdgeEval==0.2.8", "scipy", "opencv-python-headless"),
            "the boundary benchmark in Python; its own requirements leave out scipy and OpenCV",
        ),
    )
}


def root() -> Path:
    """The folder that holds the environments."""
    beside = Path(__file__).resolve().parents[3] / "peers"
    return Path(os.environ.get("ROADWORTHY_PEERS", beside))


def find(name: str) -> Path:
    """The environment's folder; raises Absent with the command that makes it."""
    path = root() / name
    if not (path / "bin" / "python").exists():
        raise Absent(
            f"no environment '{name}' in {root()}: "
            f"python -m bench.peers --install {name}, or set ROADWORTHY_PEERS"
        )
    return path


def site_packages(environment: Path) -> Path:
    """`lib/pythonX.Y/site-packages` of an environment."""
    return next((environment / "lib").glob("python3*/site-packages"))


def install(name: str) -> Path:
    """Makes the environment with pip; raises CalledProcessError when pip does not succeed."""
    path = root() / name
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    subprocess.run([str(path / "bin" / "pip"), "install", "-q", *ENVIRONMENTS[name].requirements], check=True)
    return path
