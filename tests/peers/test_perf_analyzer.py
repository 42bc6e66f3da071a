"""NVIDIA's perf_analyzer, unmodified, against our server."""

from __future__ import annotations

import pytest

from bench.peers import environments, perf_analyzer
from bench.peers.process import Server

pytestmark = pytest.mark.peers
SHORT = ("--measurement-interval", "1000", "--stability-percentage", "999", "--max-trials", "3")


@pytest.mark.parametrize("way", ["none", "system"], ids=["raw", "shared memory"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_perf_analyzer_measures_us(server: Server, way: str, asynchronous: bool) -> None:
    arguments = ["-m", "seg", "-u", server.target, "-i", "grpc", "--shape", "frame:1,16,24,3", "-b", "1"]
    arguments += [f"--shared-memory={way}", "--concurrency-range", "2", *SHORT]
    if way == "system":
        arguments += ["--output-shared-memory-size", "65536"]
    if asynchronous:
        arguments.append("--async")
    _measured(arguments)


def test_perf_analyzer_streams(server: Server) -> None:
    shape = ["--shape", "frame:1,16,24,3"]
    _measured(["-m", "seg", "-u", server.target, "-i", "grpc", *shape, "--streaming", "--async", *SHORT])


SEG = ("-m", "seg", "--shape", "frame:1,16,24,3")
SHARED = ("--shared-memory=system", "--output-shared-memory-size", "65536")
STREAM = ("--streaming", "--async")
MODES = {
    "request rate": (*SEG, "--request-rate-range", "40"),
    "request rate, poisson": (*SEG, "--request-rate-range", "40", "--request-distribution", "poisson"),
    "request rate, shared memory": (*SEG, "--request-rate-range", "40", *SHARED),
    "stream, shared memory": (*SEG, *STREAM, *SHARED),
    "stream, request rate": (*SEG, *STREAM, "--request-rate-range", "40"),
    "batches": ("-m", "batched", "-b", "4", "--concurrency-range", "2"),
    "text": ("-m", "text", "--shape", "TEXT:4", "--string-length", "20"),
    "text, shared memory": ("-m", "text", "--shape", "TEXT:4", "--string-length", "20", *SHARED[:1]),
    "gzip": (*SEG, "--grpc-compression-algorithm", "gzip"),
    "version": (*SEG, "-x", "1"),
    "sequence options": (*SEG, "--sequence-length", "5", "--num-of-sequences", "2"),
    "64 at once": (*SEG, "--concurrency-range", "64", "--async"),
}


@pytest.mark.parametrize("mode", list(MODES))
def test_perf_analyzer_in_every_mode(server: Server, mode: str) -> None:
    _measured(["-u", server.target, "-i", "grpc", *MODES[mode], *SHORT])


def test_perf_analyzer_with_several_inputs(server: Server) -> None:
    shapes = ["--shape", "INPUT0:1,16", "--shape", "INPUT1:1,16"]
    _measured(["-m", "simple", "-u", server.target, "-i", "grpc", *shapes, *SHORT])


def _measured(arguments: list[str]) -> None:
    try:
        done = perf_analyzer.run(arguments)
    except environments.Absent as absent:
        pytest.skip(str(absent))
    assert done.returncode == 0, done.stdout
    throughput, _ = perf_analyzer.figures(done.stdout)
    assert throughput > 0
