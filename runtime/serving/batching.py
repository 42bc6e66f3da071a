"""What a model's config.pbtxt says of its queue, in Triton's words, as a `runtime.serving.queueing.Plan`.

Read are `max_batch_size`, `dynamic_batching` (preferred_batch_size, max_queue_delay_microseconds,
priority_levels, default_priority_level, default_queue_policy, priority_queue_policy), and of tensors
`is_shape_tensor` and `label_filename`.  Tensors are the engine's own; nothing else of the file changes how a
model is served.  ModelConfig gives back the whole of it.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format

from common import files
from protos import model_config_pb2 as pb
from runtime.config import QueueConfig
from runtime.serving.queueing import DELAY, REJECT, BatchingPolicy, QueuePolicy

log = logging.getLogger("roadworthy.batching")
_LIMIT = 1 << 20  # bytes of a config.pbtxt


def declared(path: Path) -> Any | None:
    """The ModelConfig of a config.pbtxt; None, with a line in the log, for one that cannot be used."""
    try:
        content = files.read_file(path, _LIMIT)
        config = text_format.Parse(content.decode(), pb.ModelConfig())
        check(config)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, text_format.ParseError) as error:
        log.warning("%s: not used: %s; the server's [queue] holds alone", path, str(error)[:300])
        return None
    return config


def override(text: str, model: str) -> Any:
    """The ModelConfig of a Load's `config` parameter (JSON).  Raises ValueError where it cannot be used."""
    if len(text) > _LIMIT:
        raise ValueError(f"more than {_LIMIT} characters")
    try:
        config = json_format.Parse(text, pb.ModelConfig())
    except (json_format.ParseError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if config.name not in ("", model):
        raise ValueError(f"it is of '{config.name[:80]}'")
    check(config)
    return config


def plan(config: Any | None, queue: QueueConfig) -> BatchingPolicy:
    """The plan of a model: its config.pbtxt where it says something, the server's [queue] for the rest."""
    base = BatchingPolicy.of(queue)
    if config is None:
        return base
    most = config.max_batch_size
    shared = min(base.max_batch, most) if most else base.max_batch
    whole = frozenset(tensor.name for tensor in config.input if tensor.is_shape_tensor)
    base = dataclasses.replace(base, max_batch=shared, max_batch_size=most, whole=whole)
    if not config.HasField("dynamic_batching"):
        return base
    batching = config.dynamic_batching
    ours = QueuePolicy(default_timeout=queue.timeout, own_timeout=True)
    default = _policy(batching.default_queue_policy) if batching.HasField("default_queue_policy") else ours
    return dataclasses.replace(
        base,
        max_batch=max(1, most),
        preferred=tuple(sorted(batching.preferred_batch_size)),
        delay=batching.max_queue_delay_microseconds / 1e6,
        levels=batching.priority_levels,
        default_level=batching.default_priority_level,
        policy=default,
        policies={level: _policy(one) for level, one in batching.priority_queue_policy.items()},
    )


def label_files(config: Any | None) -> dict[str, str]:
    """{output: the file of its labels, below the model's directory}."""
    return {} if config is None else {t.name: t.label_filename for t in config.output if t.label_filename}


def _policy(policy: Any) -> QueuePolicy:
    return QueuePolicy(
        timeout_action=DELAY if policy.timeout_action == pb.ModelQueuePolicy.DELAY else REJECT,
        default_timeout=policy.default_timeout_microseconds / 1e6,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )


def check(config: Any) -> None:
    """Raises ValueError for what Triton refuses at load."""
    batching = config.dynamic_batching
    if config.max_batch_size < 0:
        raise ValueError("max_batch_size must be 0 or above")
    for size in batching.preferred_batch_size:
        if not 0 < size <= max(1, config.max_batch_size):
            raise ValueError(f"preferred_batch_size {size} must be from 1 to max_batch_size")
    levels, default = batching.priority_levels, batching.default_priority_level
    if levels and not 1 <= default <= levels:
        raise ValueError(f"default_priority_level {default} must be from 1 to priority_levels ({levels})")
    for level in batching.priority_queue_policy:
        if not 1 <= level <= levels:
            raise ValueError(f"priority_queue_policy names level {level}, priority_levels is {levels}")
