"""Edge training on crops of a few pixels: it learns, SEAL corrects shifted labels, presets are the published
ones.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import networks
from adapt.evaluate.edges import EdgeCounts
from adapt.labels.edge_codec import pack, unpack
from adapt.labels.edge_probability import edge_probability
from adapt.labels.edges import category_edges
from adapt.labels.seal import Gate
from adapt.train.aligning import Aligners, align_bits
from adapt.train.augment import Augmentation
from adapt.train.edge_recipes import PRESETS, SCALES, EdgeRecipe
from adapt.train.edges import EdgeTrainer, crops_of_edges, crops_of_segmentation, train
from networks.pack import PackSpec

COLOURS = np.array([[40, 60, 200], [200, 80, 40], [60, 190, 70]], np.uint8)


def spec(network, arguments, classes=3, size=(48, 64)):
    return PackSpec(
        name="edges",
        version="1.0.0",
        network=network,
        arguments=arguments,
        classes=tuple(f"c{k}" for k in range(classes)),
        colours=((0, 0, 0),) * classes,
        size=size,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        training="test",
        licence="Apache-2.0",
    )


def scene(seed, size=(48, 64)):
    rng = np.random.default_rng(seed)
    label = np.digitize(gaussian_filter(rng.normal(size=size), 7), [-0.02, 0.02]).astype(np.uint8)
    noise = rng.integers(-12, 13, (*size, 3))
    return np.clip(COLOURS[label].astype(int) + noise, 0, 255).astype(np.uint8), label


def score(network, description, pairs):
    table = EdgeCounts(0.03, thin=True, classes=3)
    for frame, label in pairs:
        table.add_classes(edge_probability(network, description, frame), category_edges(label, 3))
    return table.ods()


@pytest.fixture
def pairs():
    return [scene(i) for i in range(4)]


@pytest.mark.parametrize(
    ("name", "arguments", "rate"),
    [("casenet", {"depth": 14, "width": 8}, 3e-3), ("casenet_light", {"scale": 0.5}, 3e-3)],
)
def test_a_small_network_learns_edges_from_class_maps(pairs, name, arguments, rate):
    torch.manual_seed(0)
    network, description = networks.create(name, classes=3, **arguments), spec(name, arguments)
    recipe = EdgeRecipe(40, batch=2, round=20, rate=rate, frozen_bn=False, reweighted=True)
    draw = crops_of_segmentation(pairs, 3, Augmentation((48, 64), scale=(1.0, 1.0)))
    losses = train(network, description, draw, recipe, seed=1)
    assert len(losses) == 40
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])
    assert score(network, description, pairs) > 0.45


def test_a_run_is_repeatable(pairs):
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        network = networks.create("casenet", classes=3, depth=14, width=8)
        draw = crops_of_segmentation(pairs, 3, Augmentation((32, 32)))
        description = spec("casenet", {"depth": 14, "width": 8})
        recipe = EdgeRecipe(5, batch=2, round=4, aligned=True, gate=None)
        runs.append((train(network, description, draw, recipe, seed=3), network.state_dict()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1].values(), runs[1][1].values(), strict=True))


class Killed(BaseException):
    pass


SEAL = EdgeRecipe(7, batch=2, round=6, aligned=True, gate=None)  # rounds of 3 + 3 + 1 steps


def resumable(pairs, folder, progress=None):
    """(losses, weights) of a training that may be stopped by what ``progress`` raises."""
    torch.manual_seed(0)
    network = networks.create("casenet", classes=3, depth=14, width=8)
    draw = crops_of_segmentation(pairs, 3, Augmentation((32, 32)))
    trainer = EdgeTrainer(
        network,
        spec("casenet", {"depth": 14, "width": 8}),
        draw,
        SEAL,
        seed=3,
        checkpoint=folder / "checkpoint.pt",
        every=2,
        identity="one",
    )
    return trainer.run(progress or (lambda *_, **__: None)), network.state_dict()


def equal(one, other):
    return one[0] == other[0] and all(torch.equal(v, other[1][k]) for k, v in one[1].items())


def test_killed_anywhere_and_started_again_it_ends_with_the_same_weights(pairs, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "pieces").mkdir()
    told: list[str] = []
    whole = resumable(pairs, tmp_path / "whole", lambda stage, *_, **__: told.append(stage))
    assert told == 3 * ["train"] + 6 * ["align"] + 3 * ["train"] + 2 * ["align"] + ["train"]
    assert not (tmp_path / "whole" / "checkpoint.pt.labels").exists()
    kills = iter([2, 5, 3, 1, 6, 3])  # after so many pieces each: in training, in alignment, at their ends
    stages = []

    def progress(stage, done, total, **numbers):
        nonlocal left
        stages.append(stage)
        left -= 1
        if not left:
            raise Killed

    result = None
    while result is None:
        left = next(kills, 0)
        with contextlib.suppress(Killed):
            result = resumable(pairs, tmp_path / "pieces", progress)
    assert equal(whole, result)
    assert stages.count("align") == 8, "no crop was aligned twice"
    assert stages.count("train") > 7, "steps after the last checkpoint are made again"


def test_a_checkpoint_that_cannot_be_gone_on_with_costs_time_and_nothing_else(pairs, tmp_path):
    def stopped_in_the_second_round(folder):
        folder.mkdir()

        def stop(stage, done, total, **numbers):
            if stage == "train" and done == 4:
                raise Killed

        with pytest.raises(Killed):
            resumable(pairs, folder, stop)

    stopped_in_the_second_round(tmp_path / "a")
    labels = sorted((tmp_path / "a" / "checkpoint.pt.labels").iterdir())
    assert len(labels) == 6
    whole = resumable(pairs, tmp_path / "a")
    stopped_in_the_second_round(tmp_path / "b")
    (tmp_path / "b" / "checkpoint.pt.labels" / labels[2].name).write_bytes(b"half")
    told = []
    assert equal(whole, resumable(pairs, tmp_path / "b", lambda stage, *_, **__: told.append(stage)))
    assert told.count("train") == 7, "the weights the round's labels were aligned with are gone: from nothing"
    stopped_in_the_second_round(tmp_path / "c")
    (tmp_path / "c" / "checkpoint.pt").write_bytes(b"half")
    assert equal(whole, resumable(pairs, tmp_path / "c"))


def test_seals_first_round_is_unaligned_and_later_ones_follow_the_network(pairs, monkeypatch):
    from adapt.train import aligning

    seen = []
    original = aligning.align_bits
    monkeypatch.setattr(aligning, "align_bits", lambda *a: seen.append(1) or original(*a))
    network = networks.create("casenet", classes=3, depth=14, width=8)
    draw = crops_of_segmentation(pairs, 3, Augmentation((16, 16), scale=(1.0, 1.0)))
    recipe = EdgeRecipe(6, batch=2, round=4, aligned=True)
    train(network, spec("casenet", {"depth": 14, "width": 8}), draw, recipe)
    assert len(seen) == 8  # three rounds of four crops, the first not aligned


def test_a_crops_labels_move_to_the_ridge_and_keep_their_ignored_pixels():
    _, label = scene(0)
    truth = category_edges(label, 3)
    shifted = category_edges(np.roll(label, 2, 1), 3)
    ignore = np.zeros(label.shape, bool)
    ignore[:, :3] = True
    ridge = np.stack([gaussian_filter(t.astype(float), 0.7) for t in truth]) * 0.98 + 0.01
    for gate in (None, Gate()):
        bits = align_bits(pack(shifted, ignore), ridge, "auction", gate, EdgeRecipe(1).alignment)
        moved, kept = unpack(bits, 3)
        assert (kept == ignore).all()
        assert (moved.sum((1, 2)) == shifted.sum((1, 2))).all()
        assert (moved & truth).sum() > (shifted & truth).sum()


def test_processes_align_the_same_labels_in_the_same_order():
    work = []
    for i in range(5):
        _, label = scene(i)
        given = pack(category_edges(np.roll(label, 2, 1), 3))
        ridges = [gaussian_filter(e.astype(float), 1) for e in category_edges(label, 3)]
        work.append((given, np.stack(ridges)))
    how = ("auction", Gate(), EdgeRecipe(1).alignment)
    with Aligners(1, *how) as alone, Aligners(2, *how) as two:
        for a, b in zip(alone.aligned(work), two.aligned(iter(work)), strict=True):
            assert (a == b).all()
    with pytest.raises(ValueError, match="-1 jobs"):
        Aligners(-1, *how)


def test_joint_training_moves_both_heads_and_parts_move_alone(pairs):
    torch.manual_seed(0)
    arguments = {"scale": 0.5}
    network = networks.create("espnetv2_edges", classes=3, **arguments)
    draw = crops_of_segmentation(pairs, 3, Augmentation((64, 64), scale=(1.0, 1.0)))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    train(
        network,
        spec("espnetv2_edges", arguments),
        draw,
        EdgeRecipe(2, batch=2, round=2, parts=("edge_head.",)),
    )
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("edge_head.") for k in changed)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    train(network, spec("espnetv2_edges", arguments), draw, EdgeRecipe(2, batch=2, round=2))
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert any(k.startswith("bu_dec_l4.") for k in changed)
    assert any(k.startswith("edge_head.") for k in changed)
    assert all(p.requires_grad for p in network.parameters())


def test_crops_of_edge_files_are_cut_flipped_and_padded_as_ignored():
    frame = np.arange(6 * 7 * 3, dtype=np.uint8).reshape(6, 7, 3)
    edges = np.zeros((2, 6, 7), bool)
    edges[1, 2, 3] = True
    draw = crops_of_edges([(frame, pack(edges))], (8, 10), flip=False)
    sample = draw(np.random.default_rng(0))
    got, ignore = unpack(sample.bits, 2)
    assert (got[:, :6, :7] == edges).all()
    assert ignore.sum() == 80 - 42
    assert not ignore[:6, :7].any()
    small = crops_of_edges([(frame, pack(edges))], (3, 3))
    for seed in range(6):
        sample = small(np.random.default_rng(seed))
        hit = np.argwhere(unpack(sample.bits, 2)[0][1])
        assert len(hit) <= 1
        if len(hit):
            assert (sample.frame[tuple(hit[0])] == frame[2, 3]).all()


def test_crops_are_magnified_by_the_published_factors_alone(pairs):
    assert SCALES == {"cityscapes": (1.0,), "sbd": (0.5, 0.75, 1.0, 1.25, 1.5)}
    seen = set()
    wide = np.zeros((48, 64), np.uint8)
    wide[:, 16:48] = 1  # a band of 32 pixels
    frame = np.zeros((48, 64, 3), np.uint8)
    draw = crops_of_segmentation([(frame, wide)], 2, Augmentation((96, 96)), scales=SCALES["sbd"])
    for i in range(40):
        sample = draw(np.random.default_rng(i))
        seen.add(int((sample.labels == 1).any(0).sum()))
    assert seen == {16, 24, 32, 40, 48}


def test_presets_are_the_published_recipes():
    assert set(PRESETS) == {
        f"{n}-{d}"
        for n in ("casenet", "casenet-s", "casenet-c", "seal")
        for d in ("sbd", "cityscapes", "scratch")
    }
    for name, recipe in PRESETS.items():
        scratch = name.endswith("scratch")
        assert recipe.frozen_bn != scratch
        assert recipe.frozen_affine != scratch
        assert recipe.reweighted == (name.startswith("casenet-") and name.split("-")[1] not in ("s", "c"))
        assert recipe.aligned == name.startswith("seal")
    seal = PRESETS["seal-sbd"]
    assert (seal.rate, seal.steps, seal.every, seal.gamma, seal.round) == (5e-8, 22000, 10000, 0.1, 300)
    assert seal.aligned
    assert not seal.reweighted
    assert seal.alignment == {"sigma_x": 1, "sigma_y": 4, "max_cost": 4.5, "smoothness": 0.02}
    casenet = PRESETS["casenet-cityscapes"]
    assert (casenet.rate, casenet.steps, casenet.every, casenet.gamma) == (5e-8, 28000, 20000, 0.2)
    assert casenet.reweighted
    assert not casenet.aligned


def test_with_a_published_recipe_batch_normalisation_stays_bit_for_bit(pairs):
    """BN and Scale have lr_mult 0 in the published prototxt; convolutions and the new layers move."""
    torch.manual_seed(0)
    network = networks.create("casenet", classes=3, depth=14, width=8)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    draw = crops_of_segmentation(pairs, 3, Augmentation((16, 16), scale=(1.0, 1.0)))
    recipe = replace(PRESETS["seal-sbd"], steps=2, batch=2, round=2, rate=1e-4)
    train(network, spec("casenet", {"depth": 14, "width": 8}), draw, recipe)
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    norm = {k for k in before if "bn" in k or "downsample.1" in k}
    assert len(norm) > 40
    assert not changed & norm
    assert {"conv1.weight", "res5.0.conv2.weight", "score_cls_side5.bias", "ce_fusion.weight"} <= changed
    assert all(p.requires_grad for p in network.parameters())


def test_refusals_are_named(pairs):
    draw = crops_of_segmentation(pairs, 3, Augmentation((32, 32)))
    roadnet = networks.create("roadnet", classes=3, width=8)
    with pytest.raises(ValueError, match="answers no edges"):
        train(roadnet, spec("roadnet", {"width": 8}), draw, EdgeRecipe(1))
    with pytest.raises(ValueError, match="optimiser"):
        EdgeRecipe(1, optimiser="adam")
    with pytest.raises(ValueError, match="batch"):
        EdgeRecipe(1, batch=9, round=3)
    with pytest.raises(ValueError, match="no labelled frame"):
        crops_of_segmentation([], 3, Augmentation((32, 32)))
    network = networks.create("casenet", classes=3, depth=14, width=8)
    with pytest.raises(ValueError, match="parameter"):
        train(network, spec("casenet", {"depth": 14, "width": 8}), draw, EdgeRecipe(1, parts=("nope",)))
