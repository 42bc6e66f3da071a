"""CUDA graphs of the TensorRT runner: alone on the device, tried again, a few by shape, freed at the end."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from export.tensorrt import refit_plan
from runtime.config import EngineConfig
from runtime.engines.cuda.gate import GATE
from runtime.engines.tensorrt.contexts import EARNED, GRAPHS, PAUSE, TRIES
from runtime.engines.tensorrt.engine import TensorRTEngine
from runtime.engines.tensorrt.library import Library, TensorRTError
from runtime.errors import Refused
from tests.tensorrt.fakes import Device, library, plan

MIX = np.array([0.25, 0.5, 0.25], np.float32)
DYNAMIC = {"shape": (-1, 4, 5, 3), "profile": ((1, 4, 5, 3), (2, 4, 5, 3), (9, 4, 5, 3))}
LONG = 20.0  # seconds that nothing here takes, unless something is stuck


def load(
    device: Device, model: bytes | None = None, *, lanes: int = 1, found: Library | None = None
) -> TensorRTEngine:
    return TensorRTEngine.load(
        model if model is not None else plan(**DYNAMIC),
        "fp32",
        EngineConfig(concurrency=lanes, device="cuda"),
        candidate=lanes == 1,
        library=found or library(device),
        driver=device.driver,
    )


def right(engine: TensorRTEngine, batch: int, seed: int = 0) -> bool:
    """If one run with this batch size gives numpy's answer."""
    frame = np.random.default_rng(seed).integers(0, 256, (batch, 4, 5, 3), np.uint8)
    answer = engine.run({"frame": frame}, ["brightest", "mixed"])
    return np.array_equal(answer["brightest"], frame.max(-1)) and np.allclose(
        answer["mixed"], frame.astype(np.float64) @ MIX
    )


def test_no_other_thread_works_on_the_device_while_a_graph_is_captured() -> None:
    """Loading, promoting, refitting, running, profiling and closing engines wait for the end of a capture."""
    device = Device()
    found = library(device)
    names = ("run", "refit", "promote", "close", "look")
    others = {name: load(device, plan(), found=found) for name in names}
    engine = load(device, found=found)
    frame = np.zeros((2, 4, 5, 3), np.uint8)
    work: dict[str, Callable[[], Any]] = {
        "load": lambda: load(device, plan(), found=found).close(),
        "run": lambda: others["run"].run({"frame": frame}, ["mixed"]),
        "refit": lambda: others["refit"].refit({"mix": MIX}).close(),
        "promote": lambda: others["promote"].with_serving_threads().close(),
        "close": lambda: others["close"].close(),
        "profile": lambda: others["look"].profile({"frame": frame}, 2),
        "layers": lambda: others["look"].layers(),
        "refit_plan": lambda: refit_plan(plan(), {"mix": MIX}, library=found),
    }
    done: list[str] = []
    early: list[str] = []
    threads: list[threading.Thread] = []

    def during() -> None:
        if threads:
            return
        for name, one in work.items():
            threads.append(threading.Thread(target=lambda name=name, one=one: (one(), done.append(name))))
            threads[-1].start()
        for thread in threads:
            thread.join(0.05)
        early.extend(done)

    device.during = during
    for seed in range(4):
        assert right(engine, 3, seed)
    assert threads
    for thread in threads:
        thread.join(LONG)
    assert early == []
    assert sorted(done) == sorted(work)
    for one in (engine, *others.values()):
        one.close()
    assert device.broken == []
    assert device.clean()


def test_a_capture_does_not_wait_for_a_load_and_comes_later() -> None:
    device = Device()
    engine = load(device)
    with GATE.change():  # another engine is being loaded
        before = device.captured
        for seed in range(3):
            assert right(engine, 3, seed)
        assert device.captured == before
        assert engine.graph_refused == ""
    for seed in range(PAUSE):
        assert right(engine, 3, seed)
    assert device.captured == before + 1
    engine.close()
    assert device.clean()


def test_a_run_that_hangs_does_not_hold_up_the_others_at_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture waits for the runs in progress; if one does not end, the next attempt is some runs away."""
    device = Device()
    waited: list[bool] = []
    really = GATE.capture

    @contextmanager
    def capture(patience: float = 0.0) -> Iterator[bool]:
        with really(0.0) as alone:
            waited.append(alone)
            yield alone

    engine = load(device)
    monkeypatch.setattr(GATE, "capture", capture)
    inside, leave = threading.Event(), threading.Event()

    def hang() -> None:
        with GATE.run():
            inside.set()
            leave.wait(LONG)

    thread = threading.Thread(target=hang)
    thread.start()
    assert inside.wait(LONG)
    for seed in range(3 * PAUSE):
        assert right(engine, 3, seed)
    assert waited == [False] * 3
    leave.set()
    thread.join(LONG)
    for seed in range(PAUSE):
        assert right(engine, 3, seed)
    assert waited == [False] * 3 + [True]
    engine.close()
    assert device.clean()


def test_an_engine_that_nobody_closed_is_closed_when_the_process_ends() -> None:
    """Its objects would otherwise be destroyed on a thread without the context, which may crash."""
    code = """
import atexit
atexit.register(lambda: print("clean", device.clean(), device.broken))  # first in, last out
from tests.tensorrt.fakes import Device
device = Device()
from tests.tensorrt.test_contexts import load
engine, closed = load(device), load(device)
closed.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("clean True []\n", "")


def test_a_capture_that_another_library_disturbs_is_tried_again() -> None:
    device = Device()
    device.disturbed = 2
    with load(device, plan()) as engine:
        assert "CAPTURE_INVALIDATED" in engine.graph_refused
        launched = device.launched
        runs = 0
        while device.launched == launched:
            assert right(engine, 2, runs)
            runs += 1
            assert runs < 200
        assert device.captured == 3
        assert engine.graph_refused == ""
    assert device.clean()


def test_a_network_that_cannot_be_captured_is_not_tried_for_ever() -> None:
    device = Device()
    with load(device, plan(graph=False)) as engine:
        for seed in range(700):
            assert right(engine, 2, seed % 3)
        assert device.captured == TRIES
        assert "capturing" in engine.graph_refused
        assert device.launched == 0
    assert device.clean()


def test_each_of_a_few_shapes_keeps_its_graph() -> None:
    device = Device()
    with load(device) as engine:
        shapes = (2, 3, 1, 4)
        assert len(shapes) == GRAPHS
        for batch in shapes * 2:
            assert right(engine, batch)
        assert device.captured == GRAPHS
        launched = device.launched
        for seed in range(5):
            for batch in shapes:
                assert right(engine, batch, seed)
        assert device.launched - launched == 5 * GRAPHS
        assert device.captured == GRAPHS
        assert engine._plan.engine.contexts == GRAPHS + 1  # and the spare one
    assert device.clean()


def test_a_shape_that_comes_often_takes_the_place_of_the_one_not_used_for_longest() -> None:
    device = Device()
    with load(device) as engine:
        for batch in (2, 3, 1, 4) * 2:
            assert right(engine, batch)
        for seed in range(EARNED):
            assert right(engine, 9, seed)
            assert right(engine, 3)
        assert device.captured == GRAPHS  # a rare shape does not push a graph out
        assert right(engine, 9)
        assert right(engine, 9)
        assert device.captured == GRAPHS + 1
        launched = device.launched
        for batch in (9, 3, 1, 4):  # 2 was not used for the longest time
            assert right(engine, batch)
        assert device.launched - launched == GRAPHS
        assert right(engine, 2)
        assert device.launched - launched == GRAPHS
        assert engine._plan.engine.contexts == GRAPHS + 1
    assert device.clean()


def test_shapes_without_end_leave_nothing_behind() -> None:
    device = Device()
    with load(device) as engine:
        dice = np.random.default_rng(0)
        for seed in range(300):
            assert right(engine, int(dice.integers(1, 10)), seed)
        assert engine._plan.engine.contexts <= GRAPHS + 1
    assert device.clean()


def test_where_no_further_context_can_be_made_the_spare_one_serves_every_shape() -> None:
    device = Device()
    with load(device, plan(**DYNAMIC, contexts=1)) as engine:
        for batch in (2, 5, 5, 1, 9, 2):
            assert right(engine, batch)
        assert "out of device memory" in engine.graph_refused
    assert device.clean()


def test_lanes_capture_at_the_same_time_without_meeting() -> None:
    device = Device()
    with load(device, lanes=3) as engine:
        failed: list[BaseException | bool] = []

        def send(seed: int) -> None:
            try:
                for batch in (1, 2, 3, 4, 1, 2, 3, 4, 5, 6) * 4:
                    if not right(engine, batch, seed):
                        failed.append(False)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=send, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert failed == []
        assert device.broken == []
    assert device.clean()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("set_input_shape", r"cannot have the shape \[N, 4, 5, 3\]: Failed to set input shape; .*batch"),
        ("infer_shapes", r"from frame \[N, 4, 5, 3\] cannot be computed: Failed to infer shapes; .*--batch"),
        ("execute_async_v3", "could not start the network: Unexpected exception; see the server's log"),
    ],
)
def test_what_a_binding_raises_is_one_line_and_the_engine_goes_on(call: str, says: str) -> None:
    device = Device()
    with pytest.raises(Refused, match=says.replace("N", "9")):  # loading begins with the largest shapes
        load(device, plan(**DYNAMIC, raises=[call]))
    assert device.clean()
    with load(device) as engine:
        engine._plan.engine.plan["raises"] = [call]  # type: ignore[attr-defined]
        with pytest.raises(TensorRTError, match=says.replace("N", "5")) as caught:
            right(engine, 5)
        assert "\n" not in str(caught.value)
        engine._plan.engine.plan["raises"] = []  # type: ignore[attr-defined]
        for batch in (5, 5, 2, 5):
            assert right(engine, batch)
    assert device.clean()


def test_a_plan_whose_loading_raises_is_refused_in_one_line() -> None:
    device = Device()
    with pytest.raises(Refused, match=r"cannot be loaded by .*: bad optional access; plans") as caught:
        load(device, found=library(device, deserialise_raises=True))
    assert "\n" not in str(caught.value)
    assert device.clean()


def test_an_engine_that_is_closed_while_it_is_profiled_goes_when_that_is_over() -> None:
    device = Device()
    engine = load(device, plan())
    closing = threading.Thread(target=engine.close)

    class Frames(dict[str, np.ndarray]):
        def items(self) -> Any:
            if not closing.ident:
                closing.start()
                closing.join(LONG)
                assert not closing.is_alive()
                assert engine._plan.engine is not None
            return super().items()

    layers = engine.profile(Frames(frame=np.zeros((2, 4, 5, 3), np.uint8)), 2)
    assert [layer["layer"] for layer in layers] == ["max", "dot"]
    assert device.clean()
    for again in (
        lambda: engine.profile({}),
        engine.layers,
        lambda: engine.run({"frame": np.zeros((2, 4, 5, 3), np.uint8)}, ["mixed"]),
    ):
        with pytest.raises(TensorRTError, match="the engine is closed"):
            again()
    with pytest.raises(Refused, match="the engine is closed"):
        engine.with_serving_threads()


def test_a_refit_that_fails_frees_its_engine_on_the_thread_that_made_it() -> None:
    """The error holds the refitter, which holds the engine; whoever drops the error has no context."""
    device = Device()
    with load(device, plan()) as engine:
        for weights in ({}, {"mix": np.zeros(4)}, {"mix": np.array([1.0, np.nan, 0.0])}):
            with pytest.raises(Refused) as caught:
                engine.refit(weights)
            del caught
            gc.collect()
    assert device.broken == []
    assert device.clean()


def test_a_lane_that_fails_half_way_gives_everything_back() -> None:
    """Each of the first calls of the driver fails once."""
    for name in ("stream", "allocate", "pinned", "upload", "download"):
        for skip in range(4):
            device = Device()
            calls = 0

            def failing(made: Any, name: str = name, skip: int = skip) -> Any:
                real = getattr(made, name)

                def call(*arguments: Any) -> Any:
                    nonlocal calls
                    calls += 1
                    if calls == skip + 1:
                        raise MemoryError("cuMemAlloc failed:\nout of memory")
                    return real(*arguments)

                setattr(made, name, call)
                return made

            said = ""
            try:
                TensorRTEngine.load(
                    plan(),
                    "fp32",
                    EngineConfig(device="cuda"),
                    candidate=True,
                    library=library(device),
                    driver=lambda device=device: failing(device.driver()),
                ).close()
            except Refused as refused:
                said = str(refused)
            assert not said or ("out of memory" in said and "\n" not in said)
            assert device.clean(), (name, skip, device.broken)
