"""The client that every server is measured with: ready-made request bytes, nothing parsed but the version.

A general client spends more on a frame than the server does, and on two cores that hides the server.
This one serialises its request once and sends the same bytes again; the shared-memory one writes the
frame into its region each time, as a camera does.  Knows the wire and no server.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import shared_memory
from types import TracebackType

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

PATH = "/inference.GRPCInferenceService/ModelInfer"
OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # a connection each, as separate clients have
)
OUTPUTS = ("labels", "confidence")


def request_bytes(
    model: str, frame: np.ndarray, *, outputs: Sequence[str] = OUTPUTS, as_text: bool = False
) -> bytes:
    """A ModelInferRequest with the frame uint8 [N,H,W,3] as raw contents.

    as_text  as one BYTES element: MLServer turns any other datatype into a Python list
    """
    request = pb.ModelInferRequest(model_name=model)
    raw = frame.tobytes()
    if as_text:
        request.inputs.add(name="frame", datatype="BYTES", shape=[1])
        raw = len(raw).to_bytes(4, "little") + raw
    else:
        request.inputs.add(name="frame", datatype="UINT8", shape=list(frame.shape))
    for name in outputs:
        request.outputs.add(name=name)
    request.raw_input_contents.append(raw)
    return bytes(request.SerializeToString())


def answered_version(answer: bytes) -> str:
    """model_version of a serialised ModelInferResponse; "" where it has none."""
    position = 0
    while position < min(len(answer), 4096):
        tag = answer[position]
        position += 1
        length = shift = 0
        while True:
            byte = answer[position]
            position += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if tag & 7 == 0:  # a number: already read
            continue
        if tag == 0x12:
            return answer[position : position + length].decode()
        position += length
    return ""


class Sender:
    """One connection to a server.  `send` returns the answer's bytes; a context manager."""

    def __init__(self, target: str, request: bytes) -> None:
        self._channel = grpc.insecure_channel(target, OPTIONS)
        self._call = self._channel.unary_unary(PATH)
        self.request = request

    def send(self, timeout: float = 30.0) -> bytes:
        answer: bytes = self._call(self.request, timeout=timeout)
        return answer

    def future(self, timeout: float = 30.0) -> grpc.Future:
        return self._call.future(self.request, timeout=timeout)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Sender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class SharedSender(Sender):
    """The same through system shared memory, both ways: the frame is written for each request."""

    def __init__(
        self,
        target: str,
        model: str,
        frame: np.ndarray,
        *,
        outputs: Sequence[str] = OUTPUTS,
        size: int | None = None,
    ) -> None:
        count = frame.shape[0] * frame.shape[1] * frame.shape[2] if size is None else size
        mark = uuid.uuid4().hex[:12]
        self._frame = frame
        self.names = [f"rw_in_{mark}", f"rw_out_{mark}"]
        self.sizes = [frame.nbytes, count * len(outputs)]
        self._regions = [
            shared_memory.SharedMemory(name, create=True, size=one)
            for name, one in zip(self.names, self.sizes, strict=True)
        ]
        self._view: np.ndarray | None = np.ndarray(frame.shape, np.uint8, self._regions[0].buf)
        request = pb.ModelInferRequest(model_name=model)
        tensor = request.inputs.add(name="frame", datatype="UINT8", shape=list(frame.shape))
        tensor.parameters["shared_memory_region"].string_param = self.names[0]
        tensor.parameters["shared_memory_byte_size"].int64_param = frame.nbytes
        for i, name in enumerate(outputs):
            output = request.outputs.add(name=name)
            output.parameters["shared_memory_region"].string_param = self.names[1]
            output.parameters["shared_memory_byte_size"].int64_param = count
            output.parameters["shared_memory_offset"].int64_param = i * count
        super().__init__(target, bytes(request.SerializeToString()))
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        try:
            for name, one in zip(self.names, self.sizes, strict=True):
                self._stub.SystemSharedMemoryRegister(
                    pb.SystemSharedMemoryRegisterRequest(name=name, key=f"/{name}", byte_size=one), timeout=10
                )
        except grpc.RpcError:
            self.close()
            raise

    def send(self, timeout: float = 30.0) -> bytes:
        assert self._view is not None
        np.copyto(self._view, self._frame)
        return super().send(timeout)

    def close(self) -> None:
        for name in self.names:
            with contextlib.suppress(grpc.RpcError, ValueError):
                self._stub.SystemSharedMemoryUnregister(
                    pb.SystemSharedMemoryUnregisterRequest(name=name), timeout=10
                )
        self._view = None
        for region in self._regions:
            region.close()
            region.unlink()
        super().close()


class HttpSender(Sender):
    """The same over HTTP, for servers that have no gRPC: a POST of ready-made bytes on a kept connection."""

    def __init__(self, target: str, path: str, body: bytes, content_type: str) -> None:
        host, port = target.rsplit(":", 1)
        self.request = body
        self._path = path
        self._headers = {"Content-Type": content_type}
        self._connection = http.client.HTTPConnection(host, int(port), timeout=30)

    def send(self, timeout: float = 30.0) -> bytes:
        """b"", for there is no version in the answer.  Raises RuntimeError for anything but 200."""
        self._connection.request("POST", self._path, self.request, self._headers)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"HTTP {answer.status}: {content[:200]!r}")
        return b""

    def future(self, timeout: float = 30.0) -> grpc.Future:
        raise NotImplementedError("these servers are asked in a closed loop")

    def close(self) -> None:
        self._connection.close()


@dataclass
class Sent:
    """One request: when due and answered (time.perf_counter()), and by which version or with which code."""

    due: float
    done: float
    version: str = ""
    failure: str = ""

    @property
    def milliseconds(self) -> float:
        return (self.done - self.due) * 1000.0


@dataclass
class Result:
    """What a run of load gave."""

    seconds: float
    sent: list[Sent] = field(default_factory=list)

    @property
    def answered(self) -> list[Sent]:
        return [one for one in self.sent if not one.failure]

    @property
    def failed(self) -> int:
        return len(self.sent) - len(self.answered)

    @property
    def throughput(self) -> float:
        return len(self.answered) / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds; nan where nothing was answered."""
        return percentile([one.milliseconds for one in self.answered], share)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` per cent of the values do not exceed; nan for none."""
    return float(np.percentile(values, share, method="higher")) if values else float("nan")


def closed_loop(
    senders: Sequence[Sender],
    seconds: float,
    *,
    limit: int = 0,
    pace: float = 0.0,
    when: Callable[[], None] | None = None,
) -> Result:
    """Each sender sends when it is answered, for `seconds`, or for `limit` requests if that is sooner.

    pace  seconds at least between two requests of one sender
    when  called in the middle of it, by the calling thread
    """
    results: list[list[Sent]] = [[] for _ in senders]
    begin = threading.Barrier(len(senders) + 1)
    stop = threading.Event()

    def loop(sender: Sender, out: list[Sent]) -> None:
        begin.wait()
        while not stop.is_set() and (not limit or len(out) < limit):
            due = time.perf_counter()
            out.append(_finish(due, sender.send))
            rest = due + pace - time.perf_counter()
            if rest > 0:
                stop.wait(rest)

    workers = [
        threading.Thread(target=loop, args=(sender, out), daemon=True)
        for sender, out in zip(senders, results, strict=True)
    ]
    for worker in workers:
        worker.start()
    begin.wait()
    started = time.perf_counter()
    if when is not None:
        when()
    if limit:
        for worker in workers:
            worker.join(max(0.0, started + seconds - time.perf_counter()))
    else:
        time.sleep(max(0.0, started + seconds - time.perf_counter()))
    stop.set()
    for worker in workers:
        worker.join()
    return Result(time.perf_counter() - started, [one for out in results for one in out])


class OpenLoop:
    """Requests at a fixed rate, whether or not the last one was answered.  A context manager.

    A request's latency counts from when it was due, so that a server which stalls is charged for every
    frame that waited.
    """

    def __init__(self, senders: Sequence[Sender], rate: float) -> None:
        self.sent: list[Sent] = []
        self._senders = senders
        self._rate = rate
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._pending = 0
        self._idle = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        start = time.perf_counter()
        count = 0
        while not self._stop.is_set():
            due = start + count / self._rate
            wait = due - time.perf_counter()
            if wait > 0 and self._stop.wait(wait):
                break
            with self._lock:
                self._pending += 1
            future = self._senders[count % len(self._senders)].future()
            future.add_done_callback(lambda done, due=due: self._record(due, done))
            count += 1

    def _record(self, due: float, future: grpc.Future) -> None:
        one = _finish(due, future.result)
        with self._idle:
            self.sent.append(one)
            self._pending -= 1
            self._idle.notify_all()

    def __enter__(self) -> OpenLoop:
        self._begun = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        with self._idle:
            self._idle.wait_for(lambda: self._pending == 0, timeout=60)
        self.seconds = time.perf_counter() - self._begun

    def between(self, begin: float, end: float) -> list[Sent]:
        """The requests that were under way at any moment of [begin, end]."""
        with self._lock:
            return [one for one in self.sent if one.done >= begin and one.due <= end]


def _finish(due: float, call: Callable[[], bytes]) -> Sent:
    try:
        version = answered_version(call())
        return Sent(due, time.perf_counter(), version)
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.Call) else None
        return Sent(due, time.perf_counter(), failure=code.name if code is not None else str(error))
    except (RuntimeError, OSError, http.client.HTTPException) as error:
        return Sent(due, time.perf_counter(), failure=str(error))


@contextlib.contextmanager
def opened(senders: list[Sender]) -> Iterator[list[Sender]]:
    """Closes all of them at the end."""
    try:
        yield senders
    finally:
        for sender in senders:
            sender.close()
