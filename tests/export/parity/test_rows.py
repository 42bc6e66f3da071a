"""Which graphs may answer several requests in one run: those whose rows are independent, and no others."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

from export.build import main, show
from export.errors import ExportError
from export.publish import publish_onnx
from protos import model_config_pb2 as pb

F, I64, B, S = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING
node = helper.make_node
info = helper.make_tensor_value_info


def save(path, nodes, inputs, outputs, held=None, opset=18, functions=(), domains=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [info(*i) for i in inputs],
        [info(*o) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (held or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8, functions=list(functions))
    onnx.save(model, path)
    return path


X, Y = ("x", F, ["n", 4]), ("y", F, ["n", 4])
RNG = np.random.default_rng(7)
W = RNG.standard_normal((4, 4)).astype(np.float32)


def norm_over_batch():
    return (
        [
            node("ReduceMean", ["x", "zero"], ["m"], keepdims=1),
            node("Sub", ["x", "m"], ["y"]),
        ],
        [X],
        [Y],
        {"zero": np.int64([0])},
    )


def mean_over_rows():
    return (
        [node("ReduceMean", ["x", "zero"], ["y"], keepdims=1)],
        [X],
        [("y", F, ["one", 4])],
        {"zero": np.int64([0])},
    )


def softmax_over_rows():
    return [node("Softmax", ["x"], ["y"], axis=0)], [X], [Y], {}


def training_batch_norm():
    held = {k: np.float32([v] * 4) for k, v in (("s", 1), ("b", 0), ("m", 0), ("v", 1))}
    made = node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "m1", "v1"], training_mode=1)
    return [made], [X], [Y], held


def top_of_all():
    return [node("TopK", ["x", "k"], ["y", "i"], axis=0)], [X], [Y], {"k": np.int64([1])}


def sorted_rows():
    return (
        [
            node("Shape", ["x"], ["s"], end=1),
            node("TopK", ["x", "s"], ["y", "i"], axis=0),
        ],
        [X],
        [Y],
        {},
    )


def largest_of_all():
    return [node("ReduceMax", ["x"], ["m"], keepdims=1), node("Div", ["x", "m"], ["y"])], [X], [Y], {}


def summed_downwards():
    return [node("CumSum", ["x", "zero"], ["y"])], [X], [Y], {"zero": np.int64(0)}


def reversed_rows():
    return (
        [node("Slice", ["x", "a", "b", "c", "d"], ["y"])],
        [X],
        [Y],
        {
            "a": np.int64([-1]),
            "b": np.int64([-100]),
            "c": np.int64([0]),
            "d": np.int64([-1]),
        },
    )


def looked_up_by_place():
    """Each row and an entry of a table at its place: 0 in the first six places."""
    table = np.zeros((64, 4), np.float32)
    table[6:] = 1
    return (
        [
            node("Shape", ["x"], ["s"], end=1),
            node("Slice", ["table", "zero", "s", "zero"], ["t"]),
            node("Add", ["x", "t"], ["y"]),
        ],
        [X],
        [Y],
        {"table": table, "zero": np.int64([0])},
    )


def counted():
    return (
        [
            node("Shape", ["x"], ["s"], end=1),
            node("Cast", ["s"], ["f"], to=F),
            node("Div", ["x", "f"], ["y"]),
        ],
        [X],
        [Y],
        {},
    )


def only_at_five():
    """Another answer where exactly five rows are together."""
    return (
        [
            node("Shape", ["x"], ["s"], end=1),
            node("Equal", ["s", "five"], ["e"]),
            node("Cast", ["e"], ["f"], to=F),
            node("Add", ["x", "f"], ["y"]),
        ],
        [X],
        [Y],
        {"five": np.int64([5])},
    )


def folded_rows():
    return [node("Reshape", ["x", "to"], ["y"])], [X], [("y", F, ["m", 2])], {"to": np.int64([-1, 2])}


def pairs_of_rows():
    return [node("Reshape", ["x", "to"], ["y"])], [X], [("y", F, ["m", 8])], {"to": np.int64([-1, 8])}


def static_reshape():
    nodes = [node("Reshape", ["x", "to"], ["r"]), node("Relu", ["r"], ["y"])]
    return nodes, [X], [Y], {"to": np.int64([1, 4])}


def kept_rows():
    return (
        [
            node("ReduceMax", ["x", "one"], ["m"], keepdims=0),
            node("Greater", ["m", "low"], ["k"]),
            node("Compress", ["x", "k"], ["y"], axis=0),
        ],
        [X],
        [("y", F, ["n", 4])],
        {"one": np.int64([1]), "low": np.float32(-1e30)},
    )


def kept_rows_in_a_function():
    body = [
        node("ReduceMax", ["a", "ax"], ["m"], keepdims=0),
        node("Greater", ["m", "low"], ["k"]),
        node("Compress", ["a", "k"], ["b"], axis=0),
    ]
    made = helper.make_function("my", "Keep", ["a", "ax", "low"], ["b"], body, [helper.make_opsetid("", 18)])
    call = node("Keep", ["x", "one", "low"], ["y"], domain="my")
    return [call], [X], [Y], {"one": np.int64([1]), "low": np.float32(-1e30)}, made


def best_neighbour():
    """Whole numbers out: the row of the batch that is nearest to each row."""
    return (
        [
            node("Transpose", ["x"], ["t"], perm=[1, 0]),
            node("MatMul", ["x", "t"], ["d"]),
            node("ArgMax", ["d"], ["y"], axis=1, keepdims=0),
        ],
        [X],
        [("y", I64, ["n"])],
        {},
    )


def neighbours_of_whole_numbers():
    return (
        [
            node("ReduceMax", ["x", "zero"], ["m"], keepdims=1),
            node("Sub", ["x", "m"], ["y"]),
        ],
        [("x", I64, ["n", 4])],
        [("y", I64, ["n", 4])],
        {"zero": np.int64([0])},
    )


def any_of_all():
    return (
        [
            node("Cast", ["x"], ["f"], to=F),
            node("ReduceMax", ["f"], ["m"], keepdims=1),
            node("Cast", ["m"], ["b"], to=B),
            node("Or", ["x", "b"], ["y"]),
        ],
        [("x", B, ["n", 4])],
        [("y", B, ["n", 4])],
        {},
    )


def attention_over_rows():
    return (
        [
            node("Transpose", ["p"], ["t"], perm=[1, 0]),
            node("MatMul", ["q", "t"], ["s"]),
            node("Softmax", ["s"], ["a"], axis=1),
            node("MatMul", ["a", "p"], ["y"]),
        ],
        [("q", F, ["a", 4]), ("p", F, ["b", 4])],
        [("y", F, ["a", 4])],
        {},
    )


def quantised_over_all():
    """The scale of 8 bits is that of all rows together."""
    return (
        [
            node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        [X],
        [Y],
        {},
    )


def random_answers():
    return [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])], [X], [Y], {}


def none_of_the_mean():
    """Zero times the mean of all rows: nothing, until a row holds NaN or infinity."""
    nodes = [
        node("ReduceMean", ["x", "zero"], ["m"], keepdims=1),
        node("Mul", ["m", "none"], ["t"]),
        node("Add", ["x", "t"], ["y"]),
    ]
    return nodes, [X], [Y], {"zero": np.int64([0]), "none": np.float32([0])}


def counts_infinities():
    nodes = [
        node("IsInf", ["x"], ["i"]),
        node("Cast", ["i"], ["f"], to=F),
        node("ReduceSum", ["f", "zero"], ["m"], keepdims=1),
        node("Add", ["x", "m"], ["y"]),
    ]
    return nodes, [X], [Y], {"zero": np.int64([0])}


DEPENDENT = [
    none_of_the_mean,
    counts_infinities,
    norm_over_batch,
    mean_over_rows,
    softmax_over_rows,
    training_batch_norm,
    top_of_all,
    sorted_rows,
    largest_of_all,
    summed_downwards,
    reversed_rows,
    looked_up_by_place,
    counted,
    only_at_five,
    folded_rows,
    pairs_of_rows,
    static_reshape,
    kept_rows,
    kept_rows_in_a_function,
    best_neighbour,
    neighbours_of_whole_numbers,
    any_of_all,
    attention_over_rows,
    quantised_over_all,
    random_answers,
]


def matrices():
    """Kernels that add in another order for another number of rows."""
    big = RNG.standard_normal((512, 512)).astype(np.float32)
    nodes, last = [], "x"
    for k in range(4):
        nodes += [node("MatMul", [last, "w"], [f"m{k}"]), node("Tanh", [f"m{k}"], [f"t{k}"])]
        last = f"t{k}"
    nodes.append(node("Identity", [last], ["y"]))
    return nodes, [("x", F, ["n", 512])], [("y", F, ["n", 512])], {"w": big / 20}


def labels_of_a_picture():
    w = RNG.standard_normal((5, 3, 3, 3)).astype(np.float32)
    return (
        [
            node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
            node("ArgMax", ["c"], ["y"], axis=1, keepdims=0),
        ],
        [("x", F, ["n", 3, "h", "v"])],
        [("y", I64, ["n", "h", "v"])],
        {"w": w},
    )


def normalised_within_a_row():
    return [node("LayerNormalization", ["x", "s"], ["y"], axis=1)], [X], [Y], {"s": np.ones(4, np.float32)}


def words():
    table = RNG.standard_normal((20, 6)).astype(np.float32)
    return (
        [
            node("Gather", ["table", "ids"], ["e"]),
            node("Cast", ["mask"], ["f"], to=F),
            node("Unsqueeze", ["f", "two"], ["u"]),
            node("Mul", ["e", "u"], ["w"]),
            node("ReduceSum", ["w", "one"], ["s"], keepdims=0),
            node("ReduceSum", ["f", "one"], ["c"], keepdims=1),
            node("Div", ["s", "c"], ["y"]),
        ],
        [("ids", I64, ["n", "t"]), ("mask", I64, ["n", "t"])],
        [("y", F, ["n", 6])],
        {
            "table": table,
            "one": np.int64([1]),
            "two": np.int64([2]),
        },
    )


def masked_in_place():
    """NonZero inside, yet as many rows as came in."""
    return (
        [
            node("NonZero", ["x"], ["z"]),
            node("Transpose", ["z"], ["i"], perm=[1, 0]),
            node("Shape", ["i"], ["c"], end=1),
            node("Expand", ["minus", "c"], ["u"]),
            node("ScatterND", ["x", "i", "u"], ["y"]),
        ],
        [X],
        [Y],
        {"minus": np.float32([-1])},
    )


def texts():
    return [node("Identity", ["x"], ["y"])], [("x", S, ["n", 2])], [("y", S, ["n", 2])], {}


INDEPENDENT = [matrices, labels_of_a_picture, normalised_within_a_row, words, masked_in_place, texts]


def made(path, case):
    nodes, inputs, outputs, held, *functions = case()
    return save(path, nodes, inputs, outputs, held, functions=functions, domains=["my"] * bool(functions))


def published(tmp_path, case, **keywords):
    file = made(tmp_path / "m.onnx", case)
    result = publish_onnx(file, tmp_path / "repo", "m", size=(16, 16), **keywords)
    config = text_format.Parse((tmp_path / "repo" / "m" / "config.pbtxt").read_text(), pb.ModelConfig())
    return result, config


@pytest.mark.parametrize("case", DEPENDENT, ids=lambda c: c.__name__)
def test_rows_that_depend_on_each_other_never_share_a_run(case, tmp_path):
    result, config = published(tmp_path, case)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert result.manifest["batching"]["independent"] is False
    assert result.manifest["batching"]["reason"] in show(result)


@pytest.mark.parametrize("case", INDEPENDENT, ids=lambda c: c.__name__)
def test_rows_of_their_own_share_a_run(case, tmp_path):
    result, config = published(tmp_path, case)
    assert result.manifest["batching"] == {"independent": True, "reason": ""}
    assert config.max_batch_size == 8
    assert config.HasField("dynamic_batching")


class TestSomebodysOwnConfiguration:
    def config(self, tmp_path, text):
        file = tmp_path / "own.pbtxt"
        file.write_text(text)
        return file

    @pytest.mark.parametrize("batch", [2, 8, 32])
    def test_it_may_not_let_dependent_rows_share_a_run(self, batch, tmp_path):
        own = self.config(tmp_path, f"max_batch_size: {batch} dynamic_batching {{ }}")
        with pytest.raises(ExportError, match=r"rows may not share a run: a row alone .*; say 0"):
            published(tmp_path, norm_over_batch, config=own)
        assert not (tmp_path / "repo" / "m").exists()

    def test_it_may_say_that_there_is_no_batch(self, tmp_path):
        _, config = published(tmp_path, norm_over_batch, config=self.config(tmp_path, "max_batch_size: 0"))
        assert config.max_batch_size == 0

    def test_its_own_batch_is_what_is_tried(self, tmp_path):
        """Twenty places of the table are alike; the twenty-first is another."""

        def case():
            nodes, inputs, outputs, held = looked_up_by_place()
            table = np.zeros((64, 4), np.float32)
            table[20:] = 1
            return nodes, inputs, outputs, {**held, "table": table}

        _, config = published(tmp_path, case, config=self.config(tmp_path, "max_batch_size: 16"))
        assert config.max_batch_size == 16
        with pytest.raises(ExportError, match="rows may not share a run"):
            published(tmp_path, case, config=self.config(tmp_path, "max_batch_size: 32"))


def test_a_fixed_number_of_rows_given_as_sample(tmp_path):
    """Four rows at a time and no others: people say so with a sample, and nothing is put together."""

    def case():
        nodes = [
            node("Reshape", ["x", "to"], ["r"]),
            node("ReduceMax", ["r"], ["m"]),
            node("Sub", ["x", "m"], ["y"]),
        ]
        return nodes, [X], [Y], {"to": np.int64([4, 4])}

    np.savez(tmp_path / "in.npz", x=np.ones((4, 4), np.float32))
    result, config = published(tmp_path, case, inputs=tmp_path / "in.npz")
    assert config.max_batch_size == 0
    assert "a row alone does not run" in result.manifest["batching"]["reason"]


def test_a_graph_without_a_row_side_promises_nothing(tmp_path):
    def case():
        return [node("Relu", ["x"], ["y"])], [("x", F, [3, 4])], [("y", F, [3, 4])], {}

    result, config = published(tmp_path, case)
    assert config.max_batch_size == 0
    assert result.manifest["batching"] == {"independent": None, "reason": ""}


def test_the_command_line_says_why_batching_is_off(tmp_path, capsys):
    file = made(tmp_path / "m.onnx", kept_rows)
    assert main(["--onnx", str(file), "--name", "m", "--repository", str(tmp_path / "repo")]) == 0
    assert (
        "batching is off: output 'y' may have as many rows as the data says (Compress"
        in capsys.readouterr().out
    )
