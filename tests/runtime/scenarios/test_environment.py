"""A start or a submission in a wrong environment is no verdict on a version."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
import threading

import pytest

from runtime import config
from runtime.client import Client
from runtime.config import (
    EngineConfig,
    GuardConfig,
    SecurityConfig,
    ServerConfig,
    ShadowConfig,
    WatchConfig,
)
from runtime.engines import onnxruntime
from runtime.errors import ConfigError, Refused, Unjudged, of_the_machine
from runtime.repository.signing import signer
from runtime.service import Service
from runtime.serving import memory_budget
from tests.runtime import builders as b
from tests.runtime.rpc.test_auth import keys  # noqa: F401
from tests.runtime.scenarios.test_kill import Process
from tests.waits import PATIENCE


@pytest.fixture
def calm(quick):
    return dataclasses.replace(quick, shadow=ShadowConfig(enabled=False), watch=WatchConfig(seconds=0.0))


def states(repository):
    return [(e["version"], e["state"]) for e in repository.history("road")]


def start(config):
    service = Service(config)
    service.start()
    return service


def missing_library(monkeypatch, config):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    return config, "pip install"


def broken_library(monkeypatch, config):
    def broken():
        raise ImportError("libonnxruntime.so.1: cannot open shared object file")

    monkeypatch.setattr(onnxruntime, "_library", broken)
    return config, "pip install"


def no_cuda(monkeypatch, config):
    engine = EngineConfig(threads=1, device="cuda")
    return dataclasses.replace(config, engine=engine), "install onnxruntime-gpu"


def no_memory(monkeypatch, config):
    return dataclasses.replace(config, guard=GuardConfig(memory_budget_bytes=1 << 20)), "memory_budget_bytes"


def machine_without_memory(monkeypatch, config):
    monkeypatch.setattr(memory_budget, "available", lambda: 1000)
    return config, "may be taken"


def allocation_fails(monkeypatch, config):
    def fail(*_, **__):
        raise RuntimeError("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "_session", fail)
    return config, "bad_alloc"


def threads_fail(monkeypatch, config):
    def fail(*_, **__):
        raise RuntimeError("pthread_create failed, error code: 11 error msg: Resource temporarily un…")

    monkeypatch.setattr(onnxruntime, "_session", fail)
    return config, "pthread_create"


def python_has_no_memory(monkeypatch, config):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr(onnxruntime, "_session", fail)
    return config, "MemoryError"


def unreadable(number):
    def wrong(monkeypatch, config):
        opened = os.open

        def fail(path, *arguments, **named):
            if str(path).endswith("model.onnx"):
                raise OSError(number, os.strerror(number), path)
            return opened(path, *arguments, **named)

        monkeypatch.setattr(os, "open", fail)
        return config, os.strerror(number)

    return wrong


def strict_limit(monkeypatch, config):
    return dataclasses.replace(config, guard=GuardConfig(golden_bytes=10)), "golden_bytes"


def impossible_limit(monkeypatch, config):
    return dataclasses.replace(config, guard=GuardConfig(min_golden_agreement=2.0)), "the limit is 200.00%"


def wrong_limit(monkeypatch, config):
    return dataclasses.replace(config, guard=GuardConfig(max_dominance=-1.0)), "collapse"


def slow_machine(monkeypatch, config):
    return dataclasses.replace(
        config, engine=EngineConfig(threads=2), guard=GuardConfig(latency_budget_ms=1e-9)
    ), "the budget"


WRONG = [
    missing_library,
    broken_library,
    no_cuda,
    no_memory,
    machine_without_memory,
    allocation_fails,
    threads_fail,
    python_has_no_memory,
    unreadable(errno.EACCES),
    unreadable(errno.EMFILE),
    unreadable(errno.EIO),
    strict_limit,
    impossible_limit,
    wrong_limit,
    slow_machine,
]


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("known", [False, True], ids=["first start", "was live"])
def test_a_start_in_a_wrong_environment_poisons_nothing(wrong, known, repository, calm, monkeypatch):
    b.publish(repository)
    if known:
        start(calm).close()
    with monkeypatch.context() as patch:
        config, says = wrong(patch, calm)
        service = start(config)
        reason = service.models.host("road").reason
        assert service.models.host("road").live is None
        service.close()
    assert says in reason
    assert "\n" not in reason
    assert (1, "REJECTED") not in states(repository)
    service = start(calm)
    try:
        assert service.models.host("road").live.version == 1
        assert states(repository)[-1] == (1, "LIVE")
        assert service.models.controller("road").retention.newest_eligible() == 1
        assert service.admin.reset("road").result().state == "LIVE"
    finally:
        service.close()


def test_a_version_that_an_older_start_refused_is_live_again_in_the_history(repository, calm):
    """As a server without the library wrote it before this was a note."""
    b.publish(repository)
    start(calm).close()
    repository.append_history("road", {"version": 1, "state": "REJECTED", "check": "load", "reason": "x"})
    service = start(calm)
    try:
        assert states(repository)[-1] == (1, "LIVE")
        assert service.admin.reset("road").result().state == "LIVE"
    finally:
        service.close()


def test_a_version_that_stands_in_for_one_that_was_not_judged_is_not_recorded(repository, calm):
    """The larger one, which was live, does not fit for once; the smaller one answers meanwhile."""
    b.publish(repository)
    large = b.segmentation(*b.nearest_weights(), depth=12, width=128)
    b.publish(repository, model=large, answers=b.golden(b.segmentation(*b.nearest_weights())))
    size = (repository.directory("road", 2) / "model.onnx").stat().st_size
    start(calm).close()
    assert repository.live("road")["live"] == 2
    little = GuardConfig(memory_budget_bytes=memory_budget.OVERHEAD + size)
    service = start(dataclasses.replace(calm, guard=little))
    assert service.models.host("road").live.version == 1
    service.close()
    service = start(calm)
    try:
        assert service.models.host("road").live.version == 2
    finally:
        service.close()


def test_its_own_fault_is_written_for_good(repository, calm):
    b.publish(repository)
    b.publish(repository)
    path = repository.directory("road", 2) / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    service = start(calm)
    try:
        assert service.models.host("road").live.version == 1
        assert (2, "REJECTED") in states(repository)
        assert service.models.controller("road").retention.newest_eligible() == 1
    finally:
        service.close()


@pytest.mark.parametrize("wrong", [missing_library, no_memory, threads_fail, unreadable(errno.EMFILE)])
def test_a_submission_that_could_not_be_judged_does_not_count(wrong, repository, calm, monkeypatch):
    b.publish(repository)
    service = start(calm)
    try:
        b.publish(repository)
        with monkeypatch.context() as patch:
            config, says = wrong(patch, calm)
            service.ledger.configure(config.guard)
            event = service.admin.submit("road", 2).result()
            service.ledger.configure(calm.guard)
        assert event.state == "REJECTED"
        assert says in event.reason
        assert service.models.controller("road").retention.newest_eligible() == 2
        assert service.admin.submit("road", 2).result().state == "LIVE"
    finally:
        service.close()


def test_a_verification_that_takes_too_long_is_no_verdict(repository, calm, monkeypatch):
    """The clock of the machine is not the version's: it may have been busy."""
    b.publish(repository)
    service = start(dataclasses.replace(calm, engine=EngineConfig(threads=1, load_timeout=0.2)))
    gate = threading.Event()
    try:
        b.publish(repository)
        verifier = service.models.controller("road").verifier
        verify = verifier.verify
        monkeypatch.setattr(verifier, "verify", lambda *a, **k: gate.wait(60) and verify(*a, **k))
        event = service.admin.submit("road", 2).result()
        assert (event.state, event.check) == ("REJECTED", "load")
        assert service.models.controller("road").retention.newest_eligible() == 2
    finally:
        gate.set()
        service.close()


def test_another_key_is_a_setting_and_no_verdict(repository, calm, keys):  # noqa: F811
    mine, theirs = (
        dataclasses.replace(calm, security=SecurityConfig(trusted_keys=[str(keys / f"{name}.pub")]))
        for name in ("mine", "theirs")
    )
    b.publish(repository, sign=signer(keys / "mine.key"))
    service = start(theirs)
    assert "not by a key that this server trusts" in service.models.host("road").reason
    service.close()
    assert (1, "REJECTED") not in states(repository)
    service = start(mine)
    assert service.models.host("road").live.version == 1
    service.close()


def test_keys_without_the_library_that_reads_them(repository, calm, keys, monkeypatch):  # noqa: F811
    b.publish(repository, sign=signer(keys / "mine.key"))
    for name in [n for n in sys.modules if n.partition(".")[0] == "cryptography"]:
        monkeypatch.setitem(sys.modules, name, None)
    config = dataclasses.replace(calm, security=SecurityConfig(trusted_keys=[str(keys / "mine.pub")]))
    with pytest.raises(ConfigError, match=r"pip install 'roadworthy\[signing\]'") as error:
        start(config)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="pip install"):
        signer(keys / "mine.key")
    assert states(repository) == []


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("guard", "min_golden_agreement", 98.0),
        ("guard", "min_golden_agreement", -0.1),
        ("guard", "min_golden_overlap", 1.01),
        ("guard", "max_dominance", 2.0),
        ("guard", "shown_share", -1.0),
        ("guard", "latency_slack_ms", -3.0),
        ("guard", "memory_factor", -1.0),
        ("guard", "memory_budget_bytes", -1),
        ("shadow", "min_agreement", 15.0),
        ("shadow", "min_kappa", -2.0),
        ("shadow", "timeout", -1.0),
        ("watch", "max_error_share", 5.0),
        ("watch", "seconds", -1.0),
    ],
)
def test_a_limit_that_cannot_be_meant_is_warned_of(table, key, value, tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(f"[{table}]\n{key} = {value}\n")
    (line,) = config.unlikely(config.load(path))
    assert line.startswith(f"{table}.{key} = {value}: ")
    path.write_text(f"[{table}]\n{key} = nan\n")
    if isinstance(value, float):
        with pytest.raises(ConfigError, match=f"{table}.{key} = nan"):
            config.load(path)


def test_no_default_is_warned_of():
    assert config.unlikely(ServerConfig()) == []


def test_a_limit_without_end_is_a_limit(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text("[guard]\nmax_latency_ratio = inf\n[watch]\nmax_latency_ratio = inf\n")
    assert config.load(path).guard.max_latency_ratio == float("inf")


def test_a_configuration_of_two_gigabytes_is_refused(tmp_path):
    path = tmp_path / "server.toml"
    with open(path, "wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(ConfigError, match="has more than 4194304 bytes"):
        config.load(path)


@pytest.mark.parametrize(
    ("error", "machine"),
    [
        (MemoryError(), True),
        (ImportError("x"), True),
        (PermissionError(errno.EACCES, "x"), True),
        (OSError(errno.ENOSPC, "x"), True),
        (FileNotFoundError(errno.ENOENT, "x"), False),
        (OSError(errno.ELOOP, "x"), False),
        (ValueError("x"), False),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation"), True),
        (RuntimeError("invalid model. No Op registered for Swish with domain_version of 24"), True),
        (RuntimeError("Fatal error: com.microsoft:FusedX(-1) is not a registered function/op"), True),
    ],
)
def test_what_is_of_the_machine(error, machine):
    assert of_the_machine(error) == machine


def test_what_was_not_judged_says_so_wherever_it_is_written():
    refusal = Unjudged("load", "no library", {"more": 1})
    assert isinstance(refusal, Refused)
    assert refusal.detail == {"more": 1, "judged": False}


def test_a_real_server_without_onnxruntime_and_then_with_it(repository, tmp_path, monkeypatch):
    b.publish(repository)
    stub = tmp_path / "stub" / "onnxruntime"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('no onnxruntime here')\n")
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{stub.parent}{os.pathsep}{path}")
    server = Process(repository)
    with Client(server.target) as client:
        reason = client.status()["models"]["road"]["reason"]
    server.end(signal.SIGTERM)
    server.process.wait(PATIENCE)
    assert "pip install 'roadworthy[cpu]'" in reason
    monkeypatch.setenv("PYTHONPATH", path)
    server = Process(repository)
    with Client(server.target) as client:
        road = client.status()["models"]["road"]
        assert (road["ready"], road["live"]) == (True, 1)
        *_, last = client.reset("road")
        assert last.state == "LIVE"
    server.end(signal.SIGTERM)
    server.process.wait(PATIENCE)
