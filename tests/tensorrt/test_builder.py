"""The builder's options, on a fake that enforces the documented rules; graphs are real ONNX."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.graph.half import to_half
from export.tensorrt import BuildOptions, Cancelled, build_plan, parse_batch, refit_plan
from export.tensorrt.__main__ import main
from export.tensorrt.builder import open_library
from export.tensorrt.monitor import monitor
from export.tensorrt.refit import compare_refittable
from runtime.config import EngineConfig
from runtime.engines.cuda import context
from runtime.engines.tensorrt import library as tensorrt_library
from runtime.engines.tensorrt.engine import TensorRTEngine
from runtime.engines.tensorrt.library import Library, Log, TensorRTError, check, version_of
from tests.tensorrt import fakes
from tests.tensorrt.fake_builder import TimingCache, library
from tests.tensorrt.graphs import segmentation
from tests.waits import PATIENCE

FIXED = segmentation(batch=1).SerializeToString()
FREE = segmentation().SerializeToString()


def built(options: BuildOptions | None = None, onnx: bytes = FIXED, **quirks: Any) -> dict[str, Any]:
    """What the fake builder was told."""
    plan = build_plan(onnx, options, library=library(**quirks))
    found: dict[str, Any] = json.loads(plan.data)
    return found


def test_defaults_are_strongly_typed_fp32_without_tf32() -> None:
    told = built()
    assert told["flags"] == []
    assert (told["level"], told["hardware"], told["device"], told["pools"]) == (3, "NONE", "GPU", {})


def test_every_option_reaches_the_builder() -> None:
    options = BuildOptions(
        workspace=1 << 28,
        optimisation_level=5,
        version_compatible=True,
        hardware="ampere+",
        tf32=True,
    )
    told = built(options)
    assert told["flags"] == ["TF32", "VERSION_COMPATIBLE"]
    assert (told["level"], told["hardware"]) == (5, "AMPERE_PLUS")
    assert told["pools"] == {"WORKSPACE": 1 << 28}
    assert built(BuildOptions(hardware="same-capability"))["hardware"] == "SAME_COMPUTE_CAPABILITY"


def test_batch_and_profiles() -> None:
    told = built(BuildOptions(batch=(1, 4, 8)), FREE)
    shapes = [[n, 32, 64, 3] for n in (1, 4, 8)]
    assert told["profiles"] == [{"frame": shapes}]
    given = ((2, 32, 64, 3), (2, 32, 64, 3), (3, 32, 64, 3))
    told = built(BuildOptions(batch=(1, 4, 8), profiles={"frame": given}), FREE)
    assert told["profiles"] == [{"frame": [list(shape) for shape in given]}]
    assert built(BuildOptions(batch=(4, 4, 4)))["profiles"] == []  # a fixed graph takes its own batch


@pytest.mark.parametrize(
    ("how", "onnx", "says"),
    [
        ({}, FREE, "'frame' has the free shape"),
        ({"batch": (1, 2, 4)}, FIXED, "batch is fixed"),
        ({"profiles": {"image": ((1,), (1,), (1,))}}, FREE, "profile for 'image'"),
        ({"profiles": {"frame": ((1, 9, 9, 3),) * 3}}, FREE, "does not fit"),
        ({"refit": ("stem.weigth",)}, FIXED, r"no weight 'stem\.weigth'; did you mean 'stem\.weight'"),
        ({"precision": "fp16"}, FIXED, "graph is fp32, not fp16.*to_half"),
        ({"precision": "int8"}, FIXED, "graph is fp32, not int8.*Q/DQ"),
    ],
)
def test_options_that_do_not_fit_the_graph(how: dict[str, Any], onnx: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        built(BuildOptions(**how), onnx)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"precision": "bf16"}, "precision is 'bf16'"),
        ({"hardware": "hopper"}, "hardware is 'hopper'"),
        ({"optimisation_level": 6}, "optimisation_level is 6"),
        ({"batch": (4, 2, 8)}, "min <= opt <= max"),
        ({"batch": (0, 2, 8)}, "0 < min"),
        ({"profiles": {"x": ((1, 2), (1, 1), (1, 2))}}, "x .*min <= opt"),
        ({"replay": True}, "replay needs a timing_cache"),
        ({"dla": 0}, "fp16 and int8 only"),
    ],
)
def test_options_that_cannot_be(how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        BuildOptions(**how)


@pytest.mark.parametrize(
    ("model", "precision"),
    [(segmentation(batch=1), "fp32"), (segmentation(batch=1, qdq=True), "int8")],
)
def test_precision_is_what_the_graph_says(model: Any, precision: str) -> None:
    built(BuildOptions(precision=precision), model.SerializeToString())
    for other in {"fp32", "fp16", "int8"} - {precision}:
        with pytest.raises(ValueError, match=f"the graph is {precision}, not {other}"):
            built(BuildOptions(precision=other), model.SerializeToString())


def kernels(cache: Path) -> dict[str, int]:
    return dict(TimingCache(cache.read_bytes(), editable=True).tactics)


def test_the_timing_cache_is_recorded_then_replayed(tmp_path: Path) -> None:
    cache = tmp_path / "times"
    built(BuildOptions(timing_cache=cache))
    assert kernels(cache) == {"conv": 7}
    recorded = cache.read_bytes()
    told = built(BuildOptions(timing_cache=cache, replay=True))
    assert told["flags"] == ["EDITABLE_TIMING_CACHE", "ERROR_ON_TIMING_CACHE_MISS"]
    assert cache.read_bytes() == recorded  # a replay writes nothing
    built(BuildOptions(timing_cache=cache), kernels="pool")
    assert kernels(cache) == {"conv": 7, "pool": 7}
    assert [path.name for path in tmp_path.iterdir()] == ["times"]


def test_a_replay_compares_the_chosen_kernels_and_not_the_bytes(tmp_path: Path) -> None:
    """The fake serialises other times in another order each time, as a device's description may differ."""
    cache = tmp_path / "times"
    cache.write_bytes(b"pool=3@0.25 conv=7@0.5 norm=1@0.125")
    for _ in range(2):
        built(BuildOptions(timing_cache=cache, replay=True))
    built(BuildOptions(timing_cache=cache, replay=True), pruned="norm")  # an entry that was not used
    with pytest.raises(TensorRTError, match=r"\(1 of 3 entries are new or differ\)"):
        built(BuildOptions(timing_cache=cache, replay=True), retimed=True)


@pytest.mark.parametrize(
    ("content", "quirks", "says"),
    [
        (None, {}, "does not exist: record it"),
        (b"pool=1@1", {}, "could not build the network: timing cache miss"),
        (b"pool=1@1", {"silent_miss": True}, "lacked some of this network's kernels"),
        (b"other", {}, "another TensorRT version or GPU; delete"),
        (b"damaged", {}, "cannot be used: magicTagRead .*; .* delete"),
    ],
)
def test_replay_refuses_what_was_not_recorded(
    tmp_path: Path, content: bytes | None, quirks: dict[str, Any], says: str
) -> None:
    cache = tmp_path / "times"
    if content is not None:
        cache.write_bytes(content)
    with pytest.raises(TensorRTError, match=says):
        built(BuildOptions(timing_cache=cache, replay=True), **quirks)
    assert (cache.read_bytes() if content else None) == content


def test_a_damaged_timing_cache_is_not_overwritten(tmp_path: Path) -> None:
    """TensorRT logs an error and goes on with an empty cache."""
    cache = tmp_path / "times"
    cache.write_bytes(b"damaged")
    with pytest.raises(TensorRTError, match="cannot be used: magicTagRead"):
        built(BuildOptions(timing_cache=cache))
    assert cache.read_bytes() == b"damaged"


def test_builds_of_one_process_come_one_after_the_other() -> None:
    """The fake refuses a second build beside the first; the first one waits until the second has begun."""
    failed: list[BaseException] = []
    inside, others = threading.Event(), []

    def second() -> None:
        inside.set()
        try:
            built()
        except BaseException as error:
            failed.append(error)

    def progress(*step: Any) -> None:
        if not others:
            others.append(threading.Thread(target=second))
            others[0].start()
            assert inside.wait(PATIENCE)
            others[0].join(0.2)

    build_plan(FIXED, library=library(), progress=progress)
    others[0].join(PATIENCE)
    assert not others[0].is_alive()
    assert failed == []


def test_exactly_the_adapted_weights_are_marked() -> None:
    adapted = ("head.bias", "head.weight")
    plan = build_plan(
        FIXED, BuildOptions(refit=adapted), library=library(all_weights=["head.weight", "head.bias"])
    )
    told = json.loads(plan.data)
    assert told["flags"] == ["REFIT_INDIVIDUAL"]
    assert told["marked"] == list(adapted)
    assert plan.refittable == adapted
    assert plan.layers["Layers"] == ["max", "dot"]


def test_what_a_refit_would_take_is_compared_with_what_was_marked() -> None:
    compare_refittable(["a", "b"], ["b", "a"])
    with pytest.raises(TensorRTError, match="folded 'a' into others"):
        compare_refittable(["a", "b"], ["b"])
    with pytest.raises(TensorRTError, match="also wants 'c' at every refit"):
        compare_refittable(["a"], ["a", "c"])
    with pytest.raises(TensorRTError, match=r"folded 'head\.bias'"):
        build_plan(
            FIXED,
            BuildOptions(refit=("head.bias", "head.weight")),
            library=library(all_weights=["head.weight"]),
        )


@pytest.mark.parametrize(
    ("version", "cores", "says"),
    [
        ("11.0.0.1", 2, "has no DLA"),
        ("11.4.0.106", 2, "has no DLA"),
        ("11.4.1.2", 0, "this device has 0"),
        ("11.4.1.2", 2, ""),
        ("10.16.1.11", 1, ""),
        ("10.16.1.11", 0, "this device has 0"),
    ],
)
def test_dla_depends_on_the_version_and_the_device(version: str, cores: int, says: str) -> None:
    onnx = to_half(segmentation(batch=1)).SerializeToString()
    options = BuildOptions(precision="fp16", dla=0)
    if says:
        with pytest.raises(TensorRTError, match=says):
            built(options, onnx, version=version, dla=cores)
        return
    told = built(options, onnx, version=version, dla=cores)
    assert (told["device"], told["dla"]) == ("DLA", 0)
    assert told["flags"] == ["GPU_FALLBACK"]
    alone = BuildOptions(precision="fp16", dla=0, gpu_fallback=False)
    assert built(alone, onnx, version=version, dla=cores)["flags"] == []


def test_a_failed_build_says_why_and_what_next() -> None:
    with pytest.raises(TensorRTError, match=r"could not build the network: no tactics.*export\.inspect"):
        built(fails=True)


def test_a_parser_error_names_the_node() -> None:
    model = segmentation(batch=1)
    model.graph.node[0].op_type = "Det"
    with pytest.raises(TensorRTError, match=r"node 'odd' \(Det\): Unsupported operator \(and 1 more\)"):
        built(onnx=model.SerializeToString())


def test_progress_cancels_and_its_errors_surface() -> None:
    seen: list[Any] = []
    build_plan(FIXED, library=library(), progress=lambda *step: seen.append(step))
    assert seen == [("Building engine", 0, 1), ("Building engine", 1, 1)]
    with pytest.raises(Cancelled):
        build_plan(FIXED, library=library(), progress=lambda *step: False)

    def fail(*step: Any) -> None:
        raise ZeroDivisionError("bar")

    with pytest.raises(TensorRTError, match="ZeroDivisionError: bar"):
        build_plan(FIXED, library=library(), progress=fail)


def test_refit_plan_writes_a_plan_that_runs_with_the_new_weights_and_can_be_refitted_again() -> None:
    device = fakes.Device()
    here = fakes.library(device)
    mix = np.array([2.0, 0.0, -1.0], np.float32)
    plan = refit_plan(fakes.plan(), {"mix": mix}, library=here)
    frame = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    config = EngineConfig()
    with TensorRTEngine.load(
        plan, "fp32", config, candidate=True, library=here, driver=device.driver
    ) as engine:
        mixed = engine.run({"frame": frame}, ["mixed"])["mixed"]
        np.testing.assert_allclose(mixed, frame.astype(np.float32) @ mix, rtol=1e-6)
    assert json.loads(refit_plan(plan, {"mix": -mix}, library=here))["mix"] == [-2.0, 0.0, 1.0]


def test_nothing_is_raised_into_tensorrt_by_the_progress_monitor() -> None:
    """Phase names that cannot be hashed, and callbacks that raise, in each of the three methods."""

    def interrupted(*step: Any) -> None:
        raise KeyboardInterrupt

    for call, arguments in (
        ("phase_start", (["no name"], None, 1)),
        ("phase_start", ("inner", ["no name"], 1)),
        ("step_complete", (["no name"], 0)),
        ("phase_finish", (["no name"],)),
    ):
        trouble: list[BaseException] = []
        watch = monitor(library(), lambda *step: None, trouble)
        watch.phase_start("outer", None, 2)
        assert getattr(watch, call)(*arguments) in (None, False)
        assert [type(error) for error in trouble] == [TypeError]
        assert watch.step_complete("outer", 0) is False  # the build stops
    trouble = []
    watch = monitor(library(), interrupted, trouble)
    watch.phase_start("outer", None, 2)
    watch.phase_finish("outer")
    assert [type(error) for error in trouble] == [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        build_plan(FIXED, library=library(), progress=interrupted)


def test_nothing_is_raised_into_tensorrt_by_the_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    found, log = library(), Log()
    said = tensorrt_library.logger(found, log)
    said.log(found.module.ILogger.ERROR, 7)  # no text
    said.log("no severity", "text")
    assert log.lines() == []
    interrupted: list[bool] = []

    def press(*line: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Log, "add", press)
    monkeypatch.setattr(tensorrt_library._thread, "interrupt_main", lambda: interrupted.append(True))
    said.log(found.module.ILogger.ERROR, "text")
    assert interrupted == [True]  # Ctrl-C is not lost: it is raised once TensorRT has returned


@pytest.mark.parametrize("version", ["10.12.0.36", "10.13.3.9"])
def test_an_older_tensorrt_does_not_write_plans_that_cannot_be_refitted_again(version: str) -> None:
    """They have no SerializationFlag.INCLUDE_REFIT.  A standby engine can be refitted all the same."""
    device = fakes.Device()
    here = fakes.library(device, version)
    mix = np.array([2.0, 0.0, -1.0], np.float32)
    says = rf"tensorrt {version} writes a refitted plan that no refit can change again: 10\.14\.1 or newer"
    with pytest.raises(TensorRTError, match=says):
        refit_plan(fakes.plan(), {"mix": mix}, library=here)
    with TensorRTEngine.load(
        fakes.plan(), "fp32", EngineConfig(), candidate=True, library=here, driver=device.driver
    ) as engine:
        engine.refit({"mix": mix}).close()
    assert device.clean()


def test_what_the_binding_raises_in_a_refit_is_one_line() -> None:
    here = fakes.library(fakes.Device(), deserialise_raises=True)
    with pytest.raises(TensorRTError, match="failed: bad optional access; build the plan again"):
        refit_plan(fakes.plan(), {"mix": np.ones(3, np.float32)}, library=here)


def test_refit_plan_refuses_what_it_cannot_cover() -> None:
    device = fakes.Device()
    with pytest.raises(TensorRTError, match="'mix' given for the plan's 1 refittable weights is missing"):
        refit_plan(fakes.plan(), {}, library=fakes.library(device))
    with pytest.raises(TensorRTError, match="the plan cannot be loaded: magicTag"):
        refit_plan(b"{", {"mix": np.ones(3)}, library=fakes.library(device))


def test_refit_plan_runs_host_code_only_when_told_to() -> None:
    here, plan = fakes.library(fakes.Device()), fakes.plan(host_code=True)
    with pytest.raises(TensorRTError, match="host code"):
        refit_plan(plan, {"mix": np.ones(3, np.float32)}, library=here)
    assert refit_plan(plan, {"mix": np.ones(3, np.float32)}, host_code=True, library=here)


@pytest.mark.parametrize(("text", "value"), [("4", (4, 4, 4)), ("1:4:8", (1, 4, 8)), ("2:2:2", (2, 2, 2))])
def test_batch_is_read(text: str, value: tuple[int, int, int]) -> None:
    assert parse_batch(text) == value


@pytest.mark.parametrize("text", ["", "0", "1:2", "4:2:8", "1:2:3:4", "a", "-1", "1:8:4"])
def test_batch_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="batch"):
        parse_batch(text)


def test_check_lets_right_answers_through_and_explains_wrong_ones() -> None:
    log = Log()
    assert check(0, "w", "r", log) == 0
    assert check(True, "w", "r", log)
    assert check("x", "w", "r", log) == "x"
    for wrong in (None, False, -1):
        with pytest.raises(TensorRTError, match="it failed: TensorRT gave no reason; do that"):
            check(wrong, "it failed", "do that", log)
    log.add("ERROR", "first\n reason")
    log.add("WARNING", "by the way")
    with pytest.raises(TensorRTError, match="it failed: first reason; do that"):
        check(None, "it failed", "do that", log)


def test_versions() -> None:
    assert version_of("11.4.0.106") == (11, 4, 0, 106)
    assert version_of("10.16.1.11.post2") == (10, 16, 1, 11)


def test_a_library_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(context, "probe", lambda: context.Probe((13, 0), ()))
    monkeypatch.setitem(sys.modules, "tensorrt", library("10.9.0.34").module)
    with pytest.raises(TensorRTError, match=r"tensorrt 10\.9\.0\.34 is too old: 10\.12"):
        tensorrt_library.tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", library("10.12.0.1").module)
    found = tensorrt_library.tensorrt()
    assert isinstance(found, Library)
    assert found.version == (10, 12, 0, 1)


def test_the_device_is_probed_before_tensorrt_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(library: str = "") -> context.Probe:
        raise context.CudaError("no CUDA driver")

    def never(name: str) -> None:
        raise AssertionError(f"{name} was imported without a device")

    monkeypatch.setattr(context, "probe", absent)
    monkeypatch.setattr(tensorrt_library.importlib, "import_module", never)
    with pytest.raises(TensorRTError, match="TensorRT cannot be used: no CUDA driver"):
        open_library("tensorrt")
    with pytest.raises(ValueError, match="backend 'trt'"):
        open_library("trt")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "m.onnx"
    source.write_bytes(FIXED)
    with pytest.raises(SystemExit) as caught:
        main([str(source), "--batch", "8:4:1"])
    assert caught.value.code == 2
    assert "min <= opt <= max" in capsys.readouterr().err
    assert main([str(tmp_path / "absent.onnx")]) == 1
    assert "absent.onnx" in capsys.readouterr().err
