"""Frame groups: no answer mixes an old and a new member, whatever happens to the server."""

from __future__ import annotations

import dataclasses
import functools
import json
import threading
import time

import numpy as np
import pytest

from runtime.client import Client, Rejected
from runtime.config import ServerConfig, ShadowConfig, WatchConfig, from_dict
from runtime.errors import ConfigError, ServiceError
from tests.runtime import builders as b
from tests.waits import PATIENCE, until

GROUP = {"scene": ["seg", "edges"]}
SIZE = b.EDGE_SIZE
W, B = b.nearest_weights()
FRAME, LABELS = b.blocks(np.random.default_rng(0), SIZE, 16)
ALL = ("labels", "confidence", "edge_bits", "edges")


@functools.cache
def look(kind):
    """Three good networks of each model that can be told apart by their answers, with their golden sets."""
    seg = b.segmentation(*b.nearest_weights(sharpness=(12.0, 8.0, 6.0)[kind]), SIZE)
    edges = b.edges(W, B, edge_bias=(-6.0, -5.0, -4.0)[kind])
    return (seg, b.golden(seg, size=SIZE)), (edges, b.golden(edges, size=SIZE))


def kind_of(answer):
    """Which of the three gave each part of an answer: (segmentation, edges)."""
    (seg, _), _ = look(0)
    del seg
    # inside the blocks confidence is the network's sharpness; off the edges a byte is the sigmoid of its bias
    sure = float(np.median(answer.outputs["confidence"]))
    seg_kind = int(np.argmin([abs(sure - s) for s in sureness()]))
    off = int(answer.outputs["edges"].min())
    return seg_kind, {1: 0, 2: 1, 5: 2}[off]


@functools.cache
def sureness():
    from onnx.reference import ReferenceEvaluator

    models = [look(kind)[0][0] for kind in range(3)]
    return [
        float(np.median(ReferenceEvaluator(m).run(["confidence"], {"frame": FRAME[None]})[0])) for m in models
    ]


def publish(repository, kind, **more):
    """A version of each member; {model: version}."""
    (seg, seg_golden), (edges, edges_golden) = look(kind)
    return {
        "seg": b.publish(repository, "seg", seg, size=SIZE, answers=seg_golden, **more),
        "edges": b.publish_edges(repository, "edges", edges, answers=edges_golden, **more),
    }


@pytest.fixture
def config(quick) -> ServerConfig:
    shadow = ShadowConfig(frames=2, min_frames=1, timeout=PATIENCE, idle_timeout=0.05)
    return dataclasses.replace(quick, groups=GROUP, shadow=shadow, watch=WatchConfig(seconds=0.3))


def ask(client, model="scene", **how):
    return client.infer(model, FRAME, outputs=ALL, **how)


class Camera(threading.Thread):
    """Asks the group until the end of the block; checks that each answer is of one generation."""

    def __init__(self, target, generations):
        super().__init__(daemon=True)
        self.target, self.generations = target, generations
        self.sent = self.answered = 0
        self.mixed, self.failed, self.versions = [], [], []
        self.stopping = threading.Event()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join(PATIENCE)
        assert not self.is_alive()

    def run(self):
        with Client(self.target) as client:
            while not self.stopping.is_set():
                self.sent += 1
                try:
                    answer = ask(client, timeout=PATIENCE)
                except Exception as error:
                    self.failed.append(error)
                    continue
                self.answered += 1
                said = {name: int(answer.parameters[f"{name}.version"]) for name in ("seg", "edges")}
                kinds = kind_of(answer)
                self.versions.append(answer.version)
                # the versions of a generation are of one kind, and so must be what they answer
                if kinds[0] != kinds[1] or [self.generations[(n, v)] for n, v in said.items()] != list(kinds):
                    self.mixed.append((answer.version, said, kinds))
                time.sleep(0.005)


@pytest.mark.parametrize("swaps", [10, pytest.param(52, marks=pytest.mark.slow)])
def test_swaps_under_load_never_mix_and_lose_nothing(repository, config, serve, swaps):
    generations = dict.fromkeys(publish(repository, 0).items(), 0)
    server = serve(config)
    cameras = [Camera(server.target, generations) for _ in range(2)]
    for camera in cameras:
        camera.__enter__()
    until(lambda: all(camera.versions or camera.failed for camera in cameras))
    for n in range(1, swaps + 1):
        members = publish(repository, n % 3)
        generations |= dict.fromkeys(members.items(), n % 3)
        event = server.service.admin.submit_group("scene", members, shadow=n % 10 == 0).result()
        assert event.state == "LIVE", event
        assert event.version == n + 1
        assert event.detail["members"] == members
        if n % 2:  # every other generation is certain to be seen, and the rest may be too short for that
            until(lambda n=n: all(camera.failed or camera.versions[-1] > n for camera in cameras))
    for camera in cameras:
        camera.__exit__()
    assert [camera.mixed for camera in cameras] == [[], []]
    assert [camera.failed for camera in cameras] == [[], []]
    assert all(camera.sent == camera.answered for camera in cameras)
    assert all(camera.versions == sorted(camera.versions) for camera in cameras)
    assert len({v for camera in cameras for v in camera.versions}) > swaps / 2
    account = server.service.models.groups()["scene"].host.account.snapshot()
    assert account.accepted == account.answered == sum(camera.sent for camera in cameras)
    assert account.in_flight == 0


def test_a_request_between_two_members_is_finished_by_a_generation_that_was_rolled_back(
    repository, config, serve, monkeypatch
):
    """Its slots are retired, but held: the second member answers, and is free for the next request."""
    publish(repository, 0)
    server = serve(dataclasses.replace(config, watch=WatchConfig(seconds=0)))
    service = server.service
    assert service.admin.submit_group("scene", publish(repository, 1), shadow=False).result().state == "LIVE"
    engine = service.models.host("seg").live.engine
    run = engine.run

    def run_and_go_back(inputs, outputs):
        monkeypatch.setattr(engine, "run", run)
        service.models.group("scene").rollback()
        return run(inputs, outputs)

    monkeypatch.setattr(engine, "run", run_and_go_back)
    with Client(server.target) as client:
        answer = ask(client, timeout=PATIENCE)
        assert (answer.version, kind_of(answer)) == (2, (1, 1))
        after = ask(client, timeout=PATIENCE)
        assert (after.version, kind_of(after)) == (1, (0, 0))


def bad_edges(repository):
    return b.publish_edges(repository, "edges", b.edges(W, B, edge_bias=-14.0))


def test_one_bad_member_refuses_all(repository, config, serve):
    first = publish(repository, 0)
    server = serve(config)
    members = publish(repository, 1) | {"edges": bad_edges(repository)}
    ticket = server.service.admin.submit_group("scene", members)
    events = list(ticket.follow())
    assert (events[-1].model, events[-1].state, events[-1].check) == ("scene", "REJECTED", "collapse")
    assert "member 'edges' version 3" in events[-1].reason
    ends = {e.model: (e.state, e.check) for e in events if e.state == "REJECTED"}
    assert ends == {
        "seg": ("REJECTED", "group"),
        "edges": ("REJECTED", "collapse"),
        "scene": ("REJECTED", "collapse"),
    }
    assert not [e for e in events if e.state == "LIVE"]
    with Client(server.target) as client:
        assert kind_of(ask(client)) == (0, 0)
        # the member that was not at fault may still be submitted, by itself too: a generation of its own
        *_, last = client.submit("seg", members["seg"])
        assert last.state == "LIVE"
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (2, (1, 0))
        assert answer.parameters["edges.version"] == str(first["edges"])
    # what was claimed for the refused is given back
    assert server.service.ledger.declared() == sum(s.memory_bytes for s in server.service.admin.status())


def test_one_member_frozen_or_pinned_refuses_all(repository, config, serve):
    publish(repository, 0)
    server = serve(config)
    group = server.service.models.group("scene")
    second = publish(repository, 1)
    with Client(server.target) as client:  # under the group's name: every member
        status = client.freeze("scene", "driving")["models"]
        assert {name: s["frozen"] for name, s in status.items()} == {"seg": True, "edges": True}
        client.pin("scene", 1)
        assert all(c.flags.pinned for c in server.service.models.controllers().values())
        client.unpin("scene")
        assert [e.state for e in client.history("scene")] == ["LIVE"]
    event = server.service.admin.submit_group("scene", second).result()
    assert (event.state, event.check) == ("REJECTED", "frozen")
    assert "driving" in event.reason
    group.unfreeze()
    server.service.models.controller("edges").flags.pin(0)
    event = server.service.admin.submit_group("scene", second).result()
    assert (event.state, event.check) == ("REJECTED", "pinned")
    assert "member 'edges'" in event.reason
    server.service.models.controller("edges").flags.unpin()
    assert server.service.admin.submit_group("scene", second).result().state == "LIVE"
    with pytest.raises(ServiceError, match="generation 1 of 'scene' is not live"):
        group.pin(1)
    group.pin(2)
    with pytest.raises(ServiceError, match="pinned"):
        group.rollback()
    assert server.service.models.group("scene").status().generation == 2


def test_rollback_is_of_all_and_goes_back_to_the_number_it_had(repository, config, serve):
    publish(repository, 0)
    server = serve(config)
    with pytest.raises(ServiceError, match="no previous generation"):
        server.service.models.group("scene").rollback()
    server.service.admin.submit_group("scene", publish(repository, 1)).result()
    with Client(server.target) as client:
        assert ask(client).version == 2
        assert kind_of(ask(client, version=1)) == (0, 0)  # the warm generation, by its number
        events = server.service.models.group("scene").rollback()
        assert [(e.model, e.state, e.version) for e in events if e.model == "scene"] == [
            ("scene", "ROLLED_BACK", 2),
            ("scene", "LIVE", 1),
        ]
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (1, (0, 0))
        with pytest.raises(Rejected, match="version 2 is not found"):
            ask(client, version=2)
        # a member's own rollback takes along what became live with it
        server.service.admin.submit_group("scene", publish(repository, 2)).result()
        assert ask(client).version == 3
        assert client.rollback("seg").state == "ROLLED_BACK"
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (1, (0, 0))


def test_what_one_watch_window_sees_rolls_all_back(repository, config, serve):
    """The edges of the new generation are gone in fog; its segmentation is well, and goes back too."""
    publish(repository, 0)
    server = serve(dataclasses.replace(config, watch=WatchConfig(seconds=5 * PATIENCE, max_fps=50.0)))
    members = publish(repository, 1) | {
        "edges": b.publish_edges(repository, "edges", b.edges(W, B, edge_bias=-11.0))
    }
    fog = (0.8 * 255 + 0.2 * FRAME).astype(np.uint8)
    assert server.service.admin.submit_group("scene", members).result().state == "LIVE"
    with Client(server.target) as client:
        until(lambda: client.infer("scene", fog, outputs=ALL).version == 1)
        assert kind_of(ask(client)) == (0, 0)
        back = lambda: [e for e in repository.history("scene") if e["state"] == "ROLLED_BACK"]  # noqa: E731
        until(back)  # told after it is done
        (event,) = back()
        assert (event["version"], event["check"]) == (2, "watch-collapse")
        for model in ("seg", "edges"):
            assert repository.live(model)["live"] == 1


def test_a_group_is_a_model_to_kserve(repository, config, serve):
    """Metadata, configuration, readiness, index, statistics, requested outputs."""
    from protos import inference_pb2 as pb
    from runtime.rpc.inference import InferenceEdge
    from runtime.rpc.inference_admin import RepositoryEdge

    publish(repository, 0)
    server = serve(config)
    inference, edge = InferenceEdge(server.service), RepositoryEdge(server.service)
    meta = inference.model_metadata(pb.ModelMetadataRequest(name="scene"), None)
    assert (meta.platform, list(meta.versions)) == ("ensemble", ["1"])
    assert [(t.name, t.datatype, list(t.shape)) for t in meta.inputs] == [("frame", "UINT8", [1, *SIZE, 3])]
    assert {t.name for t in meta.outputs} == {*ALL, "probabilities"}
    assert json.loads(meta.properties["members"]) == {"seg": 1, "edges": 1}
    assert (
        json.loads(meta.properties["classes"])
        == json.loads(meta.properties["edge_classes"])
        == list(b.CLASSES)
    )
    config_ = edge.model_config(pb.ModelConfigRequest(name="scene"), None).config
    assert [s.model_name for s in config_.ensemble_scheduling.step] == ["seg", "edges"]
    assert inference.model_ready(pb.ModelReadyRequest(name="scene"), None).ready
    index = edge.index(pb.RepositoryIndexRequest(), None)
    assert ("scene", "1", "READY") in {(m.name, m.version, m.state) for m in index.models}
    with Client(server.target) as client:
        answer = client.infer_tensors("scene", {"frame": FRAME[None]})  # names none: the members' defaults
        assert set(answer.outputs) == set(ALL)
        assert (answer.outputs["labels"][0] == LABELS).mean() > 0.97
        assert (answer.outputs["edge_bits"][0] == b.edges_of(LABELS)).mean() > 0.97
        for shared in (True, False):
            with Client(server.target, shared_memory=shared) as other:
                part = other.infer("scene", FRAME, outputs=("edge_bits", "labels"))
                assert list(part.outputs) == ["edge_bits", "labels"]
                assert (part.outputs["labels"] == LABELS).mean() > 0.97
        runs = server.service.models.host("edges").statistics_of(1).snapshot().success
        client.infer("scene", FRAME, outputs=("labels",))  # a member that is not asked is not run
        assert server.service.models.host("edges").statistics_of(1).snapshot().success == runs
        with pytest.raises(Rejected, match="unexpected inference output 'depth' for model 'scene'"):
            client.infer("scene", FRAME, outputs=("depth",))
        with pytest.raises(Rejected, match=r"for model 'scene'\. Expected"):
            client.infer("scene", FRAME[:16], outputs=("labels",))
    stats = edge.model_statistics(pb.ModelStatisticsRequest(name="scene"), None).model_stats
    assert [(s.name, s.version, s.inference_stats.success.count) for s in stats] == [("scene", "1", 4)]
    edge.unload(pb.RepositoryModelUnloadRequest(model_name="scene"), None)
    assert not inference.model_ready(pb.ModelReadyRequest(name="scene"), None).ready
    assert inference.model_ready(pb.ModelReadyRequest(name="seg"), None).ready
    edge.load(pb.RepositoryModelLoadRequest(model_name="scene"), None)
    assert inference.model_ready(pb.ModelReadyRequest(name="scene"), None).ready


def test_an_unloaded_group_stays_so_over_a_start_as_a_model_does(repository, config, serve):
    publish(repository, 0)
    server = serve(config)
    server.service.models.group("scene").unload()
    server.service.admin.submit_group("scene", publish(repository, 1)).result()  # its record is written anew
    server.stop()
    server = serve(config)
    with Client(server.target) as client:
        assert server.service.models.group("scene").status().reason == "unloaded"
        assert server.service.ready()  # somebody wanted it so
        assert client.infer("seg", FRAME).version == 2  # the members go on
        with pytest.raises(Rejected, match="'scene' has no available versions: unloaded"):
            ask(client)
        server.service.models.group("scene").reload()
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (2, (1, 1))
    server.stop()
    assert serve(config).service.models.group("scene").status().ready


def test_a_member_that_is_unloaded_and_comes_back(repository, config, serve):
    publish(repository, 0)
    server = serve(config)
    server.service.admin.submit_group("scene", publish(repository, 1)).result()
    server.service.models.controller("edges").unload()
    with Client(server.target) as client:
        with pytest.raises(Rejected, match="'scene' has no available versions: member 'edges': unloaded"):
            ask(client)
        assert client.infer("seg", FRAME).version == 2  # the others go on
        assert not server.service.ready()
        server.service.models.controller("edges").reload()
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (2, (1, 1))
    server.service.models.controller("seg").unload()
    server.stop()
    again = serve(config)
    with Client(again.target) as client:
        assert again.service.models.group("scene").status().reason == "member 'seg': unloaded"
        again.service.models.controller("seg").reload()
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (2, (1, 1))


def test_a_member_that_is_not_there_yet(repository, config, serve):
    (seg, golden), (edges, edges_golden) = look(0)
    b.publish(repository, "seg", seg, size=SIZE, answers=golden)
    server = serve(config)
    with Client(server.target) as client:
        with pytest.raises(Rejected, match="member 'edges' is not in the repository"):
            ask(client)
        with pytest.raises(ServiceError, match="publish a version first"):
            server.service.admin.submit_group("scene", {"edges": 1})
        b.publish_edges(repository, "edges", edges, answers=edges_golden)
        event = server.service.admin.submit_group("scene", {"edges": 1}).result()
        assert (event.state, event.version) == ("LIVE", 1), event
        assert kind_of(ask(client)) == (0, 0)


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({}, "no member of 'scene' is named"),
        ({"nope": 1}, "'nope' is not a member of 'scene'"),
        ({"seg": 0}, "versions count from 1"),
        ({"scene": 1}, "'scene' is not a member"),
    ],
)
def test_submissions_that_cannot_be(repository, config, serve, members, says):
    publish(repository, 0)
    server = serve(config)
    with pytest.raises(ServiceError, match=says):
        server.service.admin.submit_group("scene", members)
    with pytest.raises(ServiceError, match="there is no group 'none'; groups: scene"):
        server.service.admin.submit_group("none", {"seg": 1})
    event = server.service.admin.submit_group("scene", {"seg": 9, "edges": 1}).result()
    assert (event.state, event.check) == ("REJECTED", "manifest")


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ({"a": ["a", "b"]}, "cannot be its own member"),
        ({"a": ["b", "c"], "b": ["a", "d"]}, "is a group itself"),
        ({"a": ["x", "y"], "b": ["y", "z"]}, "'y' is in 'a' already"),
        ({"a": ["x"]}, "two or more different"),
        ({"a": ["x", "x"]}, "two or more different"),
        ({"../a": ["x", "y"]}, "no model name"),
        ({"a": "xy"}, "list"),
        ({"a": ["x", 3]}, "list"),
    ],
)
def test_groups_that_cannot_be(groups, says):
    with pytest.raises(ConfigError, match=says):
        from_dict({"groups": groups})


def test_a_version_published_under_a_groups_name_changes_nothing(repository, config, serve):
    publish(repository, 0)
    serve(config).stop()
    b.publish(repository, "scene")
    server = serve(config)
    with Client(server.target) as client:
        assert kind_of(ask(client)) == (0, 0)
        with pytest.raises(Rejected, match="'scene' is a frame group"):
            list(client.submit("scene", 1))


def test_without_the_warm_versions_there_is_no_way_back_and_the_status_says_so(repository, config, serve):
    publish(repository, 0)
    server = serve(config)
    server.service.admin.submit_group("scene", publish(repository, 1)).result()
    group = server.service.models.group("scene")
    assert group.status().previous == 1
    server.service.models.host(
        "seg"
    ).drop_previous()  # what the resource-preserving policy does for a candidate
    assert (group.status().previous, group.status().ready) == (0, True)
    with pytest.raises(ServiceError, match="'seg' has no previous version"):
        group.rollback()
    with Client(server.target) as client:
        assert kind_of(ask(client)) == (1, 1)


def rewritten(directory, **changes):
    """A manifest that somebody changed, with a digest that is right again."""
    from runtime.repository import repository as r

    path = directory / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    manifest["digest"] = r.digest(manifest)
    path.write_text(json.dumps(manifest))


NONSENSE = [
    {"input": [1]},
    {"input": {"height": "x"}},
    {"pack": "me"},
    {"classes": 5},
    {"edge_classes": {"a": 1}},
    {"edge_thresholds": [None] * 4},
    {"engine": {"file": "model.onnx", "kind": 7}},
    {"engine": {"file": ["x"]}},
    {"adaptation": 3},
    {"task": ["edges"]},
]


def test_manifests_of_nonsense_never_keep_the_server_from_starting(repository, config):
    from runtime.service import Service

    publish(repository, 0)
    for n, changes in enumerate(NONSENSE):
        rewritten(repository.directory(f"m{n}", b.publish_edges(repository, f"m{n}")), **changes)
    service = Service(dataclasses.replace(config, groups={"scene": ["seg", "edges"], "bad": ["m0", "m1"]}))
    service.start()
    try:
        status = {status.model: status for status in service.admin.status()}
        assert status["seg"].ready
        assert service.models.group("scene").status().ready
        assert service.models.group("bad").status().reason.startswith("member 'm0': version 1: ")
        refused = [n for n in range(len(NONSENSE)) if not status[f"m{n}"].ready]
        assert len(refused) >= 8
        assert all(status[f"m{n}"].reason for n in refused)
    finally:
        service.close()


RECORDS = [
    "[]",
    "{}",
    '{"live": 7}',
    '{"live": 7, "members": {"seg": 99, "edges": 98}, "previous": 6, "previous_members": {"seg": "x"}}',
    '{"live": true, "members": {"seg": true}, "last": "9"}',
    '{"live": -1, "members": [1], "previous_members": 3, "last": -5}',
    '{"live": 7, "members": {"nope": 1}}',
    '{"live": 1e999, "members": {"seg": 1, "edges": 1}}',
    '{"live": 1, "live": 1, "members": {"seg": 1, "edges": 1}}',
    '{"live": 1000000000000000000000000000000, "members": {"seg": 1, "edges": 1}}',
    '{"live": "1", "members": {"seg": 1, "edges": 1}, "more": "\\ud800"}',
    '{"live": 1, "members": {"seg": true, "edges": 1.0}}',
    '"3"',
    "",
]


def test_group_records_of_nonsense(repository, config):
    """Whatever one says, what was live comes up as one generation, and no number stands for two."""
    from runtime.service import Service

    publish(repository, 0)
    second = publish(repository, 1)
    used = {}
    for record in (None, *RECORDS):
        if record is not None:
            (repository.path / "scene" / "live.json").write_text(record)
        service = Service(dataclasses.replace(config, watch=WatchConfig(seconds=0.0)))
        service.start()
        try:
            if record is None:
                assert service.admin.submit_group("scene", second, shadow=False).result().state == "LIVE"
            status = service.models.group("scene").status()
            assert status.ready, record
            members = {name: live for name, (live, _) in status.members.items()}
            assert members == second
            assert used.setdefault(status.generation, members) == members, record
        finally:
            service.close()


def test_members_that_do_not_make_one_answer(repository, config, serve):
    """Other frames: the group says so, and the models are served.  Of a name twice, the first one answers."""
    publish(repository, 0)
    b.publish_edges(repository, "joint", joint=True)
    b.publish(repository, "small", b.segmentation(W, B))
    groups = {"twice": ["seg", "joint"], "sizes": ["edges", "small"]}
    server = serve(dataclasses.replace(config, groups=groups))
    why = {name: group.status().reason for name, group in server.service.models.groups().items()}
    assert why["twice"] == ""
    assert why["sizes"].startswith("members 'edges' and 'small' take different frames")
    with Client(server.target) as client:
        assert client.infer("seg", FRAME).version == 1
        with pytest.raises(Rejected, match="take different frames"):
            client.infer("sizes", FRAME)
        answer = ask(client, model="twice")
        assert (answer.outputs["edge_bits"] == b.edges_of(LABELS)).mean() > 0.97
        host = server.service.models.host("joint")
        assert host.statistics_of(1).snapshot().success == 1
        client.infer("twice", FRAME, outputs=("labels",))  # the segmentation's: the joint one is not run
        assert host.statistics_of(1).snapshot().success == 1


@pytest.mark.parametrize("lost", [("scene",), ("seg",), ("scene", "seg", "edges")])
def test_a_lost_record_comes_back_from_the_history(repository, config, serve, lost):
    publish(repository, 0)
    server = serve(config)
    server.service.admin.submit_group("scene", publish(repository, 1)).result()
    server.service.models.group("scene").pin(0)
    server.stop()
    for name in lost:
        (repository.path / name / "live.json").unlink()
    publish(repository, 2)  # never submitted
    server = serve(config)
    with Client(server.target) as client:
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (2, (1, 1))
    assert all(controller.flags.pinned for controller in server.service.models.controllers().values())


def test_a_member_that_was_changed_while_there_was_no_group(repository, config, serve):
    publish(repository, 0)
    server = serve(config)
    server.service.admin.submit_group("scene", publish(repository, 1)).result()
    server.stop()
    alone = publish(repository, 2)["seg"]
    server = serve(dataclasses.replace(config, groups={}))
    assert server.service.admin.submit("seg", alone).result().state == "LIVE"
    server.stop()
    server = serve(config)
    with Client(server.target) as client:
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (3, (2, 1))  # a new generation, said to be one


def test_a_generation_that_no_longer_passes_gives_way_as_a_whole(repository, config, serve):
    publish(repository, 0)
    server = serve(config)
    members = publish(repository, 1)
    server.service.admin.submit_group("scene", members).result()
    server.stop()
    (repository.directory("edges", members["edges"]) / "model.onnx").write_bytes(b"rust")
    server = serve(config)
    with Client(server.target) as client:
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (1, (0, 0))


def test_a_full_disk_refuses_the_flip_of_all(repository, config, serve, monkeypatch):
    from runtime.repository.repository import Repository

    publish(repository, 0)
    server = serve(config)
    second = publish(repository, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Repository, "set_live", full)
    event = server.service.admin.submit_group("scene", second).result()
    assert (event.state, event.check) == ("REJECTED", "record")
    monkeypatch.undo()
    with Client(server.target) as client:
        assert (ask(client).version, kind_of(ask(client))) == (1, (0, 0))
    assert server.service.admin.submit_group("scene", second).result().state == "LIVE"
    monkeypatch.setattr(Repository, "set_live", full)
    events = server.service.models.group("scene").rollback()
    assert "not recorded" in events[0].reason
    with Client(server.target) as client:
        assert (ask(client).version, kind_of(ask(client))) == (1, (0, 0))


THREE = {"scene": ["seg", "edges", "depth"]}


def test_a_full_disk_leaves_no_member_of_an_incomplete_group_behind(repository, config, serve, monkeypatch):
    """A member is missing, so there is no generation yet: two of the others flip together, or neither."""
    from runtime.repository.repository import Repository

    publish(repository, 0)
    second = publish(repository, 1)
    for model in ("seg", "edges"):
        repository.set_live(model, {"live": 1, "previous": None})
    server = serve(dataclasses.replace(config, groups=THREE))
    assert server.service.models.group("scene").status().reason == "member 'depth' is not in the repository"
    write, names = Repository.set_live, []

    def full_at_the_second(self, model, value):
        names.append(model)
        if len(names) > 1:
            raise OSError(28, "No space left on device")
        write(self, model, value)

    monkeypatch.setattr(Repository, "set_live", full_at_the_second)
    event = server.service.admin.submit_group("scene", second, shadow=False).result()
    monkeypatch.undo()
    lives = {name: server.service.models.host(name).live.version for name in second}
    assert lives == (second if event.state == "LIVE" else dict.fromkeys(second, 1))
    server.stop()
    server = serve(dataclasses.replace(config, groups=THREE))
    assert {name: server.service.models.host(name).live.version for name in second} == lives


def test_a_member_whose_directory_is_gone_does_not_keep_the_others_from_going_back(repository, config, serve):
    import shutil

    publish(repository, 0)
    b.publish_edges(repository, "depth")
    groups = dataclasses.replace(config, groups=THREE, watch=WatchConfig(seconds=0))
    server = serve(groups)
    members = publish(repository, 1) | {"depth": b.publish_edges(repository, "depth")}
    event = server.service.admin.submit_group("scene", members, shadow=False).result()
    assert (event.state, event.version) == ("LIVE", 2), event
    server.stop()
    aside = repository.path.parent / "depth"
    shutil.move(repository.path / "depth", aside)
    server = serve(groups)
    until(lambda: all(c.host.previous is not None for c in server.service.models.controllers().values()))
    before = {name: server.service.models.host(name).previous.version for name in ("seg", "edges")}
    assert server.service.admin.rollback("seg").state == "ROLLED_BACK"
    assert {name: server.service.models.host(name).live.version for name in before} == before
    server.stop()
    shutil.move(aside, repository.path / "depth")
    server = serve(groups)  # it comes back as the generation had it, not as it was last
    status = server.service.models.group("scene").status()
    assert (status.ready, status.generation) == (True, 1), status
    assert {name: live for name, (live, _) in status.members.items()} == before | {"depth": 1}


KILLED = """\
import os, signal, sys
from runtime.config import from_dict
from runtime.repository import Repository
from runtime.service import Service

service = Service(from_dict({
    "repository": sys.argv[1], "groups": {"scene": sys.argv[3].split()}, "engine": {"threads": 1},
    "shadow": {"enabled": False}, "watch": {"seconds": 0.0}, "guard": {"latency_slack_ms": 1e9},
}))
service.start()
real, left = Repository.set_live, [int(sys.argv[2])]

def killed(self, model, value):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    real(self, model, value)

Repository.set_live = killed
print(service.admin.submit_group("scene", {"seg": 2, "edges": 2}).result())
os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_after(repository, writes, groups):
    """A server of both models' first versions that is told to swap both, and dies after so many records."""
    import signal
    import subprocess
    import sys
    from pathlib import Path

    publish(repository, 0)
    publish(repository, 1)
    for model in ("seg", "edges"):  # as a server has left them that knew of no group
        repository.set_live(model, {"live": 1, "previous": None})
    command = [sys.executable, "-c", KILLED, str(repository.path), str(writes), " ".join(groups["scene"])]
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("writes", [1, 2])
def test_kill_between_the_records_of_an_incomplete_group(repository, config, serve, writes):
    """What is there of a group that lacks a member flips as one as well."""
    kill_after(repository, writes, THREE)
    server = serve(dataclasses.replace(config, groups=THREE))
    lives = {name: server.service.models.host(name).live.version for name in ("seg", "edges")}
    assert lives in ({"seg": 1, "edges": 1}, {"seg": 2, "edges": 2})


@pytest.mark.parametrize(("writes", "generation"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_kill_between_the_records_brings_up_one_generation(repository, config, serve, writes, generation):
    """SIGKILL before the group's record, between it and the members', between those, and after all."""
    kill_after(repository, writes, GROUP)
    server = serve(config)
    with Client(server.target) as client:
        answer = ask(client)
        assert (answer.version, kind_of(answer)) == (generation, (generation - 1, generation - 1))
        if generation == 2:  # and the way back is warm again, of both
            until(
                lambda: all(c.host.previous is not None for c in server.service.models.controllers().values())
            )
            server.service.models.group("scene").rollback()
            assert kind_of(ask(client)) == (0, 0)
    assert [repository.live(m)["live"] for m in ("seg", "edges")] == [1, 1]
