"""On a CUDA device: labels bit for bit the CPU's, training steps with every option, the predicted memory.
Executed by nobody yet.

    python -m pytest tests/gpu -m gpu
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapt.labels.cbst import ClassHistograms, pseudo_labels
from adapt.round import RoundConfig, adapt
from adapt.round.presets import PRESETS
from bench.training import Bench
from tests.adapt.conftest import dark_frames, toy_pack  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800, method="thread")]


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")


@pytest.mark.parametrize("with_prior", [False, True])
def test_labels_are_the_cpus_bit_for_bit(with_prior: bool) -> None:
    logits = torch.randn(19, 128, 256, generator=torch.Generator().manual_seed(0)) * 3
    p = logits.softmax(0).numpy()
    q = np.random.default_rng(0).uniform(0, 1, p.shape).astype(np.float32) if with_prior else None
    there = torch.from_numpy(p).cuda()
    ours = ClassHistograms(19).add(p, prior=q)
    assert ClassHistograms(19).add(there, prior=q) == ours
    lam = ours.thresholds(0.3)
    np.testing.assert_array_equal(pseudo_labels(there, lam, prior=q), pseudo_labels(p, lam, prior=q))


@pytest.mark.parametrize("told", [*PRESETS.values(), {"ema": 0.9, "mic": 1.0, "lrent": 0.25, "amp": "bf16"}])
def test_a_step_of_every_preset(told: dict[str, object]) -> None:
    step = Bench("roadnet", (64, 128), 2, 2, "cuda").row(dict(told))
    assert step() > 0


def test_the_label_step_is_bound_by_the_forward_pass() -> None:
    assert Bench("ddrnet", (512, 1024), 2, 2, "cuda").label_step(10)["ratio"] > 0


def test_the_predicted_peak_is_the_measured_one() -> None:
    for row in Bench("pidnet", (128, 256), 2, 2, "cuda").cuts(4, True)[:-1]:
        assert row["saved_measured"] == pytest.approx(row["saved"], rel=0.1)


def test_a_round_on_the_device(toy_pack, dark_frames, tmp_path) -> None:  # noqa: F811
    config = RoundConfig(portions=(0.4,), steps=4, source=2, target=2, device="cuda")
    assert adapt(toy_pack, dark_frames, config=config, out=tmp_path).report["stages"]["train-1"]
