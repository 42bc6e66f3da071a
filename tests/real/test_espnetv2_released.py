"""The released ESPNetv2 files on the Cityscapes samples: they load strictly by name and see the street.

Published mIoU on the validation set at 1024x512: 53.9, 60.1, 63.8, 66.4.  Ten frames are no validation
set, so the bounds are loose; a wrong channel order or normalisation falls far below all of them
(measured for s=1.0: BGR 49.6, no normalisation 15.4, RGB with ImageNet's statistics 57.9).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import networks
from networks.import_checkpoint import import_checkpoint, read_state
from networks.pack import normalise

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def samples(real_data):
    labels = sorted((real_data / "cityscapes_samples" / "labels_trainid").glob("*.png"))
    if not labels:
        pytest.skip("no labelled Cityscapes samples in the data folder")
    pairs = []
    for label in labels:
        frame = Image.open(real_data / "cityscapes_samples" / "images" / f"{label.stem}.jpg").convert("RGB")
        truth = Image.open(label).resize((1024, 512), Image.Resampling.NEAREST)
        pairs.append((np.asarray(frame.resize((1024, 512), Image.Resampling.BILINEAR)), np.asarray(truth)))
    return pairs


def weights(real_data, scale):
    file = real_data / "weights" / f"espnetv2_s_{scale}_city_1024x512.pth"
    if not file.is_file():
        pytest.skip(f"{file.name} is not in the data folder")
    return file


@pytest.mark.parametrize("scale", ["0.5", "1.0", "1.5", "2.0"])
def test_every_released_file_loads_strictly_by_name(real_data, scale):
    state = read_state(weights(real_data, scale))
    networks.create("espnetv2", classes=20, scale=float(scale)).load_state_dict(state, strict=True)


@pytest.mark.parametrize(("scale", "least"), [("0.5", 48.0), ("1.0", 55.0), ("2.0", 60.0)])
def test_it_segments_the_samples_about_as_well_as_published(real_data, samples, tmp_path, scale, least):
    pack = import_checkpoint(
        "espnetv2", weights(real_data, scale), classes="cityscapes19", out=tmp_path / "pack", size=(512, 1024)
    )
    network = pack.network()
    counts = np.zeros((19, 19), np.int64)
    for frame, truth in samples:
        with torch.inference_mode():
            logits = network(normalise(torch.from_numpy(frame.copy())[None], pack.spec))
            logits = F.interpolate(logits, truth.shape, mode="bilinear", align_corners=False)
        guess = logits.argmax(1)[0].numpy()
        seen = truth < 19
        counts += np.bincount(truth[seen].astype(int) * 19 + guess[seen], minlength=361).reshape(19, 19)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    present = counts.sum(1) > 0
    miou = 100 * (counts.diagonal()[present] / union[present]).mean()
    assert miou > least
