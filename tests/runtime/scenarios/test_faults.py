"""Faults under a running server: a live engine that hangs, clients that vanish."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
import time
import urllib.request

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from runtime.client import Client, Rejected
from runtime.config import WatchConfig
from runtime.serving.hung_runs import HungRunDetector
from runtime.swap.watch import Baseline, Watch
from tests.runtime import builders as b
from tests.waits import PATIENCE, until

FRAME = np.zeros((*b.SIZE, 3), np.uint8)
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


@pytest.fixture
def gate():
    """Opened at the end, whatever happened: a thread that hangs would hold the stop of the server."""
    event = threading.Event()
    yield event
    event.set()


def hang(server, gate):
    engine = server.service.models.host("road").live.engine
    run = engine.run
    engine.run = lambda inputs, names: gate.wait(5 * PATIENCE) and run(inputs, names)


@contextlib.contextmanager
def stuck(server, version=""):
    """A request that hangs in the engine; its caller gives up at the end of the block."""
    host = server.service.models.host("road")
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer").future(request(version))
        until(lambda: host.runs())
        yield
        call.cancel()


def request(version=""):
    message = pb.ModelInferRequest(model_name="road", model_version=version)
    message.inputs.add(name="frame", datatype="UINT8", shape=[1, *FRAME.shape])
    message.raw_input_contents.append(FRAME.tobytes())
    return message.SerializeToString()


def test_a_live_engine_that_hangs_holds_up_its_own_model_and_nothing_else(repository, quick, serve, gate):
    b.publish(repository)
    b.publish(repository, "rear")
    server = serve(dataclasses.replace(quick, drain=0.3))
    hang(server, gate)
    account = server.service.models.host("road").account
    with Client(server.target) as client, Client(server.target) as other, stuck(server):
        for _ in range(2):  # one hangs in the engine, two wait for it; each caller is told in time
            with pytest.raises((Rejected, grpc.RpcError), match="Deadline Exceeded"):
                client.infer("road", FRAME, timeout=0.5)
        assert other.infer("rear", FRAME, timeout=PATIENCE).version == 1
        until(lambda: account.snapshot().in_flight == 1)  # those that waited are off the queue
        stop = threading.Thread(target=lambda: stops.append(server.stop()))
        stops: list[bool] = []
        stop.start()
        stop.join(PATIENCE)
        assert not gate.is_set()
    assert stops == [False]  # it says that something was still in flight, and does not wait for it
    now = account.snapshot()
    assert now.accepted == now.answered + sum(now.rejected.values()) + now.in_flight
    assert now.in_flight == 1


def hanging(quick, hang=15.0, **watch):
    """Runs hang from `hang` seconds on; a drain does not wait for them."""
    engine = dataclasses.replace(quick.engine, hang=hang)
    return dataclasses.replace(quick, engine=engine, watch=WatchConfig(**watch), drain=0.3)


class Looks:
    """The server's looks at its runs by a clock of our own: what runs at the first hangs at the second."""

    def __init__(self, server):
        self.hangs = server.service._hangs
        self.hangs.stop()
        self.hangs.join(PATIENCE)
        assert not self.hangs.is_alive()

    def __call__(self):
        for seconds in (0.0, 15.0):
            self.hangs.look(seconds)

    def again(self):
        self.hangs.look(0.0)


def test_the_server_looks_by_itself(repository, quick, serve, gate):
    b.publish(repository)
    server = serve(hanging(quick, hang=0.2, seconds=0.0))
    hang(server, gate)
    with stuck(server):
        until(lambda: server.service.models.host("road").stuck)


def test_a_live_engine_that_hangs_in_its_watch_window_is_rolled_back(repository, quick, serve, gate):
    """And the model answers, though the thread of the run that hangs is lost."""
    b.publish(repository)
    server = serve(hanging(quick, seconds=5 * PATIENCE))
    host, look = server.service.models.host("road"), Looks(server)
    with Client(server.target) as client:
        assert list(client.promote("road", b.publish(repository)))[-1].state == "LIVE"
        hang(server, gate)
        with stuck(server):
            look()
            until(lambda: host.live.version == 1)
        look.again()  # the run that hangs is not the live version's any more: its permit is handed on
        answer = client.infer("road", FRAME, timeout=PATIENCE)
        assert answer.version == 1
        assert server.service.ready()
        until(lambda: repository.history("road")[-1]["state"] == "LIVE")  # told after it is done
        back = [e for e in client.history("road") if e.state == "ROLLED_BACK"]
        assert [(e.version, e.check) for e in back] == [(2, "watch-hang")]
        assert "has not ended after 15 s" in back[0].reason
        account = server.service.models.host("road").account.snapshot()
        assert account.in_flight == 1  # it is still in there, and the books say so
        gate.set()
        until(lambda: host.account.snapshot().in_flight == 0)


def test_a_hang_that_begins_in_the_window_counts_after_it(repository, quick, serve, gate):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, drain=0.3))
    hang(server, gate)
    host = server.service.models.host("road")
    back = []
    with stuck(server):
        config = hanging(quick, seconds=0.05)
        watch = Watch(host, host.live, Baseline(0.0, 0.0), config, lambda *what: back.append(what))
        watch.start()
        watch.join(0.5)
        assert watch.is_alive()  # the window is over, the run is not
        host.live.hung = True
        watch.join(PATIENCE)
    assert [(slot.version, check) for slot, check, *_ in back] == [(1, "watch-hang")]


def test_a_live_engine_that_hangs_outside_of_it_is_seen_and_nothing_piles_up(repository, quick, serve, gate):
    b.publish(repository)
    server = serve(hanging(quick, seconds=0.0))
    hang(server, gate)
    host, look = server.service.models.host("road"), Looks(server)
    ends = []

    def send():
        with Client(server.target) as client:
            try:
                ends.append(client.infer("road", FRAME).version)  # no deadline at all
            except Rejected as refusal:
                ends.append(refusal.reason)

    senders = [threading.Thread(target=send, daemon=True) for _ in range(5)]
    for sender in senders:
        sender.start()
    until(lambda: host.pending == 4)
    look()
    until(lambda: len(ends) == 4)  # one is in the engine; those that wait are told
    assert set(ends) == {"a run of 'road' version 1 does not end; the request was not run"}
    with Client(server.target) as client, grpc.insecure_channel(server.target) as channel:
        kserve = GRPCInferenceServiceStub(channel)
        assert not kserve.ModelReady(pb.ModelReadyRequest(name="road")).ready
        assert not kserve.ServerReady(pb.ServerReadyRequest()).ready
        assert kserve.ServerLive(pb.ServerLiveRequest()).live
        check = health_pb2_grpc.HealthStub(channel).Check
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        until(lambda: check(health_pb2.HealthCheckRequest()).status == not_serving)
        status = client.status()["models"]["road"]
        assert (status["ready"], status["live"]) == (False, 1)
        assert "has not ended after 15 s; roll back" in status["reason"]
        assert [(e.check, e.version) for e in client.history("road") if e.state == "NOTE"] == [("hang", 1)]
        text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics").read().decode()
        assert 'roadworthy_hung{model="road"} 1.0' in text
        assert 'roadworthy_model_ready{model="road"} 0.0' in text
        (longest,) = re.findall(r'roadworthy_longest_run_seconds{model="road"} (\S+)', text)
        assert float(longest) > 0
        gate.set()  # it comes back after all
        until(lambda: len(ends) == 5 and ends[-1] == 1)
        until(lambda: not host.runs())
        look.again()
        assert server.service.ready()
        assert client.infer("road", FRAME, timeout=PATIENCE).version == 1
        assert [e.reason for e in client.history("road")][-1] == "it runs again"
    assert host.account.snapshot().in_flight == 0


def test_a_warm_version_that_hangs_does_not_take_the_live_one_along(repository, quick, serve, gate):
    b.publish(repository)
    server = serve(hanging(quick, seconds=0.0))
    look = Looks(server)
    hang(server, gate)  # the one that will be warm
    with Client(server.target) as client:
        assert list(client.promote("road", b.publish(repository)))[-1].state == "LIVE"
        with stuck(server, version="1"):
            look()
        assert client.infer("road", FRAME, timeout=PATIENCE).version == 2  # it has the permit
        with pytest.raises(Rejected, match="version 1 does not end"):
            client.infer("road", FRAME, version=1, timeout=PATIENCE)
        assert server.service.ready()


def test_only_time_that_was_watched_counts_as_hanging(repository, quick, serve, gate):
    """A process that was stopped for an hour has not hung for an hour."""
    b.publish(repository)
    server = serve(dataclasses.replace(quick, drain=0.3))
    hang(server, gate)
    host = server.service.models.host("road")
    with stuck(server):
        pass
    told = []
    hangs = HungRunDetector(lambda: [host], 15.0, lambda *what: told.append(what))
    begun = host.runs()[0][0].started
    for _ in range(14):
        hangs.look(1.0)
    assert time.monotonic_ns() > begun
    assert (told, host.stuck) == ([], "")
    hangs.look(1.0)
    assert (told, host.stuck) == ([], "")
    hangs.look(1.0)
    assert told == [("road", 1, "a run has not ended after 15 s")]
    assert host.stuck


def test_a_stream_whose_client_is_gone_does_not_wait_behind_an_engine_that_hangs(
    repository, quick, serve, gate
):
    """One request hangs; the other streams' requests wait, until their streams end by deadline or word."""
    b.publish(repository)
    server = serve(dataclasses.replace(quick, drain=0.3))
    hang(server, gate)
    account = server.service.models.host("road").account
    host = server.service.models.host("road")
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream(STREAM)
        first = call(iter([request()]))
        until(lambda: len(host.runs()) == 1)
        gone = call(iter([request()]))
        until(lambda: host.pending == 1)
        gone.cancel()
        until(lambda: host.pending == 0 and account.snapshot().in_flight == 1)
        assert account.snapshot().rejected == {"cancelled": 1}
        for seconds in (1.0, 4.0, 16.0, 64.0):  # long enough for the request to come and to wait
            with pytest.raises(grpc.RpcError, match=r"DEADLINE_EXCEEDED|Deadline Exceeded"):
                list(call(iter([request()]), timeout=seconds))
            if account.snapshot().accepted > 2:
                break
        until(lambda: host.pending == 0 and account.snapshot().in_flight == 1)
        first.cancel()
    rejected = account.snapshot().rejected
    assert rejected.get("cancelled", 0) + rejected.get("deadline", 0) == account.snapshot().accepted - 1 > 1


def test_after_a_hang_the_model_answers_again_and_the_account_is_whole(repository, quick, serve, gate):
    b.publish(repository)
    server = serve(quick)
    hang(server, gate)
    account = server.service.account
    with Client(server.target) as client:
        with stuck(server):
            pass
        gate.set()
        assert client.infer("road", FRAME, timeout=PATIENCE).version == 1
    until(lambda: account.snapshot().in_flight == 0)
    now = account.snapshot()
    assert now.accepted == now.answered + sum(now.rejected.values()) == 2
    assert server.service.models.host("road").live.held == 0


def test_a_client_that_vanishes_in_the_middle_of_a_stream_leaves_nothing(repository, quick, serve, gate):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, streams=2))
    hang(server, gate)
    message = request()
    for _ in range(3):  # more than there may be: one that is gone must not count
        channel = grpc.insecure_channel(server.target)
        answers = channel.stream_stream(STREAM)(iter([message] * 5))
        until(lambda: server.service.account.snapshot().in_flight >= 1)
        answers.cancel()
        channel.close()
        gate.set()
        until(lambda: server.service.account.snapshot().in_flight == 0)
        gate.clear()
    gate.set()
    until(lambda: server.service.models.host("road").live.held == 0)
    with grpc.insecure_channel(server.target) as channel:

        def whole():
            try:
                return len(list(channel.stream_stream(STREAM)(iter([message] * 2), timeout=PATIENCE))) == 2
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # the last one is not gone yet
                    return False
                raise

        until(whole)


def test_servers_that_come_and_go_in_one_process_leave_no_threads(repository, quick, serve):
    b.publish(repository)
    for _ in range(2):
        server = serve(quick)
        with Client(server.target) as client:
            client.infer("road", FRAME)
        server.stop()
        until(lambda: not [t for t in threading.enumerate() if t.name.startswith("grpc_")])
