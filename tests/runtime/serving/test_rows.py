"""No answer holds another client's row: what requests bring, how a shared run is cut, which engines share."""

from __future__ import annotations

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from runtime.client import Client, Rejected
from runtime.config import EngineConfig, QueueConfig, ServerConfig
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.errors import Refused, ServiceError
from runtime.repository.repository import Repository
from runtime.serving import sharing
from runtime.serving.queueing import BatchingPolicy
from runtime.serving.request import InferRequest, InputTensor
from runtime.serving.served_model import ServedModel, _Work
from runtime.serving.slot import Slot
from runtime.swap.verify import Verifier
from runtime.tensors import EngineSpec, TensorSpec
from tests.runtime import builders as b
from tests.runtime.scenarios.test_scheduling import until
from tests.waits import PATIENCE


def graph(nodes, inputs, outputs, inits=()):
    """An ONNX model of float32 tensors with a free first side; `inputs`: {name: (type, sides)}."""
    infos = [[h.make_tensor_value_info(n, *ts) for n, ts in each.items()] for each in (inputs, outputs)]
    made = h.make_graph(nodes, "g", *infos, list(inits))
    return h.make_model(made, opset_imports=[h.make_opsetid("", 18)], ir_version=9).SerializeToString()


X = {"x": (T.FLOAT, ["N", 4])}
Y = {"y": (T.FLOAT, ["N", 4])}
AXIS = nh.from_array(np.array([0]), "axis")
MEAN = graph(
    [h.make_node("ReduceMean", ["x", "axis"], ["m"]), h.make_node("Sub", ["x", "m"], ["y"])], X, Y, [AXIS]
)
ENDS = [nh.from_array(np.array([n]), k) for k, n in (("zero", 0), ("end", 99), ("two", 2))]
HALF = graph(
    [h.make_node("Slice", ["x", "zero", "end", "axis", "two"], ["y"])],
    X,
    {"y": (T.FLOAT, ["M", 4])},
    [AXIS, *ENDS],
)
ADD = graph([h.make_node("Add", ["x", "x"], ["y"])], X, Y)
REACH = graph(
    [h.make_node("Gather", ["x", "i"], ["y"])], X | {"i": (T.INT64, ["N"])}, Y
)  # rows by index: of the whole run
UNIQUE = graph([h.make_node("Unique", ["x"], ["y"], axis=0, sorted=1)], X, {"y": (T.FLOAT, ["M", 4])})
SHARED = "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 300000 }"


def publish(repository: Repository, model: bytes, config: str, name: str = "road", **files: bytes) -> int:
    staged = repository.stage(name)
    (staged / "model.onnx").write_bytes(model)
    for file, content in files.items():
        (staged / file.replace("_", ".")).write_bytes(content)
    return repository.publish(name, staged, {"engine": {"kind": "onnxruntime", "file": "model.onnx"}}, config)


def row(*values):
    return np.repeat(np.array(values, np.float32)[:, None], 4, 1)


def together(server, requests):
    """The answers (or refusals) of requests that are sent at one time, after one that holds the engine."""
    engine = server.service.models.host("road").live.engine
    gate, run = threading.Event(), engine.run
    answers: dict[int, object] = {}

    def wait(inputs, names):
        assert gate.wait(60)
        return run(inputs, names)

    engine.run = wait

    def ask(number, inputs):
        with Client(server.target) as client:
            try:
                answers[number] = client.infer_tensors("road", inputs).outputs["y"]
            except Rejected as refused:
                answers[number] = refused.reason

    threads = []
    for number, inputs in enumerate([requests[0], *requests]):
        threads.append(threading.Thread(target=ask, args=(number - 1, inputs)))
        threads[-1].start()
        until(lambda: server.service.account.snapshot().in_flight == len(threads))
    until(lambda: server.service.models.host("road").pending == len(requests))
    gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    engine.run = run
    return [answers[number] for number in range(len(requests))]


def test_inputs_of_different_batch_sizes_are_refused_in_tritons_words(repository, quick, serve):
    publish(repository, b.simple().SerializeToString(), "max_batch_size: 8", "simple")
    target = serve(quick).target
    with Client(target) as client:
        for first, second in ((2, 1), (1, 2), (0, 1), (1, 0), (3, 8)):
            inputs = {f"INPUT{i}": np.ones((n, 16), np.int32) for i, n in enumerate((first, second))}
            with pytest.raises(Rejected) as refused:
                client.infer_tensors("simple", inputs, request_id="7")
            # Triton 2.51's words
            assert refused.value.reason == (
                "[request id: 7] input 'INPUT1' batch size does not match other inputs for 'simple'"
            )
            with pytest.raises(Rejected, match=r": \[request id: <id_unknown>\] input 'INPUT1' batch size"):
                client.infer_tensors("simple", inputs)


def test_a_model_without_batches_may_take_what_its_engine_takes_but_shares_no_run(repository, quick, serve):
    """Without max_batch_size a first side is a side like any other: broadcasting is the engine's own."""
    publish(repository, b.simple().SerializeToString(), "", "road")
    server = serve(dataclasses.replace(quick, queue=QueueConfig(max_batch=8)))
    with Client(server.target) as client:
        inputs = {"INPUT0": np.ones((1, 16), np.int32), "INPUT1": np.full((2, 16), 5, np.int32)}
        assert client.infer_tensors("road", inputs).outputs["OUTPUT0"].tolist() == [[6] * 16] * 2
    host = server.service.models.host("road")
    spec = host.live.engine.spec
    for sizes, shares in (((1, 2), False), ((2, 2), True)):
        tensors = {t.name: np.zeros((n, 16), np.int32) for t, n in zip(spec.inputs, sizes, strict=True)}
        work = _Work(tensors, (), None, "")
        job = host._job(InferRequest("road", "", "", {}, [], []), work, host.live, None)
        assert (job.batch_key is not None) == shares


def test_a_shape_valued_input_has_no_batch_side_and_is_never_joined():
    spec = EngineSpec(
        (TensorSpec("x", "FP32", (-1, 4)), TensorSpec("shape", "INT64", (-1,))),
        (TensorSpec("y", "FP32", (-1, 4)),),
        "onnxruntime",
        "fp32",
        "cpu",
    )
    host = ServedModel("road", ServerConfig())
    host.configure(BatchingPolicy(max_batch=8, max_batch_size=8, whole=frozenset({"shape"})))
    host.flip(Slot(1, _Engine(spec, lambda x: x), {}))
    tensors = [
        InputTensor("x", "FP32", (3, 4), np.zeros((3, 4), np.float32)),
        InputTensor("shape", "INT64", (2,), np.array([3, 4])),
    ]
    answer = host.infer(InferRequest("road", "", "", {}, tensors, []))
    assert answer.outputs[0][2].shape == (3, 4)


class _Engine:
    """Says what `gives` makes of its input "x"."""

    memory_bytes = 0

    def __init__(self, spec, gives):
        self.spec, self._gives, self.sizes = spec, gives, []

    def run(self, inputs, outputs):
        self.sizes.append(len(inputs["x"]))
        return dict.fromkeys(outputs, self._gives(inputs["x"]))

    def close(self):
        return


PLAIN = EngineSpec(
    (TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),), "onnxruntime", "fp32", "cpu"
)


def jobs_of(host, *rows):
    requests = [InferRequest("road", "", "", {}, [], []) for _ in rows]
    works = [_Work({"x": x}, ("y",), None, "") for x in rows]
    return [host._job(r, w, host.live, None) for r, w in zip(requests, works, strict=True)]


@pytest.mark.parametrize(
    "gives",
    [
        lambda x: x if len(x) == 1 else x[:-1],  # a row too few
        lambda x: x if len(x) == 1 else np.concatenate([x, x[:1]]),
        lambda x: x if len(x) == 1 else x.mean(),  # no side at all
        lambda x: x if len(x) == 1 else x.reshape(-1),
        lambda x: x if len(x) == 1 else x[None],
    ],
)
def test_outputs_that_are_not_the_rows_of_a_run_are_never_cut(gives, caplog):
    host = ServedModel("road", ServerConfig())
    host.configure(BatchingPolicy(max_batch=8))
    engine = _Engine(PLAIN, gives)
    host.flip(Slot(1, engine, {}))
    first, second = jobs_of(host, row(1), row(2))
    assert first.batch_key == second.batch_key is not None
    host._execute([first, second])()
    assert [job.result["y"][:, 0].tolist() for job in (first, second)] == [[1], [2]]
    assert engine.sizes == [2, 1, 1]
    assert "share no run" in caplog.text
    assert all(job.batch_key is None for job in jobs_of(host, row(1), row(2))), "it is not tried again"
    assert host.statistics_of(1).snapshot().executions == 2


def test_a_request_that_the_engine_cannot_run_fails_alone():
    def gives(x):
        if (x == 13).any():
            raise ValueError("thirteen")
        return x

    host = ServedModel("road", ServerConfig())
    host.configure(BatchingPolicy(max_batch=8))
    host.flip(Slot(1, _Engine(PLAIN, gives), {}))
    good, bad, other = jobs_of(host, row(1), row(13), row(3))
    host._execute([good, bad, other])()
    assert [job.result["y"][0, 0] for job in (good, other)] == [1, 3]
    assert isinstance(bad.error, ServiceError)
    assert "thirteen" in str(bad.error)
    assert good.error is other.error is None
    slot = host.live
    assert slot.failures == 1
    assert slot.failed_on[0]["x"][0, 0] == 13
    assert slot.shares, "a bad request does not end the sharing of the others"


def test_requests_of_no_rows_share_a_run_and_get_none():
    host = ServedModel("road", ServerConfig())
    host.configure(BatchingPolicy(max_batch=8))
    host.flip(Slot(1, _Engine(PLAIN, lambda x: x * 2), {}))
    jobs = jobs_of(host, row(), row(1, 2), row(), row(3))
    host._execute(jobs)()
    assert [job.result["y"][:, 0].tolist() for job in jobs] == [[], [2, 4], [], [6]]


@pytest.mark.parametrize(
    ("model", "mixes"), [(MEAN, True), (HALF, True), (REACH, True), (UNIQUE, True), (ADD, False)]
)
def test_an_engine_that_mixes_its_rows_is_run_request_by_request(model, mixes, repository, quick, serve):
    """Whatever config.pbtxt says: a version shows at its verification whether it keeps its rows apart."""
    publish(repository, model, SHARED)
    server = serve(quick)
    assert server.service.models.host("road").live.shares != mixes
    more = {"i": np.zeros(1, np.int64)} if model is REACH else {}
    values = (7777.0, 1000.0, 1.0)
    answers = together(server, [{"x": row(v), **more} for v in values])
    engine = OnnxRuntimeEngine.load(model, "fp32", EngineConfig(threads=1), candidate=False)
    for value, answer in zip(values, answers, strict=True):
        assert np.array_equal(answer, engine.run({"x": row(value), **more}, ["y"])["y"])


def test_contract_networks_share_runs_and_one_that_mixes_frames_does_not(repository, quick, serve):
    good = b.segmentation(*b.nearest_weights(), batch="N")
    b.publish(repository, model=good, batch="N")
    leaky = b.segmentation(*b.nearest_weights(), batch="N")
    for node in leaky.graph.node:  # the scores are those of the brightest frame of the run
        if node.op_type == "ArgMax":
            node.input[0] = "mixed"
            at = list(leaky.graph.node).index(node)
    leaky.graph.initializer.append(nh.from_array(np.array([0]), "first"))
    leaky.graph.node.insert(at, h.make_node("ReduceMax", ["full", "first"], ["most"]))
    leaky.graph.node.insert(at + 1, h.make_node("Expand", ["most", "shape"], ["mixed"]))
    leaky.graph.node.insert(at, h.make_node("Shape", ["full"], ["shape"]))
    b.publish(repository, "leaky", leaky, answers=b.golden(good), batch="N")
    service = serve(quick).service
    assert service.models.host("road").live.shares
    assert not service.models.host("leaky").live.shares
    verifier = Verifier(service.models.host("leaky"), repository, quick, service.ledger)
    assert "depends on the other rows" in "; ".join(verifier.verify(1, reference=None).notes)


def test_the_tap_is_given_no_frame_with_another_number_of_answers():
    seen = []
    host = ServedModel("road", ServerConfig())
    host.observe(seen.append)
    frame = np.zeros((2, 16, 32, 3), np.uint8)
    slot = SimpleNamespace(
        version=1, task=SimpleNamespace(outputs=("labels",), has_outputs=lambda outputs: True)
    )
    work = SimpleNamespace(inputs={"frame": frame}, source="", parameters={})
    for rows in (1, 3, 2):
        host._observed(work, slot, {"labels": np.zeros((rows, 16, 32), np.uint8)})
    assert [len(each.outputs["labels"]) for each in seen] == [2]


# -- what a version says and what it does -------------------------------------------------------------


def test_declared_shapes_that_a_run_contradicts_are_refused_by_name(repository, quick, serve):
    keep = nh.from_array(np.array([-1], np.float32), "low")
    wrong = graph(  # gives 8 columns and says 4; how many is known by running alone
        [
            h.make_node("Concat", ["x", "x"], ["xx"], axis=1),
            h.make_node("ReduceMax", ["xx", "axis"], ["most"], keepdims=0),
            h.make_node("Greater", ["most", "low"], ["kept"]),
            h.make_node("Compress", ["xx", "kept"], ["y"], axis=1),
        ],
        X,
        Y,
        [AXIS, keep],
    )
    publish(repository, wrong, "")
    service = serve(quick).service
    assert service.models.host("road").live is None
    reason = service.models.host("road").reason
    assert "contract: output 'y' is declared FP32 [-1, 4], a run gives FP32 [1, 8]" in reason


def test_a_promoted_engine_with_other_tensors_is_refused(repository, quick, serve):
    publish(repository, ADD, "")
    service = serve(quick).service
    verifier = Verifier(service.models.host("road"), repository, quick, service.ledger)
    candidate = verifier.verify(1, reference=None)
    other = _Engine(
        EngineSpec((TensorSpec("z", "FP32", (-1, 4)),), PLAIN.outputs, "onnxruntime", "fp32", "cpu"), abs
    )
    candidate.engine.with_serving_threads = lambda: other
    with pytest.raises(Refused, match="with all threads the engine has other tensors: inputs z FP32"):
        verifier.slot(candidate)


def test_a_promoted_engine_that_does_not_run_is_refused(repository, quick, serve):
    publish(repository, ADD, "")
    service = serve(quick).service
    verifier = Verifier(service.models.host("road"), repository, quick, service.ledger)
    candidate = verifier.verify(1, reference=None)

    def gives(x):
        raise RuntimeError("not with these threads")

    candidate.engine.with_serving_threads = lambda: _Engine(PLAIN, gives)
    with pytest.raises(Refused, match=r"load: .*not with these threads"):
        verifier.slot(candidate)


def test_a_foreign_version_is_run_on_the_inputs_that_it_brings(repository, quick, serve, tmp_path):
    """This graph runs on 6 columns only, which its declared sides do not say."""
    six = graph(
        [h.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": (T.FLOAT, ["N", "C"])},
        {"y": (T.FLOAT, ["N", 2])},
        [nh.from_array(np.ones((6, 2), np.float32), "w")],
    )
    publish(repository, six, "")
    for rows in (1, 3):
        np.savez(tmp_path / "inputs.npz", x=np.ones((rows, 6), np.float32))
        brought = (tmp_path / "inputs.npz").read_bytes()
        publish(repository, six, "", f"brings{rows}", inputs_npz=brought)
    service = serve(quick).service
    assert service.models.host("road").live is None, "on made-up sides it does not run"
    for rows in (1, 3):
        assert service.models.host(f"brings{rows}").live.shares


def test_numbers_that_an_engine_does_not_take_are_no_proof():
    def refuse(x):
        raise ValueError("no")

    assert "not known to keep its rows apart" in sharing.foreign_mixes_rows(
        _Engine(PLAIN, refuse), {"x": row(1)}
    )
