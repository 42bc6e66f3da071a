"""The training loop learns, repeats itself and resumes to the same weights; crops; losses by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import networks
from adapt.evaluate.scoring import score
from adapt.train import losses, priors, supervised
from adapt.train.augment import Augmentation, crop
from adapt.train.batches import BatchMix, class_mix, rare_class_chances, sampler
from adapt.train.segmentation import Batch, SegmentationTrainer, TrainConfig, learning_rate
from adapt.train.trainer import ResumableTrainer
from common.progress import no_progress
from tests.adapt.conftest import SIZE, toy_scene, toy_spec

PAIRS = [toy_scene(i) for i in range(6)]
RECIPE = supervised.Recipe(epochs=6, batch=3, augmentation=Augmentation(SIZE, (0.9, 1.1)), rate=3e-3)


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return networks.create("roadnet", classes=4, width=8)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[n]) for n, x in a.state_dict().items())


@pytest.mark.parametrize("extra", [{}, {"ema": 0.9, "mrkld": 0.05, "bn": "split", "clip": 1.0}])
def test_stopped_anywhere_and_resumed_gives_the_same_weights(tmp_path, extra):
    spec = toy_spec()
    how = TrainConfig(steps=8, rate=2e-3, **extra)
    draw = sampler(PAIRS[:3], PAIRS[3:], BatchMix(2, 2, Augmentation(SIZE)), 4, seed=1, stage=0)
    whole = small_network()
    SegmentationTrainer(whole, spec, how, draw, seed=5).run()

    class Stop(Exception):
        pass

    def stop_at(step: int):
        def progress(stage, done, total, **numbers):
            if done >= step:
                raise Stop

        return progress

    checkpoint = tmp_path / "c.pt"
    for step in (3, 6):
        with pytest.raises(Stop):
            SegmentationTrainer(
                small_network(), spec, how, draw, seed=5, checkpoint=checkpoint, every=2, identity="x"
            ).run(stop_at(step))
    resumed = small_network()
    trainer = SegmentationTrainer(
        resumed, spec, how, draw, seed=5, checkpoint=checkpoint, every=2, identity="x"
    )
    assert trainer.step == 4
    trainer.run()
    assert same(whole, resumed)
    assert len(trainer.history) == 8


def test_a_damaged_or_foreign_checkpoint_is_not_used(tmp_path):
    spec, checkpoint = toy_spec(), tmp_path / "c.pt"
    draw = supervised.sampler(PAIRS, RECIPE, 0)
    how = TrainConfig(steps=2)
    SegmentationTrainer(
        small_network(), spec, how, draw, seed=0, checkpoint=checkpoint, every=1, identity="a"
    ).run()
    assert (
        SegmentationTrainer(
            small_network(), spec, how, draw, seed=0, checkpoint=checkpoint, identity="a"
        ).step
        == 2
    )
    assert (
        SegmentationTrainer(
            small_network(), spec, how, draw, seed=0, checkpoint=checkpoint, identity="b"
        ).step
        == 0
    )
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    assert (
        SegmentationTrainer(
            small_network(), spec, how, draw, seed=0, checkpoint=checkpoint, identity="a"
        ).step
        == 0
    )


def test_the_recipe_learns_the_bands():
    network = small_network()
    before = score(network, toy_spec(), PAIRS)[0].miou()
    supervised.train(
        network,
        toy_spec(),
        PAIRS,
        supervised.Recipe(epochs=20, batch=3, augmentation=Augmentation(SIZE, (0.9, 1.1)), rate=4e-3),
    )
    after = score(network, toy_spec(), PAIRS)[0].miou()
    assert after > before + 0.3
    assert after > 0.5


def test_every_frame_once_an_epoch():
    marked = [(np.full((*SIZE, 3), i, np.uint8), np.full(SIZE, i, np.uint8)) for i in range(7)]
    recipe = supervised.Recipe(batch=3, augmentation=Augmentation(SIZE, (1.0, 1.0)))
    draw = supervised.sampler(marked, recipe, seed=4)
    seen = [int(y[0, 0]) for step in range(14) for y in draw(step).labels]
    for epoch in range(6):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))
    again = supervised.sampler(marked, recipe, seed=4)
    np.testing.assert_array_equal(again(9).labels, draw(9).labels)


def test_a_loss_that_is_no_number_stops_the_training():
    batch = Batch(np.zeros((1, *SIZE, 3), np.uint8), np.zeros((1, *SIZE), np.uint8), np.zeros(1, bool))
    network = small_network()
    with torch.no_grad():
        next(network.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        SegmentationTrainer(network, toy_spec(), TrainConfig(steps=1), lambda step: batch, seed=0).run()


def test_only_the_named_parts_move():
    network, still = small_network(), small_network()
    names = [n for n, _ in network.named_parameters()]
    part = names[-1].rpartition(".")[0]
    how = TrainConfig(steps=2, parts=(part,), bn="frozen")
    SegmentationTrainer(network, toy_spec(), how, supervised.sampler(PAIRS, RECIPE, 0), seed=0).run()
    before = dict(still.named_parameters())
    moved = {n for n, p in network.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(n.startswith(part) for n in moved)
    with pytest.raises(ValueError, match="no parameter"):
        SegmentationTrainer(
            network, toy_spec(), TrainConfig(steps=1, parts=("nothing",)), lambda s: None, seed=0
        )


def test_one_cycle_rises_to_the_peak_and_falls_to_nought():
    how = TrainConfig(steps=100, rate=1.0)
    rates = [learning_rate(how, s) for s in range(100)]
    torch_optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch_optimiser, 1.0, total_steps=100, pct_start=0.3, cycle_momentum=False
    )
    theirs = []
    for _ in range(100):
        theirs.append(torch_optimiser.param_groups[0]["lr"])
        torch_optimiser.step()
        if len(theirs) < 100:
            reference.step()
    np.testing.assert_allclose(rates, theirs, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------- crops
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.3])
def test_frame_and_label_stay_together(scale):
    """Colour encodes the class, so the crops of frame and label must match nearly everywhere."""
    label = np.kron(np.random.default_rng(0).integers(0, 4, (6, 8)), np.ones((16, 16))).astype(np.uint8)
    frame = np.repeat(label[..., None] * 60, 3, axis=2)
    how = Augmentation((64, 64), (scale, scale))
    for seed in range(5):
        x, y = crop(np.random.default_rng(seed), frame, label, how)
        assert x.shape == (64, 64, 3)
        assert y.shape == (64, 64)
        valid = y != 255
        agreement = (np.abs(x[..., 0].astype(int) - y.astype(int) * 60) < 30)[valid].mean()
        assert agreement > 0.9
        if scale == 0.5:
            assert (~valid).sum() == 64 * 64 - 48 * 64
            assert (x[~valid] == 0).all()


def test_light_changes_the_frame_and_not_the_label():
    frame, label = toy_scene(3)
    how = Augmentation(SIZE, (1.0, 1.0), flip=False, brightness=2.0, colour=0.3, noise=5.0, blur=1.0)
    x, y = crop(np.random.default_rng(0), frame, label, how)
    np.testing.assert_array_equal(y, label)
    assert np.abs(x.astype(int) - frame).mean() > 5
    with pytest.raises(ValueError, match="smallest, largest"):
        Augmentation(SIZE, (2.0, 1.0))


# ------------------------------------------------------------------------------------------------- losses
def test_losses_against_their_definitions():
    torch.manual_seed(1)
    logits = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    labels = torch.randint(0, 5, (2, 4, 6))
    labels[0, :2] = 255
    ours = losses.cross_entropy(logits, labels)
    assert torch.isclose(ours, F.cross_entropy(logits, labels, ignore_index=255))
    p = logits.softmax(1)
    valid = labels != 255
    by_hand = torch.stack([-(p[n, :, y, x].log()).mean() for n, y, x in valid.nonzero()]).mean()
    assert torch.isclose(losses.mrkld(logits, labels), by_hand)
    one_hot = torch.stack([labels, valid * 255], dim=-1).to(torch.uint8)  # one class a pixel, all the weight
    assert torch.isclose(losses.soft_cross_entropy(logits, one_hot), ours)
    weighted = losses.cross_entropy(logits, labels, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.isclose(weighted, F.cross_entropy(logits[1:], labels[1:]))


def test_nothing_labelled_is_no_loss():
    logits = torch.randn(1, 3, 2, 2)
    nothing = torch.full((1, 2, 2), 255)
    assert losses.cross_entropy(logits, nothing) == 0
    assert losses.mrkld(logits, nothing) == 0


# ------------------------------------------------------------------------------------------------ mixtures
def test_a_batch_holds_source_then_target():
    source = [(np.zeros((*SIZE, 3), np.uint8), np.full(SIZE, 1, np.uint8))]
    target = [(np.zeros((*SIZE, 3), np.uint8), np.full(SIZE, 2, np.uint8))]
    batch = sampler(source, target, BatchMix(2, 3, Augmentation(SIZE, (1, 1))), 4, seed=0, stage=0)(0)
    assert batch.target.tolist() == [False, False, True, True, True]
    assert [int(y[0, 0]) for y in batch.labels] == [1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="source-free"):
        sampler([], target, BatchMix(1, 1, Augmentation(SIZE)), 4, 0, 0)


def test_rare_classes_are_drawn_more_often():
    share = np.array([0.9, 0.09, 0.01, 0.0])
    chances = rare_class_chances(share, 0.1)
    expected = np.exp((1 - share[:3]) / 0.1)
    np.testing.assert_allclose(chances[:3], expected / expected.sum())
    assert chances[3] == 0
    common = (np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, np.uint8))
    rare = (
        np.zeros((*SIZE, 3), np.uint8),
        np.where(np.arange(64) < 4, 2, 0)[None].repeat(32, 0).astype(np.uint8),
    )
    target = [common]
    mixture = BatchMix(1, 1, Augmentation(SIZE, (1, 1)), rare=0.1)
    draw = sampler([common] * 9 + [rare], target, mixture, 4, seed=0, stage=0)
    with_rare = np.mean([(draw(step).labels[0] == 2).any() for step in range(60)])
    assert with_rare > 0.5


def test_class_mix_pastes_half_of_the_source_classes():
    source = (np.full((*SIZE, 3), 7, np.uint8), np.arange(64)[None].repeat(32, 0).astype(np.uint8) // 16)
    target = (np.full((*SIZE, 3), 9, np.uint8), np.full(SIZE, 255, np.uint8))
    x, y = class_mix(np.random.default_rng(0), source, target)
    pasted = y != 255
    assert pasted.mean() == 0.5
    np.testing.assert_array_equal(x[..., 0] == 7, pasted)
    np.testing.assert_array_equal(y[pasted], source[1][pasted])


# ------------------------------------------------------------------------------------- heads and statistics
def test_a_head_of_another_label_space_gets_the_mapped_rows():
    old = networks.create("roadnet", classes=3, width=8)
    new = networks.create("roadnet", classes=2, width=8)
    table = np.full(256, 255, np.uint8)
    table[[0, 2]] = 1, 1
    mapped = supervised.transfer(old.state_dict(), new, table, 3)
    assert mapped
    name = mapped[0]
    rows = old.state_dict()[name]
    torch.testing.assert_close(new.state_dict()[name][1], rows[[0, 2]].mean(0))
    torch.testing.assert_close(new.state_dict()[name][0], rows.mean(0))
    with pytest.raises(ValueError, match="another architecture"):
        supervised.transfer({}, new, table, 3)


def test_the_spatial_prior_is_where_the_class_was():
    labels = []
    for _ in range(3):
        y = np.zeros((40, 60), np.uint8)
        y[20:] = 1
        y[:, :5] = 255
        labels.append(y)
    q = priors.spatial_prior(labels, 3, size=(20, 30)).astype(float)
    assert q.shape == (3, 20, 30)
    assert q.min() >= 0
    assert q.max() == 1.0
    assert q[0, 2, 15] > 10 * q[0, 17, 15]
    assert q[1, 17, 15] > 10 * q[1, 2, 15]
    assert (q[2] == 0).all()
    # every class sums to the same over the pixels, as the paper asks
    assert q[0].sum() == pytest.approx(q[1].sum(), rel=0.01)
    np.testing.assert_allclose(priors.class_shares(labels, 3), [0.5, 0.5, 0])


class Stopped(Exception):
    pass


def stop_at(step):
    def progress(stage, done, total, **numbers):
        if done >= step:
            raise Stopped

    return progress


class Quadratic(ResumableTrainer):
    """Moves one weight towards the number of its step; `fatal` is the step whose loss is not finite."""

    def __init__(self, steps, *, fatal=-1, **how):
        network = nn.Linear(1, 2)
        with torch.no_grad():
            network.weight.zero_()
        super().__init__(network, steps, **({"checkpoint": None, "every": 2, "identity": "x"} | how))
        self.moving, self.frozen = [network.weight], [network.bias]
        self.optimiser = torch.optim.SGD(self.moving, lr=0.1, momentum=0.9)
        self.fatal = fatal
        self._resume(self._stored())

    def _loss(self, step):
        assert not self.network.bias.requires_grad
        loss = ((self.network.weight - step) ** 2).sum()
        return loss * float("nan") if step == self.fatal else loss

    def run(self, progress=no_progress):
        self._run(progress, "train")
        return self.network.weight.detach().clone()


@pytest.mark.parametrize("first", [False, True])
def test_any_training_resumes_to_the_same_bits_whichever_step_it_stopped_at(tmp_path, monkeypatch, first):
    monkeypatch.setattr(Quadratic, "STORE_FIRST", first)
    whole = Quadratic(7).run()
    for at in range(1, 8):
        checkpoint = tmp_path / f"{at}.pt"
        with pytest.raises(Stopped):
            Quadratic(7, checkpoint=checkpoint).run(stop_at(at))
        resumed = Quadratic(7, checkpoint=checkpoint)
        due = (at if first else at - 1) // 2 * 2
        assert resumed.step == (7 if first and at == 7 else due)
        assert torch.equal(resumed.run(), whole)
        assert len(resumed.history) == 7


def test_a_loss_that_is_not_finite_moves_nothing_and_frees_what_was_frozen():
    trainer = Quadratic(5, fatal=3)
    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan: lower the learning rate"):
        trainer.run()
    assert trainer.step == 3
    assert torch.isfinite(trainer.network.weight).all()
    assert trainer.network.bias.requires_grad
