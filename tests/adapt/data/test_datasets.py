"""Readers of data sets: what they read, and what they say when a set is not there or half unpacked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from adapt.data.base import DataError, Mapped, Resized, Subset, iterate
from adapt.data.camvid import CamVid
from adapt.data.folder import Folder
from adapt.data.open import open_dataset


@pytest.fixture
def camvid(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(3):
        frame = rng.integers(0, 256, (36, 48, 3), dtype=np.uint8)
        Image.fromarray(frame).save(tmp_path / "images" / f"0001TP_{i}.png")
        if i < 2:
            label = rng.integers(0, 11, (36, 48)).astype(np.uint8)
            Image.fromarray(label).save(tmp_path / "labels" / f"0001TP_{i}.png")
    (tmp_path / "dusk.txt").write_text("0001TP_0\n0001TP_1\n0001TP_2\n")
    return tmp_path


def test_camvid_reads_frames_and_labels_where_there_are_any(camvid):
    data = open_dataset(f"camvid:{camvid}:dusk")
    assert isinstance(data, CamVid)
    assert [name for name, _, _ in iterate(data)] == ["0001TP_0", "0001TP_1", "0001TP_2"]
    frame, label = data[0]
    assert (frame.shape, frame.dtype) == ((36, 48, 3), np.uint8)
    assert label is not None
    assert label.max() <= 10
    assert data[2][1] is None
    assert CamVid(camvid, "dusk", labels=False)[0][1] is None


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda root: root / "nowhere", "there is no folder"),
        (lambda root: (root / "dusk.txt").rename(root / "other.txt") and root, "found: other"),
        (lambda root: (root / "images" / "0001TP_1.png").unlink() or root, "half unpacked"),
        (lambda root: (root / "dusk.txt").write_text("") * 0 or root, "is empty"),
    ],
)
def test_a_missing_part_of_camvid_is_named_with_the_layout(camvid, broken, message):
    with pytest.raises(DataError, match=message) as error:
        CamVid(broken(camvid), "dusk")
    assert "labels/NAME.png" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_with_and_without_labels(tmp_path):
    for name in ("frames", "labels"):
        (tmp_path / name).mkdir()
    for i in range(2):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "frames" / f"{i}.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(tmp_path / "labels" / "1.png")
    data = open_dataset(f"folder:{tmp_path}")
    assert isinstance(data, Folder)
    assert data[0][1] is None
    np.testing.assert_array_equal(data[1][1], 1)
    Image.fromarray(np.ones((8, 9), np.uint8)).save(tmp_path / "labels" / "1.png")
    with pytest.raises(DataError, match="resize one of them"):
        data[1]
    Image.fromarray(np.ones((8, 8, 3), np.uint8)).save(tmp_path / "labels" / "1.png")
    with pytest.raises(DataError, match="one 8-bit channel"):
        data[1]
    (tmp_path / "frames" / "1.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(DataError, match="no readable image"):
        data[1]


def test_an_empty_or_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no picture"):
        Folder(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        Folder(tmp_path / "x")


def test_resize_remap_and_part(camvid):
    data = CamVid(camvid, "dusk")
    frame, label = Resized(data, (18, 24))[1]
    assert (frame.shape, label.shape) == ((18, 24, 3), (18, 24))
    table = np.full(256, 255, np.uint8)
    table[3] = 0
    mapped = Mapped(data, table)[0][1]
    np.testing.assert_array_equal(mapped == 0, data[0][1] == 3)
    part = Subset(data, [2, 0])
    assert [part.name(i) for i in range(len(part))] == ["0001TP_2", "0001TP_0"]


@pytest.mark.parametrize(
    "text", ["camvid", "nothing:here", "camvid:only_a_list", "street:moon", "street:day:x"]
)
def test_a_description_of_no_data_set_is_refused_with_the_remedy(text):
    with pytest.raises(DataError, match=r"write|choose"):
        open_dataset(text)


def test_rendered_streets_by_text():
    data = open_dataset("street:day:2:7")
    again = open_dataset("street:day:1:8")
    frame, label = data[1]
    assert len(data) == 2
    np.testing.assert_array_equal(frame, again[0][0])
    assert label.shape == frame.shape[:2]
    assert data.name(1) == "day_000008"
    with pytest.raises(IndexError):
        data[2]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + b"\xff" * 30,
        b"GIF89a\xff",
        b"\xff\xd8\xff",
    ],
)
def test_a_damaged_picture_is_named(tmp_path, content):
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "a.png").write_bytes(content)
    with pytest.raises(DataError, match="no readable image"):
        Folder(tmp_path)[0]


def test_without_labels_none_is_read(tmp_path):
    for name in ("frames", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "frames" / "a.png")
    (tmp_path / "labels" / "a.png").write_bytes(b"no label at all")
    assert open_dataset(f"folder:{tmp_path}", labels=False)[0][1] is None
    assert open_dataset("street:day:1", labels=False)[0][1] is None


@pytest.mark.parametrize(
    "text", ["street:mars", "street:day:-3", "street:day:2:-1", "street:day:x", "street:day:1:2:3"]
)
def test_streets_that_cannot_be_are_refused(text):
    with pytest.raises(DataError):
        open_dataset(text)
