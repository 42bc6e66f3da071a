"""What is done when a call ends, on a thread that may wait.

gRPC tells the end of a call on its one serving thread, which every other call waits for.  What takes a lock
of ours, which a thread of low priority may hold on a busy machine, is done on a thread of this module.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

log = logging.getLogger("roadworthy.edge")
_lock = threading.Lock()  # never taken on the serving thread
_tasks: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
_thread: threading.Thread | None = None


def when_ended(context: Any, do: Callable[[], object], only_if: Callable[[], object] | None = None) -> bool:
    """Has `do` called soon after the call of `context` has ended; False if it has ended already.

    `only_if` is asked on gRPC's thread, and must be instant: where it is false, `do` is not called.
    """
    global _thread
    if _thread is None:
        with _lock:
            if _thread is None:
                _thread = threading.Thread(target=_work, name="ends-of-calls", daemon=True)
                _thread.start()

    def ended() -> None:
        if only_if is None or only_if():
            _tasks.put(do)

    return bool(context.add_callback(ended))


def _work() -> None:
    while True:
        do = _tasks.get()
        try:
            do()
        except Exception:
            log.exception("the end of a call")
        del do  # a thread that waits must not keep the last request alive
