"""Shared memory: nothing is read past its end, nothing leaks, and what is in use stays."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import serve as runtime_serve
from runtime.client import Client, Rejected, RpcError
from runtime.errors import ServiceError
from runtime.shared_memory.segments import PREFIX
from runtime.shared_memory.system import LIMIT, Region, ShmRef, ShmRegistry
from tests.runtime import builders as b
from tests.waits import PATIENCE, until

SIZE = (128, 256)


@pytest.fixture
def memory():
    """A shared-memory object of two pages; yields its key."""
    name = f"rw-test-{os.getpid()}-{time.monotonic_ns()}"
    path = Path("/dev/shm") / name
    path.write_bytes(bytes(range(256)) * 32)
    yield f"/{name}"
    path.unlink(missing_ok=True)


huge = st.one_of(
    st.integers(-10, 9000), st.integers(-(2**63), 2**63 - 1), st.sampled_from([2**63 - 1, 2**63 - 4096])
)


@given(offset=huge, size=huge, start=st.sampled_from([0, 4096]), length=st.integers(1, 4096))
def test_no_place_outside_a_region_is_accepted(offset, size, start, length):
    region = Region("r", "k", start, length, -1)
    place = ShmRef("r", offset, size)
    inside = offset >= 0 and size > 0 and offset + size <= length
    if inside:
        region.check(place)
    else:
        with pytest.raises(ServiceError, match="Invalid offset"):
            region.check(place)


def test_places_are_read_and_written(memory):
    regions = ShmRegistry()
    regions.register("r", memory, 4096, 1000)
    region = regions.hold(ShmRef("r", 10, 20))
    assert region.read(ShmRef("r", 10, 20)).tolist() == [(4096 + 10 + i) % 256 for i in range(20)]
    region.write(ShmRef("r", 999, 1), b"\x7f")
    region.release()
    regions.unregister("")
    assert Path("/dev/shm", memory[1:]).read_bytes()[4096 + 999] == 0x7F


def test_a_region_that_is_shortened_under_us_is_an_error_and_not_a_crash(memory):
    regions = ShmRegistry()
    regions.register("r", memory, 0, 8192)
    region = regions.hold(ShmRef("r", 0, 8192))
    os.truncate(f"/dev/shm{memory}", 100)
    with pytest.raises(ServiceError, match="shortened"):
        region.read(ShmRef("r", 0, 8192))
    region.release()
    regions.unregister("r")


def test_a_region_unregistered_while_in_use_stays_until_it_is_released(memory):
    regions = ShmRegistry()
    assert descriptors(memory) == 0
    regions.register("r", memory, 0, 8192)
    region = regions.hold(ShmRef("r", 0, 1))
    regions.unregister("r")
    with pytest.raises(ServiceError, match="Unable to find"):
        regions.hold(ShmRef("r", 0, 1))
    assert region.read(ShmRef("r", 1, 1)).tolist() == [1]
    assert descriptors(memory) > 0
    region.release()
    assert descriptors(memory) == 0


def test_registrations_are_bounded_and_failures_leave_nothing_open(memory, monkeypatch):
    regions = ShmRegistry()
    for key, offset, size in (
        (memory, 0, 9000),
        (memory, 2**63, 2**63),
        (memory, 5, 5),
        ("/none", 0, 1),
        ("/../x", 0, 1),
    ):
        with pytest.raises(ServiceError):
            regions.register("x", key, offset, size)
    assert descriptors(memory) == 0
    assert LIMIT >= 64
    monkeypatch.setattr("runtime.shared_memory.system.LIMIT", 0)
    with pytest.raises(ServiceError, match="unregister one"):
        regions.register("x", memory, 0, 8192)


def descriptors(key=""):
    """How many this process has, or how many of one shared-memory object: others come and go meanwhile."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += key in os.readlink(f"/proc/self/fd/{name}")
    return found


@pytest.fixture
def server(repository, quick, serve):
    publish(repository)
    return serve(quick)


def publish(repository):
    rng = np.random.default_rng(7)
    frame, labels = b.blocks(rng, SIZE)
    answers = {
        "frames": frame[None],
        "labels": labels[None],
        "confidence": np.full((1, *SIZE), 253, np.uint8),
    }
    return b.publish(repository, model=b.segmentation(*b.nearest_weights(), SIZE), size=SIZE, answers=answers)


@pytest.mark.parametrize("way", [True, False, None])
def test_the_client_gives_the_same_answers_either_way(server, way):
    rng = np.random.default_rng(0)
    with Client(server.target, shared_memory=way) as client:
        for outputs in (("labels", "confidence"), ("confidence",), ("probabilities", "labels")):
            frame, labels = b.blocks(rng, SIZE)
            answer = client.infer("road", frame, outputs=outputs, source="front")
            assert set(answer.outputs) == set(outputs)
            if "labels" in outputs:
                assert (answer.labels == labels).all()
            if "confidence" in outputs:
                assert answer.confidence.shape == SIZE
                assert answer.confidence.mean() > 200
        assert len(server.service.regions.status("")) == (0 if way is False else 1)
        mine = f"{PREFIX}{os.getpid()}-"
        assert not [n for n in os.listdir("/dev/shm") if n.startswith(mine)]  # unlinked already
        with pytest.raises(Rejected, match="unknown model"):
            client.infer("nope", frame)
    assert server.service.regions.status("") == []


def test_many_threads_have_a_lane_each(server):
    wrong = []

    def camera(seed, client):
        rng = np.random.default_rng(seed)
        for _ in range(15):
            frame, labels = b.blocks(rng, SIZE)
            wrong.append(int((client.infer("road", frame).labels != labels).sum()))

    with Client(server.target) as client:
        threads = [threading.Thread(target=camera, args=(seed, client)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert 1 <= len(server.service.regions.status("")) <= 4
    assert wrong == [0] * 60


def test_frames_that_are_tapped_do_not_change_when_the_lane_is_used_again(server):
    rng = np.random.default_rng(0)
    pairs = [b.blocks(rng, SIZE) for _ in range(4)]
    with Client(server.target) as client, client.frames("road") as tap:
        for frame, _ in pairs:
            client.infer("road", frame)
        for frame, labels in pairs:
            seen = next(tap)
            assert (seen.frame == frame).all()
            assert (seen.labels == labels).all()


def test_a_client_outlives_its_server(repository, quick, serve):
    publish(repository)
    first = serve(quick)
    frame, labels = b.blocks(np.random.default_rng(0), SIZE)
    with Client(first.target) as client:
        assert (client.infer("road", frame).labels == labels).all()
        first.stop()
        serve(dataclasses.replace(quick, port=first.port))

        def back():
            try:
                return (client.infer("road", frame).labels == labels).all()
            except (Rejected, RpcError):
                return False

        until(back)
        assert (client.infer("road", frame).labels == labels).all()


def test_nothing_leaks(server):
    frame, _ = b.blocks(np.random.default_rng(0), SIZE)
    with Client(server.target) as client:
        client.infer("road", frame)
    before = descriptors()
    for _ in range(10):
        with Client(server.target) as client:
            client.infer("road", frame)
    until(lambda: descriptors() <= before + 2)
    assert server.service.regions.status("") == []


@pytest.fixture(params=[True, False], ids=["mapped", "through the descriptor"])
def mapped(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr("runtime.shared_memory.system.GUARD.install", lambda: False)
    elif not ShmRegistry.mapped():
        pytest.skip("no guard against SIGBUS on this system")
    return request.param


def registered(memory):
    regions = ShmRegistry()
    regions.register("r", memory, 4096, 4096)
    return regions, regions.hold(ShmRef("r", 0, 4096))


def test_both_ways_read_and_write_the_same(memory, mapped):
    regions, region = registered(memory)
    assert region.read(ShmRef("r", 10, 20)).tolist() == [(10 + i) % 256 for i in range(20)]
    region.write(ShmRef("r", 100, 3), b"\x01\x02\x03")
    assert Path("/dev/shm", memory[1:]).read_bytes()[4196:4199] == b"\x01\x02\x03"
    region.write(ShmRef("r", 4095, 1), b"")  # an empty batch has an empty answer
    region.release()
    regions.unregister("")


@pytest.mark.parametrize("verb", ["read", "write"])
def test_a_file_cut_short_in_the_middle_of_a_copy_is_an_error_and_not_the_end(
    memory, mapped, monkeypatch, verb
):
    """The size is right when it is looked at, and the file is cut before the first byte is copied."""
    regions, region = registered(memory)
    monkeypatch.setattr(Region, "_check_size", lambda self, end: os.truncate(f"/dev/shm{memory}", 0))
    place = ShmRef("r", 0, 4096)
    if verb == "read" or mapped:  # a write through a descriptor makes the file longer again
        with pytest.raises(ServiceError, match="shortened"):
            region.read(place) if verb == "read" else region.write(place, bytes(4096))
    monkeypatch.undo()
    os.truncate(f"/dev/shm{memory}", 8192)
    if mapped:  # what is mapped there now is not the client's any more
        with pytest.raises(ServiceError, match="register it again"):
            region.read(place)
    region.release()
    regions.unregister("r")
    regions.register("r", memory, 0, 8192)
    assert regions.hold(ShmRef("r", 0, 1)).read(ShmRef("r", 0, 1)).tolist() == [0]


def test_a_copy_in_another_thread_survives_too(memory, monkeypatch):
    _regions, region = registered(memory)
    monkeypatch.setattr(Region, "_check_size", lambda self, end: os.truncate(f"/dev/shm{memory}", 0))
    errors = []

    def copy():
        with pytest.raises(ServiceError, match="shortened"):
            region.read(ShmRef("r", 0, 4096))
        errors.append(1)

    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert errors == [1] * 4


def test_a_mapping_that_was_lost_does_not_take_the_fault_of_the_next_one_at_its_address(memory, monkeypatch):
    if not ShmRegistry.mapped():
        pytest.skip("no guard against SIGBUS on this system")
    lost, region = registered(memory)
    begin = region._mapping._watched.begin
    del lost, region  # never unregistered: collected, and its address is free
    gc.collect()
    kept = []
    for _ in range(64):  # the kernel gives the address out again soon, mostly at once
        regions, region = registered(memory)
        kept.append((regions, region))
        if region._mapping._watched.begin == begin:
            break
    else:
        pytest.skip("the address was not given out again")
    monkeypatch.setattr(Region, "_check_size", lambda self, end: os.truncate(f"/dev/shm{memory}", 0))
    with pytest.raises(ServiceError, match="shortened"):
        region.read(ShmRef("r", 0, 4096))
    for regions, region in kept:
        region.release()
        regions.unregister("r")


def test_a_fault_that_is_not_ours_still_ends_the_process(tmp_path):
    code = (
        "import mmap, os, sys\n"
        "from runtime.shared_memory.sigbus import GUARD\n"
        "assert GUARD.install()\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "os.ftruncate(fd, 8192); m = mmap.mmap(fd, 8192); os.ftruncate(fd, 0)\n"
        "print('before', flush=True); m[0]; print('after')\n"
    )
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], cwd=root, capture_output=True, timeout=PATIENCE
    )
    assert ended.stdout == b"before\n"
    assert ended.returncode == -signal.SIGBUS


def test_the_server_may_open_what_registrations_take(monkeypatch):
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.append(pair))
    runtime_serve._allow_descriptors()
    assert limits.pop() == (4096, 4096)
    assert 2 * LIMIT < runtime_serve._DESCRIPTORS
    limits[:] = [(1 << 20, 1 << 20)]
    runtime_serve._allow_descriptors()
    assert limits == [(1 << 20, 1 << 20)]
