"""The table's command on real Cityscapes frames and rendered ones, laid out as the sets are published."""

from __future__ import annotations

import json

import numpy as np
import pytest

from adapt.data.base import refuse_overlap
from adapt.data.open import open_dataset
from bench import reproduce_samples
from bench.real import RealError, data_folder

try:
    DATA = data_folder()
except RealError:
    DATA = None
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(DATA is None, reason="no samples in ROADWORTHY_DATA or ../shared/data"),
]


def test_the_samples_become_published_layouts(tmp_path):
    reproduce_samples.lay_out(DATA, tmp_path)
    rendered = open_dataset(f"gta5:{tmp_path / 'gta5'}")
    train = open_dataset(f"cityscapes:{tmp_path / 'cityscapes'}:train", labels=False)
    val = open_dataset(f"cityscapes:{tmp_path / 'cityscapes'}:val")
    assert (len(rendered), len(train), len(val)) == (14, 7, 6)
    refuse_overlap(train, val)
    frame, label = val[0]
    assert frame.shape == (1024, 2048, 3)
    assert set(np.unique(label)) <= {*range(19), 255}
    assert (label == 0).mean() > 0.1  # road lies where a road is: in the lower half
    assert (label[512:] == 0).sum() > 9 * (label[:512] == 0).sum()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_rows_are_filled_from_real_frames(tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--size", "64x128", "--epochs", "2", "--steps", "2"]
    assert reproduce_samples.main([*arguments, "--row", "source", "--row", "cbst-sp"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(found["miou"]) == {"source", "cbst-sp"}
    kept = json.loads((tmp_path / "cbst-sp" / "row.json").read_text())
    assert kept["miou"] == found["miou"]["cbst-sp"]
    assert kept["frames"] == 6
