"""The adapters' own connections, and what an operator asks of them and of the drift monitor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import signal
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

from protos import roadworthy_pb2 as pb
from runtime import adapter_registry as registry
from runtime.client import Client, Rejected, RpcError
from runtime.drift import DriftConfig
from runtime.rpc import adaptation, control
from tests.runtime import builders as b
from tests.runtime.adapters import Adapter
from tests.runtime.clients import KINDS, client
from tests.waits import PATIENCE, until


@pytest.fixture
def server(repository, quick, serve):
    b.publish(repository)
    return serve(quick)


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    monkeypatch.setattr(adaptation, "ANSWER", PATIENCE)
    monkeypatch.setattr(adaptation, "FIRST", PATIENCE)


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_adapter_commands_are_refused_with_the_remedy(server, kind):
    with client(kind, server.target) as c:
        assert c.adaptation("road")["adapters"] == []
        for call in (
            lambda: c.start_round("road"),
            lambda: c.cancel_round("road"),
            lambda: c.set_collection("road", True),
        ):
            with pytest.raises(Rejected, match=r"python -m adapt\.run --model road") as refusal:
                call()
            assert refusal.value.code == "FAILED_PRECONDITION"
        for call in (c.adaptation, c.start_round, c.drift, c.watch_round, c.rollback):
            for name in ("nope", "../road", ""):
                with pytest.raises(Rejected) as refusal:
                    call(name)
                assert refusal.value.code in ("NOT_FOUND", "INVALID_ARGUMENT")


@pytest.mark.parametrize("kind", KINDS)
def test_commands_reach_the_adapter_and_its_reports_the_operator(server, kind):
    with client(kind, server.target) as c, Adapter(server.target, phase="collect", progress=0.25) as adapter:
        answer = c.start_round("road", "the tunnel is new")
        assert answer["command"]["accepted"]
        assert not answer["waiting"]
        assert adapter.got[-1]["start_round"] == {"reason": "the tunnel is new"}
        c.set_collection("road", False)
        assert adapter.got[-1]["set_collection"] == {"on": False}
        adapter.says = (False, "no round is under way")
        with pytest.raises(Rejected, match="'garage' of 'road' refuses: no round is under way"):
            c.cancel_round("road")
        assert "cancel_round" in adapter.got[-1]

        with c.watch_round("road") as reports:
            first = next(reports)
            assert (first["phase"], first["progress"]) == ("collect", 0.25)
            adapter.report(
                phase="round",
                progress=0.5,
                round={"round": 3, "stage": "train", "step": 10, "of": 20, "loss": 0.7},
                pseudo_labels={"labelled": 0.4, "classes": [{"name": "road", "threshold": 0.9}]},
                collection={"on": True, "kept": 12, "bytes": 4096, "refused": {"near-duplicate": 5}},
                detail='{"p": 0.3}',
            )
            seen = next(reports)
            unset = dict.fromkeys(("progress", "started", "seconds_left", "portion", "version"), 0)
            said = {"round": 3, "stage": "train", "step": 10, "of": 20, "loss": 0.7}
            assert seen["round"] == {**said, **unset, "trigger": ""}
            assert seen["pseudo_labels"]["classes"][0]["threshold"] == 0.9
            assert seen["collection"]["refused"] == {"near-duplicate": 5}
            assert seen["detail"] == {"p": 0.3}
            adapter.report(collection={"on": False, "kept": 13})
            kept = next(reports)
            assert kept["round"]["stage"] == "train"  # what a report does not mention stays
            assert kept["collection"]["kept"] == 13
            assert kept["collection"]["refused"] == {}  # and a part that it does mention is whole
            adapter.report(phase="collect")
            assert next(reports)["progress"] == 0.0
            assert "round" not in c.adaptation("road")["adapters"][0]["report"]

        state = c.adaptation("road")["adapters"][0]
        assert (state["name"], state["pid"], state["commands_waiting"]) == ("garage", os.getpid(), 0)
        model = c.status()["models"]["road"]
        assert (model["adapter"], model["phase"], model["collection"]) == ("garage", "collect", False)


def test_an_adapter_that_does_not_answer_leaves_the_command_waiting(server, monkeypatch):
    monkeypatch.setattr(adaptation, "ANSWER", 0.1)
    with Client(server.target) as c, Adapter(server.target, says=None) as adapter:
        answer = c.start_round("road")
        assert answer["waiting"]
        assert not answer["command"]["accepted"]
        for _ in range(registry.COMMANDS - 1):
            c.start_round("road")
        with pytest.raises(Rejected, match=f"{registry.COMMANDS} commands wait") as full:
            c.start_round("road")
        assert full.value.code == "RESOURCE_EXHAUSTED"
        until(lambda: len(adapter.got) == registry.COMMANDS)
        for command in adapter.got:
            adapter.report(result={"id": command["id"], "accepted": True})
        until(lambda: c.adaptation("road")["adapters"][0]["commands_waiting"] == 0)


def test_one_adapter_a_model(server, repository):
    b.publish(repository, "other")
    with Adapter(server.target) as first:
        second = Adapter(server.target, name="workshop")
        until(lambda: second.error is not None)
        assert second.error.code == "ALREADY_EXISTS"
        assert "'garage'" in second.error.reason
        second.close()
        with Adapter(server.target, model="other"):  # another model has another adapter
            pass
        with Adapter(server.target) as again, Client(server.target) as c:  # the same one, started again
            until(lambda: first.error is not None)
            assert first.error.code() is grpc.StatusCode.ABORTED
            c.start_round("road")
            assert len(again.got) == 1
            assert not first.got


KILLED = """
import os, sys, queue
from runtime.client import Client
out = queue.Queue()
out.put({"model": "road", "name": "garage", "pid": os.getpid(), "phase": "round", "progress": 0.5})
for command in Client(sys.argv[1]).adapter(iter(out.get, None)):
    print(command, flush=True)
"""


def test_an_adapter_that_is_killed_is_noticed_and_its_commands_fail(server):
    command = [sys.executable, "-c", KILLED, server.target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert "welcome" in process.stdout.readline()
    with Client(server.target) as c:
        assert c.adaptation("road")["adapters"][0]["pid"] == process.pid
        failures = []

        def start():
            try:
                c.start_round("road")
            except Rejected as refusal:
                failures.append(refusal.reason)

        waiting = threading.Thread(target=start)
        waiting.start()
        assert "start_round" in process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        process.stdout.close()
        waiting.join(PATIENCE)
        assert failures
        assert "went away" in failures[0]
        after = c.adaptation("road")
        assert after["adapters"] == []
        assert after["last"]["report"]["phase"] == "round"
        assert after["last"]["disconnected"] > 0
        with Adapter(server.target, name="another"):
            pass


def raw(server, *messages):
    """What becomes of a stream with these bytes: (code, words)."""
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream("/roadworthy.v1.Roadworthy/Adapter")(iter(messages), timeout=PATIENCE)
        with contextlib.suppress(grpc.RpcError):
            list(call)
        return call.code().name, call.details()


def hello(**more):
    return pb.AdapterReport(**{"model": "road", "name": "x", **more}).SerializeToString()


@pytest.mark.parametrize(
    ("messages", "code", "says"),
    [
        ([b"\xff\xff\xff"], "INVALID_ARGUMENT", "malformed"),
        ([b""], "INVALID_ARGUMENT", "names its `model`"),
        ([hello(name="")], "INVALID_ARGUMENT", "`name`"),
        ([hello(model="../../etc")], "INVALID_ARGUMENT", "model name"),
        ([hello(model="x" * 300)], "INVALID_ARGUMENT", "model name"),
        ([hello(model="nope")], "NOT_FOUND", "not in the repository"),
        ([hello(), b"\x0a\xff"], "INVALID_ARGUMENT", "malformed"),
        ([hello(), b"\x72\x03\xff\xfe\xfd"], "INVALID_ARGUMENT", "malformed"),  # a text that is not UTF-8
        ([hello(note="x" * adaptation.REPORT)], "INVALID_ARGUMENT", "at most"),
        ([hello(detail="[1]")], "INVALID_ARGUMENT", "JSON object"),
        ([hello(detail="[" * 9000)], "INVALID_ARGUMENT", "JSON object"),
        ([], "CANCELLED", ""),
    ],
)
def test_what_is_no_report_ends_its_own_stream_alone(server, messages, code, says):
    assert raw(server, *messages)[0] == code
    assert says in raw(server, *messages)[1]
    with Client(server.target) as c, Adapter(server.target):
        assert c.infer("road", np.zeros((*b.SIZE, 3), np.uint8)).version == 1


def test_what_a_report_says_is_bounded_and_printable(server):
    huge = {
        "phase": "\x1b[31mred\n",
        "note": "x" * 5000,
        "progress": float("nan"),
        "collection": {"refused": {f"rule{i}": i for i in range(2000)}},
        "round": {"loss": float("inf"), "progress": 7.0, "stage": "train"},
        "result": {"id": 99, "accepted": True},
    }
    with Client(server.target) as c, Adapter(server.target, **huge):
        report = c.adaptation("road")["adapters"][0]["report"]
        assert report["phase"] == " [31mred "
        assert len(report["note"]) == adaptation.TEXT
        assert len(report["collection"]["refused"]) == adaptation.ITEMS
        assert report["progress"] == 0.0
        assert report["round"]["progress"] == 1.0
        assert "loss" not in report["round"]


def test_a_flood_of_reports_is_held_back_and_answers_go_on(server):
    flood = 3000
    with Client(server.target) as c, Adapter(server.target) as adapter, c.watch_round("road") as reports:
        begun = time.monotonic()
        for index in range(flood):
            adapter.report(phase="round", round={"step": index})
        for _ in range(20):
            assert c.infer("road", np.zeros((*b.SIZE, 3), np.uint8)).version == 1
        seen = [next(reports) for _ in range(5)]
        state = c.adaptation("road")["adapters"][0]
        spent = time.monotonic() - begun
        assert state["reports"] <= registry.BURST + registry.RATE * spent + 2
        assert [r["round"]["step"] for r in seen[1:]] == sorted({r["round"]["step"] for r in seen[1:]})


def test_watchers_are_bounded_and_cannot_keep_out_adapters_or_swaps(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, streams=3))
    with Client(server.target) as c:
        watchers = [c.watch_round("road") for _ in range(3)]
        for _ in range(50):
            with pytest.raises(Rejected, match="3 streams are open"):
                c.watch_round("road")
        with Adapter(server.target) as adapter:
            adapter.report(phase="collect")
            assert all(next(watcher)["name"] == "garage" for watcher in watchers)
            assert list(c.submit("road", 1))[-1].state == "LIVE"
        for watcher in watchers:
            watcher.close()

        def free():
            try:
                c.watch_round("road").close()
            except Rejected:
                return False
            return True

        until(free)


def test_more_connections_than_there_is_room_for(repository, quick, serve, monkeypatch):
    monkeypatch.setattr(control, "ADAPTERS", 2)
    for model in ("road", "left", "right"):
        b.publish(repository, model)
    server = serve(quick)
    with Adapter(server.target, "left"), Adapter(server.target, "right") as right:
        assert raw(server, hello())[0] == "RESOURCE_EXHAUSTED"
        right.close()
        until(lambda: raw(server, hello())[0] == "OK")


def test_connections_that_never_register_keep_out_no_adapter(server):
    with Client(server.target) as c:
        held = [c.adapter(iter(queue.Queue().get, None)) for _ in range(100)]
        with Adapter(server.target) as adapter:
            adapter.report(phase="collect")
            until(lambda: c.adaptation("road")["adapters"])
        for stream in held:
            stream.close()


def test_one_that_never_registers_is_sent_away(server, monkeypatch):
    monkeypatch.setattr(adaptation, "FIRST", 0.2)
    with Client(server.target) as c, pytest.raises(RpcError) as end:
        next(c.adapter(iter(queue.Queue().get, None)))
    assert end.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_reasons_are_bounded(server):
    with Client(server.target) as c:
        for call in (lambda: c.freeze("road", "x" * 10_000_000), lambda: c.start_round("road", "x" * 501)):
            with pytest.raises(Rejected, match="at most 500"):
                call()
        c.freeze("road", "driving\x1b[2J")
        assert c.status()["models"]["road"]["frozen_reason"] == "driving [2J"


def test_a_server_that_stops_says_so_to_its_adapter(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    with Adapter(server.target) as adapter:
        server.stop()
        until(lambda: adapter.error is not None)
        code = adapter.error.code if isinstance(adapter.error, Rejected) else adapter.error.code().name
        assert code in ("UNAVAILABLE", "CANCELLED")


@pytest.mark.parametrize("kind", KINDS)
def test_drift_is_watched_told_and_begins_anew_with_a_version(repository, quick, serve, kind):
    config = DriftConfig(
        max_fps=1e6, learn=40, block=2, false_alarm_hours=0.01, votes=1, min_interval=0.0, queue=1024
    )  # no frame is lost, however busy the machine is
    b.publish(repository)
    server = serve(dataclasses.replace(quick, drift=config))
    rng = np.random.default_rng(0)
    with client(kind, server.target) as c, c.watch("road") as events:
        until(lambda: c.drift("road")["state"] == "learning")

        def drive(darker, count):
            for _ in range(count):
                frame, _ = b.blocks(rng)
                c.infer("road", (frame * darker).astype(np.uint8), source="front", timeout=PATIENCE)

        drive(1.0, 60)
        until(lambda: c.drift("road")["state"] == "in-domain")
        (front,) = c.drift("road")["sources"]
        assert front["source"] == "front"
        assert {signal["name"] for signal in front["signals"]} >= {"confidence", "shares"}
        for _ in range(40):
            drive(0.1, 10)  # everything is road: nothing it has seen
            if c.drift("road")["state"] == "drifting":
                break
        until(lambda: c.drift("road")["state"] == "drifting")
        drift = c.drift("road")
        assert drift["alarms"] >= 1
        assert drift["version"] == 1
        assert c.status()["models"]["road"]["drift"] == "drifting"
        told = next(event for event in events if event.detail.get("state") == "drifting")
        assert (told.state, told.check, told.detail["source"]) == ("NOTE", "drift", "front")

        new = b.publish(repository)
        assert [e.state for e in c.promote("road", new)][-1] == "LIVE"
        until(lambda: c.drift("road")["version"] == new)
        assert c.drift("road")["state"] == "learning"


def test_a_model_that_cannot_be_watched_says_why(repository, quick, serve):
    b.publish(repository, "simple", b.simple(), foreign=True)
    b.publish(repository)
    server = serve(dataclasses.replace(quick, drift=DriftConfig(enabled=False)))
    with Client(server.target) as c:
        assert c.drift("simple")["state"] == ""
        assert c.drift("road")["reason"] == "drift.enabled is false"
        assert c.status()["models"]["road"]["drift"] == ""
