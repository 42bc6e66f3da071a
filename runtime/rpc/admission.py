"""How a call comes to a thread, and which calls get none.

gRPC gives a thread to a call when its headers arrive; the thread then waits for the message, which may never
come.  Three rules keep such calls from shutting out the others:

* Calls of different kinds have threads of their own (`Lane`), so that health and control answer whatever
  happens to inference.
* A call without a token is refused before its message is read.
* A message has a time limit.  Where every thread of a lane is taken, the call that has waited longest for its
  message gives its thread to the next one.

What is refused here, or by gRPC itself, is counted, and told in a line of the log from time to time.

`Admission.intercept_service` runs on gRPC's one serving thread: it waits for nothing, and the locks that it
takes are held for a few instructions, under which no code of gRPC runs.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from runtime.rpc.message_dict import clean
from runtime.rpc.thread_pool import RpcThreadPool

log = logging.getLogger("roadworthy.edge")
GRACE = 0.5  # seconds that a message may take, however many calls there are
TELL = 10.0  # seconds at least between two lines of the log about one kind of refusal
REASONS = {
    "unauthenticated": "brought no known token",
    "permission": "brought a token without the role",
    "limit": "found every thread of their kind taken",
    "no-message": "sent no message in time",
    "incomplete": "ended before their message was there, or sent one that is larger than max_message",
    "malformed": "sent a message that cannot be read",
    "unknown-method": "asked for a method that there is not",
}
Refusal = tuple[grpc.StatusCode, str, str]  # status, words, a key of REASONS


class Refusals:
    """Counts, by reason, the calls that never reached the service."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._last: dict[str, str] = {}
        self._told: dict[str, tuple[int, float]] = {}

    def count(self, reason: str, last: str = "") -> None:
        with self._lock:
            self._counts[reason] += 1
            self._last[reason] = last

    def snapshot(self) -> dict[str, int]:
        with self._lock:
            return {reason: self._counts[reason] for reason in REASONS}

    def tell(self, now: float, *, every: float = TELL) -> None:
        """Writes a line for each reason of which there is news, at most one in `every` seconds."""
        with self._lock:
            counts, last = dict(self._counts), dict(self._last)
        for reason, count in counts.items():
            told, at = self._told.get(reason, (0, -every))
            if count > told and now - at >= every:
                self._told[reason] = count, now
                what, whom = REASONS[reason], clean(last[reason], 200)
                log.warning("%d calls refused (%s): they %s; the last: %s", count - told, reason, what, whom)


@dataclass(eq=False)
class Lane:
    """The threads of one kind of calls.  `waiting`: the calls that hold one and whose first message is not
    there, each with the time (of time.monotonic()) since when.
    """

    name: str
    threads: int
    pool: RpcThreadPool = field(init=False)
    waiting: dict[Any, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = RpcThreadPool(self.threads, f"grpc_{self.name}")

    def has_room(self) -> bool:
        return self.pool.load < self.threads

    def oldest(self) -> list[tuple[Any, float]]:
        """Those that wait, the oldest first."""
        return list(self.waiting.items())

    def gave_up(self, context: Any, refusals: Refusals) -> bool:
        """Ends a call that still waits for its message; False when the message has come."""
        if self.waiting.pop(context, None) is None:
            return False
        refusals.count("no-message", context.peer())
        context.cancel()
        return True


class Admission(grpc.ServerInterceptor):  # type: ignore[misc]
    """`choose`: method ("/package.Service/Call") to the lane of its calls.  `refuse`: who may not call a
    method, by its metadata, and why.  `limit`: seconds that a message may take.
    """

    def __init__(
        self,
        choose: Callable[[str], Lane],
        refuse: Callable[[str, Any], Refusal | None],
        refusals: Refusals,
        limit: float,
    ) -> None:
        self._choose = choose
        self._refuse = refuse
        self._refusals = refusals
        self._limit = limit
        self._refusing = RpcThreadPool(2, "grpc_refusing")
        self._handlers: dict[str, tuple[Any, Lane]] = {}
        self._lanes: list[Lane] = []
        self._ended = threading.Event()
        self._each: list[Callable[[float], None]] = [self.look, self._refusals.tell]

    # -- on gRPC's serving thread ----------------------------------------------------

    def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
        found = self._handlers.get(details.method)
        if found is None:
            handler = continuation(details)
            if handler is None:
                self._refusals.count("unknown-method", str(details.method))
                return None
            lane = self._choose(details.method)
            found = self._handlers[details.method] = (self._opened(handler, details.method, lane), lane)
            if lane not in self._lanes:
                self._lanes.append(lane)
        handler, lane = found
        refusal = self._refuse(details.method, details.invocation_metadata)
        if refusal is None and not (lane.has_room() or self._make_room(lane)):
            message = f"{lane.threads} calls of this kind are under way; try again later"
            refusal = (grpc.StatusCode.RESOURCE_EXHAUSTED, message, "limit")
        return handler if refusal is None else self._refused(refusal)

    def _make_room(self, lane: Lane) -> bool:
        now = time.monotonic()
        for context, since in lane.oldest():
            if now - since < GRACE:
                return False
            if lane.gave_up(context, self._refusals):
                return True
        return False

    def _refused(self, refusal: Refusal) -> Any:
        """A handler that refuses without a look at the message.  One of streams: it does not wait for one,
        and on the wire calls of one message are not different.
        """
        code, message, reason = refusal

        def refuse(_messages: Any, context: Any) -> Any:
            self._refusals.count(reason, context.peer())
            context.abort(code, message)

        refuse.experimental_thread_pool = self._refusing  # type: ignore[attr-defined]
        return grpc.stream_unary_rpc_method_handler(refuse)

    # -- on a thread of the lane -----------------------------------------------------

    def _opened(self, handler: Any, method: str, lane: Lane) -> Any:
        """The handler with its first message under the time limit, on the threads of `lane`."""
        parse = handler.request_deserializer
        one = not handler.request_streaming

        def read(message: bytes, context: Any) -> Any:
            if parse is None:
                return message
            try:
                return parse(message)
            except (DecodeError, ValueError):  # gRPC would log a traceback for each, on its serving thread
                self._refusals.count("malformed", f"{context.peer()} {method}")
                context.abort(grpc.StatusCode.INTERNAL, "Exception deserializing request!")

        def first(messages: Iterator[bytes], context: Any) -> Any:
            lane.waiting[context] = time.monotonic()
            try:
                return next(messages)
            except StopIteration:
                if one:
                    self._refusals.count("incomplete", f"{context.peer()} {method}")
                    words = f'"{method}" requires exactly one request message.'
                    context.abort(grpc.StatusCode.UNIMPLEMENTED, words)
                return None
            except Exception:
                if context in lane.waiting and not self._ended.is_set():  # this server has not ended it
                    self._refusals.count("incomplete", f"{context.peer()} {method}")
                raise
            finally:
                lane.waiting.pop(context, None)

        def argument(messages: Iterator[bytes], context: Any) -> Any:
            if one:
                return read(first(messages, context), context)
            if getattr(behaviour, "reads_by_itself", False):
                return _every(messages, context)
            message = first(messages, context)
            rest = messages if message is None else itertools.chain((message,), messages)
            return rest if parse is None else (read(each, context) for each in rest)

        def _every(messages: Iterator[bytes], context: Any) -> Iterator[Any]:
            message = first(messages, context)
            if message is not None:
                yield read(message, context)
                for message in messages:
                    yield read(message, context)

        if handler.response_streaming:
            behaviour = handler.unary_stream if one else handler.stream_stream
            make = grpc.stream_stream_rpc_method_handler
        else:
            behaviour = handler.unary_unary if one else handler.stream_unary
            make = grpc.stream_unary_rpc_method_handler

        def call(messages: Iterator[bytes], context: Any, *send: Any) -> Any:
            return behaviour(argument(messages, context), context, *send)

        call.experimental_thread_pool = lane.pool  # type: ignore[attr-defined]
        if getattr(behaviour, "experimental_non_blocking", False):
            call.experimental_non_blocking = True  # type: ignore[attr-defined]
        return make(call, None, handler.response_serializer)

    # -- on a thread of its own ------------------------------------------------------

    def start(self, *each: Callable[[float], None]) -> None:
        """Looks after the time limits, and calls `each` with time.monotonic(), once a second until `stop`."""
        self._each += each
        threading.Thread(target=self._watch, name="admission", daemon=True).start()

    def _watch(self) -> None:
        interval = min(1.0, self._limit / 4)
        while not self._ended.wait(interval):
            for each in self._each:
                try:
                    each(time.monotonic())
                except Exception:
                    log.exception("looking after calls")

    def look(self, now: float) -> None:
        """Ends the calls whose first message has taken longer than the limit."""
        for lane in tuple(self._lanes):
            for context, since in lane.oldest():
                if now - since < self._limit:
                    break
                lane.gave_up(context, self._refusals)

    def drain(self) -> None:
        """Calls that end without their message are not counted from now on: the server ends them."""
        self._ended.set()

    def stop(self) -> None:
        self._ended.set()
        for lane in self._lanes:
            lane.pool.shutdown()
        self._refusing.shutdown()
        self._refusals.tell(time.monotonic(), every=0.0)
