"""Which request runs next, and with which: Triton's dynamic batching and queue policies, as plain data.

Names and meanings are those of Triton's config.pbtxt (`ModelDynamicBatching`, `ModelQueuePolicy`).
Knows no protobuf, no threads and no engine; `runtime/serving/batching.py` reads the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from runtime.config import QueueConfig

REJECT, DELAY = "REJECT", "DELAY"


@dataclass(frozen=True)
class QueuePolicy:
    """What becomes of a request that waits at one priority level.

    timeout_action          REJECT with UNAVAILABLE, or DELAY: it runs after all that have not timed out
    default_timeout         seconds; 0 = none
    allow_timeout_override  a request's own `timeout` counts where it is shorter than the default
    max_queue_size          requests that may wait at this level; 0 = only the limit of the whole queue
    own_timeout             a request's own `timeout` counts, shorter or longer (where no policy is given)
    """

    timeout_action: str = REJECT
    default_timeout: float = 0.0
    allow_timeout_override: bool = False
    max_queue_size: int = 0
    own_timeout: bool = False

    def timeout(self, asked: float) -> float:
        """Seconds that a request may wait; 0 = for ever.  `asked`: its own, 0 = none."""
        default = self.default_timeout
        if asked > 0 and self.own_timeout:
            return asked
        if asked > 0 and self.allow_timeout_override and (default <= 0 or asked < default):
            return asked
        return default


@dataclass(frozen=True)
class BatchingPolicy:
    """The queue of one model.

    limit            requests that may wait, all levels together
    latest           a new frame of the same source replaces the one that waits
    max_batch        items that one run may take; 1 = requests never share a run
    preferred        batch sizes that are run without waiting for more; () = max_batch alone
    delay            seconds to wait for a preferred size
    levels           priority levels, 1 first; 0 = no priorities
    default_level    of a request that names none, or one there is not
    policy, policies of every level, and of those that have their own
    max_batch_size   items one request may bring (config.pbtxt's max_batch_size); 0 = as many as it likes
    whole            inputs whose first side is no batch (config.pbtxt's is_shape_tensor)
    """

    limit: int = 32
    latest: bool = False
    max_batch: int = 1
    preferred: tuple[int, ...] = ()
    delay: float = 0.0
    levels: int = 0
    default_level: int = 0
    policy: QueuePolicy = QueuePolicy()
    policies: Mapping[int, QueuePolicy] = field(default_factory=dict)
    max_batch_size: int = 0
    whole: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: QueueConfig) -> BatchingPolicy:
        """What the server's configuration says of every model."""
        return cls(
            limit=config.limit,
            latest=config.policy == "latest",
            max_batch=config.max_batch,
            delay=config.batch_delay,
            policy=QueuePolicy(default_timeout=config.timeout, own_timeout=True),
        )

    def level(self, asked: int) -> int:
        """The level of a request with the priority `asked`: as Triton, an unknown one is the default."""
        return asked if 1 <= asked <= self.levels else self.default_level

    def policy_of(self, level: int) -> QueuePolicy:
        return self.policies.get(level, self.policy)

    def share(self, sizes: list[int]) -> int:
        """How many of the jobs of these sizes (the first is certain to run) go together now: the longest
        run of them that makes a preferred size; 0 = none does."""
        total = best = 0
        for count, size in enumerate(sizes, 1):
            total += size
            if total > self.max_batch:
                break
            if total == self.max_batch or total in self.preferred:
                best = count
        return best
