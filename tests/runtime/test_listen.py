"""Where the server listens, and in what words it says that it cannot."""

from __future__ import annotations

import dataclasses
import os
import socket
import tempfile
import urllib.request

import grpc
import numpy as np
import pytest

from common import files
from protos import inference_pb2 as pb
from runtime import listen
from runtime.client import Client, RpcError, messages
from runtime.config import ServerConfig, SharedMemoryConfig, from_dict, load
from runtime.errors import ConfigError
from runtime.server import Server
from runtime.service import Service
from tests.runtime import builders as b

FRAME = np.zeros((*b.SIZE, 3), np.uint8)


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


SIX = pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6")


@pytest.mark.parametrize(
    ("host", "target"),
    [
        ("127.0.0.1", "127.0.0.1:"),
        ("0.0.0.0", "127.0.0.1:"),
        ("localhost", "localhost:"),
        pytest.param("::1", "[::1]:", marks=SIX),
        pytest.param("[::1]", "[::1]:", marks=SIX),
        pytest.param("::", "[::1]:", marks=SIX),
    ],
)
def test_addresses_that_can_be_listened_on(repository, quick, serve, host, target):
    b.publish(repository)
    server = serve(dataclasses.replace(quick, host=host))
    assert server.target.startswith(target)
    assert server.metrics_target.startswith(target)
    with Client(server.target) as client:
        assert client.infer("road", FRAME).version == 1
    assert urllib.request.urlopen(f"http://{server.metrics_target}/metrics").status == 200


@pytest.mark.parametrize("scheme", ["unix:", "unix://", "unix-abstract:"])
def test_sockets_of_the_file_system(repository, quick, serve, scheme):
    b.publish(repository)
    with tempfile.TemporaryDirectory() as home:
        server = serve(dataclasses.replace(quick, host=f"{scheme}{home}/road.sock"))
        assert server.target == f"{scheme}{home}/road.sock"
        assert server.metrics_target.startswith("127.0.0.1:")
        with Client(server.target) as client:
            assert client.infer("road", FRAME).version == 1
        other = dataclasses.replace(quick, host=server.target, read_only=True)
        with pytest.raises(ConfigError, match="is another server there"):
            Server(other).start()
        with Client(server.target) as client:  # and it has not taken the socket away
            assert client.infer("road", FRAME).version == 1
        server.stop()


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("nonsense.invalid", "cannot listen on nonsense.invalid:0: the host cannot be resolved"),
        ("[::", "cannot be resolved"),
        ("192.0.2.1", "this machine has no such address"),
        ("unix:", "a path belongs behind"),
        ("unix:/proc/none/there.sock", "/proc/none is not a directory"),
        ("unix:/tmp/" + "x" * 120, "at most 107 bytes"),
        ("unix-abstract:" + "x" * 120, "at most 107 bytes"),
        ("unix-abstract:", "a name belongs behind 'unix-abstract:'"),
        ("unix:{file}", "is there and is no socket"),
    ],
)
def test_what_cannot_be_listened_on_is_refused_by_its_reason(repository, quick, tmp_path, host, says):
    (tmp_path / "file").write_text("")
    server = Server(dataclasses.replace(quick, host=host.format(file=tmp_path / "file")))
    with pytest.raises(ConfigError) as error:
        server.start()
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert "another server" not in str(error.value)


def test_a_port_that_is_taken(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    for key in ("port", "metrics_port"):
        taken = server.port if key == "port" else server.metrics_port
        config = dataclasses.replace(quick, read_only=True, **{key: taken})
        with pytest.raises(ConfigError, match="choose another"):
            Server(config).start()
    with Client(server.target) as client:
        assert client.infer("road", FRAME).version == 1


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("::ffff:127.0.0.1", True),
        ("unix:/tmp/x", True),
        ("unix-abstract:x", True),
        ("0.0.0.0", False),
        ("::", False),
        ("[::]", False),
        ("", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
        ("nonsense.invalid", False),
    ],
)
def test_who_can_connect(host, local):
    assert listen.is_local(host) is local


# -- memory of clients ---------------------------------------------------------------


def extensions(server):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata")
        return set(pb.ServerMetadataResponse.FromString(call(b"")).extensions)


@pytest.mark.parametrize(
    ("host", "allow", "works"),
    [
        ("127.0.0.1", "auto", True),
        ("127.0.0.1", "off", False),
        ("0.0.0.0", "auto", False),
        ("0.0.0.0", "on", True),
    ],
)
def test_clients_memory_is_off_where_other_machines_can_connect(
    repository, quick, serve, host, allow, works, caplog, monkeypatch
):
    monkeypatch.setattr(messages, "WORTH", 1)  # bytes from which the client uses such memory
    b.publish(repository)
    server = serve(dataclasses.replace(quick, host=host, shared_memory=SharedMemoryConfig(allow)))
    with grpc.insecure_channel(server.target) as channel:
        for kind, request in (
            ("System", pb.SystemSharedMemoryRegisterRequest(name="x", key="/none", byte_size=8)),
            ("Cuda", pb.CudaSharedMemoryRegisterRequest(name="x", byte_size=8, raw_handle=bytes(64))),
        ):
            call = channel.unary_unary(f"/inference.GRPCInferenceService/{kind}SharedMemoryRegister")
            with pytest.raises(grpc.RpcError) as error:
                call(request.SerializeToString())
            off = error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert off is not works
            assert ("--allow-client-shm" in error.value.details()) is off
    assert ({"system_shared_memory", "cuda_shared_memory"} <= extensions(server)) is works
    with Client(server.target) as client:  # it finds out, and sends frames the plain way
        for _ in range(2):
            assert client.infer("road", FRAME).version == 1
    with Client(server.target, shared_memory=True) as client:
        if works:
            assert client.infer("road", FRAME).version == 1
        else:
            with pytest.raises(RpcError, match="switched off"):
                client.infer("road", FRAME)
    exposed = [r.getMessage() for r in caplog.records if "beyond this machine" in r.getMessage()]
    assert len(exposed) == (host == "0.0.0.0")


def test_a_prefix_of_the_names_of_clients_memory(tmp_path):
    mine, other = f"road-{os.getpid()}", f"lidar-{os.getpid()}"
    for name in (mine, other):
        with open(f"/dev/shm/{name}", "wb") as file:
            file.write(bytes(4096))
    try:
        config = ServerConfig(repository=str(tmp_path), shared_memory=SharedMemoryConfig(prefix="/road-"))
        regions = Service(config).regions
        regions.register("mine", f"/{mine}", 0, 4096)
        for key in (f"/{other}", other, f"//{mine}", f"/../shm/{other}", ""):
            with pytest.raises(Exception, match=r"begins with 'road-'"):
                regions.register("other", key, 0, 4096)
        assert [region.name for region in regions.status("")] == ["mine"]
        regions.close()
    finally:
        for name in (mine, other):
            os.unlink(f"/dev/shm/{name}")


# -- files that are none, names that are mistyped ------------------------------------


def test_a_pipe_where_a_file_belongs_is_refused_and_not_waited_for(repository, quick, tmp_path, caplog):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="is a pipe, and a plain file belongs there"):
        files.read_file(pipe)
    with pytest.raises(OSError, match="is a device"):
        files.read_file("/dev/zero")
    (tmp_path / "four").write_bytes(b"four")
    with pytest.raises(OSError, match="more than 3 bytes"):
        files.read_file(tmp_path / "four", 3)
    with pytest.raises(ConfigError, match="is a pipe"):
        load(pipe)
    for key in ("certificate", "key"):
        security = {"certificate": __file__, "key": __file__, key: str(pipe)}
        with pytest.raises(ConfigError, match=f"security.{key}: .*is a pipe"):
            Server(from_dict({"repository": quick.repository, "security": security}))
    b.publish(repository)
    for name in ("live.json", "config.pbtxt"):
        (repository.path / "road" / name).unlink(missing_ok=True)
        os.mkfifo(repository.path / "road" / name)
    server = Server(dataclasses.replace(quick, read_only=True)).start()
    assert server.service.model_ready("road", "")
    server.stop()
    (repository.path / "road" / "history.jsonl").unlink(missing_ok=True)
    os.mkfifo(repository.path / "road" / "history.jsonl")
    server = Server(quick).start()  # its records are not used, and the log says so
    assert server.service.model_ready("road", "")
    server.stop()
    assert "history.jsonl: not used: not a plain file" in caplog.text


def test_a_mistyped_model_is_named(repository, quick, caplog):
    b.publish(repository)
    b.publish(repository, "rear")
    for config, key in (
        (dataclasses.replace(quick, models=["rear", "raod"]), "models"),
        (dataclasses.replace(quick, groups={"scene": ["rear", "raod"]}), "groups"),
    ):
        with pytest.raises(ConfigError, match=f"{key}: 'raod' is not in .*did you mean 'road'"):
            Server(config).start()
    with pytest.raises(ConfigError, match="is no model name"):
        dataclasses.replace(quick, models=["../road"])
    # a name like no other may be published later
    server = Server(dataclasses.replace(quick, models=["road", "zebra"])).start()
    assert list(server.service.models.hosts()) == ["road"]
    assert "'zebra' is not in the repository" in caplog.text
    server.stop()
