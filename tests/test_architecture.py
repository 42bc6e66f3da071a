"""The import arrows of docs/architecture.md.

Read from the source, not from what happens to be imported: a lazy import inside a function counts too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("common", "protos", "networks", "runtime", "export", "adapt", "bench")
MAY_IMPORT = {
    "common": set(),
    "protos": set(),
    "networks": {"common"},
    "runtime": {"common", "protos"},
    "export": {"common", "protos", "runtime", "networks"},
    "adapt": {"common", "protos", "runtime", "export", "networks"},
    "bench": {"common", "protos", "runtime", "export", "networks", "adapt"},
}
# What a vehicle that only serves does not have installed.
NOT_IN_RUNTIME = {"torch", "onnx", "safetensors", "PIL", "scipy", "numba", "jinja2", "imagehash"}


def imports(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("folder", HOUSE)
def test_arrows_point_one_way(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    for path in sorted((ROOT / folder).rglob("*.py")):
        wrong = (imports(path) & set(HOUSE)) - allowed
        where = path.relative_to(ROOT)
        assert not wrong, f"{where} imports {sorted(wrong)}; {folder}/ may import {sorted(allowed)}"


@pytest.mark.parametrize("folder", ["common", "runtime", "protos"])
def test_serving_needs_no_training_library(folder: str) -> None:
    for path in sorted((ROOT / folder).rglob("*.py")):
        wrong = imports(path) & NOT_IN_RUNTIME
        where = path.relative_to(ROOT)
        assert not wrong, f"{where} imports {sorted(wrong)}, which a serving vehicle does not install"


def test_importing_the_server_loads_no_training_library() -> None:
    code = (
        "import sys, runtime.serve, runtime.ctl, runtime.client; "
        f"print(sorted(m for m in {sorted(NOT_IN_RUNTIME)} if m in sys.modules))"
    )
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
