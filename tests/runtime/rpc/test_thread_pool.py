"""The threads that answer calls: every call runs once, and who asked is told."""

from __future__ import annotations

import threading

import pytest

from runtime.rpc.thread_pool import RpcThreadPool
from tests.waits import PATIENCE, until


def names():
    return [t for t in threading.enumerate() if t.name.startswith("pool-test")]


def test_every_call_runs_once_and_its_end_is_told_once():
    pool = RpcThreadPool(4, "pool-test-a")
    ran, told = [], []
    for n in range(500):
        pool.submit(ran.append, n).add_done_callback(lambda _done, n=n: told.append(n))
    until(lambda: len(told) == 500)
    assert sorted(ran) == sorted(told) == list(range(500))
    pool.shutdown()


def test_no_more_threads_than_allowed_and_none_before_it_is_needed():
    pool = RpcThreadPool(3, "pool-test-b")
    gate, ran = threading.Event(), []
    mine = lambda: [t for t in names() if t.name.startswith("pool-test-b")]  # noqa: E731
    pool.submit(ran.append, 0)
    until(lambda: ran == [0])
    for _ in range(3):  # one after the other: a thread that is free is used again
        until(lambda: pool._free == 1)
        pool.submit(ran.append, 0)
        until(lambda: pool._free == 1)
    assert len(mine()) == 1
    for n in range(8):
        pool.submit(lambda n=n: (gate.wait(PATIENCE), ran.append(n)))
    until(lambda: len(mine()) == 3)
    gate.set()
    until(lambda: len(ran) == 12)
    assert len(mine()) == 3
    pool.shutdown()
    until(lambda: not mine())
    with pytest.raises(RuntimeError):
        pool.submit(ran.append, 1)


def test_a_call_that_raises_is_over_and_its_thread_lives(caplog):
    pool = RpcThreadPool(1, "pool-test-c")
    over = threading.Event()
    pool.submit(lambda: 1 / 0).add_done_callback(lambda _: over.set())
    assert over.wait(PATIENCE)
    again = threading.Event()
    pool.submit(again.set)
    assert again.wait(PATIENCE)
    assert "ZeroDivisionError" in caplog.text
    pool.shutdown()


def test_where_the_system_gives_no_more_threads_calls_wait_for_those_there_are(monkeypatch, caplog):
    pool = RpcThreadPool(3, "pool-test-d")
    gate, ran = threading.Event(), []
    pool.submit(gate.wait, PATIENCE)
    start = threading.Thread.start

    def refuse(thread):
        if thread.name.startswith("pool-test-d"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for n in range(5):
        pool.submit(ran.append, n)
    gate.set()
    until(lambda: len(ran) == 5)
    until(lambda: pool._free == 1)  # and the pool has not lost count
    monkeypatch.undo()
    together = threading.Barrier(3)
    for _ in range(3):
        pool.submit(together.wait, PATIENCE)
    until(lambda: pool._free == 3)
    assert not together.broken
    assert "no thread for a call" in caplog.text
    pool.shutdown()
