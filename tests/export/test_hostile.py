"""Files and repositories that somebody made to break an export: one line, code 1, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from export.build import main
from export.inspect import main as inspect_main
from export.lint import lint
from protos import model_config_pb2

ROOT = Path(__file__).resolve().parents[2]
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
def test_values_in_other_files_are_refused_wherever_they_hide(
    model, location, tmp_path, capsys, monkeypatch
):
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


class TestAKilledBuild:
    """SIGKILL leaves a staging directory at most, and the next build removes it."""

    SCRIPT = """
import os, sys, time
from pathlib import Path
from export import publish
from networks.command import finish

def work():
    def slow(self, *rest, **more):
        print("writing", flush=True)
        time.sleep(60)
    publish.Repository.publish = slow
    publish.publish(sys.argv[1], "m", {"model.onnx": b"x"}, {}, "", None)

sys.exit(finish(work, (publish.ExportError,)))
"""

    def start(self, repository):
        command = [sys.executable, "-c", self.SCRIPT, str(repository)]
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "writing\n"
        return child

    def test_told_to_stop_it_leaves_nothing(self, tmp_path):
        child = self.start(tmp_path / "repo")
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
        assert (child.returncode, err) == (130, "error: interrupted\n")
        assert list((tmp_path / "repo").iterdir()) == []

    def test_killed_it_is_swept_by_the_next(self, tmp_path, capsys):
        child = self.start(tmp_path / "repo")
        child.kill()
        child.communicate(timeout=30)
        assert any(".staging-" in path.name for path in (tmp_path / "repo" / "m").iterdir())
        (tmp_path / "m.onnx").write_bytes(relu().SerializeToString())
        words = ["--onnx", tmp_path / "m.onnx", "--name", "m", "--repository", tmp_path / "repo"]
        assert main([str(word) for word in words]) == 0
        assert {path.name for path in (tmp_path / "repo" / "m").iterdir()} == {"1", "config.pbtxt"}
