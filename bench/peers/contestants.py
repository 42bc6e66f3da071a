"""The servers under comparison behind one interface: publish a version, start, swap, stop.

The same ONNX bytes, the same number of threads and the same client for all.  Knows how each server is
asked to take a new version; knows nothing of what is measured.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from bench import load
from bench.peers import bento, kserve, litserve, mlserver, roadworthy, triton
from bench.peers.process import Server

MODEL = "road"


class Refusal(Exception):
    """The server did not take the version; the message says why."""


class Contestant:
    """One server in a folder of its own.

    shared    it can take frames and give answers through system shared memory
    reloads   it can be given a new version without being started again
    """

    name = ""
    shared = False
    reloads = True

    def __init__(self, work: Path, *, size: tuple[int, int], threads: int = 1) -> None:
        self.work = work / self.name
        self.work.mkdir(parents=True)
        self.repository = self.work / "repository"
        self.repository.mkdir()
        self.size = size
        self.threads = threads
        self.versions = 0

    def publish(self, onnx: bytes) -> int:
        """Puts the next version where the server will find it; returns its number."""
        raise NotImplementedError

    def start(self) -> Server:
        raise NotImplementedError

    def swap(self, server: Server, version: int) -> dict[str, float]:
        """Makes the version live and returns when it is, with what the server measured; raises Refusal."""
        stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(server.target))
        try:
            stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name=MODEL), timeout=120)
        except grpc.RpcError as error:
            raise Refusal(f"{error.code().name}: {error.details()}") from error
        return {}

    def request(self, frame: np.ndarray) -> bytes:
        return load.request_bytes(MODEL, frame)

    def senders(self, server: Server, frame: np.ndarray, count: int) -> list[load.Sender]:
        return [load.Sender(server.target, self.request(frame)) for _ in range(count)]

    def shared_senders(self, server: Server, frame: np.ndarray, count: int) -> list[load.Sender]:
        return [load.SharedSender(server.target, MODEL, frame) for _ in range(count)]


class Roadworthy(Contestant):
    """settings: TOML text, appended to the number of threads."""

    name = "roadworthy"
    shared = True

    def __init__(
        self, work: Path, *, size: tuple[int, int], threads: int = 1, settings: str = "", shadow: bool = False
    ) -> None:
        super().__init__(work, size=size, threads=threads)
        self.settings = f"[engine]\nthreads = {threads}\n{settings}"
        self.shadow = shadow

    def publish(self, onnx: bytes) -> int:
        return roadworthy.publish(self.repository, MODEL, onnx)

    def start(self) -> Server:
        return roadworthy.start(self.repository, work=self.work, settings=self.settings)

    def swap(self, server: Server, version: int) -> dict[str, float]:
        from runtime.client import Client

        with Client(server.target) as client:
            events = client.submit(MODEL, version) if self.shadow else client.promote(MODEL, version)
            last = list(events)[-1]
        if last.state != "LIVE":
            raise Refusal(f"{last.state} {last.check}: {last.reason}")
        return {key: float(value) for key, value in last.detail.items() if isinstance(value, int | float)}


class Triton(Contestant):
    """The real tritonserver, python backend; a version is taken by RepositoryModelLoad."""

    name = "triton"
    shared = True

    def publish(self, onnx: bytes) -> int:
        self.versions += 1
        height, width = self.size
        maps = [triton.Tensor(name, "UINT8", (-1, height, width)) for name in load.OUTPUTS]
        model = triton.Model(MODEL, [triton.Tensor("frame", "UINT8", (-1, height, width, 3))], maps)
        triton.add_version(self.repository, model, self.versions, onnx)
        return self.versions

    def start(self) -> Server:
        return triton.start(self.repository, work=self.work, models=[MODEL], threads=self.threads)


class MLServer(Contestant):
    """MLServer with the model in the server's process; frames as BYTES."""

    name = "mlserver"

    def publish(self, onnx: bytes) -> int:
        self.versions += 1
        # One folder, rewritten: the model of the same name and version is loaded, then the old one unloaded.
        shutil.rmtree(self.repository / f"{MODEL}-1", ignore_errors=True)
        mlserver.add_version(self.repository, MODEL, 1, onnx, threads=self.threads)
        return self.versions

    def start(self) -> Server:
        return mlserver.start(self.repository, work=self.work, model=MODEL)

    def request(self, frame: np.ndarray) -> bytes:
        return load.request_bytes(MODEL, frame, as_text=True)


class KServe(Contestant):
    """The KServe SDK's model server: no repository, so no swap."""

    name = "kserve"
    reloads = False

    def publish(self, onnx: bytes) -> int:
        self.versions += 1
        (self.repository / "model.onnx").write_bytes(onnx)
        return self.versions

    def start(self) -> Server:
        return kserve.start(self.repository / "model.onnx", work=self.work, model=MODEL, threads=self.threads)


class BentoML(Contestant):
    """Frames over HTTP; no swap."""

    name = "bentoml"
    reloads = False

    def publish(self, onnx: bytes) -> int:
        self.versions += 1
        (self.repository / "model.onnx").write_bytes(onnx)
        return self.versions

    def start(self) -> Server:
        return bento.start(
            self.repository / "model.onnx", work=self.work, size=self.size, threads=self.threads
        )

    def senders(self, server: Server, frame: np.ndarray, count: int) -> list[load.Sender]:
        kind = "application/octet-stream"
        return [load.HttpSender(server.target, "/infer", frame.tobytes(), kind) for _ in range(count)]


class LitServe(BentoML):
    name = "litserve"

    def start(self) -> Server:
        return litserve.start(
            self.repository / "model.onnx", work=self.work, size=self.size, threads=self.threads
        )

    def senders(self, server: Server, frame: np.ndarray, count: int) -> list[load.Sender]:
        kind = f"multipart/form-data; boundary={litserve.BOUNDARY}"
        content = litserve.body(frame.tobytes())
        return [load.HttpSender(server.target, "/predict", content, kind) for _ in range(count)]


CONTESTANTS: dict[str, type[Contestant]] = {
    contestant.name: contestant for contestant in (Roadworthy, Triton, MLServer, KServe, BentoML, LitServe)
}
