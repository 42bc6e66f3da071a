"""The shape of the code: which package may import which, no import circles, no borrowed private names, sizes.

The tests read the source and not what happens to be imported: a lazy import inside a function counts too.
The lists below may only shrink: an entry that is no longer needed fails its test.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
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

#: Circles of files that are left to break: each is the set of its modules.
FILE_CIRCLES: list[set[str]] = []
#: Circles of folders that are left to break.
FOLDER_CIRCLES: list[set[str]] = []

MOST_LINES, MOST_METHODS, MOST_FILES = 450, 20, 20
TO_SPLIT = "to be split"
ONE_MEASUREMENT = "one measurement, read from top to bottom"
ONE_METHOD_PER_CALL = "one method per call of the interface that it wraps"
#: Private names that another module uses, left to make public.
PRIVATE_NAMES: set[str] = {
    "bench.edges uses _SOLVERS of adapt.labels.seal",
}
#: Files of more lines, and why.
LONG_FILES = {
    "adapt/align.py": TO_SPLIT,
    "adapt/evaluate/edge_sets.py": TO_SPLIT,
    "runtime/client/sync.py": ONE_METHOD_PER_CALL,
    "adapt/frames/store.py": TO_SPLIT,
    "adapt/labels/cbst.py": TO_SPLIT,
    "adapt/labels/seal.py": TO_SPLIT,
    "adapt/weak/marks.py": TO_SPLIT,
    "runtime/client/messages.py": TO_SPLIT,
    "runtime/config.py": TO_SPLIT,
    "runtime/repository/repository.py": TO_SPLIT,
    "runtime/serving/served_model.py": TO_SPLIT,
    "bench/demo/run.py": ONE_MEASUREMENT,
    "bench/gate.py": ONE_MEASUREMENT,
    "bench/ordering.py": ONE_MEASUREMENT,
    "bench/peers/calls.py": "one list of calls in their order",
    "bench/real.py": ONE_MEASUREMENT,
    "bench/soak.py": ONE_MEASUREMENT,
    "adapt/data/street/paint.py": "one painter per kind of thing in a street, all of the same form",
    "adapt/data/street/world.py": "one builder per kind of thing in a street, all of the same form",
}
#: Classes of more methods, and why.
WIDE_CLASSES: dict[str, str] = {
    "runtime.serving.served_model.ServedModel": TO_SPLIT,
    "adapt.frames.store.FrameStore": TO_SPLIT,
    "runtime.checks.task.Task": TO_SPLIT,
    "runtime.repository.repository.Repository": TO_SPLIT,
    "runtime.swap.group_controller.GroupController": TO_SPLIT,
    "runtime.client.aio.AsyncClient": ONE_METHOD_PER_CALL,
    "runtime.client.sync.Client": ONE_METHOD_PER_CALL,
    "runtime.engines.cuda.pycuda_driver.PycudaDriver": ONE_METHOD_PER_CALL,
}
#: Folders of more files, and why.
FULL_FOLDERS: dict[str, str] = {
    "adapt/loop": "one component per file",
    "bench": "one script per figure; documents name them as `python -m bench.NAME`",
    "bench/peers": "one file per peer",
}


def imports(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, at any depth of nesting."""
    found: set[str] = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


@cache
def modules() -> dict[str, Path]:
    """Every hand-written module of the project by its dotted name."""
    found = {}
    for package in HOUSE:
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" not in path.name:
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


def borrowed(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import of the project in a module; name is "" for a whole module."""
    for node in ast.walk(parsed(modules()[module])):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in modules():
                    yield whole, ""
                elif node.module in modules():
                    yield node.module, alias.name


def attributes(module: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each `other.name` in a module, for the modules of the project that it imports."""
    tree = parsed(modules()[module])
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
            aliases.update((name, whole) for name, whole in names if whole in modules())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield aliases[node.value.id], node.attr


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of nodes of which each reaches each other (strongly connected components of two or more)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in graph.get(waiting.pop(), set()) - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    reach = {node: reached(node) for node in graph}
    found: list[set[str]] = []
    for node in sorted(graph):
        circle = {other for other in reach[node] if node in reach.get(other, set())}
        if len(circle) > 1 and circle not in found:
            found.append(circle)
    return found


def compare(found: Iterable[set[str]], listed: list[set[str]]) -> None:
    """Fails for a circle that is not within a listed one, and for a listed circle that is broken."""
    found = list(found)
    new = [sorted(circle) for circle in found if not any(circle <= known for known in listed)]
    assert not new, f"import circles: {new}; move what both need into a module below them"
    gone = [sorted(known) for known in listed if not any(circle <= known for circle in found)]
    assert not gone, f"these circles are broken, take them out of the list: {gone}"


def file_imports() -> dict[str, set[str]]:
    return {module: {to for to, _ in borrowed(module)} - {module} for module in modules()}


def folder_imports() -> dict[str, set[str]]:
    """Folders that import each other.  A folder and a folder inside it count as one place."""
    graph: dict[str, set[str]] = {}
    for module, targets in file_imports().items():
        here = str(modules()[module].parent.relative_to(ROOT))
        for target in targets:
            there = str(modules()[target].parent.relative_to(ROOT))
            nested = f"{here}/".startswith(f"{there}/") or f"{there}/".startswith(f"{here}/")
            if not nested:
                graph.setdefault(here, set()).add(there)
                graph.setdefault(there, set())
    return graph


def check_sizes(found: dict[str, int], limit: int, exceptions: dict[str, str], what: str) -> None:
    """Fails for what is larger than the limit and not listed, and for what is listed and not larger."""
    large = {name: size for name, size in found.items() if size > limit}
    new = {name: size for name, size in large.items() if name not in exceptions}
    assert not new, f"more than {limit} {what}: {new}; split it, or list it with the reason"
    stale = sorted(set(exceptions) - set(large))
    assert not stale, f"at most {limit} {what} by now, take it out of the list: {stale}"


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


def test_importing_the_bottom_layer_loads_nothing() -> None:
    code = "import sys, common.launch; print([m for m in ('rich', 'numpy', 'tempfile') if m in sys.modules])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": set()}
    assert circles(graph) == [{"a", "b", "c"}]


def test_no_files_import_each_other_in_a_circle() -> None:
    compare(circles(file_imports()), FILE_CIRCLES)


def test_no_folders_import_each_other_in_a_circle() -> None:
    compare(circles(folder_imports()), FOLDER_CIRCLES)


def test_no_module_uses_a_private_name_of_another() -> None:
    found = {
        f"{module} uses {name} of {target}"
        for module in modules()
        for target, name in (*borrowed(module), *attributes(module))
        if name.startswith("_") and not name.startswith("__")
    }
    new, gone = sorted(found - PRIVATE_NAMES), sorted(PRIVATE_NAMES - found)
    assert not new, f"{new}; make the name public, or move what needs it beside it"
    assert not gone, f"take these out of the list: {gone}"


def test_no_file_is_long() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in modules().values()}
    check_sizes(lines, MOST_LINES, LONG_FILES, "lines")


def test_no_class_is_wide() -> None:
    methods = {
        f"{name}.{node.name}": sum(isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) for n in node.body)
        for name, path in modules().items()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
    }
    check_sizes(methods, MOST_METHODS, WIDE_CLASSES, "methods")


def test_no_folder_is_full() -> None:
    files: dict[str, int] = {}
    for path in modules().values():
        folder = str(path.parent.relative_to(ROOT))
        files[folder] = files.get(folder, 0) + 1
    check_sizes(files, MOST_FILES, FULL_FOLDERS, "Python files")
