"""Label spaces and the table between Cityscapes and CamVid."""

from __future__ import annotations

import numpy as np
import pytest

from networks.labels import CAMVID11, CITYSCAPES19, SPACES, STREET, LabelSpace, mapping

# Written out by hand from the description of the data sets, not taken from the code.
CITYSCAPES_TO_CAMVID = [3, 4, 1, 1, 7, 2, 6, 6, 5, 5, 0, 9, 10, 8, 8, 8, 8, 10, 10]


def test_sizes():
    assert (len(CITYSCAPES19), len(CAMVID11), len(STREET)) == (19, 11, 12)
    assert set(SPACES) == {"cityscapes19", "camvid11", "street"}


def test_cityscapes_to_camvid():
    table = mapping("cityscapes19", "camvid11")
    assert table.dtype == np.uint8
    assert table[:19].tolist() == CITYSCAPES_TO_CAMVID
    assert (table[19:] == 255).all()


@pytest.mark.parametrize("name", sorted(SPACES))
def test_a_space_maps_to_itself_by_identity(name):
    n = len(SPACES[name])
    table = mapping(name, name)
    assert table[:n].tolist() == list(range(n))
    assert (table[n:] == 255).all()


def test_an_undefined_mapping_is_refused_by_name():
    with pytest.raises(ValueError, match="no mapping from 'street' to 'camvid11'"):
        mapping("street", "camvid11")
    with pytest.raises(ValueError, match="label space 'nope' is unknown"):
        mapping("nope", "camvid11")


def test_palette_holds_the_colours_and_black():
    palette = CAMVID11.palette()
    assert palette.shape == (256, 3)
    assert palette[9].tolist() == [64, 64, 0]
    assert palette[255].tolist() == [0, 0, 0]


def test_a_space_with_a_colour_too_few_is_refused():
    with pytest.raises(ValueError, match="2 classes, 1 colours"):
        LabelSpace("x", ("a", "b"), ((0, 0, 0),))
