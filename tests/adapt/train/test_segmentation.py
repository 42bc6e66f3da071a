"""The options of self-training: soft labels, masked consistency, rare classes, bf16, the cut by bytes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import networks
from adapt.labels import cbst, lrent
from adapt.labels.cbst import pseudo_labels
from adapt.round import RoundConfig, RoundError, adapt
from adapt.train import losses, mic, truncated_backprop
from adapt.train.augment import Augmentation, crop
from adapt.train.batches import BatchMix, sampler
from adapt.train.segmentation import Batch, SegmentationTrainer, Tensors, TrainConfig, loss_of
from tests.adapt.conftest import SIZE, toy_scene, toy_spec

PAIRS = [toy_scene(i) for i in range(6)]
SPEC = toy_spec()


def small_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return networks.create("roadnet", classes=4, width=8)


def softmax_map(seed: int, classes: int = 5, size: tuple[int, int] = (12, 16)) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(classes, *size)) * 3
    e = np.exp(x - x.max(0))
    return (e / e.sum(0)).astype(np.float32)


def soft_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """Soft labels that lean to the true class."""
    made = []
    for i, (_, y) in enumerate(pairs):
        p = softmax_map(i, 4, SIZE) * 0.3
        np.put_along_axis(p, y[None].astype(int), np.take_along_axis(p, y[None].astype(int), 0) + 0.7, 0)
        made.append(lrent.compact_labels(p / p.sum(0), np.full(4, 0.7), 0.25))
    return made


# -------------------------------------------------------------------------------------------- soft labels
def test_a_pixel_is_kept_exactly_where_its_label_lowers_the_objective():
    """The closed form against the objective itself, minimised over a grid of two-class labels."""
    lam, alpha = np.array([0.8, 0.4]), 0.25
    grid = np.linspace(1e-9, 1 - 1e-9, 20001)
    for first in (0.05, 0.3, 0.5, 0.58, 0.62, 0.7, 0.79, 0.81, 0.95):
        p = np.array([first, 1 - first])
        cost = -grid * np.log(p[0] / lam[0]) - (1 - grid) * np.log(p[1] / lam[1])
        cost += alpha * (grid * np.log(grid) + (1 - grid) * np.log(1 - grid))
        ours = lrent.soft_labels(p.astype(np.float32)[:, None, None], lam, alpha)[:, 0, 0]
        assert (ours.sum() > 0) == (cost.min() < 0), first
        if ours.sum():
            assert ours[0] == pytest.approx(grid[cost.argmin()], abs=1e-3)


@pytest.mark.parametrize("path", ["numba", "numpy"])
def test_compact_labels_are_the_soft_ones_in_bytes(monkeypatch, path):
    if path == "numpy":
        monkeypatch.setattr(cbst, "kernels", lambda: None)
    p, lam = softmax_map(1, classes=9), np.linspace(0.3, 0.9, 9)
    exact = lrent.soft_labels(p, lam)
    ours = lrent.compact_labels(p, lam)
    back = np.zeros_like(exact)
    for k in range(lrent.KEEP):
        c, w = ours[..., k], ours[..., lrent.KEEP + k] / 255
        for y, x in zip(*np.nonzero(c != 255), strict=True):
            back[c[y, x], y, x] = w[y, x]
    kept = exact.sum(0) > 0
    assert kept.any()
    assert not kept.all()
    np.testing.assert_array_equal(ours[..., 0] != 255, kept)
    np.testing.assert_array_equal(ours[..., 0][kept], exact.argmax(0)[kept])
    assert (exact.sum(0) - back.sum(0))[kept].mean() < 0.01  # what four classes leave out
    assert np.abs(back - exact)[back > 0].max() <= 0.5 / 255 + 1e-6


def test_soft_labels_know_prior_tags_and_bonnet_and_contain_the_hard_ones():
    p, lam = softmax_map(2), np.full(5, 0.5)
    q = np.random.default_rng(0).uniform(0.3, 1, p.shape).astype(np.float32)
    valid = np.ones(p.shape[1:], bool)
    valid[-3:] = False
    ours = lrent.compact_labels(p, lam, 0.25, prior=q, allowed={0, 2, 3}, valid=valid)
    assert set(np.unique(ours[..., : lrent.KEEP])) <= {0, 2, 3, 255}
    assert (ours[-3:, :, 0] == 255).all()
    assert (ours[-3:, :, lrent.KEEP :] == 0).all()
    hard = pseudo_labels(p, lam, prior=q, allowed={0, 2, 3}, valid=valid)
    np.testing.assert_array_equal(ours[..., 0][hard != 255], hard[hard != 255])
    with pytest.raises(ValueError, match="alpha"):
        lrent.compact_labels(p, lam, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        lrent.compact_labels(np.full_like(p, np.nan), lam)
    with pytest.raises(ValueError, match="positive"):
        lrent.compact_labels(p, np.zeros(5))


def test_soft_cross_entropy_by_its_sum():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    soft = np.stack([lrent.compact_labels(softmax_map(i, 5, (6, 7)), np.full(5, 0.6)) for i in range(2)])
    log_p = logits.log_softmax(1).numpy()
    terms = []
    for n, y, x in np.ndindex(2, 6, 7):
        classes, weights = soft[n, y, x, :4], soft[n, y, x, 4:] / soft[n, y, x, 4:].sum().clip(1)
        if classes[0] != 255:
            terms.append(-sum(w * log_p[n, c, y, x] for c, w in zip(classes, weights, strict=True) if c < 5))
    assert 0 < len(terms) < 84
    assert float(losses.soft_cross_entropy(logits, torch.from_numpy(soft))) == pytest.approx(np.mean(terms))
    nothing = torch.from_numpy(np.full((1, 2, 2, 8), 255, np.uint8))
    assert losses.soft_cross_entropy(torch.randn(1, 5, 2, 2), nothing) == 0


def test_several_planes_are_cropped_like_one():
    frame, label = toy_scene(0)
    how = Augmentation((40, 40), (0.6, 2.0))
    for seed in range(6):
        one = crop(np.random.default_rng(seed), frame, label, how)
        two = crop(np.random.default_rng(seed), frame, np.stack([label, label], -1), how)
        np.testing.assert_array_equal(one[0], two[0])
        for k in (0, 1):
            np.testing.assert_array_equal(one[1], two[1][..., k])


# --------------------------------------------------------------------------------------------- consistency
def test_blocks_hide_seven_tenths():
    seen = mic.block_mask(np.random.default_rng(0), 20, (64, 100), 8)
    assert seen.shape == (20, 64, 100)
    assert seen.mean() == pytest.approx(0.3, abs=0.02)
    blocks = seen[:, :, :96].reshape(20, 8, 8, 12, 8)
    assert (blocks.all((2, 4)) | ~blocks.any((2, 4))).all()


def test_consistency_by_hand():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5) * 4
    ignore = torch.zeros(2, 4, 5, dtype=torch.bool)
    ignore[:, -1] = True
    p, label = teacher.softmax(1).max(1)
    total, pixels = 0.0, 0
    for n in range(2):
        sure = float((p[n, :3] >= 0.9).float().mean())
        total += sure * float(F.cross_entropy(student[n, :, :3][None], label[n, :3][None], reduction="sum"))
        pixels += 15
    ours = mic.consistency(student, teacher, ignore, 0.9)
    assert float(ours) == pytest.approx(total / pixels, rel=1e-5)


def test_masked_crops_leave_no_trace_in_the_statistics_and_the_teacher_learns_nothing():
    network = small_network()
    draw = sampler(PAIRS[:3], PAIRS[3:], BatchMix(1, 2, Augmentation(SIZE), mic=True, classmix=1.0), 4, 0, 0)
    how = TrainConfig(steps=2, ema=0.9, mic=1.0)
    plain, masked = (
        SegmentationTrainer(small_network(), SPEC, h, draw, seed=0) for h in (how, TrainConfig(steps=2))
    )
    batch = Tensors.of(draw(0), "cpu")
    teacher = {n: p.detach() * 1.5 for n, p in network.named_parameters()}
    for trainer in (plain, masked):
        trainer.network.train()
        loss = loss_of(trainer.network, SPEC, trainer.config, batch, teacher)
        loss.backward()
    for (name, a), b in zip(plain.network.named_buffers(), masked.network.buffers(), strict=True):
        if not name.endswith("tracked"):
            assert torch.equal(a, b), name
    grads = [p.grad for p in plain.network.parameters()]
    assert any(not torch.equal(g, p.grad) for g, p in zip(grads, masked.network.parameters(), strict=True))
    assert plain.network.training
    made = draw(0)
    assert made.whole is not None
    assert made.seen is not None
    assert made.seen.shape == (2, *SIZE)
    assert not np.array_equal(made.whole, made.frames[1:])  # what is pasted is not what consistency sees
    with pytest.raises(ValueError, match="needs the mean teacher"):
        TrainConfig(steps=1, mic=1.0)


# -------------------------------------------------------------------------------------------- rare classes
def test_a_rare_pseudo_label_is_drawn_and_is_in_the_crop():
    common = (np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, np.uint8))
    y = np.zeros(SIZE, np.uint8)
    y[8:16, 4:12] = 2
    rare = (np.zeros((*SIZE, 3), np.uint8), y)
    target = [*[common] * 9, rare]
    how = Augmentation((16, 16), (1, 1))

    def share(temperature: float) -> float:
        draw = sampler([], target, BatchMix(0, 1, how, rare_target=temperature), 4, seed=0, stage=0)
        return float(np.mean([(draw(step).labels == 2).any() for step in range(60)]))

    assert share(0.0) < 0.15
    assert share(1.0) > 0.25
    nothing = [(common[0], np.full(SIZE, 255, np.uint8))]
    draw = sampler([], nothing, BatchMix(0, 1, how, rare_target=0.1), 4, seed=0, stage=0)
    assert (draw(0).labels == 255).all()


# ---------------------------------------------------------------------------------------------- the whole
EVERYTHING = {
    "ema": 0.9,
    "mic": 0.5,
    "mrkld": 0.05,
    "bn": "frozen",
    "schedule": "warm",
    "clip": 1.0,
    "amp": "bf16",
    "memory_mb": 1.5,
}


def everything(seed: int = 1):
    mixture = BatchMix(
        2, 2, Augmentation(SIZE, blur=0.5, noise=4), rare=0.1, rare_target=0.1, classmix=0.5, mic=True
    )
    valid = np.ones(SIZE, bool)
    valid[-4:] = False
    return sampler(PAIRS[:3], PAIRS[3:], mixture, 4, seed, 0, soft=soft_of(PAIRS[3:]), valid=valid)


def test_with_every_option_on_a_stopped_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    how = TrainConfig(steps=6, rate=2e-3, **EVERYTHING)
    whole = small_network()
    trainer = SegmentationTrainer(whole, SPEC, how, everything(), seed=5)
    assert trainer.freeze_point is not None
    assert 0 < trainer.freeze_point.share < 1
    trainer.run()

    class Stop(Exception):
        pass

    def stop(stage, done, total, **numbers):
        if done >= 3:
            raise Stop

    told = {"seed": 5, "checkpoint": tmp_path / "c.pt", "every": 2, "identity": "x"}
    with pytest.raises(Stop):
        SegmentationTrainer(small_network(), SPEC, how, everything(), **told).run(stop)
    resumed = small_network()
    monkeypatch.setattr(
        SegmentationTrainer, "_choose_freeze_point", lambda self: pytest.fail("the cut is the checkpoint's")
    )
    again = SegmentationTrainer(resumed, SPEC, how, everything(), **told)
    assert again.step == 2
    assert again.freeze_point == trainer.freeze_point
    again.run()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    before = dict(small_network().named_parameters())
    still = set(before) - set(trainer.freeze_point.moving)
    assert all(torch.equal(p, before[n]) for n, p in whole.named_parameters() if n in still)
    assert all(p.requires_grad for p in whole.parameters())


def test_a_batch_of_everything_is_repeatable():
    a, b = everything()(4), everything()(4)
    for name in ("frames", "labels", "soft", "whole", "seen", "ignore"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert a.soft is not None
    assert a.ignore is not None
    np.testing.assert_array_equal(a.soft[..., 0], a.labels)
    assert a.ignore.any()
    assert not a.ignore.all()


def test_a_round_with_every_option_on(toy_pack, dark_frames, tmp_path):
    config = RoundConfig(
        portions=(0.4,),
        steps=4,
        source=2,
        target=2,
        lrent=0.25,
        rare=0.1,
        rare_target=0.1,
        classmix=0.5,
        blur=0.5,
        ignore_bottom=3,
        **EVERYTHING,
    )
    result = adapt(toy_pack, dark_frames, config=config, out=tmp_path)
    stage = result.report["stages"]["train-1"]
    assert stage["cut"]["bytes"] <= 1.5 * 2**20
    soft = lrent.read(tmp_path / "labels-1" / "00000.npz")
    assert (soft[-3:, :, 0] == 255).all()
    assert ((soft[..., 4] > 0) & (soft[..., 4] < 250)).any()  # some are soft
    parent = toy_pack.state()
    assert any(not torch.equal(parent[n], t) for n, t in result.pack.state().items()) if result.pack else True


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"amp": "fp8"}, "choose bf16"),
        ({"mic": 1.0}, "mean teacher"),
        ({"lrent": -1.0}, "entropy"),
        ({"memory_mb": -5}, "not negative"),
        ({"rate": float("nan")}, "not negative"),
        ({"classmix": 2.0}, "chance"),
        ({"bn": "no"}, "choose batch"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(told, message):
    with pytest.raises(RoundError, match=message):
        RoundConfig(**told)


def test_a_cuda_device_that_is_not_there_is_named(toy_pack, dark_frames, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(RoundError, match="no CUDA device"):
        adapt(toy_pack, dark_frames, config=RoundConfig(device="cuda"), out=tmp_path)


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(monkeypatch):
    """Captured by torch.compile and run by its eager backend: code generation takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    draw = sampler(PAIRS[:3], PAIRS[3:], BatchMix(2, 2, Augmentation(SIZE), mic=True), 4, seed=0, stage=0)
    how = {"steps": 2, "ema": 0.9, "mic": 1.0}
    eager, compiled = small_network(), small_network()
    first = SegmentationTrainer(eager, SPEC, TrainConfig(**how), draw, seed=0)
    second = SegmentationTrainer(compiled, SPEC, TrainConfig(**how, compile=True), draw, seed=0)
    first.run()
    second.run()
    np.testing.assert_allclose(first.history, second.history, rtol=1e-4)
    assert set(compiled.state_dict()) == set(eager.state_dict())  # names as ever


def test_a_network_that_cannot_be_compiled_ends_in_one_line(monkeypatch):
    def broken(*args, **kwargs):
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no C++ compiler"), None)

    import torch._dynamo.exc

    monkeypatch.setattr(torch, "compile", lambda network, **k: broken)
    draw = sampler([], PAIRS, BatchMix(0, 1, Augmentation(SIZE)), 4, seed=0, stage=0)
    with pytest.raises(ValueError, match="set compile to false"):
        SegmentationTrainer(small_network(), SPEC, TrainConfig(steps=1, compile=True), draw, seed=0).run()


# ---------------------------------------------------------------------------------------- the cut by bytes
def step_of(batch: Batch, device: str):
    tensors = Tensors.of(batch, device)
    return (lambda network: loss_of(network, SPEC, TrainConfig(steps=1), tensors)), tensors.all()


def a_batch() -> Batch:
    return sampler(PAIRS[:3], PAIRS[3:], BatchMix(2, 2, Augmentation(SIZE)), 4, seed=0, stage=0)(0)


@pytest.mark.parametrize(("name", "arguments"), [("roadnet", {"width": 8}), ("espnetv2", {"scale": 0.5})])
def test_predicted_bytes_are_what_autograd_keeps(name, arguments):
    """Predicted on the meta device; measured on the CPU with a count of its own."""
    torch.manual_seed(0)
    network = networks.create(name, classes=4, **arguments).train()
    dry, known = step_of(a_batch(), "meta")
    loss, tensors = step_of(a_batch(), "cpu")
    found = truncated_backprop.cuts(network, dry, known=known, points=4)
    parameters = dict(network.named_parameters())
    for cut in found:
        for key, p in parameters.items():
            p.requires_grad_(key in cut.moving)
        held = {}
        mine = {t.data_ptr() for t in [*parameters.values(), *network.buffers(), *tensors]}

        def hold(tensor, held=held):
            held[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
            value = loss(network)
        measured = sum(t.untyped_storage().nbytes() for address, t in held.items() if address not in mine)
        del value
        assert cut.saved == pytest.approx(measured, rel=0.02), cut.first
    sizes = [cut.bytes for cut in found]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.5 * sizes[0]
    assert found[0].share == 1.0


def test_batch_normalisation_alone_saves_little():
    """Why there is a cut: the small part of the parameters that TENT moves needs most of the memory."""
    network = small_network().train()
    loss, tensors = step_of(a_batch(), "cpu")
    whole = truncated_backprop.usage(network, loss, tensors).saved
    norms = {
        f"{n}.{k}"
        for n, m in network.named_modules()
        if isinstance(m, torch.nn.BatchNorm2d)
        for k, _ in m.named_parameters()
    }
    for name, p in network.named_parameters():
        p.requires_grad_(name in norms)
    assert truncated_backprop.usage(network, loss, tensors).saved > 0.8 * whole


def test_gradients_behind_the_cut_are_the_whole_ones():
    network = small_network().train()
    dry, known = step_of(a_batch(), "meta")
    loss, _ = step_of(a_batch(), "cpu")
    full = truncated_backprop.cuts(network, dry, known=known, points=2)[0]
    cut = truncated_backprop.choose(network, dry, full.bytes // 2, known=known)
    assert 0 < len(cut.moving) < len(full.moving)
    loss(network).backward()
    whole = {n: p.grad.clone() for n, p in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    for name, p in network.named_parameters():
        p.requires_grad_(name in cut.moving)
    loss(network).backward()
    for name, p in network.named_parameters():
        if name in cut.moving:
            assert torch.equal(p.grad, whole[name]), name
        else:
            assert p.grad is None


class Chain(torch.nn.Module):
    """Six convolutions, and a head that the loss never sees."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Conv2d(3 + i, 4 + i, 3) for i in range(6)))
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu()
        return x


def test_the_deepest_cut_that_fits_is_chosen():
    """By trying every cut of a network small enough for that."""
    network, x = Chain(), torch.zeros(2, 3, 32, 48, device="meta")

    def loss(network):
        return network(x).square().mean()

    every = truncated_backprop.cuts(network, loss, known=[x], points=1000)
    assert [cut.first for cut in every] == [f"layers.{i}" for i in range(6)]
    assert not any(name.startswith("unused") for name in every[0].moving)
    for budget in (every[0].bytes, every[0].bytes - 1, every[3].bytes, every[-1].bytes):
        best = next(cut for cut in every if cut.bytes <= budget)
        assert truncated_backprop.choose(network, loss, budget, known=[x]) == best
    with pytest.raises(ValueError, match="too little"):
        truncated_backprop.choose(network, loss, every[-1].bytes - 1, known=[x])
    assert all(p.requires_grad and not p.is_meta for p in network.parameters())
