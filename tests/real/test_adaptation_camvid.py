"""CamVid as it lies beside the project: lists, labels, and the one lesson that must not be unlearnt."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from adapt.data.base import refuse_overlap
from adapt.data.camvid import CamVid

ROOT = Path(__file__).resolve().parents[2]
PLACES = [os.environ.get("ROADWORTHY_DATA"), str(ROOT / ".." / "shared" / "data")]
DATA = next((Path(p) / "camvid" for p in PLACES if p and (Path(p) / "camvid").is_dir()), None)
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(DATA is None, reason="no camvid/ in ROADWORTHY_DATA or ../shared/data"),
]


def test_the_lists_are_disjoint_and_labelled_as_told():
    assert DATA is not None
    adapt, evaluation = CamVid(DATA, "dusk_adapt"), CamVid(DATA, "dusk_eval")
    assert (len(adapt), len(evaluation)) == (62, 31)
    assert all(adapt[i][1] is None for i in (0, 30, 61))
    refuse_overlap(adapt, evaluation)
    day = CamVid(DATA, "day_train")
    assert not set(day.names) & set(evaluation.names)
    for i in range(0, len(evaluation), 6):
        frame, label = evaluation[i]
        assert frame.shape == (360, 480, 3)
        assert label is not None
        assert set(np.unique(label)) <= {*range(11), 255}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mirrored_agreement_picks_batch_statistics_that_do_not_hurt():
    """The Cityscapes network on CamVid: AdaBN alone hurts; what a round would choose does not."""
    torch = pytest.importorskip("torch")
    import networks
    from adapt import batchnorm, inference
    from adapt.data.base import resize_frame, resize_label
    from adapt.evaluate.segmentation import Confusion
    from adapt.gate.limits import Limits
    from adapt.gate.measures import measure
    from adapt.gate.preference import prefer_by_flip_consistency
    from networks.labels import CITYSCAPES19, mapping
    from networks.pack import PackSpec, normalise

    assert DATA is not None
    torch.set_num_threads(1)
    weights = DATA.parent / "weights" / "espnetv2_s_1.0_city_1024x512.pth"
    if not weights.is_file():
        pytest.skip(f"no {weights.name}")
    spec = PackSpec(
        name="espnetv2",
        version="1.0.0",
        network="espnetv2",
        arguments={"scale": 1.0, "projection": 10},
        classes=CITYSCAPES19.classes,
        colours=CITYSCAPES19.colours,
        size=(352, 480),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    network = networks.create("espnetv2", classes=19, **spec.arguments)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.eval()
    table = mapping("cityscapes19", "camvid11")
    drive = CamVid(DATA, "dusk_adapt", labels=False)
    frames = [resize_frame(drive[i][0], spec.size) for i in range(0, 62, 2)]
    holdout, rest = frames[::6], [f for i, f in enumerate(frames) if i % 6]
    evaluation = CamVid(DATA, "dusk_eval")

    def score() -> float:
        confusion = Confusion(11)
        for i in range(0, 31, 2):
            frame, truth = evaluation[i]
            tensor = inference.as_tensor([resize_frame(frame, spec.size)])
            labels, _ = inference.labels_and_confidence(network, spec, tensor)
            confusion.add(truth, table[resize_label(labels[0], truth.shape)])
        return confusion.miou()

    present = batchnorm.statistics(network)
    before = score()
    best, chosen = measure(network, spec, holdout), present
    batches = [normalise(inference.as_tensor(rest[i : i + 5]), spec) for i in range(0, 25, 5)]
    batchnorm.reestimate(network, batches)
    target = batchnorm.statistics(network)
    for keep in (0.0, 0.5):
        mixed = batchnorm.mix(target, present, keep)
        batchnorm.load(network, mixed)
        found = measure(network, spec, holdout)
        if prefer_by_flip_consistency(found, best, Limits()):
            best, chosen = found, mixed
    batchnorm.load(network, chosen)
    assert before > 0.35
    assert score() >= before - 0.005
