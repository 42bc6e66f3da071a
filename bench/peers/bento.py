"""BentoML: a service of one Starlette route, its fastest way; frames are the body of a POST.  It has no call
that takes a new version: a new one is a new process."""

from __future__ import annotations

import os
from pathlib import Path

from bench.peers import environments
from bench.peers.process import Server, answers_http, free_port


def start(onnx: Path, *, work: Path, size: tuple[int, int], threads: int = 1) -> Server:
    """Starts `bentoml serve`; raises environments.Absent.  target: HOST:PORT of its HTTP server."""
    environment = environments.find("bentoml")
    port = free_port()
    return Server(
        "bentoml",
        [
            *(str(environment / "bin" / "bentoml"), "serve", "bentoml_model:Road"),
            *("--working-dir", str(Path(__file__).parent), "--host", "127.0.0.1", "--port", str(port)),
        ],
        target=f"127.0.0.1:{port}",
        ready=answers_http(port, "/readyz"),
        log=work / "bentoml.log",
        directory=work,
        environment={
            "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": "",
            "PYTHONSAFEPATH": "1",  # this folder holds modules of the same names as others' packages
            "BENTOML_DO_NOT_TRACK": "1",
            "BENTOML_HOME": str(work),
            "ROADWORTHY_PEER": f"{onnx}|{threads}|{size[0]}|{size[1]}",
        },
    )
