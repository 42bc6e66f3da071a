"""The manuals: their links, the files and commands that they name, and the options that they show.

Imports nothing of the project; the README's commands run `--help` in processes of their own.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("adapt", "bench", "common", "export", "networks", "protos", "runtime", "tools")
FOLDERS = (*PACKAGES, "docs", "packs", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
#: The changelog and the upgrade page's tables name things that were there once.
HISTORIC = {"CHANGELOG.md", "docs/upgrade.md"}
#: Options of programs that are not ours, and a form with a placeholder.
FOREIGN = {"--upgrade", "--force-recreate"}

LINK = re.compile(r"(?<!!)\[[^\]\n]+\]\(([^)\s]+)\)|!\[[^\]\n]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?<![\w./-])((?:{'|'.join(FOLDERS)})/[\w./*{{}},-]*[\w*}}/])")
MODULE = re.compile(r"python -m ([a-z_]+(?:\.\w+)*)")
DOTTED = re.compile(rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+")
OPTION = re.compile(r"(?<![\w-])(--[a-z][a-z0-9-]+)")


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name)


def outside_fences(text: str) -> str:
    return re.sub(r"^```.*?^```\s*$", "", text, flags=re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> list[str]:
    """The lines of fenced and indented code, each continued line as one."""
    return re.sub(r"\\\n\s*", " ", text).splitlines()


def slug(heading: str) -> str:
    """The anchor that GitHub makes of a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@cache
def anchors(document: Path) -> set[str]:
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", outside_fences(document.read_text()), re.MULTILINE):
        anchor, number = slug(heading), 0
        while (anchor if not number else f"{anchor}-{number}") in found:
            number += 1
        found.add(anchor if not number else f"{anchor}-{number}")
    return found


@each_document
def test_every_relative_link_and_anchor_resolves(document: Path) -> None:
    broken = []
    for groups in LINK.findall(outside_fences(document.read_text())):
        target = groups[0] or groups[1]
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        where = (document.parent / path).resolve() if path else document
        if not where.exists() or (anchor and where.suffix == ".md" and anchor not in anchors(where)):
            broken.append(target)
    assert not broken


def expanded(path: str) -> Iterator[str]:
    """`a/{b,c}.py` as the shell reads it."""
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        yield path
        return
    for word in braces[1].split(","):
        yield from expanded(path[: braces.start()] + word + path[braces.end() :])


@each_document
def test_every_file_that_is_named_exists(document: Path) -> None:
    if name(document) in HISTORIC:
        pytest.skip("it names files of older versions")
    named = {found for code in CODE.findall(document.read_text()) for found in PATH.findall(code)}
    # packs/… in a command is what the reader has or makes; only packs/street-day comes with the project.
    named = {path for path in named if not path.startswith("packs/") or path.startswith("packs/street-day")}
    assert [path for path in sorted(named) for each in expanded(path) if not any(ROOT.glob(each))] == []


def is_command(module: str) -> bool:
    base = ROOT.joinpath(*module.split("."))
    return (base / "__main__.py").is_file() or (
        base.with_suffix(".py").is_file() and "__main__" in base.with_suffix(".py").read_text()
    )


@each_document
def test_every_command_that_is_named_can_be_started(document: Path) -> None:
    modules = {found for found in MODULE.findall(document.read_text()) if found.split(".")[0] in PACKAGES}
    assert [module for module in sorted(modules) if not is_command(module)] == []


def resolves(dotted: str) -> bool:
    """A module, or a name in the source of one."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        source = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if source.is_file():
            return end == len(parts) or re.search(rf"\b{parts[end]}\b", source.read_text()) is not None
        if base.is_dir():
            return end == len(parts)
    return False


@each_document
def test_every_python_name_that_is_shown_exists(document: Path) -> None:
    if name(document) in HISTORIC:
        pytest.skip("it names modules of older versions")
    named = {code for code in CODE.findall(document.read_text()) if DOTTED.fullmatch(code)}
    assert [dotted for dotted in sorted(named) if not resolves(dotted)] == []


def test_the_upgrade_page_names_modules_that_exist() -> None:
    page = (ROOT / "docs" / "upgrade.md").read_text()
    rows = re.findall(r"^\| `(?:\w+\.)+\w+` \| (.+) \|$", page, re.MULTILINE)
    assert len(rows) > 90
    new = {module for row in rows for module in CODE.findall(row) if DOTTED.fullmatch(module)}
    assert [module for module in sorted(new) if not resolves(module)] == []


@cache
def all_options() -> frozenset[str]:
    """Every `--option` that a program of the project has."""
    options = {"--help"}
    for package in PACKAGES:
        for source in (ROOT / package).rglob("*.py"):
            options |= set(re.findall(r"""["'](--[a-z][a-z0-9-]+)["']""", source.read_text()))
    return frozenset(options)


@each_document
def test_every_option_that_is_shown_exists(document: Path) -> None:
    if name(document) == "CHANGELOG.md":
        pytest.skip("it names options of older versions")
    text = document.read_text()
    shown: set[str] = set()
    for line in command_lines(text):
        if re.search(r"python -m (?:" + "|".join(PACKAGES) + r")\b", line):
            shown |= set(OPTION.findall(line.split("#")[0]))
    for code in CODE.findall(outside_fences(text)):
        if code.startswith("--"):
            shown |= set(OPTION.findall(code))
    # argparse makes --no-x of --x.
    known = all_options()
    missing = {
        option for option in shown if option not in known and option.replace("--no-", "--") not in known
    }
    assert sorted(missing - FOREIGN) == []


FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def snippets(language: str) -> list[object]:
    """Each fenced snippet of a language in all documents."""
    return [
        pytest.param(text, id=f"{name(document)}-{number}")
        for document in DOCUMENTS
        for number, (kind, text) in enumerate(FENCE.findall(document.read_text()))
        if kind == language
    ]


@pytest.mark.parametrize("text", snippets("python"))
def test_python_snippets_are_python(text: str) -> None:
    compile(text, "snippet", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.mark.parametrize("text", snippets("toml"))
def test_toml_snippets_are_toml(text: str) -> None:
    tomllib.loads(text)


@pytest.mark.parametrize("text", snippets("json"))
def test_json_snippets_are_json(text: str) -> None:
    json.loads(text)


def readme_commands() -> list[tuple[str, tuple[str, ...]]]:
    """Each `python -m MODULE …` of the README with the options that it shows."""
    found: dict[str, set[str]] = {}
    for line in command_lines((ROOT / "README.md").read_text()):
        if command := MODULE.search(line):
            found.setdefault(command[1], set()).update(OPTION.findall(line.split("#")[0]))
    return [(module, tuple(sorted(options))) for module, options in sorted(found.items())]


@pytest.mark.parametrize(("module", "options"), readme_commands(), ids=lambda value: str(value))
def test_the_readmes_commands_have_the_options_that_it_shows(module: str, options: tuple[str, ...]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [option for option in options if option not in OPTION.findall(done.stdout)] == []


def test_the_readmes_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert shown
    assert shown <= targets


def test_every_manual_can_be_reached_from_the_readme() -> None:
    """A page without a link to it is a page without a reader."""
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        document = ahead.pop()
        if document in reached:
            continue
        reached.add(document)
        for groups in LINK.findall(document.read_text()):
            path = (groups[0] or groups[1]).partition("#")[0]
            where = (document.parent / path).resolve()
            if path.endswith(".md") and where.is_file():
                ahead.append(where)
            elif path.endswith("/") and where.is_dir():
                ahead.extend(where.glob("*.md"))
    assert sorted(name(d) for d in DOCUMENTS if d not in reached) in ([], ["CHANGELOG.md"])
