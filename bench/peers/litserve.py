"""LitServe: one worker, frames as a multipart file.  It has no call that takes a new version."""

from __future__ import annotations

import os
from pathlib import Path

from bench.peers import environments
from bench.peers.process import Server, answers_http, free_port

BOUNDARY = "roadworthy-frame"


def body(frame: bytes) -> bytes:
    """The frame as the one file of a multipart form."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="request"; filename="frame"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return head.encode() + frame + f"\r\n--{BOUNDARY}--\r\n".encode()


def start(onnx: Path, *, work: Path, size: tuple[int, int], threads: int = 1) -> Server:
    """Starts the server; raises environments.Absent.  target: HOST:PORT of its HTTP server."""
    environment = environments.find("litserve")
    port = free_port()
    return Server(
        "litserve",
        [
            str(environment / "bin" / "python"),
            "-P",  # this folder holds a module of the same name as theirs
            str(Path(__file__).with_name("litserve_model.py")),
        ],
        target=f"127.0.0.1:{port}",
        ready=answers_http(port, "/health"),
        log=work / "litserve.log",
        directory=work,
        environment={
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": "",
            "ROADWORTHY_PEER": f"{onnx}|{threads}|{size[0]}|{size[1]}|{port}",
        },
    )
