"""Ctrl-C ends every adapt command in one line and with 130, whatever it was doing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "adapt.train": ("adapt.train.__main__", "parser"),
    "adapt.train edges": ("adapt.train.edges_main", "parser"),
    "adapt.evaluate": ("adapt.evaluate.__main__", "parser"),
    "adapt.evaluate edges": ("adapt.evaluate.edges_main", "parser"),
    "adapt.align": ("adapt.align", "parser"),
    "adapt.reproduce": ("adapt.reproduce", "parser"),
    "adapt.frames": ("adapt.frames.__main__", "parser"),
    "adapt.send": ("adapt.send", "parser"),
    "adapt.run": ("adapt.run", "parse_arguments"),
    "adapt.view": ("adapt.view", "parser"),
}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_that_is_interrupted_says_so(name, monkeypatch, capsys):
    module, where = COMMANDS[name]
    command = importlib.import_module(module)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, where, interrupted)
    assert command.main([]) == 130
    assert capsys.readouterr().err == f"{name}: interrupted\n"


def test_while_its_modules_are_imported_a_command_ends_in_one_line_too():
    """`adapt` is the first of them; -m stands in argv[0] until the module is found."""
    code = (
        "import sys; sys.argv[0] = '-m'; sys.orig_argv = ['python', '-m', 'adapt.train']; import adapt; "
        "assert 'numpy' not in sys.modules; raise KeyboardInterrupt"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_an_interrupt_inside_of_exec_ends_with_130_too():
    """CPython remembers it, and would end the process by SIGINT although it was caught."""
    code = (
        "import sys; from common.cli import run_command; "
        "sys.exit(run_command(lambda: exec('raise KeyboardInterrupt'), name='x'))"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "x: interrupted\n")


def test_other_errors_keep_their_traceback_and_libraries_their_hook():
    code = "import sys; before = sys.excepthook; import adapt; assert sys.excepthook is before"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
