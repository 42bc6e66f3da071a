"""What a foreign graph is run on: inputs that people give or made-up ones, and what a server runs of them."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.build import main
from export.errors import ExportError
from export.inspect import inspect
from export.parity import samples
from export.publish import publish_onnx
from runtime.checks import golden
from runtime.config import EngineConfig, ServerConfig, WatchConfig
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import Refused
from runtime.server import Server
from runtime.tensors import TensorSpec

F, I64, I32, B, S = (
    TensorProto.FLOAT,
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.BOOL,
    TensorProto.STRING,
)
node, info = helper.make_node, helper.make_tensor_value_info


def save(path, nodes, inputs, outputs, held=None, opset=18, ir=8):
    graph = helper.make_graph(
        nodes,
        "g",
        [info(*i) for i in inputs],
        [info(*o) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (held or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    path.write_bytes(model.SerializeToString())
    return path


def ids(rows=32):
    held = {"table": np.arange(4 * rows, dtype=np.float32).reshape(rows, 4)}
    return [node("Gather", ["table", "ids"], ["y"])], [("ids", I64, ["n", 8])], [("y", F, ["n", 8, 4])], held


def masked_attention():
    """NaN where nothing is left of the mask."""
    return (
        [
            node("Cast", ["mask"], ["m"], to=F),
            node("Log", ["m"], ["l"]),
            node("Add", ["x", "l"], ["s"]),
            node("Softmax", ["s"], ["y"], axis=1),
        ],
        [("x", F, ["n", 6]), ("mask", I64, ["n", 6])],
        [("y", F, ["n", 6])],
        {},
    )


def to_a_shape():
    nodes = [node("Reshape", ["x", "shape"], ["y"])]
    return nodes, [("x", F, [2, 6]), ("shape", I64, [3])], [("y", F, ["a", "b", "c"])], {}


def enlarged():
    nodes = [node("Resize", ["x", "", "", "sizes"], ["y"], mode="nearest")]
    return nodes, [("x", F, [1, 3, 4, 4]), ("sizes", I64, [4])], [("y", F, [1, 3, "h", "w"])], {}


def texts():
    return [node("Identity", ["x"], ["y"])], [("x", S, [2])], [("y", S, [2])], {}


def numbers_in_texts():
    return [node("Cast", ["x"], ["y"], to=F)], [("x", S, ["n", 2])], [("y", F, ["n", 2])], {}


def choice():
    yes, no = (
        helper.make_graph([node(op, ["x"], [o])], o, [], [info(o, F, [1, 2])])
        for op, o in (("Identity", "t"), ("Neg", "e"))
    )
    made = node("If", ["c"], ["y"], then_branch=yes, else_branch=no)
    return [made], [("x", F, [1, 2]), ("c", B, [])], [("y", F, [1, 2])], {}


def scalars(kind, cast=True):
    nodes = [node("Cast", ["c"], ["f"], to=F), node("Mul", ["x", "f"], ["y"])]
    return nodes, [("x", F, [1, 2]), ("c", kind, [])], [("y", F, [1, 2])], {}


def even_sides():
    held = {"w": np.ones((3, 3, 2, 2), np.float32) / 12, "sc": np.float32([1, 1, 2, 2])}
    nodes = [
        node("Conv", ["x", "w"], ["c"], strides=[2, 2]),
        node("Resize", ["c", "", "sc"], ["r"], mode="nearest"),
        node("Concat", ["x", "r"], ["y"], axis=1),
    ]
    return nodes, [("x", F, ["n", 3, "h", "w"])], [("y", F, ["n", 6, "h", "w"])], held


def sound():
    """Open length of a signal; one value is too short."""
    held = {"w": np.ones((1, 1, 16), np.float32)}
    return (
        [node("Conv", ["x", "w"], ["y"], strides=[4])],
        [("x", F, ["n", 1, "t"])],
        [("y", F, ["n", 1, "u"])],
        held,
    )


def picture_and_mask():
    """Equal names are equal sides, whatever comes first."""
    return (
        [
            node("Unsqueeze", ["mask", "one"], ["m"]),
            node("Mul", ["x", "m"], ["y"]),
        ],
        [("mask", F, ["n", "h", "w"]), ("x", F, ["n", 3, "h", "w"])],
        [("y", F, ["n", 3, "h", "w"])],
        {"one": np.int64([1])},
    )


def minus_one():
    return [node("Relu", ["x"], ["y"])], [("x", F, [-1, 3])], [("y", F, [-1, 3])], {}


FRAME = np.random.default_rng(0).random((1, 3, 4, 6))
GIVEN = {
    "ids": (ids, {"ids": np.full((2, 8), 31)}),
    "ids of 32 bits for 64": (ids, {"ids": np.zeros((1, 8), np.int32)}),
    "mask": (masked_attention, {"x": np.ones((1, 6)), "mask": np.int64([[1, 1, 0, 0, 0, 0]])}),
    "shape": (to_a_shape, {"x": np.ones((2, 6), np.float32), "shape": np.int64([3, 2, 2])}),
    "sizes": (enlarged, {"x": np.ones((1, 3, 4, 4), np.float32), "sizes": np.int64([1, 3, 8, 8])}),
    "texts": (texts, {"x": np.array(["straße", "kerb"])}),
    "texts in bytes": (texts, {"x": np.array(["straße".encode(), b"kerb"])}),
    "condition": (choice, {"x": np.ones((1, 2), np.float32), "c": np.array(False)}),
    "in Fortran's order": (even_sides, {"x": np.asfortranarray(FRAME)}),
}
SCALARS = (F, I64, I32, B, TensorProto.UINT8, TensorProto.FLOAT16)
MADE_UP = [
    ids,
    masked_attention,
    texts,
    numbers_in_texts,
    choice,
    even_sides,
    sound,
    picture_and_mask,
    minus_one,
    lambda: ids(2),
    lambda: ids(1),
    *(lambda kind=kind: scalars(kind) for kind in SCALARS),
]


def live(repository):
    """Whether a server makes version 1 live, and what it says."""
    from runtime.repository.repository import Repository

    config = ServerConfig(
        repository=str(repository),
        port=0,
        metrics_port=-1,
        engine=EngineConfig(threads=2),
        watch=WatchConfig(seconds=0),
    )
    with Server(config):
        pass
    entries = Repository(repository).history("m")
    return any(e.get("state") == "LIVE" for e in entries), entries


@pytest.mark.parametrize("case", GIVEN)
def test_given_inputs_are_run_by_build_and_server(case, tmp_path):
    make, arrays = GIVEN[case]
    file = save(tmp_path / "m.onnx", *make())
    np.savez(tmp_path / "in.npz", **arrays)
    result = publish_onnx(file, tmp_path / "repo", "m", inputs=tmp_path / "in.npz")
    assert result.manifest["parity"]["inputs"] == "given"
    with np.load(result.path / "inputs.npz", allow_pickle=False) as stored:
        for name, array in arrays.items():
            text = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
            assert np.array_equal(stored[name], text.astype(stored[name].dtype))
    was_live, entries = live(tmp_path / "repo")
    assert was_live, entries


@pytest.mark.parametrize("case", MADE_UP)
def test_made_up_inputs_that_the_graph_takes_are_found_and_run_by_the_server(case, tmp_path):
    file = save(tmp_path / "m.onnx", *case())
    result = publish_onnx(file, tmp_path / "repo", "m", size=(32, 48))
    assert result.manifest["parity"]["inputs"] == "made up"
    was_live, entries = live(tmp_path / "repo")
    assert was_live, entries


@pytest.mark.parametrize("make", [to_a_shape, enlarged])
def test_what_cannot_be_made_up_names_the_option(make, tmp_path):
    file = save(tmp_path / "m.onnx", *make())
    with pytest.raises(ExportError, match=r"on made-up inputs .*--inputs FILE\.npz"):
        publish_onnx(file, tmp_path / "repo", "m")
    assert not (tmp_path / "repo").exists()


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def flipped(path):
    """One bit of the stored values is another one; the zip is whole."""
    np.savez(path, ids=np.zeros((1, 8), np.int64))
    content = bytearray(path.read_bytes())
    content[content.index(b"NUMPY") + 130] ^= 1
    path.write_bytes(content)
    return path


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<i8", "fortran_order": False, "shape": (1 << 33, 8)}
        )
        archive.writestr("ids.npy", header.getvalue() + bytes(1 << 20))
    return path


WRONG = {
    "takes 'ids': give one for each": lambda p: npz(p, tokens=np.zeros((1, 8), np.int64)),
    "holds 'ids', 'more'": lambda p: npz(p, ids=np.zeros((1, 8), np.int64), more=np.zeros(1)),
    r"has the shape \[8\], it takes int64 \['n', 8\]": lambda p: npz(p, ids=np.zeros(8, np.int64)),
    "is float64, the graph takes int64": lambda p: npz(p, ids=np.zeros((1, 8))),
    "is uint64, the graph takes int64": lambda p: npz(p, ids=np.full((1, 8), 2**63, np.uint64)),
    "numbers, booleans and texts": lambda p: npz(p, ids=np.full((1, 8), None)),
    "MiB are read at most": bomb,
    "cannot be read: Bad CRC-32": flipped,
    "cannot be read: File is not a zip file": lambda p: p.write_bytes(b"nonsense") and p,
    "does not exist": lambda p: p.with_name("absent.npz"),
    "is no plain file": lambda p: os.mkfifo(p) or p,
    "does not run on given inputs": lambda p: npz(p, ids=np.full((1, 8), 99)),
}


@pytest.mark.parametrize("reason", WRONG)
def test_sample_inputs_that_do_not_fit_are_refused(reason, tmp_path):
    file = save(tmp_path / "m.onnx", *ids())
    with pytest.raises(ExportError, match=reason) as caught:
        publish_onnx(file, tmp_path / "repo", "m", inputs=WRONG[reason](tmp_path / "in.npz"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "repo").exists()


def test_samples_are_for_files_and_profiles(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["pack", "--inputs", "x.npz", "--repository", str(tmp_path)])
    assert end.value.code == 2
    assert "--inputs is for --onnx" in capsys.readouterr().err
    file = save(tmp_path / "m.onnx", *ids())
    with pytest.raises(ExportError, match=r"--inputs FILE\.npz"):
        inspect(file, profile=True)
    given = npz(tmp_path / "in.npz", ids=np.zeros((1, 8), np.int64))
    assert inspect(file, profile=True, inputs=given)["profile"]["operators_ms"].keys() == {"Gather"}


def test_shapes_that_a_run_contradicts_are_refused(tmp_path):
    nodes = [node("Cast", ["x"], ["s"], to=I64), node("Range", ["zero", "s", "step"], ["y"])]
    held = {"zero": np.int64(0), "step": np.int64(1)}
    file = save(tmp_path / "m.onnx", nodes, [("x", F, [])], [("y", I64, [7])], held)
    with pytest.raises(ExportError, match=r"output 'y' is declared as \[7\] and has the shape \[0\]"):
        publish_onnx(file, tmp_path / "repo", "m")
    given = npz(tmp_path / "in.npz", x=np.float32(7))
    assert publish_onnx(file, tmp_path / "repo", "m", inputs=given).version == 1


@pytest.mark.parametrize("declared", [["n", 5], ["n", 4, 1]])
def test_shapes_that_the_file_declares_otherwise_are_refused(declared, tmp_path):
    """ONNX Runtime infers the right shape and serves it; config.pbtxt would say the other one."""
    held = {"to": np.int64([-1, 4])}
    nodes = [node("Reshape", ["x", "to"], ["y"])]
    file = save(tmp_path / "m.onnx", nodes, [("x", F, ["n", 4])], [("y", F, declared)], held)
    with pytest.raises(ExportError, match=r"is declared as|ONNX Runtime refuses the graph"):
        publish_onnx(file, tmp_path / "repo", "m")


def test_a_side_of_zero_asks_for_an_open_one(tmp_path):
    file = save(tmp_path / "m.onnx", [node("Relu", ["x"], ["y"])], [("x", F, [0, 3])], [("y", F, [0, 3])])
    with pytest.raises(ExportError, match="side of 0, which takes no values: write -1"):
        publish_onnx(file, tmp_path / "repo", "m")


class TestInitialisersAmongTheInputs:
    """IR version 3 wants every initialiser among the inputs; later ones allow it: a default value."""

    @pytest.mark.parametrize("ir", [3, 8])
    @pytest.mark.parametrize("shapes", [([1, 3], [1, 3]), ([1, 3], [3, 1])])
    def test_the_engine_that_serves_takes_what_the_verified_one_took(self, ir, shapes, tmp_path):
        nodes = [
            node("Reshape", ["x", "a"], ["p"]),
            node("Relu", ["p"], ["r"]),
            node("Reshape", ["r", "b"], ["y"]),
        ]
        inputs = [("x", F, [3]), ("a", I64, [2]), ("b", I64, [2])]
        held = {"a": np.int64(shapes[0]), "b": np.int64(shapes[1])}
        file = save(tmp_path / "m.onnx", nodes, inputs, [("y", F, shapes[1])], held, opset=9, ir=ir)
        config = EngineConfig(threads=2)
        candidate = OnnxRuntimeEngine.load(file.read_bytes(), "fp32", config, candidate=True)
        engine = candidate.with_serving_threads()
        assert engine is not candidate
        assert [t.name for t in engine.spec.inputs] == [t.name for t in candidate.spec.inputs] == ["x"]
        x = np.float32([-1, 0, 2])
        assert np.array_equal(engine.run({"x": x}, ["y"])["y"].ravel(), [0, 0, 2])
        publish_onnx(file, tmp_path / "repo", "m")
        was_live, entries = live(tmp_path / "repo")
        assert was_live, entries


class TestWhatTheServerReads:
    """inputs.npz comes from outside, like everything in a repository."""

    SPECS = (TensorSpec("x", "FP32", (-1, 2)), TensorSpec("t", "BYTES", (1,)))

    def content(self, **arrays):
        return samples.archive({"x": np.ones((3, 2), np.float32), "t": np.array(["é"], object)} | arrays)

    def test_what_the_build_wrote(self):
        found = golden.inputs(self.content(), self.SPECS, limit=1 << 20)
        assert np.array_equal(found["x"], np.ones((3, 2), np.float32))
        assert found["t"].tolist() == ["é"]
        assert self.content() == self.content()

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"x": np.ones((3, 3), np.float32)}, "the engine takes FP32"),
            ({"x": np.ones((3, 2))}, "is float64"),
            ({"t": np.zeros(1, np.int64)}, "the engine takes BYTES"),
            ({"x": np.ones((1 << 18, 2), np.float32)}, "guard.golden_bytes allows less"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changed, reason):
        with pytest.raises(Refused, match=reason):
            golden.inputs(self.content(**changed), self.SPECS, limit=1 << 20)

    def test_damage_is_refused(self):
        content = bytearray(self.content())
        with pytest.raises(Refused, match="cannot be read"):
            golden.inputs(bytes(content[:-40]), self.SPECS, limit=1 << 20)

    def test_a_repository_with_inputs_that_do_not_fit_serves_nothing(self, tmp_path):
        from runtime.repository.repository import Repository

        file = save(tmp_path / "m.onnx", *ids())
        path = publish_onnx(file, tmp_path / "repo", "m").path
        home = Repository(tmp_path / "other")
        staged = home.stage("m")
        (staged / "model.onnx").write_bytes((path / "model.onnx").read_bytes())
        (staged / "inputs.npz").write_bytes(samples.archive({"ids": np.zeros((1, 9), np.int64)}))
        home.publish("m", staged, {})
        was_live, entries = live(tmp_path / "other")
        assert not was_live
        assert any("inputs.npz: 'ids' is int64" in str(e.get("reason")) for e in entries)
