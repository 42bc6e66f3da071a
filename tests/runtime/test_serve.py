"""The command `python -m runtime.serve` ends, and with the code that it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.waits import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

HELD = """
import threading
from runtime import serve
serve._end_for_sure(0.05)
threading.Event().wait()  # a library that does not let go
"""
# A thread that Python's finalisation would end inside of the logging lock; the code must still be main's.
BUSY = """
import logging, sys, threading
from runtime import serve
logging.basicConfig(stream=sys.stderr)
def work():
    while True:
        logging.info("busy")
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
def main():
    print("done")
    {end}
serve.main = main
serve.run()
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)


def test_a_server_that_a_library_holds_ends_all_the_same():
    done = ended(HELD)
    assert done.returncode == 1
    assert "the server has not stopped within 0 s: the process ends now" in done.stderr
    assert "Thread 0x" in done.stderr, "where each thread was"


@pytest.mark.parametrize(
    ("end", "code"),
    [("return 0", 0), ("return 1", 1), ("sys.exit(2)", 2), ("sys.exit()", 0), ("sys.exit('no')", 1)],
)
def test_the_code_is_what_main_returned_and_what_was_printed_is_out(end, code):
    done = ended(BUSY.format(end=end))
    assert (done.returncode, done.stdout) == (code, "done\n")
