"""A command ends with the code that it promises and one line, whatever happens to it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from common.cli import run_command


class Refused(Exception):
    pass


def raising(error):
    def work():
        raise error

    return work


def test_its_own_code_is_passed_on(capsys):
    assert run_command(lambda: 0, (Refused,)) == 0
    assert run_command(lambda: 7, (Refused,)) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Refused("thing: reason\nremedy"), 1, "error: thing: reason remedy\n"),
        (MemoryError("8 GiB"), 1, "error: out of memory (8 GiB): use smaller or fewer frames, or stop"),
        (OSError(28, "No space left on device", "/a/b"), 1, "error: '/a/b': No space left on device\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_ends_it_is_one_line(error, code, line, capsys):
    assert run_command(raising(error), (Refused,)) == code
    said = capsys.readouterr().err
    assert said.startswith(line)
    assert said.count("\n") == 1


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(raising(ZeroDivisionError()), (Refused,))


def test_sigterm_undoes_what_was_begun(capsys):
    undone = []
    before = signal.getsignal(signal.SIGTERM)

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            undone.append(True)

    assert run_command(work, (Refused,)) == 143
    assert undone == [True]
    assert capsys.readouterr().err == "error: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_it_may_be_used_on_any_thread():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: 3, (Refused,))))
    thread.start()
    thread.join()
    assert codes == [3]


def test_the_name_of_a_command_stands_in_front_of_the_line(capsys):
    assert run_command(raising(Refused("reason")), (Refused,), name="adapt.view") == 1
    assert capsys.readouterr().err == "adapt.view: reason\n"
