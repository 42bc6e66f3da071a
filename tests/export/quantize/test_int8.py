"""INT8: the arithmetic of the encoding, which frames it is calibrated on, and that the engine runs it."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, numpy_helper

import networks
from export.errors import ExportError
from export.graph.contract import Contract
from export.graph.lint import lint
from export.graph.writer import write
from export.parity import parity
from export.quantize import int8
from export.quantize.int8 import candidates, choose_frames, class_shares, quantise
from export.tensorrt import BuildOptions, build_plan
from networks.labels import STREET
from networks.pack import load_pack, write_pack
from runtime.engines.tensorrt.library import TensorRTError
from tests.export.conftest import SIZE, describe, street_like, weights

CLASSES = len(STREET.classes)


def model_of(batch=1, **changes):
    spec = describe(**changes)
    network = spec.create()
    network.load_state_dict(weights(spec))
    return write(network.eval(), spec, size=SIZE, batch=batch, metadata={"roadworthy.schema": "1"})


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def frames():
    return street_like(12)


@pytest.fixture(scope="module", params=int8.TARGETS)
def quantised(request, model, frames):
    return request.param, quantise(model, frames, classes=CLASSES, target=request.param, count=6).model


def session(model, optimised=None):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def answers(model, frames):
    run = session(model)
    names = ["labels", "confidence"]
    parts = [run.run(names, {"frame": f[None]}) for f in frames]
    return {name: np.concatenate([p[i] for p in parts]) for i, name in enumerate(names)}


class TestTheEncoding:
    def test_weights_are_int8_symmetric_with_one_scale_per_output_channel(self, model, quantised):
        """Against the textbook formula: scale = max|w| / 127 of each channel, value = round(w / scale)."""
        _, after = quantised
        constants = {i.name: numpy_helper.to_array(i) for i in after.graph.initializer}
        before = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        checked = 0
        for node in after.graph.node:
            if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
                continue
            codes, scales, zeros = (constants[name] for name in node.input)
            assert codes.dtype == zeros.dtype == np.int8
            assert not zeros.any()
            assert {a.name: a.i for a in node.attribute}["axis"] == 0
            weight = before[node.input[0].removesuffix("_quantized")]
            axes = tuple(range(1, weight.ndim))
            assert np.allclose(scales, np.abs(weight).max(axes) / 127, rtol=1e-2)
            spread = scales.reshape(-1, *[1] * (weight.ndim - 1))
            assert np.abs(codes * spread - weight).max() <= 0.51 * scales.max()
            checked += 1
        assert checked == sum(n.op_type == "Conv" for n in model.graph.node)

    def test_biases_stay_float(self, quantised):
        _, after = quantised
        constants = {i.name: i.data_type for i in after.graph.initializer}
        biases = [n.input[2] for n in after.graph.node if n.op_type == "Conv" and len(n.input) > 2]
        assert biases
        assert {constants[name] for name in biases} == {TensorProto.FLOAT}

    def test_activations_have_the_targets_type_and_zero_point(self, quantised):
        target, after = quantised
        constants = {i.name: numpy_helper.to_array(i) for i in after.graph.initializer}
        zeros = [constants[n.input[2]] for n in after.graph.node if n.op_type == "QuantizeLinear"]
        assert zeros
        assert {z.dtype for z in zeros} == {np.dtype(np.int8 if target == "tensorrt" else np.uint8)}
        if target == "tensorrt":
            assert not any(z.any() for z in zeros)

    def test_nothing_behind_the_logits_is_quantised(self, quantised):
        _, after = quantised
        producers = {o: n for n in after.graph.node for o in n.output}
        index = next(n for n in after.graph.node if n.op_type == "ArgMax")
        logits = {producers[index.input[0]].input[0]}
        behind = []
        for node in after.graph.node:
            if logits & set(node.input):
                logits |= set(node.output)
                behind.append(node.op_type)
        assert {"ArgMax", "Exp", "Resize"} <= set(behind)
        assert not {"QuantizeLinear", "DequantizeLinear"} & set(behind)

    def test_the_contract_and_the_metadata_are_untouched(self, model, quantised):
        _, after = quantised
        assert list(after.graph.input) == list(model.graph.input)
        assert list(after.graph.output) == list(model.graph.output)
        assert {p.key: p.value for p in after.metadata_props} == {"roadworthy.schema": "1"}

    def test_tensorrts_lint_takes_its_encoding_and_refuses_the_other(self, quantised):
        target, after = quantised
        assert bool(lint(after).errors) == (target == "onnxruntime")

    def test_is_the_same_every_time(self, model, frames):
        first, second = (quantise(model, frames, classes=CLASSES, count=4).model for _ in range(2))
        assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)

    def test_the_original_is_not_changed(self, frames):
        model = model_of()
        before = model.SerializeToString(deterministic=True)
        quantise(model, frames[:2], classes=CLASSES)
        assert model.SerializeToString(deterministic=True) == before


class TestTheEngine:
    def test_agrees_with_float_within_the_gate_for_int8(self, model, quantised, frames):
        _, after = quantised
        contract = Contract("segmentation", STREET.classes)
        report = parity.compare(answers(after, frames), answers(model, frames), contract)
        # Random weights have thin margins: the labels of a trained network agree better.
        assert report["agreement"] > 0.93
        assert report["confidence_mean"] < 8

    def test_the_gate_refuses_ranges_taken_from_the_dark(self, model, frames):
        """Calibrated on black frames, every activation of a daylight frame is cut off."""
        dark = np.zeros_like(frames[:2])
        after = quantise(model, dark, classes=CLASSES).model
        contract = Contract("segmentation", STREET.classes)
        report = parity.compare(answers(after, frames), answers(model, frames), contract)
        assert not parity.judge(report, parity.DEFAULTS["int8"])["passed"]

    def test_onnx_runtime_computes_the_convolutions_in_8_bits(self, model, frames, tmp_path):
        after = quantise(model, frames, classes=CLASSES, count=4).model
        session(after, tmp_path / "optimised.onnx")
        kinds = [n.op_type for n in onnx.load(tmp_path / "optimised.onnx").graph.node]
        convolutions = sum(n.op_type == "Conv" for n in model.graph.node)
        assert kinds.count("QLinearConv") >= 0.9 * convolutions

    @pytest.mark.parametrize("batch", [None, 3])
    def test_any_batch_can_be_calibrated(self, batch, frames):
        model = model_of(batch)
        result = quantise(model, frames[:5], classes=CLASSES, count=5)
        feed = frames[:3]
        assert session(result.model).run(["labels"], {"frame": feed})[0].shape == (3, *SIZE)


class TestTheReport:
    def test_names_the_frames_and_is_json(self, model, frames):
        stages = []
        report = quantise(
            model, frames, classes=CLASSES, count=5, progress=lambda *step: stages.append(step)
        ).report
        assert report["candidates"] == 12
        assert len(set(report["frames"])) == 5
        convolutions = sum(n.op_type == "Conv" for n in model.graph.node)
        assert report["convolutions"] == {"int8": convolutions, "all": convolutions}
        assert report["bytes"][1] < 0.5 * report["bytes"][0]
        assert stages[0] == ("frames", 1, 12)
        assert stages[-1] == ("calibrate", 1, 1)

    def test_what_is_kept_stays_float(self, model, frames):
        whole = quantise(model, frames[:2], classes=CLASSES).report
        report = quantise(model, frames[:2], classes=CLASSES, keep=[r"^classify\.", r"^stem\.0\."]).report
        assert report["convolutions"]["int8"] == whole["convolutions"]["int8"] - 2
        assert len(report["kept"]) == 2

    def test_nothing_is_printed(self, model, frames, capfd, caplog):
        with caplog.at_level(logging.WARNING):
            quantise(model, frames[:3], classes=CLASSES, method="percentile")
        assert capfd.readouterr().out == ""
        assert not caplog.records


class TestTheChoiceOfFrames:
    def test_shares_ignore_what_has_no_label(self):
        labels = np.array([[[0, 0, 1, 255]], [[255, 255, 255, 255]]], np.uint8)
        assert class_shares(labels, 2).tolist() == [[2 / 3, 1 / 3], [0, 0]]

    def test_the_only_frame_with_a_class_is_chosen_first_but_for_none(self):
        shares = np.tile([0.9, 0.1, 0.0], (50, 1))
        shares[37] = [0.8, 0.1, 0.1]
        assert choose_frames(shares, 4)[0] == 37

    def test_greedy_comes_close_to_the_best_of_all_choices(self):
        def value(rows):
            return np.log(rows.sum(0) / 3 + 1e-3).sum()

        for seed in range(5):
            shares = np.random.default_rng(seed).dirichlet([0.3] * 4, 9)
            best = max(value(shares[list(c)]) for c in itertools.combinations(range(9), 3))
            random = np.mean([value(shares[list(c)]) for c in itertools.combinations(range(9), 3)])
            found = value(shares[choose_frames(shares, 3)])
            assert found >= random + 0.63 * (best - random)

    def test_never_more_frames_than_there_are_and_none_twice(self):
        shares = np.random.default_rng(0).dirichlet([1] * 5, 6)
        assert sorted(choose_frames(shares, 99)) == list(range(6))

    def test_replay_frames_come_before_golden_ones(self, tmp_path):
        spec = describe()
        large = street_like(3, (128, 192))
        label = np.zeros((128, 192), np.uint8)
        replay = [(f, label, s) for f, s in zip(large, ("train", "holdout", "train"), strict=True)]
        golden = street_like(2)
        write_pack(tmp_path / "a", spec, weights(spec), golden=golden, replay=replay)
        write_pack(tmp_path / "b", spec, weights(spec), golden=golden)
        write_pack(tmp_path / "c", spec, weights(spec))
        found = [candidates(load_pack(tmp_path / name), SIZE) for name in "abc"]
        assert [f.shape for f in found] == [(2, *SIZE, 3), (2, *SIZE, 3), (0, *SIZE, 3)]
        assert np.array_equal(found[1], golden)
        assert candidates(load_pack(tmp_path / "a"), SIZE, limit=1).shape[0] == 1


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"target": "openvino"}, "int8 target 'openvino' is unknown"),
            ({"method": "entropy"}, "int8 calibration 'entropy' is unknown"),
            ({"operators": ["Conv", "Softmax"]}, "operators must be Conv and any of Add, Concat"),
            ({"count": 0}, "at least one frame, not 0"),
            ({"keep": ["("]}, "is not a regular expression"),
            ({"keep": ["nonesuch"]}, "nothing to keep is called 'nonesuch'"),
            ({"keep": ["."]}, "no convolution is left to quantise"),
            (
                {"frames": np.zeros((2, 32, 32, 3), np.uint8)},
                r"frames are uint8 \[32, 32, 3\], the model wants",
            ),
            ({"frames": np.zeros((2, *SIZE, 3), np.float32)}, "frames are float32"),
            ({"frames": np.zeros((0, *SIZE, 3), np.uint8)}, "needs calibration frames and there are none"),
        ],
    )
    def test_by_one_line(self, model, frames, changes, words):
        arguments = {"frames": frames, "classes": CLASSES, **changes}
        with pytest.raises(ExportError, match=words) as error:
            quantise(model, **arguments)
        assert "\n" not in str(error.value)

    def test_a_graph_of_another_kind(self, frames):
        graph = onnx.helper.make_graph([], "other", [], [])
        with pytest.raises(ExportError, match="needs a graph of this project"):
            quantise(onnx.helper.make_model(graph), frames, classes=CLASSES)


def smallest(name):
    """The form of an architecture with the fewest weights among its examples."""

    def count(arguments):
        with torch.device("meta"):
            return sum(p.numel() for p in networks.create(name, classes=CLASSES, **arguments).parameters())

    return min(networks.architecture(name).EXAMPLES, key=count)


@pytest.mark.peers
class TestTensorRTsRealParser:
    """TensorRT-RTX parses and builds on a CPU; nothing is executed."""

    @pytest.mark.parametrize("name", networks.names())
    def test_builds_the_symmetric_encoding_of_every_network(self, name, frames):
        model = model_of(network=name, arguments=smallest(name))
        encoded = quantise(model, frames, classes=CLASSES, target="tensorrt", count=2).model
        try:
            plan = build_plan(
                encoded.SerializeToString(), BuildOptions(precision="int8"), backend="tensorrt-rtx"
            )
        except TensorRTError as error:
            if "pip install" in str(error):
                pytest.skip(str(error))
            raise
        assert [t.dtype for t in plan.inputs] == ["UINT8"]
        assert len(plan.data) > 10_000


torch.set_num_threads(1)
