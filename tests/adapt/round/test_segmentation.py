"""A round of adaptation: helps on another light, repeats itself, survives kill -9, refuses collapses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from adapt.data.base import read_label
from adapt.evaluate.scoring import score
from adapt.round import RoundConfig, RoundError, SegmentationRound, adapt
from adapt.round.presets import PRESETS, preset
from networks.pack import load_pack
from tests.adapt.conftest import toy_scene

QUICK = RoundConfig(portions=(0.3, 0.5), steps=12, source=3, target=3, checkpoint_every=4, rate=1e-3)


def dark_score(pack) -> float:
    data = [toy_scene(900 + i, dark=True) for i in range(12)]
    return score(pack.network(), pack.spec, data)[0].miou()


@pytest.fixture(scope="module")
def finished(toy_pack, dark_frames, tmp_path_factory):
    out = tmp_path_factory.mktemp("round")
    return out, adapt(toy_pack, dark_frames, config=QUICK, out=out)


def test_a_round_gains_on_the_new_domain_and_keeps_the_old(finished, toy_pack):
    _, result = finished
    assert result.accepted, result.report["gate"]
    assert dark_score(result.pack) > dark_score(toy_pack) + 0.15
    measures = result.report
    assert measures["candidate_measures"]["source"] > measures["parent_measures"]["source"] - 0.03


def test_the_pack_names_its_parent_and_carries_what_decided(finished, toy_pack):
    out, result = finished
    spec = load_pack(out / "pack").spec
    assert spec.parent == toy_pack.sha256
    assert spec.version.startswith("1.0.0.r")
    assert spec.adaptation["config"]["seed"] == 0
    assert spec.adaptation["gate"]["passed"] is True
    assert len(spec.adaptation["stages"]["label-1"]["lambda"]) == 4
    assert len(result.pack.replay()) == len(toy_pack.replay())
    report = json.loads((out / "report.json").read_text())
    assert {c["name"] for c in report["gate"]["checks"]} >= {
        "source-holdout",
        "class-vanished",
        "flip-consistency",
    }


def test_golden_frames_are_of_this_road_first_then_the_parents(finished, toy_pack, dark_frames, tmp_path):
    golden = finished[1].pack.golden()
    dark = [frame.tobytes() for frame in dark_frames]
    assert [frame.tobytes() in dark for frame in golden] == [True, True, False]
    assert golden[2].tobytes() == toy_pack.golden()[0].tobytes()
    work = SegmentationRound(toy_pack, dark_frames, QUICK, tmp_path)
    learnt = {frame.tobytes() for frame in work.inputs.target}
    assert not learnt & {frame.tobytes() for frame in golden}, "witnesses are frames nothing was learnt from"
    none = SegmentationRound(toy_pack, dark_frames, replace(QUICK, golden=0), tmp_path)
    assert none.golden().tobytes() == toy_pack.golden().tobytes()


def test_the_same_round_again_gives_the_same_weights(finished, toy_pack, dark_frames, tmp_path):
    _, first = finished
    again = adapt(toy_pack, dark_frames, config=QUICK, out=tmp_path)
    for name, tensor in first.pack.state().items():
        assert torch.equal(tensor, again.pack.state()[name]), name


def test_a_finished_round_is_not_run_again(finished, toy_pack, dark_frames, tmp_path):
    out, first = finished
    out = shutil.copytree(out, tmp_path / "round")
    told = []
    again = adapt(toy_pack, dark_frames, config=QUICK, out=out, progress=lambda *a, **k: told.append(a[0]))
    assert again.pack.sha256 == first.pack.sha256
    assert not any(stage.startswith("train") for stage in told)


def test_a_folder_of_another_round_is_refused(finished, toy_pack, dark_frames, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "round")
    with pytest.raises(RoundError, match="holds another round"):
        adapt(toy_pack, dark_frames[:-1], config=QUICK, out=out)


CHILD = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
from adapt.data.base import read_label
from adapt.round import RoundConfig, adapt
from networks.pack import load_pack
frames = list(np.load(sys.argv[2]))
config = RoundConfig(portions=(0.3, 0.5), steps=12, source=3, target=3, checkpoint_every=4, rate=1e-3)

def say(*words):
    print(*words, flush=True)
    sys.stdin.readline()  # whoever kills has the word: at this line, and at none after it

say("go")
adapt(load_pack(sys.argv[1]), frames, config=config, out=sys.argv[3],
      progress=lambda stage, done, total, **k: say(stage, done))
say("finished")
"""


def test_killed_anywhere_it_ends_with_the_same_weights(finished, toy_pack, dark_frames, tmp_path):
    """kill -9 after a growing number of progress lines, until one run gets through."""
    np.save(tmp_path / "frames.npy", np.stack(dark_frames))
    arguments = [str(toy_pack.path), str(tmp_path / "frames.npy"), str(tmp_path / "round")]
    kills = 0
    for patience in (60, 75, 90, 10_000):
        command = [sys.executable, "-c", CHILD, *arguments]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdin is not None
        assert child.stdout is not None
        lines = []
        for line in child.stdout:
            lines.append(line.strip())
            if len(lines) >= patience:
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
                break
            child.stdin.write("\n")
            child.stdin.flush()
        child.stdin.close()
        child.stdout.close()
        child.wait()
        if lines and lines[-1] == "finished":
            break
    assert kills >= 2
    assert lines[-1] == "finished"
    resumed = load_pack(tmp_path / "round" / "pack")
    for name, tensor in finished[1].pack.state().items():
        assert torch.equal(tensor, resumed.state()[name]), name
    assert json.loads((tmp_path / "round" / "report.json").read_text())["resumed"] == kills


def test_source_free_uses_no_replay(toy_pack_without_replay, toy_pack, dark_frames, tmp_path):
    result = adapt(toy_pack_without_replay, dark_frames, config=QUICK, out=tmp_path / "a")
    assert result.report["source_free"] is True
    assert result.report["frames"]["replay"] == 0
    assert "source-holdout" not in {c["name"] for c in result.report["gate"]["checks"]}
    assert dark_score(result.pack) > dark_score(toy_pack_without_replay) + 0.1
    told = adapt(
        toy_pack, dark_frames, config=RoundConfig(**{**vars(QUICK), "source_free": True}), out=tmp_path / "b"
    )
    assert told.report["source_free"] is True
    with pytest.raises(RoundError, match="no replay"):
        adapt(toy_pack_without_replay, dark_frames, config=RoundConfig(source_free=False), out=tmp_path / "c")


def test_a_training_that_collapses_is_refused(toy_pack, dark_frames, tmp_path):
    """A learning rate that destroys the network: the gate must say so, and its weights go nowhere."""
    wild = {**vars(QUICK), "rate": 3.0, "schedule": "constant", "portions": (0.3, 0.5), "steps": 15}
    result = adapt(toy_pack, dark_frames, config=RoundConfig(**wild), out=tmp_path / "a")
    assert result.report["chosen"] == "statistics"
    assert result.report["stages"]["train-1"]["failed"]
    assert "label-2" not in result.report["stages"]
    parent = toy_pack.state()
    for name, tensor in result.pack.state().items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(tensor, parent[name]), name
    bare = adapt(toy_pack, dark_frames, config=RoundConfig(**{**wild, "adabn": False}), out=tmp_path / "b")
    assert not bare.accepted
    assert bare.pack is None
    assert not (tmp_path / "b" / "pack").exists()
    assert "changed" in bare.report["gate"]["failed"]


@pytest.mark.parametrize(("fault", "check"), [("covered", "frames-contrast"), ("stuck", "frames-motion")])
def test_a_covered_lens_and_a_stuck_camera_are_declined_before_any_work(toy_pack, tmp_path, fault, check):
    still = toy_scene(0)[0]
    frames = [
        np.full((32, 64, 3), 3, np.uint8) + np.uint8(i % 2) if fault == "covered" else still for i in range(9)
    ]
    told = []
    result = adapt(toy_pack, frames, config=QUICK, out=tmp_path, progress=lambda *a, **k: told.append(a[0]))
    assert not result.accepted
    assert result.pack is None
    assert check in result.report["gate"]["failed"]
    assert not any("train" in stage for stage in told if not stage.startswith("read"))


def test_presets_of_labelling_and_training_run(toy_pack, dark_frames, tmp_path):
    rich = RoundConfig(
        portions=(0.4,),
        steps=6,
        source=2,
        target=2,
        policy="st",
        label_flip=True,
        label_scales=(0.75, 1.0),
        mrkld=0.1,
        ema=0.9,
        rare=0.1,
        classmix=0.5,
        bn="split",
        brightness=1.5,
        colour=0.1,
        ignore_bottom=4,
        ignore_border=1,
        crop=(32, 32),
        prior=True,
    )
    result = adapt(toy_pack, dark_frames, config=rich, out=tmp_path)
    labels = result.report["stages"]["label-1"]
    assert len(set(labels["lambda"])) == 1
    assert 0.2 < labels["labelled"] < 0.6
    y = read_label(tmp_path / "labels-1" / "00000.png")
    assert (y[-4:] == 255).all()
    assert (y[:, 0] == 255).all()


def test_tags_keep_a_class_out_of_the_labels(toy_pack, dark_frames, tmp_path):
    allowed = [{0, 1, 2}] * len(dark_frames)
    result = adapt(
        toy_pack,
        dark_frames,
        config=RoundConfig(portions=(0.5,), steps=2, adabn=False),
        out=tmp_path,
        allowed=allowed,
    )
    assert result.report["stages"]["label-1"]["share"][3] == 0.0


def test_without_portions_a_round_is_batch_statistics_alone(toy_pack, dark_frames, tmp_path):
    result = adapt(toy_pack, dark_frames, config=RoundConfig(portions=()), out=tmp_path)
    assert result.report["chosen"] == "statistics"
    assert result.accepted
    assert dark_score(result.pack) > dark_score(toy_pack)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_runs(toy_pack, dark_frames, tmp_path, name):
    config = preset(name, portions=(0.4,), steps=2, source=2, target=2)
    assert adapt(toy_pack, dark_frames, config=config, out=tmp_path).report["gate"]["checks"]
    with pytest.raises(RoundError, match="choose one of"):
        preset("best")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"portions": (0.0,)}, "more than 0"),
        ({"policy": "best"}, "cbst or st"),
        ({"steps": (1, 2)}, "one for each"),
        ({"target": 0}, "1 or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(RoundError, match=message):
        RoundConfig(**arguments)


def test_too_few_frames_are_refused(toy_pack, dark_frames, tmp_path):
    def work(*_, **__):
        pytest.fail("work began")

    with pytest.raises(RoundError, match="at least 4"):
        adapt(toy_pack, dark_frames[:3], out=tmp_path, progress=work)


def test_a_round_on_a_refreshed_pack_is_judged_by_the_whole_way(finished, dark_frames, tmp_path):
    """Harmless steps may not add up: the second round knows where the first began."""
    _, first = finished
    way = first.pack.spec.adaptation["released"]
    assert way["source"] == first.report["parent_measures"]["source"]
    assert way["distance"] == first.report["distance"]
    config = RoundConfig(**{**QUICK.__dict__, "portions": (0.3,)})
    second = adapt(first.pack, dark_frames, config=config, out=tmp_path)
    checks = {c["name"]: c for c in second.report["gate"]["checks"]}
    far = way["distance"] + second.report["distance"]
    assert checks["total-distance"]["value"] == pytest.approx(far, abs=1e-4)
    drop = way["source"] - second.report["candidate_measures"]["source"]
    assert checks["total-source-holdout"]["value"] == pytest.approx(drop, abs=1e-4)
    assert "total-distance" not in {c["name"] for c in first.report["gate"]["checks"]}


NAN = float("nan")


@pytest.mark.parametrize(
    "setting",
    [
        {"portions": (NAN,)},
        {"portions": ("a",)},
        {"portions": 0.2},
        {"steps": 1.5},
        {"steps": (1, 2, -3)},
        {"source": -1},
        {"target": 0},
        {"target": 1.5},
        {"crop": 5},
        {"crop": (0, 4)},
        {"scale": (NAN, 1)},
        {"brightness": NAN},
        {"brightness": float("inf")},
        {"colour": NAN},
        {"blur": 2},
        {"noise": -1},
        {"label_scales": ()},
        {"label_scales": (0,)},
        {"label_scales": (100,)},
        {"adabn_batch": 0},
        {"adabn_keep": ()},
        {"adabn_keep": (2,)},
        {"adabn_keep": (NAN,)},
        {"holdout": 0},
        {"holdout": 1},
        {"holdout": NAN},
        {"replay_limit": -1},
        {"ignore_bottom": -1},
        {"infer_batch": 0},
        {"checkpoint_every": 0},
        {"seed": -1},
        {"threads": -1},
        {"device": "tpu"},
        {"device": ""},
        {"compat": "crst", "ignore_border": 2},
        {"compat": "cbst", "absent": ("sky",)},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(setting):
    with pytest.raises(RoundError):
        RoundConfig(**setting)


def tagged(pack, frames, out, allowed=None, **settings) -> SegmentationRound:
    return SegmentationRound(pack, frames, RoundConfig(**settings), out, allowed=allowed)


def test_tags_by_name_index_and_mask_are_the_same_round(toy_pack, dark_frames, tmp_path):
    """The round's identity holds them, so that a resumed one has the same."""
    names, n = toy_pack.spec.classes, len(dark_frames)
    told = [
        [{names[0], names[2]}] * n,
        [{0, 2}] * n,
        [np.array([2, 0])] * n,
        [np.array([True, False, True, False])] * n,
    ]
    rounds = [tagged(toy_pack, dark_frames, tmp_path, allowed) for allowed in told]
    assert {r.identity for r in rounds} == {rounds[0].identity}
    assert rounds[0].inputs.allowed == [[0, 2]] * len(rounds[0].inputs.target)
    other = tagged(toy_pack, dark_frames, tmp_path, [np.array([False, True, True, False])] * n)
    assert other.identity != rounds[0].identity


def test_a_class_that_cannot_be_here_is_in_no_tag(toy_pack, dark_frames, tmp_path):
    names, n = toy_pack.spec.classes, len(dark_frames)
    ours = tagged(toy_pack, dark_frames, tmp_path, [None, {0, 1}] * (n // 2), absent=(names[1],))
    assert {tuple(a) for a in ours.inputs.allowed} == {(0, 2, 3), (0,)}
    assert tagged(toy_pack, dark_frames, tmp_path).inputs.allowed == [None] * len(ours.inputs.target)


def test_tags_and_masks_that_cannot_be_are_refused_at_once(toy_pack, dark_frames, tmp_path):
    n = len(dark_frames)
    for allowed, settings, words in (
        ([{9}] * n, {}, r"outside 0\.\.3"),
        ([{"tram"}] * n, {}, "tags"),
        ([{"car", 1.5}] * n, {}, "tags"),
        ([3] * n, {}, "tags"),
        (None, {"absent": ("tram",)}, "no class 'tram'"),
        ([{0}] * n, {"compat": "crst"}, "knows no image tags"),
        ([{0}], {}, "1 sets of tags"),
        (None, {"ignore_bottom": 32}, "leave nothing"),
        (None, {"ignore_border": 10**6}, "leave nothing"),
    ):
        with pytest.raises(RoundError, match=words):
            tagged(toy_pack, dark_frames, tmp_path / "r", allowed, **settings)
    assert not (tmp_path / "r").exists()
