"""Our answers beside the real Triton's, call by call: status code, message and content.

triton_answers.json was recorded from tritonserver 2.51 (`python -m bench.peers.probe --record FILE`), so
this runs without it; with it installed, `make test-peers` records afresh and compares with the file.
Every call on which we differ on purpose is in DELIBERATE, with our answer and the reason.
"""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.peers import calls, environments, probe
from bench.peers.process import Server

FILE = Path(__file__).with_name("triton_answers.json")
RECORDED: dict[str, dict[str, Any]] = json.loads(FILE.read_text())["answers"]


@dataclass(frozen=True)
class Difference:
    """Calls (shell patterns) on which we answer otherwise: code, message (regular expression), and why."""

    calls: tuple[str, ...]
    code: str
    message: str
    reason: str


DELIBERATE = (
    Difference(
        ("infer seg: good, all outputs", "infer seg: batch 0", "infer seg: typed contents"),
        "OK",
        "",
        "probabilities are large, and sent only where the request names them",
    ),
    Difference(
        ("*: version 1x", "*: version ' 1'"),
        "INVALID_ARGUMENT",
        "failed to get model version from specified version string '.*' .*",
        "C's stol takes the number that a text begins with; a typing error must not choose a version",
    ),
    Difference(
        ("infer seg: two raw contents", "infer simple: three raw contents of two"),
        "INVALID_ARGUMENT",
        ".*expected . raw input contents, got .*",
        "contents that belong to no input are a client's mistake; Triton drops them",
    ),
    Difference(
        ("infer seg: typed contents out of range",),
        "INVALID_ARGUMENT",
        ".*do not fit UINT8.*",
        "300 is not 44",
    ),
    Difference(
        ("infer seg: overflowing shape",),
        "INVALID_ARGUMENT",
        r".*input byte size mismatch.* Expected \d+, got 1152",
        "Triton's byte count overflows to 0",
    ),
    Difference(
        ("infer seg: extra input", "infer simple: extra input"),
        "INVALID_ARGUMENT",
        r".*expected \d inputs but got \d inputs.*missing required input\(s\) \[\]\. .*",
        "Triton's message lacks a bracket",
    ),
    Difference(
        ("infer batched: batch 0",),
        "OK",
        "",
        "an empty batch has an empty answer; Triton takes its size for 1 and misses the bytes",
    ),
    Difference(
        ("infer batched: batch -1",),
        "INVALID_ARGUMENT",
        ".*All input dimensions should be specified for input 'frame' for model 'batched', got .*",
        "Triton multiplies -1 into a byte count",
    ),
    Difference(
        ("classification 2 of labels",),
        "OK",
        "",
        "the order of equal scores is nobody's promise",
    ),
    Difference(
        ("wire: garbage to ModelInfer", "wire: torn ModelInfer"),
        "INVALID_ARGUMENT",
        "malformed ModelInferRequest: .*",
        "the client sent it, so it is the client's error, and the message says where it breaks off",
    ),
    Difference(
        ("wire: garbage to ModelReady", "wire: invalid UTF-8 in a name"),
        "INTERNAL",
        "Exception deserializing request!",
        "the words of gRPC's Python library",
    ),
    Difference(
        ("wire: unknown method", "wire: unknown service"),
        "UNIMPLEMENTED",
        "Method not found!",
        "the words of gRPC's Python library",
    ),
    Difference(
        ("health check of an unknown service",),
        "NOT_FOUND",
        "",
        "what grpc.health.v1 asks for; Triton answers SERVING for any name",
    ),
    Difference(
        ("server metadata",),
        "OK",
        "",
        "the list says what this server has",
    ),
)


def difference(name: str) -> Difference | None:
    """The table's entry for a call; the first that matches."""
    return next((one for one in DELIBERATE if any(fnmatch.fnmatchcase(name, p) for p in one.calls)), None)


@pytest.fixture(scope="module")
def ours(server: Server) -> dict[str, dict[str, Any]]:
    return probe.asked(server.target)


def test_the_recorded_calls_are_the_calls() -> None:
    assert list(RECORDED) == [call.name for call in calls.calls()], (
        "record again: python -m bench.peers.probe"
    )


def test_every_deliberate_difference_names_a_call() -> None:
    for one in DELIBERATE:
        for pattern in one.calls:
            assert any(fnmatch.fnmatchcase(name, pattern) for name in RECORDED), f"{pattern!r} names no call"


@pytest.mark.parametrize("name", list(RECORDED))
def test_answers_as_triton_does(name: str, ours: dict[str, dict[str, Any]]) -> None:
    theirs, our = RECORDED[name], ours[name]
    theirs = {key: value for key, value in theirs.items() if key != "rpc"}
    our = {key: value for key, value in our.items() if key != "rpc"}
    known = difference(name)
    if known is None:
        assert (our["code"], our["message"]) == (theirs["code"], theirs["message"])
        assert our["response"] == theirs["response"]
        assert our.get("shm") == theirs.get("shm")
        return
    assert our != theirs, "answers as Triton does after all: take it out of DELIBERATE"
    assert our["code"] == known.code, our
    assert re.fullmatch(known.message, our["message"], re.DOTALL), our


@pytest.mark.peers
def test_the_recorded_answers_are_still_tritons() -> None:
    try:
        fresh = probe.record()["answers"]
    except environments.Absent as absent:
        pytest.skip(str(absent))
    assert fresh == RECORDED
