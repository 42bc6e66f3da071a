"""Files and repositories that somebody made to break an export: one line, code 1, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from export.build import Options, build, main
from export.graph.lint import lint
from export.inspect import main as inspect_main
from export.publish import foreign
from export.refit import main as refit_main
from protos import model_config_pb2
from runtime.repository.manifest import digest
from runtime.repository.repository import Repository
from tests.waits import PATIENCE

ROOT = Path(__file__).resolve().parents[3]
VALUE = helper.make_tensor_value_info
FLOAT = TensorProto.FLOAT


def graph(nodes, dims=(1, 3, 4, 4), names=("x", "y"), held=()):
    inputs, outputs = [VALUE(names[0], FLOAT, dims)], [VALUE(names[1], FLOAT, dims)]
    made = helper.make_graph(nodes, "g", inputs, outputs, list(held))
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def relu(dims=(1, 3, 4, 4), names=("x", "y")):
    return graph([helper.make_node("Relu", [names[0]], [names[1]])], dims, names)


def elsewhere(location="../../../../etc/passwd"):
    """A weight whose values are in another file."""
    tensor = numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "36")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def conv(output):
    return helper.make_node("Conv", ["x", "w"], [output])


def in_a_constant(tensor):
    return graph([helper.make_node("Constant", [], ["w"], value=tensor), conv("y")])


def in_a_branch(tensor):
    branches = {
        key: helper.make_graph([conv(key)], key, [], [VALUE(key, FLOAT, None)], [tensor])
        for key in ("then_branch", "else_branch")
    }
    held = [numpy_helper.from_array(np.array(True), "c")]
    return graph([helper.make_node("If", ["c"], ["y"], **branches)], held=held)


def refused(capsys, tmp_path, model, *words):
    file = tmp_path / "model.onnx"
    if model is not None:
        file.write_bytes(model.SerializeToString())
    before = sorted(tmp_path.rglob("*"))
    code = main(["--onnx", str(file), "--name", "m", "--repository", str(tmp_path / "repo"), *words])
    out, err = capsys.readouterr()
    assert code == 1
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    return err


@pytest.mark.parametrize(
    "model",
    [graph([conv("y")], held=[elsewhere()]), in_a_constant(elsewhere()), in_a_branch(elsewhere())],
    ids=["initialiser", "constant", "branch"],
)
@pytest.mark.parametrize("location", ["../../../../etc/passwd", "beside.bin"])
def test_values_in_other_files_are_refused_wherever_they_hide(model, location, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative place is looked for here by some
    (tmp_path / "beside.bin").write_bytes(bytes(36))
    text = text_format.MessageToString(model).replace("../../../../etc/passwd", location)
    assert "in other files" in refused(capsys, tmp_path, text_format.Parse(text, onnx.ModelProto()))
    assert inspect_main([str(tmp_path / "model.onnx"), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["external"]) == {"w"}


@pytest.mark.parametrize("side", [10**9, 60000, -5])
def test_a_size_that_cannot_be_made_up(side, tmp_path, capsys):
    assert "can be made up" in refused(capsys, tmp_path, relu((1, 3, side, side)))


def test_a_graph_that_wants_terabytes_inside(tmp_path, capsys):
    held = [numpy_helper.from_array(np.array([10**6, 10**6], np.int64), "s")]
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["c"]),
        helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0),
        helper.make_node("Add", ["x", "r"], ["y"]),
    ]
    assert "does not run" in refused(capsys, tmp_path, graph(nodes, held=held))


def test_a_graph_that_loops_for_ever_is_given_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(foreign, "LONGEST", 0.5)
    once = [helper.make_node("Identity", ["c"], ["again"]), helper.make_node("Relu", ["v"], ["w"])]
    inputs = [VALUE("i", TensorProto.INT64, []), VALUE("c", TensorProto.BOOL, []), VALUE("v", FLOAT, None)]
    outputs = [VALUE("again", TensorProto.BOOL, []), VALUE("w", FLOAT, None)]
    held = [numpy_helper.from_array(np.array(2**62), "n"), numpy_helper.from_array(np.array(True), "true")]
    body = helper.make_graph(once, "b", inputs, outputs)
    loop = helper.make_node("Loop", ["n", "true", "x"], ["y"], body=body)
    assert "a loop without an end" in refused(capsys, tmp_path, graph([loop], held=held))


@pytest.mark.parametrize("name", ["x\ny", 'x"\n}\noutput {', "x\0", "\u2028"])
def test_tensor_names_cannot_break_out_of_the_configuration(name, tmp_path, capsys):
    assert "rename it" in refused(capsys, tmp_path, relu(names=(name, "y")))


def test_odd_tensor_names_are_quoted(tmp_path, capsys):
    names = ('a"b\\', "道路/é:0")
    (tmp_path / "m.onnx").write_bytes(relu(names=names).SerializeToString())
    assert main(["--onnx", str(tmp_path / "m.onnx"), "--name", "m", "--repository", str(tmp_path)]) == 0
    schema = model_config_pb2.ModelConfig()
    text_format.Parse((tmp_path / "m" / "config.pbtxt").read_text(), schema)
    assert (schema.input[0].name, schema.output[0].name) == names
    assert (len(schema.input), len(schema.output)) == (1, 1)


@pytest.mark.parametrize("words", [(), ("--labels",), ("--config",)])
def test_nobody_waits_for_a_pipe(words, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    if words:
        refused(capsys, tmp_path, relu(), *words, str(tmp_path / "pipe"))
    else:
        (tmp_path / "pipe").rename(tmp_path / "model.onnx")
        assert "no plain file" in refused(capsys, tmp_path, None)
        assert inspect_main([str(tmp_path / "model.onnx")]) == 1


def test_what_is_inside_a_branch_is_linted_too():
    branch = helper.make_graph([helper.make_node("Det", ["x"], ["t"])], "b", [], [VALUE("t", FLOAT, None)])
    held = [numpy_helper.from_array(np.array(True), "c")]
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    assert any("Det" in error for error in lint(graph([node], held=held)).errors)


def replaced(model, name, value):
    for entry in model.metadata_props:
        if entry.key == name:
            entry.value = value


@pytest.fixture(scope="module")
def built(pack, tmp_path_factory):
    repository = tmp_path_factory.mktemp("built") / "repo"
    build(pack, repository, options=Options(frames=1, threads=1))
    return repository


class TestAVersionThatOthersWrote:
    """Hashes and digest are right: whoever wrote it knows how to make them."""

    @pytest.fixture
    def tamper(self, built, tmp_path):
        def change(edit=None, graph=None):
            shutil.copytree(built, tmp_path / "repo")
            folder = tmp_path / "repo" / "tiny" / "1"
            manifest = json.loads((folder / "manifest.json").read_text())
            if graph is not None:
                (folder / "model.onnx").write_bytes(graph((folder / "model.onnx").read_bytes()))
            for name in manifest["files"]:
                content = (folder / name).read_bytes()
                sha = hashlib.sha256(content).hexdigest()
                manifest["files"][name] = {"sha256": sha, "bytes": len(content)}
            manifest |= edit or {}
            manifest["digest"] = digest(manifest)
            (folder / "manifest.json").write_text(json.dumps(manifest))
            return folder

        return change

    @pytest.mark.parametrize("key", ["pack", "parity", "input", "edge_classes", "gate", "task"])
    @pytest.mark.parametrize("value", ["text", 5, None, [1], {"frames": 3, "agreement": "x"}])
    def test_inspect_ends_in_one_line(self, key, value, tamper, capsys):
        folder = tamper({key: value})
        types = {"pack": dict, "input": dict, "edge_classes": list}  # the repository refuses others by name
        refused = value is not None and not isinstance(value, types.get(key, object))
        capsys.readouterr()
        assert inspect_main([str(folder), "--lineage", "--json"]) == int(refused)
        err = capsys.readouterr().err
        assert (key in err) if refused else err == ""
        assert inspect_main([str(folder), "--lineage"]) in ((1,) if refused else (0, 1))
        for line in (err, capsys.readouterr().err):
            assert line == "" or (line.startswith("error: ") and line.count("\n") == 1)

    @pytest.mark.parametrize(
        "edit",
        [
            {"input": None},
            {"input": {"height": 64}},
            {"input": {"height": "64", "width": []}},
            {"input": {"height": 10**9, "width": 10**9}},
            {"task": ["segmentation"]},
            {"edge_thresholds": "0.5"},
        ],
    )
    def test_refit_takes_nothing_from_it_unseen(self, edit, tamper, pack, capsys):
        self.refused(tamper(edit), pack, capsys)

    @pytest.mark.parametrize("text", ["{", "[]", "5", "{}", '{"network": 5}', "[" * 5000])
    def test_refit_reads_what_the_graph_says_of_itself_with_care(self, text, tamper, pack, capsys):
        def lie(content):
            model = onnx.ModelProto.FromString(content)
            replaced(model, "roadworthy.skeleton", text)
            return model.SerializeToString()

        self.refused(tamper(graph=lie), pack, capsys)

    @pytest.mark.parametrize("content", [b"", b"garbage"])
    def test_a_graph_that_is_none(self, content, tamper, pack, capsys):
        self.refused(tamper(graph=lambda _: content), pack, capsys)

    def refused(self, folder, pack, capsys):
        repository = folder.parent.parent
        words = ["tiny", "1", str(pack.path), "--repository", str(repository), "--golden-frames", "1"]
        assert refit_main(words) == 1
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert Repository(repository).versions("tiny") == [1]


@pytest.mark.parametrize("seed", range(30))
def test_a_graph_with_flipped_bytes_ends_in_one_line(seed, tmp_path, capsys):
    content = bytearray(relu().SerializeToString())
    rng = np.random.default_rng(seed)
    for place in rng.integers(0, len(content), 1 + seed % 4):
        content[place] = rng.integers(0, 256)
    (tmp_path / "m.onnx").write_bytes(content)
    assert inspect_main([str(tmp_path / "m.onnx"), "--json"]) in (0, 1)
    err = capsys.readouterr().err
    assert err == "" or (err.startswith("error: ") and err.count("\n") == 1)


class TestAKilledBuild:
    """SIGKILL leaves a staging directory at most, and the next build removes it."""

    SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from export.publish import publish
from common.cli import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start what is put behind them deaf to it

def work():
    def slow(self, *rest, **more):
        print("writing", flush=True)
        time.sleep(600)
    publish.Repository.publish = slow
    publish.publish(sys.argv[1], "m", {"model.onnx": b"x"}, {}, "", None)

sys.exit(run_command(work, (publish.ExportError,)))
"""

    @pytest.fixture
    def start(self):
        """Starts a build that has begun to write; whatever the test does, the process is gone after it."""
        children = []

        def begin(repository):
            children.append(self.begin(repository))
            return children[-1]

        yield begin
        for child in children:
            with child:  # closes its pipes
                child.kill()

    def begin(self, repository):
        command = [sys.executable, "-c", self.SCRIPT, str(repository)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        return child

    def test_told_to_stop_it_leaves_nothing(self, tmp_path, start):
        child = start(tmp_path / "repo")
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=PATIENCE)
        assert (child.returncode, err) == (130, "error: interrupted\n")
        assert list((tmp_path / "repo").iterdir()) == []

    def test_killed_it_is_swept_by_the_next(self, tmp_path, capsys, start):
        child = start(tmp_path / "repo")
        child.kill()
        child.wait(PATIENCE)
        assert any(".staging-" in path.name for path in (tmp_path / "repo" / "m").iterdir())
        (tmp_path / "m.onnx").write_bytes(relu().SerializeToString())
        words = ["--onnx", tmp_path / "m.onnx", "--name", "m", "--repository", tmp_path / "repo"]
        assert main([str(word) for word in words]) == 0
        assert {path.name for path in (tmp_path / "repo" / "m").iterdir()} == {"1", "config.pbtxt"}
