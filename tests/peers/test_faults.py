"""Clients that misbehave while they are served: seen from outside, through the wire."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from bench import load
from bench.peers import calls, process
from bench.peers.process import Server
from tests.waits import PATIENCE, until

FRAME = calls.frames(1)
ALLOWED = {"", "NOT_FOUND", "INVALID_ARGUMENT"}


def test_region_unregistered_while_in_use(server: Server) -> None:
    """Every request is answered or refused with a code, and the server holds nothing afterwards."""
    before = process.shared_regions(server.pid)
    sender = load.SharedSender(server.target, "seg", FRAME)
    stop = threading.Event()

    def meddle() -> None:
        with grpc.insecure_channel(server.target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while not stop.is_set():
                for name in sender.names:
                    stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name=name))
                time.sleep(0.002)
                for name, size in zip(sender.names, sender.sizes, strict=True):
                    request = pb.SystemSharedMemoryRegisterRequest(name=name, key=f"/{name}", byte_size=size)
                    stub.SystemSharedMemoryRegister(request)
                time.sleep(0.002)

    meddler = threading.Thread(target=meddle)
    with load.opened([sender]) as senders:
        meddler.start()
        result = load.closed_loop(senders, PATIENCE, limit=300)
        stop.set()
        meddler.join()
    assert len(result.sent) == 300
    assert {one.failure for one in result.sent} <= ALLOWED
    assert process.shared_regions(server.pid) == before


def test_region_shortened_while_registered(server: Server) -> None:
    """A mapping would end the server with SIGBUS."""
    import os

    sender = load.SharedSender(server.target, "seg", FRAME)
    with load.opened([sender]) as senders:
        assert load.closed_loop(senders, PATIENCE, limit=1).failed == 0
        descriptor = os.open(f"/dev/shm/{sender.names[0]}", os.O_RDWR)
        try:
            size = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, 0)
            with grpc.insecure_channel(server.target) as channel:
                call = channel.unary_unary(load.PATH)
                try:
                    call(sender.request, timeout=PATIENCE)
                    code = "OK"
                except grpc.RpcError as error:
                    code = error.code().name
            os.ftruncate(descriptor, size)
        finally:
            os.close(descriptor)
    assert code == "INVALID_ARGUMENT"
    assert server.process.poll() is None


def test_stream_whose_client_vanishes(server: Server) -> None:
    """Twenty streams are dropped with requests in them; the next client is served, and no thread is lost."""
    request = pb.ModelInferRequest.FromString(load.request_bytes("seg", calls.frames(50)))
    before = process.descriptors(server.pid)

    def requests() -> Iterator[pb.ModelInferRequest]:
        for _ in range(50):
            yield request

    for _ in range(20):
        channel = grpc.insecure_channel(server.target)
        stream = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
        next(stream)
        channel.close()
    with grpc.insecure_channel(server.target) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = list(stub.ModelStreamInfer(iter([request, request]), timeout=PATIENCE))
    assert [one.error_message for one in answers] == ["", ""]
    until(lambda: process.descriptors(server.pid) <= before + 2)
