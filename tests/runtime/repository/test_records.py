"""What outlives the server: records that are damaged, cannot be written, or are larger than the memory."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time

import numpy as np
import pytest

from runtime.client import Client, Rejected, RpcError
from runtime.client.shm_segments import ShmSegment
from runtime.config import EngineConfig, ShadowConfig, WatchConfig
from runtime.engines import scratch
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import Refused, ServiceError
from runtime.events import Event, State
from runtime.repository import records
from runtime.repository.repository import Repository, digest
from runtime.service import Service
from runtime.shared_memory.sweep import sweep
from tests.runtime import builders as b
from tests.runtime.swap.test_group_controller import GROUP
from tests.runtime.swap.test_group_controller import publish as publish_group


@pytest.fixture
def calm(quick):
    return dataclasses.replace(quick, shadow=ShadowConfig(enabled=False), watch=WatchConfig(seconds=0.0))


def started(config):
    service = Service(config)
    service.start()
    return service


# -- reading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"live": 1, "live": 2}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": "\\ud800"}',
        '{"\\udfff": 1}',
        '{"a": 9223372036854775808}',
        '{"a": -9223372036854775809}',
        "1" * 5000,
        "[" * 100000,
        b'{"a": "\xff"}',
        '{"a": {"b": [1, {"c": 1, "c": 1}]}}',
    ],
)
def test_json_that_says_more_than_a_record_may_is_none(text):
    with pytest.raises(ValueError):
        records.parse(text)


def test_whatever_json_writes_of_plain_values_is_read_as_it_was():
    value = {"a": [1, -2, 2**63 - 1, -(2**63), 0.5, -1e300, None, True, "ä\u2028\U0001f600"], "b": {"": []}}
    assert records.parse(json.dumps(value)) == value
    assert records.parse(json.dumps(value, ensure_ascii=False).encode()) == value
    assert np.isnan(records.parse('{"a": NaN}', finite=False)["a"])


def test_a_sparse_record_takes_no_memory(tmp_path):
    path = tmp_path / "live.json"
    with open(path, "wb") as file:
        file.truncate(1 << 41)
    with pytest.raises(OSError) as error:
        records.read(path)
    assert error.value.errno == errno.EFBIG
    with open(path, "r+b") as file:
        file.write(b"first\n")
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast\n")
    content = records.read_ends(path, 1 << 20)
    assert len(content) <= (1 << 20) + 1
    assert (content[:6], content[-6:]) == (b"first\n", b"\nlast\n")


def test_pipes_and_links_are_no_records(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "file").write_text("{}")
    for name in ("pipe", "link", "."):
        with pytest.raises(OSError):
            records.read(tmp_path / name)
    assert records.read(tmp_path / "link", follow=True) == b"{}"


DAMAGED = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b'"3"',
    b"3",
    b"not JSON",
    b'{"live": ',
    b'{"live": "3"}',
    b'{"live": true}',
    b'{"live": -1}',
    b'{"live": 0}',
    b'{"live": 3.0}',
    b'{"live": null}',
    b'{"live": NaN}',
    b'{"live": [3]}',
    b'{"live": 1' + b"0" * 30 + b"}",
    b'{"live": 3, "live": 2}',
    b'{"live": 3, "x": "\\ud800"}',
    b"\xff\xfe",
    b'{"live": "1", "previous": 3}',
    b'{"previous": 3}',
    b"[" * 100000,
    b"\0" * 4096,
    b'{"live": 3}' + b" " * (1 << 21),
]


def test_no_damaged_live_json_makes_a_version_live_that_nobody_submitted(repository, calm):
    """1 was live last, by an operator's word; 2 before it; 3 was published and never submitted."""
    b.publish(repository)
    b.publish(repository)
    service = started(calm)
    assert service.models.host("road").live.version == 2
    assert service.admin.submit("road", 1, shadow=False).result().state == "LIVE"
    service.admin.freeze("road", "drives")
    service.close()
    b.publish(repository)
    home = repository.path / "road"
    history = (home / "history.jsonl").read_bytes()
    for damage in (*DAMAGED, None, "directory", "pipe"):
        if (home / "live.json").is_dir():
            (home / "live.json").rmdir()
        (home / "live.json").unlink(missing_ok=True)
        if isinstance(damage, bytes):
            (home / "live.json").write_bytes(damage)
        elif damage is not None:
            (home / "live.json").mkdir() if damage == "directory" else os.mkfifo(home / "live.json")
        (home / "history.jsonl").write_bytes(history)
        service = started(calm)
        try:
            assert service.models.host("road").live.version == 1, damage
            assert service.models.controller("road").flags.frozen, damage
            assert service.models.controller("road").flags.frozen_reason == "drives"
        finally:
            service.close()


@pytest.mark.parametrize("damage", [{"live": 99}, {"live": 99, "previous": 98}])
def test_a_live_version_that_is_not_there_gives_way_to_the_last_one_of_the_history(repository, calm, damage):
    b.publish(repository)
    service = started(calm)
    service.close()
    b.publish(repository)  # never submitted
    home = repository.path / "road"
    record = json.loads((home / "live.json").read_text())
    (home / "live.json").write_text(json.dumps(record | damage))
    service = started(calm)
    assert service.models.host("road").live.version == 1
    service.close()


@pytest.mark.parametrize(
    "damage",
    [{key: value} for key in ("pack", "adaptation", "input", "classes", "colours") for value in (7, "x")]
    + [{"engine": {"kind": "onnxruntime", "file": ["model.onnx"]}}],
)
def test_a_manifest_of_other_types_is_refused_by_name_and_hides_no_version(repository, calm, damage):
    """Its digest is right: whoever wrote it knew the form and not the types."""
    b.publish(repository)
    service = started(calm)
    path = repository.directory("road", b.publish(repository)) / "manifest.json"
    manifest = {**json.loads(path.read_text()), **damage}
    path.write_text(json.dumps(manifest | {"digest": digest(manifest)}))
    event = service.admin.submit("road", 2).result()
    assert (event.state, event.check) == ("REJECTED", "manifest")
    (key,) = damage
    assert key in event.reason
    service.close()
    service = started(calm)
    assert service.models.host("road").live.version == 1
    service.close()


def test_no_version_gets_a_number_that_no_reader_sees(repository):
    b.publish(repository)
    line = {"time": 1.0, "version": 10**18 - 1, "state": "LIVE", "check": "", "reason": "", "detail": {}}
    (repository.path / "road" / "history.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"history\.jsonl names version 9{18}; take out what is damaged"):
        b.publish(repository)
    assert repository.versions("road") == [1]
    assert not (repository.path / "road" / str(10**18)).exists()


def test_what_can_be_read_of_a_damaged_record_holds(repository, calm):
    b.publish(repository)
    service = started(calm)
    service.close()
    (repository.path / "road" / "live.json").write_text('{"live": "?", "unloaded": true, "pinned": "yes"}')
    service = started(calm)
    assert service.models.host("road").is_unloaded
    assert not service.models.controller("road").flags.pinned
    service.models.controller("road").reload()
    assert service.models.host("road").live.version == 1
    service.close()


LINES = [
    b'{"state": "LIVE", "version": true}',
    b'{"state": "LIVE", "version": 1' + b"0" * 30 + b"}",
    b'{"state": "LIVE", "version": "3"}',
    b'{"state": "LIVE", "version": -3}',
    b'{"state": "LIVE"}',
    b'{"state": "LIVE", "version": 3, "version": 1}',
    b'{"state": "LIVE", "version": 3, "time": 1e999}',
    b'{"state": "LIVE", "version": 3, "time": "now"}',
    b'{"state": "LIVE", "version": 3, "detail": []}',
    b'{"state": "LIVE", "version": 3.0}',
    b'{"state": ["LIVE"], "version": 3}',
    b'{"state": "LIVE", "vers',
    b'{"state": "NOTE", "version": 1, "detail": {"pinned": "yes", "frozen": 1, "frozen_reason": 3}}',
    b"\xff\xfe\0",
    b"[" * 50000,
]


def test_damaged_lines_of_a_history_decide_nothing(repository, calm):
    b.publish(repository)
    b.publish(repository)
    service = started(calm)
    assert service.admin.submit("road", 1, shadow=False).result().state == "LIVE"
    service.close()
    b.publish(repository)
    home = repository.path / "road"
    with open(home / "history.jsonl", "ab") as file:
        file.write(b"\n".join(LINES) + b"\n")
    (home / "live.json").unlink()
    service = started(calm)
    try:
        assert service.models.host("road").live.version == 1
        assert not service.models.controller("road").flags.pinned
        assert not service.models.controller("road").flags.frozen
        assert b.publish(repository) == 4, "no nonsense is the highest number"
    finally:
        service.close()


def test_text_that_is_no_unicode_reaches_history_log_and_client(repository, calm, serve):
    """A refusal names a file whose name is no UTF-8, and an old line has half of a surrogate pair."""
    b.publish(repository)
    b.publish(repository)
    bad = repository.directory("road", 2)
    (bad / os.fsdecode(b"\xff\xfe")).write_bytes(b"x")
    line = '{"version": 1, "state": "ROLLED_BACK", "check": "x", "reason": "\\ud800", "detail": {}}\n'
    (repository.path / "road" / "history.jsonl").write_text(line)
    with Client(serve(calm).target) as client:
        assert next(iter(client.history("road"))).state == "ROLLED_BACK"
        *_, last = client.submit("road", 2)
        assert (last.state, last.check) == ("REJECTED", "hash")
        assert "'?" in last.reason
        assert client.history("road")[-1].reason == last.reason
        client.status()
    detail = {"deep": ["\udc80"]}
    repository.append_history("road", Event("road", 1, State.NOTE, "x", "y", detail).line())
    assert repository.history("road")[-1]["detail"] == {"deep": ["?"]}
    for error in (Refused("x", "\udc80"), ServiceError("INTERNAL", "\udc80")):
        assert str(error).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.replace('"schema": 1', '"schema": 1, "schema": 1'),
        lambda m: m.replace('"schema": 1', '"schema": 1' + "0" * 30),
        lambda m: m.replace('"schema": 1', '"schema": 1, "more": "\\ud800"'),
        lambda m: m.replace('"schema": 1', '"schema": 1, "edge_thresholds": [1' + "0" * 400 + "]"),
    ],
)
def test_manifests_that_say_more_than_a_record_may_are_refused(change, repository, calm):
    b.publish(repository)
    path = repository.directory("road", 1) / "manifest.json"
    path.write_text(change(path.read_text()))
    service = started(calm)
    try:
        assert service.models.host("road").reason.startswith("version 1: manifest: ")
        service.admin.versions("road")
    finally:
        service.close()


def test_sparse_records_of_a_repository_are_survived(repository, calm):
    b.publish(repository)
    service = started(calm)
    service.close()
    home = repository.path / "road"
    for name in ("live.json", "history.jsonl", "config.pbtxt", "labels.txt"):
        with open(home / name, "ab") as file:
            file.truncate(1 << 40)
    service = started(calm)
    try:
        assert service.models.host("road").live.version == 1
    finally:
        service.close()
    assert (home / "history.jsonl").stat().st_size < 1 << 30, "it was shortened"
    with open(repository.directory("road", 1) / "manifest.json", "ab") as file:
        file.truncate(1 << 40)
    with pytest.raises(Refused, match=r"manifest: .*16 MiB"):
        repository.manifest("road", 1)


def test_a_number_that_somebody_only_asks_for_is_not_given(repository, calm, monkeypatch):
    """Else one submission of the highest number there can be would end all publishing."""
    b.publish(repository)
    service = started(calm)
    try:
        assert service.admin.submit("road", 10**18 - 1).result().check == "manifest"
        assert b.publish(repository) == 2
        assert service.admin.submit("road", 2).result().state == "LIVE"
        monkeypatch.setattr("runtime.repository.repository.HISTORY_BYTES", 2048)
        for _ in range(60):
            service.models.controller("road").note(1, "x", "y" * 90)
        assert b.publish(repository) == 3
    finally:
        service.close()


def test_a_pipe_in_the_place_of_a_history_takes_no_lines(repository):
    b.publish(repository)
    os.mkfifo(repository.path / "road" / "history.jsonl")
    assert repository.history("road") == []
    with pytest.raises(OSError):
        repository.append_history("road", {"version": 1, "state": "LIVE"})


# -- writing: all or nothing ---------------------------------------------------------------------


def blocked(repository, name):
    """live.json of a model cannot be written, as on a full disk."""
    path = repository.path / name / "live.json"
    content = path.read_bytes()
    path.unlink()
    path.mkdir()

    def free():
        path.rmdir()
        path.write_bytes(content)

    return free


def test_a_freeze_or_pin_that_cannot_be_recorded_does_not_hold(repository, calm, serve):
    b.publish(repository)
    b.publish(repository)
    with Client(serve(calm).target) as client:
        flags = ("pinned", "frozen", "frozen_reason", "live", "previous")

        def now():
            model = client.status()["models"]["road"]
            return {flag: model[flag] for flag in flags}

        on = (lambda: client.freeze("road", "drives"), lambda: client.pin("road", 0))
        off = (lambda: client.unfreeze("road"), lambda: client.unpin("road"))
        for calls in (on, off):
            before, free = now(), blocked(repository, "road")
            for call in calls:
                with pytest.raises((Rejected, RpcError), match="stays as it was"):
                    call()
                assert now() == before
            free()
            for call in calls:
                call()
            assert now() != before
        free = blocked(repository, "road")
        with pytest.raises((Rejected, RpcError)):
            client._kserve("RepositoryModelUnload", _unload("road"))
        assert now()["live"] == 2, "an unload that is not recorded does not hold either"
        *_, last = client.promote("road", 1)
        assert (last.state, last.check, now()["live"]) == ("REJECTED", "record", 2)
        free()


def _unload(model):
    from protos import inference_pb2 as pb

    return pb.RepositoryModelUnloadRequest(model_name=model).SerializeToString()


def test_a_group_or_all_models_freeze_as_one_or_not_at_all(repository, calm, serve):
    publish_group(repository, 0)
    config = dataclasses.replace(calm, groups=GROUP)
    server = serve(config)
    names = server.service.models.group("scene").members
    with Client(server.target) as client:

        def now():
            models = client.status()["models"]
            return [(models[n]["frozen"], models[n]["frozen_reason"], models[n]["pinned"]) for n in names]

        client.freeze(names[0], "of its own")
        before = now()
        for name in names:
            free = blocked(repository, name)
            for call in (
                lambda: client.freeze("scene", "x"),
                lambda: client.pin("scene", 0),
                lambda: client.freeze("", "all"),
                lambda: client.unpin("scene"),
                lambda: client.unfreeze("scene"),
            ):
                with pytest.raises((Rejected, RpcError)):
                    call()
                assert now() == before, name
            free()
        for name in names:  # and so it is after a new start
            assert bool(Repository(repository.path).live(name).get("frozen")) == (name == names[0])


def test_versions_are_pruned_all_or_not_at_all(repository, calm, monkeypatch):
    b.publish(repository)
    for n in range(4):
        b.publish(repository, adaptation={"round": str(n)})
    service = started(calm)
    assert service.admin.submit("road", 1, shadow=False).result().state == "LIVE"
    aside = Repository.mark_deleted

    def full(self, model, version):
        if version == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return aside(self, model, version)

    monkeypatch.setattr(Repository, "mark_deleted", full)
    with pytest.raises(ServiceError, match="No space left"):
        service.admin.prune("road", 1)
    assert repository.versions("road") == [1, 2, 3, 4, 5]
    assert not [e for e in repository.history("road") if e["check"] == "pruned"]
    monkeypatch.setattr(Repository, "mark_deleted", aside)
    deleted = service.admin.prune("road", 1)
    assert repository.versions("road") == [n for n in range(1, 6) if n not in deleted]
    assert deleted
    service.close()


# -- scratch -----------------------------------------------------------------------------------------


def in_shm():
    return {name for name in os.listdir("/dev/shm") if name.startswith("roadworthy-")}


def test_an_optimised_model_never_has_a_name(monkeypatch):
    model = b.segmentation(*b.nearest_weights()).SerializeToString()
    before, seen = in_shm(), []
    from runtime.engines import onnxruntime

    session = onnxruntime._session

    def watched(*arguments, **named):
        made = session(*arguments, **named)
        if named.get("save_to") is not None:
            seen.append((in_shm() - before, os.stat(named["save_to"]).st_size))
        return made

    monkeypatch.setattr(onnxruntime, "_session", watched)
    engine = OnnxRuntimeEngine.load(model, "fp32", EngineConfig(threads=2), candidate=True)
    assert len(seen) == 1
    names, size = seen[0]
    assert not names, "a kill in this moment leaves nothing"
    assert size > 0
    frame = np.zeros((1, *b.SIZE, 3), np.uint8)
    ours, theirs = (
        e.run({"frame": frame}, ["labels"])["labels"] for e in (engine, engine.with_serving_threads())
    )
    assert (ours == theirs).all()


def test_where_a_system_has_no_nameless_files_a_directory_is_locked_and_removed(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with scratch.nameless() as path:
        folder = os.path.dirname(path)
        open(path, "wb").close()
        os.utime(folder, (1, 1))
        assert os.path.basename(folder) not in sweep()
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)


def test_a_start_sweeps_what_the_killed_left_in_memory(tmp_path):
    old = time.time() - 3600
    made = {"roadworthy-ab_d3fgh": True, "roadworthy-zzzzzzzz": True, "roadworthy-young_xx": True}
    for name in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "optimised.onnx").write_bytes(b"x")
    (tmp_path / "roadworthy-zzzzzzzz" / "somebody's").write_bytes(b"x")
    for name in ("roadworthy-lane-1-ab", "roadworthy-ab_d3fg1", "other"):
        (tmp_path / name).write_bytes(b"x")
    for name in os.listdir(tmp_path):
        if "young" not in name:
            os.utime(tmp_path / name, (old, old))
    assert sorted(sweep(str(tmp_path))) == ["roadworthy-ab_d3fgh", "roadworthy-lane-1-ab"]
    left = {"roadworthy-zzzzzzzz", "roadworthy-young_xx", "roadworthy-ab_d3fg1", "other"}
    assert set(os.listdir(tmp_path)) == left


def test_a_lane_of_a_living_client_is_not_swept():
    lane = ShmSegment(4096)
    try:
        os.utime(f"/dev/shm/{lane.name}", (1, 1))
        assert lane.name not in sweep()
    finally:
        lane.unlink()
        lane.close()
    assert sweep("/nowhere") == []
