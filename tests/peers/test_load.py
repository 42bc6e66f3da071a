"""The measuring client: what it reads from an answer, and that it counts every request once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from bench import load
from bench.peers import calls, process
from bench.peers.process import Server
from tests.waits import PATIENCE, until

FRAME = calls.frames(1)


@pytest.mark.parametrize("version", ["", "1", "12345"])
@pytest.mark.parametrize("payload", [b"", b"x" * 3, b"x" * 100_000])
def test_version_is_read_from_the_wire(version: str, payload: bytes) -> None:
    answer = pb.ModelInferResponse(model_name="road" * 60, model_version=version, id="7")
    answer.parameters["round"].string_param = "3"
    answer.raw_output_contents.append(payload)
    assert load.answered_version(answer.SerializeToString()) == version


def test_request_is_what_tritonclient_would_read() -> None:
    request = pb.ModelInferRequest.FromString(load.request_bytes("seg", FRAME))
    assert request.inputs[0].shape == list(FRAME.shape)
    assert request.raw_input_contents[0] == FRAME.tobytes()
    assert [one.name for one in request.outputs] == ["labels", "confidence"]


def test_closed_loop_counts_every_request(server: Server) -> None:
    with load.opened(
        [load.Sender(server.target, load.request_bytes("seg", FRAME)) for _ in range(3)]
    ) as senders:
        result = load.closed_loop(senders, PATIENCE, limit=10)
    assert len(result.sent) == 30
    assert result.failed == 0
    assert {one.version for one in result.sent} == {"1"}


def test_open_loop_charges_for_waiting(server: Server) -> None:
    with (
        load.opened([load.Sender(server.target, load.request_bytes("seg", FRAME))]) as senders,
        load.OpenLoop(senders, 50.0) as loop,
    ):
        until(lambda: len(loop.sent) >= 10)
    assert all(one.done >= one.due for one in loop.sent)
    due = sorted(one.due for one in loop.sent)
    np.testing.assert_allclose(np.diff(due), 0.02, atol=1e-6)


def test_failures_are_counted_by_code(server: Server) -> None:
    with load.opened([load.Sender(server.target, load.request_bytes("nope", FRAME))]) as senders:
        result = load.closed_loop(senders, PATIENCE, limit=5)
    assert result.failed == 5
    assert {one.failure for one in result.sent} == {"NOT_FOUND"}


def test_shared_sender_leaves_no_region(server: Server) -> None:
    regions = process.shared_regions(server.pid)
    with load.opened([load.SharedSender(server.target, "seg", FRAME)]) as senders:
        result = load.closed_loop(senders, PATIENCE, limit=5)
        assert process.shared_regions(server.pid) >= regions + 2  # a descriptor and a mapping each
    assert result.failed == 0
    assert process.shared_regions(server.pid) == regions


def test_clients_that_vanish_leave_nothing_behind(server: Server) -> None:
    """A hundred connections that are dropped in the middle of a call."""
    before = process.descriptors(server.pid), process.threads(server.pid)

    def vanish() -> None:
        sender = load.Sender(server.target, load.request_bytes("seg", calls.frames(200)))
        sender.future()
        sender.close()

    for _ in range(5):
        workers = [threading.Thread(target=vanish) for _ in range(20)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    until(lambda: process.descriptors(server.pid) <= before[0] + 2)
    with load.opened([load.Sender(server.target, load.request_bytes("seg", FRAME))]) as senders:
        assert load.closed_loop(senders, PATIENCE, limit=1).failed == 0
