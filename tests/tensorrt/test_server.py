"""The TensorRT runner inside the server: the guarded swap of a refitted plan, on the fake device."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from export.inspect import main as inspect_main
from runtime.client import Client
from runtime.config import EngineConfig, GuardConfig, ServerConfig, ShadowConfig, WatchConfig
from runtime.engines.cuda import pycuda_driver
from runtime.engines.tensorrt import engine
from runtime.engines.tensorrt.library import Library, TensorRTError
from runtime.repository.repository import Repository
from runtime.server import Server
from tests.runtime import builders
from tests.tensorrt.fakes import Device, library, onnx_plan
from tests.waits import PATIENCE

BATCHES = [[n, *builders.SIZE, 3] for n in (1, 1, 4)]


class Camera(threading.Thread):
    """Sends one frame again and again."""

    def __init__(self, target: str, frame: np.ndarray) -> None:
        super().__init__(daemon=True)
        self.target, self.frame = target, frame
        self.failed: list[Exception] = []
        self.stopping = threading.Event()

    def __enter__(self) -> Camera:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stopping.set()
        self.join(PATIENCE)

    def run(self) -> None:
        with Client(self.target) as client:
            while not self.stopping.wait(0.01):
                try:
                    client.infer("road", self.frame)
                except Exception as error:
                    self.failed.append(error)


def publish(repository: Repository, sharpness: float) -> int:
    """A version whose file is a plan; its golden answers come from onnx's reference evaluator."""
    weights, bias = builders.nearest_weights(sharpness=sharpness)
    model = builders.segmentation(weights, bias, batch="N")
    staged = repository.stage("road")
    (staged / "model.plan").write_bytes(onnx_plan(model.SerializeToString(), BATCHES, free=True))
    np.savez(staged / "golden.npz", **builders.golden(model))
    manifest = builders.manifest(batch="N")
    manifest["engine"] = {"kind": "tensorrt", "precision": "fp16", "file": "model.plan"}
    return repository.publish("road", staged, manifest, "name: 'x'\n", list(builders.CLASSES))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(engine, "tensorrt", lambda: library(device))
    monkeypatch.setattr(pycuda_driver, "PycudaDriver", device.driver)
    return device


def test_a_plan_is_served_and_swapped_while_frames_arrive(device: Device, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "engines")
    publish(repository, 12.0)
    config = ServerConfig(
        repository=str(repository.path),
        port=0,
        metrics_port=-1,
        engine=EngineConfig(threads=1, concurrency=2, device="cuda"),
        # The fake device's times mean nothing.
        guard=GuardConfig(max_latency_ratio=1e6),
        shadow=ShadowConfig(
            frames=4, timeout=PATIENCE, idle_timeout=PATIENCE, min_frames=2, max_latency_ratio=1e6
        ),
        watch=WatchConfig(seconds=0.2, max_latency_ratio=1e6),
    )
    frame, labels = builders.blocks(np.random.default_rng(3))
    with Server(config) as server, Client(server.target) as client:
        answer = client.infer("road", frame)
        assert answer.version == 1
        assert (answer.labels == labels).mean() > 0.8
        assert (answer.parameters["engine"], answer.parameters["precision"]) == ("tensorrt", "fp16")
        batch = np.stack([frame, frame[::-1], frame])
        flipped = client.infer("road", batch).labels
        np.testing.assert_array_equal(flipped[0], answer.labels)
        assert publish(repository, 10.0) == 2
        with Camera(server.target, frame) as camera:
            last = list(client.submit("road", 2))[-1]
        assert last.state == "LIVE", f"{last.check}: {last.reason}"
        assert camera.failed == []
        again = client.infer("road", frame)
        assert again.version == 2
        assert (again.labels == labels).mean() > 0.8
    assert device.clean()


def test_inspect_times_the_layers_of_a_plan(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository(tmp_path / "engines")
    publish(repository, 12.0)
    version = str(repository.directory("road", 1))
    assert inspect_main([version, "--profile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["plan_profile"]
    assert found["layers_ms"] == [
        {"layer": "max", "milliseconds": 0.25},
        {"layer": "dot", "milliseconds": 0.5},
    ]
    assert inspect_main([version, "--profile"]) == 0
    assert "dot                                                         0.5000" in capsys.readouterr().out
    assert device.clean()

    def absent() -> Library:
        raise TensorRTError("TensorRT cannot be used: no CUDA driver")

    monkeypatch.setattr(engine, "tensorrt", absent)
    assert inspect_main([version, "--profile"]) == 0
    assert "layers      not timed: load: TensorRT cannot be used: no CUDA driver" in capsys.readouterr().out


def test_a_damaged_plan_is_refused_and_the_live_one_goes_on(device: Device, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "engines")
    publish(repository, 12.0)
    config = ServerConfig(repository=str(repository.path), port=0, metrics_port=-1)
    frame, _ = builders.blocks(np.random.default_rng(3))
    with Server(config) as server, Client(server.target) as client:
        staged = repository.stage("road")
        (staged / "model.plan").write_bytes(b"another machine's plan")
        weights, bias = builders.nearest_weights()
        answers = builders.golden(builders.segmentation(weights, bias))
        np.savez(staged / "golden.npz", **answers)
        manifest = builders.manifest(batch="N")
        manifest["engine"] = {"kind": "tensorrt", "precision": "fp16", "file": "model.plan"}
        repository.publish("road", staged, manifest, "name: 'x'\n", list(builders.CLASSES))
        last = list(client.submit("road", 2))[-1]
        assert (last.state, last.check) == ("REJECTED", "load")
        assert "plans fit one TensorRT version and one GPU model" in last.reason
        assert client.infer("road", frame).version == 1
    assert device.clean()
