"""seg2edge against its definition; the codec bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from adapt.labels import edge_codec as codec
from adapt.labels.edges import (
    category_edges,
    cityscapes_edges,
    instance_edges,
    seg2edge,
    seg2edge_torch,
)
from adapt.labels.errors import EdgeError

label_maps = st.tuples(st.integers(1, 8), st.integers(1, 8)).flatmap(
    lambda s: arrays(np.uint8, s, elements=st.sampled_from([0, 1, 2, 255]))
)


def defined(labels, radius=2, ignore=()):
    """The definition, pixel by pixel."""
    height, width = labels.shape
    edge = np.zeros(labels.shape, bool)
    for y in range(height):
        for x in range(width):
            for j in range(height):
                for i in range(width):
                    near = (y - j) ** 2 + (x - i) ** 2 <= radius**2
                    pair = {int(labels[y, x]), int(labels[j, i])}
                    if near and len(pair) == 2 and not pair & set(ignore):
                        edge[y, x] = True
    return edge


@given(label_maps, st.sampled_from([1, 1.5, 2, 3]), st.sampled_from([(), (255,), (0, 2)]))
@settings(max_examples=80, deadline=None)
def test_seg2edge_is_its_definition_on_the_cpu_and_as_a_tensor(labels, radius, ignore):
    expected = defined(labels, radius, ignore)
    assert (seg2edge(labels, radius, ignore) == expected).all()
    assert (seg2edge_torch(torch.from_numpy(labels), radius, ignore).numpy() == expected).all()


@given(label_maps)
@settings(max_examples=40, deadline=None)
def test_category_edges_are_seg2edge_of_each_category(labels):
    free, kept = category_edges(labels, 3, ignore=()), category_edges(labels, 3)
    for c in range(3):
        assert (free[c] == defined(labels == c)).all()
        masked = np.where(labels == 255, 255, labels == c)
        assert (kept[c] == defined(masked, ignore=(255,))).all()


def test_instances_of_one_category_are_kept_apart():
    categories = np.zeros((12, 12), np.uint8)
    instances = np.zeros((12, 12), np.uint8)
    categories[3:9, 2:10] = 2
    instances[3:9, 2:6], instances[3:9, 6:10] = 1, 2
    edges = instance_edges(categories, instances, 3)
    assert not edges[0].any()
    assert not edges[2].any()
    assert edges[1, 5, 5]
    assert edges[1, 5, 6]  # between the two
    assert (edges[1] == defined(instances)).all()
    assert not category_edges(categories, 3)[2, 6, 5]  # the category alone knows no border there
    with pytest.raises(EdgeError, match="number instances from 1"):
        instance_edges(categories, np.zeros_like(instances), 3)
    with pytest.raises(EdgeError, match="two maps of one image"):
        instance_edges(categories, instances[:5], 3)


def test_cityscapes_edges_leave_the_borders_of_ignored_ids_out():
    instances = np.full((14, 14), 7, np.int32)  # road
    instances[:, 8:] = 26001  # a car beside it
    instances[0:3] = 3  # out of region of interest
    train = np.where(instances == 7, 0, np.where(instances == 26001, 13, 255))
    edges = cityscapes_edges(train, instances)
    assert edges[0, 8, 7]
    assert edges[13, 8, 8]
    assert not edges[0, 3, :5].any()  # road meets the ignored border
    everywhere = defined(instances, ignore=(2, 3))
    for c, ids in ((0, 7), (13, 26001)):
        assert (edges[c] == (defined(np.where(instances == ids, ids, 0)) & everywhere)).all()
    assert edges.sum() == edges[[0, 13]].sum()


@pytest.mark.parametrize(
    ("labels", "radius", "word"),
    [
        (np.zeros((3, 3)), 2, "whole numbers"),
        (np.zeros((3, 3, 3), int), 2, r"\[H,W\]"),
        (np.zeros((0, 3), int), 2, "pixel"),
        (np.zeros((3, 3), int), 0, "radius"),
        (np.zeros((3, 3), int), float("nan"), "radius"),
    ],
)
def test_seg2edge_names_what_it_cannot_use(labels, radius, word):
    with pytest.raises(EdgeError, match=word):
        seg2edge(labels, radius)


def test_a_one_pixel_image_and_a_uniform_one_have_no_edges():
    assert not seg2edge(np.ones((1, 1), int)).any()
    assert not seg2edge(np.ones((9, 9), int)).any()
    assert not seg2edge_torch(torch.ones((1, 1), dtype=torch.int64)).any()


# ------------------------------------------------------------------------------------------------- codec
fields = st.tuples(
    st.sampled_from([1, 3, 19, 20, 24, 31, 32, 40, 63, 64]), st.integers(1, 5), st.integers(1, 6)
)


@given(fields, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_packing_is_the_documented_bit_and_comes_back(shape, random):
    rng = np.random.default_rng(random.randrange(1 << 30))
    edges, ignore = rng.random(shape) < 0.4, rng.random(shape[1:]) < 0.3
    bits = codec.pack(edges, ignore)
    assert bits.shape[0] == -(-(shape[0] + 1) // 32)
    for k in range(shape[0]):
        assert ((bits[k // 32].astype(np.int64) // 2 ** (k % 32) % 2 == 1) == edges[k]).all()
    assert ((bits[-1].astype(np.int64) >= 2**31) == ignore).all()
    back, back_ignore = codec.unpack(bits, shape[0])
    assert (back == edges).all()
    assert (back_ignore == ignore).all()


@pytest.mark.parametrize("classes", [1, 19, 20, 24, 31, 32, 70])
@pytest.mark.parametrize("suffix", [".npz", ".bin", ".mat", ".png"])
def test_files_come_back_bit_for_bit_or_are_refused(tmp_path, classes, suffix):
    rng = np.random.default_rng(classes)
    edges = rng.random((classes, 7, 9)) < 0.3
    path = tmp_path / f"label{suffix}"
    bits = codec.pack(edges)
    if suffix == ".png" and classes > 24:
        with pytest.raises(EdgeError, match="24 classes"):
            codec.write(path, bits, classes)
        with pytest.raises(EdgeError, match="24 classes"):
            codec.read(path, classes)
        return
    codec.write(path, bits, classes)
    assert (codec.read(path, classes, (7, 9)) == bits).all()
    with_ignore = codec.pack(edges, rng.random((7, 9)) < 0.5)
    if suffix in (".npz", ".bin"):
        codec.write(path, with_ignore, classes)
        assert (codec.read(path, classes, (7, 9)) == with_ignore).all()
    else:
        with pytest.raises(EdgeError, match="ignored"):
            codec.write(path, with_ignore, classes)


def test_the_bytes_are_seals_and_dffs(tmp_path):
    from PIL import Image

    edges = np.zeros((19, 2, 3), bool)
    edges[0, 0, 1] = edges[18, 0, 1] = edges[9, 1, 2] = True
    ignore = np.zeros((2, 3), bool)
    ignore[1, 0] = True
    codec.write(tmp_path / "a.bin", codec.pack(edges, ignore), 19)
    words = np.frombuffer((tmp_path / "a.bin").read_bytes(), "<u4")
    assert words.tolist() == [0, 1 + 2**18, 0, 2**31, 0, 2**9]
    codec.write(tmp_path / "a.png", codec.pack(edges), 19)
    rgb = np.asarray(Image.open(tmp_path / "a.png"))
    assert rgb[0, 1].tolist() == [4, 0, 1]  # class 18 is bit 2 of red, class 0 bit 0 of blue
    assert rgb[1, 2].tolist() == [0, 2, 0]  # class 9 is bit 1 of green


def test_damaged_and_foreign_files_are_named(tmp_path):
    from scipy.io import savemat

    bits = codec.pack(np.ones((3, 4, 5), bool))
    path = tmp_path / "x.bin"
    codec.write(path, bits, 3)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(EdgeError, match="76 bytes, 3 classes at 4x5 take 80"):
        codec.read(path, 3, (4, 5))
    with pytest.raises(EdgeError, match="size="):
        codec.read(path, 3)
    for suffix, word in ((".npz", "no edge label"), (".mat", "MATLAB"), (".png", "PNG")):
        foreign = tmp_path / f"f{suffix}"
        foreign.write_bytes(b"nothing of the kind")
        with pytest.raises(EdgeError, match=word) as caught:
            codec.read(foreign, 3, (4, 5))
        assert "\n" not in str(caught.value)
        with pytest.raises(EdgeError):
            codec.read(tmp_path / f"missing{suffix}", 3, (4, 5))
    savemat(str(tmp_path / "other.mat"), {"seg": np.ones((2, 2))})
    with pytest.raises(EdgeError, match="holds seg"):
        codec.read(tmp_path / "other.mat", 3)
    codec.write(tmp_path / "n.npz", bits, 3)
    with pytest.raises(EdgeError, match="3 classes, 4 were asked for"):
        codec.read(tmp_path / "n.npz", 4)
    with pytest.raises(EdgeError, match="another image"):
        codec.read(tmp_path / "n.npz", 3, (4, 6))
    with pytest.raises(EdgeError, match="beyond class 1"):
        codec.unpack(bits, 2)
    with pytest.raises(EdgeError, match="format"):
        codec.write(tmp_path / "n.tif", bits, 3)
    with pytest.raises(EdgeError, match=r"31 classes take uint32 \[1,H,W\]"):
        codec.unpack(np.zeros((2, 3, 3), np.uint32), 31)
