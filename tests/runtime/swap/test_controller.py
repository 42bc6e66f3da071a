"""The guarded swap through the service: what is refused, by which check, and that the live version goes
on answering.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from runtime.client import Client, Rejected, RpcError
from runtime.config import GuardConfig, ShadowConfig, SwapConfig, WatchConfig
from runtime.errors import Refused
from runtime.repository.repository import Repository
from runtime.swap.verify import Verifier
from tests.runtime import builders as b
from tests.waits import PATIENCE, until

W, B = b.nearest_weights()


class Stream(threading.Thread):
    """A camera: sends frames until it is stopped, and counts what comes back."""

    def __init__(self, target, model="road", fps=60.0):
        super().__init__(daemon=True)
        self.target, self.model, self.pause = target, model, 1.0 / fps
        self.sent = 0
        self.versions, self.failed, self.rejected, self.wrong = [], [], [], 0
        self.stopping = threading.Event()

    def __enter__(self):
        self.start()
        until(lambda: self.versions or self.failed or self.rejected)
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join(PATIENCE)
        assert self.sent == len(self.versions) + len(self.failed) + len(self.rejected)

    def run(self):
        rng = np.random.default_rng(5)
        frames = [b.blocks(rng) for _ in range(8)]
        with Client(self.target) as client:
            while not self.stopping.is_set():
                frame, labels = frames[self.sent % 8]
                self.sent += 1
                try:
                    answer = client.infer(self.model, frame, source="front", timeout=PATIENCE)
                    self.versions.append(answer.version)
                    self.wrong += int((answer.labels != labels).mean() > 0.2)
                except Rejected as error:
                    self.rejected.append(error)
                except Exception as error:
                    self.failed.append(error)
                time.sleep(self.pause)


def bias(**raised):
    """The good network with some classes pushed."""
    out = B.copy()
    for name, value in raised.items():
        out[b.CLASSES.index(name)] += value
    return b.segmentation(W, out)


def bad_versions():
    good = b.segmentation(W, B)
    nan = W.copy()
    nan[1, 0] = np.nan
    inf = B.copy()
    inf[2] = np.inf
    permuted = b.segmentation(W[[1, 2, 3, 0]], B[[1, 2, 3, 0]])
    five = b.segmentation(np.vstack([W, W[:1]]), np.append(B, -1e3))
    answers = b.golden(good)
    return {
        "nan weights": ("finite", lambda: {"model": b.segmentation(nan, B), "answers": answers}),
        "infinite bias": ("finite", lambda: {"model": b.segmentation(W, inf), "answers": answers}),
        "one class, honestly exported": ("collapse", lambda: {"model": bias(sky=1e3)}),
        "one class, with the answers of another": (
            "collapse",
            lambda: {"model": bias(sky=1e3), "answers": answers},
        ),
        "a class has vanished": ("collapse", lambda: {"model": bias(car=-1e3)}),
        "answers are not the exporter's": ("golden", lambda: {"model": bias(car=-1e3), "answers": answers}),
        "truncated before publishing": (
            "load",
            lambda: {"model": good.SerializeToString()[:-200], "answers": answers},
        ),
        "not a model": ("load", lambda: {"model": b"\x00\x01garbage", "answers": answers}),
        "other size": ("contract", lambda: {"model": b.segmentation(W, B, (32, 32)), "size": (32, 32)}),
        "other classes": ("contract", lambda: {"model": good, "classes": ("a", "b", "c", "d")}),
        "more classes than named": ("contract", lambda: {"model": five, "answers": answers}),
        "size of the manifest is not the engine's": (
            "contract",
            lambda: {"model": good, "input": {"height": 8, "width": 8}},
        ),
        "permuted classes": ("shadow-agreement", lambda: {"model": permuted}),
        "no golden frames": ("golden", lambda: {"answers": {"x": np.zeros(1)}}),
        "golden frames of another size": (
            "golden",
            lambda: {"answers": b.golden(b.segmentation(W, B, (32, 32)), size=(32, 32)), "model": good},
        ),
    }


@pytest.mark.parametrize("traffic", [True, False], ids=["live traffic", "no traffic"])
@pytest.mark.parametrize("case", list(bad_versions()))
def test_a_bad_version_is_refused_by_the_name_of_the_check(repository, quick, driving, serve, case, traffic):
    check, how = bad_versions()[case]
    b.publish(repository)
    server = serve(driving if traffic else quick)
    bad = b.publish(repository, **how())
    with Client(server.target) as client:
        if traffic:
            with Stream(server.target) as camera:
                events = list(client.submit("road", bad))
            assert not camera.failed
            assert set(camera.versions) == {1}
            assert not camera.wrong
        else:
            events = list(client.submit("road", bad))
        assert (events[0].state, events[-1].state) == ("SUBMITTED", "REJECTED")
        assert events[-1].check == check, events[-1]
        assert events[-1].reason
        assert "\n" not in events[-1].reason
        assert client.status()["models"]["road"]["live"] == 1
    assert repository.live("road")["live"] == 1
    assert [e["state"] for e in repository.history("road") if e["version"] == bad][-1] == "REJECTED"


@pytest.mark.parametrize(
    ("damage", "check"),
    [
        (lambda d: (d / "model.onnx").write_bytes((d / "model.onnx").read_bytes()[:-100]), "hash"),
        (lambda d: (d / "golden.npz").write_bytes((d / "golden.npz").read_bytes()[:-1] + b"\x01"), "hash"),
        (lambda d: (d / "manifest.json").unlink(), "manifest"),
        (lambda d: (d / "note.txt").write_text("hello"), "hash"),
    ],
    ids=["truncated", "altered", "foreign", "added file"],
)
def test_what_was_altered_after_publishing_is_refused(repository, quick, serve, damage, check):
    b.publish(repository)
    server = serve(quick)
    bad = b.publish(repository)
    damage(repository.directory("road", bad))
    with Client(server.target) as client, Stream(server.target) as camera:
        assert [(e.state, e.check) for e in client.submit("road", bad)][-1] == ("REJECTED", check)
    assert not camera.failed
    assert set(camera.versions) == {1}


def test_a_good_version_goes_live_and_is_shadowed_on_live_frames(repository, driving, serve):
    b.publish(repository)
    server = serve(driving)
    good = b.publish(repository, model=bias(car=0.3), adaptation={"round": 7}, pack={"sha256": "cd" * 32})
    with Client(server.target) as client, Stream(server.target) as camera:
        events = list(client.submit("road", good))
        assert [e.state for e in events] == ["SUBMITTED", "VERIFIED", "SHADOWING", "LIVE"]
        assert events[-1].detail["shadow"]["frames"] == 6
        assert events[-1].detail["shadow"]["agreement"] > 0.95
        frame, labels = b.blocks(np.random.default_rng(0))
        answer = client.infer("road", frame)
        assert (answer.version, answer.parameters["round"], answer.parameters["pack"]) == (
            good,
            "7",
            "cd" * 32,
        )
        assert (answer.labels == labels).all()
        old = client.infer("road", frame, version=1)  # kept warm, and still to be had by number
        assert old.version == 1
        with pytest.raises(Rejected, match="version 9 is not found"):
            client.infer("road", frame, version=9)
        status = client.status()["models"]["road"]
        assert (status["live"], status["previous"]) == (good, 1)
        assert status["watching"]
    assert not camera.failed
    assert camera.versions == sorted(camera.versions)  # never back and forth
    live = repository.live("road")
    assert (live["live"], live["previous"]) == (good, 1)


def test_without_traffic_the_golden_frames_decide_and_the_event_says_so(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    good = b.publish(repository, model=bias(car=0.3))
    with Client(server.target) as client:
        *_, last = client.submit("road", good)
    assert last.state == "LIVE"
    assert "no live traffic: decided by the golden frames alone" in last.reason


def test_the_swap_goes_on_when_the_client_vanishes(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    good = b.publish(repository)
    client = Client(server.target)
    next(client.submit("road", good))
    client.close()
    until(lambda: server.service.models.host("road").live.version == good)


def test_rollback_and_what_it_cannot_do(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    good = b.publish(repository)
    with Client(server.target) as client:
        with pytest.raises(Rejected, match="no previous version"):
            client.rollback("road")
        *_, last = client.submit("road", good)
        assert last.state == "LIVE"
        event = client.rollback("road")
        assert (event.state, event.version, event.detail["live"]) == ("ROLLED_BACK", good, 1)
        frame, _ = b.blocks(np.random.default_rng(0))
        assert client.infer("road", frame).version == 1
        assert repository.live("road")["live"] == 1
        with pytest.raises(Rejected, match="version 2 is not found"):
            client.infer("road", frame, version=good)
        states = {v["version"]: v["state"] for v in client.versions("road")}
        assert states == {1: "LIVE", good: "ROLLED_BACK"}


def test_freeze_and_pin(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)
    with Client(server.target) as client:
        status = client.freeze("road", "driving")["models"]["road"]
        assert (status["frozen"], status["frozen_reason"]) == (True, "driving")
        *_, last = client.submit("road", second)
        assert (last.state, last.check) == ("REJECTED", "frozen")
        assert "driving" in last.reason
        *_, last = client.promote("road", second)
        assert (last.state, last.check) == ("REJECTED", "frozen")
        client.unfreeze("road")
        client.pin("road")
        *_, last = client.submit("road", second)
        assert (last.state, last.check) == ("REJECTED", "pinned")
        with pytest.raises(Rejected, match="is not live"):
            client.pin("road", second)
        client.unpin("road")
        *_, last = client.submit("road", second)
        assert last.state == "LIVE"
        client.pin("road", second)
        with pytest.raises(Rejected, match="pinned"):
            client.rollback("road")
        client.freeze("", "parked")  # all
    for lost in (False, True):  # both outlive the server, and live.json
        server.stop()
        if lost:
            (repository.path / "road" / "live.json").unlink()
        server = serve(quick)
        with Client(server.target) as client:
            status = client.status()["models"]["road"]
            assert (status["live"], status["pinned"], status["frozen"]) == (second, True, True)
            assert status["frozen_reason"] == "parked"


def test_only_a_versions_own_fault_keeps_a_load_from_it(repository, quick, serve):
    """What was refused because flips were frozen is as good as before; what failed a check is not."""
    b.publish(repository)
    server = serve(quick)
    good, bad = b.publish(repository), b.publish(repository, model=bias(road=60))
    load = pb.RepositoryModelLoadRequest(model_name="road")
    with Client(server.target) as client, grpc.insecure_channel(server.target) as channel:
        kserve = GRPCInferenceServiceStub(channel)
        assert list(client.submit("road", bad))[-1].state == "REJECTED"
        client.freeze("road", "driving")
        assert list(client.submit("road", good))[-1].check == "frozen"
        with pytest.raises(RpcError, match="frozen"):
            kserve.RepositoryModelLoad(load, timeout=PATIENCE)
        client.unfreeze("road")
        kserve.RepositoryModelLoad(load, timeout=PATIENCE)
        assert client.status()["models"]["road"]["live"] == good
        client.rollback("road")
        kserve.RepositoryModelLoad(load, timeout=PATIENCE)  # nothing newer that may be live
        assert client.status()["models"]["road"]["live"] == 1


def test_a_rollback_target_that_cannot_be_warmed_gives_its_memory_back(repository, quick, serve, monkeypatch):
    b.publish(repository)
    server = serve(quick)
    with Client(server.target) as client:
        assert list(client.promote("road", b.publish(repository)))[-1].state == "LIVE"
    server.stop()
    slot = Verifier.slot

    def refuse(verifier, candidate):
        if candidate.version == 1:
            raise Refused("load", "no room for all threads")
        return slot(verifier, candidate)

    monkeypatch.setattr(Verifier, "slot", refuse)
    server = serve(quick)
    until(lambda: "not kept warm" in str(repository.history("road")[-1].get("reason")))
    ledger, live = server.service.ledger, server.service.models.host("road").live
    assert ledger.declared() == ledger.need(live.engine.memory_bytes)


def test_a_rollback_that_has_begun_keeps_its_target(repository, quick, serve, monkeypatch):
    """Between the record and the flip a candidate of another model may want the warm version's memory."""
    b.publish(repository)
    server = serve(quick)
    host = server.service.models.host("road")
    with Client(server.target) as client:
        assert list(client.promote("road", b.publish(repository)))[-1].state == "LIVE"
        write, given = Repository.set_live, []

        def written(self, model, value):
            write(self, model, value)
            given.append(host.drop_previous())  # what the resource-preserving policy does

        monkeypatch.setattr(Repository, "set_live", written)
        assert client.rollback("road").state == "ROLLED_BACK"
        monkeypatch.undo()
        assert given == [None]
        assert host.live.version == repository.live("road")["live"] == 1
        with pytest.raises(Rejected, match="no previous version"):
            client.rollback("road")
        # and the claim is over: the next warm version can be given up again
        assert list(client.promote("road", b.publish(repository)))[-1].state == "LIVE"
        assert host.drop_previous().version == 1


def test_a_candidate_can_wait_for_the_thaw(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, swap=SwapConfig(freeze_wait=PATIENCE)))
    second = b.publish(repository)
    with Client(server.target) as client:
        client.freeze("road", "driving")
        events = client.submit("road", second)
        assert next(events).state == "SUBMITTED"
        time.sleep(0.2)
        client.unfreeze("road")
        assert [e.state for e in events][-1] == "LIVE"


def test_a_live_version_that_goes_bad_is_rolled_back_by_itself(repository, quick, serve):
    """It passes every check on the golden frames and, without traffic, no live frame is seen: the watch
    window sees them.
    """
    b.publish(repository)
    server = serve(quick)
    # right on the colours, wrong as soon as there is fog: a bright frame is all "sky"
    weights, shifted = W.copy(), B.copy()
    weights[3] += 10
    shifted[3] -= 13
    second = b.publish(repository, model=b.segmentation(weights, shifted))
    with Client(server.target) as client:
        *_, last = client.submit("road", second)
        assert last.state == "LIVE", last
        with client.watch("road") as events:
            frame, _ = b.blocks(np.random.default_rng(1))
            fog = (0.6 * 255 + 0.2 * frame).astype(np.uint8)
            until(lambda: client.infer("road", fog).version == 1)
            event = next(events)
        assert (event.state, event.version, event.check) == ("ROLLED_BACK", second, "watch-collapse")
        assert client.infer("road", fog).version == 1
    assert repository.live("road")["live"] == 1


def test_an_all_black_camera_rolls_nothing_back(repository, quick, serve):
    """One class everywhere is right for a covered camera: the previous version says the same."""
    b.publish(repository)
    server = serve(dataclasses.replace(quick, watch=WatchConfig(seconds=1.0, max_fps=100.0)))
    second = b.publish(repository)
    with Client(server.target) as client:
        assert [e.state for e in client.submit("road", second)][-1] == "LIVE"
        for _ in range(100):
            assert client.infer("road", np.zeros((*b.SIZE, 3), np.uint8)).version == second
            time.sleep(0.01)
        until(lambda: not client.status()["models"]["road"]["watching"])
        assert client.status()["models"]["road"]["live"] == second


def test_an_engine_that_throws_when_live_is_rolled_back(repository, quick, serve, monkeypatch):
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)
    with Client(server.target) as client:
        assert [e.state for e in client.submit("road", second)][-1] == "LIVE"
        monkeypatch.setattr(server.service.models.host("road").live.engine, "run", broken)
        frame, _ = b.blocks(np.random.default_rng(1))
        failures = 0

        def back():
            nonlocal failures
            try:
                return client.infer("road", frame).version == 1
            except RpcError as error:
                failures += "out of order" in error.details()
                return False

        until(back)
        assert failures >= 5
        assert client.status()["models"]["road"]["live"] == 1
        until(lambda: "ROLLED_BACK" in [e.state for e in client.history("road")])
        (event,) = [e for e in client.history("road") if e.state == "ROLLED_BACK"]
        assert event.check == "watch-errors"
        account = client.status()["account"]
        assert account["rejected"] == {"engine": failures}


def test_a_client_that_sends_what_no_version_can_run_rolls_nothing_back(repository, quick, serve):
    """Free dimensions that do not fit each other pass every check of the shapes, and fail in the engine."""
    b.publish(repository, "simple", b.simple(), foreign=True)
    server = serve(dataclasses.replace(quick, watch=WatchConfig(seconds=5 * PATIENCE, max_fps=100.0)))
    second = b.publish(repository, "simple", b.simple(), foreign=True)

    def send(client, rows):
        inputs = {"INPUT0": np.ones((2, 16), np.int32), "INPUT1": np.ones((rows, 16), np.int32)}
        return client.infer_tensors("simple", inputs).version

    with Client(server.target) as client:
        assert [e.state for e in client.submit("simple", second)][-1] == "LIVE"
        slot = server.service.models.host("simple").live
        for _ in range(10):
            with pytest.raises(RpcError, match="failed"):
                send(client, 3)
        until(lambda: slot.failed_on is None)  # the watch window has looked at it
        assert send(client, 2) == second
        time.sleep(0.1)
        assert send(client, 2) == second
        slot.engine.run = broken  # its own fault is another matter

        def back():
            try:
                return send(client, 2) == 1
            except RpcError:
                return False

        until(back)


def broken(*_):
    raise RuntimeError("out of order")


def test_a_candidate_that_hangs_is_given_up(repository, quick, serve, monkeypatch):
    from runtime import engines

    b.publish(repository)
    server = serve(dataclasses.replace(quick, engine=dataclasses.replace(quick.engine, load_timeout=0.3)))
    second = b.publish(repository)
    release = threading.Event()
    monkeypatch.setattr(engines, "load", lambda *a, **k: release.wait(PATIENCE) or broken())
    with Client(server.target) as client, Stream(server.target) as camera:
        *_, last = client.submit("road", second)
    release.set()
    assert (last.state, last.check) == ("REJECTED", "load")
    assert "0 s" in last.reason
    assert set(camera.versions) == {1}
    assert not camera.failed


def test_a_disk_that_is_full_refuses_the_flip(repository, quick, serve, monkeypatch):
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Repository, "set_live", full)
    monkeypatch.setattr(Repository, "append_history", full)
    with Client(server.target) as client, Stream(server.target) as camera:
        *_, last = client.submit("road", second)
        assert (last.state, last.check) == ("REJECTED", "record")
        assert "No space left" in last.reason
    assert set(camera.versions) == {1}
    assert not camera.failed


def test_a_full_disk_does_not_stop_a_rollback(repository, quick, serve, monkeypatch):
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)

    def full(*_):
        raise OSError(28, "No space left on device")

    with Client(server.target) as client:
        assert [e.state for e in client.submit("road", second)][-1] == "LIVE"
        monkeypatch.setattr(Repository, "set_live", full)
        monkeypatch.setattr(Repository, "append_history", full)
        event = client.rollback("road")
        assert (event.state, event.detail["live"]) == ("ROLLED_BACK", 1)
        assert "not recorded: live.json cannot be written: No space left" in event.reason
        frame, _ = b.blocks(np.random.default_rng(0))
        assert client.infer("road", frame).version == 1


def test_a_candidate_beyond_the_memory_budget_is_refused_before_it_is_loaded(repository, quick, serve):
    b.publish(repository)
    config = dataclasses.replace(quick, guard=GuardConfig(memory_budget_bytes=40 << 20))
    server = serve(config)
    with Client(server.target) as client:
        second = b.publish(repository)
        assert [e.state for e in client.submit("road", second)][-1] == "LIVE"
        third = b.publish(repository)
        *_, last = client.submit("road", third)
        assert (last.state, last.check) == ("REJECTED", "memory")
        assert "guard.memory_budget_bytes" in last.reason


def test_the_resource_preserving_policy_gives_up_the_warm_version_instead(repository, quick, serve):
    b.publish(repository)
    config = dataclasses.replace(
        quick, guard=GuardConfig(memory_budget_bytes=40 << 20, memory_policy="resource")
    )
    server = serve(config)
    with Client(server.target) as client:
        for _ in range(3):
            version = b.publish(repository)
            assert [e.state for e in client.submit("road", version)][-1] == "LIVE"


def test_a_candidate_is_counted_until_it_is_live_or_refused(repository, quick):
    """Between load and flip it has no slot yet: what is declared must not forget it."""
    from runtime.serving.memory_budget import OVERHEAD, MemoryBudget
    from runtime.serving.served_model import ServedModel
    from runtime.swap.verify import Verifier

    first, second = b.publish(repository), b.publish(repository)
    for policy in ("availability-preserving", "resource-preserving"):
        ledger = MemoryBudget(GuardConfig(memory_budget_bytes=2 * OVERHEAD + (1 << 20), memory_policy=policy))
        host = ServedModel("road", quick)
        ledger.add(host)
        verifier = Verifier(host, repository, quick, ledger)
        one, other = (verifier.verify(version, reference=None) for version in (first, second))
        both = ledger.declared()
        assert both > 2 * OVERHEAD
        with pytest.raises(Refused, match=r"guard\.memory_budget_bytes"):
            ledger.reserve(host, 1)
        host.flip(verifier.slot(one))
        one.reservation.release()
        assert ledger.declared() == both  # its slot takes over
        other.close()
        other.close()
        assert both > ledger.declared() > OVERHEAD
        del other
        given_up = verifier.verify(second, reference=None)
        assert ledger.declared() == both
        del given_up  # by a swap that did not wait for it
        assert ledger.declared() < both
        host.unload("")


def test_a_foreign_network_is_swapped_with_the_checks_that_need_labels_skipped(repository, quick, serve):
    model = b.simple()
    b.publish(repository, "simple", model, foreign=True)
    server = serve(quick)
    second = b.publish(repository, "simple", model, foreign=True)
    with Client(server.target) as client:
        events = list(client.submit("simple", second))
        assert events[-1].state == "LIVE"
        assert "were not checked" in events[1].reason
        assert "not shadowed" in events[-1].reason
        x = np.arange(16, dtype=np.int32)[None]
        answer = client.infer_tensors("simple", {"INPUT0": x, "INPUT1": x})
        assert answer.version == second
        assert (answer.outputs["OUTPUT0"] == 2 * x).all()


def test_a_model_that_appears_after_the_start(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    b.publish(repository, "other")
    with Client(server.target) as client:
        with pytest.raises(Rejected, match="unknown model"):
            client.infer("other", np.zeros((*b.SIZE, 3), np.uint8))
        assert [e.state for e in client.submit("other", 1)][-1] == "LIVE"
        assert client.infer("other", np.zeros((*b.SIZE, 3), np.uint8)).version == 1
        with pytest.raises(Rejected, match="not in the repository"):
            client.submit("nope", 1).__next__()
        with pytest.raises(Rejected, match="letters, digits"):
            client.submit("../road", 1).__next__()


def test_a_damaged_live_version_gives_way_to_the_previous_one_at_the_start(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)
    with Client(server.target) as client:
        assert [e.state for e in client.submit("road", second)][-1] == "LIVE"
    server.stop()
    (repository.directory("road", second) / "model.onnx").write_bytes(b"rust")
    server = serve(quick)
    with Client(server.target) as client:
        assert client.status()["models"]["road"]["live"] == 1
        rejected = [e for e in client.history("road") if e.state == "REJECTED"]
        assert (rejected[-1].version, rejected[-1].check) == (second, "hash")


@pytest.mark.parametrize("content", ['{"live": 2, "prev', "", None])
def test_a_half_written_live_json_does_not_make_an_unchecked_version_live(repository, quick, serve, content):
    """The last live version comes back from the history, not the newest that lies there."""
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)
    with Client(server.target) as client:
        assert [e.state for e in client.submit("road", second)][-1] == "LIVE"
    server.stop()
    b.publish(repository)  # never submitted
    file = repository.path / "road" / "live.json"
    file.unlink() if content is None else file.write_text(content)
    server = serve(quick)
    with Client(server.target) as client:
        assert client.status()["models"]["road"]["live"] == second
    state = repository.live("road")
    assert (state["live"], state["previous"]) == (second, 1)


def test_the_rollback_target_is_warm_again_after_a_restart(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)
    with Client(server.target) as client:
        assert [e.state for e in client.submit("road", second)][-1] == "LIVE"
    server.stop()
    server = serve(quick)
    with Client(server.target) as client:
        until(lambda: client.status()["models"]["road"]["previous"] == 1)
        assert client.rollback("road").detail["live"] == 1


def test_a_server_with_nothing_but_bad_versions_starts_and_says_why(repository, quick, serve):
    b.publish(repository, model=b"garbage", answers=b.golden(b.segmentation(W, B)))
    server = serve(quick)
    with Client(server.target) as client:
        status = client.status()["models"]["road"]
        assert not status["ready"]
        assert "load" in status["reason"]
        with pytest.raises(Rejected, match="no available versions"):
            client.infer("road", np.zeros((*b.SIZE, 3), np.uint8))
        good = b.publish(repository)
        assert [e.state for e in client.submit("road", good)][-1] == "LIVE"


@pytest.mark.parametrize("threads", [1, 2])
def test_twenty_swaps_under_load_lose_nothing(repository, quick, serve, threads):
    """sent = answered + rejected(reason), nothing failed, and the versions are seen in order."""
    engine = dataclasses.replace(quick.engine, threads=threads)
    shadow = ShadowConfig(frames=2, min_frames=1, timeout=PATIENCE, idle_timeout=PATIENCE)
    config = dataclasses.replace(quick, engine=engine, shadow=shadow)
    b.publish(repository)
    server = serve(config)
    cameras = [Stream(server.target, fps=200.0) for _ in range(3)]
    with Client(server.target) as client:
        for camera in cameras:
            camera.__enter__()
        for n in range(20):
            version = b.publish(repository, model=bias(car=0.02 * n))
            *_, last = client.submit("road", version)
            assert last.state == "LIVE", last
        for camera in cameras:
            camera.__exit__()
        account = client.status()["account"]
    sent = sum(camera.sent for camera in cameras)
    answered = sum(len(camera.versions) for camera in cameras)
    rejected = sum(len(camera.rejected) for camera in cameras)
    assert [camera.failed for camera in cameras] == [[], [], []]
    assert sent == answered + rejected
    assert rejected == 0
    assert account == {"accepted": sent, "answered": answered, "rejected": {}, "in_flight": 0}
    assert all(camera.versions == sorted(camera.versions) for camera in cameras)
    assert len({v for camera in cameras for v in camera.versions}) >= 15
    assert not any(camera.wrong for camera in cameras)
    assert server.service.models.host("road").live.version == 21


def test_retired_engines_are_closed(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    host = server.service.models.host("road")
    slots = [host.live]
    with Client(server.target) as client:
        for _ in range(3):
            version = b.publish(repository)
            assert [e.state for e in client.submit("road", version)][-1] == "LIVE"
            slots.append(host.live)
    assert slots[0].wait_closed(PATIENCE)
    assert slots[1].wait_closed(PATIENCE)
    assert not slots[2].wait_closed(0)
    retired = [e["version"] for e in repository.history("road") if e["state"] == "RETIRED"]
    assert retired == [1, 2]


def test_history_tells_the_whole_story(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    second = b.publish(repository)
    with Client(server.target) as client:
        list(client.submit("road", second))
        lines = [
            json.loads(line) for line in (repository.path / "road" / "history.jsonl").read_text().splitlines()
        ]
        assert [(e["version"], e["state"]) for e in lines] == [
            (1, "LIVE"),
            (2, "SUBMITTED"),
            (2, "VERIFIED"),
            (2, "SHADOWING"),
            (2, "LIVE"),
        ]
        assert [e.state for e in client.history("road")] == [e["state"] for e in lines]
