"""What holds for both clients against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

from runtime.client import Answer, AsyncClient, Client, Rejected, RpcError
from runtime.config import QueueConfig
from runtime.shared_memory.system import ShmRegistry
from tests.runtime import builders as b
from tests.runtime.clients import KINDS, client
from tests.runtime.scenarios.test_scheduling import held
from tests.waits import PATIENCE, until

LARGE = (96, 256)  # 72 KiB a frame: goes through shared memory


@functools.cache
def network():
    model = b.segmentation(*b.nearest_weights(), LARGE)
    return model, b.golden(model, 1, size=LARGE)


def publish(repository, **more):
    model, answers = network()
    return b.publish(repository, model=model, answers=answers, size=LARGE, **more)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def large(repository, quick, serve):
    publish(repository)
    return serve(quick)


def frames(count, seed=3, size=LARGE):
    rng = np.random.default_rng(seed)
    return [b.blocks(rng, size) for _ in range(count)]


def test_both_have_the_same_methods():
    def methods(cls):
        return {
            name: [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
            for name, function in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_")
        }

    ours, theirs = methods(Client), methods(AsyncClient)
    assert set(ours) == set(theirs)
    for name in ours:
        assert [(p.name, p.kind, p.default) for p in ours[name]] == [
            (p.name, p.kind, p.default) for p in theirs[name]
        ], name


@pytest.mark.parametrize("shared", [None, False, True])
def test_answers_are_right_and_lanes_are_used_where_they_may_be(large, kind, shared):
    with client(kind, large.target, shared_memory=shared) as c:
        c.wait_ready(PATIENCE)
        for frame, labels in frames(3):
            answer = c.infer("road", frame, source="front", timeout=PATIENCE, request_id="7")
            assert isinstance(answer, Answer)
            assert answer.version == 1
            assert (answer.labels == labels).mean() > 0.95  # noise at the blocks' borders
            assert answer.confidence.shape == LARGE
            assert answer.parameters["engine"] == "onnxruntime"
        both = np.stack([frame for frame, _ in frames(2)])
        with pytest.raises(Rejected, match="unexpected shape"):  # the engine takes one frame
            c.infer("road", both)
        assert len(large.service.regions.status("")) == (0 if shared is False else 1)
        only = c.infer("road", frame, outputs=("labels",))
        assert only.confidence is None
        # what came through a lane is a copy: the next frame does not change it
        before = answer.labels.copy()
        c.infer("road", frames(1, seed=9)[0][0])
        assert (answer.labels == before).all()
    assert large.service.regions.status("") == []
    assert not [name for name in os.listdir("/dev/shm") if f"-{os.getpid()}-" in name]


def test_tensors_of_any_model(repository, quick, serve, kind):
    b.publish(repository, "simple", b.simple(), foreign=True)
    server = serve(quick)
    x = np.arange(16, dtype=np.int32)[None]
    with client(kind, server.target) as c:
        answer = c.infer_tensors("simple", {"INPUT0": x, "INPUT1": 2 * x}, parameters={"priority": 1})
        assert (answer.outputs["OUTPUT0"] == 3 * x).all()
        assert (answer.outputs["OUTPUT1"] == -x).all()


def test_a_stream_answers_in_order_and_goes_on_after_a_refusal(large, kind):
    some = frames(9)
    sent = [frame for frame, _ in some]
    sent[4] = np.zeros((8, 8, 3), np.uint8)
    with client(kind, large.target) as c:
        answers = list(c.infer_stream("road", sent, source="front", window=3))
        assert len(answers) == 9
        for index, (answer, (_, labels)) in enumerate(zip(answers, some, strict=True)):
            if index == 4:
                assert isinstance(answer, Rejected)
                assert "unexpected shape" in answer.reason
            else:
                assert (answer.labels == labels).mean() > 0.95
        assert len(large.service.regions.status("")) <= 4
    assert large.service.regions.status("") == []


def test_a_stream_holds_back_a_sender_that_is_faster_than_the_reader(large, kind):
    taken = []

    def endless():
        frame = frames(1)[0][0]
        while True:
            taken.append(1)
            yield frame

    with client(kind, large.target) as c:
        stream = c.infer_stream("road", endless(), window=2)
        for _ in range(3):
            next(iter(stream))
        time.sleep(0.3)
        assert len(taken) <= 3 + 2 + 2
        stream.aclose() if kind == "asyncio" else stream.close()


def test_a_lane_that_is_borrowed_while_its_stream_is_closed_is_given_up(large, monkeypatch):
    entered, go = threading.Event(), threading.Event()
    borrow, calls = Client._borrow, []

    def slow(self, call):
        lane = borrow(self, call)
        calls.append(lane)
        if len(calls) == 2:
            entered.set()
            assert go.wait(PATIENCE)
        return lane

    monkeypatch.setattr(Client, "_borrow", slow)
    with Client(large.target, shared_memory=True) as c:
        stream = c.infer_stream("road", [frame for frame, _ in frames(3)])
        next(stream)
        assert entered.wait(PATIENCE)
        stream.close()
        go.set()
        until(lambda: calls[1]._descriptor < 0)  # ours is closed after the server's
        assert calls[1] not in c._segments._free
        until(lambda: len(large.service.regions.status("")) == len(c._segments._free))


def test_a_fault_of_the_callers_iterator_is_the_callers(large, kind):
    def broken():
        yield frames(1)[0][0]
        raise ZeroDivisionError

    with client(kind, large.target) as c:
        stream = iter(c.infer_stream("road", broken()))
        assert next(stream).version == 1
        with pytest.raises(ZeroDivisionError):
            next(stream)


def test_deadline_and_refusals_have_their_own_exceptions(repository, quick, serve, kind):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, queue=QueueConfig(limit=4)))
    frame = np.zeros((*b.SIZE, 3), np.uint8)
    gate, _ = held(server)
    with client(kind, server.target) as c:
        with pytest.raises(RpcError) as late:
            c.infer("road", frame, timeout=0.2)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.set()
        with pytest.raises(Rejected) as unknown:
            c.infer("nope", frame)
        assert unknown.value.code == "NOT_FOUND"
        with pytest.raises(Rejected, match="no previous version"):
            c.rollback("road")
        with pytest.raises(Rejected, match="unknown model"):
            c.frames("nope")
        assert c.infer("road", frame).version == 1


def test_the_swap_and_its_events(repository, large, kind):
    new = publish(repository)
    with client(kind, large.target) as c:
        with c.watch("road") as events:
            states = [event.state for event in c.submit("road", new, timeout=PATIENCE)]
            assert states[0] == "SUBMITTED"
            assert states[-1] == "LIVE"
            assert [next(events).state for _ in states] == states
        assert c.status()["models"]["road"]["live"] == new
        assert c.infer("road", frames(1)[0][0]).version == new
        assert [v["version"] for v in c.versions("road")] == [1, new]
        assert c.rollback("road").state == "ROLLED_BACK"
        assert [e.state for e in c.promote("road", new)][-1] == "LIVE"
        assert c.pin("road")["models"]["road"]["pinned"]
        assert not c.unpin("road")["models"]["road"]["pinned"]
        assert c.freeze("road", "driving")["models"]["road"]["frozen_reason"] == "driving"
        assert not c.unfreeze()["models"]["road"]["frozen"]
        assert {e.state for e in c.history("road")} >= {"LIVE", "ROLLED_BACK"}


def test_reset_goes_back_to_the_version_no_round_made(repository, large, kind):
    adapted = publish(repository, adaptation={"round": "2026-1"})
    with client(kind, large.target) as c:
        assert [e.state for e in c.promote("road", adapted)][-1] == "LIVE"
        events = list(c.reset("road"))
        assert (events[-1].state, events[-1].version) == ("LIVE", 1)
        assert "SHADOWING" not in [e.state for e in events]
        assert list(c.reset("road"))[-1].reason == "is live already"
        with pytest.raises(Rejected, match="not in the repository"):
            list(c.reset("nope"))


def test_reset_where_every_version_was_adapted(repository, quick, serve, kind):
    b.publish(repository, adaptation={"round": "1"})
    server = serve(quick)
    with client(kind, server.target) as c, pytest.raises(Rejected, match="released pack"):
        list(c.reset("road"))


def test_the_tap(large, kind):
    frame, _ = frames(1)[0]
    with client(kind, large.target) as c, c.frames("road", source="front") as tap:
        c.infer("road", frame, source="rear")
        answer = c.infer("road", frame, source="front")
        seen = next(tap)
        assert seen.source == "front"
        assert (seen.frame == frame).all()
        assert (seen.labels == answer.labels).all()
        assert seen.edge_bits is None


@pytest.fixture
def silent():
    """A peer that accepts connections and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_silent_peer_is_given_up(silent, kind):
    with client(kind, silent, deadline=0.3) as c:
        for call in (
            c.status,
            c.watch,
            lambda: c.drift("road"),
            lambda: c.frames("road"),
            lambda: list(c.submit("road", 1)),
            lambda: c.infer("road", np.zeros((160, 160, 3), np.uint8), timeout=0.3),
        ):
            with pytest.raises(RpcError) as silence:
                call()
            assert silence.value.code() in (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.UNAVAILABLE,
            )
        with pytest.raises(grpc.FutureTimeoutError):
            c.wait_ready(0.2)


@pytest.fixture
def slow_road(large):
    """The address of a relay to the server that passes nothing on for the first half second."""

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def relay():
        with listener.accept()[0] as near, socket.create_connection(("127.0.0.1", large.port)) as far:
            time.sleep(0.5)
            back = threading.Thread(target=pump, args=(far, near), daemon=True)
            back.start()
            pump(near, far)
            far.shutdown(socket.SHUT_RDWR)
            back.join(PATIENCE)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        threading.Thread(target=relay, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_a_connection_may_take_its_time(slow_road, kind):
    """A busy machine needs more than a moment for it: the first call waits and does not fail."""
    with client(kind, slow_road, shared_memory=False) as c:
        assert c.infer("road", frames(1)[0][0]).version == 1


def test_a_server_that_comes_back_is_found_again(repository, quick, serve, kind):
    publish(repository)
    server = serve(quick)
    frame = frames(1)[0][0]
    with client(kind, server.target) as c:
        assert c.infer("road", frame).version == 1
        port = server.port
        server.stop()
        with pytest.raises((RpcError, Rejected)):
            c.infer("road", frame, timeout=2)
        serve(dataclasses.replace(quick, port=port))

        def back():
            try:
                return c.infer("road", frame, timeout=PATIENCE).version == 1
            except (RpcError, Rejected):
                return False

        until(back)
        assert c.infer("road", frame).version == 1  # and through a new lane


def test_a_call_that_is_cancelled_takes_its_lane_out_of_use(large):
    async def main():
        async with AsyncClient(large.target) as c:
            frame = frames(1)[0][0]
            await c.infer("road", frame)
            tasks = [asyncio.ensure_future(c.infer("road", frame)) for _ in range(20)]
            await asyncio.sleep(0.01)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(d, Answer | asyncio.CancelledError) for d in done)
            assert all(isinstance(d, Answer) for d in done[1::2])
            assert (await c.infer("road", frame)).version == 1

    asyncio.run(main())
    assert large.service.regions.status("") == []


def test_a_call_that_is_cancelled_while_its_lane_is_registered_leaves_no_region(large, monkeypatch):
    """The server has the region, and the caller goes before it hears of that: the client takes it back."""
    entered, go = threading.Event(), threading.Event()
    register = ShmRegistry.register

    def slow(self, *arguments):
        register(self, *arguments)
        entered.set()
        assert go.wait(PATIENCE)

    monkeypatch.setattr(ShmRegistry, "register", slow)

    async def main():
        async with AsyncClient(large.target, shared_memory=True) as c:
            call = asyncio.ensure_future(c.infer("road", frames(1)[0][0]))
            await asyncio.to_thread(entered.wait, PATIENCE)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            go.set()

    asyncio.run(main())
    assert large.service.regions.status("") == []


KILLED = """
import sys, time
import numpy as np
from runtime.client import Client
client = Client(sys.argv[1], shared_memory=True)
client.infer("road", np.zeros((96, 256, 3), np.uint8))
print("done", flush=True)
time.sleep(600)
"""


def test_lanes_of_a_client_that_was_killed_are_given_back(large):
    command = [sys.executable, "-c", KILLED, large.target]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "done\n"
    regions = large.service.regions
    (lost,) = regions.status("")
    with Client(large.target) as c:
        frame = frames(1)[0][0]
        c.infer("road", frame)
        assert len(regions.status("")) == 2  # the other client lives: its lane stays
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        process.stdout.close()
        with Client(large.target) as other:
            other.infer("road", frame)
            assert lost.name not in [region.name for region in regions.status("")]
        assert c.infer("road", frame).version == 1
        assert len(regions.status("")) == 1


@pytest.mark.parametrize("letter", ["a", "ß", "\N{ROLLING ON THE FLOOR LAUGHING}"])
def test_a_refusal_of_something_with_a_long_name_has_its_own_status(large, letter):
    with Client(large.target) as c, pytest.raises(Rejected) as caught:
        c.infer("road", frames(1)[0][0], outputs=(letter * 20000,), timeout=PATIENCE)
    assert caught.value.code == "INVALID_ARGUMENT"
    assert caught.value.reason.startswith(f"unexpected inference output '{letter * 100}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("frame", "remedy"),
    [
        (np.zeros((512, 1024), np.uint8), "numpy.repeat(grey[..., None], 3, -1)"),
        (np.zeros((512, 1024, 1), np.uint8), "numpy.repeat(grey, 3, -1)"),
        (np.zeros((2, 512, 1024), np.uint8), "numpy.repeat(grey[..., None], 3, -1)"),
        (np.zeros((2, 16, 32, 1), np.uint8), "numpy.repeat(grey, 3, -1)"),
        (np.zeros((16, 32, 4), np.uint8), "frame[..., :3]"),
        (np.zeros((2, 16, 32, 4), np.uint8), "frame[..., :3]"),
        (np.zeros((3, 16, 32), np.uint8), "numpy.moveaxis(frame, -3, -1)"),
        (np.zeros((2, 3, 16, 32), np.uint8), "numpy.moveaxis(frame, -3, -1)"),
        (np.zeros((), np.uint8), "infer_tensors"),
        (np.zeros(7, np.uint8), "infer_tensors"),
        (np.zeros((1, 1, 16, 32, 3), np.uint8), "infer_tensors"),
        ([[1, 2, 3]], "numpy.asarray(frame)"),
        (None, "numpy.asarray(frame)"),
    ],
)
def test_a_frame_of_another_shape_is_refused_with_the_remedy(kind, frame, remedy):
    """Before anything is sent: nobody listens here.  A grey picture was taken for as many frames as it has
    rows.
    """
    with client(kind, "127.0.0.1:9") as c:
        with pytest.raises(ValueError, match=re.escape(remedy)) as error:
            c.infer("road", frame)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_refuses_a_grey_picture_too(kind, repository, quick, serve):
    b.publish(repository)
    with client(kind, serve(quick).target) as c:
        frames = [np.zeros((*b.SIZE, 3), np.uint8), np.zeros(b.SIZE, np.uint8)]
        with pytest.raises(ValueError, match="make a grey picture one of three channels"):
            list(c.infer_stream("road", frames))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"source": "\ud800"}, "parameter 'source' is"),
        ({"request_id": "a\udfff"}, "request_id is"),
    ],
)
def test_text_that_no_message_can_carry_is_refused_in_a_line(given, says):
    with Client("127.0.0.1:9") as c, pytest.raises(ValueError, match=says) as error:
        c.infer("road", np.zeros((16, 32, 3), np.uint8), **given)
    assert str(error.value).isascii()


@pytest.mark.parametrize("value", [1 << 64, -(1 << 63) - 1, 10**30])
def test_a_parameter_beyond_64_bits_is_refused_with_the_remedy(value):
    with Client("127.0.0.1:9") as c, pytest.raises(ValueError, match="send it as text"):
        c.infer_tensors("road", {"x": np.zeros(1)}, parameters={"n": value})


def test_a_parameter_of_64_bits_arrives():
    from protos import inference_pb2 as pb
    from runtime.client import messages

    for value in (0, -1, (1 << 63) - 1, -(1 << 63), 1 << 63, (1 << 64) - 1):
        request = pb.ModelInferRequest.FromString(messages.tensors("m", {}, (), {"n": value}))
        (parameter,) = request.parameters.values()
        assert getattr(parameter, parameter.WhichOneof("parameter_choice")) == value
