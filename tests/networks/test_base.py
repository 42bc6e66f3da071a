"""One tester for every architecture: shapes, any legal size, save and load, tracing, gradients."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import networks
from networks import create, names

CASES = [
    pytest.param(name, arguments, id=f"{name}-{arguments}")
    for name in names()
    for arguments in networks.architecture(name).EXAMPLES
]


def make(name, arguments, classes=5):
    torch.manual_seed(0)
    return create(name, classes=classes, **arguments).eval()


@pytest.mark.parametrize(("name", "arguments"), CASES)
class TestEveryNetwork:
    def test_logits_have_the_promised_shape_at_any_legal_size(self, name, arguments):
        network = make(name, arguments)
        m, s = network.size_multiple, network.output_stride
        for n, h, w in ((1, 2 * m, 3 * m), (2, 3 * m, 2 * m)):
            with torch.inference_mode():
                y = network(torch.randn(n, 3, h, w))
            assert y.shape == (n, 5, h // s, w // s)
            assert y.dtype == torch.float32
            assert torch.isfinite(y).all()

    def test_answers_of_one_frame_do_not_depend_on_the_others_in_the_batch(self, name, arguments):
        network = make(name, arguments)
        m = network.size_multiple
        x = torch.randn(2, 3, 2 * m, 3 * m)
        with torch.inference_mode():
            together, alone = network(x), torch.cat([network(x[:1]), network(x[1:])])
        assert torch.allclose(together, alone, atol=1e-4, rtol=1e-4)

    def test_weights_survive_safetensors(self, name, arguments, tmp_path):
        network = make(name, arguments)
        state = {k: v.clone() for k, v in network.state_dict().items()}
        save_file(state, tmp_path / "w.safetensors")
        other = create(name, classes=5, **arguments).eval()
        other.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
        x = torch.randn(1, 3, 2 * network.size_multiple, 2 * network.size_multiple)
        with torch.inference_mode():
            assert torch.equal(network(x), other(x))

    def test_every_parameter_gets_a_gradient(self, name, arguments):
        network = make(name, arguments).train()
        m = network.size_multiple
        network(torch.randn(2, 3, 2 * m, 2 * m)).square().mean().backward()
        unused = getattr(network, "UNUSED", ())
        without = [
            k
            for k, p in network.named_parameters()
            if p.grad is None and not any(re.search(pattern, k) for pattern in unused)
        ]
        assert not without

    def test_can_be_traced(self, name, arguments):
        network = make(name, arguments)
        traced = torch.fx.symbolic_trace(network)
        m = network.size_multiple
        x = torch.randn(1, 3, 2 * m, 3 * m)
        with torch.inference_mode():
            assert torch.equal(network(x), traced(x))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"network 'nope' is unknown; choose one of: .*roadnet"):
        networks.create("nope", classes=3)


@pytest.mark.parametrize("classes", [0, 256, "3"])
def test_a_class_count_that_does_not_fit_a_byte_is_refused(classes):
    with pytest.raises(ValueError, match="classes must be an integer from 1 to 255"):
        networks.create("roadnet", classes=classes)


def test_an_argument_the_architecture_lacks_is_refused():
    with pytest.raises(ValueError, match="network 'roadnet' refuses its arguments"):
        networks.create("roadnet", classes=3, depth=9)


def test_roadnet_has_about_a_million_parameters():
    count = sum(p.numel() for p in networks.create("roadnet", classes=12).parameters())
    assert 0.7e6 < count < 1.2e6
