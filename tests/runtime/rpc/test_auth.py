"""Who may call what, over which connection, and whose versions are trusted."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from protos import inference_pb2, roadworthy_pb2
from runtime.client import Client, Rejected
from runtime.config import SecurityConfig
from runtime.errors import ConfigError
from runtime.repository.signing import signer
from runtime.rpc.auth import exposed, roles_for
from runtime.server import REFLECTIONS, Server
from tests.runtime import builders as b
from tests.waits import PATIENCE, until

ROOT = Path(__file__).resolve().parents[3]
FRAME = np.zeros((*b.SIZE, 3), np.uint8)


def secured(config, **how):
    return dataclasses.replace(config, security=SecurityConfig(**how))


def openssl(*arguments, cwd):
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


TOKENS = {
    "cam": ["infer"],
    "eye": ["observe"],
    "learner": ["tap", "observe"],
    "adapter": ["adapt"],
    "boss": ["control"],
}
MAY = {
    "cam": {"infer", "metadata"},
    "eye": {"status", "watch", "metadata"},
    "learner": {"status", "watch", "tap", "metadata"},
    "adapter": {"status", "watch", "tap", "submit", "metadata"},
    "boss": {"status", "watch", "freeze", "submit", "rollback", "metadata"},
}


@pytest.mark.parametrize("token", [*TOKENS, "wrong", ""])
def test_a_token_may_do_what_its_roles_say(repository, quick, serve, token):
    b.publish(repository)
    server = serve(secured(quick, tokens=TOKENS))
    with Client(server.target, token=token) as client:
        stub = client._channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
        request = inference_pb2.ModelMetadataRequest(name="road").SerializeToString()
        actions = {
            "infer": lambda: client.infer("road", FRAME),
            "metadata": lambda: stub(request, metadata=client._metadata),
            "status": client.status,
            "watch": lambda: client.watch().close(),
            "tap": lambda: client.frames("road").close(),
            "freeze": lambda: (client.freeze("road"), client.unfreeze("road")),
            "submit": lambda: list(client.submit("road", 1)),
            "rollback": lambda: client.rollback("road"),
        }
        done = set()
        for name, action in actions.items():
            try:
                action()
                done.add(name)
            except (Rejected, grpc.RpcError) as error:
                code = error.code if isinstance(error, Rejected) else error.code().name
                if name == "rollback" and code == "FAILED_PRECONDITION":
                    done.add(name)  # allowed, and nothing to go back to
                else:
                    assert code == ("PERMISSION_DENIED" if token in TOKENS else "UNAUTHENTICATED")
    assert done == MAY.get(token, set())
    assert server.service.account.snapshot().accepted == (1 if token == "cam" else 0)


def test_health_needs_no_token(repository, quick, serve):
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    b.publish(repository)
    server = serve(secured(quick, tokens=TOKENS))
    with grpc.insecure_channel(server.target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_every_call_that_is_not_named_needs_control():
    for service in (inference_pb2.DESCRIPTOR, roadworthy_pb2.DESCRIPTOR):
        for descriptor in service.services_by_name.values():
            for method in descriptor.methods:
                assert roles_for(f"/{descriptor.full_name}/{method.name}")
    changing = ("RepositoryModelLoad", "RepositoryModelUnload", "LogSettings", "TraceSetting", "Invented")
    for name in changing:
        assert roles_for(f"/inference.GRPCInferenceService/{name}") == ("control",)
    for name in ("Promote", "Rollback", "RollbackGroup", "Reset", "Pin", "Unpin", "Freeze", "Unfreeze"):
        assert roles_for(f"/roadworthy.v1.Roadworthy/{name}") == ("control",)
    for name in ("StartRound", "CancelRound", "SetCollection", "Invented"):
        assert roles_for(f"/roadworthy.v1.Roadworthy/{name}") == ("control",)
    # the guarded swap judges what an adapter offers, and what adapters made may go when it is old
    for name in ("Submit", "SubmitGroup", "Adapter", "Prune"):
        assert roles_for(f"/roadworthy.v1.Roadworthy/{name}") == ("adapt", "control")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """An authority, a server's and a client's certificate, and two Ed25519 key pairs."""
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificates with openssl; install it")
    home = tmp_path_factory.mktemp("keys")
    openssl(
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=ca",
        cwd=home,
    )
    (home / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
            cwd=home,
        )
        openssl(
            "x509",
            "-req",
            "-in",
            f"{name}.csr",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-out",
            f"{name}.pem",
            "-extfile",
            "san",
            cwd=home,
        )
    for name in ("mine", "theirs"):
        openssl("genpkey", "-algorithm", "ed25519", "-out", f"{name}.key", cwd=home)
        openssl("pkey", "-in", f"{name}.key", "-pubout", "-out", f"{name}.pub", cwd=home)
    return home


def read(path):
    return path.read_bytes()


@pytest.mark.parametrize("mutual", [False, True], ids=["TLS", "mTLS"])
def test_tls(repository, quick, serve, keys, mutual):
    b.publish(repository)
    how = {"certificate": str(keys / "server.pem"), "key": str(keys / "server.key")}
    if mutual:
        how["client_ca"] = str(keys / "ca.pem")
    server = serve(secured(quick, **how))
    ca = read(keys / "ca.pem")
    anonymous = grpc.ssl_channel_credentials(ca)
    known = grpc.ssl_channel_credentials(ca, read(keys / "client.key"), read(keys / "client.pem"))
    with Client(server.target, credentials=known) as client:
        assert client.infer("road", FRAME, timeout=PATIENCE).version == 1
    with Client(server.target, credentials=anonymous) as client:
        if mutual:
            with pytest.raises(grpc.RpcError):
                client.infer("road", FRAME, timeout=5)
        else:
            assert client.infer("road", FRAME, timeout=PATIENCE).version == 1
    with Client(server.target) as client, pytest.raises(grpc.RpcError):
        client.infer("road", FRAME, timeout=5)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"certificate": "x"}, "belong together"),
        ({"client_ca": "x"}, "needs security.certificate"),
        ({"certificate": "/none", "key": "/none"}, "No such file"),
        ({"tokens": {"secret": ["root"]}}, "has the role 'root'"),
        ({"trusted_keys": ["/none"]}, "not a public key"),
    ],
)
def test_a_wrong_configuration_is_refused_at_the_start(repository, quick, how, says):
    b.publish(repository)
    with pytest.raises(ConfigError, match=says) as error:
        Server(secured(quick, **how)).start()
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_only_signed_versions_are_served_where_keys_are_trusted(repository, quick, serve, keys):
    mine, theirs = signer(keys / "mine.key"), signer(keys / "theirs.key")
    b.publish(repository, sign=mine)
    server = serve(secured(quick, trusted_keys=[str(keys / "mine.pub")]))
    unsigned, foreign, good = (
        b.publish(repository),
        b.publish(repository, sign=theirs),
        b.publish(repository, sign=mine),
    )
    with Client(server.target) as client:
        for version, says in ((unsigned, "is not signed"), (foreign, "not by a key that this server trusts")):
            *_, last = client.submit("road", version)
            assert (last.state, last.check) == ("REJECTED", "signature")
            assert says in last.reason
        assert [e.state for e in client.submit("road", good)][-1] == "LIVE"


def test_a_signature_does_not_fit_another_version(repository, quick, serve, keys):
    mine = signer(keys / "mine.key")
    b.publish(repository, sign=mine)
    server = serve(secured(quick, trusted_keys=[str(keys / "theirs.pub"), str(keys / "mine.pub")]))
    other = b.publish(repository)
    (repository.directory("road", other) / "manifest.sig").write_bytes(
        (repository.directory("road", 1) / "manifest.sig").read_bytes()
    )
    with Client(server.target) as client:
        assert client.infer("road", FRAME).version == 1
        *_, last = client.submit("road", other)
        assert (last.state, last.check) == ("REJECTED", "signature")


def test_a_key_that_is_none(tmp_path):
    (tmp_path / "x").write_text("hello")
    with pytest.raises(ConfigError, match="openssl genpkey"):
        signer(tmp_path / "x")


@pytest.mark.parametrize("package", ["v1alpha", "v1"])
def test_reflection_names_every_service(repository, quick, serve, package):
    """v1 and v1alpha are the same messages under two names."""
    pytest.importorskip("grpc_reflection")
    from grpc_reflection.v1alpha import reflection_pb2

    b.publish(repository)
    server = serve(quick)
    with grpc.insecure_channel(server.target) as channel:
        info = channel.stream_stream(
            f"/grpc.reflection.{package}.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )
        ask = reflection_pb2.ServerReflectionRequest
        symbols = ("roadworthy.v1.Roadworthy", "inference.GRPCInferenceService", "grpc.health.v1.Health")
        requests = [ask(list_services=""), *(ask(file_containing_symbol=symbol) for symbol in symbols)]
        services, *files = list(info(iter(requests)))
        names = {service.name for service in services.list_services_response.service}
        assert names >= set(symbols)
        assert all(file.file_descriptor_response.file_descriptor_proto for file in files)
        # each stream holds a thread: they are bounded, and answers go on
        over = threading.Event()

        def held():
            yield requests[0]
            over.wait(PATIENCE)

        streams = []

        def full():
            stream = info(held())
            with contextlib.suppress(grpc.RpcError):
                next(stream)
                streams.append(stream)
            return len(streams) == REFLECTIONS

        until(full)  # the one above may not have given its place back yet
        with pytest.raises(grpc.RpcError) as refused:
            list(info(iter(requests)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        over.set()


# -- read again ----------------------------------------------------------------------


def presented(server):
    """The certificate that a new connection gets."""
    host, _, port = server.target.rpartition(":")
    return ssl.get_server_certificate((host, int(port)))


def test_certificates_are_read_again(repository, quick, serve, keys, tmp_path):
    b.publish(repository)
    for name in ("server", "client"):
        for kind in ("pem", "key"):
            shutil.copy(keys / f"{name}.{kind}", tmp_path)
    how = {"certificate": str(tmp_path / "server.pem"), "key": str(tmp_path / "server.key")}
    server = serve(secured(quick, **how))
    ca = grpc.ssl_channel_credentials(read(keys / "ca.pem"))

    def pem(name):
        return ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(read(keys / name).decode()))

    with Client(server.target, credentials=ca) as client:
        assert client.infer("road", FRAME).version == 1
        assert presented(server) == pem("server.pem")
        for name, content in (
            ("server.pem", b"rust"),
            ("server.pem", b""),
            ("server.pem", read(keys / "client.pem")),  # of another key
            ("server.key", read(keys / "mine.pub")),
        ):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ConfigError, match=r"security\.certificate"):
                server.configure(server.config)
            assert presented(server) == pem("server.pem")  # what there was before
            shutil.copy(keys / name, tmp_path / name)
        shutil.copy(keys / "client.pem", tmp_path / "server.pem")
        shutil.copy(keys / "client.key", tmp_path / "server.key")
        assert server.configure(server.config) == []
        assert presented(server) == pem("client.pem")
        assert client.infer("road", FRAME).version == 1  # the connection that stands goes on
        with pytest.raises(ConfigError, match="TLS is switched on and off at a start"):
            server.configure(dataclasses.replace(quick, security=SecurityConfig()))
    with Client(server.target, credentials=ca) as client:
        assert client.infer("road", FRAME, timeout=PATIENCE).version == 1


def test_tokens_are_read_again(repository, quick, serve):
    b.publish(repository)
    server = serve(secured(quick, tokens={"old": ["infer"]}))

    def may(token):
        with Client(server.target, token=token) as client:
            try:
                return client.infer("road", FRAME).version == 1
            except Rejected as refused:
                if refused.code != "UNAUTHENTICATED":
                    raise
                return False

    assert (may("old"), may("new")) == (True, False)
    assert server.configure(secured(quick, tokens={"new": ["infer"]})) == []
    assert (may("old"), may("new")) == (False, True)
    for tokens in (
        {"": ["infer"]},
        {"x": ["root"]},
        {},
    ):  # a file that was cut short does not open the server
        with pytest.raises(ConfigError, match=r"security\.tokens"):
            server.configure(secured(quick, tokens=tokens))
        assert (may("old"), may("new"), may("")) == (False, True, False)


def test_a_server_reads_them_again_at_a_signal(repository, tmp_path):
    """And says in its log what is wrong with a file, and goes on with what it had."""
    b.publish(repository)
    file, log = tmp_path / "server.toml", tmp_path / "log"
    file.write_text('[security.tokens]\n"old" = ["infer"]\n')
    command = [sys.executable, "-m", "runtime.serve", "--repository", str(repository.path), "--port", "0"]
    with open(log, "w") as err:
        command += ["--metrics-port", "-1", "--config", str(file)]
        process = subprocess.Popen(command, stderr=err, cwd=ROOT)

    def said(pattern):
        end = time.monotonic() + 60
        while not (found := re.search(pattern, log.read_text())):
            assert time.monotonic() < end, log.read_text()
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        return found

    try:
        target = said(r"ready grpc=(\S+)").group(1)
        said("version 1 is live")  # by then it listens to signals
        file.write_text('[security.tokens]\n"" = ["infer"]\n')
        process.send_signal(signal.SIGHUP)
        said("HUP: security.tokens: an empty token cannot be used.*nothing was changed")
        with Client(target, token="old") as client:
            assert client.infer("road", FRAME).version == 1
        file.write_text('[security.tokens]\n"new" = ["infer"]\n')
        process.send_signal(signal.SIGHUP)
        said("HUP: configuration read again")
        with Client(target, token="old") as client, pytest.raises(Rejected, match="a token is needed"):
            client.infer("road", FRAME)
        with Client(target, token="new") as client:
            assert client.infer("road", FRAME).version == 1
        assert "needs a new start" not in log.read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("token", ["", " ", "two words", "tab\t", "ä"])
def test_a_token_that_nobody_could_send_is_refused(repository, quick, token):
    with pytest.raises(ConfigError, match=r"security\.tokens: .* cannot be used"):
        Server(secured(quick, tokens={token: ["control"]}))


@pytest.mark.parametrize(
    ("host", "how", "says"),
    [
        ("0.0.0.0", {}, "without tokens"),
        ("::", {}, "without tokens"),
        ("0.0.0.0", {"certificate": "c", "key": "k"}, "without tokens"),
        ("0.0.0.0", {"tokens": {"x": ["infer"]}}, "without TLS"),
        ("0.0.0.0", {"certificate": "c", "key": "k", "tokens": {"x": ["infer"]}}, ""),
        ("0.0.0.0", {"certificate": "c", "key": "k", "client_ca": "a"}, ""),
        ("127.0.0.1", {}, ""),
        ("unix:/tmp/x", {}, ""),
    ],
)
def test_a_server_that_other_machines_reach_warns(host, how, says):
    warning = exposed(SecurityConfig(**how), host)
    assert bool(warning) == bool(says)
    assert says in warning
