"""Edge and joint packs become versions like any other; what cannot be served is named.

Torch on the network's own (grouped) fusion is the reference; the engine has the dense one.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from google.protobuf import text_format

import networks
from export import inspect
from export.build import Options, build, main
from export.errors import ExportError
from export.graph.contract import ServingGraph
from export.graph.lint import lint
from export.graph.writer import write
from export.parity.parity import Thresholds
from export.pipeline import contract_of
from export.refit import refit
from networks.pack import PackError, PackSpec, load_pack, normalise, write_pack
from runtime.repository.repository import Repository

SIZE = (64, 64)
CASES = {
    "casenet": ("casenet", {"depth": 14, "width": 8}, 3, "edges"),
    "light": ("casenet_light", {"scale": 0.5}, 19, "edges"),
    "one class": ("casenet", {"depth": 14, "width": 8}, 1, "edges"),
    "joint": ("espnetv2_edges", {"scale": 0.5}, 4, "joint"),
    "joint, other edges": ("espnetv2_edges", {"scale": 0.5, "edge_classes": 2}, 4, "joint"),
}


def make(case, seed=0, **changes):
    name, arguments, classes, task = CASES[case]
    torch.manual_seed(seed)
    network = networks.create(name, classes=classes, **arguments).eval()
    with torch.no_grad():
        for key, p in network.named_parameters():
            if "score" in key or "ce_fusion" in key:
                p.add_(0.2 * torch.randn(p.shape))
    fields = {
        "name": "city",
        "version": "1.0.0",
        "network": name,
        "arguments": arguments,
        "task": task,
        "classes": tuple(f"c{k}" for k in range(classes)),
        "colours": ((0, 0, 0),) * classes,
        "size": SIZE,
        "mean": (0.41, 0.46, 0.48),
        "std": (1 / 255,) * 3 if name == "casenet" else (0.2,) * 3,
        "channel_order": "bgr",
        "training": "none",
        "licence": "Apache-2.0",
        "edge_classes": ("kerb", "pole") if "other" in case else (),
    }
    return network, PackSpec(**{**fields, **changes})


def frames(n=2, size=SIZE):
    return np.random.default_rng(1).integers(0, 256, (n, *size, 3), np.uint8)


@pytest.fixture
def pack_of(tmp_path):
    def pack(case, seed=0, golden=2, reference=None, **changes):
        network, spec = make(case, seed, **changes)
        path = tmp_path / f"pack-{case}-{seed}-{len(list(tmp_path.iterdir()))}"
        given = frames(golden) if golden else None
        return write_pack(path, spec, network.state_dict(), golden=given, reference=reference)

    return pack


def session(path):
    return ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])


def by_hand(network, spec, x, thresholds):
    """edges and edge_bits from the definition, a loop over the classes, on the network's own forward."""
    with torch.inference_mode():
        logits = network.sides(normalise(torch.from_numpy(x), spec))[1]
        p = F.interpolate(logits, size=x.shape[1:3], mode="bilinear", align_corners=False).double().sigmoid()
    p = p.numpy()
    bits = np.zeros(p[:, 0].shape, np.int64)
    for k, t in enumerate(thresholds):
        bits += (p[:, k] >= t).astype(np.int64) * 2**k
    return p, bits


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c == "joint" else c for c in CASES]
)  # "joint, other edges" is a joint network too, and the harder one
class TestEveryKind:
    def test_a_version_answers_what_its_pack_does(self, case, pack_of, tmp_path):
        pack = pack_of(case)
        thresholds = tuple(float(t) for t in np.linspace(0.3, 0.7, pack.network().edge_count))
        result = build(pack, tmp_path / "repo", options=Options(edge_thresholds=thresholds, threads=1))
        manifest = Repository(tmp_path / "repo").verify("city", 1)
        names = list(pack.spec.edge_classes or pack.spec.classes)
        assert manifest["task"] == pack.spec.task
        assert manifest["edge_classes"] == names
        assert manifest["edge_thresholds"] == list(thresholds)
        assert manifest["classes"] == list(pack.spec.classes)
        parity = manifest["parity"]
        assert parity["passed"]
        assert parity["frames"] == 2
        assert parity["edges_max_difference"] <= 1
        assert parity["bits_equal"] > 0.999
        assert {"edges_mean_difference", "mf_difference"} <= set(parity)
        assert ("agreement" in parity) == (pack.spec.task == "joint")
        x = frames(2)[:, ::-1].copy()
        probability, bits = by_hand(pack.network(), pack.spec, x, thresholds)
        given = session(result.path).run(["edges", "edge_bits"], {"frame": x})
        assert np.abs(given[0] - 255 * probability).max() <= 0.51
        assert given[0].dtype == np.uint8
        assert given[1].dtype == np.int32
        clear = (np.abs(probability - np.array(thresholds)[:, None, None]) > 1e-5).all(1)
        assert clear.mean() > 0.99
        assert np.array_equal(given[1][clear], bits[clear])

    def test_the_graph_is_plain_and_its_weights_keep_their_names(self, case):
        network, spec = make(case)
        model = write(network, spec, size=SIZE, batch=None)
        found = lint(model)
        assert not found.errors
        assert not found.warnings
        held = {i.name: list(i.dims) for i in model.graph.initializer if not i.name.startswith("const.")}
        assert set(held) <= set(network.state_dict())
        fusion = next(dims for name, dims in held.items() if name.endswith("ce_fusion.weight"))
        assert fusion == [network.edge_count, network.edge_count + 3, 1, 1]
        assert not any(n.op_type in ("BatchNormalization", "Softmax") for n in model.graph.node)

    def test_the_golden_file_holds_torchs_answers(self, case, pack_of, tmp_path):
        pack = pack_of(case)
        result = build(pack, tmp_path / "repo", options=Options(threads=1))
        contract = contract_of(pack, pack.network(), Options())
        with np.load(result.path / "golden.npz") as file:
            golden = {name: file[name] for name in file.files}
        assert set(golden) == {"frames", *contract.compared}
        graph = ServingGraph(pack.network(), pack.spec)
        for i, frame in enumerate(golden["frames"]):
            with torch.inference_mode():
                given = graph(torch.from_numpy(frame[None]))
            wanted = dict(zip(contract.outputs, given, strict=True))
            for name in contract.compared:
                assert np.array_equal(golden[name][i], wanted[name][0].numpy())

    def test_any_batch_and_any_legal_size(self, case, pack_of, tmp_path):
        pack, m = pack_of(case), networks.architecture(CASES[case][0]).size_multiple
        size = (2 * max(m, 32), 32)
        build(pack, tmp_path / "repo", options=Options(size=size, batch=2, threads=1))
        result = build(pack, tmp_path / "repo", options=Options(size=size, threads=1))
        for version, batch in ((1, 2), (2, 3)):
            run = session(result.path.parent / str(version))
            edges, bits = run.run(["edges", "edge_bits"], {"frame": frames(batch, size)})
            assert edges.shape == (batch, pack.network().edge_count, *size)
            assert bits.shape == (batch, *size)

    def test_a_refit_is_what_a_build_would_be(self, case, pack_of, tmp_path):
        first, other = pack_of(case), pack_of(case, seed=5)
        options = Options(threads=1, edge_thresholds=0.6)
        build(first, tmp_path / "repo", options=options)
        refitted = refit(tmp_path / "repo", "city", 1, other, threads=1)
        built = build(other, tmp_path / "other", options=options)
        assert onnx.load(refitted.path / "model.onnx") == onnx.load(built.path / "model.onnx")
        assert refitted.manifest["edge_thresholds"] == built.manifest["edge_thresholds"]
        assert refitted.manifest["parity"]["passed"]


def test_one_backbone_for_both_heads():
    """A joint graph has the convolutions of one encoder, not of two."""
    network, spec = make("joint")
    convolutions = {}
    for task in ("segmentation", "edges", "joint"):
        graph = write(network, PackSpec(**{**vars(spec), "task": task}), size=SIZE)
        convolutions[task] = {n.input[1] for n in graph.graph.node if n.op_type == "Conv"}
    assert convolutions["joint"] == convolutions["segmentation"] | convolutions["edges"]
    assert len(convolutions["segmentation"] & convolutions["edges"]) > 20


def test_a_task_can_be_chosen_and_the_pack_decides_else(pack_of, tmp_path):
    pack = pack_of("joint")
    for task, outputs in (
        ("segmentation", ["labels", "confidence", "probabilities"]),
        ("edges", ["edge_bits", "edges"]),
        (None, ["labels", "confidence", "probabilities", "edge_bits", "edges"]),
    ):
        result = build(pack, tmp_path / "repo", options=Options(task=task, threads=1))
        assert [o.name for o in session(result.path).get_outputs()] == outputs
        assert result.manifest["task"] == (task or "joint")
        assert ("edge_classes" in result.manifest) == (task != "segmentation")


def test_edges_of_other_classes_have_neither_colours_nor_statistics_of_the_labels(pack_of, tmp_path):
    reference = {"share": np.full(4, 1 / 4), "confidence": np.ones((4, 256), np.int64)}
    pack = pack_of("joint, other edges", reference=reference)
    edges = build(pack, tmp_path / "repo", options=Options(task="edges", threads=1)).manifest
    joint = build(pack, tmp_path / "repo", options=Options(threads=1)).manifest
    assert (edges["classes"], edges["colours"]) == (["kerb", "pole"], [])
    assert "reference.npz" not in edges["files"]
    assert len(joint["colours"]) == 4
    assert "reference.npz" in joint["files"]


def test_thresholds_come_from_the_pack_unless_given(pack_of, tmp_path):
    pack = pack_of("casenet", edge_thresholds=(0.2, 0.3, 0.4))
    assert load_pack(pack.path).spec.edge_thresholds == (0.2, 0.3, 0.4)
    own = build(pack, tmp_path / "repo", options=Options(threads=1))
    given = build(pack, tmp_path / "repo", options=Options(threads=1, edge_thresholds=0.9))
    assert own.manifest["edge_thresholds"] == [0.2, 0.3, 0.4]
    assert given.manifest["edge_thresholds"] == [0.9] * 3


def test_golden_frames_are_fewer_where_edge_maps_are_large(pack_of, tmp_path, monkeypatch):
    from export.parity import golden

    monkeypatch.setattr(golden, "LARGEST_EDGES", 2 * 19 * SIZE[0] * SIZE[1])
    pack = pack_of("light", golden=5)
    result = build(pack, tmp_path / "repo", options=Options(threads=1))
    assert result.manifest["parity"]["frames"] == 2
    with np.load(result.path / "golden.npz") as file:
        assert np.array_equal(file["frames"], pack.golden()[[0, 4]])


def test_source_statistics_travel_with_the_version(pack_of, tmp_path):
    reference = {"share": np.full(3, 1 / 3), "confidence": np.ones((3, 256), np.int64)}
    pack = pack_of("casenet", reference=reference)
    result = build(pack, tmp_path / "repo", options=Options(threads=1))
    again = refit(tmp_path / "repo", "city", 1, pack, threads=1)
    for version in (result, again):
        assert (version.path / "reference.npz").read_bytes() == (pack.path / "reference.npz").read_bytes()
        assert "reference.npz" in version.manifest["files"]


def test_tritons_own_schema_reads_the_configuration(pack_of, tmp_path):
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    build(pack_of("joint"), tmp_path / "repo", options=Options(threads=1))
    text = (tmp_path / "repo" / "city" / "config.pbtxt").read_text()
    config = text_format.Parse(text, schema.ModelConfig())
    found = {o.name: (o.data_type, list(o.dims)) for o in config.output}
    assert found["edges"] == (schema.TYPE_UINT8, [4, *SIZE])
    assert found["edge_bits"] == (schema.TYPE_INT32, list(SIZE))
    assert found["labels"] == (schema.TYPE_UINT8, list(SIZE))


@pytest.mark.parametrize("case", ["casenet", pytest.param("joint", marks=pytest.mark.slow)])
def test_int8_is_judged_by_its_edges(case, pack_of, tmp_path):
    """Random weights have thin margins, so what is asked for is little; and what is missed is named."""
    little = Thresholds(0, 0, 255, edges_max=255, edges_mean=255, bits=0, mf=1)
    options = Options(precision="int8", threads=1, int8_frames=2, thresholds=little)
    strict = replace(little, edges_max=1, edges_mean=0.1)  # of edges alone: labels would be named first
    with pytest.raises(ExportError, match=r"int8 misses parity .*edge difference"):
        build(pack_of(case), tmp_path / "repo", options=replace(options, thresholds=strict, int8_budget=1e-9))
    result = build(pack_of(case), tmp_path / "repo", options=options)
    assert result.manifest["engine"]["int8"]["convolutions"]["int8"] > 10
    with np.load(result.path / "golden.npz") as file:
        given = session(result.path).run(["edge_bits"], {"frame": file["frames"]})[0]
        assert np.array_equal(given, file["edge_bits"])
        assert "torch_edge_bits" in file.files


class TestWhatIsRefused:
    def refused(self, words, pack, tmp_path, **options):
        with pytest.raises(ExportError, match=words) as caught:
            build(pack, tmp_path / "repo", options=Options(threads=1, **options))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "repo").exists()

    @pytest.mark.parametrize("limits", [0.0, 1.0, -1.0, float("nan"), (0.5, 0.5), (0.1, 0.2, 0.3, 1.5)])
    def test_thresholds_that_are_none(self, limits, pack_of, tmp_path):
        self.refused("edge thresholds .* between 0 and 1", pack_of("joint"), tmp_path, edge_thresholds=limits)

    def test_thresholds_of_a_segmentation(self, pack_of, tmp_path):
        self.refused(
            "what is served is a segmentation",
            pack_of("joint"),
            tmp_path,
            task="segmentation",
            edge_thresholds=0.5,
        )

    def test_a_task_the_network_does_not_have(self, pack_of, tmp_path):
        self.refused(
            "casenet cannot be served for 'joint'; it has: edges", pack_of("casenet"), tmp_path, task="joint"
        )

    def test_more_classes_than_bits(self, pack_of, tmp_path, monkeypatch):
        monkeypatch.setitem(CASES, "many", ("casenet", {"depth": 14, "width": 8}, 32, "edges"))
        self.refused("32 edge classes: .* 31 fit", pack_of("many"), tmp_path)

    def test_edge_classes_without_names(self, pack_of, tmp_path):
        self.refused(
            "answers 2 edge classes and the pack names 4",
            pack_of("joint, other edges", edge_classes=()),
            tmp_path,
        )

    def test_a_size_the_network_cannot_take(self, pack_of, tmp_path):
        self.refused("must be a multiple of 8", pack_of("casenet"), tmp_path, size=(50, 64))

    def test_a_refit_of_another_network(self, pack_of, tmp_path):
        build(pack_of("casenet"), tmp_path / "repo", options=Options(threads=1))
        with pytest.raises(ExportError, match="the pack's network is casenet_light, the engine's casenet"):
            refit(tmp_path / "repo", "city", 1, pack_of("light"), threads=1)

    @pytest.mark.parametrize(
        ("words", "changes"),
        [
            ("numbers between 0 and 1", {"edge_thresholds": (0.5, 1.0, 0.5)}),
            ("2 entries for 3 edge classes", {"edge_thresholds": (0.5, 0.5)}),
            ("distinct names", {"edge_classes": ("a", "a", "b")}),
        ],
    )
    def test_a_description_that_cannot_be(self, words, changes):
        with pytest.raises(PackError, match=words):
            make("casenet", **changes)


class TestCommandLine:
    def test_a_person_reads_what_was_compared(self, pack_of, tmp_path, capsys):
        words = [str(pack_of("joint").path), "--repository", str(tmp_path / "r"), "--threads", "1"]
        assert main([*words, "--edge-threshold", "0.4"]) == 0
        out = capsys.readouterr().out
        assert "labels 100" in out
        assert "bit fields 100.0000 % equal" in out
        assert "MF differs by 0.00000" in out
        assert inspect.main([str(tmp_path / "r" / "city" / "1")]) == 0
        out = capsys.readouterr().out
        assert "joint" in out
        assert "edges       4: c0 0.4, c1 0.4, c2 0.4, c3 0.4" in out
        assert "bit fields 100.0000 %" in out

    def test_a_threshold_that_is_none_is_one_line(self, pack_of, tmp_path, capsys):
        words = [str(pack_of("casenet").path), "--repository", str(tmp_path / "r")]
        assert main([*words, "--edge-threshold", "1.2"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert main([*words, "--min-bits", "1.5"]) == 1
        assert "equal edge bit fields" in capsys.readouterr().err
        assert not (tmp_path / "r").exists()

    def test_json_says_it_all(self, pack_of, tmp_path, capsys):
        words = [str(pack_of("casenet").path), "--repository", str(tmp_path / "r"), "--json"]
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)["manifest"]["edge_thresholds"] == [0.5] * 3
