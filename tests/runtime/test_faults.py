"""Faults under a running server: a live engine that hangs, clients that vanish."""

from __future__ import annotations

import dataclasses
import threading
import time

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from runtime.client import Client, Rejected
from tests.runtime import builders as b

FRAME = np.zeros((*b.SIZE, 3), np.uint8)
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "never happened"
        time.sleep(0.005)


@pytest.fixture
def gate():
    """Opened at the end, whatever happened: a thread that hangs would hold the stop of the server."""
    event = threading.Event()
    yield event
    event.set()


def hang(server, gate):
    engine = server.service.host("road").live.engine
    run = engine.run
    engine.run = lambda inputs, names: gate.wait(60) and run(inputs, names)


def request():
    message = pb.ModelInferRequest(model_name="road")
    message.inputs.add(name="frame", datatype="UINT8", shape=[1, *FRAME.shape])
    message.raw_input_contents.append(FRAME.tobytes())
    return message.SerializeToString()


def test_a_live_engine_that_hangs_holds_up_its_own_model_and_nothing_else(repository, quick, serve, gate):
    b.publish(repository)
    b.publish(repository, "rear")
    server = serve(dataclasses.replace(quick, drain=0.3))
    hang(server, gate)
    account = server.service.host("road").account
    with Client(server.target) as client, Client(server.target) as other:
        for _ in range(3):  # one hangs in the engine, two in the queue; each caller is told in time
            with pytest.raises((Rejected, grpc.RpcError), match="Deadline Exceeded"):
                client.infer("road", FRAME, timeout=0.2)
        assert other.infer("rear", FRAME, timeout=10).version == 1
        until(lambda: account.snapshot().in_flight == 1)  # those that waited are off the queue
        stop = threading.Thread(target=lambda: stops.append(server.stop()))
        stops: list[bool] = []
        begun = time.monotonic()
        stop.start()
        stop.join(10)
    assert stops == [False]  # it says that something was still in flight ...
    assert time.monotonic() - begun < 5  # ... and does not wait for it
    now = account.snapshot()
    assert now.accepted == now.answered + sum(now.rejected.values()) + now.in_flight == 3


def test_after_a_hang_the_model_answers_again_and_the_account_is_whole(repository, quick, serve, gate):
    b.publish(repository)
    server = serve(quick)
    hang(server, gate)
    account = server.service.account
    with Client(server.target) as client:
        with pytest.raises((Rejected, grpc.RpcError), match="Deadline Exceeded"):
            client.infer("road", FRAME, timeout=0.2)
        gate.set()
        assert client.infer("road", FRAME, timeout=10).version == 1
    until(lambda: account.snapshot().in_flight == 0)
    now = account.snapshot()
    assert now.accepted == now.answered + sum(now.rejected.values()) == 2
    assert server.service.host("road").live.held == 0


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
    until(lambda: server.service.host("road").live.held == 0)
    with grpc.insecure_channel(server.target) as channel:

        def whole():
            try:
                return len(list(channel.stream_stream(STREAM)(iter([message] * 2), timeout=10))) == 2
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
