"""What export.inspect says about packs, versions and foreign files, against facts known otherwise."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from export.build import build
from export.describe import rounds_of
from export.errors import ExportError
from export.inspect import inspect, main, show_round
from export.parity.samples import sample_inputs
from networks.pack import load_pack
from runtime.repository.repository import Repository

from .conftest import street_like


@pytest.fixture
def version(pack, tmp_path):
    return build(pack, tmp_path / "repo").path


@pytest.fixture
def foreign(tmp_path):
    """Not ours: NCHW float in, an operator TensorRT lacks, no metadata."""
    info = helper.make_tensor_value_info
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("BitShift", ["x", "s"], ["y"], direction="LEFT")],
            "foreign",
            [info("x", TensorProto.UINT32, ["batch", 3, "h", "w"])],
            [info("y", TensorProto.UINT32, ["batch", 3, "h", "w"])],
            [onnx.numpy_helper.from_array(np.uint32([1]), "s")],
        ),
        opset_imports=[helper.make_opsetid("", 16)],
        producer_name="somebody",
        ir_version=8,
    )
    file = tmp_path / "foreign.onnx"
    onnx.save(model, file)
    return file


def test_a_pack(pack):
    report = inspect(pack.path)
    assert report["kind"] == "pack"
    assert report["sha256"] == load_pack(pack.path).sha256
    assert report["parameters"] == sum(t.numel() for t in pack.state().values() if t.is_floating_point())
    assert report["golden"] == 3
    assert report["replay"] == {"train": 0, "holdout": 0}


def test_a_version(version, pack):
    report = inspect(version)
    assert (report["kind"], report["intact"]) == ("version", True)
    assert report["manifest"]["pack"]["sha256"] == pack.sha256
    graph = report["onnx"]
    assert graph["inputs"] == [{"name": "frame", "type": "UINT8", "shape": ["N", 64, 96, 3]}]
    assert [o["name"] for o in graph["outputs"]] == ["labels", "confidence", "probabilities"]
    assert graph["refittable"]
    assert graph["tensorrt"]["errors"] == []
    proto = onnx.load(version / "model.onnx")
    assert graph["nodes"] == sum(graph["operators"].values()) == len(proto.graph.node)


def test_a_damaged_version_is_said_to_be_damaged(version, capsys):
    file = version / "golden.npz"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    report = inspect(version)
    assert not report["intact"]
    assert "golden.npz" in report["damage"]
    assert main([str(version)]) == 1
    out, err = capsys.readouterr()
    assert "DAMAGED" in out
    assert err.count("\n") == 1


def test_lineage_follows_parents_through_the_repository(make_pack, tmp_path):
    repository = tmp_path / "repo"
    first = make_pack("a", golden=street_like())
    second = make_pack("b", golden=street_like(), seed=1, version="1.1.0", parent=first.sha256)
    lost = make_pack("c", golden=street_like(), seed=2, version="9.0.0", parent="f" * 64)
    for pack in (first, second, lost):
        build(pack, repository, model="road")
    Repository(repository).append_history("road", {"version": 2, "state": "LIVE"})
    report = inspect(repository / "road" / "2", lineage=True)
    assert [(e["version"], e.get("engine_version")) for e in report["lineage"]] == [
        ("1.1.0", 2),
        ("1.0.0", 1),
    ]
    assert report["history"] == [{"version": 2, "state": "LIVE"}]
    orphan = inspect(repository / "road" / "3", lineage=True)["lineage"]
    assert orphan[1]["sha256"] == "f" * 64
    assert "engine_version" not in orphan[1]


def test_a_foreign_file(foreign):
    report = inspect(foreign)
    assert (report["kind"], report["producer"]) == ("onnx", "somebody")
    assert report["inputs"][0]["shape"] == ["batch", 3, "h", "w"]
    assert not report["refittable"]
    assert any("BitShift" in e for e in report["tensorrt"]["errors"])


def test_a_profile_names_the_operators(version, foreign):
    profile = inspect(version / "model.onnx", profile=True)["profile"]
    assert profile["ms"] > 0
    assert "Conv" in profile["operators_ms"]
    shapes = {k: v.shape for k, v in sample_inputs(onnx.load(foreign), (16, 32)).items()}
    assert shapes == {"x": (1, 3, 16, 32)}


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x07"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path, content, capsys):
    file = tmp_path / "x.onnx"
    file.write_bytes(content)
    with pytest.raises(ExportError, match="is not an ONNX file"):
        inspect(file)
    assert main([str(file)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_nothing_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"is no pack .* no engine version"):
        inspect(tmp_path)


@pytest.mark.parametrize("lineage", [[], ["--lineage"]])
def test_every_kind_prints_for_a_person_and_as_json(pack, version, foreign, capsys, lineage):
    for path in (pack.path, version, foreign):
        assert main([str(path), *lineage]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 5
        assert main([str(path), "--json", *lineage]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] in ("pack", "version", "onnx")


def test_which_round_broke_it(tmp_path, capsys):
    """Every version with what its gate measured and what became of it."""
    home = Repository(tmp_path)
    measures = {"candidate": {"source": 0.41, "flip": 0.7}, "parent": {"source": 0.6, "flip": 0.9}}
    rounds = (
        {},
        {"round": "aaaa", "chosen": "train-2", "distance": 0.02, "measures": measures},
        {"round": "bbbb", "chosen": "train-1", "distance": 0.4, "measures": "not what was expected"},
    )
    for made in rounds:
        staged = home.stage("road")
        (staged / "model.onnx").write_bytes(b"engine")
        pack = {"sha256": made.get("round", "source"), "parent": "source" if made else ""}
        gate = {"passed": True, "failed": []}
        home.publish("road", staged, {"adaptation": made, "gate": gate, "pack": pack})
    states = ((2, "LIVE", ""), (2, "ROLLED_BACK", "watch-confidence"), (3, "REJECTED", "golden"))
    for version, state, check in states:
        line = {"version": version, "state": state, "check": check, "reason": "so low"}
        home.append_history("road", line)
    found = rounds_of(home, "road")
    assert [(r["version"], r["round"], r["state"], r["check"]) for r in found] == [
        (1, "", "", ""),
        (2, "aaaa", "ROLLED_BACK", "watch-confidence"),
        (3, "bbbb", "REJECTED", "golden"),
    ]
    assert "source mIoU 60.0 -> 41.0" in show_round(found[1])
    assert "moved 2.0%" in show_round(found[1])
    assert "the released pack" in show_round(found[0])
