"""What ships with the project starts without a warning, and its drift monitor knows its home."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from adapt import inference
from adapt.data.base import read_frame
from bench.demo import streets
from export.build import Options, build
from networks.pack import load_pack
from runtime.config import EngineConfig, ServerConfig
from runtime.drift import DriftConfig, SourceDrift, measure
from runtime.server import Server

ROOT = Path(__file__).resolve().parent.parent
PACKS = sorted(path.parent for path in (ROOT / "packs").glob("*/model.toml"))


def test_there_are_packs_to_look_at():
    assert PACKS


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.name)
def test_a_shipped_pack_is_built_and_served_without_a_warning(path, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        build(load_pack(path), tmp_path / "engines", model="road", options=Options(threads=1))
        config = ServerConfig(
            repository=str(tmp_path / "engines"), port=0, metrics_port=-1, engine=EngineConfig(threads=1)
        )
        with Server(config) as server:
            assert server.service.ready()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("path", PACKS, ids=lambda path: path.name)
def test_the_reference_is_of_the_packs_own_network(path):
    pack = load_pack(path)
    reference = pack.reference()
    classes = len(pack.spec.classes)
    assert reference["share"].shape == (classes,)
    assert reference["share"].sum() == pytest.approx(1.0)
    assert reference["confidence"].shape == (classes, 256)
    frames = [read_frame(frame) for frame, _ in pack.replay()]
    ours = inference.confidence_histogram(pack.network(), pack.spec, frames)
    told = reference["confidence"] / reference["confidence"].sum()
    # Mean confidence of each class that is seen often: the pack's frames are JPEG, the reference's are not.
    levels = np.arange(256) / 255
    for c in np.flatnonzero(ours.sum(1) > 0.01 * ours.sum()):
        assert abs(ours[c] @ levels / ours[c].sum() - told[c] @ levels / told[c].sum()) < 0.02


def test_day_is_home_and_dusk_is_not_though_the_monitor_starts_there():
    pack = load_pack(ROOT / "packs" / "street-day")
    network = pack.network()
    for domain, wanted in (("day", "in-domain"), ("dusk", "drifting")):
        drift = SourceDrift(domain, len(pack.spec.classes), DriftConfig(learn=48), pack.reference())
        for i, frame in enumerate(streets.stream(0, domain, drives=16, frames=3)):
            labels, sure = inference.labels_and_confidence(network, pack.spec, inference.as_tensor([frame]))
            drift.add(measure(labels[0], sure[0], len(pack.spec.classes)), None, i / 2)
        assert drift.status().state == wanted, drift.status().reason
