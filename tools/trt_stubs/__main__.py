"""python -m tools.trt_stubs: fetch TensorRT's bindings wheels, make them importable, write their stubs."""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

# The newest and the oldest release of each major version that export/ and runtime/ promise (pyproject.toml).
# 10.12 has no wheel for CUDA 13; the Python interface is the same in both.
WHEELS = {
    "11": ("tensorrt-cu13-bindings", "11.4.0.106"),
    "11.0": ("tensorrt-cu13-bindings", "11.0.0.114"),
    "10": ("tensorrt-cu13-bindings", "10.16.1.11"),
    "10.12": ("tensorrt-cu12-bindings", "10.12.0.36"),
}
BINDINGS = {name: version for name, (_, version) in WHEELS.items()}
ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "build" / "trt"
SHIMS = {"PLUGIN": "nvinfer_plugin", "PARSER": "nvonnxparser", "NVINFER": "nvinfer"}


class Failed(Exception):
    """One line: what could not be done, why, and what to do."""


def _major(name: str) -> str:
    """ "10.12" -> "10": the number that the names of TensorRT's libraries end with."""
    return name.split(".")[0]


def fetch(name: str, where: Path = DEFAULT) -> Path:
    """The unpacked bindings wheel (1.2 MB), installed by pip where it is not there yet."""
    target = where / f"bindings-{name}"
    if not (target / "tensorrt_bindings").is_dir():
        wheel = "==".join(WHEELS[name])
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), wheel]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Failed(
                f"{wheel}: pip could not install it ({said}); "
                "a package index with NVIDIA's wheels and Python 3.11-3.14 on Linux are needed"
            )
    return target


def shims(name: str, where: Path = DEFAULT) -> Path:
    """The folder with the three libraries compiled from shim.c, one command each."""
    major = _major(name)
    target = where / f"shims-{major}"
    target.mkdir(parents=True, exist_ok=True)
    source = Path(__file__).with_name("shim.c")
    for define, library_name in SHIMS.items():
        library = target / f"lib{library_name}.so.{major}"
        if library.exists() and library.stat().st_mtime >= source.stat().st_mtime:
            continue
        partial = library.with_suffix(f".{os.getpid()}")
        command = ["gcc", "-shared", "-fPIC", "-Wall", "-Werror", f"-DROADWORTHY_{define}"]
        command += [f"-Wl,-soname,{library.name}", "-o", str(partial), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise Failed("gcc: not found; the import shims are compiled, so install a C compiler") from None
        except subprocess.CalledProcessError as error:
            raise Failed(f"gcc: {error.stderr.strip().splitlines()[0]}") from None
        partial.replace(library)
    return target


def load(name: str, where: Path = DEFAULT):  # type: ignore[no-untyped-def]
    """Import the bindings of one release into THIS process (only one fits; the second would clash)."""
    bindings, libraries = fetch(name, where), shims(name, where)
    for library in SHIMS.values():  # the loader finds them by SONAME, so LD_LIBRARY_PATH is not needed
        ctypes.CDLL(str(libraries / f"lib{library}.so.{_major(name)}"), mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(bindings))
    package = importlib.import_module("tensorrt_bindings")
    if package.__version__ != BINDINGS[name]:
        raise Failed(
            f"{bindings}: holds {package.__version__}, not {BINDINGS[name]}; delete the folder and try again"
        )
    return package, importlib.import_module("tensorrt_bindings.tensorrt")


def child(name: str, what: str, where: Path = DEFAULT) -> str:
    """Run this module's `--print` in a process of its own, because two releases cannot share one."""
    command = [sys.executable, "-m", "tools.trt_stubs", "--major", name, "--print", what]
    done = subprocess.run(
        [*command, "--build", str(where)], cwd=ROOT, capture_output=True, text=True, env={**os.environ}
    )
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["stub generator failed without a message"])[-1])
    return done.stdout


def write(name: str, where: Path = DEFAULT) -> Path:
    """Write the stub package; returns the folder to put on mypy's path."""
    folder = where / f"stubs-{name}"
    package = folder / "tensorrt"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.pyi").write_text(child(name, "stub", where))
    (package / "py.typed").write_text("")
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.trt_stubs",
        description="Write type stubs of the TensorRT Python bindings, by introspection of the real wheel. "
        "No GPU, driver or TensorRT library is needed; gcc and pip are.",
        epilog="examples:\n"
        "  python -m tools.trt_stubs                            every release, into build/trt\n"
        "  python -m tools.trt_stubs --major 11                 one of them\n"
        "  python -m tools.trt_stubs --major 11 --print names   what exists, as JSON\n\n"
        "exit codes: 0 written, 1 failed, 2 usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = "a release: the newest of a major version (10, 11) or the oldest (10.12, 11.0); default: all"
    parser.add_argument("--major", choices=list(BINDINGS), action="append", help=which)
    parser.add_argument("--build", type=Path, default=DEFAULT, metavar="DIR", help="default: build/trt")
    parser.add_argument("--print", choices=("stub", "names"), help="to stdout instead; needs one --major")
    options = parser.parse_args(argv)
    releases = options.major or list(BINDINGS)
    try:
        if options.print:
            if len(releases) != 1:
                parser.error("--print needs one --major: two releases cannot be imported by one process")
            from tools.trt_stubs import generate

            package, module = load(releases[0], options.build)
            if options.print == "stub":
                print(generate.stub(module, package.__version__))
            else:
                print(json.dumps(generate.names(package), indent=0))
            return 0
        for release in releases:
            print(write(release, options.build))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
