"""grpc.health.v1: messages when the status changes, and a server that outlives those who watch it."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import random
import threading
import time

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime.client import Client
from runtime.rpc import health
from runtime.rpc.inference import SERVICE as INFERENCE
from tests.runtime import builders as b
from tests.waits import PATIENCE

OWN = ("grpc.use_local_subchannel_pool", 1)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
FRAME = np.zeros((*b.SIZE, 3), np.uint8)


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.005)


@contextlib.contextmanager
def stub(server):
    with grpc.insecure_channel(server.target, options=(OWN,)) as channel:
        yield health_pb2_grpc.HealthStub(channel)


def asked(service=""):
    return health_pb2.HealthCheckRequest(service=service)


@contextlib.contextmanager
def vehicles(server, number, stay, stop=None):
    """Clients with gRPC's own health checking that connect, call once and leave; a list with one entry a
    connection.
    """
    stop, ended = stop or threading.Event(), []
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": INFERENCE},
    }
    options = (("grpc.service_config", json.dumps(config)), OWN)

    def drive(seed):
        chance = random.Random(seed)
        while not stop.is_set():
            with grpc.insecure_channel(server.target, options=options) as channel:
                with contextlib.suppress(grpc.RpcError):
                    channel.unary_unary(f"/{INFERENCE}/ServerLive")(b"", timeout=3)
                time.sleep(chance.uniform(0, stay))
            ended.append(seed)

    threads = [threading.Thread(target=drive, args=(seed,), daemon=True) for seed in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield ended
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


def test_a_watch_has_one_message_for_each_change(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    seen = []
    with stub(server) as stubbed:
        until(lambda: stubbed.Check(asked()).status == SERVING)
        watch = stubbed.Watch(asked(INFERENCE))

        def read():
            with contextlib.suppress(grpc.RpcError):
                seen.extend(each.status for each in watch)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        until(lambda: len(seen) == 1)
        for serving in (True, True, False, False, True):  # what the keeper of the health says again and again
            server._health.set(serving)
        until(lambda: seen[-1] == SERVING)
        server.stop()
        reader.join(PATIENCE)
        assert watch.code() is grpc.StatusCode.UNAVAILABLE
    assert seen[0] == SERVING
    assert seen[-1] == NOT_SERVING
    assert all(one != other for one, other in itertools.pairwise(seen)), seen


def test_a_service_that_is_not_known(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    with stub(server) as stubbed:
        watch = stubbed.Watch(asked("nonsense"))
        assert next(watch).status == UNKNOWN  # and the call goes on, as the protocol has it
        assert watch.is_active()
        with pytest.raises(grpc.RpcError) as refused:
            stubbed.Check(asked("nonsense"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        watch.cancel()


def test_watches_that_come_and_go_hold_up_nobody(repository, quick, serve):
    """A lock that a sender holds, and that the end of a call wants, would stop the server here."""
    b.publish(repository)
    server = serve(quick)
    with vehicles(server, 6, 0.02) as left, stub(server) as stubbed, Client(server.target) as client:
        opened = 0
        while opened < 400 or len(left) < 60:
            watch = stubbed.Watch(asked(INFERENCE))
            time.sleep(0.0005)
            watch.cancel()
            opened += 1
            server._health.set(bool(opened % 2))
            if opened % 50 == 0:
                assert client.infer("road", FRAME, timeout=PATIENCE).version == 1
    until(lambda: not server._health._watchers)
    assert server.stop()


def test_no_thread_is_held_by_a_watch(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    with contextlib.ExitStack() as stack:
        stubs = [stack.enter_context(stub(server)) for _ in range(5)]
        stubbed = stubs[0]
        watches = [each.Watch(asked()) for each in stubs for _ in range(60)]  # more than health has threads
        assert all(next(watch).status in (SERVING, NOT_SERVING) for watch in watches)
        until(lambda: stubbed.Check(asked()).status == SERVING)
        assert server.stop()
        assert [list(_statuses(watch))[-1:] for watch in watches] == [[NOT_SERVING]] * 300


def _statuses(watch):
    with contextlib.suppress(grpc.RpcError):
        for each in watch:
            yield each.status


@pytest.mark.parametrize("limit", ["WATCHERS", "OF_ONE"])
def test_there_is_a_limit_to_watchers(repository, quick, serve, monkeypatch, limit):
    monkeypatch.setattr(health, limit, 3)
    b.publish(repository)
    server = serve(quick)
    with stub(server) as stubbed:
        watches = [stubbed.Watch(asked()) for _ in range(3)]
        for watch in watches:
            next(watch)
        with pytest.raises(grpc.RpcError) as refused:
            next(stubbed.Watch(asked()))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with stub(server) as other:
            watch = other.Watch(asked())
            if limit == "OF_ONE":  # another connection has its own
                assert next(watch).status in (SERVING, NOT_SERVING)
            watch.cancel()
        watches[0].cancel()
        until(lambda: len(server._health._watchers) <= 2)
        assert next(stubbed.Watch(asked())).status in (SERVING, NOT_SERVING)


def test_a_watcher_that_takes_nothing_is_sent_away():
    """`send` returns when the transport has the message: one that stalls holds one sender, for a time."""
    service, stalled, got = health.Health(("",)), threading.Event(), []

    class Context:
        def __init__(self, ended):
            self.ended = ended

        def add_callback(self, callback):
            self.callback = callback
            return True

        def peer(self):
            return "ipv4:192.0.2.1:9"

        def cancel(self):
            self.ended.set()
            self.callback()

    service.set(True)
    service.watch(asked(), Context(stalled), lambda message: stalled.wait(PATIENCE))
    service.watch(asked(), Context(threading.Event()), lambda message: got.append(message.status))
    until(lambda: got == [SERVING])
    service.set(False)
    until(lambda: got == [SERVING, NOT_SERVING])  # the other one's sender is not waited for
    now = time.monotonic()
    service.look(now)
    assert not stalled.is_set()
    service.look(now + health.STALL + 1)
    assert stalled.is_set()
    assert len(service._watchers) == 1
    service._watchers.clear()
    service.close(0.0)


def _rounds(repository, quick, serve, number):
    """Servers that start and stop while vehicles watch, call and leave.  Returns the longest stop in s."""
    b.publish(repository)
    longest = 0.0
    for index in range(number):
        stop = threading.Event()
        server = serve(quick)
        with vehicles(server, 8, 0.01, stop) as left, stub(server) as stubbed:
            watches = [stubbed.Watch(asked()) for _ in range(8)]
            held = [next(watch).status for watch in watches]
            until(lambda: len(left) >= 4)
            for watch in watches[: index % 8]:  # some end in the moment of the stop
                threading.Thread(target=watch.cancel, daemon=True).start()
            begun = time.monotonic()
            assert server.stop()
            longest = max(longest, time.monotonic() - begun)
            assert len(held) == 8
    return longest


def test_a_server_stops_whoever_watches(repository, quick, serve):
    assert _rounds(repository, quick, serve, 5) < 30


@pytest.mark.slow
def test_two_hundred_servers_stop_whoever_watches(repository, quick, serve):
    faulthandler.dump_traceback_later(1500, exit=True)
    try:
        assert _rounds(repository, quick, serve, 200) < 30
    finally:
        faulthandler.cancel_dump_traceback_later()
