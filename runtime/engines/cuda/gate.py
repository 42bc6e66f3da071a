"""One gate for all CUDA work of the process: while a graph is captured, no other thread works on the device.

A capture fails if another thread synchronises the device, allocates or frees meanwhile, whatever mode the
capture has (NVIDIA/TensorRT issue 2888).  Loading, creating and freeing engines and contexts do all of these.
Everything that our threads do on the device therefore goes through `GATE`:

* `run`: the short work of one request.  Many may go on at once.
* `change`: loading, creating, freeing, building.  Many may go on at once, beside runs; each may take minutes.
* `capture`: alone.  It waits for the runs in progress, which are short, and lets no new one begin meanwhile.
  It does not wait for a change: the caller then runs the network without a graph and captures at a later run.

What other libraries do on the device (torch, ONNX Runtime) does not go through the gate.  A capture that they
disturb fails, and its caller must try again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Literal

#: Seconds that a capture waits for the runs in progress.
PATIENCE = 1.0

Kind = Literal["run", "change", "capture"]


class Gate:
    """See the module.  A thread that is inside may enter again; it stays what it is."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._inside: dict[int, Kind] = {}  # by thread
        self._captures_waiting = 0

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """For short work.  Waits for a capture, and for one that waits itself."""
        with self._shared("run"):
            yield

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """For work that may take long.  Waits for a capture in progress only."""
        with self._shared("change"):
            yield

    @contextlib.contextmanager
    def capture(self, patience: float = PATIENCE) -> Iterator[bool]:
        """Yields True if the calling thread is now alone, and False if a change or a long run goes on.

        A thread that is inside leaves for as long as it waits, and is inside again afterwards.
        """
        me = threading.get_ident()
        with self._turn:
            before = self._inside.pop(me, None)
            self._captures_waiting += 1
            self._turn.notify_all()
            try:
                self._turn.wait_for(self._decided, patience)
                alone = not self._inside
                if alone:
                    self._inside[me] = "capture"
            finally:
                self._captures_waiting -= 1
                self._turn.notify_all()
                if before is not None and me not in self._inside:
                    self._turn.wait_for(lambda: "capture" not in self._inside.values())
                    self._inside[me] = before
        try:
            yield alone
        finally:
            with self._turn:
                if before is None:
                    self._inside.pop(me, None)
                else:
                    self._inside[me] = before
                self._turn.notify_all()

    def _decided(self) -> bool:
        return not self._inside or "change" in self._inside.values()

    @contextlib.contextmanager
    def _shared(self, kind: Kind) -> Iterator[None]:
        me = threading.get_ident()
        with self._turn:
            again = me in self._inside
            if not again:
                self._turn.wait_for(lambda: self._open_for(kind))
                self._inside[me] = kind
        try:
            yield
        finally:
            if not again:
                with self._turn:
                    del self._inside[me]
                    self._turn.notify_all()

    def _open_for(self, kind: Kind) -> bool:
        if "capture" in self._inside.values():
            return False
        return kind == "change" or not self._captures_waiting


GATE = Gate()
