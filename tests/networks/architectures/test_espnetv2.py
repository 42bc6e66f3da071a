"""ESPNetv2 against torch's own adaptive pooling and against the published facts about its files."""

from __future__ import annotations

import pytest
import torch

import networks
from networks.architectures import espnetv2

torch.set_num_threads(1)


# Parameters counted in the released Cityscapes files themselves (their head has 20 outputs).
@pytest.mark.parametrize(
    ("scale", "parameters"), [(0.5, 80_342), (1.0, 234_010), (1.5, 468_362), (2.0, 789_242)]
)
def test_widths_have_the_parameters_of_the_released_files(scale, parameters):
    network = networks.create("espnetv2", classes=20, scale=scale)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_an_unknown_width_is_refused():
    with pytest.raises(ValueError, match=r"scale 3\.0 is unknown"):
        networks.create("espnetv2", classes=19, scale=3.0)


def test_the_background_row_of_a_released_file_is_dropped():
    released = networks.create("espnetv2", classes=20, scale=0.5).state_dict()
    state, arguments = espnetv2.read_checkpoint(released, 19)
    assert arguments == {"scale": 0.5, "projection": 10}
    networks.create("espnetv2", classes=19, **arguments).load_state_dict(state, strict=True)
    head = "bu_dec_l4.merge_layer.3.weight"
    assert torch.equal(state[head], released[head][:19])


def test_a_file_of_another_class_count_is_refused():
    released = networks.create("espnetv2", classes=20, scale=0.5).state_dict()
    with pytest.raises(ValueError, match="head has 20 outputs, the label space 11 classes"):
        espnetv2.read_checkpoint(released, 11)
