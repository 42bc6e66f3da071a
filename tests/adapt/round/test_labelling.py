"""Who labels the frames of a round, and the folder that stores the labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adapt.data.base import DataError
from adapt.labels.cbst import ClassHistograms, pseudo_labels
from adapt.round import RoundConfig, SegmentationRound
from adapt.round.labelling import (
    ClassBalancedLabels,
    CorruptedLabels,
    GivenLabels,
    LabelFolder,
    Labels,
    LabelTask,
)
from tests.adapt.conftest import toy_scene

CONFIG = RoundConfig(portions=(0.4,), steps=2, source=2, target=2)


@pytest.fixture
def task(toy_pack, dark_frames):
    return LabelTask(toy_pack.network(), toy_pack.spec, dark_frames[:5], 0.4)


def test_class_balanced_labels_are_the_two_passes_by_hand(toy_pack, task):
    from adapt import inference

    found = ClassBalancedLabels(batch=2).label(task)
    maps = [
        inference.probabilities(task.network, task.spec, inference.as_tensor([x]))[0].numpy()
        for x in task.frames
    ]
    histograms = ClassHistograms(4)
    for p in maps:
        histograms.add(p)
    thresholds = histograms.thresholds(0.4)
    for y, p in zip(found.maps, maps, strict=True):
        assert (y != pseudo_labels(p, thresholds)).mean() < 0.01  # a batch of two rounds otherwise than one
    assert found.record["lambda"] == pytest.approx(thresholds.tolist(), abs=1e-3)
    assert found.record["labelled"] == pytest.approx(
        np.mean([(y != 255).mean() for y in found.maps]), abs=1e-5
    )
    assert sum(found.record["share"]) == pytest.approx(1.0, abs=1e-4)


def test_every_frame_is_reported_twice(task):
    seen = []
    ClassBalancedLabels(batch=2).label(
        replace(task, suffix=" p=0.4", progress=lambda stage, done, total, **_: seen.append((stage, done)))
    )
    assert seen == [(f"{stage} p=0.4", i + 1) for stage in ("thresholds", "labels") for i in range(5)]


def test_given_labels_are_those_of_the_table(task):
    truth = {x.tobytes(): np.full(x.shape[:2], i, np.uint8) for i, x in enumerate(task.frames)}
    found = GivenLabels(truth).label(task)
    assert [int(y[0, 0]) for y in found.maps] == [0, 1, 2, 3, 4]
    assert found.record == {"portion": 0.4, "labelled": 1.0}
    with pytest.raises(KeyError):
        GivenLabels({}).label(task)


def test_corrupted_labels_are_changed_and_leave_the_soft_ones_out(task):
    inner = ClassBalancedLabels(soft_weight=0.25, batch=2)
    clean, found = inner.label(task), CorruptedLabels(inner, lambda y: 3 - y).label(task)
    assert clean.soft is not None
    assert found.soft is None
    for y, wrong in zip(clean.maps, found.maps, strict=True):
        assert (wrong == np.uint8(3) - y).all()


@pytest.mark.parametrize("soft", [False, True])
def test_the_folder_gives_back_what_was_stored_and_names_damage(tmp_path, soft):
    rng = np.random.default_rng(0)
    maps = [rng.integers(0, 4, (8, 9)).astype(np.uint8) for _ in range(3)]
    planes = [rng.integers(0, 255, (8, 9, 4)).astype(np.uint8) for _ in range(3)] if soft else None
    folder = LabelFolder(tmp_path / "labels-1")
    folder.write(Labels(maps, planes))
    found = folder.read(3, {"portion": 1})
    assert all((a == b).all() for a, b in zip(found.maps, maps, strict=True))
    assert found.record == {"portion": 1}
    if soft:
        assert all((a == b).all() for a, b in zip(found.soft, planes, strict=True))
    damaged = tmp_path / "labels-1" / ("00001.npz" if soft else "00001.png")
    damaged.write_bytes(b"half")
    with pytest.raises(DataError):
        folder.read(3, {})


def test_a_round_has_another_identity_with_another_labeller(toy_pack, dark_frames, tmp_path):
    plain, given = (
        SegmentationRound(toy_pack, dark_frames, CONFIG, tmp_path, labeller=labeller)
        for labeller in (None, GivenLabels({}))
    )
    assert plain.identity != given.identity


def test_a_round_learns_the_labels_it_is_given_and_makes_damaged_ones_again(toy_pack, dark_frames, tmp_path):
    truth = {x.tobytes(): toy_scene(200 + i, dark=True)[1] for i, x in enumerate(dark_frames)}
    config = replace(CONFIG, force=True)

    def run(out):
        return SegmentationRound(toy_pack, dark_frames, config, out, labeller=GivenLabels(truth)).run()

    first = run(tmp_path / "a")
    assert first.report["stages"]["label-1"]["labelled"] == 1.0

    class Stop(Exception):
        pass

    def stop(stage, done, total, **_):
        if stage.startswith("train"):
            raise Stop

    work = SegmentationRound(toy_pack, dark_frames, config, tmp_path / "b", stop, labeller=GivenLabels(truth))
    with pytest.raises(Stop):
        work.run()
    (tmp_path / "b" / "labels-1" / "00002.png").write_bytes(b"half")
    assert run(tmp_path / "b").pack.sha256 == first.pack.sha256
