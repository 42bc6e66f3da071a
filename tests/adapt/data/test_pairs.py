"""A set is read once before any work: every bad pair is known, and memory is bounded."""

from __future__ import annotations

import hashlib
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from adapt.data.base import DataError, InMemory, refuse_overlap
from adapt.data.open import open_dataset
from adapt.data.pairs import Cached, examine
from adapt.data.png16 import read_png16
from adapt.data.reading import Reading


class Counted:
    """A set of random pairs that counts how often each is read."""

    def __init__(self, count: int = 6, size: tuple[int, int] = (16, 32)) -> None:
        rng = np.random.default_rng(0)
        self.pairs = [
            (rng.integers(0, 256, (*size, 3), dtype=np.uint8), rng.integers(0, 3, size).astype(np.uint8))
            for _ in range(count)
        ]
        self.reads = [0] * count
        self.bad: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int):
        self.reads[i] += 1
        if i in self.bad:
            raise DataError(self.bad[i], "do something")
        return self.pairs[i]

    def name(self, i: int) -> str:
        return f"f{i:03d}"


def test_what_fits_is_read_once_and_the_rest_again_with_the_same_content():
    data = Counted()
    one = sum(part.nbytes for part in data.pairs[0])
    pairs = examine(data, what="x", cache_mb=2.5 * one / 2**20)
    for _ in range(3):
        for i in range(6):
            for ours, theirs in zip(pairs[i], data.pairs[i], strict=True):
                np.testing.assert_array_equal(ours, theirs)
    assert data.reads == [1, 1, 4, 4, 4, 4]
    everything = Counted()
    kept = examine(everything, what="x")
    assert [kept[i][1].sum() for i in range(6)] == [y.sum() for _, y in everything.pairs]
    assert everything.reads == [1] * 6


def test_a_cache_never_holds_more_than_its_room():
    data = Counted(40)
    one = sum(part.nbytes for part in data.pairs[0])
    cached = Cached(data.__getitem__, range(40), 3.2 * one / 2**20)
    rng = np.random.default_rng(1)
    for i in rng.integers(0, 40, 500):
        cached[int(i)]
        assert len(cached._kept) <= 3
    cached.forget(next(iter(cached._kept)))
    assert len(cached._kept) == 2


def test_all_bad_pairs_are_in_one_refusal_of_bounded_length():
    data = Counted(30)
    data.bad = {i: f"class {i} too many" for i in range(3, 28)}
    with pytest.raises(DataError) as error:
        examine(data, what="folder:x")
    said = str(error.value)
    assert "folder:x has 25 bad pairs: f003: class 3 too many; f004" in said
    assert "and 15 more" in said
    assert said.count("do something") == 1
    assert "--skip-bad" in said
    assert "\n" not in said
    pairs = examine(data, what="folder:x", skip_bad=True)
    assert [pairs.name(i) for i in range(len(pairs))] == ["f000", "f001", "f002", "f028", "f029"]
    assert [row["name"] for row in pairs.plain()] == [f"f{i:03d}" for i in range(3, 28)]
    assert "25 bad pairs left out: f003" in pairs.notes[0]
    data.bad = dict.fromkeys(range(30), "bad")
    with pytest.raises(DataError, match="no good pair left"):
        examine(data, what="x", skip_bad=True)


def test_labels_that_are_void_alone_teach_nothing():
    frame = np.zeros((4, 6, 3), np.uint8)
    void, real = np.full((4, 6), 255, np.uint8), np.zeros((4, 6), np.uint8)
    real[:2] = 1
    with pytest.raises(DataError, match="every pixel of all 2 labels is void"):
        examine(InMemory([(frame, void), (frame, void)]), what="x")
    notes = examine(InMemory([(frame, void), (frame, real)]), what="x", classes=("a", "b")).notes
    assert any("1 labels are void alone: number 0" in note for note in notes)
    masks = examine(InMemory([(frame, np.zeros((4, 6), np.uint8))]), what="x", classes=("road", "b")).notes
    assert any("of one class, road" in note for note in masks)
    mostly = real.copy()
    mostly[1:] = 255
    notes = examine(InMemory([(frame, mostly)]), what="x").notes
    assert any("75 % of the pixels are void" in note for note in notes)


def test_frames_without_label_are_said(tmp_path):
    for part in ("frames", "labels"):
        (tmp_path / part).mkdir()
    for name in "abc":
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(tmp_path / "frames" / f"{name}.png")
    Image.fromarray(np.eye(4, 6, dtype=np.uint8)).save(tmp_path / "labels" / "b.png")
    data = open_dataset(f"folder:{tmp_path}")
    pairs = examine(data, what="x")
    assert pairs.unlabelled == ["a", "c"]
    assert pairs.notes == ["x: 2 of 3 frames have no label and are not used: a; c"]
    assert len(examine(data, what="x", labelled=False)) == 3
    with pytest.raises(DataError, match="no labelled frame"):
        examine(open_dataset(f"folder:{tmp_path}", labels=False), what="x")


def cityscapes(root, values: np.ndarray, names=("a", "b", "c"), gone=()):
    for name in names:
        for part, suffix, array in (
            ("leftImg8bit", "leftImg8bit", np.zeros((*values.shape, 3), np.uint8)),
            ("gtFine", "gtFine_labelIds", values),
        ):
            if (part, name) not in gone:
                (root / part / "train" / "x").mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / part / "train" / "x" / f"{name}_{suffix}.png")
    return open_dataset(f"cityscapes:{root}:train", reading=Reading(collect=True))


def test_train_ids_under_the_name_of_label_ids_are_doubted(tmp_path):
    train_ids = np.array([[0, 1, 2, 8, 10, 255]], np.uint8)
    label_ids = np.array([[7, 8, 11, 21, 23, 0]], np.uint8)
    notes = examine(cityscapes(tmp_path / "a", train_ids), what="x").notes
    assert any("no label holds an id over 18, so these are trainIds" in note for note in notes)
    assert examine(cityscapes(tmp_path / "b", label_ids), what="x").notes == []
    with pytest.raises(DataError, match="holds 53, which is not an id of this set"):
        examine(cityscapes(tmp_path / "c", label_ids + np.uint8(53)), what="x")


def test_a_set_of_train_ids_refuses_label_ids(tmp_path):
    (tmp_path / "images/10k/val").mkdir(parents=True)
    (tmp_path / "labels/sem_seg/masks/val").mkdir(parents=True)
    Image.fromarray(np.zeros((1, 3, 3), np.uint8)).save(tmp_path / "images/10k/val/a.jpg")
    Image.fromarray(np.array([[7, 26, 255]], np.uint8)).save(tmp_path / "labels/sem_seg/masks/val/a.png")
    with pytest.raises(DataError, match="holds 26, which is not a trainId"):
        examine(open_dataset(f"bdd100k:{tmp_path}:val"), what="x")


def test_synthia_labels_that_are_none_are_bad_pairs(tmp_path):
    for part in ("RGB", "GT/LABELS"):
        (tmp_path / part).mkdir(parents=True)
    for name in "abc":
        Image.fromarray(np.zeros((3, 5, 3), np.uint8)).save(tmp_path / "RGB" / f"{name}.png")
    labels = tmp_path / "GT" / "LABELS"
    os.mkfifo(labels / "a.png")
    (labels / "b.png").write_bytes(b"nothing")
    header = struct.pack(">IIBBBBB", 5, 3, 16, 2, 0, 0, 0)
    endless = zlib.compress(bytes(1 << 24))
    body = b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in ((b"IHDR", header), (b"IDAT", endless), (b"IEND", b""))
    )
    (labels / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises((ValueError, OSError)):
        read_png16(labels / "c.png")
    data = open_dataset(f"synthia:{tmp_path}", reading=Reading(collect=True))
    with pytest.raises(DataError, match="3 bad pairs"):
        examine(data, what="x")


def test_half_unpacked_pairs_are_all_listed_with_the_layout(tmp_path):
    ids = np.array([[7, 26]], np.uint8)
    data = cityscapes(tmp_path, ids, gone={("gtFine", "a"), ("leftImg8bit", "c")})
    with pytest.raises(DataError) as error:
        examine(data, what="cityscapes:x")
    said = str(error.value)
    assert "2 bad pairs" in said
    assert "a_gtFine_labelIds.png" in said
    assert "c_gtFine_labelIds.png" in said
    assert "half unpacked? expected leftImg8bit" in said
    assert [examine(data, what="x", skip_bad=True).name(0)] == ["b_leftImg8bit"]


def test_noted_digests_find_the_same_twins_as_frames_do():
    data = Counted(4)
    other = InMemory([data.pairs[2]])
    pairs = examine(data, what="x", digests=True, cache_mb=0)
    assert pairs.digests == [hashlib.sha256(x.tobytes()).digest() for x, _ in data.pairs]
    reads = list(data.reads)
    with pytest.raises(DataError, match="frame f002 is also the evaluation frame number 0"):
        refuse_overlap(pairs, other)
    assert data.reads == reads
