"""Takes frames from their source into the frame store, and counts what came and what was left out.

Knows the source and the store; knows nothing of rounds or of the server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapt.frames.store import StoreError
from adapt.loop.config import LoopTools
from adapt.loop.errors import LoopError
from adapt.loop.frame_pool import FramePool
from adapt.loop.state import LoopState
from adapt.sources import Captured, Source, SourceError

__all__ = ["Collector", "Imports"]

# Given {path: frames of it that were read}, returns (path, the source that continues there) of each file.
Imports = Callable[[dict[str, int]], Sequence[tuple[str, Any]]]

FRAMES_PER_RECORD = 16  # fewer than the store compares with: no imported frame is kept twice


class Collector:
    """Collects frames until the loop has enough.

    Args:
        on_kept: called with each frame that was kept.
        imports: files given with --from; they are read once, before `source`.

    seen: frames that came.  lost: frames the server dropped.  refused: frames left out, by rule.
    """

    def __init__(
        self,
        source: Source,
        pool: FramePool,
        state: LoopState,
        tools: LoopTools,
        *,
        imports: Imports | None = None,
        on_kept: Callable[[Captured], None] | None = None,
    ) -> None:
        self.source, self.imports, self.on_kept = source, imports, on_kept
        self.seen = self.lost = 0
        self.refused: dict[str, int] = {}
        self._pool, self._state, self._tools = pool, state, tools

    @property
    def finished(self) -> bool:
        """True if the source will never have another frame."""
        return self.source.finished

    def close(self) -> None:
        self.source.close()

    def collect_once(self, timeout: float) -> bool:
        """Take the next frame that comes within `timeout` seconds; return True if it was kept.

        Raises LoopError if the source cannot be read.
        """
        try:
            captured = self.source.get(timeout)
        except SourceError as error:
            raise LoopError(str(error)) from error
        if captured is None:
            return False
        if not self._state.is_collecting:
            self._count_refused("switched-off")
            return False
        return self.keep(captured)

    def read_imports(self, between: Callable[[], None]) -> None:
        """Keep every frame of the imported files, and call `between` after each.

        A loop that is killed meanwhile continues with the frame after the last one it recorded.
        """
        if self.imports is None:
            return
        done: dict[str, int] = dict(self._state.get("imported", {}))
        for name, source in self.imports(done):
            try:
                while (captured := source.get(0.0)) is not None:
                    self.keep(captured)
                    if source.read % FRAMES_PER_RECORD == 0:
                        done[name] = source.read
                        self._state.update(imported=done)
                        self._tools.progress(f"read {Path(name).name}", source.read, source.read)
                    between()
            finally:
                source.close()
            done[name] = source.read
            self._state.update(imported=done)
        self.imports = None

    def keep(self, captured: Captured) -> bool:
        """Store the frame if the rules allow it; return True if it was kept."""
        self.seen += 1
        self.lost = max(self.lost, captured.dropped)
        try:
            kept = self._pool.add(captured)
        except StoreError as error:
            self._count_refused("store")
            if self.refused["store"] % 100 == 1:
                self._tools.log(str(error))
            self._pool.reopen()
            return False
        except ValueError as error:
            self._count_refused("unreadable")
            if self.refused["unreadable"] == 1:
                self._tools.log(f"a frame of {captured.source!r} is left out: {error}")
            return False
        if kept.id is None:
            self._count_refused(kept.rule or "rules")
            return False
        if self.on_kept is not None:
            self.on_kept(captured)
        return True

    def _count_refused(self, rule: str) -> None:
        self.refused[rule] = self.refused.get(rule, 0) + 1
