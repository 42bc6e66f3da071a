"""The frame store: bounded, free of near-duplicates, and whole after a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest

from adapt.frames.store import FrameStore, StoreError, confidence_summary


def scene(seed: int, size: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A frame of large coloured blocks, so that two seeds look different."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((size[0] // 6, size[1] // 8, 1), np.uint8))


def test_what_is_kept_comes_back_unchanged(tmp_path):
    with FrameStore(tmp_path) as store:
        kept = store.add(scene(0), source="front", model="road", version=3, summary={"score": 0.5}, at=12.5)
        assert kept.id is not None
        (row,) = store.rows()
        np.testing.assert_array_equal(store.read(row), scene(0))
        assert (row.source, row.model, row.version, row.time) == ("front", "road", 3, 12.5)
        assert (row.summary, row.why) == ({"score": 0.5}, "new view")
        assert (row.height, row.width) == (48, 64)


def test_near_duplicates_are_left_out_within_a_source_only(tmp_path):
    noisy = np.clip(scene(0).astype(int) + np.random.default_rng(9).integers(-3, 4, (48, 64, 3)), 0, 255)
    with FrameStore(tmp_path) as store:
        store.add(scene(0), source="front")
        again = store.add(noisy.astype(np.uint8), source="front")
        assert again.id is None
        assert "near-duplicate" in again.why
        assert store.add(noisy.astype(np.uint8), source="rear").id is not None
        assert store.add(scene(1), source="front").id is not None
        assert len(store) == 3


def test_duplicates_are_known_after_opening_again(tmp_path):
    with FrameStore(tmp_path) as store:
        store.add(scene(0))
    with FrameStore(tmp_path) as store:
        assert store.add(scene(0)).id is None


def test_the_byte_bound_holds_and_the_oldest_go(tmp_path):
    with FrameStore(tmp_path / "a") as store:
        store.add(scene(0))
        one = store.bytes()
    with FrameStore(tmp_path / "b", max_bytes=int(one * 4.5)) as store:
        evicted = 0
        for i in range(12):
            evicted += store.add(scene(i), at=float(i)).evicted
            assert store.bytes() <= one * 4.5
        files = list((tmp_path / "b" / "frames").rglob("*.png"))
        assert len(files) == len(store) == 12 - evicted
        assert store.rows()[-1].time == 11.0
        assert min(row.time for row in store.rows()) == 12 - len(store)


def test_the_age_bound_holds(tmp_path):
    with FrameStore(tmp_path, max_age=10) as store:
        for i in range(3):
            store.add(scene(i), at=float(i * 8))
        assert [row.time for row in store.rows()] == [8.0, 16.0]


def test_delete_by_source_time_and_id(tmp_path):
    with FrameStore(tmp_path) as store:
        for i in range(6):
            store.add(scene(i), source="front" if i % 2 else "rear", at=float(i))
        assert store.delete(source="front", before=4.0) == 2
        assert store.delete(ids=[store.rows()[0].id]) == 1
        assert len(store) == 3 == len(list((tmp_path / "frames").rglob("*.png")))
        with pytest.raises(ValueError, match="give ids, source or before"):
            store.delete()


def test_files_without_row_and_rows_without_file_are_swept(tmp_path):
    with FrameStore(tmp_path) as store:
        for i in range(3):
            store.add(scene(i))
        lost = store.rows()[1]
    (tmp_path / "frames" / lost.file).unlink()
    (tmp_path / "frames" / "zz").mkdir()
    (tmp_path / "frames" / "zz" / "half.tmp").write_bytes(b"\x89PNG")
    with FrameStore(tmp_path) as store:
        assert [row.id for row in store.rows()] == [1, 3]
        assert not (tmp_path / "frames" / "zz" / "half.tmp").exists()


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "index.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        FrameStore(tmp_path)
    with pytest.raises(ValueError, match=r"uint8 \[H,W,3\]"):
        FrameStore(tmp_path / "new").add(np.zeros((4, 4), np.uint8))


def test_a_sequence_of_frames_for_a_round(tmp_path):
    with FrameStore(tmp_path) as store:
        for i in range(5):
            store.add(scene(i))
        frames = store.frames(store.rows(limit=3))
        assert len(frames) == 3
        np.testing.assert_array_equal(frames[0], scene(2))
        np.testing.assert_array_equal(list(frames[1:])[1], scene(4))


def test_the_summary_is_the_class_balanced_score():
    labels = np.array([[0, 0, 0, 2]], np.uint8)
    confidence = np.array([[255, 255, 255, 51]], np.uint8)
    summary = confidence_summary(labels, confidence, 3)
    assert summary["share"] == [0.75, 0.0, 0.25]
    assert summary["score"] == pytest.approx((1.0 + 0.2) / 2)


WRITER = """
import sys
import numpy as np
from adapt.frames import FrameStore
store = FrameStore(sys.argv[1], max_bytes=60_000)
rng = np.random.default_rng(0)
while True:
    blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    store.add(np.kron(blocks, np.ones((20, 20, 1), np.uint8)))
    print("kept", flush=True)
"""


def test_killed_while_writing_leaves_rows_and_files_that_agree(tmp_path):
    for attempt in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"kept\n"
        time.sleep(0.05 + 0.07 * attempt)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with FrameStore(tmp_path, max_bytes=60_000) as store:
            rows = store.rows()
            assert rows
            assert {row.file for row in rows} == {
                path.relative_to(tmp_path / "frames").as_posix()
                for path in (tmp_path / "frames").rglob("*.png")
            }
            for row in rows:
                assert store.read(row).shape == (120, 160, 3)
            assert store.bytes() <= 60_000


def test_what_the_command_prints_moves_no_cursor_and_a_distance_is_one(tmp_path, capsys):
    from adapt.frames.__main__ import main

    with FrameStore(tmp_path / "s", near=-1) as store:
        for i, name in enumerate(("\x1b[2Jfront", "a\nb", "x\u202ey", "")):
            store.add(scene(i), source=name, place=(48.0, 11.0))
    assert main([str(tmp_path / "s"), "list"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 4
    assert not any(c in said.out + said.err for c in "\x1b\u202e")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "s"), "purge", "--around", "48,11", "--within", "-5"])
    assert main([str(tmp_path / "s"), "purge", "--source", ""]) == 0, "a camera without a name has one"
    assert main([str(tmp_path / "s"), "purge", "--after", "0"]) == 0
    with FrameStore(tmp_path / "s") as store:
        assert len(store) == 0


@pytest.mark.parametrize("at", [float("nan"), float("inf"), -5.0, 1e300, 4e12])
def test_a_time_that_no_clock_shows_is_now(tmp_path, at):
    """Else a purge by time would never find the frame."""
    begun = time.time()
    with FrameStore(tmp_path / "s", near=-1) as store:
        store.add(scene(0), source="front", at=at)
        assert begun <= store.rows()[0].time <= time.time()


def test_one_damaged_picture_keeps_no_other_back(tmp_path, capsys):
    from adapt.frames.__main__ import main

    with FrameStore(tmp_path / "s", near=-1) as store:
        for i in range(3):
            store.add(scene(i), source="front")
        bad = store.rows()[1]
    (tmp_path / "s" / "frames" / bad.file).write_bytes(b"\x89PNG no")
    assert main([str(tmp_path / "s"), "export", str(tmp_path / "out")]) == 1
    assert "2 frames" in capsys.readouterr().err
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_an_index_that_somebody_holds_is_said_as_that_and_works_again_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("adapt.frames.store.PATIENCE", 0.05)
    with FrameStore(tmp_path / "s", near=-1) as store:
        store.add(scene(0), source="front")
        other = sqlite3.connect(tmp_path / "s" / "index.sqlite", isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"locked.*end the program that holds"):
            store.add(scene(1), source="front")
        with pytest.raises(StoreError, match="end the program that holds"):
            FrameStore(tmp_path / "s").close()
        assert len(store.rows()) == 1, "what is there can be read meanwhile"
        other.execute("COMMIT")
        other.close()
        assert store.add(scene(1), source="front").id is not None
        assert sum(1 for p in (tmp_path / "s" / "frames").rglob("*.png")) == 2, "no picture without its row"
