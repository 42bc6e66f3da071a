"""Pictures of other depths, ways up and colours, and labels with other void values."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from adapt.data.base import DataError, read_frame, read_label
from adapt.data.folder import Folder
from adapt.data.open import open_dataset
from adapt.data.reading import Palette, Reading
from adapt.sources import open_source
from networks.images import ImageError, read_image

GREY = np.linspace(0, 65535, 48, dtype=np.uint16).reshape(6, 8)


def grey16(path, values: np.ndarray) -> None:
    """A 16-bit grey PNG by the specification, without Pillow."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("reader", [read_frame, read_image])
def test_sixteen_bit_grey_is_scaled_by_its_depth(tmp_path, reader):
    grey16(tmp_path / "a.png", GREY)
    wanted = np.round(GREY / 257.0).astype(np.uint8)  # 65535 / 255
    found = reader(tmp_path / "a.png")
    assert found.shape == (6, 8, 3)
    np.testing.assert_array_equal(found, np.repeat(wanted[..., None], 3, axis=2))
    Image.fromarray(GREY).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(reader(tmp_path / "a.tif"), found)


def test_a_source_of_sixteen_bit_pictures_is_no_white_road(tmp_path, capsys):
    grey16(tmp_path / "0.png", GREY)
    grey16(tmp_path / "1.png", GREY // 64)  # ten bits in a file of sixteen
    source = open_source(f"front={tmp_path}")
    captured = source.get(0.0)
    assert captured is not None
    assert captured.frame[0].max() < 60
    assert captured.frame[-1].max() == 255
    assert source.get(0.0) is None
    assert "1.png is left out" in capsys.readouterr().err


@pytest.mark.parametrize("reader", [read_frame, read_image])
def test_depths_without_a_known_white_are_refused_in_one_line(tmp_path, reader):
    grey16(tmp_path / "twelve.png", GREY // 16)
    Image.fromarray(GREY.astype(np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "float.tif")
    for name, words in (
        ("twelve.png", "4095 of 65535"),
        ("int.tif", "no known white"),
        ("float.tif", "mode F"),
    ):
        with pytest.raises((DataError, ImageError), match=words) as error:
            reader(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_undone(tmp_path, orientation, suffix):
    """By the definition of the tag: where the stored picture's first row and first column lie."""
    shown = np.zeros((16, 24, 3), np.uint8)
    shown[:8, :12] = 250  # the corner at the top left as a person sees it
    stored = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown),
        7: shown[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(file, exif=exif, quality=100)
    assert np.abs(read_frame(file).astype(int) - shown).max() < 8


def test_pictures_of_other_modes_are_read(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[..., 1], rgba[..., 3] = 200, 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_frame(tmp_path / "a.png")[..., 1], 200)
    Image.new("CMYK", (6, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)  # red
    red = read_frame(tmp_path / "a.jpg")[2, 3]
    assert red[0] > 230
    assert red[1:].max() < 30
    Image.new("L", (6, 4), 77).save(tmp_path / "l.png")
    np.testing.assert_array_equal(read_frame(tmp_path / "l.png"), 77)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").symlink_to(tmp_path / "none.png")
    (tmp_path / "d.png").write_bytes(b"")
    for name, words in (
        ("a.png", "no plain file"),
        ("b.png", "no plain file"),
        ("c.png", "is missing"),
        ("d.png", "no readable image"),
    ):
        for reader in (read_frame, read_label):
            with pytest.raises(DataError, match=words):
                reader(tmp_path / name)
    buffer = io.BytesIO()
    Image.fromarray(np.arange(40_000, dtype=np.uint32).astype(np.uint8).reshape(200, 200)).save(buffer, "PNG")
    (tmp_path / "e.png").write_bytes(buffer.getvalue()[:-200])
    with pytest.raises(DataError, match="no readable image"):
        read_label(tmp_path / "e.png")


# ------------------------------------------------------------------------------------------------ labels
def test_void_values_become_255_and_0_shifts_the_classes(tmp_path):
    Image.fromarray(np.array([[0, 1, 2, 11, 255]], np.uint8)).save(tmp_path / "a.png")
    assert Reading().label(tmp_path / "a.png").tolist() == [[0, 1, 2, 11, 255]]
    assert Reading(void=(11, 2)).label(tmp_path / "a.png").tolist() == [[0, 1, 255, 255, 255]]
    assert Reading(void=(0,)).label(tmp_path / "a.png").tolist() == [[255, 0, 1, 10, 255]]
    assert Reading(void=(0, 11)).label(tmp_path / "a.png").tolist() == [[255, 0, 1, 255, 255]]
    with pytest.raises(DataError, match="0 to 255"):
        Reading(void=(256,))


PALETTE = """name,r,g,b
# the road first
128 64 128 road
traffic light,250,170,30
0 0 0\tvoid
1;2;3;2
9 9 9 255
"""


def test_a_palette_file_has_colour_and_class_in_either_order(tmp_path):
    (tmp_path / "p.txt").write_text(PALETTE)
    palette = Palette.read(tmp_path / "p.txt", ("road", "traffic light", "sky"))
    colours = np.array([[[128, 64, 128], [250, 170, 30], [0, 0, 0], [1, 2, 3], [9, 9, 9]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert palette.label(tmp_path / "a.png").tolist() == [[0, 1, 255, 2, 255]]
    clear = np.dstack([colours, np.array([[[255], [0], [255], [255], [7]]], np.uint8)])
    Image.fromarray(clear).save(tmp_path / "a.png")
    assert palette.label(tmp_path / "a.png").tolist() == [[0, 255, 255, 2, 255]]
    Image.fromarray(colours).quantize(8).save(tmp_path / "p.png")  # a palette PNG in an order of its own
    assert palette.label(tmp_path / "p.png").tolist() == [[0, 1, 255, 2, 255]]
    colours[0, 4] = 200, 1, 1
    Image.fromarray(colours).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"colour \(200, 1, 1\) \(row 0, column 4\), which palette .* lacks"):
        palette.label(tmp_path / "a.png")


def test_the_colours_of_a_label_space_are_a_palette(tmp_path):
    colours = np.array([[[128, 64, 128], [0, 0, 0], [0, 0, 142]]], np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert Palette.named("cityscapes19").label(tmp_path / "a.png").tolist() == [[0, 255, 13]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no colour"),
        ("1 2 3 lawn\n", "class 'lawn' is unknown"),
        ("1 2 300 road\n", "0 to 255"),
        ("1 2 road\n", "line 1"),
        ("1 2 3 road\n1 2 3 sky\n", "two classes"),
        ("1 2 3 254\n", "unknown"),
        ("1 2 3 road\nheader after all\n", "line 2"),
    ],
)
def test_what_is_no_palette_is_refused_with_its_line(tmp_path, text, words):
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(DataError, match=words) as error:
        Palette.named(str(tmp_path / "p.txt"), ("road", "sky"))
    assert "\n" not in str(error.value)


def test_palettes_that_are_no_text_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with (tmp_path / "big").open("wb") as file:
        file.truncate(1 << 31)
    for name, words in (("pipe", "no plain file"), ("bytes", "UTF-8"), ("big", "bytes"), ("no", "no plain")):
        with pytest.raises(DataError, match=words):
            Palette.named(str(tmp_path / name))


def a_folder(root, names=("a.png",), labels=("a.png",)):
    for part in ("frames", "labels"):
        (root / part).mkdir(parents=True)
    for name in names:
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(root / "frames" / name, format="PNG")
    for name in labels:
        Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "labels" / name, format="PNG")
    return root


def test_no_label_is_lost_by_the_case_of_its_suffix(tmp_path):
    data = Folder(a_folder(tmp_path / "s", ("a.PNG", "b.Jpg", ".c.png"), ("a.png", "b.PNG", "._c.png")))
    assert [data.name(i) for i in range(len(data))] == ["a", "b"]
    assert all(data[i][1] is not None for i in range(2))
    with pytest.raises(DataError, match="two labels called a"):
        Folder(a_folder(tmp_path / "t", ("a.png",), ("a.png", "a.PNG")))


def test_labels_that_are_no_png_are_not_passed_over(tmp_path):
    root = a_folder(tmp_path / "s", ("a.png", "b.png"), ("a.png",))
    Image.fromarray(np.ones((4, 6), np.uint8)).save(root / "labels" / "b.jpg")
    with pytest.raises(DataError, match=r"b\.jpg is no PNG"):
        Folder(root)
    assert Folder(root, reading=Reading(collect=True)).problems == [("b", "label b.jpg is no PNG")]
    assert Folder(root, labels=False).problems == []


@pytest.mark.parametrize("kind", ["street:day:1", "gta5:x", "cityscapes:x:val"])
def test_sets_with_label_values_of_their_own_take_no_others(kind):
    with pytest.raises(DataError, match="label values of its own"):
        open_dataset(kind, reading=Reading(void=(3,)))
