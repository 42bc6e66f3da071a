"""Every command in an environment that lacks a library, or that is interrupted while it imports one."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("runtime", "networks", "export", "adapt", "bench")
LIBRARIES = (
    "torch",
    "onnx",
    "PIL",
    "safetensors",
    "tomli_w",
    "numba",
    "scipy",
    "jinja2",
    "imagehash",
    "av",
    "mcap",
    "mcap_ros2",
    "rerun",
    "cryptography",
    "onnxruntime",
    "tensorrt",
    "opentelemetry",
    "grpc_reflection",
    "pydensecrf",
    "tritonclient",
)
#: Words that a command needs before it does anything.
PLAIN = {
    "export.inspect": ["absent.onnx"],
    "export.build": ["absent", "--repository", "absent"],
    "export.refit": ["m", "1", "absent", "--repository", "absent"],
    "networks.import_checkpoint": ["roadnet", "absent.pth", "--classes", "street", "--out", "absent"],
}
#: Finds no module of the names in BLOCKED, and none of theirs.
BLOCK = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in os.environ["BLOCKED"].split(","):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def commands() -> list[str]:
    """Modules with an `if __name__ == "__main__"`, by the name after -m."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "__main__" in path.read_text() and any(
                isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
                for node in ast.parse(path.read_text()).body
            ):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(name.removesuffix(".__main__"))
    # Programs of other servers' environments: they are started by path and have no options.
    return [name for name in found if name not in ("bench.peers.litserve_model", "bench.peers.kserve_model")]


def run(words: list[str], folder: Path, blocked: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(BLOCK)
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}", "BLOCKED": blocked, **more}
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )


def one_line(done: subprocess.CompletedProcess[str]) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode:
        assert "pip install" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.returncode == 1


@pytest.mark.parametrize("command", commands())
def test_help_without_any_extra_is_help_or_one_line(command: str, tmp_path: Path) -> None:
    one_line(run([command, "--help"], tmp_path, ",".join(LIBRARIES)))


@pytest.mark.parametrize(
    "library", ["torch", "onnx", "PIL", "safetensors", "tomli_w", "onnxruntime", "scipy"]
)
@pytest.mark.parametrize("command", PLAIN)
def test_a_library_that_is_absent_is_named_with_its_remedy(
    command: str, library: str, tmp_path: Path
) -> None:
    done = run([command, *PLAIN[command]], tmp_path, library)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    if "pip install" in done.stderr:
        assert library in done.stderr
    else:  # the library was not needed: what is wrong is the file
        assert "absent" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("command", commands())
def test_help_without_one_library(command: str, library: str, tmp_path: Path) -> None:
    one_line(run([command, "--help"], tmp_path, library))


@pytest.mark.parametrize(
    "command",
    ["export.build", "export.refit", "networks.import_checkpoint", "adapt.reproduce", "bench.export"],
)
def test_ctrl_c_while_torch_is_imported(command: str, tmp_path: Path) -> None:
    """The import waits until it is interrupted, however fast or busy the machine is."""
    (tmp_path / "torch").mkdir()
    waits = "import time\nprint('importing', flush=True)\ntime.sleep(120)\n"
    (tmp_path / "torch" / "__init__.py").write_text(waits)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with subprocess.Popen(
        [sys.executable, "-m", command, "--help"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs deaf to SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "importing\n"
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, said) == (130, "error: interrupted\n")


def test_a_library_that_fails_without_its_name(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    done = run(["networks.import_checkpoint", "--help"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: a library cannot be imported (libgomp.so.1: cannot open")
    one_line(done)


def test_a_fault_of_ours_keeps_its_traceback(tmp_path: Path) -> None:
    code = "import sys; sys.argv = ['-m']; import networks; from networks import nothing_of_the_kind"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "Traceback" in done.stderr
    assert "nothing_of_the_kind" in done.stderr


def test_a_program_that_imports_a_package_keeps_its_own_hook() -> None:
    code = "import sys, runtime, export, adapt, networks; assert sys.excepthook is sys.__excepthook__"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
