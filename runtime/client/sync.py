"""The client for threads."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import grpc

from protos import roadworthy_pb2, roadworthy_pb2_grpc
from runtime.client import messages as m
from runtime.client.messages import Answer, Ask, Event, Inference, Rejected, Scalar, TappedFrame
from runtime.client.shm_segments import SegmentPool, ShmSegment
from runtime.tensors import Array

T = TypeVar("T")


class Client:
    """`with Client("127.0.0.1:8001") as client: client.infer("road", frame)`.  For any number of threads.

    token: sent as "authorization: Bearer …".  credentials: grpc.ssl_channel_credentials(…) for TLS.
    shared_memory: frames and answers go through memory that both sides see.  None (the default) does so where
    the target is this machine and the server can open the memory; True insists; False never does.
    deadline: seconds that a call of the control service may take, or a stream until it stands.

    Methods raise Rejected when the server refuses with a reason, RpcError when there is no answer.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str = "",
        credentials: Any = None,
        shared_memory: bool | None = None,
        max_message: int = 256 << 20,
        deadline: float = m.DEADLINE,
    ) -> None:
        options = m.options(max_message)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._metadata = m.metadata(token)
        self._deadline = deadline
        self._infer = self._channel.unary_unary(f"{m.KSERVE}ModelInfer")
        self._stream_infer = self._channel.stream_stream(f"{m.KSERVE}ModelStreamInfer")
        self._insist = shared_memory is True
        self._segments = SegmentPool()
        self._use_segments = m.is_local(target) if shared_memory is None else shared_memory
        self._control: Any = roadworthy_pb2_grpc.RoadworthyStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for segment in self._segments.close():
            self._end(segment)
        self._channel.close()

    def wait_ready(self, timeout: float = 10.0) -> None:
        """Waits for the connection; grpc.FutureTimeoutError after `timeout` seconds."""
        grpc.channel_ready_future(self._channel).result(timeout)

    # -- frames ----------------------------------------------------------------------

    def infer(
        self,
        model: str,
        frame: Array,
        *,
        outputs: Sequence[str] = ("labels", "confidence"),
        source: str = "",
        timeout: float | None = None,
        version: int = 0,
        request_id: str = "",
        collect: bool | None = None,
        place: tuple[float, float] | None = None,
    ) -> Answer:
        """Sends one frame uint8 [H,W,3] (or a batch [N,H,W,3]) and waits for its answer.

        `version` 0 is the live one; `outputs` () is what the server gives of itself; `timeout` in seconds,
        None = as long as it takes.  `collect`: whether the frame may be kept for adaptation, None = what the
        server's policy says; `place`: (latitude, longitude) where it was taken.
        """
        call = Inference(
            model,
            frame,
            outputs,
            source=source,
            version=version,
            request_id=request_id,
            collect=collect,
            place=place,
        )
        segment = self._borrow(call, timeout)
        if segment is not None:
            try:
                with m.translated():
                    message = self._infer(call.through(segment), timeout=timeout, metadata=self._metadata)
            except Rejected as refused:
                if not m.segment_is_unknown(refused):
                    self._give_back(segment)
                    raise
                self._end(segment)
            except BaseException:
                self._end(segment)  # the server may still write into it: it is not used again
                raise
            else:
                answer = call.answer(message, segment)
                self._give_back(segment)
                return answer
        with m.translated():
            return call.answer(self._infer(call.plain(), timeout=timeout, metadata=self._metadata))

    def infer_tensors(
        self,
        model: str,
        inputs: dict[str, Array],
        *,
        outputs: Sequence[str] = (),
        parameters: dict[str, Scalar] | None = None,
        timeout: float | None = None,
        version: int = 0,
        request_id: str = "",
    ) -> Answer:
        """Any model: named arrays in, named arrays out."""
        message = m.tensors(model, inputs, outputs, parameters or {}, version=version, request_id=request_id)
        with m.translated():
            return m.read(self._infer(message, timeout=timeout, metadata=self._metadata))

    def infer_stream(
        self,
        model: str,
        frames: Iterable[Array],
        *,
        outputs: Sequence[str] = ("labels", "confidence"),
        source: str = "",
        version: int = 0,
        window: int = 4,
    ) -> Iterator[Answer | Rejected]:
        """Frames over one stream; for each, in order, its answer, or the refusal as a value: the stream goes
        on.  At most `window` frames are under way, so a slow reader holds the sender back.

        Closing the iterator cancels what is under way.  RpcError ends it when the connection does.
        """
        under_way: deque[tuple[Inference, ShmSegment | None]] = deque()
        free = threading.Semaphore(window)
        over = threading.Event()
        failed: list[BaseException] = []

        def end() -> None:
            with contextlib.suppress(IndexError):
                while True:
                    self._end(under_way.popleft()[1])

        def requests() -> Iterator[bytes]:  # in a thread of gRPC's
            try:
                for frame in frames:
                    while not free.acquire(timeout=0.5):
                        if over.is_set():
                            return
                    if over.is_set():
                        return
                    call = Inference(model, frame, outputs, source=source, version=version)
                    segment = self._borrow(call)
                    message = call.plain() if segment is None else call.through(segment)
                    under_way.append((call, segment))
                    if over.is_set():  # meanwhile: whoever sees the segment last ends it
                        end()
                        return
                    yield message
            except BaseException as error:  # the caller's iterator, or its frames: gRPC would swallow it
                failed.append(error)

        stream = self._stream_infer(requests(), metadata=self._metadata)
        try:
            with m.translated():
                for message in stream:
                    call, segment = under_way.popleft()
                    answer = m.streamed(message)
                    if isinstance(answer, Rejected):
                        self._give_back(segment)
                        yield answer
                    else:
                        read = call.answer(answer, segment)
                        self._give_back(segment)
                        yield read
                    free.release()
            if failed:
                raise failed[0]
        finally:
            over.set()
            stream.cancel()
            end()

    # -- shared memory ---------------------------------------------------------------

    def _borrow(self, call: Inference, timeout: float | None = None) -> ShmSegment | None:
        """A segment for a call, or None when it goes the plain way."""
        if not self._use_segments or not call.fits_segment:
            return None
        segment, small = self._segments.borrow(call.size)
        self._end(small)
        if segment is not None:
            return segment
        try:
            segment = ShmSegment(call.size)
            try:
                self._kserve("SystemSharedMemoryRegister", m.registration(segment), timeout)
            except BaseException:
                segment.close()
                raise
            finally:
                segment.unlink()
        except (OSError, grpc.RpcError) as error:
            if self._insist:
                raise
            if not m.had_no_time(error, timeout):
                self._use_segments = (
                    False  # another machine under this one's name, no shared memory, another server
                )
            return None
        return segment

    def _give_back(self, segment: ShmSegment | None) -> None:
        if segment is not None and not self._segments.give_back(segment):
            self._end(segment)

    def _end(self, segment: ShmSegment | None) -> None:
        if segment is not None:
            with contextlib.suppress(grpc.RpcError, ValueError):  # a server that is gone has forgotten it
                self._kserve("SystemSharedMemoryUnregister", m.unregistration(segment))
            segment.close()

    def _kserve(self, name: str, request: bytes, timeout: float | None = None) -> bytes:
        call = self._channel.unary_unary(f"{m.KSERVE}{name}")
        answer: bytes = call(request, timeout=min(m.SHORT, timeout or m.SHORT), metadata=self._metadata)
        return answer

    def statistics(self, model: str = "") -> list[dict[str, Any]]:
        """KServe's ModelStatistics: one dictionary a version, "inference_stats" among its keys."""
        return m.read_statistics(self._kserve("ModelStatistics", m.ask_statistics(model)))

    # -- versions --------------------------------------------------------------------

    def status(self, model: str = "") -> dict[str, Any]:
        """{"server", "version", "uptime_seconds", "draining", "account", "models": {name: {…}}, "groups"}."""
        return self._ask(m.status(model))

    def versions(self, model: str) -> list[dict[str, Any]]:
        """One dictionary a version: version, state, reason, created, pack, parent, round, manifest."""
        return self._ask(m.versions(model))

    def history(self, model: str) -> list[Event]:
        """Every transition of every version of the model, oldest first."""
        return self._ask(m.history(model))

    def submit(self, model: str, version: int, *, timeout: float | None = None) -> Iterator[Event]:
        """Offers a version to the guarded swap; its events until LIVE or REJECTED.

        The swap is under way when this returns, and goes on if the iterator is dropped.
        """
        return self._events(m.submit(model, version), timeout)

    def promote(self, model: str, version: int, *, timeout: float | None = None) -> Iterator[Event]:
        """Like `submit`, without the shadow: an operator's word."""
        return self._events(m.promote(model, version), timeout)

    def reset(self, model: str, *, timeout: float | None = None) -> Iterator[Event]:
        """Back to the released pack: the newest version that no round of adaptation made, as by `promote`."""
        return self._events(m.reset(model), timeout)

    def rollback(self, model: str) -> Event:
        """Back to the previous version.  Rejected when there is none or the model is pinned."""
        return self._ask(m.rollback(model))

    def pin(self, model: str, version: int = 0) -> dict[str, Any]:
        """Fixes the live version; as `status`."""
        return self._ask(m.pin(model, version))

    def prune(self, model: str, keep: int = 0) -> dict[str, list[int]]:
        """Deletes versions that rounds of adaptation made, all but the newest `keep` (0 = as the server is
        configured) and those that are wanted; {"deleted": [numbers], "kept": [numbers]}.
        """
        return self._ask(m.prune(model, keep))

    def unpin(self, model: str) -> dict[str, Any]:
        return self._ask(m.unpin(model))

    def freeze(self, model: str = "", reason: str = "") -> dict[str, Any]:
        """Forbids flips to other versions; as `status`."""
        return self._ask(m.freeze(model, reason))

    def unfreeze(self, model: str = "") -> dict[str, Any]:
        return self._ask(m.unfreeze(model))

    def watch(self, model: str = "") -> Stream[Event]:
        """Every event from now on; the subscription stands when this returns.  Close it (or leave its
        `with`) to end it.
        """
        return self._subscribe(m.watch(model))

    def frames(self, model: str, *, max_fps: float = 0.0, source: str = "") -> Stream[TappedFrame]:
        """The tap: live frames with their answers; the subscription stands when this returns.  Close it
        to end it.
        """
        return self._subscribe(m.frames(model, max_fps, source))

    # -- frame groups ----------------------------------------------------------------

    def groups(self, group: str = "") -> dict[str, dict[str, Any]]:
        """{name: {"ready", "generation", "previous", "members": [{"model", "live", "previous"}], …}}."""
        return self._ask(m.groups(group))

    def submit_group(
        self, group: str, members: dict[str, int], *, timeout: float | None = None
    ) -> Iterator[Event]:
        """Offers {model: version} to the guarded swap as one: all of them go live, or none."""
        return self._events(m.submit_group(group, members), timeout)

    def rollback_group(self, group: str, *, timeout: float | None = None) -> Iterator[Event]:
        """Every member back to the generation before."""
        return self._events(m.rollback_group(group), timeout)

    # -- adaptation ------------------------------------------------------------------

    def drift(self, model: str) -> dict[str, Any]:
        """{"state", "since", "reason", "sources": [{"source", "state", "signals": […]}], …}."""
        return self._ask(m.drift(model))

    def adaptation(self, model: str) -> dict[str, Any]:
        """{"adapters": [{"name", "pid", "report": {…}, …}], "last", "collection"}."""
        return self._ask(m.adaptation(model))

    def start_round(self, model: str, reason: str = "") -> dict[str, Any]:
        """Tells the adapter to begin a round now; as `adaptation`, with "command" and "waiting".

        Rejected when no adapter is connected or it refuses.
        """
        return self._ask(m.start_round(model, reason))

    def cancel_round(self, model: str) -> dict[str, Any]:
        """Tells the adapter to give up its round; as `start_round`."""
        return self._ask(m.cancel_round(model))

    def set_collection(self, model: str, on: bool) -> dict[str, Any]:
        """Tells the adapter to keep frames or not to; as `start_round`."""
        return self._ask(m.set_collection(model, on))

    def watch_round(self, model: str) -> Stream[dict[str, Any]]:
        """The adapter's reports: the last one at once, then each as it comes."""
        return self._subscribe(m.watch_round(model))

    def adapter(self, reports: Iterator[dict[str, Any]]) -> Stream[dict[str, Any]]:
        """An adapter's own connection: `reports` are taken from the iterator in a thread of gRPC's and sent
        (fields of AdapterReport, nested; the first names `model` and `name`); gives the commands, whose first
        is {"welcome": …}.  The connection ends with either iterator.
        """
        messages = (roadworthy_pb2.AdapterReport(**report) for report in reports)
        return Stream(self._control.Adapter(messages, metadata=self._metadata), m.whole)

    # -- calls -----------------------------------------------------------------------

    def _ask(self, ask: Ask) -> Any:
        with m.translated():
            call = getattr(self._control, ask.call)
            return ask.read(call(ask.request, timeout=self._deadline, metadata=self._metadata))

    def _events(self, ask: Ask, timeout: float | None) -> Iterator[Event]:
        call = getattr(self._control, ask.call)(ask.request, timeout=timeout, metadata=self._metadata)

        def follow() -> Iterator[Event]:
            with m.translated():
                with _impatient(call, self._deadline):
                    call.initial_metadata()  # the server's word that it has taken it; its turn may come late
                for event in call:
                    yield ask.read(event)

        return follow()

    def _subscribe(self, ask: Ask) -> Stream[Any]:
        call = getattr(self._control, ask.call)(ask.request, metadata=self._metadata)
        with m.translated(), _impatient(call, self._deadline):
            call.initial_metadata()  # waits for the server's word that the subscription stands
            # a call that was refused has its status already; one that stands has none
            if call.done() and call.code() is not grpc.StatusCode.OK:
                raise call
        return Stream(call, ask.read)


class Stream(Generic[T]):
    """An iterator over a server stream that can be closed from any thread; closing ends the iteration
    quietly.
    """

    def __init__(self, call: Any, convert: Callable[[Any], T]) -> None:
        self._call = call
        self._convert = convert
        self._closed = False

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            with m.translated():
                return self._convert(next(self._call))
        except (grpc.RpcError, Rejected):
            if self._closed:
                raise StopIteration from None
            raise

    def close(self) -> None:
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def _impatient(call: Any, seconds: float) -> Iterator[None]:
    """Cancels a call whose peer is silent for `seconds`, and says so."""
    fired = threading.Event()

    def give_up() -> None:
        fired.set()
        call.cancel()

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except grpc.RpcError:
        if not fired.is_set():
            raise
    finally:
        timer.cancel()
    if fired.is_set():
        raise m.Silence(seconds)
