"""The edge loss against the formula written out, and (real) against the published layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adapt.labels.edge_codec import pack
from adapt.train.losses import multilabel_edge_loss


def written_out(x, edges, ignore, reweighted):
    total = 0.0
    for n in range(len(x)):
        valid = ~ignore[n]
        pos = (edges[n].any(0) & valid).sum()
        tot = valid.sum()
        for k in range(x.shape[1]):
            for y, v, ok in zip(
                edges[n, k].ravel(), x[n, k].ravel().astype(float), valid.ravel(), strict=True
            ):
                if ok:
                    weight = ((tot - pos) if y else pos) / tot if reweighted else 1.0
                    total += weight * np.log1p(np.exp(-v if y else v))
    return total / len(x)


def case(classes, seed=0, size=(6, 5)):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, classes, *size)).astype(np.float32) * 3
    edges, ignore = rng.random((2, classes, *size)) < 0.1, rng.random((2, *size)) < 0.2
    bits = np.stack([pack(e, i) for e, i in zip(edges, ignore, strict=True)])
    return x, edges, ignore, bits


@pytest.mark.parametrize("classes", [1, 19, 31, 32, 40])
@pytest.mark.parametrize("reweighted", [True, False])
def test_loss_is_the_formula_for_any_number_of_classes(classes, reweighted):
    x, edges, ignore, bits = case(classes)
    expected = written_out(x, edges, ignore, reweighted)
    got = multilabel_edge_loss(
        torch.from_numpy(x), torch.from_numpy(bits), reweighted=reweighted, reduction="caffe_sum"
    )
    assert got.item() == pytest.approx(expected, rel=1e-5)
    mean = multilabel_edge_loss(torch.from_numpy(x), torch.from_numpy(bits), reweighted=reweighted)
    assert mean.item() == pytest.approx(expected * 2 / (~ignore).sum() / classes, rel=1e-5)


def test_ignored_pixels_have_no_gradient_whatever_they_hold():
    x, _, ignore, bits = case(3)
    x[:, :, ignore[0]] = 0
    logits = torch.from_numpy(x)
    logits[0, :, torch.from_numpy(ignore[0])] = float("inf")
    logits.requires_grad_()
    loss = multilabel_edge_loss(logits, torch.from_numpy(bits))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[0, :, torch.from_numpy(ignore[0])] == 0).all()


def test_a_batch_that_is_ignored_entirely_costs_nothing():
    bits = np.full((1, 1, 3, 3), 1 << 31, np.uint32)
    logits = torch.ones(1, 2, 3, 3, requires_grad=True)
    loss = multilabel_edge_loss(logits, torch.from_numpy(bits))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_bad_input_is_named():
    x, _, _, bits = case(3)
    logits, labels = torch.from_numpy(x), torch.from_numpy(bits)
    with pytest.raises(ValueError, match="reduction"):
        multilabel_edge_loss(logits, labels, reduction="sum")
    with pytest.raises(ValueError, match="one size"):
        multilabel_edge_loss(logits, labels[..., :-1])
    with pytest.raises(ValueError, match="40 classes take a bit field"):
        multilabel_edge_loss(torch.zeros(2, 40, 6, 5), labels)
    with pytest.raises(ValueError, match="uint32"):
        multilabel_edge_loss(logits, labels.view(torch.float32))


@pytest.mark.real
@pytest.mark.parametrize("name", ["rw3", "uw3", "rw19"])
def test_loss_and_gradient_equal_the_published_layers(real_data, name):
    path = real_data / "edge_fixtures" / "losses.npz"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    given = np.load(path)
    x = torch.from_numpy(given[f"{name}_x"]).requires_grad_()
    loss = multilabel_edge_loss(
        x, torch.from_numpy(given[f"{name}_lab"]), reweighted=name.startswith("rw"), reduction="caffe_sum"
    )
    loss.backward()
    assert loss.item() == pytest.approx(float(given[f"{name}_loss"]), rel=1e-6)
    np.testing.assert_allclose(x.grad.numpy(), given[f"{name}_grad"], atol=1e-6)
