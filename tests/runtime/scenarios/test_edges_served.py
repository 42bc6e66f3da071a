"""Edge and joint networks under the same guard as segmentation: served, swapped, and refused by name."""

from __future__ import annotations

import dataclasses
import functools
import io
import threading
import time
import zipfile

import numpy as np
import pytest

from runtime.client import Client, Rejected
from tests.runtime import builders as b
from tests.waits import PATIENCE, until

W, B = b.nearest_weights()
RNG = np.random.default_rng(11)


def scene(seed=0):
    frame, labels = b.blocks(np.random.default_rng(seed), b.EDGE_SIZE, 16)
    return frame, labels, b.edges_of(labels)


class Camera(threading.Thread):
    """Sends frames until the end of the block; `outputs` as a client names them."""

    def __init__(self, target, model, outputs=()):
        super().__init__(daemon=True)
        self.target, self.model, self.outputs = target, model, outputs
        self.versions, self.wrong, self.failed = [], 0, []
        self.stopping = threading.Event()

    def __enter__(self):
        self.start()
        until(lambda: self.versions or self.failed)
        return self

    def __exit__(self, *_):
        self.stopping.set()
        self.join(PATIENCE)

    def run(self):
        scenes = [scene(i) for i in range(6)]
        with Client(self.target) as client:
            while not self.stopping.is_set():
                frame, _, bits = scenes[len(self.versions) % 6]
                try:
                    answer = client.infer_tensors(self.model, {"frame": frame[None]}, outputs=self.outputs)
                except Exception as error:
                    self.failed.append(error)
                    return
                self.versions.append(answer.version)
                if "edge_bits" in answer.outputs:
                    self.wrong += int((answer.outputs["edge_bits"][0] != bits).mean() > 0.1)
                time.sleep(0.005)


@pytest.mark.parametrize(
    ("joint", "names"),
    [(False, ["edge_bits", "edges"]), (True, ["labels", "confidence", "edge_bits", "edges"])],
)
def test_edges_are_what_the_frame_shows(repository, quick, serve, joint, names):
    b.publish_edges(repository, joint=joint)
    server = serve(quick)
    frame, labels, bits = scene()
    with Client(server.target) as client:
        answer = client.infer_tensors("edges", {"frame": frame[None]})
        assert list(answer.outputs) == names
        assert (answer.outputs["edge_bits"][0] == bits).mean() > 0.97
        on = answer.outputs["edges"][0] >= 128
        assert (on == ((bits >> np.arange(4)[:, None, None]) & 1)).mean() > 0.97
        if joint:
            assert (answer.outputs["labels"][0] == labels).all()


def good(**how):
    return b.edges(W, B, **how)


def npz(**arrays):
    """The good network's golden set with some arrays replaced (None: left out)."""
    return {name: array for name, array in (b.good_edges() | arrays).items() if array is not None}


@functools.cache
def bad_versions():
    nan = W.copy()
    nan[1, 0] = np.nan
    answers = b.good_edges()
    one = np.full(4, -6.0, np.float32)
    everywhere, dead = one.copy(), one.copy()
    everywhere[1], dead[1] = 50.0, np.nan
    n, height, width = answers["edge_bits"].shape
    return {
        "nan weights": ("finite", lambda: {"model": b.edges(nan, B), "answers": answers}),
        "nan, honestly exported": (
            "finite",
            lambda: {"model": b.edges(nan, B), "answers": npz(edges=answers["edges"] * 0)},
        ),
        "nan in one class": ("golden", lambda: {"model": good(edge_bias=dead), "answers": answers}),
        "nan in one class, honestly exported": ("collapse", lambda: {"model": good(edge_bias=dead)}),
        "no edge at all": ("collapse", lambda: {"model": good(edge_bias=-14.0)}),
        "no edge at all, with the answers of another": (
            "collapse",
            lambda: {"model": good(edge_bias=-14.0), "answers": answers},
        ),
        "everything is an edge": ("collapse", lambda: {"model": good(edge_bias=50.0)}),
        "everything is an edge of one class": ("collapse", lambda: {"model": good(edge_bias=everywhere)}),
        "another's answers": ("golden", lambda: {"model": good(order=(1, 2, 3, 0)), "answers": answers}),
        "permuted classes": ("shadow-agreement", lambda: {"model": good(order=(1, 2, 3, 0))}),
        "bits beyond the classes": ("contract", lambda: {"model": good(powers=(1, 2, 4, 32))}),
        "bits of other thresholds": (
            "contract",
            lambda: {"model": good(edge_bias=-11.5), "edge_thresholds": [0.5, 0.5, 0.5, 0.95]},
        ),
        "a threshold too few": ("contract", lambda: {"edge_thresholds": [0.5] * 3}),
        "thresholds that are none": ("contract", lambda: {"edge_thresholds": "0.5"}),
        "other classes": ("contract", lambda: {"edge_classes": ["a", "b", "c", "d"]}),
        "a joint network": ("contract", lambda: {"joint": True}),
        "a segmentation that says edges": ("contract", lambda: {"model": b.segmentation(W, B, b.EDGE_SIZE)}),
        "an edge network that says segmentation": ("contract", lambda: {"task": "segmentation"}),
        "no golden frames": ("golden", lambda: {"answers": {"x": np.zeros(1)}}),
        "golden without edges": ("golden", lambda: {"answers": npz(edges=None)}),
        "golden of floats, with NaN": (
            "golden",
            lambda: {"answers": npz(edges=np.full((n, 4, height, width), np.nan, np.float32))},
        ),
        "golden of other classes": ("golden", lambda: {"answers": npz(edges=answers["edges"][:, :3])}),
        "golden bits that are bytes": (
            "golden",
            lambda: {"answers": npz(edge_bits=answers["edge_bits"].astype(np.uint8))},
        ),
        "golden of another size": (
            "golden",
            lambda: {"answers": npz(edge_bits=answers["edge_bits"][:, ::2])},
        ),
        "golden of no frames": ("golden", lambda: {"answers": npz(frames=answers["frames"][:0])}),
        "golden in Fortran order": (
            "golden",
            lambda: {"answers": npz(edges=np.asfortranarray(answers["edges"]))},
        ),
    }


@pytest.mark.parametrize(
    ("case", "traffic"),
    [
        (case, traffic)
        for case, (check, _) in bad_versions().items()
        for traffic in (False, True)
        if check.startswith("shadow") or not traffic  # the others never come to a live frame
    ],
)
def test_a_bad_version_is_refused_by_the_name_of_the_check(repository, quick, driving, serve, case, traffic):
    """Each has its own server: a wrong verdict makes the version live, and would fail all that follow."""
    check, how = bad_versions()[case]
    b.publish_edges(repository)
    server = serve(driving if traffic else quick)
    bad = b.publish_edges(repository, **how())
    with Client(server.target) as client:
        if traffic:
            with Camera(server.target, "edges") as camera:
                *_, last = client.submit("edges", bad)
            assert (camera.failed, camera.wrong, set(camera.versions)) == ([], 0, {1})
        else:
            *_, last = client.submit("edges", bad)
        assert (last.state, last.check) == ("REJECTED", check), last
        assert last.reason
        assert "\n" not in last.reason
        assert client.status()["models"]["edges"]["live"] == 1


@pytest.mark.parametrize("joint", [False, True])
def test_a_good_version_is_shadowed_and_goes_live(repository, driving, serve, joint):
    b.publish_edges(repository, joint=joint)
    server = serve(driving)
    second = b.publish_edges(repository, model=good(edge_bias=-5.0, joint=joint), joint=joint)
    with Client(server.target) as client, Camera(server.target, "edges") as camera:
        events = list(client.submit("edges", second))
    assert [e.state for e in events] == ["SUBMITTED", "VERIFIED", "SHADOWING", "LIVE"], events[-1]
    shadow = events[-1].detail["shadow"]
    assert shadow["frames"] == 6
    assert shadow["edges_found"] > 0.9
    assert ("agreement" in shadow) == joint
    assert (camera.failed, camera.wrong) == ([], 0)
    assert camera.versions == sorted(camera.versions)


def test_a_part_that_no_request_asks_for_is_decided_by_the_golden_frames(repository, driving, serve):
    b.publish_edges(repository, joint=True)
    server = serve(driving)
    mixed = b.publish_edges(repository, model=good(order=(1, 2, 3, 0), joint=True), joint=True)
    fine = b.publish_edges(repository, model=good(edge_bias=-5.0, joint=True), joint=True)
    with Client(server.target) as client, Camera(server.target, "edges", ["labels"]) as camera:
        *_, last = client.submit("edges", mixed)
        assert (last.state, last.check) == ("REJECTED", "shadow-agreement")
        assert "classes are mixed up" in last.reason
        *_, last = client.submit("edges", fine)
        assert last.state == "LIVE"
        assert "edges: no live traffic: decided by the golden frames alone" in last.reason
        assert last.detail["shadow"]["frames"] == 6
    assert not camera.failed


def test_a_live_version_that_stops_seeing_edges_is_rolled_back(repository, quick, serve):
    """Right on the colours of the golden frames; in fog nothing is left of its contrast."""
    b.publish_edges(repository)
    server = serve(quick)
    second = b.publish_edges(repository, model=good(edge_bias=-11.0))  # it needs nearly the whole range
    frame, _, _ = scene()
    fog = (0.8 * 255 + 0.2 * frame).astype(np.uint8)
    with Client(server.target) as client:
        assert client.infer_tensors("edges", {"frame": fog[None]}).outputs["edge_bits"].any()
        *_, last = client.submit("edges", second)
        assert last.state == "LIVE", last

        def back():
            client.infer_tensors("edges", {"frame": fog[None]})
            return [e for e in client.history("edges") if e.state == "ROLLED_BACK"]

        until(back)
        (event,) = back()
        assert event.check == "watch-collapse"


def test_a_covered_camera_rolls_nothing_back(repository, quick, serve):
    from runtime.config import WatchConfig

    b.publish_edges(repository)
    server = serve(dataclasses.replace(quick, watch=WatchConfig(seconds=0.6, max_fps=100.0)))
    second = b.publish_edges(repository)
    black = np.zeros((1, *b.EDGE_SIZE, 3), np.uint8)
    with Client(server.target) as client:
        assert [e.state for e in client.submit("edges", second)][-1] == "LIVE"
        while client.status()["models"]["edges"]["watching"]:
            assert client.infer_tensors("edges", {"frame": black}).version == second
            time.sleep(0.01)
        assert client.status()["models"]["edges"]["live"] == second


def test_empty_batches_are_answered_and_decide_nothing(repository, quick, serve):
    model = good(batch="N")
    b.publish_edges(repository, model=model, answers=b.good_edges(), batch="N")
    server = serve(quick)
    second = b.publish_edges(repository, model=model, answers=b.good_edges(), batch="N")
    empty = np.zeros((0, *b.EDGE_SIZE, 3), np.uint8)
    stopping = threading.Event()

    def send():
        with Client(server.target) as client:
            while not stopping.is_set():
                answer = client.infer_tensors("edges", {"frame": empty})
                assert answer.outputs["edge_bits"].shape == (0, *b.EDGE_SIZE)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        with Client(server.target) as client:
            *_, last = client.submit("edges", second)
            assert (last.state, last.detail["shadow"]["frames"]) == ("LIVE", 0), last
    finally:
        stopping.set()
        sender.join(PATIENCE)


@pytest.mark.parametrize("name", ["edge_bits", "edges"])
def test_classification_of_edges_is_refused(repository, quick, serve, name):
    from protos import inference_pb2 as pb
    from runtime.errors import ServiceError
    from runtime.rpc.inference import InferenceEdge

    b.publish_edges(repository)
    server = serve(quick)
    frame, _, _ = scene()
    request = pb.ModelInferRequest(model_name="edges", raw_input_contents=[frame.tobytes()])
    request.inputs.add(name="frame", datatype="UINT8", shape=(1, *frame.shape))
    request.outputs.add(name=name).parameters["classification"].int64_param = 3
    with pytest.raises(ServiceError, match="has no meaning"):
        InferenceEdge(server.service).infer(request.SerializeToString())


def test_thirty_one_classes(repository, quick, serve):
    """The most that one int32 holds: bit 30 is a class, the sign is none; one more is refused."""
    repository_31 = {"edge_classes": [f"c{i}" for i in range(31)], "edge_thresholds": [0.5] * 31}
    b.publish(repository, "many", wide(31), answers=wide_golden(31), **b.edge_manifest(**repository_31))
    b.publish(
        repository,
        "more",
        wide(32),
        answers=wide_golden(32),
        **b.edge_manifest(edge_classes=[f"c{i}" for i in range(32)], edge_thresholds=[0.5] * 32),
    )
    server = serve(quick)
    frame = wide_golden(31)["frames"][:1]
    with Client(server.target) as client:
        answer = client.infer_tensors("many", {"frame": frame})
        assert set(np.unique(answer.outputs["edge_bits"])) == {0, 2**31 - 1}
        status = client.status()["models"]["more"]
        assert not status["ready"]
        assert "edge_bits holds 1 to 31" in status["reason"]
        with pytest.raises(Rejected):
            client.infer_tensors("more", {"frame": frame})


def wide(classes):
    """Every class has its edges where the red channel is over a half."""
    import onnx
    from onnx import TensorProto as T
    from onnx import helper as h
    from onnx import numpy_helper as nh

    height, width = b.EDGE_SIZE
    powers = np.array([1 << k for k in range(classes)], np.int64).astype(np.int32).reshape(-1, 1, 1)
    weight = np.zeros((classes, 3, 1, 1), np.float32)
    weight[:, 0] = 1 / 16
    inits = [
        nh.from_array(weight, "w"),
        nh.from_array(np.full(classes, -8.0, np.float32), "b"),
        nh.from_array(powers, "powers"),
        nh.from_array(np.float32(255.0), "scale"),
        nh.from_array(np.float32(0.5), "half"),
        nh.from_array(np.float32(0.0), "zero"),
        nh.from_array(np.array([1], np.int64), "axis"),
    ]
    nodes = [
        h.make_node("Cast", ["frame"], ["f"], to=T.FLOAT),
        h.make_node("Transpose", ["f"], ["x"], perm=[0, 3, 1, 2]),
        h.make_node("Conv", ["x", "w", "b"], ["e"]),
        h.make_node("Sigmoid", ["e"], ["p"]),
        h.make_node("Mul", ["p", "scale"], ["pb"]),
        h.make_node("Add", ["pb", "half"], ["r"]),
        h.make_node("Cast", ["r"], ["edges"], to=T.UINT8),
        h.make_node("GreaterOrEqual", ["e", "zero"], ["on"]),
        h.make_node("Cast", ["on"], ["bit"], to=T.INT32),
        h.make_node("Mul", ["bit", "powers"], ["field"]),
        h.make_node("ReduceSum", ["field", "axis"], ["edge_bits"], keepdims=0),
    ]
    value = h.make_tensor_value_info
    graph = h.make_graph(
        nodes,
        "wide",
        [value("frame", T.UINT8, [1, height, width, 3])],
        [
            value("edges", T.UINT8, [1, classes, height, width]),
            value("edge_bits", T.INT32, [1, height, width]),
        ],
        inits,
    )
    return onnx.helper.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)


def wide_golden(classes):
    frames = np.zeros((1, *b.EDGE_SIZE, 3), np.uint8)
    frames[:, :, 20:24, 0] = 255
    on = frames[..., 0] > 0
    full = sum(1 << k for k in range(classes)) if classes < 32 else -1
    level = np.where(on, round(255 / (1 + np.exp(-(255 / 16 - 8)))), 0).astype(np.uint8)
    return {
        "frames": frames,
        "edges": np.repeat(level[:, None], classes, 1),
        "edge_bits": np.where(on, full, 0).astype(np.int32),
    }


def test_a_zip_bomb_in_golden_npz_is_refused_by_its_headers(repository, quick, serve):
    """Half a gigabyte of zeros in half a megabyte: nothing of it is unpacked beyond what is used."""
    b.publish_edges(repository)
    server = serve(quick)
    staged = repository.stage("edges")
    (staged / "model.onnx").write_bytes(good().SerializeToString())
    height, width = 30_000, 20_000
    with zipfile.ZipFile(staged / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in npz(frames=None).items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            archive.writestr(f"{name}.npy", buffer.getvalue())
        with archive.open("frames.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (1, height, width, 3)}
            np.lib.format.write_array_header_1_0(file, header)
            block = bytes(8 << 20)
            for _ in range(64):
                file.write(block)
    bad = repository.publish("edges", staged, b.manifest(**b.edge_manifest()))
    with Client(server.target) as client:
        *_, last = client.submit("edges", bad)
    assert (last.state, last.check) == ("REJECTED", "golden")
    assert "guard.golden_bytes" in last.reason
