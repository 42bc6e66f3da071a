"""The log: a line for a person, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import signal

from runtime.client import Client
from runtime.observability import logs
from tests.runtime import builders as b
from tests.runtime.scenarios.test_kill import Process


def test_an_object_is_one_line_whatever_is_said():
    try:
        raise ValueError("torn\nline")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "a %s", ('"q"\nforged',), info)
    record.fields = {"model": "road", "what": object}
    line = logs.JsonLines().format(record)
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["logger"], said["message"]) == ("ERROR", "x", 'a "q"\nforged')
    assert said["model"] == "road"
    assert "ValueError: torn" in said["exception"]
    assert said["time"].endswith("Z")


def test_the_servers_log_can_be_read_by_a_machine(repository):
    b.publish(repository)
    server = Process(repository, "--log-format", "json")
    bad = b.publish(repository)
    (repository.directory("road", bad) / "model.onnx").write_bytes(b"rust")
    with Client(server.target) as client:
        assert list(client.submit("road", bad))[-1].state == "REJECTED"
    assert server.end(signal.SIGTERM) == 0
    lines = [line for line in server.lines if not line.startswith("ready grpc=")]
    said = [json.loads(line) for line in lines]
    (refusal,) = [line for line in said if line.get("state") == "REJECTED"]
    assert {key: refusal[key] for key in ("model", "version", "check", "level")} == {
        "model": "road",
        "version": bad,
        "check": "hash",
        "level": "INFO",
    }
    assert "model.onnx" in refusal["reason"]
