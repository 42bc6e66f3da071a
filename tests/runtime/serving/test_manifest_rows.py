"""Requests never share a run of a version whose rows depend on each other, whoever asks for batches."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest

from runtime.client import Client
from runtime.config import QueueConfig
from runtime.serving.scheduler import Job
from tests.runtime import builders as b
from tests.waits import PATIENCE


@pytest.mark.parametrize("shared", [True, False])
def test_the_versions_manifest_decides(shared, repository, quick, serve):
    model = b.segmentation(*b.nearest_weights(), batch="N")
    b.publish(repository, model=model, batch="N", batching={"independent": shared})
    server = serve(dataclasses.replace(quick, queue=QueueConfig(max_batch=8)))
    host = server.service.models.host("road")
    gate, sizes, run = threading.Event(), [], host.slot("").engine.run

    def held(inputs, names):
        gate.wait(PATIENCE)
        sizes.append(len(inputs["frame"]))
        return run(inputs, names)

    host.slot("").engine.run = held
    wrong = []

    def send(seed):
        frame, labels = b.blocks(np.random.default_rng(seed))
        with Client(server.target) as client:
            wrong.append(int((client.infer("road", frame).labels != labels).sum()))

    threads = [threading.Thread(target=send, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 60
    while host.pending < 4:
        assert time.monotonic() < end, "never waiting"
        time.sleep(0.002)
    gate.set()
    for thread in threads:
        thread.join(60)
    assert wrong == [0] * 5
    assert sorted(sizes) == ([1, 4] if shared else [1] * 5)


def test_jobs_that_waited_for_one_run_are_run_one_by_one_after_a_flip(repository, quick, serve):
    """A version whose rows depend on each other went live after they were put together."""
    model = b.segmentation(*b.nearest_weights(), batch="N")
    b.publish(repository, model=model, batch="N", batching={"independent": False})
    server = serve(dataclasses.replace(quick, queue=QueueConfig(max_batch=8)))
    host = server.service.models.host("road")
    slot, sizes, run = host.slot(""), [], host.slot("").engine.run
    slot.engine.run = lambda inputs, names: sizes.append(len(inputs["frame"])) or run(inputs, names)
    jobs, seen = [], []
    submit = host._scheduler.submit

    def kept(job):
        jobs.append(job)
        return submit(job)

    host._scheduler.submit = kept
    with Client(server.target) as client:
        for seed in range(3):
            frame, labels = b.blocks(np.random.default_rng(seed))
            client.infer("road", frame)
            seen.append(labels)
    sizes.clear()
    before = slot._held
    again = [Job(job.payload, size=1) for job in jobs]
    host._execute(again)()
    assert sizes == [1, 1, 1]
    assert slot._held == before
    for job, labels in zip(again, seen, strict=True):
        assert np.array_equal(job.result["labels"][0], labels)
