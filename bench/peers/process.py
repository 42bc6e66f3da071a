"""A server as a child process: started, waited for, weighed, stopped.

Knows Linux's /proc and gRPC's channel readiness; knows nothing of any one server.
Only the process that was started here, and its descendants, are ever signalled.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

_TICKS = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def tree(pid: int) -> list[int]:
    """The process and all its living descendants."""
    found, queue = [], [pid]
    while queue:
        current = queue.pop()
        if not Path(f"/proc/{current}").exists():
            continue
        found.append(current)
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{current}/task").iterdir():
                queue += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of the process and its living descendants."""
    total = 0
    for one in tree(pid):
        with contextlib.suppress(OSError, IndexError):
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def pss_bytes(pid: int) -> int:
    """Proportional set size of the process tree: shared pages are counted once."""
    total = 0
    for one in tree(pid):
        with contextlib.suppress(OSError, StopIteration):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
    return total


def rss_bytes(pid: int) -> int:
    """Resident set size of the process alone."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024


def descriptors(pid: int) -> int:
    """Open file descriptors of the process alone."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def shared_regions(pid: int) -> int:
    """POSIX shared memory that the process holds: descriptors and mappings."""
    mapped = sum("/dev/shm/" in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
    opened = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            opened += os.readlink(descriptor).startswith("/dev/shm/")
    return mapped + opened


def threads(pid: int) -> int:
    """Threads of the process alone."""
    return len(os.listdir(f"/proc/{pid}/task"))


def _end_with_parent() -> None:
    """Linux: the server gets SIGTERM when this process ends, even where it is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server:
    """A running server.  A context manager: leaving it stops the process.

    target    "127.0.0.1:PORT" of its gRPC service
    started   seconds from start until `ready` was true
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        target: str,
        ready: Callable[[], bool],
        log: Path,
        environment: dict[str, str] | None = None,
        directory: Path | None = None,
        timeout: float = 90.0,
    ) -> None:
        self.name = name
        self.target = target
        self.log = log
        begin = time.perf_counter()
        with open(log, "wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=directory,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        try:
            while not ready():
                if self.process.poll() is not None:
                    raise RuntimeError(
                        f"{name} ended with status {self.process.returncode}; its output: {self.tail()}"
                    )
                if time.perf_counter() - begin > timeout:
                    raise RuntimeError(
                        f"{name} was not ready after {timeout:.0f} s; its output: {self.tail()}"
                    )
                time.sleep(0.02)
        except BaseException:
            self.stop()
            raise
        self.started = time.perf_counter() - begin

    @property
    def pid(self) -> int:
        return self.process.pid

    def tail(self, count: int = 1500) -> str:
        """The end of what the server wrote."""
        return self.log.read_text(errors="replace")[-count:]

    def stop(self, grace: float = 10.0) -> None:
        """SIGTERM, then SIGKILL for whatever of the tree is left after `grace` seconds."""
        members = tree(self.process.pid)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in members:
            with contextlib.suppress(OSError):
                if os.getsid(pid) == self.process.pid:
                    os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def answers_http(port: int, path: str) -> Callable[[], bool]:
    """A `ready` for HTTP servers: GET `path` gives 200."""

    def ask() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return ask


def live(target: str, model: str = "") -> Callable[[], bool]:
    """A `ready` for KServe v2 servers: ServerReady, or ModelReady where a model is named."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    def ask() -> bool:
        with grpc.insecure_channel(target) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                if model:
                    return bool(stub.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=1).ready)
                return bool(stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=1).ready)
            except grpc.RpcError:
                return False

    return ask
