"""A file is complete or as it was, and reading one is bounded and never waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import files
from common.files import read_file, read_json, replace_file, write_bytes, write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def synced(monkeypatch) -> list[str]:
    """The order in which files and directories were made durable and renamed."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        order.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def recorded_replace(source, target) -> None:
        order.append("rename to " + Path(target).name)
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", recorded_fsync)
    monkeypatch.setattr(files.os, "replace", recorded_replace)
    return order


def test_the_content_is_durable_before_its_name_and_the_name_last(tmp_path, synced):
    with replace_file(tmp_path / "x", durable_name=True) as file:
        file.write(b"new")
    assert synced == [f"sync .x.{os.getpid()}.tmp", "rename to x", f"sync {tmp_path.name}"]
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_file_that_need_not_survive_a_power_cut_is_not_synced(tmp_path, synced):
    write_bytes(tmp_path / "x", b"new", durable=False)
    assert synced == ["rename to x"]


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_what_fails_leaves_the_old_content_and_nothing_else(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")

    def write() -> None:
        with replace_file(tmp_path / "x") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_kill_while_it_writes_leaves_the_old_content(tmp_path):
    (tmp_path / "x").write_bytes(b"old")
    code = (
        "import sys, time; from pathlib import Path; from common.files import replace_file\n"
        "with replace_file(Path(sys.argv[1])) as file:\n"
        "    file.write(b'half'); file.flush(); print('written', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"written\n"
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / "x").read_bytes() == b"old"


def test_a_record_comes_back_and_a_number_that_json_lacks_is_refused(tmp_path):
    path = tmp_path / "record.json"
    write_json(path, {"ö": [1, 2.5, None]})
    assert read_json(path) == {"ö": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, float("nan"), allow_nan=False)
    assert read_json(path) == {"ö": [1, 2.5, None]}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * 100_000, "nested too deep"),
        (r'"\ud800"', "half of a character"),
        ("{", "Expecting property name"),
        ("1" * 5000, "digits"),
    ],
)
def test_a_record_that_is_damaged_is_a_value_error(tmp_path, content, why):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(ValueError, match=why):
        read_json(tmp_path / "record.json")


def test_what_is_too_large_or_no_plain_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is a pipe"):
        read_file(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no plain file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    (tmp_path / "four").write_bytes(b"1234")
    assert read_file(tmp_path / "four", 4) == b"1234"
    assert read_json(tmp_path / "four", 4) == json.loads("1234")
    with pytest.raises(OSError, match="more than 3 bytes"):
        read_file(tmp_path / "four", 3)
    with pytest.raises(ValueError, match="4 bytes, at most 3"):
        read_json(tmp_path / "four", 3)
