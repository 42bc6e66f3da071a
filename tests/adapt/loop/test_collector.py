"""Frames into the store: counted, left out by rule, and never the end of the loop."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest

from adapt.loop import LoopError
from adapt.loop.collector import Collector
from adapt.sources import SourceError
from tests.adapt.loop.toys import Camera, Clock, pool_of, tools


def collector_of(tmp_path, count=20, **settings):
    clock = Clock()
    _, state, pool = pool_of(tmp_path / "work", clock, **settings)
    kept: list = []
    made = Collector(Camera(clock, count), pool, state, tools(clock), on_kept=kept.append)
    return made, pool, state, kept


def test_a_full_disk_costs_frames_and_nothing_else(tmp_path):
    collector, pool, _, kept = collector_of(tmp_path)
    assert collector.collect_once(0.1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        for _ in range(5):
            assert not collector.collect_once(0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert collector.refused["store"] == 5
    assert not list((tmp_path / "work" / "frames" / "frames").rglob("*.tmp"))
    assert collector.collect_once(0.1)
    assert len(pool.store) == len(kept) == 2
    assert collector.seen == 7


def test_collection_that_is_switched_off_counts_what_comes(tmp_path):
    collector, pool, state, kept = collector_of(tmp_path)
    state.update(collecting=False)
    assert not collector.collect_once(0.1)
    assert (collector.refused, len(pool.store), kept) == ({"switched-off": 1}, 0, [])


def test_near_duplicates_and_unreadable_frames_are_counted_by_rule(tmp_path):
    collector, _, _, _ = collector_of(tmp_path, near=0)
    frame = collector.source.get(0.0)
    assert collector.keep(frame)
    assert not collector.keep(frame)
    frame.frame = frame.frame[:, :, 0]
    assert not collector.keep(frame)
    assert sum(collector.refused.values()) == 2
    assert collector.refused["unreadable"] == 1


def test_a_source_that_cannot_be_read_ends_the_loop_in_one_line(tmp_path):
    collector, *_ = collector_of(tmp_path)

    def get(timeout):
        raise SourceError("no frame for 9 s")

    collector.source = SimpleNamespace(get=get, finished=False)
    with pytest.raises(LoopError, match="no frame for 9 s"):
        collector.collect_once(0.1)
