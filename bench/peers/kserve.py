"""The KServe SDK's own model server.  It has no repository of versions: a new one is a new process."""

from __future__ import annotations

import json
import os
from pathlib import Path

from bench.peers import environments
from bench.peers.process import Server, free_port, live


def start(onnx: Path, *, work: Path, model: str, threads: int = 1) -> Server:
    """Starts the SDK's ModelServer with one model; raises environments.Absent."""
    environment = environments.find("kserve")
    ports = free_port(), free_port()
    options = json.dumps(
        {"name": model, "onnx": str(onnx), "threads": threads, "grpc": ports[0], "http": ports[1]}
    )
    target = f"127.0.0.1:{ports[0]}"
    return Server(
        "kserve",
        [
            str(environment / "bin" / "python"),
            "-P",  # this folder holds a module of the same name as theirs
            str(Path(__file__).with_name("kserve_model.py")),
            f"--grpc_max_send_message_length={128 << 20}",
            f"--grpc_max_receive_message_length={128 << 20}",
        ],
        target=target,
        ready=live(target, model),
        log=work / "kserve.log",
        directory=work,
        environment={
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": "",
            "ROADWORTHY_PEER": options,
        },
    )
