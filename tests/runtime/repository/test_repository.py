"""Versions appear whole or not at all, and what was altered is refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.errors import Refused
from runtime.repository import repository as repository_module
from runtime.repository.manifest import digest
from runtime.repository.repository import Repository
from tests.runtime import builders

ROOT = Path(__file__).resolve().parents[3]


def put(repository, content=b"engine", name="road", **manifest):
    staged = repository.stage(name)
    (staged / "model.onnx").write_bytes(content)
    return repository.publish(
        name, staged, {"task": "segmentation", **manifest}, "name: 'road'\n", ["a", "b"]
    )


def test_a_published_version_is_whole(repository):
    assert put(repository, pack={"sha256": "1"}) == 1
    assert put(repository) == 2
    assert repository.models() == ["road"]
    assert repository.versions("road") == [1, 2]
    manifest, files = repository.read("road", 1)
    assert files == {"model.onnx": b"engine"}
    assert manifest["version"] == 1
    assert manifest["model"] == "road"
    assert manifest["digest"] == digest(manifest)
    assert manifest["pack"] == {"sha256": "1"}
    assert (repository.path / "road" / "config.pbtxt").read_text() == "name: 'road'\n"
    assert (repository.path / "road" / "labels.txt").read_text() == "a\nb\n"


def told(repository):
    """What readers learn from a history: who was live, which flags hold, the last state of each version."""
    history = repository.history("road")
    states = {e["version"]: e["state"] for e in history if e["state"] != "NOTE"}
    there = repository.versions("road")
    return repository.last_live("road"), {n: states.get(n) for n in there}


def test_a_history_is_bounded_and_still_says_what_counts(repository, monkeypatch):
    monkeypatch.setattr(repository_module, "HISTORY_BYTES", 8192)
    for _ in range(4):
        put(repository)
    decisive = [
        (1, "LIVE", {}),
        (2, "REJECTED", {"check": "collapse"}),
        (2, "REJECTED", {"check": "frozen"}),
        (3, "LIVE", {}),
        (1, "RETIRED", {}),
        (9, "REJECTED", {}),  # its directory is gone; its number must not come again
        (4, "LIVE", {}),
        (4, "NOTE", {"detail": {"pinned": True, "frozen": False, "frozen_reason": ""}}),
    ]
    for version, state, more in decisive:
        repository.append_history("road", {"version": version, "state": state, **more})
    before = told(repository)
    assert before[0] == {"live": 4, "previous": 3, "pinned": True, "frozen": False, "frozen_reason": ""}
    path = repository.path / "road" / "history.jsonl"
    for n in range(400):
        note = {"version": 4, "state": "NOTE", "check": "x", "reason": f"{n}\u2028" + "r" * 90}
        repository.append_history("road", note)
        assert path.stat().st_size <= 8192 + 300
    history = repository.history("road")
    assert [e["reason"][:3] for e in history if e["check" if "check" in e else "state"] == "x"][-1] == "399"
    assert len(history) > 30
    assert told(repository) == before
    refusals = [e.get("check") for e in history if (e["version"], e["state"]) == (2, "REJECTED")]
    assert refusals == ["collapse", "frozen"]
    assert put(repository) == 10
    assert {p.name for p in path.parent.iterdir() if p.name.startswith(("history", "."))} == {
        "history.jsonl",
        "history.old.jsonl",
    }
    assert path.with_name("history.old.jsonl").stat().st_size <= 8192 + 300


@pytest.mark.parametrize("rename", [0, 1])
def test_a_kill_while_a_history_is_shortened_loses_nothing(repository, monkeypatch, rename):
    """Before the first of its two renames, and between them."""
    monkeypatch.setattr(repository_module, "HISTORY_BYTES", 4096)
    put(repository)
    replace, calls = os.replace, []

    class Killed(BaseException):
        pass

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) > rename:
            raise Killed
        replace(*arguments)

    written = []

    def write_on():
        while True:
            written.append(len(written))
            repository.append_history("road", {"version": 1, "state": "NOTE", "reason": str(written[-1])})

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        write_on()
    monkeypatch.setattr(os, "replace", replace)
    again = Repository(repository.path)
    assert [int(e["reason"]) for e in again.history("road")] == written
    again.append_history("road", {"version": 1, "state": "LIVE"})
    assert again.last_live("road")["live"] == 1
    assert (repository.path / "road" / "history.jsonl").stat().st_size <= 4096


def test_numbers_are_never_used_twice(repository):
    put(repository)
    put(repository)
    import shutil

    repository.append_history("road", {"version": 2, "state": "REJECTED"})
    shutil.rmtree(repository.directory("road", 2))
    assert put(repository) == 3


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (lambda d: (d / "model.onnx").write_bytes(b"enginE"), "hash"),
        (lambda d: (d / "model.onnx").write_bytes(b"eng"), "hash"),
        (lambda d: (d / "model.onnx").unlink(), "hash"),
        (lambda d: (d / "extra.bin").write_bytes(b"x"), "hash"),
        (lambda d: (d / "manifest.json").unlink(), "manifest"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest"),
        (lambda d: (d / "manifest.json").write_text("[]"), "manifest"),
        (lambda d: edit(d, lambda m: m.update(task="edges")), "manifest"),
        (lambda d: edit(d, lambda m: m["files"]["model.onnx"].update(bytes=3)), "manifest"),
        (lambda d: edit(d, lambda m: m.update(version=9), resign=True), "manifest"),
        (lambda d: edit(d, lambda m: m.update(schema=2), resign=True), "manifest"),
        (lambda d: edit(d, lambda m: m["files"].update({"../x": {}}), resign=True), "manifest"),
        (lambda d: edit(d, lambda m: m.update(engine={"file": "other"}), resign=True), "manifest"),
        (lambda d: link(d / "model.onnx"), "hash"),
    ],
)
def test_damage_is_refused_by_the_name_of_the_check(repository, damage, check):
    put(repository)
    damage(repository.directory("road", 1))
    with pytest.raises(Refused) as refused:
        repository.verify("road", 1)
    assert refused.value.check == check
    assert "\n" not in str(refused.value)


def edit(directory, change, resign=False):
    manifest = json.loads((directory / "manifest.json").read_text())
    change(manifest)
    if resign:
        manifest["digest"] = digest(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def test_a_missing_version_is_refused(repository):
    with pytest.raises(Refused, match="does not exist"):
        repository.verify("road", 7)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/etc", "a..b", "-x", ".hidden", "a\0b", "x" * 129, "café"]
)
def test_model_names_cannot_leave_the_repository(repository, name):
    with pytest.raises(ValueError, match="model name"):
        repository.versions(name)


def test_foreign_directories_are_not_versions(repository):
    put(repository)
    for name in ("01", "v2", "0", "-1", "2.5"):
        (repository.path / "road" / name).mkdir()
    (repository.path / "road" / "3").write_text("a file")
    assert repository.versions("road") == [1]


def test_live_is_replaced_whole(repository):
    assert repository.live("road") is None
    put(repository)
    repository.set_live("road", {"live": 1})
    assert repository.live("road") == {"live": 1}


def test_a_lost_live_json_is_known_from_the_history(repository):
    assert repository.last_live("road") == {}
    repository.path.joinpath("road").mkdir()
    steps = [(1, "LIVE"), (2, "SUBMITTED"), (2, "LIVE"), (3, "LIVE"), (3, "ROLLED_BACK"), (2, "LIVE")]
    for version, state in [*steps, (4, "REJECTED")]:
        repository.append_history("road", {"version": version, "state": state})
    assert repository.last_live("road") == {"live": 2, "previous": 1}


def test_a_torn_line_of_history_is_skipped_and_closed(repository):
    put(repository)
    repository.append_history("road", {"version": 1, "state": "LIVE"})
    with open(repository.path / "road" / "history.jsonl", "ab") as file:
        file.write(b'{"version": 2, "sta')
    repository.append_history("road", {"version": 3, "state": "REJECTED"})
    assert [entry["version"] for entry in repository.history("road")] == [1, 3]


def test_a_line_of_another_form_stops_no_shortening(repository, monkeypatch):
    """The thread of the swaps writes the history: what it raises there would end it."""
    monkeypatch.setattr(repository_module, "HISTORY_BYTES", 256)
    put(repository)
    strange = [{"state": {}}, {"state": "LIVE", "check": []}, {"state": ["NOTE"], "detail": {"pinned": 1}}]
    path = repository.path / "road" / "history.jsonl"
    path.write_text("".join(json.dumps({"version": 1, **line}) + "\n" for line in strange))
    for _ in range(9):
        repository.append_history("road", {"version": 1, "state": "LIVE", "check": ""})
    assert {entry["state"] for entry in repository.history("road")} == {"LIVE"}


def test_publish_refuses_what_is_not_plain(repository):
    staged = repository.stage("road")
    with pytest.raises(ValueError, match="empty"):
        repository.publish("road", staged, {})
    (staged / "sub").mkdir()
    with pytest.raises(ValueError, match="plain files"):
        repository.publish("road", staged, {})
    with pytest.raises(ValueError, match="not made by stage"):
        repository.publish("other", staged, {})
    repository.abandon(staged)
    assert not (repository.path / "road").exists()  # a model that never got a version leaves nothing


def test_sweep_leaves_a_living_writer_alone(repository):
    staged = repository.stage("road")
    other = Repository(repository.path)
    assert other.sweep() == []
    assert repository.sweep() == []
    assert staged.exists()
    repository.abandon(staged)


def test_what_goes_while_it_is_swept_fails_nobody(repository, monkeypatch):
    """Every build sweeps, while the server beside it replaces live.json."""
    put(repository)
    left = [repository.path / "road" / name for name in (".tmp-live.json-1", ".staging-1", ".gone-2-1")]
    monkeypatch.setattr(repository, "_leftovers", lambda: iter(left))
    assert left[0] not in repository.sweep()
    monkeypatch.undo()
    real = Path.iterdir

    def iterdir(path):
        if path.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return real(path)

    (repository.path / "lost+found").mkdir()
    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert repository.sweep() == []


WRITER = """
import sys
from runtime.repository import Repository
r = Repository(sys.argv[1])
print("up", flush=True)
while True:
    staged = r.stage("road")
    (staged / "model.onnx").write_bytes(bytes(200_000))
    r.set_live("road", {"live": r.publish("road", staged, {"note": "x"})})
    print("written", flush=True)
"""


def test_kill_while_versions_are_written_leaves_whole_versions_only(repository):
    """SIGKILL at many moments; afterwards every version verifies and the sweep leaves nothing behind."""
    for attempt in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(repository.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(1 + attempt % 3):  # "up", and so many versions
            assert process.stdout.readline()
        time.sleep(0.003 * attempt)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    reader = Repository(repository.path)
    reader.sweep()
    names = {p.name for p in (reader.path / "road").iterdir() if not p.name.startswith((".new-", ".tmp-"))}
    versions = reader.versions("road")
    assert versions == list(range(1, len(versions) + 1))
    assert names <= {str(v) for v in versions} | {"live.json"}
    for version in versions:
        reader.verify("road", version)
    live = reader.live("road")
    assert live is None or live["live"] in versions


def test_parallel_publishers_get_different_numbers(repository):
    script = WRITER.replace("while True:", "for _ in range(8):")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(repository.path)], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        for _ in range(4)
    ]
    assert [process.wait() for process in processes] == [0] * 4
    assert repository.versions("road") == list(range(1, 33))
    for version in repository.versions("road"):
        repository.verify("road", version)


def test_the_bytes_that_were_hashed_are_the_bytes_that_are_used(repository):
    """An alteration after reading cannot slip in: `read` hands out what it hashed."""
    put(repository, b"good")
    _, files = repository.read("road", 1)
    (repository.directory("road", 1) / "model.onnx").write_bytes(b"evil")
    assert files["model.onnx"] == b"good"


def test_builders_make_versions_that_verify(repository):
    builders.publish(repository)
    assert set(repository.verify("road", 1)["files"]) == {"model.onnx", "golden.npz"}


def deep(path):
    path.write_text("[" * 200_000)


def large(path):
    with open(path, "ab") as file:
        file.truncate(17 << 20)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx"])
@pytest.mark.parametrize("damage", [deep, large, pipe, linked], ids=lambda f: f.__name__)
def test_files_that_are_no_files_are_refused_and_nobody_waits_for_them(tmp_path, damage, file):
    from tests.runtime import builders as b

    repository = Repository(tmp_path)
    version = b.publish(repository)
    damage(repository.directory("road", version) / file)
    with pytest.raises(Refused) as refusal:
        repository.read("road", version)
    assert refusal.value.check in ("manifest", "hash")
    assert "\n" not in refusal.value.reason


@pytest.mark.parametrize("damage", [deep, pipe], ids=lambda f: f.__name__)
def test_a_live_json_of_nonsense_is_as_none(tmp_path, damage):
    from tests.runtime import builders as b

    repository = Repository(tmp_path)
    b.publish(repository)
    repository.set_live("road", {"live": 1})
    repository.append_history("road", {"version": 1, "state": "LIVE"})
    with open(tmp_path / "road" / "history.jsonl", "a") as file:
        file.write("[" * 200_000 + "\n")
    damage(tmp_path / "road" / "live.json")
    assert repository.live("road") is None
    assert repository.last_live("road")["live"] == 1


def test_lines_of_the_history_that_are_none_are_skipped(tmp_path):
    home = tmp_path / "net"
    home.mkdir()
    good = {"time": 1.0, "version": 2, "state": "LIVE", "detail": {}}
    bad = [{**good, "time": "now"}, {**good, "version": "two"}, {**good, "detail": [1]}, [good], "LIVE", None]
    lines = [*map(json.dumps, bad), "{", json.dumps(good)]
    (home / "history.jsonl").write_text("\n".join(lines))
    assert Repository(tmp_path).history("net") == [good]


def test_a_version_that_fails_leaves_the_models_own_files_as_they_were(repository, monkeypatch):
    put(repository)
    home = repository.path / "road"
    before = {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()}
    staged = repository.stage("road")
    (staged / "model.onnx").write_bytes(b"x")

    def full(*names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runtime.repository.repository.os.rename", full)
    with pytest.raises(OSError, match="No space"):
        repository.publish("road", staged, {}, "another", ["another"])
    monkeypatch.undo()
    repository.abandon(staged)
    assert {path.name: path.read_bytes() for path in home.iterdir() if path.is_file()} == before
    assert repository.versions("road") == [1]


def test_a_model_that_never_got_a_version_leaves_nothing(repository):
    staged = repository.stage("new")
    repository.abandon(staged)
    assert list(repository.path.iterdir()) == []
