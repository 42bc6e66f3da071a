"""Edge networks in ONNX Runtime against torch; what cannot be exported is named."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch

import networks
from export import edges
from export.build import build
from export.errors import ExportError
from networks.pack import PackSpec, write_pack

CASES = [
    ("casenet", {"depth": 14, "width": 8}, 3),
    ("casenet_light", {"scale": 0.5}, 19),
    ("casenet", {"depth": 14, "width": 8}, 1),
]


def make(name, arguments, classes):
    torch.manual_seed(0)
    network = networks.create(name, classes=classes, **arguments).eval()
    with torch.no_grad():
        for key, p in network.named_parameters():
            if "score" in key or "ce_fusion" in key:
                p.add_(0.2 * torch.randn(p.shape))
    spec = PackSpec(
        name="edges", version="1.0.0", network=name, arguments=arguments, task="edges",
        classes=tuple(f"c{k}" for k in range(classes)), colours=((0, 0, 0),) * classes, size=(48, 64),
        mean=(0.41, 0.46, 0.48), std=(1 / 255,) * 3 if name == "casenet" else (0.2,) * 3,
        channel_order="bgr", training="none", licence="Apache-2.0",
    )  # fmt: skip
    return network, spec


def frames(n=2, size=(48, 64)):
    return np.random.default_rng(1).integers(0, 256, (n, *size, 3), np.uint8)


@pytest.mark.parametrize(("name", "arguments", "classes"), CASES)
def test_the_engine_answers_as_torch_does(name, arguments, classes):
    network, spec = make(name, arguments, classes)
    model = edges.write(network, spec, size=(48, 64), batch=None, thresholds=0.4)
    report = edges.compare(model, network, spec, frames(), thresholds=0.4)
    assert report["edges_max_difference"] <= 1
    assert report["bits_equal"] > 0.999
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    fusion = next(i for i in model.graph.initializer if i.name.endswith("ce_fusion.weight"))
    assert list(fusion.dims) == [classes, classes + 3, 1, 1]
    assert not any(n.op_type == "BatchNormalization" for n in model.graph.node)
    assert convolutions


def test_bits_are_the_bytes_over_their_thresholds():
    network, spec = make("casenet_light", {"scale": 0.5}, 19)
    thresholds = np.linspace(0.2, 0.8, 19)
    graph = edges.EdgeServingGraph(network, spec, thresholds)
    with torch.inference_mode():
        byte, bits = (t.numpy() for t in graph(torch.from_numpy(frames(1))))
    for k, t in enumerate(thresholds):
        on = (bits[0] >> k) & 1 == 1
        sure = np.abs(byte[0, k] / 255 - t) > 1 / 255
        assert (on == (byte[0, k] / 255 >= t))[sure].all()
    assert byte.dtype == np.uint8
    assert bits.dtype == np.int32


def test_refusals_are_named():
    network, spec = make("casenet", {"depth": 14, "width": 8}, 3)
    with pytest.raises(ExportError, match="multiple of 8"):
        edges.write(network, spec, size=(50, 64))
    with pytest.raises(ExportError, match="thresholds"):
        edges.write(network, spec, size=(48, 64), thresholds=[0.5, 0.5])
    with pytest.raises(ExportError, match="31 fit"):
        edges.write(*make("casenet", {"depth": 14, "width": 8}, 32), size=(48, 64))
    with pytest.raises(ExportError, match="RoadNet has no sides"):
        edges.write(networks.create("roadnet", classes=3, width=8), spec, size=(64, 64))


def test_the_command_writes_a_checked_file_and_build_points_to_it(tmp_path, capsys):
    network, spec = make("casenet", {"depth": 14, "width": 8}, 3)
    pack = write_pack(tmp_path / "pack", spec, network.state_dict(), golden=frames())
    assert edges.main([str(pack.path), "--out", str(tmp_path / "e.onnx"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frames"] == 2
    assert report["size"] == [48, 64]
    onnx.checker.check_model(onnx.load(tmp_path / "e.onnx"))
    with pytest.raises(ExportError, match=r"export\.edges"):
        build(pack, tmp_path / "repository")
    assert edges.main([str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
