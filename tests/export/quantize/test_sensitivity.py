"""Which convolutions stay float: mixing reproduces both ends, and a spoiled one is found."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from common.progress import no_progress
from export.build import Options, build
from export.errors import ExportError
from export.graph.contract import Contract
from export.graph.writer import write
from export.parity.parity import Thresholds
from export.quantize import int8, sensitivity
from export.quantize.sensitivity import Mixer, choose, stricter
from tests.export.conftest import SIZE, street_like

FRAMES = street_like(4)


@pytest.fixture(scope="module")
def graphs(pack):
    original = write(pack.network(), pack.spec, size=SIZE, batch=1)
    return original, int8.quantise(original, FRAMES, classes=12, count=4).model


def run(model, name="probabilities"):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([name], {"frame": f[None]})[0] for f in FRAMES])


class TestTheMixer:
    def test_nothing_chosen_is_the_float_graph(self, graphs):
        original, quantised = graphs
        mixed = Mixer(original, quantised).mix(set())
        assert mixed == original

    def test_all_chosen_is_the_quantised_graph(self, graphs):
        original, quantised = graphs
        mixer = Mixer(original, quantised)
        assert len(mixer.names) == sum(n.op_type == "Conv" for n in original.graph.node)
        mixed = mixer.mix(set(mixer.names))
        onnx.checker.check_model(mixed, full_check=True)
        assert np.array_equal(run(mixed), run(quantised))

    def test_those_kept_are_what_the_quantiser_would_keep(self, graphs):
        original, quantised = graphs
        mixer = Mixer(original, quantised)
        keep = mixer.names[::3]
        wanted = int8.quantise(original, FRAMES, classes=12, count=4, keep=[f"^{n}$" for n in keep]).model
        mixed = mixer.mix(set(mixer.names) - set(keep))
        assert np.array_equal(run(mixed), run(wanted))
        convolutions = {n.name: n.input[1] for n in mixed.graph.node if n.op_type == "Conv"}
        assert all(not convolutions[name].endswith("Output") for name in keep)


def spoiled(pack):
    """The scales of one convolution's weights are eight times what was calibrated."""
    original = write(pack.network(), pack.spec, size=SIZE, batch=1)
    quantised = int8.quantise(original, FRAMES, classes=12, count=4).model
    mixer = Mixer(original, quantised)
    victim = mixer.names[len(mixer.names) // 2]
    weight = mixer._weights[next(n for n in original.graph.node if n.name == victim).input[1]]
    scale = mixer._held[weight.input[1]]
    scale.CopyFrom(onnx.numpy_helper.from_array(8 * onnx.numpy_helper.to_array(scale), scale.name))
    return original, quantised, victim


def test_the_convolution_whose_scale_is_wrong_is_the_first_to_stay_float(pack):
    original, quantised, victim = spoiled(pack)
    contract = Contract("segmentation", pack.spec.classes)
    wanted = Thresholds(agreement=0.85, boundary=0.5, confidence_mean=12.0)
    found = choose(original, quantised, FRAMES, contract, wanted, progress=no_progress)
    assert found.keep[0] == victim
    assert found.report["missed"]
    assert found.report["automatic"] == len(found.keep) < 5


class Clock:
    """A second passes each time somebody looks."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        self.time += 1
        return self.time


def test_a_search_out_of_time_answers_the_best_so_far(pack):
    original, quantised, victim = spoiled(pack)
    count = len(Mixer(original, quantised).names)
    contract = Contract("segmentation", pack.spec.classes)
    wanted = Thresholds(agreement=0.85, boundary=0.5, confidence_mean=12.0)
    # Time to measure all of them, and for one step of the bisection.
    budget = (count + 2) / sensitivity.MEASURING
    long = choose(
        original, quantised, FRAMES, contract, wanted, progress=no_progress, clock=Clock(), budget=10 * count
    )
    short = choose(
        original, quantised, FRAMES, contract, wanted, progress=no_progress, clock=lambda: 0.0, budget=1e-9
    )
    assert long.report["complete"]
    assert short.keep == long.keep  # a clock that stands still never ends it
    few = choose(
        original, quantised, FRAMES, contract, wanted, progress=no_progress, clock=Clock(), budget=budget
    )
    assert few.report["measured"] == count
    assert victim in few.keep
    assert len(long.keep) <= len(few.keep) <= count // 2


def test_a_search_without_time_says_how_far_it_came(pack):
    original, quantised, _ = spoiled(pack)
    contract = Contract("segmentation", pack.spec.classes)
    wanted = Thresholds(agreement=0.99999, boundary=0.99999, confidence_mean=0.001)
    with pytest.raises(ExportError, match=r"in float, 2 of them measured.*longer than 4 s \(--int8-budget"):
        choose(original, quantised, FRAMES, contract, wanted, progress=no_progress, clock=Clock(), budget=4)


def test_those_measured_first_are_the_ends_and_then_spread_over_all():
    for count in (1, 2, 3, 7, 16, 123):
        names = [str(i) for i in range(count)]
        order = [int(name) for name in sensitivity.spread(names)]
        assert sorted(order) == list(range(count))
        part = count // 8
        assert set(order[: 2 * part]) == {*range(part), *range(count - part, count)}
        for few in (3, 5, 9, 17):
            places = sorted(order[2 * part : 2 * part + few])
            if few < count - 2 * part:
                assert max(np.diff(places)) <= 2 * (count - 2 * part - 1) / (few - 1) + 1


def test_nothing_is_kept_where_parity_is_met(graphs, pack):
    little = Thresholds(agreement=0.0, boundary=0.0, confidence_mean=255)
    found = choose(*graphs, FRAMES, Contract("segmentation", pack.spec.classes), little, progress=no_progress)
    assert found.keep == ()


def test_what_no_choice_can_reach_is_refused(pack, tmp_path):
    impossible = Options(precision="int8", threads=1, int8_frames=2, thresholds={"agreement": 1.5})
    with pytest.raises(ExportError, match=r"misses parity with half of the .* convolutions in float"):
        build(pack, tmp_path / "repo", options=impossible)
    assert not (tmp_path / "repo").exists()


def test_those_that_decide_were_not_calibrated_on():
    frames = np.arange(20)
    calibrated, unseen = sensitivity.hold_out(frames)
    assert len(unseen) == 4
    assert sorted([*calibrated, *unseen]) == list(range(20))
    assert np.diff(unseen).min() >= 4
    for few in (1, 3):
        assert all(len(part) == few for part in sensitivity.hold_out(frames[:few]))


def test_the_search_asks_for_a_little_more_than_the_thresholds():
    t = stricter(Thresholds(agreement=0.9, confidence_mean=10.0))
    assert t.agreement == pytest.approx(1 - 0.1 * sensitivity.MARGIN)
    assert t.confidence_mean == pytest.approx(10 * sensitivity.MARGIN)


def test_the_manifest_says_what_was_kept_and_why(pack, tmp_path):
    contract = Contract("segmentation", pack.spec.classes)
    original = write(pack.network(), pack.spec, size=SIZE, batch=None, form="per-class")
    whole = int8.quantise(original, pack.golden(), classes=12)
    answers = {
        name: np.concatenate([run_on(m, name, pack.golden()) for m in (original, whole.model)])
        for name in contract.compared
    }
    n = len(pack.golden())
    difference = np.abs(answers["confidence"][:n].astype(int) - answers["confidence"][n:]).mean()
    asked = {"agreement": 0.0, "boundary": 0.0, "confidence_mean": 0.8 * float(difference)}
    options = Options(precision="int8", threads=1, thresholds=asked)
    report = build(pack, tmp_path / "repo", options=options).manifest["engine"]["int8"]
    assert 0 < report["search"]["automatic"] == len(report["kept"])
    assert set(report["kept"]) <= set(report["search"]["costs"])
    assert "confidence" in report["search"]["missed"][0]
    assert report["convolutions"]["int8"] == report["convolutions"]["all"] - len(report["kept"])


def run_on(model, name, frames):
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([name], {"frame": f[None]})[0] for f in frames])
