"""The live service as a source: a subscription to its tap that comes back when the server does."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import Any

from adapt.sources.base import Captured, SourceError

__all__ = ["LiveSource"]


class LiveSource:
    """Frames of a model's tap with the answers they got.

    A thread reads the subscription into a short queue, so that whoever takes frames can do something else
    meanwhile; while it is full nothing is read, and the server drops and counts.  Started by the first `get`.

    Args:
        client: a `runtime.client.Client`.
        source: only frames of this camera, "" = all.
        wait: seconds without a frame after which `get` raises, 0 = never.
    """

    finished = False

    def __init__(
        self,
        client: Any,
        model: str,
        *,
        max_fps: float = 0.0,
        source: str = "",
        wait: float = 0.0,
        room: int = 4,
    ) -> None:
        self._client, self._model, self._max_fps, self._source = client, model, max_fps, source
        self._wait = wait
        self._queue: queue.Queue[Captured] = queue.Queue(room)
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._stream: Any = None
        self._error: Exception | None = None
        self._reason = "nothing was sent"
        self._last = time.monotonic()

    def get(self, timeout: float) -> Captured | None:
        if self._thread is None:
            self._last = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="tap", daemon=True)
            self._thread.start()
        try:
            captured = self._queue.get(timeout=max(timeout, 0.001))
        except queue.Empty:
            if self._error is not None:
                raise SourceError(str(self._error)) from self._error
            waited = time.monotonic() - self._last
            if self._wait and waited > self._wait:
                raise SourceError(
                    f"no frame for {waited:.0f} s ({self._reason}): is the server up and asked?"
                ) from None
            return None
        self._last = time.monotonic()
        return captured

    @property
    def reason(self) -> str:
        """Why no frame comes, as far as it is known."""
        return self._reason

    def close(self) -> None:
        self._closed.set()
        stream = self._stream
        if stream is not None and hasattr(stream, "close"):
            with contextlib.suppress(ValueError):  # a generator that runs just now
                stream.close()

    # -- the thread -------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            self._follow()
        except Exception as error:
            self._error = error

    def _follow(self) -> None:
        import grpc

        from runtime.client import Rejected

        pause = 0.2
        while not self._closed.is_set():
            try:
                self._stream = self._client.frames(self._model, max_fps=self._max_fps, source=self._source)
                for tapped in self._stream:
                    pause = 0.2
                    self._put(_captured(tapped))
                    if self._closed.is_set():
                        return
                self._reason = "the server ended the stream"
            except Rejected as error:
                if error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"):
                    raise SourceError(
                        f"the server refuses the tap of {self._model!r}: {error.reason}"
                    ) from error
                self._reason = error.reason
            except grpc.RpcError as error:
                self._reason = _details(error)
            self._closed.wait(pause)
            pause = min(2 * pause, 5.0)

    def _put(self, captured: Captured) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(captured, timeout=0.5)
                return


def _captured(tapped: Any) -> Captured:
    return Captured(
        tapped.frame,
        float(tapped.time),
        tapped.source,
        tapped.model,
        int(tapped.version),
        tapped.labels,
        tapped.confidence,
        getattr(tapped, "place", None),
        getattr(tapped, "collect", None),
        int(tapped.dropped),
    )


def _details(error: Any) -> str:
    code = error.code().name if hasattr(error, "code") and error.code() else type(error).__name__
    return f"{code}: {error.details() if hasattr(error, 'details') else error}"
