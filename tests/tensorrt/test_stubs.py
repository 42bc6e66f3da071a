"""Our TensorRT code against the real bindings, the newest and the oldest release of each major version.

Types, names and planted mistakes.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tools.trt_stubs.__main__ import BINDINGS, DEFAULT, ROOT, Failed, child, write

pytestmark = pytest.mark.peers
OURS = sorted(
    path.relative_to(ROOT)
    for path in (
        *(ROOT / "runtime").rglob("*.py"),
        *(ROOT / "export").rglob("*.py"),
    )
    if "trt." in path.read_text()
)
FAKES = (Path("tests/tensorrt/fakes.py"), Path("tests/tensorrt/fake_builder.py"))
PLANTED = Path("tests/tensorrt/planted.py")
majors = pytest.mark.parametrize("major", BINDINGS)


@cache
def stubs(major: str) -> Path:
    try:
        return write(major)
    except Failed as error:
        pytest.skip(str(error))


@cache
def names(major: str) -> dict[str, list[str]]:
    try:
        found: dict[str, list[str]] = json.loads(child(major, "names"))
    except Failed as error:
        pytest.skip(str(error))
    return found


def mypy(major: str, *paths: Path) -> list[str]:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-warn-unused-ignores", "--no-pretty"]
    command += ["--no-error-summary", "--cache-dir", str(DEFAULT / f"mypy-{major}")]
    command += ["--explicit-package-bases", "--disable-error-code", "type-arg", *map(str, paths)]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join([str(stubs(major)), str(ROOT)])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if ": error:" in line]


@majors
def test_the_backend_is_type_checked_against_the_bindings(major: str) -> None:
    assert len(OURS) >= 3
    assert mypy(major, *OURS) == []


@majors
def test_the_fakes_have_the_signatures_of_the_bindings(major: str) -> None:
    assert mypy(major, *FAKES) == []


@majors
def test_planted_mistakes_are_found_and_nothing_else_is(major: str) -> None:
    found = {int(line.split(":")[1]) for line in mypy(major, PLANTED)}
    lines = (ROOT / PLANTED).read_text().splitlines()
    only = {"11": " in 11", "11.0": " in 11", "10.12": r" in 10\.12"}.get(major, " in nothing")
    mark = rf"# wrong({only})?$"
    planted = {number for number, line in enumerate(lines, 1) if re.search(mark, line)}
    assert len(planted) >= 80
    missed = [lines[number - 1].strip() for number in sorted(planted - found)]
    wrongly = [lines[number - 1].strip() for number in sorted(found - planted)]
    assert not missed
    assert not wrongly


def used(path: Path) -> set[str]:
    """Every dotted name that starts with `trt` in a file: {"BuilderFlag.REFIT", "Runtime", …}."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        chain: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            chain.insert(0, inner.attr)
            inner = inner.value
        if chain and isinstance(inner, ast.Name) and inner.id == "trt":
            found.add(".".join(chain[:2]))
    return found


@majors
@pytest.mark.parametrize("path", OURS, ids=str)
def test_every_name_that_we_use_exists(major: str, path: Path) -> None:
    here = names(major)
    for dotted in sorted(used(path)):
        name, _, attribute = dotted.partition(".")
        assert name in here, f"{path} uses trt.{name}, which TensorRT {BINDINGS[major]} does not have"
        if attribute:
            assert attribute in here[name], f"{path}: trt.{dotted} is not in {BINDINGS[major]}"


def test_the_scan_sees_what_it_should() -> None:
    found = used(Path("export/tensorrt/builder.py"))
    assert {"BuilderFlag.REFIT_INDIVIDUAL", "OnnxParser", "HardwareCompatibilityLevel.AMPERE_PLUS"} <= found


@majors
def test_our_callbacks_work_with_the_real_module(major: str) -> None:
    """Logger, monitor, Weights and Dims for real: they need no libnvinfer."""
    code = f"""
import numpy as np
from tools.trt_stubs.__main__ import load
package, module = load({major!r})
from runtime.engines.tensorrt.library import Log, library_of, logger
from export.tensorrt.monitor import monitor
library = library_of(package)
assert library.text == "tensorrt {BINDINGS[major]}", library
log = Log()
made = logger(library, log)
made.log(package.ILogger.Severity.ERROR, "two\\nlines")
made.log(package.ILogger.Severity.INFO, "not kept")
assert log.errors() == ["two lines"] and log.lines() == ["two lines"]
seen = []
watch = monitor(library, lambda *step: seen.append(step), [])
watch.phase_start("outer", None, 2)
assert watch.step_complete("outer", 1) is True
assert seen == [("outer", 0, 2), ("outer", 2, 2)], seen
weights = package.Weights(np.arange(6, dtype=np.float32))
assert (weights.size, weights.dtype) == (6, package.DataType.FLOAT)
assert tuple(package.Dims((2, -1, 3))) == (2, -1, 3)
try:
    package.Runtime(made)
except TypeError as error:
    assert "nullptr" in str(error)
else:
    raise AssertionError("the shims made a Runtime")
"""
    stubs(major)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
