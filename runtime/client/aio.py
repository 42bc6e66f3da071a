"""The client for asyncio: the methods of `Client`, to be awaited or iterated with `async for`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, TypeVar

import grpc
from grpc import aio

from protos import roadworthy_pb2, roadworthy_pb2_grpc
from runtime.client import messages as m
from runtime.client.messages import Answer, Ask, Event, Inference, Rejected, Scalar, TappedFrame
from runtime.client.shm_segments import SegmentPool, ShmSegment
from runtime.tensors import Array

T = TypeVar("T")


class AsyncClient:
    """`async with AsyncClient("127.0.0.1:8001") as client: await client.infer("road", frame)`.

    Options, answers and exceptions are those of `Client`.  A cancelled call is cancelled on the server too.
    Belongs to the event loop it is made in.
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
            self._channel = aio.insecure_channel(target, options)
        else:
            self._channel = aio.secure_channel(target, credentials, options)
        self._metadata = m.metadata(token)
        self._deadline = deadline
        self._infer = self._channel.unary_unary(f"{m.KSERVE}ModelInfer")
        self._stream_infer = self._channel.stream_stream(f"{m.KSERVE}ModelStreamInfer")
        self._insist = shared_memory is True
        self._segments = SegmentPool()
        self._use_segments = m.is_local(target) if shared_memory is None else shared_memory
        self._control: Any = roadworthy_pb2_grpc.RoadworthyStub(self._channel)  # type: ignore[no-untyped-call]
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for segment in self._segments.close():
            self._end(segment)
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._channel.close()

    async def wait_ready(self, timeout: float = 10.0) -> None:
        """Waits for the connection; grpc.FutureTimeoutError after `timeout` seconds."""
        try:
            await asyncio.wait_for(self._channel.channel_ready(), timeout)
        except TimeoutError:
            raise grpc.FutureTimeoutError from None

    # -- frames ----------------------------------------------------------------------

    async def infer(
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
        """As `Client.infer`."""
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
        segment = await self._borrow(call, timeout)
        if segment is not None:
            try:
                with m.translated():
                    message = await self._infer(
                        call.through(segment), timeout=timeout, metadata=self._metadata
                    )
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
            message = await self._infer(call.plain(), timeout=timeout, metadata=self._metadata)
        return call.answer(message)

    async def infer_tensors(
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
        """As `Client.infer_tensors`."""
        message = m.tensors(model, inputs, outputs, parameters or {}, version=version, request_id=request_id)
        with m.translated():
            return m.read(await self._infer(message, timeout=timeout, metadata=self._metadata))

    async def infer_stream(
        self,
        model: str,
        frames: AsyncIterable[Array] | Iterable[Array],
        *,
        outputs: Sequence[str] = ("labels", "confidence"),
        source: str = "",
        version: int = 0,
        window: int = 4,
    ) -> AsyncIterator[Answer | Rejected]:
        """As `Client.infer_stream`."""
        under_way: deque[tuple[Inference, ShmSegment | None]] = deque()
        free = asyncio.Semaphore(window)
        failed: list[BaseException] = []

        async def requests() -> AsyncIterator[bytes]:
            try:
                async for frame in _each(frames):
                    await free.acquire()
                    call = Inference(model, frame, outputs, source=source, version=version)
                    segment = await self._borrow(call)
                    message = call.plain() if segment is None else call.through(segment)
                    under_way.append((call, segment))
                    yield message
            except Exception as error:  # the caller's iterator, or its frames: gRPC would swallow it
                failed.append(error)

        stream = self._stream_infer(requests(), metadata=self._metadata)
        try:
            with m.translated():
                async for message in stream:
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
            stream.cancel()
            for _, segment in under_way:
                self._end(segment)

    # -- shared memory ---------------------------------------------------------------

    async def _borrow(self, call: Inference, timeout: float | None = None) -> ShmSegment | None:
        """A segment for a call, or None when it goes the plain way."""
        if not self._use_segments or not call.fits_segment:
            return None
        segment, small = self._segments.borrow(call.size)
        self._end(small)
        if segment is not None:
            return segment
        try:
            segment = ShmSegment(call.size)
            registered = self._spawn(self._register(segment, timeout))
            try:
                await asyncio.shield(registered)  # a caller that is cancelled must not leave it half done
            except grpc.RpcError:
                segment.close()
                raise
            except BaseException:
                self._end(segment, registered)
                raise
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

    async def _register(self, segment: ShmSegment, timeout: float | None) -> None:
        try:
            await self._kserve("SystemSharedMemoryRegister", m.registration(segment), timeout)
        finally:
            segment.unlink()

    def _end(self, segment: ShmSegment | None, registered: asyncio.Task[None] | None = None) -> None:
        """Closes our side at once.  The server hears of it later, also if the caller is cancelled: after
        `registered`, if its registration is under way.
        """
        if segment is None:
            return

        async def unregister(request: bytes) -> None:
            if registered is not None:
                await asyncio.wait({registered})
            with contextlib.suppress(grpc.RpcError, aio.UsageError, ValueError):
                await self._kserve("SystemSharedMemoryUnregister", request)

        segment.close()
        self._spawn(unregister(m.unregistration(segment)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _kserve(self, name: str, request: bytes, timeout: float | None = None) -> bytes:
        call = self._channel.unary_unary(f"{m.KSERVE}{name}")
        answer: bytes = await call(request, timeout=min(m.SHORT, timeout or m.SHORT), metadata=self._metadata)
        return answer

    async def statistics(self, model: str = "") -> list[dict[str, Any]]:
        return m.read_statistics(await self._kserve("ModelStatistics", m.ask_statistics(model)))

    # -- versions --------------------------------------------------------------------

    async def status(self, model: str = "") -> dict[str, Any]:
        return await self._ask(m.status(model))

    async def versions(self, model: str) -> list[dict[str, Any]]:
        return await self._ask(m.versions(model))

    async def history(self, model: str) -> list[Event]:
        return await self._ask(m.history(model))

    def submit(self, model: str, version: int, *, timeout: float | None = None) -> AsyncIterator[Event]:
        """As `Client.submit`: under way when the loop has come to it, iterated or not."""
        return self._events(m.submit(model, version), timeout)

    def promote(self, model: str, version: int, *, timeout: float | None = None) -> AsyncIterator[Event]:
        return self._events(m.promote(model, version), timeout)

    def reset(self, model: str, *, timeout: float | None = None) -> AsyncIterator[Event]:
        return self._events(m.reset(model), timeout)

    async def rollback(self, model: str) -> Event:
        return await self._ask(m.rollback(model))

    async def pin(self, model: str, version: int = 0) -> dict[str, Any]:
        return await self._ask(m.pin(model, version))

    async def prune(self, model: str, keep: int = 0) -> dict[str, list[int]]:
        return await self._ask(m.prune(model, keep))

    async def unpin(self, model: str) -> dict[str, Any]:
        return await self._ask(m.unpin(model))

    async def freeze(self, model: str = "", reason: str = "") -> dict[str, Any]:
        return await self._ask(m.freeze(model, reason))

    async def unfreeze(self, model: str = "") -> dict[str, Any]:
        return await self._ask(m.unfreeze(model))

    async def watch(self, model: str = "") -> AsyncStream[Event]:
        """`async with await client.watch() as events: async for event in events`."""
        return await self._subscribe(m.watch(model))

    async def frames(self, model: str, *, max_fps: float = 0.0, source: str = "") -> AsyncStream[TappedFrame]:
        return await self._subscribe(m.frames(model, max_fps, source))

    # -- frame groups ----------------------------------------------------------------

    async def groups(self, group: str = "") -> dict[str, dict[str, Any]]:
        return await self._ask(m.groups(group))

    def submit_group(
        self, group: str, members: dict[str, int], *, timeout: float | None = None
    ) -> AsyncIterator[Event]:
        return self._events(m.submit_group(group, members), timeout)

    def rollback_group(self, group: str, *, timeout: float | None = None) -> AsyncIterator[Event]:
        return self._events(m.rollback_group(group), timeout)

    # -- adaptation ------------------------------------------------------------------

    async def drift(self, model: str) -> dict[str, Any]:
        return await self._ask(m.drift(model))

    async def adaptation(self, model: str) -> dict[str, Any]:
        return await self._ask(m.adaptation(model))

    async def start_round(self, model: str, reason: str = "") -> dict[str, Any]:
        return await self._ask(m.start_round(model, reason))

    async def cancel_round(self, model: str) -> dict[str, Any]:
        return await self._ask(m.cancel_round(model))

    async def set_collection(self, model: str, on: bool) -> dict[str, Any]:
        return await self._ask(m.set_collection(model, on))

    async def watch_round(self, model: str) -> AsyncStream[dict[str, Any]]:
        return await self._subscribe(m.watch_round(model))

    def adapter(self, reports: AsyncIterable[dict[str, Any]]) -> AsyncStream[dict[str, Any]]:
        """As `Client.adapter`, with reports from an asynchronous iterator."""

        async def messages() -> AsyncIterator[Any]:
            async for report in reports:
                yield roadworthy_pb2.AdapterReport(**report)

        return AsyncStream(self._control.Adapter(messages(), metadata=self._metadata), m.whole)

    # -- calls -----------------------------------------------------------------------

    async def _ask(self, ask: Ask) -> Any:
        with m.translated():
            call = getattr(self._control, ask.call)
            return ask.read(await call(ask.request, timeout=self._deadline, metadata=self._metadata))

    def _events(self, ask: Ask, timeout: float | None) -> AsyncIterator[Event]:
        call = getattr(self._control, ask.call)(ask.request, timeout=timeout, metadata=self._metadata)

        async def follow() -> AsyncIterator[Event]:
            with m.translated():
                await self._stands(call)
                async for event in call:
                    yield ask.read(event)

        return follow()

    async def _subscribe(self, ask: Ask) -> AsyncStream[Any]:
        call = getattr(self._control, ask.call)(ask.request, metadata=self._metadata)
        with m.translated():
            await self._stands(call)
            if call.done() and await call.code() is not grpc.StatusCode.OK:
                await call.read()  # raises what it was refused with
        return AsyncStream(call, ask.read)

    async def _stands(self, call: Any) -> None:
        """Waits for the server's word that it has taken the call; Silence when there is none."""
        try:
            await asyncio.wait_for(asyncio.shield(call.initial_metadata()), self._deadline)
        except TimeoutError:
            call.cancel()
            raise m.Silence(self._deadline) from None
        except asyncio.CancelledError:
            call.cancel()
            raise


class AsyncStream(Generic[T]):
    """An asynchronous iterator over a server stream; closing it ends the iteration quietly."""

    def __init__(self, call: Any, convert: Callable[[Any], T]) -> None:
        self._call = call
        self._convert = convert
        self._closed = False

    def __aiter__(self) -> AsyncStream[T]:
        return self

    async def __anext__(self) -> T:
        try:
            with m.translated():
                message = await self._call.read()
        except (grpc.RpcError, Rejected, asyncio.CancelledError):
            if self._closed:
                raise StopAsyncIteration from None
            raise
        if message is aio.EOF:
            raise StopAsyncIteration
        return self._convert(message)

    def close(self) -> None:
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> AsyncStream[T]:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


async def _each(frames: AsyncIterable[Array] | Iterable[Array]) -> AsyncIterator[Array]:
    if isinstance(frames, AsyncIterable):
        async for frame in frames:
            yield frame
    else:
        for frame in frames:
            yield frame
            await asyncio.sleep(0)
