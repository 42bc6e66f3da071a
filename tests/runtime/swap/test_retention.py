"""Old versions are deleted where somebody says so, and never one that anybody has or may want again."""

from __future__ import annotations

import dataclasses
import os

import pytest

from runtime import ctl
from runtime.client import Client, Rejected, RpcError
from runtime.config import ServerConfig, ShadowConfig, WatchConfig
from runtime.repository.repository import Repository
from tests.runtime import builders as b

ADAPTED = {"adaptation": {"round": 1}}
ANSWERS = b.golden(b.segmentation(*b.nearest_weights()))


@pytest.fixture
def config(quick) -> ServerConfig:
    return dataclasses.replace(quick, shadow=ShadowConfig(enabled=False), watch=WatchConfig(seconds=0.0))


def swap(client, repository, **more):
    version = b.publish(repository, **more)
    assert list(client.submit("road", version))[-1].state == "LIVE"
    return version


def test_what_is_live_warm_or_released_stays(repository, config, serve, capsys):
    b.publish(repository)  # the released one
    server = serve(config)
    with Client(server.target) as client:
        for _ in range(5):
            swap(client, repository, **ADAPTED)
        client.rollback("road")  # 5 is live, nothing is warm
        b.publish(repository)  # another one that no round made, never submitted
        unread = b.publish(repository, **ADAPTED)
        (repository.directory("road", unread) / "manifest.json").write_text("{")
        assert client.prune("road", 2) == {"deleted": [2, 3, 4], "kept": [1, 5, 6, 7, 8]}
        assert client.prune("road", 1) == {"deleted": [], "kept": [1, 5, 6, 7, 8]}  # 5 is live, 6 the newest
        notes = [(e.version, e.check) for e in client.history("road") if e.check == "pruned"]
        assert notes == [(2, "pruned"), (3, "pruned"), (4, "pruned")]
        assert [v["version"] for v in client.versions("road")] == [1, 5, 6, 7, 8]
        assert swap(client, repository, **ADAPTED) == 9  # no number comes twice
        code = ctl.main(["--server", server.target, "prune", "road", "--keep", "1"])
        assert (code, capsys.readouterr().out) == (0, "deleted: 6\nkept: 1, 5, 7, 8, 9\n")  # 5 is warm
        client.rollback("road")
        for keep in (0, -1):
            with pytest.raises(Rejected, match="say how many"):
                client.prune("road", keep)
        with pytest.raises(Rejected, match="not in the repository"):
            client.prune("rear", 1)
    server.stop()
    with Client(serve(config).target) as client:
        assert client.status()["models"]["road"]["live"] == 5


def test_the_server_keeps_as_many_as_it_is_told(repository, config, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(config, keep_versions=2))
    with Client(server.target) as client:
        for _ in range(6):
            swap(client, repository, **ADAPTED)
        for _ in range(2):  # refused ones count as well
            bad = b.publish(repository, model=b"rust", answers=ANSWERS, **ADAPTED)
            assert list(client.submit("road", bad))[-1].state == "REJECTED"
        client.rollback("road")
        assert client.prune("road")["kept"] == [1, 6, 8, 9]


def test_a_version_that_waits_for_its_turn_stays(repository, config, serve, monkeypatch):
    b.publish(repository)
    server = serve(config)
    controller = server.service.models.controller("road")
    waiting = [b.publish(repository, **ADAPTED) for _ in range(3)]
    newest = b.publish(repository, **ADAPTED)
    with controller.scope.swap_lock:  # nothing is checked while somebody else has the turn
        tickets = [controller.submit(version) for version in waiting[:2]]
        assert controller.retention.prune(1) == waiting[2:]
    assert [ticket.result().state for ticket in tickets] == ["LIVE", "LIVE"]
    assert repository.versions("road") == [1, *waiting[:2], newest]


def test_what_a_generation_of_a_group_refers_to_stays(repository, config, serve):
    size = b.EDGE_SIZE
    seg = b.segmentation(*b.nearest_weights(), size)
    answers = b.golden(seg, size=size)

    def publish(**more):
        return {
            "seg": b.publish(repository, "seg", seg, size=size, answers=answers, **more),
            "edges": b.publish_edges(repository, "edges", **more),
        }

    publish()
    server = serve(dataclasses.replace(config, groups={"scene": ["seg", "edges"]}))
    for _ in range(3):
        assert server.service.admin.submit_group("scene", publish(**ADAPTED)).result().state == "LIVE"
    server.service.models.host(
        "seg"
    ).drop_previous()  # its memory was wanted; the generation before still names it
    assert server.service.admin.prune("seg", 1) == [2]
    assert server.service.admin.prune("edges", 1) == [2]
    assert repository.versions("seg") == repository.versions("edges") == [1, 3, 4]


def test_a_kill_in_the_middle_leaves_no_half_version(repository, config, serve, monkeypatch):
    b.publish(repository)
    server = serve(config)
    with Client(server.target) as client:
        for _ in range(4):
            swap(client, repository, **ADAPTED)
        monkeypatch.setattr(Repository, "remove", lambda *_: None)  # as if killed before it
        assert client.prune("road", 1)["deleted"] == [2, 3]
        monkeypatch.undo()
    server.stop()
    left = [p for p in (repository.path / "road").iterdir() if p.name.startswith(".gone-")]
    assert len(left) == 2
    assert repository.versions("road") == [1, 4, 5]
    server = serve(config)
    assert not [p for p in (repository.path / "road").iterdir() if p.name.startswith(".")]
    assert server.service.models.host("road").live.version == 5


def test_a_disk_that_cannot_be_written_is_said_and_changes_nothing(repository, config, serve, monkeypatch):
    b.publish(repository)
    server = serve(config)
    with Client(server.target) as client:
        for _ in range(4):
            swap(client, repository, **ADAPTED)

        def refuse(*_):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(RpcError, match="cannot be deleted: Read-only file system"):
            client.prune("road", 1)
        monkeypatch.undo()
        assert repository.versions("road") == [1, 2, 3, 4, 5]
        assert not [e for e in client.history("road") if e.check == "pruned"]
