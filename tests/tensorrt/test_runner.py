"""The TensorRT runner on fakes that enforce the documented rules; the reference is plain numpy."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from runtime.config import EngineConfig
from runtime.engines import Engine
from runtime.engines.cuda.context import CudaError
from runtime.engines.tensorrt.engine import TensorRTEngine
from runtime.engines.tensorrt.library import Log, logger, open_runtime
from runtime.errors import Refused
from tests.tensorrt.fakes import Device, library, plan
from tests.waits import PATIENCE

MIX = np.array([0.25, 0.5, 0.25], np.float32)
DYNAMIC = {"shape": (-1, 4, 5, 3), "profile": ((1, 4, 5, 3), (2, 4, 5, 3), (6, 4, 5, 3))}


def load(device: Device, model: bytes | None = None, *, candidate: bool = True, lanes: int = 1, **more):
    quirks, host_code = more.pop("quirks", {}), more.pop("host_code", False)
    return TensorRTEngine.load(
        model if model is not None else plan(),
        "fp32",
        EngineConfig(concurrency=lanes, device="cuda", host_code=host_code),
        candidate=candidate,
        library=library(device, **quirks),
        driver=device.driver,
        **more,
    )


def frames(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 4, 5, 3), np.uint8)


def expect(frame: np.ndarray, mix: np.ndarray = MIX) -> dict[str, np.ndarray]:
    return {"brightest": frame.max(-1), "mixed": (frame.astype(np.float64) @ mix).astype(np.float32)}


def test_it_is_an_engine_and_says_what_it_is() -> None:
    device = Device()
    with load(device) as engine:
        assert isinstance(engine, Engine)
        (frame,) = engine.spec.inputs
        assert (frame.name, frame.datatype, frame.shape) == ("frame", "UINT8", (2, 4, 5, 3))
        assert [t.name for t in engine.spec.outputs] == ["brightest", "mixed"]
        assert (engine.spec.kind, engine.spec.precision, engine.spec.device) == ("tensorrt", "fp32", "cuda")
        assert engine.memory_bytes > 1 << 20
        assert engine.layers()["Layers"] == ["max", "dot"]
    assert device.clean()


def test_answers_equal_numpy_and_come_in_the_order_asked_for() -> None:
    device = Device()
    with load(device) as engine:
        for seed in range(5):
            frame = frames(2, seed)
            answer = engine.run({"frame": frame}, ["mixed", "brightest"])
            assert list(answer) == ["mixed", "brightest"]
            for name, value in expect(frame).items():
                np.testing.assert_allclose(answer[name], value, rtol=1e-6)
        first = engine.run({"frame": frame}, ["brightest"])
        engine.run({"frame": frames(2, 99)}, ["brightest"])
        np.testing.assert_array_equal(first["brightest"], frame.max(-1))  # not a view of reused memory


def test_a_frame_that_is_not_contiguous_is_taken() -> None:
    with load(Device()) as engine:
        frame = frames(2)[:, ::-1, ::-1]
        np.testing.assert_array_equal(engine.run({"frame": frame}, ["brightest"])["brightest"], frame.max(-1))


def test_warm_engine_launches_graphs_only() -> None:
    device = Device()
    with load(device) as engine:
        before = device.launched
        for seed in range(4):
            engine.run({"frame": frames(2, seed)}, ["mixed"])
        assert device.launched - before == 4


def test_without_cuda_python_every_run_is_ordinary() -> None:
    device = Device(graphs=False)
    with load(device) as engine:
        frame = frames(2)
        np.testing.assert_allclose(
            engine.run({"frame": frame}, ["mixed"])["mixed"], expect(frame)["mixed"], rtol=1e-6
        )
        assert device.launched == 0


def test_a_network_that_cannot_be_captured_runs_without_a_graph_and_says_so() -> None:
    device = Device()
    with load(device, plan(graph=False)) as engine:
        frame = frames(2)
        np.testing.assert_array_equal(engine.run({"frame": frame}, ["brightest"])["brightest"], frame.max(-1))
        assert "capturing" in engine.graph_refused
        assert device.launched == 0


def test_a_new_batch_size_drops_the_graph_and_makes_another() -> None:
    device = Device()
    with load(device, plan(**DYNAMIC)) as engine:
        for n in (2, 5, 5, 5, 1, 6, 6, 2, 2):  # the fake refuses a stale graph and a premature capture
            frame = frames(n, n)
            answer = engine.run({"frame": frame}, ["brightest", "mixed"])
            for name, value in expect(frame).items():
                np.testing.assert_allclose(answer[name], value, rtol=1e-6)
    assert device.clean()


def test_a_batch_outside_the_profile_is_refused_and_the_engine_goes_on() -> None:
    with load(Device(), plan(**DYNAMIC)) as engine:
        with pytest.raises(RuntimeError, match=r"cannot have the shape \[7, 4, 5, 3\].*--batch"):
            engine.run({"frame": frames(7)}, ["mixed"])
        frame = frames(3)
        np.testing.assert_array_equal(engine.run({"frame": frame}, ["brightest"])["brightest"], frame.max(-1))


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ({}, ["mixed"], "input 'frame' is missing"),
        ({"frame": np.zeros((2, 4, 5, 3), np.float32)}, ["mixed"], "float32"),
        ({"frame": np.zeros((2, 4, 5), np.uint8)}, ["mixed"], "takes UINT8"),
        ({"frame": np.zeros((2, 4, 5, 3), np.uint8)}, ["depth"], "no tensor 'depth'"),
    ],
)
def test_a_request_that_does_not_fit(inputs: dict, outputs: list[str], says: str) -> None:
    with load(Device()) as engine, pytest.raises(ValueError, match=says):
        engine.run(inputs, outputs)


def test_runs_from_many_threads_never_share_a_context() -> None:
    device = Device()
    with load(device, plan(**DYNAMIC), candidate=False, lanes=3) as engine:

        def one(seed: int) -> bool:
            frame = frames(1 + seed % 4, seed)
            answer = engine.run({"frame": frame}, ["brightest", "mixed"])
            return all(np.allclose(answer[name], value) for name, value in expect(frame).items())

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(one, range(200)))
    assert device.clean()


def test_promoted_has_new_lanes_on_the_same_plan() -> None:
    device = Device()
    candidate = load(device, lanes=2)
    assert device.contexts == 2  # the plan's thread and one lane
    live = candidate.with_serving_threads()
    candidate.close()
    assert device.contexts == 3  # the plan's thread and two lanes
    frame = frames(2)
    np.testing.assert_array_equal(live.run({"frame": frame}, ["brightest"])["brightest"], frame.max(-1))
    live.close()
    assert device.clean()


def test_refit_gives_a_standby_engine_and_leaves_this_one_alone() -> None:
    device = Device()
    engine = load(device)
    frame, other = frames(2), np.array([1.0, -1.0, 0.5])
    standby = engine.refit({"mix": other})
    for _ in range(3):
        new = standby.run({"frame": frame}, ["mixed"])["mixed"]
        np.testing.assert_allclose(new, expect(frame, other)["mixed"], rtol=1e-5, atol=1e-3)
        old = engine.run({"frame": frame}, ["mixed"])["mixed"]
        np.testing.assert_allclose(old, expect(frame)["mixed"], rtol=1e-6)
    engine.close()
    standby.refit({"mix": MIX}).close()
    standby.close()
    assert device.clean()


@pytest.mark.parametrize(
    ("weights", "more", "quirks", "says"),
    [
        ({}, {}, {}, "'mix' given for the plan's 1 refittable weights is missing"),
        ({"mix": MIX, "head.bias": MIX}, {}, {}, "'head.bias' cannot be changed in this plan"),
        ({"mix": np.zeros(4)}, {}, {}, "'mix' has 4 values, the plan's weight has 3"),
        ({"mix": np.array([1, np.nan, 0])}, {}, {}, "not finite"),
        ({"mix": np.array([1, 7e4, 0])}, {}, {"refit_dtype": "HALF"}, "not finite as float16"),
        ({"mix": MIX}, {}, {"refit_dtype": "BF16"}, "numpy cannot hold"),
        ({"mix": MIX}, {"refittable": False}, {}, "built without refittable weights"),
        ({"mix": MIX}, {}, {"refit_fails": True}, "half changed.*ran out of memory.*in service is untouched"),
    ],
)
def test_a_refit_that_cannot_be_is_refused_and_changes_nothing(
    weights: dict, more: dict, quirks: dict, says: str
) -> None:
    device = Device()
    engine = load(device, plan(**more), quirks=quirks)
    with pytest.raises(Refused, match=says):
        engine.refit(weights)
    frame = frames(2)
    np.testing.assert_allclose(
        engine.run({"frame": frame}, ["mixed"])["mixed"], expect(frame)["mixed"], rtol=1e-6
    )
    engine.close()
    assert device.clean()


@pytest.mark.parametrize(
    ("model", "quirks", "says"),
    [
        (b"not a plan", {}, "cannot be loaded by tensorrt 11.4.0.106: magicTag.*--backend tensorrt"),
        (plan(), {"runtime_error": "CUDA initialization failure with error: 35"}, "failure with error: 35"),
        (plan(memory=1 << 40), {}, "needs 1048576 MiB of device memory"),
        (plan(format="HWC8"), {}, "not a plain array"),
        (plan(data_dependent=True), {}, "size that depends on the data"),
        (plan(contexts=0), {}, "out of device memory; free device memory"),
        (plan(fails=True), {}, "the kernel could not be launched"),
        (plan(host_code=True), {}, r"contains host code; .* needs engine\.host_code"),
    ],
)
def test_a_plan_that_cannot_be_served_is_refused_and_leaks_nothing(
    model: bytes, quirks: dict, says: str
) -> None:
    device = Device()
    with pytest.raises(Refused, match=says) as caught:
        load(device, model, quirks=quirks)
    assert caught.value.check == "load"
    assert device.clean()


@pytest.mark.parametrize(
    ("quirks", "says"),
    [
        ({"no_runtime": True}, "no runtime .*returned nullptr.*nvidia-smi"),
        ({"no_refitter": True}, "no refitter .*returned nullptr"),
    ],
)
def test_a_factory_that_gives_nothing_is_told(quirks: dict, says: str) -> None:
    device = Device()
    with pytest.raises(Refused, match=says):
        load(device, quirks=quirks, weights={"mix": MIX})
    assert device.clean()


def test_each_context_has_the_profile() -> None:
    device = Device()
    with load(device, plan(**DYNAMIC, profiles_are_chosen=True), candidate=False, lanes=3) as engine:
        frame = frames(3)
        np.testing.assert_array_equal(engine.run({"frame": frame}, ["brightest"])["brightest"], frame.max(-1))
    with pytest.raises(Refused, match=r"cannot have the optimisation profile.*engine\.concurrency = 1"):
        load(device, plan(**DYNAMIC, profiles_are_chosen="once"), candidate=False, lanes=2)
    assert device.clean()


def test_one_logger_outlives_the_engine_it_was_made_for() -> None:
    """A swap: the old engine goes while the new one lives; the fake refuses a second logger."""
    device = Device()
    old = load(device)
    new = old.refit({"mix": MIX})
    old.close()
    with pytest.raises(Refused, match="magicTag"):
        TensorRTEngine.load(
            b"nonsense",
            "fp32",
            EngineConfig(),
            candidate=True,
            library=new._plan.library,
            driver=device.driver,
        )
    third = new.with_serving_threads()
    new.close()
    third.close()
    assert device.clean()


def test_an_error_that_another_engine_logged_is_not_taken_for_ones_own() -> None:
    device = Device()
    engine = load(device)
    shared = engine._plan.library

    def elsewhere() -> None:
        logger(shared, Log()).log(shared.module.ILogger.ERROR, "somebody else's trouble")

    log = Log()
    logger(shared, log)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert log.errors() == ["somebody else's trouble"]
    assert log.errors(here=True) == []
    open_runtime(shared, log, host_code=False)
    engine.close()


def test_a_log_hears_each_word_once_and_none_after_it_is_gone() -> None:
    found = library(Device())
    first, last = Log(), Log()
    said = logger(found, first)
    for _ in range(2):
        assert logger(found, last) is said
    del first
    said.log(found.module.ILogger.ERROR, "one")
    assert last.errors() == ["one"]


def test_a_lost_device_is_told_and_closing_goes_on() -> None:
    device = Device()
    before = threading.active_count()
    engine = load(device, candidate=False, lanes=2)
    device.lost = True
    with pytest.raises(CudaError, match="illegal memory access"):
        engine.run({"frame": frames(2)}, ["mixed"])
    with pytest.raises(Refused, match="illegal memory access"):
        engine.with_serving_threads()
    engine.close()
    engine.close()
    assert threading.active_count() == before


def test_a_promotion_that_fails_while_warming_leaks_nothing() -> None:
    device = Device()
    engine = load(device, lanes=2)
    engine._plan.engine.plan["fails"] = True
    with pytest.raises(Refused, match="could not be launched"):
        engine.with_serving_threads()
    engine.close()
    assert device.clean()


def test_the_memory_it_says_is_that_of_every_lane() -> None:
    device = Device()
    model = plan(**DYNAMIC)
    buffers = 6 * 4 * 5 * (3 + 1 + 4)  # frame, brightest, mixed at their largest
    for lanes in (1, 3):
        with load(device, model, candidate=False, lanes=lanes) as engine:
            assert engine.memory_bytes == len(model) + lanes * ((1 << 20) + buffers)


def test_host_code_is_allowed_when_configured() -> None:
    with load(Device(), plan(host_code=True), host_code=True) as engine:
        engine.refit({"mix": MIX}).close()


def test_profile_adds_up_the_layers() -> None:
    with load(Device()) as engine:
        assert engine.profile({"frame": frames(2)}, runs=4) == [
            {"layer": "max", "milliseconds": 0.25},
            {"layer": "dot", "milliseconds": 0.5},
        ]


def test_close_waits_for_the_run_and_refuses_the_next() -> None:
    device = Device()
    engine = load(device)
    lane = engine._take()
    closing = threading.Thread(target=engine.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    engine._give(lane)
    closing.join(PATIENCE)
    assert not closing.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        engine.run({"frame": frames(2)}, ["mixed"])
    assert device.clean()


def test_without_a_device_loading_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.engines.cuda import context

    def absent(library: str = "") -> context.Probe:
        raise context.CudaError("no CUDA driver")

    monkeypatch.setattr(context, "probe", absent)
    with pytest.raises(Refused, match="TensorRT cannot be used: no CUDA driver"):
        TensorRTEngine.load(b"", "fp32", EngineConfig(), candidate=True)


def test_the_server_knows_the_kind_and_does_not_serve_rtx_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.engines import load as load_engine
    from runtime.engines.cuda import context

    def absent(library: str = "") -> context.Probe:
        raise context.CudaError("no CUDA driver")

    monkeypatch.setattr(context, "probe", absent)
    with pytest.raises(Refused, match="TensorRT cannot be used: no CUDA driver"):
        load_engine(plan(), "tensorrt", "fp32", EngineConfig(), candidate=True)
    with pytest.raises(Refused, match="built for a check and is not served"):
        load_engine(plan(), "tensorrt-rtx", "fp32", EngineConfig(), candidate=True)
