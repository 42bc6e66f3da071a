"""A test that fails fails alone: what it leaves behind is no error of the test that runs next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.waits import PATIENCE

ROOT = Path(__file__).resolve().parent.parent
LEAVES = """
import gc, subprocess, sys, threading
left = []

def test_it_leaves_a_pipe_and_a_thread():
    left.append(subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE))
    left[0].wait()
    left.append(threading.Event())
    left.append(threading.Thread(target=lambda: (left[1].wait(), 1 / 0)))
    left[2].start()
    assert {fault}

def test_python_finds_them_now():
    left[1].set()
    left[2].join()
    left.clear()
    gc.collect()
"""


def outcome(folder: Path, fault: str) -> str:
    file = folder / "test_leaves.py"
    file.write_text(LEAVES.replace("{fault}", fault))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), str(file)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE,
    )
    return done.stdout.splitlines()[-1]


def test_one_failure_stays_one_failure(tmp_path: Path) -> None:
    assert outcome(tmp_path, "False").startswith("1 failed, 1 passed")


def test_without_a_failure_what_is_left_behind_is_an_error(tmp_path: Path) -> None:
    assert outcome(tmp_path, "True").startswith("1 failed, 1 passed")
