"""Calls whose message does not come, calls without a token, and who is served meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from runtime.client import Client, Rejected
from runtime.config import SecurityConfig
from runtime.rpc import admission
from runtime.rpc.admission import Lane, Refusals
from runtime.rpc.thread_pool import RpcThreadPool
from tests.runtime import builders as b
from tests.waits import PATIENCE

KSERVE, CONTROL = "/inference.GRPCInferenceService/", "/roadworthy.v1.Roadworthy/"
FRAME = np.zeros((*b.SIZE, 3), np.uint8)
OWN = (("grpc.use_local_subchannel_pool", 1),)
ANY = (f"{KSERVE}ServerLive", "/grpc.health.v1.Health/Check", f"{CONTROL}Status")


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.005)


@contextlib.contextmanager
def half_open(target, method, number, *, connections=1, streams=False):
    """Calls that are begun and send no message; the list of them."""
    stop = threading.Event()

    def never():
        stop.wait(120)
        return
        yield b""

    channels = [grpc.insecure_channel(target, options=OWN) for _ in range(connections)]
    calls = []
    for index in range(number):
        channel = channels[index % connections]
        if streams:
            calls.append(channel.stream_stream(method)(never(), timeout=100))
        else:
            calls.append(channel.stream_unary(method).future(never(), timeout=100))
    try:
        yield calls
    finally:
        stop.set()
        for channel in channels:
            channel.close()


def answered(target, *methods, token="", seconds=60.0):
    """Waits until each method is answered; a call may be refused while the oldest one has its grace."""
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    with grpc.insecure_channel(target, options=OWN) as channel:
        for method in methods:
            end = time.monotonic() + seconds
            while True:
                try:
                    channel.unary_unary(method)(b"", timeout=20, metadata=metadata)
                    break
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > end:
                        raise
                    time.sleep(0.05)


def refused(server):
    return server._refusals.snapshot()


def test_half_open_calls_without_a_token_hold_no_thread(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, security=SecurityConfig(tokens={"good": ["infer", "control"]})))
    methods = (f"{KSERVE}ModelInfer", f"{KSERVE}ModelStreamInfer", f"{CONTROL}Watch", f"{CONTROL}Status")
    for method in methods:
        with half_open(server.target, method, 50, streams=method.endswith(("Infer", "Watch"))) as calls:
            until(lambda calls=calls: all(call.done() for call in calls))
            assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    assert refused(server)["unauthenticated"] == 200
    lanes = server._admission._lanes
    assert all(lane.pool._made == 0 and not lane.waiting for lane in lanes if lane.name != "health")
    answered(server.target, *ANY, token="good")


@pytest.mark.parametrize("connections", [1, 40])
@pytest.mark.parametrize(
    ("method", "streams"),
    [("ModelInfer", False), ("ModelStreamInfer", True), ("RepositoryIndex", False)],
)
def test_half_open_calls_shut_out_nobody(repository, quick, serve, method, streams, connections):
    """No tokens here: whoever comes may hold threads, but not for long, and those of one kind of calls."""
    b.publish(repository)
    server = serve(quick)
    with (
        half_open(server.target, KSERVE + method, 700, connections=connections, streams=streams),
        Client(server.target, shared_memory=False) as client,
    ):
        until(lambda: sum(len(lane.waiting) for lane in server._admission._lanes) >= 40)
        answered(server.target, *ANY)

        until(_admitted(lambda: client.infer("road", FRAME, timeout=PATIENCE).version == 1))
        until(_admitted(lambda: next(client.infer_stream("road", [FRAME])).version == 1))
    assert refused(server)["no-message"] > 0 or method == "ModelInfer"  # which has room for them all


def _admitted(call):
    def attempt():
        try:
            return call()
        except Rejected as error:
            if "calls of this kind are under way" not in error.reason:
                raise
            return False

    return attempt


def test_half_open_health_checks_do_not_shut_out_health(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    with half_open(server.target, "/grpc.health.v1.Health/Check", 500):
        until(lambda: any(len(lane.waiting) > 100 for lane in server._admission._lanes))
        answered(server.target, *ANY)
    with half_open(server.target, "/grpc.health.v1.Health/Watch", 500, streams=True):
        answered(server.target, *ANY)


def test_a_message_has_a_time_limit(repository, quick, serve, caplog):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, message_timeout=0.4))
    with (
        half_open(server.target, f"{KSERVE}ModelInfer", 3) as unary,
        half_open(server.target, f"{KSERVE}ModelStreamInfer", 3, streams=True) as streams,
        Client(server.target, shared_memory=False) as client,
        client.watch() as watching,  # the limit is of the first message, and not of a stream
    ):
        until(lambda: all(call.done() for call in (*unary, *streams)))
        assert {call.code() for call in (*unary, *streams)} == {grpc.StatusCode.CANCELLED}
        assert client.infer("road", FRAME).version == 1
        client.freeze("road", "driving")
        client.unfreeze("road")
        assert watching is not None
    assert refused(server)["no-message"] == 6
    with caplog.at_level(logging.WARNING, "roadworthy.edge"):
        server.stop()
    assert not any(lane.waiting for lane in server._admission._lanes)


def test_a_stream_may_rest_after_its_first_message(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, message_timeout=0.2))
    request = pb.ModelInferRequest(model_name="road")
    request.inputs.add(name="frame", datatype="UINT8", shape=[1, *FRAME.shape])
    request.raw_input_contents.append(FRAME.tobytes())
    message, go = request.SerializeToString(), threading.Event()

    def messages():
        yield message
        go.wait(60)
        yield message

    with grpc.insecure_channel(server.target) as channel:
        answers = channel.stream_stream(f"{KSERVE}ModelStreamInfer")(messages())
        assert next(answers)
        server._admission.look(time.monotonic() + 100)
        go.set()
        assert next(answers)
        assert list(answers) == []


def test_streams_of_one_kind_do_not_take_the_places_of_another(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, streams=2))
    over = threading.Event()

    def frames():
        yield FRAME
        over.wait(60)

    with Client(server.target, shared_memory=False) as client, contextlib.ExitStack() as stack:
        stack.callback(over.set)
        held = [client.infer_stream("road", frames()) for _ in range(2)]
        assert all(next(stream).version == 1 for stream in held)
        with pytest.raises((Rejected, grpc.RpcError), match="2 streams are open"):
            next(client.infer_stream("road", [FRAME]))
        kinds = (client.watch, lambda: client.frames("road"), lambda: client.watch_round("road"))
        for kind in kinds:
            for _ in range(2):
                stack.enter_context(kind())
        assert list(client.submit("road", 1))[-1].state == "LIVE"


def test_a_malformed_message_is_counted_and_leaves_no_traceback(repository, quick, serve, caplog):
    b.publish(repository)
    server = serve(quick)
    methods = (
        f"{CONTROL}Status",
        f"{KSERVE}ModelMetadata",
        "/grpc.health.v1.Health/Check",
        f"{CONTROL}Watch",
    )
    with grpc.insecure_channel(server.target) as channel:
        for method in methods:
            with pytest.raises(grpc.RpcError) as error:
                list(channel.unary_stream(method)(b"\xff\xff\xff"))  # one answer is a stream as well
            assert error.value.code() is grpc.StatusCode.INTERNAL
            assert error.value.details() == "Exception deserializing request!"
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(f"{KSERVE}Nonsense")(b"")
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert refused(server)["malformed"] == len(methods)
    assert refused(server)["unknown-method"] == 1
    server.stop()
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not any(record.exc_info for record in lines)
    assert sum("(malformed)" in record.getMessage() for record in lines) <= 2


def test_a_call_that_ends_without_its_message(repository, quick, serve):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, max_message=1 << 16))
    with grpc.insecure_channel(server.target) as channel:
        with pytest.raises(grpc.RpcError) as error:
            channel.stream_unary(f"{KSERVE}ServerLive")(iter(()))
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary(f"{KSERVE}ModelInfer")(bytes(1 << 17))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    until(lambda: refused(server)["incomplete"] == 2)


def test_what_is_refused_is_in_the_metrics_and_the_log(repository, quick, serve, caplog):
    import urllib.request

    b.publish(repository)
    server = serve(quick)
    with grpc.insecure_channel(server.target) as channel, contextlib.suppress(grpc.RpcError):
        channel.unary_unary(f"{KSERVE}Nonsense")(b"")
    text = urllib.request.urlopen(f"http://{server.metrics_target}/metrics").read().decode()
    assert 'roadworthy_calls_refused_total{reason="unknown-method"} 1.0' in text
    assert 'roadworthy_calls_refused_total{reason="unauthenticated"} 0.0' in text
    until(lambda: any("1 calls refused (unknown-method)" in r.getMessage() for r in caplog.records))


def test_one_line_in_a_while_about_each_kind_of_refusal(caplog):
    refusals = Refusals()
    for _ in range(1000):
        refusals.count("unauthenticated", "ipv4:10.0.0.1:1\nforged")
    refusals.tell(0.0)
    refusals.count("unauthenticated", "x")
    refusals.count("malformed", "y")
    refusals.tell(1.0)
    refusals.tell(admission.TELL + 1)
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in said] == [
        "1000 calls refused (unauthenticated)",
        "1 calls refused (malformed)",
        "1 calls refused (unauthenticated)",
    ]
    assert "\n" not in said[0]


def test_a_full_lane_gives_up_what_has_waited_longest_and_nothing_younger():
    class Call:
        ended = False

        def cancel(self):
            self.ended = True

        def peer(self):
            return "x"

    lane, refusals = Lane("x", 2), Refusals()
    door = admission.Admission(lambda _: lane, lambda *_: None, refusals, 30.0)
    gate = threading.Event()
    for _ in range(2):
        lane.pool.submit(gate.wait, 60)
    assert not lane.has_room()
    assert not door._make_room(lane)  # both work, and none waits for its message
    young, old, now = Call(), Call(), time.monotonic()
    lane.waiting[young] = now + 1000
    assert not door._make_room(lane)
    lane.waiting.clear()
    lane.waiting |= {old: now - 2 * admission.GRACE, young: now + 1000}
    assert door._make_room(lane)
    assert (old.ended, young.ended) == (True, False)
    assert not door._make_room(lane)
    assert refusals.snapshot()["no-message"] == 1
    gate.set()
    until(lane.has_room)
    lane.pool.shutdown()
    door.stop()


def test_grpc_takes_our_pool_for_one_of_its_own():
    """It ignores the threads of a method that are of another class."""
    from concurrent.futures import ThreadPoolExecutor

    assert isinstance(RpcThreadPool(1, "x"), ThreadPoolExecutor)


def test_the_end_of_a_call_waits_for_no_lock_of_ours(repository, quick, serve):
    """gRPC tells it on the thread that every other call waits for."""
    b.publish(repository)
    server = serve(quick)
    scheduler = server.service.models.host("road")._scheduler
    with Client(server.target) as client, contextlib.ExitStack() as stack:
        watch = stack.enter_context(client.watch())
        (subscription,) = [each for each in server.service.bus._subscriptions if each.model == ""][-1:]
        request = pb.ModelInferRequest(model_name="road")
        request.inputs.add(name="frame", datatype="UINT8", shape=[1, *FRAME.shape])
        request.raw_input_contents.append(FRAME.tobytes())
        channel = stack.enter_context(grpc.insecure_channel(server.target, options=OWN))
        with subscription._changed, scheduler._lock:
            call = channel.unary_unary(f"{KSERVE}ModelInfer").future(request.SerializeToString())
            time.sleep(0.2)  # it comes to the lock, or has not come yet: right either way
            call.cancel()
            watch.close()
            for _ in range(3):
                answered(server.target, *ANY[:2], seconds=20.0)
    until(lambda: server.service.account.snapshot().in_flight == 0)
