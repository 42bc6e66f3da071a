"""Every architecture as a served graph: exact folding, agreement with torch, kept names, plain operators.

Torch's own folding formula and torch's float32 answers are the references.  Published forms of the larger
networks are marked slow.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import networks
from export.graph.contract import ServingGraph
from export.graph.fold import Folding
from export.graph.lint import lint
from export.graph.writer import write
from networks.labels import STREET
from networks.pack import PackSpec, load_pack, write_pack

ort = pytest.importorskip("onnxruntime")

CLASSES = len(STREET.classes)


def heavy(name, arguments):
    with torch.device("meta"):
        return sum(p.numel() for p in networks.create(name, classes=2, **arguments).parameters()) > 2e6


WHOLE = [
    pytest.param(name, {}, id=f"{name}-whole", marks=pytest.mark.slow)
    for name in ("deeplabv2", "fcn8s", "resnet38")
]
CASES = [
    pytest.param(
        name, arguments, id=f"{name}-{arguments}", marks=[pytest.mark.slow] if heavy(name, arguments) else []
    )
    for name in networks.names()
    for arguments in networks.architecture(name).EXAMPLES
] + WHOLE


def make(name, arguments):
    """A network whose batch normalisations do something: statistics and scales away from 0 and 1."""
    torch.manual_seed(0)
    network = networks.create(name, classes=CLASSES, **arguments).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return network


def size_of(network):
    m = max(network.size_multiple, 32)
    return 2 * m, 3 * m


def describe(name, arguments):
    return PackSpec(
        name="zoo",
        version="1.0.0",
        network=name,
        task=networks.architecture(name).TASK,
        arguments=arguments,
        classes=STREET.classes,
        colours=STREET.colours,
        size=size_of(networks.architecture(name)),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        training="random weights",
        licence="Apache-2.0",
    )


def values(network, batch=1):
    return torch.randn(batch, 3, *size_of(network), generator=torch.Generator().manual_seed(1))


def frames(network, batch):
    return np.random.default_rng(2).integers(0, 256, (batch, *size_of(network), 3), np.uint8)


def session(model):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def pairs(network):
    """(convolution, normalisation) where the one feeds the other and nothing else, by tracing."""
    traced = torch.fx.symbolic_trace(network)
    modules = dict(network.named_modules())
    for node in traced.graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        single = before.op == "call_module" and len(before.users) == 1
        if single and isinstance(modules[before.target], nn.Conv2d):
            yield before.target, node.target


@pytest.fixture(scope="module")
def models():
    """One export for all tests of a case."""
    cache = {}

    def get(name, arguments):
        key = (name, repr(arguments))
        if key not in cache:
            network, spec = make(name, arguments), describe(name, arguments)
            made = network, spec, write(network, spec, size=spec.size, batch=None)
            if heavy(name, arguments):  # hundreds of megabytes: not kept
                return made
            cache[key] = made
        return cache[key]

    return get


@pytest.mark.parametrize(("name", "arguments"), CASES)
class TestEveryNetworkAsAGraph:
    def test_folded_weights_are_those_of_torchs_own_formula(self, name, arguments):
        network = make(name, arguments).double()
        modules = dict(network.named_modules())
        folded = Folding(network).weights(network.state_dict())
        for conv, norm in pairs(network):
            with torch.no_grad():
                fused = fuse_conv_bn_eval(modules[conv], modules[norm])
            bias = f"{conv}.bias" if modules[conv].bias is not None else f"{norm}.bias"
            for key, wanted in ((f"{conv}.weight", fused.weight), (bias, fused.bias)):
                wanted = wanted.detach().numpy()
                assert np.allclose(folded[key], wanted, rtol=1e-6, atol=1e-7 * np.abs(wanted).max())

    def test_onnx_runtime_agrees_whatever_the_batch(self, name, arguments, models):
        network, spec, model = models(name, arguments)
        run = session(model)
        for batch in (1, 2):
            x = frames(network, batch)
            with torch.inference_mode():
                wanted = [y.numpy() for y in ServingGraph(network, spec)(torch.from_numpy(x))]
            names = [o.name for o in run.get_outputs()]
            for output, given, truth in zip(names, run.run(names, {"frame": x}), wanted, strict=True):
                if output == "probabilities":
                    assert np.abs(given - truth).max() < 1e-4
                elif output in ("confidence", "edges"):
                    assert np.abs(given.astype(int) - truth).max() <= 1
                else:
                    assert (given == truth).mean() > 0.999

    def test_initialisers_are_the_state_dict_by_name(self, name, arguments, models):
        network, _, model = models(name, arguments)
        state = network.state_dict()
        found = {i.name: tuple(i.dims) for i in model.graph.initializer if not i.name.startswith("const.")}
        assert set(found) <= set(state)
        served = network.fused().state_dict()  # a fusion that is dense has more entries
        shapes = {k: (found[k], tuple(served[k].shape)) for k in found}
        assert all(np.prod(ours) == np.prod(theirs) for ours, theirs in shapes.values())
        # Every weight is there, but for the scale of a folded normalisation, which the convolution took.
        unused = re.compile("|".join(getattr(network, "UNUSED", ()) or ["$^"]))
        gone = {f"{norm}.weight" for _, norm in pairs(network)}
        gone |= {f"{norm}.bias" for conv, norm in pairs(network) if f"{conv}.bias" in state}
        wanted = {k for k, _ in network.named_parameters() if not unused.search(k)} - gone
        assert set(found) == wanted

    def test_operators_are_those_tensorrt_documents(self, name, arguments, models):
        _, _, model = models(name, arguments)
        findings = lint(model)
        assert not findings.errors
        assert not findings.warnings

    def test_evaluation_is_deterministic(self, name, arguments):
        network = make(name, arguments)
        x = values(network)
        with torch.inference_mode():
            assert torch.equal(network(x), network(x))

    def test_the_gradient_is_not_zero_for_any_parameter(self, name, arguments):
        network = make(name, arguments)
        network(values(network, 2)).square().mean().backward()
        unused = re.compile("|".join(getattr(network, "UNUSED", ()) or ["$^"]))
        dead = [
            key
            for key, p in network.named_parameters()
            if not unused.search(key) and (p.grad is None or not p.grad.any())
        ]
        assert not dead

    def test_survives_a_pack(self, name, arguments, tmp_path):
        network = make(name, arguments)
        x = values(network)
        spec = describe(name, arguments)
        write_pack(tmp_path / "pack", spec, network.state_dict())
        with torch.inference_mode():
            assert torch.equal(load_pack(tmp_path / "pack").network()(x), network(x))
