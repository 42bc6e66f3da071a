"""The published sets in miniature: layout, label ids, and what is said when half is missing."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from adapt.data.base import DataError, refuse_overlap
from adapt.data.driving import SETS
from adapt.data.open import open_dataset
from adapt.data.png16 import read_png16

FRAMES = {
    "cityscapes": ("leftImg8bit/val/bonn/a_leftImg8bit.png", "gtFine/val/bonn/a_gtFine_labelIds.png", ":val"),
    "acdc": ("rgb_anon/night/val/G1/a_rgb_anon.png", "gt/night/val/G1/a_gt_labelIds.png", ":night/val"),
    "darkzurich": ("rgb_anon/val/night/G1/a_rgb_anon.png", "gt/val/night/G1/a_gt_labelIds.png", ":val"),
    "gta5": ("images/00001.png", "labels/00001.png", ""),
    "bdd100k": ("images/10k/val/a.jpg", "labels/sem_seg/masks/val/a.png", ":val"),
    "synthia": ("RGB/0000000.png", "GT/LABELS/0000000.png", ""),
}


def put(path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def png16(array: np.ndarray, filters: list[int]) -> bytes:
    """An RGB 16-bit PNG whose row y is filtered by filters[y] (0 none, 1 sub, 2 up), written by hand."""
    h, w, _ = array.shape
    rows = array.astype(">u2").tobytes()
    stride = w * 6
    lines = [np.frombuffer(rows[y * stride : (y + 1) * stride], np.uint8).astype(int) for y in range(h)]
    body = b""
    for y, kind in enumerate(filters):
        line = lines[y]
        if kind == 1:
            line = line - np.concatenate([np.zeros(6, int), line[:-6]])
        if kind == 2:
            line = line - (lines[y - 1] if y else 0)
        body += bytes([kind]) + (line & 255).astype(np.uint8).tobytes()

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", sorted(set(FRAMES) - {"synthia"}))
def test_each_layout_is_read_into_train_ids(tmp_path, kind):
    frame, label, split = FRAMES[kind]
    put(tmp_path / frame, np.zeros((4, 6, 3), np.uint8))
    ids = np.array([[7, 26, 33, 0, 4, 11]] * 4, np.uint8)
    train_ids = [0, 13, 18, 255, 255, 2]
    if SETS[kind].ids is None:
        ids = np.array([[0, 13, 18, 255, 255, 2]] * 4, np.uint8)
    put(tmp_path / label, ids)
    data = open_dataset(f"{kind}:{tmp_path}{split}")
    assert len(data) == 1
    assert data[0][1][0].tolist() == train_ids
    lone = (tmp_path / label).with_name((tmp_path / label).name.replace("a_", "b_").replace("0", "1"))
    lone = lone if lone.name != (tmp_path / label).name else lone.with_name("b.png")
    put(lone, ids)
    with pytest.raises(DataError, match=r"1 labels have no frame.*half unpacked.*expected"):
        open_dataset(f"{kind}:{tmp_path}{split}")
    lone.unlink()
    (tmp_path / label).unlink()
    with pytest.raises(DataError, match="1 of 1 frames have no label") as error:
        open_dataset(f"{kind}:{tmp_path}{split}")
    assert "expected" in str(error.value)
    unlabelled = open_dataset(f"{kind}:{tmp_path}{split}", labels=False)
    assert unlabelled[0][1] is None


def test_synthia_keeps_the_class_in_sixteen_bits(tmp_path):
    frame, label, _ = FRAMES["synthia"]
    put(tmp_path / frame, np.zeros((3, 5, 3), np.uint8))
    array = np.zeros((3, 5, 3), np.uint16)
    array[..., 0] = [[3, 1, 8, 22, 0]] * 3
    array[..., 1] = np.arange(15).reshape(3, 5) * 257
    (tmp_path / label).parent.mkdir(parents=True)
    (tmp_path / label).write_bytes(png16(array, [0, 1, 2]))
    np.testing.assert_array_equal(read_png16(tmp_path / label), array)
    assert open_dataset(f"synthia:{tmp_path}")[0][1][2].tolist() == [0, 10, 13, 255, 255]
    (tmp_path / label).write_bytes(b"nothing")
    with pytest.raises((DataError, OSError)):
        open_dataset(f"synthia:{tmp_path}")[0]


@pytest.mark.parametrize("kind", sorted(FRAMES))
def test_an_empty_folder_names_the_layout(tmp_path, kind):
    with pytest.raises(DataError, match="expected"):
        open_dataset(f"{kind}:{tmp_path}{FRAMES[kind][2]}")
    with pytest.raises(DataError, match=r"there is no folder|which split"):
        open_dataset(f"{kind}:{tmp_path}/none{FRAMES[kind][2]}")


def test_published_splits_without_labels_are_unlabelled(tmp_path):
    put(tmp_path / "leftImg8bit/test/bonn/a_leftImg8bit.png", np.zeros((4, 6, 3), np.uint8))
    assert open_dataset(f"cityscapes:{tmp_path}:test")[0][1] is None
    with pytest.raises(DataError, match="which split"):
        open_dataset(f"cityscapes:{tmp_path}")


def test_an_evaluation_frame_among_the_training_frames_is_found_under_another_name(tmp_path):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(4)]
    for i in range(3):
        put(tmp_path / "a" / f"{i}.png", frames[i])
    for i, j in enumerate((3, 1)):
        put(tmp_path / "b" / f"x{i}.png", frames[j])
    train, evaluation = open_dataset(f"folder:{tmp_path / 'a'}"), open_dataset(f"folder:{tmp_path / 'b'}")
    with pytest.raises(DataError, match="frame 1 is also the evaluation frame x1"):
        refuse_overlap(train, evaluation)
    (tmp_path / "b" / "x1.png").unlink()
    refuse_overlap(train, open_dataset(f"folder:{tmp_path / 'b'}"))
