"""Refit: the graph of one version, the weights of another pack, and nothing of the old weights left."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from export.build import Options, build
from export.errors import ExportError
from export.graph.contract import ServingGraph
from export.graph.fold import Folding
from export.graph.half import to_half
from export.graph.writer import write
from export.refit import main, refit, replace_weights
from networks.pack import write_pack
from runtime.repository.repository import Repository

from .conftest import describe, street_like, weights


@pytest.fixture
def adapted(make_pack, pack):
    """Same network, every weight different."""
    return make_pack("adapted", golden=street_like(), seed=7, version="1.1.0", parent=pack.sha256)


@pytest.fixture
def repository(pack, tmp_path):
    build(pack, tmp_path / "repo")
    return tmp_path / "repo"


def answers(path, frames):
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["labels", "confidence", "probabilities"], {"frame": frames})


def test_the_new_version_is_what_a_full_build_would_give(repository, adapted, tmp_path):
    refitted = refit(repository, "tiny", 1, adapted)
    built = build(adapted, tmp_path / "other")
    ours, theirs = (onnx.load(p.path / "model.onnx") for p in (refitted, built))
    assert ours == theirs
    assert refitted.version == 2
    assert refitted.manifest["pack"]["sha256"] == adapted.sha256
    assert refitted.manifest["engine"]["refit_of"] == 1
    assert Repository(repository).verify("tiny", 2)["parity"]["passed"]


def test_it_answers_with_the_new_weights_and_not_with_the_old(repository, pack, adapted):
    frames = street_like(2)[:, :, ::-1].copy()
    refitted = refit(repository, "tiny", 1, adapted)
    with torch.inference_mode():
        old, new = (
            [y.numpy() for y in ServingGraph(p.network(), p.spec)(torch.from_numpy(frames))]
            for p in (pack, adapted)
        )
    labels, _, probabilities = answers(refitted.path, frames)
    # The two packs disagree, or the test would show nothing.
    assert (old[0] == new[0]).mean() < 0.9
    assert (labels == new[0]).mean() > 0.999
    assert np.allclose(probabilities, new[2], atol=1e-4)


def test_the_version_that_is_refitted_stays_as_it_is(repository, adapted):
    before = Repository(repository).manifest("tiny", 1)["digest"]
    refit(repository, "tiny", 1, adapted)
    assert Repository(repository).verify("tiny", 1)["digest"] == before


def test_a_fixed_batch_stays_fixed(pack, adapted, tmp_path):
    build(pack, tmp_path / "r", options=Options(batch=1))
    refitted = refit(tmp_path / "r", "tiny", 1, adapted)
    assert not refitted.manifest["input"]["dynamic_batch"]
    assert onnx.load(refitted.path / "model.onnx").graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


class TestWhatIsRefused:
    def refused(self, repository, words, *arguments):
        before = sorted(p for p in repository.rglob("*"))
        with pytest.raises(ExportError, match=words) as caught:
            refit(repository, *arguments)
        assert "\n" not in str(caught.value)
        assert sorted(p for p in repository.rglob("*")) == before

    def test_another_width(self, repository, make_pack):
        other = make_pack(golden=street_like(), arguments={"width": 16})
        self.refused(repository, "the pack's arguments is {'width': 16}", "tiny", 1, other)

    def test_another_class_list(self, repository, tmp_path):
        spec = describe(classes=tuple(f"c{i}" for i in range(12)))
        other = write_pack(tmp_path / "c", spec, weights(spec))
        self.refused(repository, "the pack's classes is", "tiny", 1, other)

    def test_another_normalisation(self, repository, make_pack):
        other = make_pack(golden=street_like(), mean=(0.0, 0.0, 0.0))
        self.refused(repository, "the pack's mean is", "tiny", 1, other)

    def test_a_damaged_version(self, repository, adapted):
        file = repository / "tiny" / "1" / "model.onnx"
        file.write_bytes(file.read_bytes()[:-5])
        self.refused(repository, "version 1: hash: file 'model.onnx'", "tiny", 1, adapted)

    def test_a_version_that_is_not_there(self, repository, adapted):
        self.refused(repository, "version 9 of 'tiny' does not exist", "tiny", 9, adapted)

    def test_a_quantised_version(self, repository, adapted, monkeypatch):
        honest = Repository.read

        def quantised(self, model, version, **keywords):
            manifest, files = honest(self, model, version, **keywords)
            return {**manifest, "engine": {**manifest["engine"], "precision": "int8"}}, files

        monkeypatch.setattr(Repository, "read", quantised)
        self.refused(repository, "is int8: its weights carry scales", "tiny", 1, adapted)

    def test_a_graph_with_a_weight_that_the_pack_lacks(self, repository, adapted, monkeypatch):
        from export import refit as module

        class Forgetful(module.Folding):
            def weights(self, state):
                return {k: v for k, v in super().weights(state).items() if k != "classify.bias"}

        monkeypatch.setattr(module, "Folding", Forgetful)
        self.refused(
            repository,
            "1 weights of the engine are not in the pack, first 'classify.bias'",
            "tiny",
            1,
            adapted,
        )


def test_a_half_graph_takes_weights_that_fit_and_no_others(pack, adapted):
    """The graph beside a float16 plan; the one converted from the other weights is the reference."""
    graph, wanted = (to_half(write(p.network(), p.spec, size=p.spec.size, batch=1)) for p in (pack, adapted))
    new = Folding(adapted.network()).weights(adapted.state())
    replace_weights(graph, new)
    assert list(graph.graph.initializer) == list(wanted.graph.initializer)
    before = graph.SerializeToString()
    with pytest.raises(ExportError, match=r"weight 'classify\.bias' does not fit float16"):
        replace_weights(graph, {**new, "classify.bias": np.full(12, 1e6, np.float32)})
    assert graph.SerializeToString() == before


def test_command_line(repository, adapted, capsys):
    words = ["tiny", "1", str(adapted.path), "--repository", str(repository), "--threads", "1"]
    assert main(words) == 0
    assert "tiny version 2" in capsys.readouterr().out
    assert main(["tiny", "9", *words[2:]]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*words[:3], "--repository", str(repository / "nowhere")]) == 1
    assert not (repository / "nowhere").exists()


def test_the_parent_is_in_the_manifest(repository, adapted, pack):
    assert refit(repository, "tiny", 1, adapted).manifest["pack"]["parent"] == pack.sha256
    assert dataclasses.asdict(adapted.spec)["parent"] == pack.sha256
