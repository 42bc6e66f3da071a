"""MLServer 1.7.1, with a runtime class of ours because there is none for ONNX.

Frames go to it as one BYTES element: any other datatype is unpacked into a Python list, which costs
62 ms for a frame of 512 x 1024.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from bench.peers import environments
from bench.peers.process import Server, free_port, live


def add_version(models: Path, model: str, version: int, onnx: bytes, *, threads: int = 1) -> Path:
    """Writes one version of a model: `models/MODEL-VERSION/{model.onnx, model-settings.json}`."""
    folder = models / f"{model}-{version}"
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(onnx)
    shutil.copy(Path(__file__).with_name("mlserver_model.py"), folder / "mlserver_model.py")
    settings = {
        "name": model,
        "implementation": "mlserver_model.OnnxModel",
        "parameters": {
            "uri": str(folder / "model.onnx"),
            "version": str(version),
            "extra": {"threads": threads},
        },
    }
    (folder / "model-settings.json").write_text(json.dumps(settings))
    return folder


def start(models: Path, *, work: Path, model: str, workers: int = 0) -> Server:
    """Starts `mlserver start` on the folder of models; raises environments.Absent.

    workers  parallel_workers; 0 runs the model in the server's own process, which is its fastest way
    """
    environment = environments.find("mlserver")
    ports = {"grpc_port": free_port(), "http_port": free_port(), "metrics_port": free_port()}
    settings = {
        **ports,
        "host": "127.0.0.1",
        "parallel_workers": workers,
        "grpc_max_message_length": 128 << 20,
        "debug": False,
        "metrics_dir": str(work),
    }
    (models / "settings.json").write_text(json.dumps(settings))
    target = f"127.0.0.1:{ports['grpc_port']}"
    return Server(
        "mlserver",
        [str(environment / "bin" / "mlserver"), "start", str(models)],
        target=target,
        ready=live(target, model),
        log=work / "mlserver.log",
        directory=work,
        environment={"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ""},
    )
