"""The file of kernel times that makes a build repeatable: recorded once, replayed later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from common.files import write_bytes
from export.tensorrt.options import PlanOptions
from runtime.engines.tensorrt.library import Library, Log, TensorRTError, ask, check

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["TimingCacheFile"]


class TimingCacheFile:
    """The timing cache of one build.  It does nothing if the options name no file."""

    def __init__(self, library: Library, options: PlanOptions, log: Log) -> None:
        self.library, self.options, self.log = library, options, log

    def open(self, config: trt.IBuilderConfig) -> dict[str, int]:
        """Give the builder the recorded times; for a replay, return the kernel that each key chooses.

        Raises TensorRTError.
        """
        if TYPE_CHECKING:
            import tensorrt as trt
        else:
            trt = self.library.module
        path = self.options.timing_cache
        if path is None:
            return {}
        try:
            recorded = path.read_bytes()
        except FileNotFoundError:
            if self.options.replay:
                raise TensorRTError(
                    f"timing cache {path} does not exist: record it by building once without replay"
                ) from None
            recorded = b""
        remedy = f"it is of another TensorRT version or GPU; delete {path} and record it here"
        # Before the cache is made, as in NVIDIA's sample: only then can the entries be read.
        config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
        errors = self.log.errors(here=True)
        cache: trt.ITimingCache = ask(
            config.create_timing_cache, f"timing cache {path}", remedy, self.log, recorded
        )
        if more := self.log.errors(here=True)[len(errors) :]:
            # A damaged file gives an empty cache and a line in the log; at the end it would be overwritten.
            raise TensorRTError(f"timing cache {path} cannot be used: {more[0]}; {remedy}")
        before: dict[str, int] = {}
        if self.options.replay:
            before = self._tactics(cache)
            config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)
        check(config.set_timing_cache(cache, False), f"timing cache {path} was refused", remedy, self.log)
        return before

    def _tactics(self, cache: trt.ITimingCache) -> dict[str, int]:
        """Return the kernel that a timing cache chooses for each of its keys."""
        what = f"the entries of timing cache {self.options.timing_cache} cannot be read"
        keys: list[trt.TimingCacheKey] = ask(cache.queryKeys, what, "record it again", self.log)
        return {str(key): int(cache.query(key).tacticHash) for key in keys}

    def close(self, config: trt.IBuilderConfig, before: Mapping[str, int]) -> None:
        """Write the recorded times; for a replay, refuse a build that the recorded times did not decide.

        `before` is the answer of `open`.  Raises TensorRTError.
        """
        path = self.options.timing_cache
        if path is None:
            return
        cache = check(config.get_timing_cache(), "the timing cache is gone", "record it again", self.log)
        if self.options.replay:
            # The flag alone has let misses through.  The serialised bytes are no measure: they hold times and
            # a description of the device as well, and their order is not promised.  The plan depends on the
            # kernel that is chosen for each key.  An entry that has gone was not used.
            after = self._tactics(cache)
            changed = [key for key, tactic in after.items() if before.get(key) != tactic]
            if changed:
                raise TensorRTError(
                    f"timing cache {path} lacked some of this network's kernels "
                    f"({len(changed)} of {len(after)} entries are new or differ): the plan would depend on "
                    "this build's timings; record the cache again with the same network and options"
                )
            return
        content = bytes(check(cache.serialize(), "the timing cache", "record it again", self.log))
        write_bytes(path, content, durable=False)
