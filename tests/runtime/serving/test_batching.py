"""config.pbtxt: what of it holds, and what becomes of one that is wrong."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest

from runtime.client import Client, Rejected
from runtime.config import QueueConfig
from runtime.serving import batching, counters
from runtime.serving.queueing import DELAY, REJECT, BatchingPolicy, QueuePolicy
from tests.runtime import builders as b
from tests.runtime.scenarios.test_scheduling import held
from tests.waits import PATIENCE, until

FULL = """
name: "road" platform: "onnxruntime_onnx" max_batch_size: 8
dynamic_batching {
  preferred_batch_size: [ 4, 2 ]  max_queue_delay_microseconds: 1500
  priority_levels: 3  default_priority_level: 2
  default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 250000 max_queue_size: 5 }
  priority_queue_policy { key: 1 value { allow_timeout_override: true } }
}
"""


def plan(text, tmp_path, queue=None):
    path = tmp_path / "config.pbtxt"
    path.write_text(text)
    return batching.plan(batching.declared(path), queue or QueueConfig())


def test_every_setting_arrives(tmp_path):
    assert plan(FULL, tmp_path, QueueConfig(limit=7, policy="latest")) == BatchingPolicy(
        limit=7,
        latest=True,
        max_batch=8,
        preferred=(2, 4),
        delay=0.0015,
        levels=3,
        default_level=2,
        policy=QueuePolicy(DELAY, 0.25, False, 5),
        policies={1: QueuePolicy(REJECT, 0.0, True, 0)},
        max_batch_size=8,
    )


def test_without_dynamic_batching_the_server_decides_up_to_the_models_limit(tmp_path):
    assert plan("max_batch_size: 4", tmp_path).max_batch == 1
    assert plan("max_batch_size: 4", tmp_path, QueueConfig(max_batch=16)).max_batch == 4
    assert plan("max_batch_size: 0", tmp_path, QueueConfig(max_batch=16)).max_batch == 16
    assert batching.declared(tmp_path / "none") is None


@pytest.mark.parametrize(
    "text",
    [
        "max_batch_size: -1",
        "max_batch_size: 2 dynamic_batching { preferred_batch_size: 3 }",
        "max_batch_size: 2 dynamic_batching { preferred_batch_size: 0 }",
        "dynamic_batching { priority_levels: 2 }",
        "dynamic_batching { priority_levels: 2 default_priority_level: 3 }",
        "dynamic_batching { priority_queue_policy { key: 1 value { } } }",
        "max_batch_size: { nonsense",
        "no_such_field: 1",
        "\xff",
        "#" + "x" * (1 << 20),
    ],
)
def test_a_wrong_file_changes_nothing_and_is_named(text, tmp_path, caplog):
    path = tmp_path / "config.pbtxt"
    path.write_bytes(text.encode("latin-1"))
    assert batching.plan(batching.declared(path), QueueConfig(limit=3)) == BatchingPolicy.of(
        QueueConfig(limit=3)
    )
    assert str(path) in caplog.text
    assert "not used" in caplog.text


def test_priorities_and_batches_of_a_served_model(repository, quick, serve):
    """The engine is held; of what waits, priority 1 runs first, and what may share a run does."""
    b.publish(repository, model=b.segmentation(*b.nearest_weights(), batch="N"), batch="N")
    text = (
        "max_batch_size: 2 dynamic_batching { priority_levels: 2 default_priority_level: 2 "
        "priority_queue_policy { key: 1 value { max_queue_size: 2 } } }"
    )
    Path(repository.path, "road", "config.pbtxt").write_text(text)
    server = serve(dataclasses.replace(quick, queue=QueueConfig()))
    gate, sizes = held(server)
    host = server.service.models.host("road")
    engine, names, ran = host.live.engine, {}, []
    run = engine.run

    def note(inputs, outputs):
        answer = run(inputs, outputs)
        ran.append({names[frame.tobytes()] for frame in inputs["frame"]})
        return answer

    engine.run = note

    def send(name, priority, seed):
        frame, labels = b.blocks(np.random.default_rng(seed))
        names[frame.tobytes()] = name
        with Client(server.target) as client:
            given = {"priority": priority} if priority else {}
            answer = client.infer_tensors("road", {"frame": frame[None]}, parameters=given)
        assert (answer.outputs["labels"] == labels).all()

    asked = [("runs", 0), ("low a", 0), ("low b", 2), ("high a", 1), ("low c", 0), ("high b", 1)]
    threads = []
    for seed, (name, priority) in enumerate(asked):
        threads.append(threading.Thread(target=send, args=(name, priority, seed)))
        threads[-1].start()
        until(lambda n=seed: host.pending == n)
        until(lambda: server.service.account.snapshot().in_flight == len(threads))
    with Client(server.target) as client, pytest.raises(Rejected, match="maximum queue size: 2"):
        client.infer_tensors("road", zeros(1), parameters={"priority": 1})
    with Client(server.target) as client, pytest.raises(Rejected, match="batch-size must be <= 2 for 'road'"):
        client.infer_tensors("road", zeros(3))
    gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert sizes == [1, 2, 2, 1]
    assert ran == [{"runs"}, {"high a", "high b"}, {"low a", "low b"}, {"low c"}]


def zeros(count):
    return {"frame": np.zeros((count, *b.SIZE, 3), np.uint8)}


def test_hup_reads_the_file_again(repository, quick, serve):
    b.publish(repository)
    server = serve(quick)
    assert server.service.models.host("road").plan.levels == 0
    path = Path(repository.path, "road", "config.pbtxt")
    path.write_text("dynamic_batching { priority_levels: 2 default_priority_level: 1 }")
    server.service.configure(quick)
    assert server.service.models.host("road").plan.levels == 2


def test_sizes_of_runs_are_the_clients_choice_and_their_statistics_bounded():
    statistics = counters.Statistics()
    for size in range(1, 2 * counters.SIZES):
        statistics.executed(size, counters.Durations())
    statistics.executed(1, counters.Durations())
    now = statistics.snapshot()
    assert len(now.batches) == counters.SIZES
    assert now.batches[1][0] == 2
    assert now.executions == 2 * counters.SIZES
