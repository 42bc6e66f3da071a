"""ESPNetv2 against torch's own adaptive pooling and against the published facts about its files."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import networks
from networks import espnetv2

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("inside", "outside"),
    [
        ((12, 18), (8, 12)),  # 3 to 2: every pyramid level at 1.5
        ((16, 32), (8, 16)),  # whole windows
        ((32, 64), (5, 7)),  # the coarsest level of a 512x1024 frame
        ((256, 512), (26, 52)),
        ((8, 16), (5, 8)),  # below the smallest map
        ((22, 30), (11, 15)),
        ((5, 5), (4, 4)),  # a stretched map that had hit the smallest size
        ((12, 16), (8, 5)),  # one side 3 to 2, the other not
    ],
)
def test_adaptive_mean_is_torchs_adaptive_average_pooling(inside, outside):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *inside, dtype=torch.float64)
    ours = espnetv2.adaptive_mean(x, *outside)
    assert ours.shape == (2, 3, *outside)
    assert torch.allclose(ours, F.adaptive_avg_pool2d(x, outside), atol=1e-7)


def test_pooling_matrix_rows_are_means():
    assert torch.allclose(espnetv2.pooling_matrix(37, 5).sum(1), torch.ones(5))


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
