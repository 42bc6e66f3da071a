"""Local functions of ONNX files are counted before anything expands them."""

from __future__ import annotations

import itertools
import time

import onnx
import pytest
from onnx import TensorProto, helper

from export.build import main as build_main
from export.errors import ExportError
from export.graph.functions import MOST_NODES, check_functions
from export.graph.lint import lint
from export.inspect import main as inspect_main

node = helper.make_node
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("my", 1)]


def call(name, given="a", answer="b"):
    return node(name, [given], [answer], domain="my")


def function(name, *nodes):
    return helper.make_function("my", name, ["a"], ["b"], list(nodes), OPSETS)


def model(functions, *nodes):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        list(nodes), "g", [info("x", TensorProto.FLOAT, [1, 2])], [info("y", TensorProto.FLOAT, [1, 2])]
    )
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=10, functions=list(functions))


def in_a_branch(*nodes):
    info = helper.make_tensor_value_info("b1", TensorProto.FLOAT, None)
    branches = {
        key: helper.make_graph([node("Identity", ["a"], ["p"]), *nodes], key, [], [info])
        for key in ("then_branch", "else_branch")
    }
    return [
        node("ReduceSum", ["a"], ["s"], keepdims=0),
        node("Cast", ["s"], ["c"], to=TensorProto.BOOL),
        node("If", ["c"], ["b"], **branches),
    ]


def doubling(depth, width=2):
    """f0 is one node; each of the others calls the one before `width` times."""
    made = [function("f0", node("Relu", ["a"], ["b"]))]
    for k in range(1, depth + 1):
        names = ["a", *(f"v{i}" for i in range(width - 1)), "b"]
        made.append(function(f"f{k}", *(call(f"f{k - 1}", *pair) for pair in itertools.pairwise(names))))
    return made


RECURSIVE = {
    "itself": [function("f", call("f"))],
    "each other": [function("f", call("g")), function("g", call("f"))],
    "round a corner": [function("f", call("g")), function("g", call("h")), function("h", call("g"))],
    "in a branch": [function("f", *in_a_branch(call("f", "p", "b1")))],
}


@pytest.mark.parametrize("case", RECURSIVE)
def test_a_function_that_calls_itself_is_one_line(case, tmp_path, capsys):
    file = tmp_path / "m.onnx"
    file.write_bytes(model(RECURSIVE[case], call("f", "x", "y")).SerializeToString())
    commands = (
        lambda: inspect_main([str(file)]),
        lambda: build_main(["--onnx", str(file), "--name", "m", "--repository", str(tmp_path / "repo")]),
    )
    for command in commands:
        assert command() == 1
        said = capsys.readouterr().err
        assert "calls itself" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "repo").exists()
    assert any("calls itself" in error for error in lint(onnx.load(file)).errors)


@pytest.mark.parametrize(
    ("functions", "nodes"),
    [
        (doubling(30), [call("f30", "x", "y")]),
        (doubling(2000), [call("f2000", "x", "y")]),
        (doubling(2, width=1100), [call("f2", "x", "y")]),
        ([*doubling(30), function("f", *in_a_branch(call("f30", "p", "b1")))], [call("f", "x", "y")]),
    ],
    ids=["2^30", "2^2000", "wide", "in a branch"],
)
def test_a_bomb_is_counted_and_not_expanded(functions, nodes, tmp_path, capsys):
    made = model(functions, *nodes)
    begun = time.process_time()
    with pytest.raises(ExportError, match=r"expand into .* nodes"):
        check_functions(made)
    counted = time.process_time() - begun
    file = tmp_path / "m.onnx"
    file.write_bytes(made.SerializeToString())
    assert inspect_main([str(file)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert counted < 30  # 2^30 nodes would take hours


def test_a_long_chain_is_no_recursion():
    made = model(doubling(5000, width=1), call("f5000", "x", "y"))
    check_functions(made)


def test_what_is_small_is_taken():
    made = model(doubling(8), call("f8", "x", "y"))
    check_functions(made)
    assert MOST_NODES > 2**8
    onnx.checker.check_model(made)
    assert lint(made).errors == []


def test_two_functions_of_one_name_are_refused():
    twice = [function("f", node("Relu", ["a"], ["b"])), function("f", node("Neg", ["a"], ["b"]))]
    with pytest.raises(ExportError, match="have one name"):
        check_functions(model(twice, call("f", "x", "y")))
