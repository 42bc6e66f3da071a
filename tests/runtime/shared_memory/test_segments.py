"""The rule by which a client's segment is known, owned and abandoned."""

from __future__ import annotations

import os

from runtime.client.shm_segments import ShmSegment
from runtime.shared_memory import segments


def test_a_segment_is_abandoned_when_its_last_owner_is_gone(tmp_path):
    path = tmp_path / segments.new_name()
    path.write_bytes(b"x")
    assert segments.is_segment(path.name)
    assert not segments.is_segment("roadworthy-ab_d3fgh")
    server, owner = (os.open(path, os.O_RDWR) for _ in range(2))
    assert segments.is_abandoned(server)
    segments.own(owner)
    assert not segments.is_abandoned(server)
    os.close(owner)
    assert segments.is_abandoned(server)
    os.close(server)


def test_the_client_makes_segments_by_that_rule():
    segment = ShmSegment(100)
    found = os.open(f"{segments.DIRECTORY}/{segment.name}", os.O_RDWR)
    try:
        assert segments.is_segment(segment.name)
        assert not segments.is_abandoned(found)
    finally:
        segment.unlink()
        segment.close()
    assert segments.is_abandoned(found)
    os.close(found)
